"""Read the log page by page, or stream it live.

The stream consists of Server-Sent Events (https://html.spec.whatwg.org/multipage/server-sent-events.html). A client has
a cursor on the log instead of a queue: events that it has not read wait in the log. A client that does not read is
disconnected. `id:` is the position. Browsers dispatch no event for a block that has only an id, but they resume from
it. The stream sends such blocks at its start, and while it has no event for the client although the log grows.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Collection, Sequence
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_principal, require_user_id
from jobledger.api.auth.redaction import Viewer
from jobledger.api.auth.stream_access import StreamAccessCache
from jobledger.api.context import ApiContext, get_api_context
from jobledger.api.event_json import encode_event
from jobledger.api.http.errors import ApiError, build_json_response
from jobledger.api.http.sse import EventStreamResponse
from jobledger.api.http.validation import parse_query, validate_content
from jobledger.api.openapi.operation import Operation
from jobledger.api.pagination import JsonPage
from jobledger.api.resources import BATCH, JOB
from jobledger.api.schemas.log import EventListQuery, EventListResponse, LogHeadResponse, StreamQuery
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import EVENT_TYPES, PositionVoided, RecordedEvent

_MAX_EVENTS_SCANNED: Final = 10_000
_READ_BATCH_EVENTS: Final = 1000
_STREAM_ACCESS_TIMEOUT_SECONDS: Final = 10.0
KEEPALIVE_SECONDS: Final = 15.0
"""The stream sends a comment after this time without an event."""
MAX_STREAM_SECONDS: Final = 900.0
"""After this time, the client must reconnect and authenticate again, because its key may have been revoked."""
_SEND_BYTES: Final = 64 * 1024
_CHUNK_EVENTS: Final = 500
_CHUNK_BYTES: Final = 1024 * 1024
"""What a stream keeps in memory while its client reads, unless one event is larger."""


# Pages ------------------------------------------------------------------------------------------------------------


@Operation("GET", "/api/ledger/head", response=LogHeadResponse)
async def get_log_head(request: Request) -> Response:
    """Read the positions of the log and of the views."""
    require_user_id(request)
    ctx = get_api_context(request)
    head, position = await ctx.event_store.read_head_position(), ctx.checkpoint.position
    return build_json_response(
        {
            "status": "success",
            "head": head,
            "oldest": await ctx.event_store.read_oldest_position(),
            "projector": {"position": position, "lag": max(0, head - position)},
        }
    )


@Operation(
    "GET",
    "/api/ledger/events",
    response=EventListResponse,
    query=EventListQuery,
    error_codes=(
        "unknown_event_type",
        "job_not_found",
        "batch_not_found",
        "stream_not_found",
        "stream_access_not_ready",
    ),
)
async def list_events(request: Request) -> Response:
    """List events of the log."""
    ctx, principal = get_api_context(request), get_principal(request)
    query = parse_query(request, EventListQuery)
    event_filter = EventFilter(_parse_event_types(query.types))
    head = await ctx.event_store.read_head_position()
    if not principal.is_admin or query.stream is not None:
        await _wait_for_stream_access(ctx.stream_access, head)
    scan = _Scan(ctx, principal, event_filter, JsonPage(query.limit), query.after)
    if query.stream is None:
        await _scan_log(scan)
    else:
        await _scan_stream(scan, query.stream)
    return build_json_response(
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
        await _check_readable(scan.ctx.stream_access, scan.principal, stream)
    version = await event_store.read_version_at(stream, scan.last_position)
    if scan.principal.is_admin and not version and not await event_store.read_stream(stream, limit=1):
        raise ApiError(404, "stream_not_found", f"Stream {stream} not found.")
    while not scan.is_done and (
        events := await event_store.read_stream(
            stream, after_version=version, limit=_READ_BATCH_EVENTS, single_batch=True
        )
    ):
        await scan.add_events(events)
        version = events[-1].version


# Live stream ------------------------------------------------------------------------------------------------------


@Operation(
    "GET",
    "/api/ledger/stream",
    response="text/event-stream",
    query=StreamQuery,
    error_codes=(
        "unknown_event_type",
        "job_not_found",
        "batch_not_found",
        "stream_access_not_ready",
        "too_many_streams",
        "stream_capacity_exceeded",
    ),
    request_headers=("Last-Event-ID",),
)
async def stream_events(request: Request) -> EventStreamResponse:
    """Stream the log as Server-Sent Events: `id:` is the position, `event:` the type, `data:` an event."""
    ctx, principal = get_api_context(request), get_principal(request)
    query = _parse_query(request)
    event_filter = EventFilter(_parse_event_types(query.types), query.job_id, query.batch_id)
    head = await ctx.event_store.read_head_position()
    after = head if query.after is None else query.after
    if after > head:
        raise ApiError(422, "invalid_content", f"after: got {after}, but the log ends at position {head}.")
    if event_filter.stream_ids or not principal.is_admin:
        await _wait_for_stream_access(ctx.stream_access, head)
    for stream_id in event_filter.stream_ids:
        await _check_readable(ctx.stream_access, principal, stream_id)
    return EventStreamResponse(_generate_blocks(ctx, principal, event_filter, after), ctx.live_streams)


def _parse_query(request: Request) -> StreamQuery:
    """Return the query parameters. `Last-Event-ID` replaces `after`, because a reconnecting browser sends both."""
    last_event_id = request.headers.get("last-event-id") or None  # empty: the client has received no id yet
    if last_event_id is None:
        return parse_query(request, StreamQuery)
    return validate_content(StreamQuery, {**request.query_params, "after": last_event_id})


async def _generate_blocks(
    ctx: ApiContext, principal: Principal, event_filter: EventFilter, after: int
) -> AsyncGenerator[bytes, None]:
    """Yield blocks until the time is over, the client may no longer read a stream, or the log is unavailable."""
    stream_access, sees_all = ctx.stream_access, principal.is_admin
    clock = asyncio.get_running_loop().time
    # A random pause, so that clients do not all reconnect at the same time when this process ends.
    yield b"retry: %d\nid: %d\n\n" % (random.randint(1000, 5000), after)  # noqa: S311 - spreads load, guards no secret
    sent_position, sent_at = after, clock()
    ends_at = sent_at + MAX_STREAM_SECONDS
    hidden_count = 0
    async with ctx.event_store.subscribe(after=after, chunk_bytes=_CHUNK_BYTES) as events:
        while clock() < ends_at:
            chunk: list[RecordedEvent] = []
            try:
                async with asyncio.timeout_at(sent_at + KEEPALIVE_SECONDS):
                    chunk = await events.read_chunk(_CHUNK_EVENTS)
            except TimeoutError:
                pass
            except LedgerUnavailable:
                return  # the client reconnects with Last-Event-ID and misses nothing
            if chunk and not sees_all:
                await stream_access.wait_for_position(events.position)
            matching = [event for event in chunk if event_filter.matches(event)]
            if not sees_all:
                await stream_access.load_access({event.stream for event in matching})
            buffer, shown_count = bytearray(), 0
            for event in matching:
                if (viewer := await stream_access.get_viewer(principal, event)) is not None:
                    buffer += _encode_block(event, viewer)
                    shown_count += 1
                if len(buffer) >= _SEND_BYTES:
                    yield bytes(buffer)
                    buffer.clear()
                    sent_position, sent_at = event.position, clock()
            if chunk and not await _can_follow_all(stream_access, principal, event_filter.stream_ids):
                yield bytes(buffer) + b": access was revoked\n\n"
                return
            # Events of the live tail cost no reads, so only those of the catch-up count.
            hidden_count = hidden_count + len(chunk) - shown_count if events.is_catching_up else 0
            if hidden_count >= _CHUNK_EVENTS:
                await ctx.live_streams.history_throttle.wait(hidden_count)
                hidden_count = 0
            if buffer:
                sent_position = events.position
            elif clock() - sent_at < KEEPALIVE_SECONDS:
                continue
            elif events.position > sent_position:
                sent_position = events.position
                buffer += b"id: %d\n\n" % sent_position
            else:
                buffer += b": keep-alive\n\n"
            yield bytes(buffer)
            sent_at = clock()


async def _can_follow_all(stream_access: StreamAccessCache, principal: Principal, stream_ids: Collection[str]) -> bool:
    for stream_id in stream_ids:
        if not await stream_access.can_follow(principal, stream_id):
            return False
    return True


def _encode_block(event: RecordedEvent, viewer: Viewer) -> bytes:
    data = encode_event(event, viewer)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.position, event.type.encode(), data)


# Filters and access -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class EventFilter:
    """The events that a caller requests: of `types` (empty: all), of a job, or of a batch and its jobs."""

    types: frozenset[str]
    job_id: str | None = None
    batch_id: str | None = None

    @property
    def stream_ids(self) -> list[str]:
        """The job and the batch that the caller must be able to read."""
        return [stream for stream in (self.job_id, self.batch_id) if stream is not None]

    def matches(self, event: RecordedEvent) -> bool:
        """Return whether the caller requests an event. Voided positions are returned only if `types` names them."""
        if event.type not in self.types if self.types else event.type == PositionVoided.__name__:
            return False
        if self.job_id is not None and event.stream != self.job_id:
            return False
        return self.batch_id is None or self.batch_id in (event.stream, event.meta.correlation_id)


def _parse_event_types(text: str | None) -> frozenset[str]:
    """Return the event types of a list with commas. Empty: all types.

    Raises:
        ApiError: 422, a type does not exist.
    """
    names = text.split(",") if text else []
    if unknown := [name for name in names if name not in EVENT_TYPES]:
        message = f"types: unknown event type {unknown[0][:100]!r}. docs/reference/events.md lists the event types."
        raise ApiError(422, "unknown_event_type", message)
    return frozenset(names)


async def _wait_for_stream_access(stream_access: StreamAccessCache, position: int) -> None:
    """Wait until this process knows all access changes up to a position.

    Raises:
        ApiError: 503, this takes too long.
    """
    try:
        async with asyncio.timeout(_STREAM_ACCESS_TIMEOUT_SECONDS):
            await stream_access.wait_for_position(position)
    except TimeoutError:
        message = "This process has not read all access changes yet. Retry in a moment."
        raise ApiError(503, "stream_access_not_ready", message, retry_after_seconds=2) from None


async def _check_readable(stream_access: StreamAccessCache, principal: Principal, stream: str) -> None:
    """Check that a job or batch exists and that a principal may read it.

    Raises:
        ApiError: 404.
    """
    if not await stream_access.can_follow(principal, stream) or (
        principal.is_admin and await stream_access.get_access(stream) is None
    ):
        raise (BATCH if BATCH.is_id(stream) else JOB).build_not_found_error(stream)
