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
    in the collection. Events that arrive out of order are buffered up to the same limits. Beyond them the tail restarts
    after the last buffered event, and subscribers read the missing events from the collection.
    """

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._kept: deque[_Sized] = deque()
        self._bytes = 0
        self._early: dict[int, _Sized] = {}
        self._early_bytes = 0
        self._high = 0
        self._grown = asyncio.Event()
        self._awaited = False

    @property
    def newest_out_of_order(self) -> int | None:
        """The last position that arrived before an earlier one; None if all are in order."""
        return max(self._early) if self._early else None

    def missing_below(self, evidence: int, limit: int) -> list[int]:
        """Return the first missing positions below `evidence`, a later position that has arrived."""
        awaited = (position for position in range(self._high + 1, evidence) if position not in self._early)
        return list(islice(awaited, limit))

    def reset_to(self, head: int) -> None:
        """Restart after `head`. The collection has all events up to it."""
        self.clear()
        self._high = head
        self._notify()

    def clear(self) -> None:
        """Drop all events, because the log may have changed. Subscribers then read the collection."""
        self._kept.clear()
        self._bytes = 0
        self._early.clear()
        self._early_bytes = 0

    def add(self, document: Document) -> None:
        position = document["_id"]
        if position <= self._high or position in self._early:
            return
        sized = _Sized(RecordedEvent(document), len(orjson.dumps(document.get("data"), default=str)))
        if position > self._high + 1:
            self._hold_back(position, sized)
            return
        self._keep(sized)
        while self._early and (following := self._early.pop(self._high + 1, None)) is not None:
            self._early_bytes -= following.size
            self._keep(following)
        self._notify()

    def _hold_back(self, position: int, sized: _Sized) -> None:
        self._early[position] = sized
        self._early_bytes += sized.size
        if len(self._early) > self._max_events or self._early_bytes > self._max_bytes:
            self.reset_to(max(self._early))

    def _keep(self, sized: _Sized) -> None:
        self._high += 1
        self._kept.append(sized)
        self._bytes += sized.size
        while len(self._kept) > self._max_events or (self._bytes > self._max_bytes and len(self._kept) > 1):
            self._bytes -= self._kept.popleft().size

    def covers(self, position: int) -> bool:
        """Return whether the event after `position` is kept, or is the next to arrive."""
        return position >= self._high - len(self._kept)

    def read_after(self, position: int, limit: int) -> list[RecordedEvent]:
        first = position - (self._high - len(self._kept))
        return [self._kept[index].event for index in range(first, min(first + limit, len(self._kept)))]

    async def wait_for_growth(self) -> None:
        self._awaited = True
        await self._grown.wait()

    def _notify(self) -> None:
        if self._awaited:  # usually no subscriber waits, because all are still processing earlier events
            self._awaited = False
            self._grown.set()
            self._grown = asyncio.Event()
