"""ledger: the one change stream of a process. It says *that* something happened; collections say what is true.

A listener names a collection and is told of every change to it. Whenever the stream is opened, at first and after any
trouble (fail-over, history lost from the oplog, a dropped connection), each listener is asked to `resync` from its
collection. So nothing depends on resume tokens: a stream that cannot be continued is simply opened anew.

The stream is also opened again when an event of the log was deleted. Jobledger deletes none, and what listeners have
derived from it is no longer true.

Why nothing falls between: the stream is opened at a cluster time T read before, and `resync` reads with majority
concern in a causally consistent session that has seen T. What was committed up to T the read sees; the rest streams.
Much of what is read is heard as well: the changes at T, and those that came while the collection was read.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Mapping, Sequence
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
_LONGEST_PAUSE_SECONDS = 2.0
_PAUSE_AFTER_REMOVAL_SECONDS = 0.5
"""Events are often deleted many at a time: the stream is not opened again for each."""
_CHANGES_PER_TURN = 200  # then others on the event loop get a chance


class ChangeListener(Protocol):
    """Somebody who reacts to changes of one collection."""

    @property
    def collection(self) -> str: ...

    @property
    def resync(self) -> Callable[[AsyncClientSession], Awaitable[None]]:
        """The stream is open (again): take in what the collection says now, reading with `session`."""

    @property
    def on_change(self) -> Callable[[Mapping[str, Any]], None]:
        """A document was inserted, updated, replaced or deleted (a change stream event). Must not block."""


@dataclass(frozen=True, slots=True)
class CallbackListener:
    """A listener made of two functions."""

    collection: str
    on_change: Callable[[Mapping[str, Any]], None]
    resync: Callable[[AsyncClientSession], Awaitable[None]]


class ChangeStream:
    """The change stream of this process, shared by all its listeners.

    `event_types` narrows what is heard of the `events` collection: a process that only works has no use for progress.
    """

    def __init__(self, db: Database, *, event_types: Collection[str] | None = None) -> None:
        self._db = db
        self._event_types = event_types
        self._listeners: list[ChangeListener] = []
        self._open = asyncio.Event()
        self.restart_count = 0
        """How often the stream had to be opened again."""

    def add_listener(self, listener: ChangeListener) -> None:
        """Add a listener; only before `running`."""
        self._listeners.append(listener)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[asyncio.Task[None]]:
        """Keep the stream open inside the block; entered once every listener has resynced.

        Yields the task that does it: it ends only by a fault in our code or for want of rights, and whoever composes
        a process watches it.

        Raises:
            DatabaseUnsuitable: this user may not hear of changes.
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
                async with self._stream() as (stream, opened_at):
                    pause = 0.05
                    await self._deliver(stream, opened_at)
                    pause = _PAUSE_AFTER_REMOVAL_SECONDS
            except PyMongoError as error:
                if not is_transient(error):
                    raise DatabaseUnsuitable(f"MongoDB refuses to tell of changes: {summarize_error(error)}") from error
                _log.warning("change stream interrupted, reopening", error=summarize_error(error))
            except LedgerUnavailable as error:  # from a listener's own reading
                _log.warning("change stream interrupted, reopening", error=str(error))
            self.restart_count += 1
            # Full jitter, so that a hundred processes do not come back in the same instant after a fail-over.
            await asyncio.sleep(random.uniform(0, pause))  # noqa: S311 - spreads load, guards no secret
            pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)

    @asynccontextmanager
    async def _stream(self) -> AsyncIterator[tuple[AsyncChangeStream[dict[str, Any]], Timestamp]]:
        """Open the stream and resync all listeners. Yields the stream and the cluster time at which it begins."""
        async with self._db.client.start_session(causal_consistency=True) as session:
            await self._db.command("ping", session=session)
            opened_at = session.operation_time
            assert opened_at is not None  # noqa: S101 - every answer of a replica set has it
            async with await self._db.with_options(codec_options=LENIENT_CODEC).watch(
                self._pipeline(), start_at_operation_time=opened_at, batch_size=1000
            ) as stream:
                for listener in self._listeners:
                    await listener.resync(session)
                self._open.set()
                yield stream, opened_at

    def _pipeline(self) -> Sequence[Mapping[str, Any]]:
        # Whole namespaces: the server compares them with those of its oplog; bare names it would turn into patterns.
        spaces = {name: {"db": self._db.name, "coll": name} for name in {it.collection for it in self._listeners}}
        events: dict[str, Any] = {"ns": spaces.pop("events", None)}
        if self._event_types is not None:
            events["fullDocument.type"] = {"$in": sorted(self._event_types)}
        others = {"ns": {"$in": [spaces[name] for name in sorted(spaces)]}}
        kinds = ["insert", "update", "replace", "delete"]
        return [{"$match": {"operationType": {"$in": kinds}, "$or": [events, others]}}]

    async def _deliver(self, stream: AsyncChangeStream[dict[str, Any]], opened_at: Timestamp) -> None:
        """Pass changes on until the stream ends, or an event was deleted since it was opened."""
        by_collection: dict[str, list[ChangeListener]] = {}
        for listener in self._listeners:
            by_collection.setdefault(listener.collection, []).append(listener)
        turn = 0
        while stream.alive:
            # Never in wait_for: a cancelled next() closes the driver's stream for good.
            change = await stream.try_next()
            if change is None:
                continue
            for listener in by_collection.get(change["ns"]["coll"], ()):
                try:
                    listener.on_change(change)
                except (AttributeError, LookupError, TypeError, ValueError) as error:
                    # A damaged document, written by another program, must not end all processes.
                    _log.error("unreadable change stream event", document_key=change["documentKey"], error=repr(error))
            if change["operationType"] == "delete" and _removes_event(change, opened_at):
                _log.warning("event deleted from the log, reopening change stream", document_key=change["documentKey"])
                return
            turn += 1
            if turn % _CHANGES_PER_TURN == 0:
                await asyncio.sleep(0)


def _removes_event(deletion: Mapping[str, Any], opened_at: Timestamp) -> bool:
    """Return whether an event was deleted that a listener may have read. What is heard of `opened_at` came before."""
    return bool(deletion["ns"]["coll"] == "events" and deletion["clusterTime"] > opened_at)
