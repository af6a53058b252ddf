"""ledger: the writing half of the log: tickets, groups, repeated inserts, lost races.

Positions. A writer takes numbers from a ticket counter and then inserts its events under them. A writer that dies in
between leaves a hole; a reader that sees a later event, but not this one, fills the hole with `PositionVoided`. Either
that insert or the late writer's wins, `_id` being unique, so every reader sees the same, dense order. A writer whose
number was voided takes another. The protocol and its proof: docs/explanation.md.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import structlog
from bson.errors import BSONError
from pymongo import DESCENDING
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import OperationFailure, PyMongoError, WriteConcernError

from jobledger.ledger.domain.errors import InvalidEvent, LedgerBusy, LedgerUnavailable, VersionConflict
from jobledger.ledger.mongo.connection import (
    DURABLE,
    LENIENT_CODEC,
    MAJORITY,
    Database,
    Document,
    is_transient,
    summarize_error,
)
from jobledger.ledger.store.envelope import build_void_document, encode_bson

_log = structlog.get_logger()

_DUPLICATE_KEY = 11000
_LARGE_GROUP = 100
"""Events that keep the server busy for as long as their callers need to make the next ones. Of such groups one at a
time is inserted: side by side, they would arrive together, too, and server and callers wait for each other in turn."""
_PLACES_AT_ONCE = 200
"""Of events that are looked for, in one query."""
_MESSAGE_BYTES = 15 * 1024 * 1024
"""Of BSON in one insert command: the driver sends bare commands up to the size of one document, 16 MB."""
_BSON_FACTOR = 9
"""BSON takes up to that much more than canonical JSON: 17 bytes for `0,` in a long list."""


@dataclass(frozen=True, slots=True)
class EventStoreLimits:
    """The log's patience and appetite. A group is what goes to the database in one write."""

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


@dataclass(slots=True, eq=False)
class PendingAppend:
    """Documents that belong together, waiting to be written, and who waits for them. `size` in bytes of JSON."""

    documents: list[Document]
    size: int
    based_on_position: int
    """The largest position that the decision was based on: the new positions must be larger."""
    deadline: float
    done: asyncio.Future[None]


