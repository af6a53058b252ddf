"""Fill the gaps that crashed or slow appenders leave in the log. `appender` describes the protocol."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice, takewhile

import structlog
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import PyMongoError

from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Document, summarize_error
from jobledger.ledger.store.appender import Appender
from jobledger.ledger.store.live_tail import LiveTail

_log = structlog.get_logger()
_MAX_VOIDED_PER_WRITE = 10_000
"""Missing positions that are voided together. More than a few occur only if a user has changed the counter."""


class GapFiller:
    """Voids positions to which no event was written in time: for readers of the collection, and for the live tail."""

    def __init__(
        self, events: AsyncCollection[Document], appender: Appender, tail: LiveTail, timeout_seconds: float
    ) -> None:
        self._events = events
        self._appender = appender
        self._tail = tail
        self._timeout_seconds = timeout_seconds
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    async def aclose(self) -> None:
        """Stop the timer and the task."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._timer is not None:  # last, because the task sets it
            self._timer.cancel()

    async def wait_for_gaps(self, after: int, documents: Sequence[Document]) -> None:
        """Wait for slow appenders, unless the events after the gaps are old. Then void the positions that are still
        missing.

        A reader waits for all gaps of the page together, so a hundred crashed appenders delay it no longer than one.
        Voiding too early is always safe, because the appender then reserves another position. So a wrong time in an
        event does no harm.
        """
        old = datetime.now(UTC) - timedelta(seconds=10 * self._timeout_seconds)
        later = [it["_id"] for it in takewhile(lambda document: RecordedEvent(document).time < old, documents)]
        if not later:
            await asyncio.sleep(self._timeout_seconds)
            later = [document["_id"] for document in documents]
        arrived = set(later)
        gaps = (position for position in range(after + 1, later[-1]) if position not in arrived)
        await self._void_missing(list(islice(gaps, _MAX_VOIDED_PER_WRITE)))

    async def _void_missing(self, positions: Sequence[int]) -> list[Document]:
        """Void the positions at which there is no event, and return the events at the others."""
        present = await self._events.find({"_id": {"$in": list(positions)}}).to_list()
        arrived = {document["_id"] for document in present}
        await self._appender.void_positions(position for position in positions if position not in arrived)
        return present

    def schedule(self) -> None:
        """Start the timeout for missing positions, one for all of them."""
        if self._timer is None and (newest := self._tail.newest_out_of_order) is not None:
            self._timer = asyncio.get_running_loop().call_later(self._timeout_seconds, self._start_filling, newest)

    def _start_filling(self, later_position: int) -> None:
        """Fill the positions that are still missing before a later one that arrived one timeout ago."""
        missing = self._tail.find_missing(later_position, _MAX_VOIDED_PER_WRITE)
        if missing:
            self._task = asyncio.create_task(self._fill(missing), name="fill-gaps")
        else:
            self._timer = None
            self.schedule()

    async def _fill(self, missing: Sequence[int]) -> None:
        """Load events that the change stream did not deliver and void the other positions. The change stream
        delivers those.
        """
        try:
            for document in await self._void_missing(missing):
                self._tail.add(document)
        except PyMongoError as error:
            _log.warning("gap not filled, retrying", positions=missing[:10], error=summarize_error(error))
        finally:
            self._timer = None
            self.schedule()
