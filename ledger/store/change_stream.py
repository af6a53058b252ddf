"""The change stream of a process. It signals changes; the collections hold the data.

A listener names a collection and receives every change to it. Whenever the stream is opened, at first and after any
failure (failover, history lost from the oplog, a dropped connection), each listener `resync`s from its collection. So
nothing depends on resume tokens: a stream that cannot be continued is opened again.

The stream is also reopened after an event of the log was deleted. Jobledger deletes none, so data that listeners have
derived from it is no longer valid.

Why no change is lost: the stream starts at a cluster time T that was read before, and `resync` reads with majority
concern in a causally consistent session that has seen T. The read sees everything committed up to T; the stream
delivers the rest. Many changes arrive twice: those at T, and those committed while the collection was read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import pymongo
import structlog
from bson import Int64, Timestamp
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from jobledger.ledger.domain.errors import DatabaseUnsuitable, LedgerUnavailable
from jobledger.ledger.mongo.connection import LENIENT_CODEC, Database, Document, is_transient, summarize_error
from jobledger.ledger.system.pacing import Pacer

_log = structlog.get_logger()
_MAX_PAUSE_SECONDS = 2.0
_PAUSE_AFTER_REMOVAL_SECONDS = 0.5
"""Events are often deleted in bulk. The pause avoids reopening the stream for each."""
_CHANGES_PER_TURN = 200  # then other tasks may run
_BATCH_CHANGES = 1000
_AWAIT_MILLISECONDS = 1000
_CLOSE_SECONDS = 1.0
_DATABASE_CURSOR = "$cmd.aggregate"
"""The server's name for the collection of a cursor of a whole database."""


class ChangeListener(Protocol):
    """A component that reacts to changes of one collection."""

    @property
    def collection(self) -> str: ...

    async def resync(self, session: AsyncClientSession, /) -> None:
        """Load the current state of the collection, reading with `session`. Called when the stream was opened."""

    def on_change(self, change: Mapping[str, Any], /) -> None:
        """Handle a change stream event: a document was inserted, updated, replaced or deleted. Must not block."""


@dataclass(frozen=True, slots=True)
class CallbackListener:
    """A listener made of two callbacks."""

    collection: str
    on_change: Callable[[Mapping[str, Any]], None]
    resync: Callable[[AsyncClientSession], Coroutine[Any, Any, None]]


