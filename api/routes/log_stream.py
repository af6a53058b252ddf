"""Stream the log live as Server-Sent Events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

A client has a cursor on the log instead of a queue: events that it has not read wait in the log. A client that does not
read is disconnected. `id:` is the position. Browsers dispatch no event for a block that has only an id, but they resume
from it. The stream sends such blocks at its start, and while it has no event for the client although the log grows.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Collection
from typing import Final

from starlette.requests import Request

from jobledger.api.auth.permissions import get_principal
from jobledger.api.auth.redaction import Viewer
from jobledger.api.auth.stream_access import StreamAccessCache
from jobledger.api.context import ApiContext, get_api_context, parse_query
from jobledger.api.event_filter import EventFilter, check_readable, parse_event_types, wait_for_stream_access
from jobledger.api.http.errors import ApiError
from jobledger.api.http.event_json import encode_event
from jobledger.api.http.sse import EventStreamResponse
from jobledger.api.http.validation import validate_content
from jobledger.api.openapi.operation import Operation
from jobledger.api.schemas.log import StreamQuery
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import RecordedEvent

KEEPALIVE_SECONDS: Final = 15.0
"""The stream sends a comment after this time without an event."""
MAX_STREAM_SECONDS: Final = 900.0
"""After this time, the client must reconnect and authenticate again, because its key may have been revoked."""
_SEND_BYTES: Final = 64 * 1024
_CHUNK_EVENTS: Final = 500
_CHUNK_BYTES: Final = 1024 * 1024
"""What a stream keeps in memory while its client reads, unless one event is larger."""


@Operation(
    "GET",
    "/api/ledger/stream",
    response="text/event-stream",
    query=StreamQuery,
    error_codes=(
        "unknown_event_type",
        "job_not_found",
        "batch_not_found",
        "visibility_not_ready",
        "too_many_streams",
        "stream_capacity_exceeded",
    ),
    request_headers=("Last-Event-ID",),
)
async def stream_events(request: Request) -> EventStreamResponse:
    """Stream the log as Server-Sent Events: `id:` is the position, `event:` the type, `data:` an event."""
    ctx, principal = get_api_context(request), get_principal(request)
    query = _parse_query(request)
    event_filter = EventFilter(parse_event_types(query.types), query.job_id, query.batch_id)
    head = await ctx.event_store.head_position()
    after = head if query.after is None else query.after
    if after > head:
        raise ApiError(422, "invalid_content", f"after: got {after}, but the log ends at position {head}.")
    if event_filter.stream_ids or not principal.is_admin:
        await wait_for_stream_access(ctx.stream_access, head)
    for stream_id in event_filter.stream_ids:
        await check_readable(ctx.stream_access, principal, stream_id)
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
    # A random pause, so that clients do not reconnect all at once when this process ends.
    yield b"retry: %d\nid: %d\n\n" % (random.randint(1000, 5000), after)  # noqa: S311 - spreads load, guards no secret
    sent_position, sent_at = after, clock()
    ends_at = sent_at + MAX_STREAM_SECONDS
    hidden_count = 0
    async with ctx.event_store.subscribe(after=after, chunk_bytes=_CHUNK_BYTES) as events:
        while clock() < ends_at:
            chunk: list[RecordedEvent] = []
            try:
                async with asyncio.timeout_at(sent_at + KEEPALIVE_SECONDS):
                    chunk = await events.next_chunk(_CHUNK_EVENTS)
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
