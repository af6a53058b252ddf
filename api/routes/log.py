"""Read the log page by page, and its head."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_principal, require_user_id
from jobledger.api.context import ApiContext, get_api_context, parse_query
from jobledger.api.event_filter import EventFilter, check_readable, parse_event_types, wait_for_stream_access
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.event_json import encode_event
from jobledger.api.http.pagination import JsonPage
from jobledger.api.openapi.operation import Operation
from jobledger.api.schemas.log import EventListQuery, EventListResponse, LogHeadResponse
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.events import RecordedEvent

_MAX_EVENTS_SCANNED: Final = 10_000
_READ_BATCH_EVENTS: Final = 1000


@Operation("GET", "/api/ledger/head", response=LogHeadResponse)
async def get_log_head(request: Request) -> Response:
    """Read the positions of the log and of the views."""
    require_user_id(request)
    ctx = get_api_context(request)
    head, position = await ctx.event_store.head_position(), ctx.checkpoint.position
    return json_response(
        {
            "status": "success",
            "head": head,
            "oldest": await ctx.event_store.oldest_position(),
            "projector": {"position": position, "lag": max(0, head - position)},
        }
    )


@Operation(
    "GET",
    "/api/ledger/events",
    response=EventListResponse,
    query=EventListQuery,
    error_codes=("unknown_event_type", "job_not_found", "batch_not_found", "stream_not_found", "visibility_not_ready"),
)
async def list_events(request: Request) -> Response:
    """List events of the log."""
    ctx, principal = get_api_context(request), get_principal(request)
    query = parse_query(request, EventListQuery)
    event_filter = EventFilter(parse_event_types(query.types))
    head = await ctx.event_store.head_position()
    if not principal.is_admin or query.stream is not None:
        await wait_for_stream_access(ctx.stream_access, head)
    scan = _Scan(ctx, principal, event_filter, JsonPage(query.limit), query.after)
    if query.stream is None:
        await _scan_log(scan)
    else:
        await _scan_stream(scan, query.stream)
    return json_response(
        {
            "status": "success",
            "events": scan.page.items,
            "last_position": scan.last_position,
            "head": max(head, scan.last_position if scan.scanned_count else 0),
        }
    )


@dataclass(slots=True)
class _Scan:
    """A search for the events of a page. `last_position` is the position of the last scanned event."""

    ctx: ApiContext
    principal: Principal
    event_filter: EventFilter
    page: JsonPage
    last_position: int
    scanned_count: int = 0

    @property
    def is_done(self) -> bool:
        return self.page.is_full or self.scanned_count >= _MAX_EVENTS_SCANNED

    async def add_events(self, events: Sequence[RecordedEvent]) -> None:
        """Scan events in order until the page is full. Add those that match and that the principal may read."""
        stream_access, matches = self.ctx.stream_access, self.event_filter.matches
        if not self.principal.is_admin:
            await stream_access.wait_for_position(events[-1].position)
            await stream_access.load_access({event.stream for event in events if matches(event)})
        for event in events:
            if matches(event) and (viewer := await stream_access.get_viewer(self.principal, event)) is not None:
                self.page.add(encode_event(event, viewer))
            self.scanned_count += 1
            self.last_position = event.position
            if self.page.is_full:
                break


async def _scan_log(scan: _Scan) -> None:
    event_store = scan.ctx.event_store
    while not scan.is_done and (events := await event_store.read(after=scan.last_position, limit=_READ_BATCH_EVENTS)):
        await scan.add_events(events)


async def _scan_stream(scan: _Scan, stream: str) -> None:
    """Scan one stream.

    Raises:
        ApiError: 404, the stream does not exist, or the principal may not read it.
    """
    event_store = scan.ctx.event_store
    if not scan.principal.is_admin:
        await check_readable(scan.ctx.stream_access, scan.principal, stream)
    version = await event_store.version_at(stream, scan.last_position)
    if scan.principal.is_admin and not version and not await event_store.read_stream(stream, limit=1):
        raise ApiError(404, "stream_not_found", f"Stream {stream} not found.")
    while not scan.is_done and (
        events := await event_store.read_stream(
            stream, after_version=version, limit=_READ_BATCH_EVENTS, single_batch=True
        )
    ):
        await scan.add_events(events)
        version = events[-1].version
