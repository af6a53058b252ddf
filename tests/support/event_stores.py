"""Event stores whose appenders pause or lose their connection, and short forms of appends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import AutoReconnect

from jobledger.ledger.domain.events import Event, JobProgressed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.appender import Appender, EventStoreLimits
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.pending_appends import PendingAppend
from tests.support.event_examples import NOON
from tests.support.ledger_setup import EVENT_METADATA, change_stream_operations, open_ledger
from tests.support.polling import DEADLINE_SECONDS

FAST_GAP_LIMITS = EventStoreLimits(gap_timeout_seconds=0.2)


def create_append(*events: Event, stream: str | None = None, head: StreamHead | None = None) -> StreamAppend:
    return StreamAppend(stream or create_job_id(), head or StreamHead(), events, EVENT_METADATA, NOON)


def head_after(event: RecordedEvent) -> StreamHead:
    return StreamHead(event.version, event.position, event.hash)


def create_progress(percent: float = 0.0) -> JobProgressed:
    return JobProgressed(attempt=1, step="page", percent=percent, message="")


class PausableEventStore(EventStore):
    """An event store whose appender can be paused between reserving positions and inserting."""

    def __init__(self, db: Database, limits: EventStoreLimits) -> None:
        super().__init__(db, limits)
        self._appender = PausableAppender(db, self.events, limits, self)
        self.may_insert = asyncio.Event()
        self.may_insert.set()
        self.is_reserved = asyncio.Event()
        self.db = db
        self.write_sizes: list[int] = []
        """The number of appends of each write that reached its insert."""

    async def append_and_pause(self, *appends: StreamAppend) -> asyncio.Task[list[RecordedEvent]]:
        """Start an append and pause it before its insert. `may_insert` lets it continue."""
        self.may_insert.clear()
        self.is_reserved.clear()
        appending = asyncio.create_task(self.append(*appends))
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.is_reserved.wait()
        return appending


class PausableAppender(Appender):
    def __init__(
        self, db: Database, events: AsyncCollection[Document], limits: EventStoreLimits, store: PausableEventStore
    ) -> None:
        super().__init__(db, events, limits)
        self._store = store

    async def _insert(self, todo: Sequence[PendingAppend]) -> list[PendingAppend]:
        self._store.is_reserved.set()
        self._store.write_sizes.append(len(todo))
        await self._store.may_insert.wait()
        return await super()._insert(todo)


@asynccontextmanager
async def open_pausable_store(
    connection: Connection, limits: EventStoreLimits = FAST_GAP_LIMITS
) -> AsyncIterator[PausableEventStore]:
    async with open_ledger(connection, limits, with_change_stream=False, store_class=PausableEventStore) as ledger:
        assert isinstance(ledger.event_store, PausableEventStore)
        try:
            yield ledger.event_store
        finally:
            ledger.event_store.may_insert.set()


class ConnectionLossAppender(Appender):
    """An appender that loses the connection after the server has inserted, the first `failures_left` times."""

    failures_left = 1
    inserted_before_loss = 1_000_000
    """The number of documents that the server inserts before the connection is lost."""

    async def _insert(self, todo: Sequence[Any]) -> list[Any]:
        if self.failures_left:
            self.failures_left -= 1
            documents = [document for append in todo for document in append.documents]
            await self._events.insert_many(documents[: self.inserted_before_loss])
            raise AutoReconnect("connection closed")
        return await super()._insert(todo)


class ConnectionLossEventStore(EventStore):
    """An event store with a `ConnectionLossAppender`."""

    appender_class = ConnectionLossAppender

    def __init__(self, db: Database, limits: EventStoreLimits) -> None:
        super().__init__(db, limits)
        self._appender: ConnectionLossAppender = self.appender_class(db, self.events, limits)

    def lose_connection_after(self, documents: int) -> None:
        self._appender.inserted_before_loss = documents


async def kill_change_stream(db: Database, kill_command: str) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            for operation in await change_stream_operations(db):
                if kill_command == "killCursors":
                    cursor = operation["cursor"]["cursorId"]
                    killed = await db.command({"killCursors": "$cmd.aggregate", "cursors": [cursor]})
                    if killed["cursorsKilled"]:
                        return
                elif operation["type"] == "op":
                    await db.client.admin.command({"killOp": 1, "op": operation["opid"]})
                    return
