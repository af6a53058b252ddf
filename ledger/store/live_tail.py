"""The newest events of the log, shared by all subscribers of a process."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice
from typing import NamedTuple

import orjson

from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Document


class _Sized(NamedTuple):
    event: RecordedEvent
    size: int


class LiveTail:
    """The newest events of the log, in order and without gaps, as the change stream delivers them.

    Keeps as many as fit into `max_events` and `max_bytes` (approximate JSON bytes), and at least one. Older events are
    in the collection. Events that arrive out of order are buffered up to the same limits. Above them, the tail restarts
    after the last buffered event, and subscribers read the missing events from the collection.
    """

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._kept: deque[_Sized] = deque()
        self._bytes = 0
        self._out_of_order: dict[int, _Sized] = {}
        self._out_of_order_bytes = 0
        self._last_position = 0
        self._grown = asyncio.Event()
        self._has_waiters = False

    @property
    def newest_out_of_order(self) -> int | None:
        """The last position that arrived before an earlier one; None if all are in order."""
        return max(self._out_of_order) if self._out_of_order else None

    def find_missing(self, later_position: int, limit: int) -> list[int]:
        """Return the first missing positions before a later one, at most `limit`."""
        positions = range(self._last_position + 1, later_position)
        return list(islice((position for position in positions if position not in self._out_of_order), limit))

    def reset_to(self, head: int) -> None:
        """Restart after `head`. The collection has all events up to it."""
        self.clear()
        self._last_position = head
        self._notify()

    def clear(self) -> None:
        """Drop all events, because the log may have changed. Subscribers then read the collection."""
        self._kept.clear()
        self._bytes = 0
        self._out_of_order.clear()
        self._out_of_order_bytes = 0

    def add(self, document: Document) -> None:
        position = document["_id"]
        if position <= self._last_position or position in self._out_of_order:
            return
        sized = _Sized(RecordedEvent(document), len(orjson.dumps(document.get("data"), default=str)))
        if position > self._last_position + 1:
            self._hold_back(position, sized)
            return
        self._keep(sized)
        while self._out_of_order and (following := self._out_of_order.pop(self._last_position + 1, None)) is not None:
            self._out_of_order_bytes -= following.size
            self._keep(following)
        self._notify()

    def _hold_back(self, position: int, sized: _Sized) -> None:
        self._out_of_order[position] = sized
        self._out_of_order_bytes += sized.size
        if len(self._out_of_order) > self._max_events or self._out_of_order_bytes > self._max_bytes:
            self.reset_to(max(self._out_of_order))

    def _keep(self, sized: _Sized) -> None:
        self._last_position += 1
        self._kept.append(sized)
        self._bytes += sized.size
        while len(self._kept) > self._max_events or (self._bytes > self._max_bytes and len(self._kept) > 1):
            self._bytes -= self._kept.popleft().size

    def covers(self, position: int) -> bool:
        """Return whether the event after `position` is kept, or is the next to arrive."""
        return position >= self._last_position - len(self._kept)

    def read_after(self, position: int, limit: int) -> list[RecordedEvent]:
        first = position - (self._last_position - len(self._kept))
        return [self._kept[index].event for index in range(first, min(first + limit, len(self._kept)))]

    async def wait_for_growth(self) -> None:
        self._has_waiters = True
        await self._grown.wait()

    def _notify(self) -> None:
        if self._has_waiters:  # usually no subscriber waits, because all are still processing earlier events
            self._has_waiters = False
            self._grown.set()
            self._grown = asyncio.Event()
