"""A subscription: every event after a position, in order, history first and then live."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Collection, Coroutine
from typing import Any

from jobledger.ledger.domain.events import Event, RecordedEvent
from jobledger.ledger.domain.limits import compute_json_size
from jobledger.ledger.store.live_tail import LiveTail

_FIRST_PAGE_EVENTS = 50
_EMPTY_READ_PAUSE_SECONDS = 0.05


class Subscription:
    """A position in the log that advances. Iterate for single events, or call `read_chunk`.

    `read` is `EventStore.read`. `max_chunk_bytes` limits the approximate JSON size of a chunk.
    """

    def __init__(
        self,
        read: Callable[..., Coroutine[Any, Any, list[RecordedEvent]]],
        tail: LiveTail,
        after: int,
        types: Collection[type[Event]] | None,
        max_chunk_bytes: int | None = None,
    ) -> None:
        self._read = read
        self._tail = tail
        self._max_chunk_bytes = max_chunk_bytes
        self._page_events = _FIRST_PAGE_EVENTS
        self._types = None if types is None else frozenset(event_type.__name__ for event_type in types)
        self._buffer: deque[RecordedEvent] = deque()
        self._ahead: tuple[int, asyncio.Task[list[RecordedEvent]]] | None = None
        self.position = after
        """The position of the last event that was read, of any type."""
        self.is_catching_up = False
        """Whether the last chunk was read from the collection: there may be more."""

    async def read_chunk(self, limit: int = 1000) -> list[RecordedEvent]:
        """Wait for events and return those that are available, in order, at most `limit`.

        Raises:
            LedgerUnavailable: The database failed while history was read. The next call continues at the same position.
        """
        while True:
            self.is_catching_up = not self._tail.covers(self.position)
            if not self.is_catching_up:
                events = self._tail.read_after(self.position, limit)
                if not events:
                    await self._tail.wait_for_growth()
                    continue
            else:
                events = await self._read_history(
                    limit if self._max_chunk_bytes is None else min(limit, self._page_events)
                )
                if not events:  # the tail was reset meanwhile, or another program removed the end of the log
                    await asyncio.sleep(_EMPTY_READ_PAUSE_SECONDS)
                    continue
                if len(events) == limit and self._max_chunk_bytes is None:  # there is more
                    await self._fetch_ahead(events[-1].position, limit)
            if self._max_chunk_bytes is not None and len(events) > 1:
                events = self._limit_bytes(events, self._max_chunk_bytes)
            self.position = events[-1].position
            selected = events if self._types is None else [event for event in events if event.type in self._types]
            if selected:
                return selected

    def _limit_bytes(self, events: list[RecordedEvent], max_bytes: int) -> list[RecordedEvent]:
        """Return the first events up to `max_bytes`, and adapt the size of the next page."""
        size = 0
        for number, event in enumerate(events):
            size += compute_json_size(event.data)
            if size > max_bytes and number:
                self._page_events = number
                return events[:number]
        self._page_events = max(self._page_events, 2 * len(events))
        return events

    async def _read_history(self, limit: int) -> list[RecordedEvent]:
        """Return events from the collection, or the page that was read ahead."""
        if self._ahead is not None and self._ahead[0] == self.position:
            (_, ahead), self._ahead = self._ahead, None
            return (await ahead)[:limit]
        self.close()
        return await self._read(after=self.position, limit=limit)

    async def _fetch_ahead(self, after: int, limit: int) -> None:
        """Start reading the next page while the caller processes this one."""
        self._ahead = after, asyncio.create_task(self._read(after=after, limit=limit), name="read-ahead")
        await asyncio.sleep(0)  # starts the read

    def rewind(self, position: int) -> None:
        """Continue after an earlier position."""
        self.close()
        self.position = position

    def close(self) -> None:
        """Cancel reading ahead."""
        if self._ahead is not None:
            (_, ahead), self._ahead = self._ahead, None
            if not ahead.cancel() and not ahead.cancelled():
                ahead.exception()  # retrieve it, so asyncio does not log it

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> RecordedEvent:
        if not self._buffer:
            self._buffer.extend(await self.read_chunk())
        return self._buffer.popleft()
