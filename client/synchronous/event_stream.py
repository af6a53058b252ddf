# Generated from client/asynchronous/event_stream.py by `make reference`. Change that file instead.
"""Follow jobs, batches and the whole log over Server-Sent Events. A lost connection is resumed at the same position."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Final, Protocol, Self

import httpx

from jobledger.client.checkpoint import FileCheckpoint
from jobledger.client.errors import ApiUnavailableError, ClientError
from jobledger.client.events import EndDetector, check_position, parse_event, read_event
from jobledger.client.models import Batch, Job
from jobledger.client.resources import Resource
from jobledger.client.responses import (
    build_unexpected_content_error,
    get_list,
    read_position,
    translate_transport_errors,
)
from jobledger.client.settings import RECONNECT_SECONDS, RetrySchedule
from jobledger.client.sse import BlockTooLarge, SseParser
from jobledger.client.synchronous.runtime import run_blocking, sleep
from jobledger.client.synchronous.transport import Call, Transport
from jobledger.ledger.domain.events import RecordedEvent

_SILENCE_SECONDS: Final = 45.0
"""A stream without a byte for this long is lost: the API sends a comment every 15 seconds."""
_SAVE_SECONDS: Final = 1.0
_PAGE_EVENTS: Final = 1000


class Feed(Protocol):
    """A source of events. `position`: all events up to it were returned. Reading can be cancelled and repeated."""

    position: int
    is_ended: bool

    def read(self) -> list[RecordedEvent]:
        """Return the next events, or none after a while."""

    def close(self) -> None:
        """Close the connection."""


class LiveFeed:
    """The live stream of the API, after a position. It connects again after an outage."""

    def __init__(self, transport: Transport, query: Mapping[str, str], *, after: int) -> None:
        self.position = check_position(after)
        self.is_ended = False
        self._transport = transport
        self._query = query
        self._schedule = RetrySchedule(seconds=RECONNECT_SECONDS)
        self._connection: ExitStack | None = None
        self._chunks: Iterator[bytes] | None = None
        self._parser = SseParser()
        self._has_received = False

    def read(self) -> list[RecordedEvent]:
        """Return the events of the next part of the stream. Connect if necessary.

        Raises:
            AuthenticationError: The key has expired, or was revoked.
            NotFoundError: The job or batch was deleted, or access to it was revoked.
            ApiUnavailableError: The API was not available for five minutes.
        """
        try:
            return self._read_chunk()
        except ClientError as error:
            self.close()
            min_seconds = self._parser.retry_seconds if self._has_received else 0.0
            delay = self._schedule.next_delay(error, min_seconds=min_seconds)
        except BaseException:
            self.close()  # a cancelled read leaves the connection in an unknown state
            raise
        self._has_received = False
        sleep(delay)
        return []

    def _read_chunk(self) -> list[RecordedEvent]:
        if self._chunks is None:
            self._connect()
        assert self._chunks is not None  # noqa: S101 - narrows the type
        with translate_transport_errors(httpx.URL(self._transport.url)):
            chunk = next(self._chunks, None)
        if chunk is None:
            raise ApiUnavailableError("The live stream ended.", is_transient=True)
        events, position = [], self.position
        try:
            for block in self._parser.feed(chunk):
                if block.data:
                    events.append(parse_event(block.data, self._transport.url))
                if block.last_id.isascii() and block.last_id.isdecimal():
                    position = int(block.last_id[:18])
                if not self._has_received:
                    self._has_received = True
                    self._schedule.reset()
        except BlockTooLarge as error:
            raise build_unexpected_content_error(self._transport.url, str(error)) from error
        self.position = position  # only now: after an error, the events of this part are read again
        return events

    def _connect(self) -> None:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(self.position)}
        call = Call("GET", "/api/ledger/stream", self._query, headers=headers, timeout=_SILENCE_SECONDS)
        with ExitStack() as stack:
            response = stack.enter_context(self._transport.open(call))
            if not response.headers.get("content-type", "").startswith("text/event-stream"):
                raise build_unexpected_content_error(response.url, "its live stream has another media type")
            self._parser, self._chunks = SseParser(), response.iter_bytes()
            self._connection = stack.pop_all()

    def close(self) -> None:
        """Close the connection."""
        connection, self._connection, self._chunks = self._connection, None, None
        if connection is not None:
            connection.close()


class FollowFeed:
    """The events of a job, or of a batch and its jobs, until it is finished.

    The history of a job is read in pages. The events of a batch and its jobs are read from the live stream, from the
    submission of the batch on.
    """

    def __init__(self, transport: Transport, resource: Resource[Job] | Resource[Batch], *, after: int) -> None:
        self.position = check_position(after)
        self.is_ended = False
        self._transport = transport
        self._resource = resource
        self._end: EndDetector | None = None
        self._live: LiveFeed | None = None

    def read(self) -> list[RecordedEvent]:
        """Return a page of the history, or new events.

        Raises:
            ClientError: As `LiveFeed.read`.
        """
        if self._end is None:
            self._end = self._start()
        if self._live is None:
            events = self._read_history()
        else:
            events = self._live.read()
            self.position = self._live.position
        events = self._end.take(events)
        self.is_ended = self._end.is_end
        if self.is_ended:
            self._transport.show_position(self.position)  # the job or batch is finished in later reads, too
        return events

    def _start(self) -> EndDetector:
        resource = self._resource
        snapshot = resource.read((self._transport.get(resource.path)).content, self._transport.url)
        if isinstance(snapshot, Batch) and self.position < snapshot.position:
            first, _ = self._read_page(after=0, limit=1)
            self.position = max(self.position, first[0].position - 1 if first else 0)
            self._live = self._follow(after=self.position)
        return EndDetector(resource.stream_id, snapshot, after=self.position)

    def _read_history(self) -> list[RecordedEvent]:
        events, head = self._read_page(after=self.position, limit=_PAGE_EVENTS)
        if events:
            self.position = events[-1].position
        else:
            self._live = self._follow(after=max(self.position, head))
        return events

    def _read_page(self, *, after: int, limit: int) -> tuple[list[RecordedEvent], int]:
        """Return a page of the resource's own stream, and the head of the log when it was read."""
        query = {"stream": self._resource.stream_id, "after": str(after), "limit": str(limit)}
        answer = self._transport.get("/api/ledger/events", query)
        events = [read_event(item, answer.url) for item in get_list(answer.content, "events", answer.url)]
        return events, read_position(answer.content, "head", answer.url)

    def _follow(self, *, after: int) -> LiveFeed:
        return LiveFeed(self._transport, self._resource.stream_query, after=after)

    def close(self) -> None:
        """Close the connection."""
        if self._live is not None:
            self._live.close()


