"""Wake requests that wait for the completion of a job or batch, by the process's change stream and without polling."""

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
    JobCancelled,
    JobCompleted,
    JobDeleted,
    JobFailed,
)

_TERMINAL_EVENT_TYPES: Final = frozenset(
    kind.__name__ for kind in (JobCompleted, JobFailed, JobCancelled, JobDeleted, BatchFinished, BatchDeleted)
)


class CompletionWaiter:
    """A listener of the change stream that wakes requests which watch a job or batch."""

    collection = "events"

    def __init__(self) -> None:
        self._watchers: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @asynccontextmanager
    async def watch(self, stream: str) -> AsyncIterator[asyncio.Event]:
        """Yield an event that is set when the stream may have completed.

        Read the stream after entering the block. Then no completion is missed: the log has earlier events, and the
        change stream reports later ones. If the change stream was interrupted, all watchers are woken to read again.
        """
        completed = asyncio.Event()
        self._watchers[stream].add(completed)
        try:
            yield completed
        finally:
            self._watchers[stream].discard(completed)
            if not self._watchers[stream]:
                del self._watchers[stream]

    async def resync(self, session: AsyncClientSession) -> None:
        """Wake all watchers."""
        for watchers in self._watchers.values():
            for completed in watchers:
                completed.set()

    def on_change(self, change: Mapping[str, Any]) -> None:
        """Wake the watchers of a stream when its terminal event is inserted."""
        if self._watchers and change["operationType"] == "insert":
            document = change["fullDocument"]
            if document["stream"] in self._watchers and document["type"] in _TERMINAL_EVENT_TYPES:
                for completed in self._watchers[document["stream"]]:
                    completed.set()
