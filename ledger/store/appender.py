"""Write events to the log: reserve positions, group commits, repeat inserts and resolve conflicts.

An appender reserves positions from a counter and then inserts its events at them. An appender that crashes in between
leaves a gap. A reader that sees a later event, but not this one, fills the gap with `PositionVoided`. `_id` is unique,
so either that insert or the late appender's insert succeeds, and all readers see the same order without gaps. If its
position was voided, an appender reserves another one. docs/explanation.md explains why this is correct.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Collection, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import structlog
from bson.errors import BSONError
from pymongo import DESCENDING
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import OperationFailure, PyMongoError, WriteConcernError

from jobledger.ledger.domain.errors import InvalidEvent, LedgerBusy, LedgerUnavailable, VersionConflict
from jobledger.ledger.mongo.connection import DURABLE, Database, Document, is_transient, summarize_error
from jobledger.ledger.store.envelope import build_void_document
from jobledger.ledger.store.pending_appends import (
    MAX_JSON_BYTES_PER_WRITE,
    OnDone,
    PendingAppend,
    find_encoding_error,
    resolve_appends,
    split_into_messages,
)

_log = structlog.get_logger()

_DUPLICATE_KEY = 11000
_LARGE_WRITE_EVENTS = 100
"""Only one write of more events than this runs at a time. While the server executes it, the callers of the previous
write create their next events. Concurrent large writes would end together: the server would then be idle until all
callers have created their next events."""
_VERSIONS_PER_QUERY = 200


@dataclass(frozen=True, slots=True)
class EventStoreLimits:
    """Timeouts and limits of an event store. A write is one insert command or transaction. Sizes are in bytes."""

    gap_timeout_seconds: float = 1.0
    append_timeout_seconds: float = 30.0
    max_events_per_write: int = 300
    max_concurrent_writes: int = 3
    max_pending_events: int = 50_000
    max_pending_bytes: int = 64 * 1024 * 1024
    max_append_bytes: int = 32 * 1024 * 1024
    max_tail_events: int = 10_000
    max_tail_bytes: int = 64 * 1024 * 1024
    page_events: int = 1000


class Appender:
    """Writes documents at new positions, many appends per write."""

    def __init__(self, db: Database, events: AsyncCollection[Document], limits: EventStoreLimits) -> None:
        self._db = db
        self._events = events
        self._limits = limits
        self._queue: deque[PendingAppend] = deque()
        self._queued_events = 0
        self._queued_bytes = 0
        self._is_write_scheduled = False
        self._large_write_lock = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()

    async def wait_until_idle(self) -> None:
        """Wait until no write is in progress."""
        while self._writes:
            await asyncio.wait(self._writes)

    def write(
        self,
        documents: list[Document],
        size: int,
        based_on_position: int,
        on_done: OnDone,
        next_document: Document | None = None,
    ) -> None:
        """Write documents at positions larger than `based_on_position`, all or none. Sets their `_id`s.

        Args:
            on_done: Called when the documents are durable, or with an error as in `EventStore.append`.
            next_document: Continues the stream of the only document (`EventStore.append_with_next`).

        Raises:
            LedgerBusy, InvalidEvent: As `EventStore.append`. Nothing is written, and `on_done` is not called.
        """
        if (
            self._queued_events >= self._limits.max_pending_events
            or self._queued_bytes >= self._limits.max_pending_bytes
        ):
            raise LedgerBusy(
                f"{self._queued_events} events ({self._queued_bytes} bytes) are already queued. Try again in a moment."
            )
        if size > self._limits.max_append_bytes:
            raise InvalidEvent(
                f"{len(documents)} events of {size} bytes are too large for one append: the limit is "
                f"{self._limits.max_append_bytes} bytes"
            )
        deadline = time.monotonic() + self._limits.append_timeout_seconds
        self._queue.append(PendingAppend(documents, size, based_on_position, deadline, on_done, next_document))
        self._queued_events += len(documents)
        self._queued_bytes += size
        if not self._is_write_scheduled:
            self._schedule_write()

    def _schedule_write(self) -> None:
        """Start the next write, unless enough writes are in progress. Then appends queue up until one has ended.

        The task collects the appends when it runs, so all appends of this iteration of the event loop go together.
        """
        if self._queue and not self._is_write_scheduled and len(self._writes) < self._limits.max_concurrent_writes:
            self._is_write_scheduled = True
            task = asyncio.create_task(self._write_next(), name="log-writer")
            self._writes.add(task)
            task.add_done_callback(self._on_write_done)

    def _on_write_done(self, task: asyncio.Task[None]) -> None:
        self._writes.discard(task)
        self._schedule_write()

    async def _write_next(self) -> None:
        self._fail_expired()
        appends = self._collect_appends()
        self._is_write_scheduled = False
        if not appends:
            return
        self._schedule_write()
        try:
            await self._write_appends(appends)
        except LedgerUnavailable as error:
            resolve_appends(appends, error)
        except BaseException:
            # Fail the queued appends, too. Nothing would write them before the next append, which may never come.
            resolve_appends(
                [*appends, *self._queue], LedgerUnavailable("The event store was stopped before it wrote the events.")
            )
            self._queue.clear()
            self._queued_events = self._queued_bytes = 0
            raise

    def _fail_expired(self) -> None:
        """Fail appends that timed out in the queue. After a database outage, each would otherwise be tried in turn."""
        late = LedgerUnavailable("The database did not write the events in time: other events were queued before them.")
        now = time.monotonic()
        while self._queue and self._queue[0].deadline < now:
            resolve_appends([self._dequeue()], late)

    def _dequeue(self) -> PendingAppend:
        append = self._queue.popleft()
        self._queued_events -= len(append.documents)
        self._queued_bytes -= append.size
        return append

    def _collect_appends(self) -> list[PendingAppend]:
        """Dequeue as many appends of one event as fit into one write, or one append of several events."""
        if not self._queue:
            return []
        appends = [self._dequeue()]
        size = appends[0].size
        if len(appends[0].documents) == 1:
            while (
                self._queue
                and len(self._queue[0].documents) == 1
                and len(appends) < self._limits.max_events_per_write
                and size + self._queue[0].size <= MAX_JSON_BYTES_PER_WRITE
            ):
                appends.append(self._dequeue())
                size += appends[-1].size
        return appends

    async def _write_appends(self, appends: Sequence[PendingAppend]) -> None:
        """Write appends of one event in one insert, or one append of several events in one transaction.

        After any response of the database, the same documents may be inserted again: documents that are already
        stored are recognized by their event IDs. So every transient failure is retried until the deadline.
        """
        deadline = appends[0].deadline  # the first one has waited longest
        pause = 0.002
        remaining = list(appends)
        has_positions = False
        while remaining:
            try:
                if not has_positions:
                    await self._assign_positions(remaining)
                    has_positions = True
                duplicates = await self._insert(remaining)
                remaining = await self._resolve_duplicates(duplicates) if duplicates else []
                has_positions = False
            except PyMongoError as error:
                if not is_transient(error):
                    raise LedgerUnavailable(f"The database rejects the events: {summarize_error(error)}") from error
                if time.monotonic() > deadline:
                    raise LedgerUnavailable(
                        f"The database did not write the events in time: {summarize_error(error)}"
                    ) from error
                if pause > 0.1:  # one or two write conflicts are normal
                    _log.warning("append failed, retrying", error=summarize_error(error))
                await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - spreads load, guards no secret
                pause = min(2 * pause, 0.2)

    async def _insert(self, appends: Sequence[PendingAppend]) -> list[PendingAppend]:
        """Insert, resolve the appends that succeeded, and return those that failed with a duplicate key."""
        try:
            if len(appends[0].documents) > 1:
                # The transaction is aborted whichever document was the duplicate.
                failed = {0} if await self._insert_in_transaction(appends[0]) else set()
            else:
                async with self._large_write_lock if len(appends) > _LARGE_WRITE_EVENTS else nullcontext():
                    failed = await self._insert_separately(appends)
        except (BSONError, ValueError, OverflowError):  # the driver cannot encode one of them in BSON
            return await self._insert_encodable(appends)
        if not failed:
            resolve_appends(appends)
            return []
        resolve_appends(append for index, append in enumerate(appends) if index not in failed)
        return [append for index, append in enumerate(appends) if index in failed]

    async def _insert_encodable(self, appends: Sequence[PendingAppend]) -> list[PendingAppend]:
        """Fail appends that JSON can express, but BSON cannot (a UUID), and insert the rest."""
        errors = [find_encoding_error(append) for append in appends]
        encodable = [append for append, error in zip(appends, errors, strict=True) if error is None]
        if len(encodable) == len(appends):
            raise LedgerUnavailable(
                f"MongoDB's driver rejected an insert of {len(appends)} appends, the first to "
                f"{appends[0].documents[0]['stream']}. It can encode each of them alone. "
                "This is a bug: please report it."
            )
        for append, error in zip(appends, errors, strict=True):
            if error is not None:
                unused = [document["_id"] for document in append.documents]
                if append.next_position is not None:
                    unused.append(append.next_position)
                await self.void_positions(unused)
                resolve_appends([append], error)
        return await self._insert(encodable) if encodable else []

    async def _insert_separately(self, appends: Sequence[PendingAppend]) -> set[int]:
        """Insert appends of one document, with their next documents. Return the indexes of those with a duplicate key.

        No next document is sent twice. If the response is lost, the next try voids its position, unless it is used.
        """
        unused = [append.next_position for append in appends if append.next_position is not None]
        if any(append.next_document is not None for append in appends):
            failed = await self._insert_with_next(appends, unused)
        else:
            failed = await self._insert_documents([append.documents[0] for append in appends])
        if unused:
            await self.void_positions(unused)
        for append in appends:
            append.next_position = None
        return failed

    async def _insert_with_next(self, appends: Sequence[PendingAppend], unused: list[int]) -> set[int]:
        """Insert documents, and directly after each its next document, if it has one.

        The server stops at the first document that it cannot insert. A next document is never stored without the first
        one: they are in this order in one command and in the oplog, and a failover may only undo the end of an oplog.
        The server may commit them separately, so others may see the first one alone for a moment.

        Args:
            unused: The positions of next documents that were not inserted are added to it.
        """
        documents: list[Document] = []
        owners: list[int | None] = []
        for index, append in enumerate(appends):
            documents.append(append.documents[0])
            owners.append(index)
            if append.next_document is not None:
                documents.append(append.next_document)
                owners.append(None)
                append.next_position, append.next_document = append.next_document["_id"], None
        failed: set[int] = set()
        begin = 0
        while begin < len(documents) and (stops := await self._insert_documents(documents[begin:], is_ordered=True)):
            begin += min(stops)
            if (owner := owners[begin]) is not None:
                failed.add(owner)
                begin += 1
            if begin < len(documents) and owners[begin] is None:  # the next document of the one that failed, or itself
                unused.append(documents[begin]["_id"])
                begin += 1
        return failed

    async def _insert_in_transaction(self, append: PendingAppend) -> bool:
        """Insert all or none. Return whether a key was a duplicate."""
        async with self._db.client.start_session() as session:
            await session.start_transaction(write_concern=DURABLE)
            for documents in split_into_messages(append):
                if await self._insert_documents(documents, session):
                    await session.abort_transaction()
                    return True
            await session.commit_transaction()
        return False

    async def _insert_documents(
        self, documents: list[Document], session: AsyncClientSession | None = None, *, is_ordered: bool = False
    ) -> set[int]:
        """Insert documents. Return the indexes of those that failed with a duplicate key.

        With `is_ordered`, the server stops at the first of these.

        Sends the command as a document. The driver's insert methods would add retries, and the server would record
        them. Neither is needed, because every insert may be repeated, without next documents.

        Raises:
            PyMongoError: It is unknown which documents are durable.
        """
        command: dict[str, Any] = {"insert": "events", "documents": documents, "ordered": is_ordered}
        if session is None:
            command["writeConcern"] = DURABLE.document
        response = await self._db.command(command, session=session)
        failures = response.get("writeErrors", ())
        for failure in failures:
            if failure["code"] != _DUPLICATE_KEY:
                raise OperationFailure(failure["errmsg"], failure["code"], failure)
        if (error := response.get("writeConcernError")) is not None:
            raise WriteConcernError(error["errmsg"], error["code"], error)
        return {failure["index"] for failure in failures}

    async def _assign_positions(self, appends: Sequence[PendingAppend]) -> None:
        """Give the documents the next positions.

        A position must be larger than every position the decision was based on. The counter can fall behind only in a
        failover, because its increment need not have reached a majority. Then it is raised to the head of the log.
        """
        documents: list[Document] = []
        for append in appends:
            documents += append.documents
            if append.next_document is not None:
                documents.append(append.next_document)
        based_on_position = max(append.based_on_position for append in appends)
        while (first := await self.reserve_positions(len(documents))) <= based_on_position:
            await self.void_positions(range(first, first + len(documents)))
            await self._raise_counter()
        for position, document in enumerate(documents, first):
            document["_id"] = position

    async def reserve_positions(self, count: int) -> int:
        """Reserve `count` positions and return the first. Readers void positions at which no event appears in time."""
        # The driver does not retry a command that it gets as a document. A lost response only leaves a gap. It need not
        # reach a majority: if a failover undoes the increment, two appenders get the same position, and `_id` decides.
        response = await self._db.command(
            {
                "findAndModify": "counters",
                "query": {"_id": "events"},
                "update": {"$inc": {"next": count}},
                "upsert": True,
                "new": True,
                "writeConcern": {"w": 1},
            }
        )
        return int(response["value"]["next"]) - count + 1

    async def _raise_counter(self) -> None:
        counters = self._db.get_collection("counters", write_concern=DURABLE)
        head = await self.read_head_position()
        await counters.update_one({"_id": "events"}, {"$max": {"next": head}}, upsert=True)

    async def read_head_position(self, session: AsyncClientSession | None = None) -> int:
        """Return the largest position in the log, 0 if it is empty. Documents without a numeric `_id` do not count."""
        numbers = {"_id": {"$gt": 0}}
        newest = await self._events.find_one(numbers, {"_id": 1}, sort=[("_id", DESCENDING)], session=session)
        return int(newest["_id"]) if newest else 0

    async def _resolve_duplicates(self, duplicates: Sequence[PendingAppend]) -> list[PendingAppend]:
        """After a duplicate key, resolve appends that had succeeded or conflict. Return those that need new positions.

        What is stored at the (stream, version) of each document decides. If it is the event of this
        append, an earlier try succeeded. If it is another event, the versions conflict. If there is none, only the
        position was taken, or no majority has the event of an earlier try yet: then the next try is a duplicate, too.

        The read has majority read concern (`EventStore`), so a failover cannot roll back what it finds.
        """
        stored = await self._load_stored([document for append in duplicates for document in append.documents])
        without_position: list[PendingAppend] = []
        succeeded: list[PendingAppend] = []
        conflicts: list[tuple[PendingAppend, Document]] = []
        unused: list[int] = []
        for append in duplicates:
            positions = {document["_id"] for document in append.documents}
            found = [stored.get((document["stream"], document["version"])) for document in append.documents]
            first = next((event for event in found if event is not None), None)
            if first is None:
                without_position.append(append)
            elif first["event_id"] in {document["event_id"] for document in append.documents}:
                succeeded.append(append)
                for document, event in zip(append.documents, found, strict=True):
                    if event is not None:  # an earlier try wrote it at another position
                        document["_id"] = event["_id"]
                positions -= {document["_id"] for document in append.documents}
            else:
                conflicts.append((append, first))
            unused += positions
        if unused:
            await self.void_positions(unused)
        resolve_appends(succeeded)
        if conflicts:
            versions = await self._load_versions({first["stream"] for _, first in conflicts})
            for append, first in conflicts:
                stream = first["stream"]
                expected = min(it["version"] for it in append.documents if it["stream"] == stream) - 1
                resolve_appends([append], VersionConflict(stream, expected, versions.get(stream, 0)))
        if without_position:
            await self._raise_counter()
        return without_position

    async def _load_stored(self, documents: Sequence[Document]) -> dict[tuple[str, int], Document]:
        """Return `_id` and `event_id` of the events stored at the streams and versions of these documents."""
        found: dict[tuple[str, int], Document] = {}
        keys = [{"stream": document["stream"], "version": document["version"]} for document in documents]
        for begin in range(0, len(keys), _VERSIONS_PER_QUERY):
            query = {"$or": keys[begin : begin + _VERSIONS_PER_QUERY]}
            for event in await self._events.find(query, {"stream": 1, "version": 1, "event_id": 1}).to_list():
                found[event["stream"], event["version"]] = event
        return found

    async def _load_versions(self, streams: Collection[str]) -> dict[str, int]:
        """Return the current version of each of these streams."""
        newest = await self._events.aggregate(
            [
                {"$match": {"stream": {"$in": sorted(streams)}}},
                {"$group": {"_id": "$stream", "version": {"$max": "$version"}}},
            ]
        )
        return {row["_id"]: row["version"] for row in await newest.to_list()}

    async def void_positions(self, positions: Iterable[int]) -> None:
        """Fill positions that no appender will use. A position that has an event meanwhile keeps it."""
        documents = [build_void_document(position) for position in positions]
        for begin in range(0, len(documents), self._limits.max_events_per_write):
            await self._insert_documents(documents[begin : begin + self._limits.max_events_per_write])