class EventStream:
    """Events of the log, in order and without gaps. Iterate over it, in a `with` block or without one.

    An event counts as processed when the next one is requested, or when the block ends without an error. If the stream
    has a name, its position is saved then. Iteration can be cancelled and continued: no event is missed.
    """

    def __init__(
        self, feed: Feed, types: frozenset[str] | None = None, checkpoint: FileCheckpoint | None = None
    ) -> None:
        self._feed = feed
        self._types = types
        self._checkpoint = checkpoint
        self._pending: deque[RecordedEvent] = deque()
        self._received = self._processed = feed.position
        self._saved = 0 if checkpoint else feed.position
        self._saved_at = 0.0
        self._is_closed = False

    @property
    def position(self) -> int:
        """All events up to this position are processed, or not requested."""
        return self._processed

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> RecordedEvent:
        """Return the next event.

        Raises:
            ClientError: The stream cannot continue: the key has expired, access was revoked, or the API was not
                available for five minutes.
        """
        while True:
            self._mark_processed()
            if self._is_closed:
                raise StopIteration
            self._save(only_if_due=bool(self._pending))
            if self._pending:
                return self._pending.popleft()
            if self._feed.is_ended:
                self.close()
                raise StopIteration
            events = self._feed.read()
            self._received = self._feed.position
            self._pending.extend(it for it in events if self._types is None or it.type in self._types)

    def _mark_processed(self) -> None:
        self._processed = self._pending[0].position - 1 if self._pending else self._received

    def _save(self, *, only_if_due: bool = False) -> None:
        """Save the position. While many events arrive, save it once a second."""
        if self._checkpoint is None or self._processed <= self._saved:
            return
        if only_if_due and time.monotonic() - self._saved_at < _SAVE_SECONDS:
            return
        run_blocking(self._checkpoint.save, self._processed)
        self._saved, self._saved_at = self._processed, time.monotonic()

    def close(self) -> None:
        """Close the connection. The last event that was returned does not count as processed."""
        self._is_closed = True
        self._feed.close()
        if self._checkpoint is not None:
            self._save()
            self._checkpoint.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error_type is None and not self._is_closed:
            self._mark_processed()
        self.close()
