"""ledger: the newest events of the log, in order, held once for all subscribers of a process."""

from __future__ import annotations

import asyncio
from collections import deque
from itertools import islice

import orjson

from ledger.events import Recorded
from ledger.mongo import Document


class Tail:
    """The newest events of the log in dense order, as the change stream brings them; older ones are in the collection.

    Kept are as many as fit in `most_events` and `most_bytes` (of JSON, about), and at least one. Events that arrive
    ahead of their turn are held back.
    """

    def __init__(self, most_events: int, most_bytes: int) -> None:
        self._most_events = most_events
        self._most_bytes = most_bytes
        self._kept: deque[Recorded] = deque()
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._early: dict[int, Recorded] = {}
        self._high = 0
        self._grown = asyncio.Event()
        self._awaited = False

    @property
    def newest_early(self) -> int | None:
        """The last position that came although an earlier one is awaited; None when all is in order."""
        return max(self._early) if self._early else None

    def missing_below(self, evidence: int, most: int) -> list[int]:
        """The first positions that are awaited although `evidence`, a later one, is here."""
        awaited = (position for position in range(self._high + 1, evidence) if position not in self._early)
        return list(islice(awaited, most))

    def begin_at(self, head: int) -> None:
        """Start anew behind `head`: everything up to it is in the collection."""
        self._early.clear()
        if head != self._high:
            self._kept.clear()
            self._sizes.clear()
            self._bytes = 0
            self._high = head
        self._notify()

    def add(self, document: Document) -> None:
        position = document["_id"]
        if position == self._high + 1:
            self._keep(Recorded(document))
            while self._early and (following := self._early.pop(self._high + 1, None)) is not None:
                self._keep(following)
            self._notify()
        elif position > self._high:
            self._early[position] = Recorded(document)

    def _keep(self, event: Recorded) -> None:
        self._high += 1
        self._kept.append(event)
        size = len(orjson.dumps(event.data, default=str))
        self._sizes.append(size)
        self._bytes += size
        while len(self._kept) > self._most_events or (self._bytes > self._most_bytes and len(self._kept) > 1):
            self._kept.popleft()
            self._bytes -= self._sizes.popleft()

    def reaches(self, position: int) -> bool:
        """True if the event after `position` is kept, or will be the next to come."""
        return position >= self._high - len(self._kept)

    def after(self, position: int, limit: int) -> list[Recorded]:
        first = position - (self._high - len(self._kept))
        return [self._kept[index] for index in range(first, min(first + limit, len(self._kept)))]

    async def growth(self) -> None:
        self._awaited = True
        await self._grown.wait()

    def _notify(self) -> None:
        if self._awaited:  # most events come while nobody waits: the subscribers are still at the ones before
            self._awaited = False
            self._grown.set()
            self._grown = asyncio.Event()
