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
from collections.abc import AsyncIterator, Callable, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import structlog
from bson import Timestamp
from pymongo.asynchronous.change_stream import AsyncChangeStream
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import PyMongoError

from jobledger.ledger.domain.errors import DatabaseUnsuitable, LedgerUnavailable
from jobledger.ledger.mongo.connection import LENIENT_CODEC, Database, is_transient, summarize_error

_log = structlog.get_logger()
_MAX_PAUSE_SECONDS = 2.0
_PAUSE_AFTER_REMOVAL_SECONDS = 0.5
"""Events are often deleted in bulk. The pause avoids reopening the stream for each."""
_CHANGES_PER_TURN = 200  # then other tasks may run


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

    `event_types` filters the changes of the collection `events`: a worker, for example, does not need progress events.
    """

    def __init__(self, db: Database, *, event_types: Collection[str] | None = None) -> None:
        self._db = db
        self._event_types = event_types
        self._listeners: list[ChangeListener] = []
        self._open = asyncio.Event()
        self.restart_count = 0
        """How often the stream had to be opened again."""

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

    async def _run(self) -> None:
        pause = 0.05
        while True:
            try:
                async with self._open_stream() as (stream, opened_at):
                    pause = 0.05
                    await self._deliver(stream, opened_at)
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
    async def _open_stream(self) -> AsyncIterator[tuple[AsyncChangeStream[dict[str, Any]], Timestamp]]:
        """Open the stream and resync all listeners. Yields the stream and the cluster time at which it begins."""
        async with self._db.client.start_session(causal_consistency=True) as session:
            await self._db.command("ping", session=session)
            opened_at = session.operation_time
            assert opened_at is not None  # noqa: S101 - every response of a replica set has it
            async with await self._db.with_options(codec_options=LENIENT_CODEC).watch(
                self._build_pipeline(), start_at_operation_time=opened_at, batch_size=1000
            ) as stream:
                for listener in self._listeners:
                    await listener.resync(session)
                self._open.set()
                yield stream, opened_at

    def _build_pipeline(self) -> Sequence[Mapping[str, Any]]:
        # The server compares complete namespaces with those of its oplog. It would turn bare names into patterns.
        spaces = {name: {"db": self._db.name, "coll": name} for name in {it.collection for it in self._listeners}}
        events: dict[str, Any] = {"ns": spaces.pop("events", None)}
        if self._event_types is not None:
            events["fullDocument.type"] = {"$in": sorted(self._event_types)}
        others = {"ns": {"$in": [spaces[name] for name in sorted(spaces)]}}
        operations = ["insert", "update", "replace", "delete"]
        return [{"$match": {"operationType": {"$in": operations}, "$or": [events, others]}}]

    async def _deliver(self, stream: AsyncChangeStream[dict[str, Any]], opened_at: Timestamp) -> None:
        """Deliver changes until the stream ends, or an event is deleted."""
        by_collection: dict[str, list[ChangeListener]] = {}
        for listener in self._listeners:
            by_collection.setdefault(listener.collection, []).append(listener)
        turn = 0
        while stream.alive:
            # Do not call this in wait_for: if it is cancelled, the driver closes the stream permanently.
            change = await stream.try_next()
            if change is None:
                continue
            for listener in by_collection.get(change["ns"]["coll"], ()):
                try:
                    listener.on_change(change)
                except (AttributeError, LookupError, TypeError, ValueError) as error:
                    # A damaged document, written by another program, must not end all processes.
                    _log.error("unreadable change stream event", document_key=change["documentKey"], error=repr(error))
            if change["operationType"] == "delete" and _is_event_deletion(change, opened_at):
                _log.warning("event deleted from the log, reopening change stream", document_key=change["documentKey"])
                return
            turn += 1
            if turn % _CHANGES_PER_TURN == 0:
                await asyncio.sleep(0)


def _is_event_deletion(deletion: Mapping[str, Any], opened_at: Timestamp) -> bool:
    """Return whether an event was deleted that a listener may have read. Changes until `opened_at` came before."""
    return bool(deletion["ns"]["coll"] == "events" and deletion["clusterTime"] > opened_at)
