"""api: the log page by page, for auditors and for whoever keeps a copy, and how far it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_principal, require_user_id
from jobledger.api.context import ApiContext, get_api_context, parse_query
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.event_json import encode_event
from jobledger.api.routes.log_stream import EventFilter, check_readable, parse_event_types, wait_for_visibility
from jobledger.api.schemas.requests import EventListQuery
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.events import RecordedEvent

_MAX_EVENTS_SCANNED: Final = 10_000
_READ_AT_ONCE: Final = 1000
_LARGEST_ANSWER_BYTES: Final = 4 * 1024 * 1024


async def get_log_head(request: Request) -> Response:
    """GET /api/ledger/head"""
    require_user_id(request)
    known = get_api_context(request)
    newest, views = await known.event_store.head_position(), known.checkpoint.position
    return json_response(
        {
            "status": "success",
            "head": newest,
            "oldest": await known.event_store.oldest_position(),
            "projector": {"position": views, "lag": max(0, newest - views)},
        }
    )


async def list_events(request: Request) -> Response:
    """GET /api/ledger/events"""
    known, principal = get_api_context(request), get_principal(request)
    asked = parse_query(request, EventListQuery)
    wanted = EventFilter(parse_event_types(asked.types))
    newest = await known.event_store.head_position()
    if not principal.is_admin or asked.stream is not None:
        await wait_for_visibility(known.visibility, newest)
    found = LogPage(asked.after, asked.limit)
    if asked.stream is None:
        await _scan_log(known, principal, wanted, found)
    else:
        await _scan_stream(known, principal, wanted, found, asked.stream)
    return json_response(
        {
            "status": "success",
            "events": found.events,
            "last_position": found.last_position,
            "head": max(newest, found.last_position if found.scanned_count else 0),
        }
    )


@dataclass(slots=True)
class LogPage:
    """What is found of a page, and how far was looked. It is full at `limit` events, or with very large ones sooner."""

    last_position: int
    limit: int
    events: list[orjson.Fragment] = field(default_factory=list)
    scanned_count: int = 0
    _bytes: int = 0

    @property
    def is_full(self) -> bool:
        return len(self.events) >= self.limit or self._bytes >= _LARGEST_ANSWER_BYTES

    @property
    def is_done(self) -> bool:
        return self.is_full or self.scanned_count >= _MAX_EVENTS_SCANNED

    async def add_events(
        self, known: ApiContext, principal: Principal, wanted: EventFilter, events: Sequence[RecordedEvent]
    ) -> None:
        """Look at events, in order, until the page is full; keep those that are wanted and may be seen."""
        everything = principal.is_admin
        if not everything:
            await known.visibility.wait_for_position(events[-1].position)
            await known.visibility.load_access({event.stream for event in events if wanted.matches(event)})
        for event in events:
            if wanted.matches(event) and (viewer := await known.visibility.get_viewer(principal, event)) is not None:
                text = encode_event(event, viewer)
                self.events.append(orjson.Fragment(text))
                self._bytes += len(text)
            self.scanned_count += 1
            self.last_position = event.position
            if self.is_full:
                break


async def _scan_log(known: ApiContext, principal: Principal, wanted: EventFilter, found: LogPage) -> None:
    while not found.is_done:
        events = await known.event_store.read(after=found.last_position, limit=_READ_AT_ONCE)
        if not events:
            return
        await found.add_events(known, principal, wanted, events)


async def _scan_stream(
    known: ApiContext, principal: Principal, wanted: EventFilter, found: LogPage, stream: str
) -> None:
    if not principal.is_admin:
        await check_readable(known.visibility, principal, stream)
    version = await known.event_store.version_at(stream, found.last_position)
    if principal.is_admin and not version and not await known.event_store.read_stream(stream, limit=1):
        raise ApiError(404, "stream_not_found", f"There is no stream {stream}.")
    while not found.is_done:
        events = await known.event_store.read_stream(
            stream, after_version=version, limit=_READ_AT_ONCE, single_batch=True
        )
        if not events:
            return
        await found.add_events(known, principal, wanted, events)
        version = events[-1].version
