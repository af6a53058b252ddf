"""Wake requests that wait until a job or batch is finished, by the change stream of the process instead of polling."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Final

from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.events import (
    BatchDeleted,
    BatchFinished,
    BatchReopened,
    JobCancelled,
    JobCompleted,
    JobDeleted,
    JobFailed,
    JobRestarted,
)
from jobledger.ledger.store.event_store import EventStore

_FINISHING_EVENTS: Final = (JobCompleted, JobFailed, JobCancelled, JobDeleted, BatchFinished, BatchDeleted)
_FINISHING_EVENT_TYPES: Final = frozenset(event.__name__ for event in _FINISHING_EVENTS)


async def find_end_position(event_store: EventStore, stream: str) -> int | None:
    """Return the position of the event that has finished or deleted a job or batch, None if it is not finished.

    The types of events decide. They are readable in damaged events, too, and the views also apply them.
    """
    events = await event_store.read_stream(stream, types=(*_FINISHING_EVENTS, JobRestarted, BatchReopened))
    return events[-1].position if events and events[-1].type in _FINISHING_EVENT_TYPES else None


class FinishNotifier:
    """A listener of the change stream that wakes requests which watch a job or batch."""

    collection = "events"

    def __init__(self) -> None:
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @asynccontextmanager
    async def watch(self, stream: str) -> AsyncIterator[asyncio.Event]:
        """Yield an event that is set when the job or batch may be finished.

        Read the stream inside the block, so that no event is missed: the log has earlier events, and the change stream
        reports later ones. If the change stream was interrupted, all watchers are woken to read again.
        """
        wake_up = asyncio.Event()
        self._watchers[stream].add(wake_up)
        try:
            yield wake_up
        finally:
            self._watchers[stream].discard(wake_up)
            if not self._watchers[stream]:
                del self._watchers[stream]

    async def resync(self, session: AsyncClientSession) -> None:
        """Wake all watchers."""
        for watchers in self._watchers.values():
            for wake_up in watchers:
                wake_up.set()

    def on_change(self, change: Mapping[str, Any]) -> None:
        """Wake the watchers of a job or batch when the event that finishes or deletes it is inserted."""
        if self._watchers and change["operationType"] == "insert":
            document = change["fullDocument"]
            if document["stream"] in self._watchers and document["type"] in _FINISHING_EVENT_TYPES:
                for wake_up in self._watchers[document["stream"]]:
                    wake_up.set()
