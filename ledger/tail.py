"""ledger: the newest events of the log, in order, held once for all subscribers of a process."""

from __future__ import annotations

import asyncio
from collections import deque

from ledger.envelope import parse
from ledger.events import Recorded
from ledger.mongo import Document


class Tail:
    """The newest events of the log in dense order, as the change stream brings them; older ones are in the collection.

    `low` is the first position kept, `high` the last. Events that arrive ahead of their turn are held back.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._kept: deque[Recorded] = deque()
        self._early: dict[int, Recorded] = {}
        self._high = 0
        self._grown = asyncio.Event()

    @property
    def missing(self) -> range:
        """The positions that are awaited although a later one is here; empty when all is in order."""
        return range(self._high + 1, min(self._early)) if self._early else range(0)

    def begin_at(self, head: int) -> None:
        """Start anew behind `head`: everything up to it is in the collection."""
        self._early.clear()
        if head != self._high:
            self._kept.clear()
            self._high = head
        self._notify()

    def add(self, document: Document) -> None:
        position = document["_id"]
        if position <= self._high or position in self._early:
            return
        self._early[position] = parse(document)
        while (following := self._early.pop(self._high + 1, None)) is not None:
            self._kept.append(following)
            self._high += 1
        while len(self._kept) > self._size:
            self._kept.popleft()
        self._notify()

    def reaches(self, position: int) -> bool:
        """True if the event after `position` is kept, or will be the next to come."""
        return position >= self._high - len(self._kept)

    def after(self, position: int, limit: int) -> list[Recorded]:
        first = position - (self._high - len(self._kept))
        return [self._kept[index] for index in range(first, min(first + limit, len(self._kept)))]

    async def growth(self) -> None:
        await self._grown.wait()

    def _notify(self) -> None:
        self._grown.set()
        self._grown = asyncio.Event()
