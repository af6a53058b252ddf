"""api: the log live, as Server-Sent Events (https://html.spec.whatwg.org/multipage/server-sent-events.html).

A client holds a cursor on the log and no queue: what it has not read waits in the log. One that does not read at all is
cut. `id:` is the position; a block that has only an id is dispatched by no browser, and moves on where the client
resumes: at the beginning, and while there is nothing to show of what happens.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Collection
from dataclasses import dataclass
from typing import Final

from starlette.requests import Request

from jobledger.api.auth.permissions import get_principal
from jobledger.api.auth.redaction import Viewer
from jobledger.api.auth.visibility import Visibility
from jobledger.api.context import ApiContext, get_api_context, parse_query
from jobledger.api.http.errors import ApiError
from jobledger.api.http.event_json import encode_event
from jobledger.api.http.sse import EventStreamResponse
from jobledger.api.http.validation import validate_content
from jobledger.api.routes.jobs import job_not_found_error
from jobledger.api.schemas.requests import StreamQuery
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import EVENT_TYPES, PositionVoided, RecordedEvent

KEEPALIVE_SECONDS: Final = 15.0
"""How long a stream says nothing before it gives a sign of life."""
MAX_STREAM_SECONDS: Final = 900.0
"""After how long a client has to come back and say again who it is: its key may have been withdrawn meanwhile."""
_PIECE_BYTES: Final = 64 * 1024
_CHUNK_EVENTS: Final = 500
_CHUNK_BYTES: Final = 1024 * 1024
"""What a stream holds in memory while its client reads, or one event."""
_VISIBILITY_TIMEOUT_SECONDS: Final = 10.0


async def stream_events(request: Request) -> EventStreamResponse:
    """GET /api/ledger/stream"""
    known, principal = get_api_context(request), get_principal(request)
    resumed = request.headers.get("last-event-id") or None  # empty: no event has had an id yet
    asked = parse_query(request, StreamQuery)
    if resumed is not None:
        asked = validate_content(StreamQuery, {**asked.model_dump(), "after": resumed})
    wanted = EventFilter(parse_event_types(asked.types), asked.job_id, asked.batch_id)
    head = await known.event_store.head_position()
    after = head if asked.after is None else asked.after
    if after > head:
        raise ApiError(422, "invalid_content", f"after: the log ends at position {head}, before {after}.")
    if wanted.stream_ids or not principal.is_admin:
        await wait_for_visibility(known.visibility, head)
    for followed in wanted.stream_ids:
        await check_readable(known.visibility, principal, followed)
    return EventStreamResponse(_blocks(known, principal, wanted, after), known.live_streams)


def parse_event_types(given: str | None) -> frozenset[str]:
    """Return the types that a query names, none for all.

    Raises:
        ApiError: 422, when there is no such type.
    """
    names = given.split(",") if given else []
    if unknown := [name for name in names if name not in EVENT_TYPES]:
        raise ApiError(422, "unknown_event_type", f"There is no event type {unknown[0][:100]!r}.")
    return frozenset(names)


async def wait_for_visibility(visibility: Visibility, position: int) -> None:
    """Wait until all that was said about access up to a position is known here.

    Raises:
        ApiError: 503, when that takes too long.
    """
    try:
        async with asyncio.timeout(_VISIBILITY_TIMEOUT_SECONDS):
            await visibility.wait_for_position(position)
    except TimeoutError:
        message = "This process does not know yet who may see what; try again in a moment."
        raise ApiError(503, "visibility_not_ready", message, retry_after_seconds=2) from None


async def check_readable(visibility: Visibility, principal: Principal, stream: str) -> None:
    """Make sure that a job or batch is there, and that somebody may read it.

    Raises:
        ApiError: 404.
    """
    if not await visibility.can_follow(principal, stream):
        raise _no_such(stream)
    if principal.is_admin and await visibility.get_access(stream) is None:
        raise _no_such(stream)


def _no_such(stream: str) -> ApiError:
    if stream.startswith("batch-"):
        return ApiError(404, "batch_not_found", f"There is no batch {stream}.")
    return job_not_found_error(stream)


@dataclass(frozen=True, slots=True)
class EventFilter:
    """Which events a client wants to see: of these types (none for all), of this job, of this batch and its jobs."""

    types: frozenset[str]
    job_id: str | None = None
    batch_id: str | None = None

    @property
    def stream_ids(self) -> list[str]:
        """The job and batch without which there is nothing to see."""
        return [stream for stream in (self.job_id, self.batch_id) if stream is not None]

    def matches(self, event: RecordedEvent) -> bool:
        if event.type not in self.types if self.types else event.type == PositionVoided.__name__:
            return False
        if self.job_id is not None and event.stream != self.job_id:
            return False
        return self.batch_id is None or self.batch_id in (event.stream, event.meta.correlation_id)


async def _blocks(
    known: ApiContext, principal: Principal, wanted: EventFilter, after: int
) -> AsyncGenerator[bytes, None]:
    """Yield what is sent, until its time is up, the client loses sight of what it follows, or the log is away."""
    visibility, everything = known.visibility, principal.is_admin
    clock = asyncio.get_running_loop().time
    # Not all at once, when all of them come back after this process has ended.
    yield b"retry: %d\nid: %d\n\n" % (random.randint(1000, 5000), after)  # noqa: S311 - spreads load, guards no secret
    told, told_at = after, clock()
    until = told_at + MAX_STREAM_SECONDS
    hidden = 0
    async with known.event_store.subscribe(after=after, chunk_bytes=_CHUNK_BYTES) as events:
        while clock() < until:
            chunk: list[RecordedEvent] = []
            try:
                async with asyncio.timeout_at(told_at + KEEPALIVE_SECONDS):
                    chunk = await events.next_chunk(_CHUNK_EVENTS)
            except TimeoutError:
                pass
            except LedgerUnavailable:
                return  # the client comes back with Last-Event-ID and misses nothing
            if chunk and not everything:
                await visibility.wait_for_position(events.position)
            found = [event for event in chunk if wanted.matches(event)]
            if not everything:
                await visibility.load_access({event.stream for event in found})
            piece, shown_events = bytearray(), 0
            for event in found:
                if (viewer := await visibility.get_viewer(principal, event)) is not None:
                    piece += _block(event, viewer)
                    shown_events += 1
                if len(piece) >= _PIECE_BYTES:
                    yield bytes(piece)
                    piece.clear()
                    told, told_at = event.position, clock()
            if chunk and not await _sees(visibility, principal, wanted.stream_ids):
                yield bytes(piece) + b": there is nothing more to be seen here\n\n"
                return
            hidden = (
                hidden + len(chunk) - shown_events if events.is_catching_up else 0
            )  # those of the tail cost no reads
            if hidden >= _CHUNK_EVENTS:  # far behind, and sends little of what it reads
                await known.live_streams.history_throttle.wait(hidden)
                hidden = 0
            if piece:
                told = events.position
            elif clock() - told_at < KEEPALIVE_SECONDS:
                continue
            elif events.position > told:
                told = events.position
                piece += b"id: %d\n\n" % told
            else:
                piece += b": still here\n\n"
            yield bytes(piece)
            told_at = clock()


async def _sees(visibility: Visibility, principal: Principal, followed: Collection[str]) -> bool:
    for stream in followed:
        if not await visibility.can_follow(principal, stream):
            return False
    return True


def _block(event: RecordedEvent, viewer: Viewer) -> bytes:
    data = encode_event(event, viewer)
    return b"id: %d\nevent: %s\ndata: %s\n\n" % (event.position, event.type.encode(), data)
