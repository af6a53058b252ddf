"""api: who waits for the end of a job or batch is woken by the process's change stream; nobody asks again and again."""

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
    """Wakes those who wait for a stream's end. A listener of the process's change stream."""

    collection = "events"

    def __init__(self) -> None:
        self._waiting: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    @asynccontextmanager
    async def watch(self, stream: str) -> AsyncIterator[asyncio.Event]:
        """Yield what is set when the stream may have ended since.

        Why no end is missed: look at the log after entering. What happened before, the log says; of what happens
        after, the change stream tells, and when that was interrupted, everybody is woken to look again.
        """
        ended = asyncio.Event()
        self._waiting[stream].add(ended)
        try:
            yield ended
        finally:
            self._waiting[stream].discard(ended)
            if not self._waiting[stream]:
                del self._waiting[stream]

    async def resync(self, session: AsyncClientSession) -> None:
        for waiting in self._waiting.values():
            for ended in waiting:
                ended.set()

    def on_change(self, change: Mapping[str, Any]) -> None:
        if self._waiting and change["operationType"] == "insert":
            document = change["fullDocument"]
            if document["stream"] in self._waiting and document["type"] in _TERMINAL_EVENT_TYPES:
                for ended in self._waiting[document["stream"]]:
                    ended.set()