class ChangeStream:
    """The change stream of this process, shared by all its listeners.

    Args:
        event_types: Filters the changes of the collection `events`: a worker, for example, does not need progress
            events.
        get_max_delay: Returns by how many seconds frequent changes may be delayed. Reads are paced (`Pacer`), because a
            read of a hundred changes costs little more than that of one.
    """

    def __init__(
        self,
        db: Database,
        *,
        event_types: Collection[str] | None = None,
        get_max_delay: Callable[[], float] = lambda: 0.0,
    ) -> None:
        self._db = db
        self._event_types = event_types
        self._pacer = Pacer(get_max_delay)
        self._listeners: list[ChangeListener] = []
        self._open = asyncio.Event()
        self._not_paused = asyncio.Event()
        self._not_paused.set()
        self.restart_count = 0
        """How often the stream had to be opened again."""

    def hurry(self) -> None:
        """Deliver the next changes now, because `get_max_delay` has decreased."""
        self._pacer.hurry()

    def add_listener(self, listener: ChangeListener) -> None:
        """Add a listener. Call this before `keep_open`."""
        self._listeners.append(listener)

    @asynccontextmanager
    async def keep_open(self) -> AsyncIterator[asyncio.Task[None]]:
        """Keep the stream open within the block. Enters when every listener has resynced.

        Yields the task that reads the stream. It ends only because of a bug or missing privileges, so the caller must
        watch it.

        Raises:
            DatabaseUnsuitable: This user may not read changes.
        """
        task = asyncio.create_task(self._run(), name="changes")
        opened = asyncio.create_task(self._open.wait())
        try:
            await asyncio.wait({task, opened}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            yield task
        finally:
            opened.cancel()
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Deliver no changes within the block. Afterwards, the stream is opened again with a resync.

        For a flood of changes: each of them costs the server and this process more than reading its document later.
        """
        self._not_paused.clear()
        try:
            yield
        finally:
            self._not_paused.set()

    async def _run(self) -> None:
        pause = 0.05
        while True:
            await self._not_paused.wait()
            try:
                async with self._open_cursor() as cursor:
                    pause = 0.05
                    await self._deliver(cursor)
                    if not self._not_paused.is_set():
                        continue
                    pause = _PAUSE_AFTER_REMOVAL_SECONDS
            except PyMongoError as error:
                if not is_transient(error):
                    raise DatabaseUnsuitable(f"MongoDB rejects the change stream: {summarize_error(error)}") from error
                _log.warning("change stream interrupted, reopening", error=summarize_error(error))
            except LedgerUnavailable as error:  # from a listener's own reading
                _log.warning("change stream interrupted, reopening", error=str(error))
            self.restart_count += 1
            # Full jitter, so that not all processes reconnect at the same time after a failover.
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311 - spreads load, guards no secret
            pause = min(pause * 2, _MAX_PAUSE_SECONDS)

    @asynccontextmanager
    async def _open_cursor(self) -> AsyncIterator[_ChangeCursor]:
        """Open a cursor and resync all listeners."""
        async with self._db.client.start_session(causal_consistency=True) as session:
            await self._db.command("ping", session=session)
            opened_at = session.operation_time
            if opened_at is None:  # as of a member that has just started and does not know its replica set yet
                raise LedgerUnavailable("The database is starting: its response has no operation time.")
            async with _ChangeCursor.open(self._db, self._build_pipeline(), opened_at) as cursor:
                for listener in self._listeners:
                    await listener.resync(session)
                self._open.set()
                yield cursor

    def _build_pipeline(self) -> Sequence[Mapping[str, Any]]:
        # The server compares complete namespaces with those of its oplog. It would turn bare names into patterns.
        spaces = {name: {"db": self._db.name, "coll": name} for name in {it.collection for it in self._listeners}}
        events: dict[str, Any] = {"ns": spaces.pop("events", None)}
        if self._event_types is not None:
            events["fullDocument.type"] = {"$in": sorted(self._event_types)}
        others = {"ns": {"$in": [spaces[name] for name in sorted(spaces)]}}
        operations = ["insert", "update", "replace", "delete"]
        return [{"$match": {"operationType": {"$in": operations}, "$or": [events, others]}}]

    async def _deliver(self, cursor: _ChangeCursor) -> None:
        """Deliver changes until the stream is paused, an event is deleted, or the server closes the cursor."""
        by_collection: dict[str, list[ChangeListener]] = {}
        for listener in self._listeners:
            by_collection.setdefault(listener.collection, []).append(listener)
        while (changes := await cursor.read()) is not None:
            for number, change in enumerate(changes, 1):
                for listener in by_collection.get(change["ns"]["coll"], ()):
                    try:
                        listener.on_change(change)
                    except (AttributeError, LookupError, TypeError, ValueError) as error:
                        # A damaged document, written by another program, must not end all processes.
                        _log.error(
                            "unreadable change stream event", document_key=change["documentKey"], error=repr(error)
                        )
                if change["operationType"] == "delete" and _is_event_deletion(change, cursor.opened_at):
                    _log.warning(
                        "event deleted from the log, reopening change stream", document_key=change["documentKey"]
                    )
                    return
                if number % _CHANGES_PER_TURN == 0:
                    await asyncio.sleep(0)
            await self._pacer.wait()
            if not self._not_paused.is_set():
                return


class _ChangeCursor:
    """A cursor of the server for changes, read batch by batch.

    The driver's change stream does not show where a batch ends, opens another cursor by itself after an error, and
    takes more CPU time for each change.

    Attributes:
        opened_at: The cluster time of the first changes.
    """

    def __init__(self, db: Database, session: AsyncClientSession, opened_at: Timestamp, response: Document) -> None:
        self.opened_at = opened_at
        self._db = db
        self._session = session
        self._first_batch: Sequence[Document] = response["cursor"]["firstBatch"]
        self._cursor_id = Int64(response["cursor"]["id"])

    @classmethod
    @asynccontextmanager
    async def open(
        cls, db: Database, pipeline: Sequence[Mapping[str, Any]], opened_at: Timestamp
    ) -> AsyncIterator[_ChangeCursor]:
        """Open a cursor for changes from a cluster time on, and close it after the block."""
        stage = {"$changeStream": {"startAtOperationTime": opened_at}}
        command = {"aggregate": 1, "pipeline": [stage, *pipeline], "cursor": {"batchSize": _BATCH_CHANGES}}
        async with db.client.start_session(causal_consistency=False) as session:
            cursor = cls(
                db, session, opened_at, await db.command(command, codec_options=LENIENT_CODEC, session=session)
            )
            try:
                yield cursor
            finally:
                await cursor._close()

    async def read(self) -> Sequence[Document] | None:
        """Return the next changes; none if there are none within a second. None: the server has closed the cursor."""
        if self._first_batch:
            first_batch, self._first_batch = self._first_batch, ()
            return first_batch
        if not self._cursor_id:  # the database was dropped
            return None
        command = {
            "getMore": self._cursor_id,
            "collection": _DATABASE_CURSOR,
            "batchSize": _BATCH_CHANGES,
            "maxTimeMS": _AWAIT_MILLISECONDS,
        }
        # 0: `timeoutMS` of the connection is for commands that do not wait.
        with pymongo.timeout(0):
            response = await self._db.command(command, codec_options=LENIENT_CODEC, session=self._session)
        self._cursor_id = Int64(response["cursor"]["id"])
        batch: Sequence[Document] = response["cursor"]["nextBatch"]
        return batch

    async def _close(self) -> None:
        """Close the cursor, so that the server need not keep it for minutes."""
        if not self._cursor_id:
            return
        with suppress(PyMongoError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._db.command({"killCursors": _DATABASE_CURSOR, "cursors": [self._cursor_id]})


def _is_event_deletion(deletion: Mapping[str, Any], opened_at: Timestamp) -> bool:
    """Return whether an event was deleted that a listener may have read. Changes until `opened_at` came before."""
    return bool(deletion["ns"]["coll"] == "events" and deletion["clusterTime"] > opened_at)