class Appender:
    """Writes documents under new positions, in groups; what is there when `write` returns is there for good."""

    collection = "events"

    def __init__(self, db: Database, limits: EventStoreLimits) -> None:
        self._db = db
        self._events = db.get_collection(
            self.collection, codec_options=LENIENT_CODEC, write_concern=DURABLE, read_concern=MAJORITY
        )
        self._limits = limits
        self._queue: deque[PendingAppend] = deque()
        self._queued_events = 0
        self._queued_bytes = 0
        self._gathering = False
        self._one_large_group = asyncio.Lock()
        self._writing: set[asyncio.Task[None]] = set()

    async def _written(self) -> None:
        """Wait until nothing is on its way any more."""
        while self._writing:
            await asyncio.wait(self._writing)

    def _write(self, documents: list[Document], size: int, basis: int) -> asyncio.Future[None]:
        """Have documents written under positions larger than `basis`, all or none; then their `_id`s say where.

        A caller that is cancelled takes along only this future, not the group in which its events travel.

        Raises: as `EventLog.append`, at once or by the future.
        """
        if (
            self._queued_events >= self._limits.max_pending_events
            or self._queued_bytes >= self._limits.max_pending_bytes
        ):
            raise LedgerBusy(
                f"{self._queued_events} events ({self._queued_bytes} bytes) are waiting to be written already; "
                "try again in a moment"
            )
        if size > self._limits.max_append_bytes:
            raise InvalidEvent(
                f"{len(documents)} events of {size} bytes are too much to be written together: "
                f"{self._limits.max_append_bytes} bytes can be"
            )
        deadline = time.monotonic() + self._limits.append_timeout_seconds
        waiting = PendingAppend(documents, size, basis, deadline, asyncio.get_running_loop().create_future())
        self._queue.append(waiting)
        self._queued_events += len(documents)
        self._queued_bytes += size
        if not self._gathering:
            self._begin()
        return waiting.done

    def _begin(self) -> None:
        """Have the next group written, unless enough are on their way: then the next gathers until one has arrived.

        The group is made up when its task runs, so that all who append in this turn of the loop travel in it.
        """
        if self._queue and not self._gathering and len(self._writing) < self._limits.max_concurrent_writes:
            self._gathering = True
            task = asyncio.create_task(self._write_next(), name="log-writer")
            self._writing.add(task)
            task.add_done_callback(self._arrived)

    def _arrived(self, task: asyncio.Task[None]) -> None:
        self._writing.discard(task)
        self._begin()

    async def _write_next(self) -> None:
        self._give_up_late()
        group = self._gather()
        self._gathering = False
        if not group:
            return
        self._begin()
        try:
            await self._write_group(group)
        except LedgerUnavailable as error:
            _resolve_appends(group, error)
        except BaseException:
            # Those behind it, too: nobody would write them before the next append comes, perhaps never.
            _resolve_appends(
                [*group, *self._queue], LedgerUnavailable("The writer of the log was stopped before it was done.")
            )
            self._queue.clear()
            self._queued_events = self._queued_bytes = 0
            raise

    def _give_up_late(self) -> None:
        """Answer those whose time ran out in the queue: behind a database that was away, all would wait in turn."""
        late = LedgerUnavailable("The database did not take the events in time: others were waiting before them.")
        now = time.monotonic()
        while self._queue and self._queue[0].deadline < now:
            _resolve_appends([self._take()], late)

    def _take(self) -> PendingAppend:
        waiting = self._queue.popleft()
        self._queued_events -= len(waiting.documents)
        self._queued_bytes -= waiting.size
        return waiting

    def _gather(self) -> list[PendingAppend]:
        """Take single events from the queue, as many as fit in one group, or one caller's several events."""
        if not self._queue:
            return []
        group = [self._take()]
        size = group[0].size
        if len(group[0].documents) == 1:
            while (
                self._queue
                and len(self._queue[0].documents) == 1
                and len(group) < self._limits.max_events_per_write
                and size + self._queue[0].size <= _MESSAGE_BYTES // _BSON_FACTOR
            ):
                group.append(self._take())
                size += group[-1].size
        return group

    async def _write_group(self, group: Sequence[PendingAppend]) -> None:
        """Write single events in one unordered insert, or one caller's several events in one transaction.

        Whatever the database answers, the same documents may be inserted again: those that are there already are
        recognised as ours. So every failure that may pass is answered by trying again until the deadline.
        """
        deadline = group[0].deadline  # who came first has waited longest
        pause = 0.002
        todo = list(group)
        numbered = False
        while todo:
            try:
                if not numbered:
                    await self._number(todo)
                    numbered = True
                refused = await self._insert(todo)
                todo = await self._sort_out(refused) if refused else []
                numbered = False
            except PyMongoError as error:
                if not is_transient(error):
                    raise LedgerUnavailable(f"The database refuses the events: {summarize_error(error)}") from error
                if time.monotonic() > deadline:
                    raise LedgerUnavailable(
                        f"The database did not take the events in time: {summarize_error(error)}"
                    ) from error
                if pause > 0.1:  # a write conflict or two are nothing to speak of
                    _log.warning("append delayed by the database", error=summarize_error(error))
                await asyncio.sleep(random.uniform(pause / 2, pause))  # noqa: S311 - spreads load, guards no secret
                pause = min(2 * pause, 0.2)

    async def _insert(self, todo: Sequence[PendingAppend]) -> list[PendingAppend]:
        """Insert, settle what succeeded, and return what was refused for a duplicate key."""
        try:
            if len(todo[0].documents) > 1:
                # In a transaction all is undone, whichever document it was.
                refused = {0} if await self._insert_together(todo[0]) else set()
            else:
                async with self._one_large_group if len(todo) > _LARGE_GROUP else nullcontext():
                    refused = await self._insert_documents([waiting.documents[0] for waiting in todo])
        except (BSONError, ValueError, OverflowError):  # the driver cannot write one of them in BSON
            return await self._insert_storable(todo)
        if not refused:
            _resolve_appends(todo)
            return []
        _resolve_appends(waiting for index, waiting in enumerate(todo) if index not in refused)
        return [waiting for index, waiting in enumerate(todo) if index in refused]

    async def _insert_storable(self, todo: Sequence[PendingAppend]) -> list[PendingAppend]:
        """Refuse what can be written in JSON, but not in BSON (a UUID), and insert the rest."""
        storable = [waiting for waiting in todo if _refusal(waiting) is None]
        if len(storable) == len(todo):
            raise LedgerUnavailable("The driver refuses events that can be stored.")
        for waiting in todo:
            if (refusal := _refusal(waiting)) is not None:
                await self._void([document["_id"] for document in waiting.documents])
                _resolve_appends([waiting], refusal)
        return await self._insert(storable) if storable else []

    async def _insert_together(self, waiting: PendingAppend) -> bool:
        """Insert all or none; return whether a duplicate key was in the way."""
        async with self._db.client.start_session() as session:
            await session.start_transaction(write_concern=DURABLE)
            for part in _messages(waiting):
                if await self._insert_documents(part, session):
                    await session.abort_transaction()
                    return True
            await session.commit_transaction()
        return False

    async def _insert_documents(self, documents: list[Document], session: AsyncClientSession | None = None) -> set[int]:
        """Insert in no particular order; return the indexes of those that were refused for a duplicate key.

        As a bare command: the driver's own repetition, and the server's book-keeping for it, are not needed where
        everything may be repeated anyway.

        Raises:
            PyMongoError: it is not known which of them are durable.
        """
        command: dict[str, Any] = {"insert": "events", "documents": documents, "ordered": False}
        if session is None:
            command["writeConcern"] = DURABLE.document
        answer = await self._db.command(command, session=session)
        failures = answer.get("writeErrors", ())
        for failure in failures:
            if failure["code"] != _DUPLICATE_KEY:
                raise OperationFailure(failure["errmsg"], failure["code"], failure)
        if (unsure := answer.get("writeConcernError")) is not None:
            raise WriteConcernError(unsure["errmsg"], unsure["code"], unsure)
        return {failure["index"] for failure in failures}

    async def _number(self, todo: Sequence[PendingAppend]) -> None:
        """Give the documents the next positions.

        A number must be larger than every position the decision was based on. Only a fail-over can make the counter
        fall behind (the increment need not have reached a majority); then it is raised to the head of the log.
        """
        documents = [document for waiting in todo for document in waiting.documents]
        basis = max(waiting.based_on_position for waiting in todo)
        while (first := await self._take_tickets(len(documents))) <= basis:
            await self._void(range(first, first + len(documents)))
            await self._raise_counter()
        for position, document in enumerate(documents, first):
            document["_id"] = position

    async def _take_tickets(self, count: int) -> int:
        """Return the first of `count` numbers that are ours."""
        # As a bare command, because the driver makes it no retryable write then: a lost ticket is only a hole.
        answer = await self._db.command(
            {
                "findAndModify": "counters",
                "query": {"_id": "events"},
                "update": {"$inc": {"next": count}},
                "upsert": True,
                "new": True,
                "writeConcern": {"w": 1},
            }
        )
        return int(answer["value"]["next"]) - count + 1

    async def _raise_counter(self) -> None:
        counters = self._db.get_collection("counters", write_concern=DURABLE)
        await counters.update_one({"_id": "events"}, {"$max": {"next": await self._newest()}}, upsert=True)

    async def _newest(self, session: AsyncClientSession | None = None) -> int:
        """Return the largest position, 0 when there is none. What stands elsewhere than at a number is no event."""
        numbers = {"_id": {"$gt": 0}}
        newest = await self._events.find_one(numbers, {"_id": 1}, sort=[("_id", DESCENDING)], session=session)
        return int(newest["_id"]) if newest else 0

    async def _sort_out(self, refused: Sequence[PendingAppend]) -> list[PendingAppend]:
        """After a duplicate key: settle what had succeeded or lost its race; return what needs a new number.

        The (stream, version) of each refused document tells: our event is there, so an earlier try of ours succeeded;
        another is there, so the race is lost; none is there, so it was the number that had been taken.
        """
        there = await self._standing([document for waiting in refused for document in waiting.documents])
        again: list[PendingAppend] = []
        ours: list[PendingAppend] = []
        lost: list[tuple[PendingAppend, Document]] = []
        unused: list[int] = []
        for waiting in refused:
            numbers = {document["_id"] for document in waiting.documents}
            found = [there.get((document["stream"], document["version"])) for document in waiting.documents]
            first = next((other for other in found if other is not None), None)
            if first is None:
                again.append(waiting)
            elif first["event_id"] in {document["event_id"] for document in waiting.documents}:
                ours.append(waiting)
                for document, other in zip(waiting.documents, found, strict=True):
                    if other is not None:  # it was written under the number of an earlier try
                        document["_id"] = other["_id"]
                numbers -= {document["_id"] for document in waiting.documents}
            else:
                lost.append((waiting, first))
            unused += numbers
        if unused:
            await self._void(unused)
        _resolve_appends(ours)
        if lost:
            newest = await self._versions({first["stream"] for _, first in lost})
            for waiting, first in lost:
                stream = first["stream"]
                expected = min(it["version"] for it in waiting.documents if it["stream"] == stream) - 1
                _resolve_appends([waiting], VersionConflict(stream, expected, newest.get(stream, 0)))
        if again:
            await self._raise_counter()
        return again

    async def _standing(self, documents: Sequence[Document]) -> dict[tuple[str, int], Document]:
        """Return what stands in the log where these documents should, by stream and version: `_id` and `event_id`."""
        found: dict[tuple[str, int], Document] = {}
        places = [{"stream": document["stream"], "version": document["version"]} for document in documents]
        for begin in range(0, len(places), _PLACES_AT_ONCE):
            wanted = {"$or": places[begin : begin + _PLACES_AT_ONCE]}
            for event in await self._events.find(wanted, {"stream": 1, "version": 1, "event_id": 1}).to_list():
                found[event["stream"], event["version"]] = event
        return found

    async def _versions(self, streams: Collection[str]) -> dict[str, int]:
        """Return at which version each of these streams is now."""
        newest = await self._events.aggregate(
            [
                {"$match": {"stream": {"$in": sorted(streams)}}},
                {"$group": {"_id": "$stream", "version": {"$max": "$version"}}},
            ]
        )
        return {row["_id"]: row["version"] for row in await newest.to_list()}

    async def _void(self, positions: Iterable[int]) -> None:
        """Fill positions that nobody will use. Where somebody did after all, that is just as well."""
        documents = [build_void_document(position) for position in positions]
        for begin in range(0, len(documents), self._limits.max_events_per_write):
            await self._insert_documents(documents[begin : begin + self._limits.max_events_per_write])


def _messages(waiting: PendingAppend) -> Iterator[list[Document]]:
    """Cut documents into commands that the server takes. Only a very large append needs more than one."""
    if waiting.size <= _MESSAGE_BYTES // _BSON_FACTOR:
        yield waiting.documents
        return
    part: list[Document] = []
    size = 0
    for document in waiting.documents:
        length = len(encode_bson(document))
        if part and size + length > _MESSAGE_BYTES:
            yield part
            part, size = [], 0
        part.append(document)
        size += length
    yield part


def _refusal(waiting: PendingAppend) -> InvalidEvent | None:
    try:
        for document in waiting.documents:
            encode_bson(document)
    except InvalidEvent as refusal:
        return refusal
    return None


def _resolve_appends(group: Iterable[PendingAppend], error: Exception | None = None) -> None:
    for waiting in group:
        if waiting.done.done():
            continue
        if error is None:
            waiting.done.set_result(None)
        else:
            waiting.done.set_exception(error)
