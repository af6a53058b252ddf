"""ledger: the log. Append, read, subscribe: the only door to the `events` collection.

Positions. A writer takes numbers from a ticket counter and then inserts its events under them. A writer that dies in
between leaves a hole; a reader that sees a later event, but not this one, fills the hole with `PositionVoided`. Either
that insert or the late writer's wins, `_id` being unique, so every reader sees the same, dense order. A writer whose
number was voided takes another. The protocol and its proof: docs/explanation.md.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import structlog
from bson.errors import BSONError
from pymongo import ASCENDING, DESCENDING, InsertOne
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import BulkWriteError, PyMongoError

from ledger.envelope import Append, documents_of, encoded, parse, recorded, void_document
from ledger.errors import InvalidEvent, LedgerBusy, LedgerUnavailable, VersionConflict
from ledger.events import Event, Recorded
from ledger.mongo import DURABLE, MAJORITY, Database, Document, brief, driver_errors
from ledger.tail import Tail

_log = structlog.get_logger()

_DUPLICATE_KEY = 11000


@dataclass(frozen=True, slots=True)
class Limits:
    """The log's patience and appetite. A group is what goes to the database in one write."""

    void_after_seconds: float = 1.0
    append_deadline_seconds: float = 30.0
    group_events: int = 1000
    waiting_events: int = 50_000
    tail_events: int = 10_000
    page_events: int = 1000


@dataclass(slots=True)
class _Waiting:
    """Documents that belong together, waiting to be written, and who waits for them."""

    documents: list[Document]
    basis: int
    """The largest position that the decision was based on: the new positions must be larger."""
    done: asyncio.Future[None]


class EventLog:
    """The log of one database, as one process sees it. A listener of the process's change stream (`Changes`)."""

    collection = "events"

    def __init__(self, db: Database, limits: Limits = Limits()) -> None:
        self._db = db
        self._events = db.get_collection("events", write_concern=DURABLE, read_concern=MAJORITY)
        self._limits = limits
        self._queue: deque[_Waiting] = deque()
        self._queued_events = 0
        self._writer: asyncio.Task[None] | None = None
        self._tail = Tail(limits.tail_events)
        self._hole_timer: asyncio.TimerHandle | None = None
        self._hole_tasks: set[asyncio.Task[None]] = set()

    async def prepare(self) -> None:
        """Create the index that makes versions unique. Harmless when it exists."""
        with driver_errors("preparing the log"):
            await self._events.create_index([("stream", ASCENDING), ("version", ASCENDING)], unique=True)

    async def aclose(self) -> None:
        """Stop what runs in the background; appends still waiting are finished first."""
        if self._writer is not None:
            await self._writer
        for task in tuple(self._hole_tasks):  # whoever ends leaves the set
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
        if self._hole_timer is not None:  # last, for the tasks set it
            self._hole_timer.cancel()

    # Append -------------------------------------------------------------------------------------------------------

    async def append(self, *appends: Append) -> list[Recorded]:
        """Write events to the ends of their streams, all or none, and return them in the order given.

        What it returns is journaled by a majority: it is there for good.

        Raises:
            VersionConflict: a stream is not at the version it was thought to be; nothing was written.
            InvalidEvent: an event cannot be stored.
            LedgerBusy: too much is waiting already.
            LedgerUnavailable: the database did not answer in time; whether anything was written is not known.
        """
        if len(appends) > 1:
            _refuse_overlap(appends)
        documents = [document for append in appends for document in documents_of(append)]
        if not documents:
            return []
        if self._queued_events >= self._limits.waiting_events:
            raise LedgerBusy(f"{self._queued_events} events are waiting to be written; try again in a moment")
        waiting = _Waiting(
            documents, max(append.head.position for append in appends), asyncio.get_running_loop().create_future()
        )
        self._queue.append(waiting)
        self._queued_events += len(documents)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write_queue(), name="log-writer")
        await waiting.done  # a caller that is cancelled takes along only this, not the group in which its events travel
        models = [event for append in appends for event in append.events]
        metas = [append.meta for append in appends for _ in append.events]
        return [recorded(document, event, meta) for document, event, meta in zip(documents, models, metas, strict=True)]

    async def _write_queue(self) -> None:
        """Write until nothing waits. While one group is on its way the next gathers: that is the group commit."""
        while self._queue:
            group = [self._queue.popleft()]
            if len(group[0].documents) == 1:
                while self._queue and len(self._queue[0].documents) == 1 and len(group) < self._limits.group_events:
                    group.append(self._queue.popleft())
            self._queued_events -= sum(len(waiting.documents) for waiting in group)
            try:
                await self._write_group(group)
            except LedgerUnavailable as error:
                _settle(group, error)
            except BaseException:
                # Those behind it, too: nobody would write them before the next append comes, perhaps never.
                _settle(
                    [*group, *self._queue], LedgerUnavailable("The writer of the log was stopped before it was done.")
                )
                self._queue.clear()
                self._queued_events = 0
                raise

    async def _write_group(self, group: Sequence[_Waiting]) -> None:
        """Write single events in one unordered insert, or one caller's several events in one transaction.

        Whatever the database answers, the same documents may be inserted again: those that are there already are
        recognised as ours. So every failure but a lost race is answered by trying again until the deadline.
        """
        deadline = time.monotonic() + self._limits.append_deadline_seconds
        todo = list(group)
        numbered = False
        while todo:
            try:
                if not numbered:
                    await self._number(todo)
                    numbered = True
                refused = await self._insert(todo)
                todo = await self._sort_out(refused)
                numbered = False
            except PyMongoError as error:
                if time.monotonic() > deadline:
                    raise LedgerUnavailable(f"The database did not take the events in time: {brief(error)}") from error
                _log.warning("append delayed by the database", error=brief(error))
                await asyncio.sleep(0.1)

    async def _insert(self, todo: Sequence[_Waiting]) -> list[_Waiting]:
        """Insert, settle what succeeded, and return what was refused for a duplicate key."""
        try:
            if len(todo[0].documents) > 1:
                await self._insert_together(todo[0].documents)
            else:
                await self._events.insert_many([waiting.documents[0] for waiting in todo], ordered=False)
            refused = set()
        except BulkWriteError as error:
            failures = error.details["writeErrors"]
            if error.details.get("writeConcernErrors") or any(it["code"] != _DUPLICATE_KEY for it in failures):
                raise  # not known to be durable, or the server is stepping down
            # In a transaction all is undone, whichever document it was.
            refused = {0} if len(todo[0].documents) > 1 else {it["index"] for it in failures}
        except (BSONError, ValueError, OverflowError):  # the driver cannot write one of them in BSON
            return await self._insert_storable(todo)
        _settle(waiting for index, waiting in enumerate(todo) if index not in refused)
        return [waiting for index, waiting in enumerate(todo) if index in refused]

    async def _insert_storable(self, todo: Sequence[_Waiting]) -> list[_Waiting]:
        """Refuse what can be written in JSON, but not in BSON (a UUID), and insert the rest."""
        storable = [waiting for waiting in todo if _refusal(waiting) is None]
        if len(storable) == len(todo):
            raise LedgerUnavailable("The driver refuses events that can be stored.")
        for waiting in todo:
            if (refusal := _refusal(waiting)) is not None:
                await self._void([document["_id"] for document in waiting.documents])
                _settle([waiting], refusal)
        return await self._insert(storable) if storable else []

    async def _insert_together(self, documents: Sequence[Document]) -> None:
        async with (
            self._db.client.start_session() as session,
            await session.start_transaction(write_concern=DURABLE),
        ):
            await self._db.events.insert_many(documents, session=session)

    async def _number(self, todo: Sequence[_Waiting]) -> None:
        """Give the documents the next positions.

        A number must be larger than every position the decision was based on. Only a fail-over can make the counter
        fall behind (the increment need not have reached a majority); then it is raised to the head of the log.
        """
        documents = [document for waiting in todo for document in waiting.documents]
        basis = max(waiting.basis for waiting in todo)
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
        newest = await self._events.find_one({}, {"_id": 1}, sort=[("_id", DESCENDING)])
        counters = self._db.get_collection("counters", write_concern=DURABLE)
        head = newest["_id"] if newest else 0
        await counters.update_one({"_id": "events"}, {"$max": {"next": head}}, upsert=True)

    async def _sort_out(self, refused: Sequence[_Waiting]) -> list[_Waiting]:
        """After a duplicate key: settle what had succeeded or lost its race; return what needs a new number.

        The (stream, version) of each refused document tells: our event is there, so an earlier try of ours succeeded;
        another is there, so the race is lost; none is there, so it was the number that had been taken.
        """
        again: list[_Waiting] = []
        for waiting in refused:
            numbers = {document["_id"] for document in waiting.documents}
            winner = await self._winner(waiting)
            if winner is not None and winner["event_id"] in {document["event_id"] for document in waiting.documents}:
                await self._adopt(waiting)
                await self._void(numbers - {document["_id"] for document in waiting.documents})
                _settle([waiting])
                continue
            await self._void(numbers)
            if winner is None:
                again.append(waiting)
            else:
                stream = winner["stream"]
                expected = min(it["version"] for it in waiting.documents if it["stream"] == stream) - 1
                _settle([waiting], VersionConflict(stream, expected, await self._version(stream)))
        if again:
            await self._raise_counter()
        return again

    async def _winner(self, waiting: _Waiting) -> Document | None:
        """Return the event that stands where one of ours should, if any: our own or a winner's."""
        for document in waiting.documents:
            there = await self._events.find_one(
                {"stream": document["stream"], "version": document["version"]}, {"stream": 1, "event_id": 1}
            )
            if there is not None:
                return there
        return None

    async def _adopt(self, waiting: _Waiting) -> None:
        """Take over the positions under which an earlier try of ours was written."""
        for document in waiting.documents:
            there = await self._events.find_one(
                {"stream": document["stream"], "version": document["version"]}, {"_id": 1}
            )
            if there is not None:
                document["_id"] = there["_id"]

    async def _version(self, stream: str) -> int:
        newest = await self._events.find_one({"stream": stream}, {"version": 1}, sort=[("version", DESCENDING)])
        return newest["version"] if newest else 0

    async def _void(self, positions: Iterable[int]) -> None:
        """Fill positions that nobody will use. Where somebody did after all, that is just as well."""
        documents = [void_document(position) for position in positions]
        if not documents:
            return
        try:
            await self._events.bulk_write([InsertOne(document) for document in documents], ordered=False)
        except BulkWriteError as error:
            if any(failure["code"] != _DUPLICATE_KEY for failure in error.details["writeErrors"]):
                raise

    # Read ---------------------------------------------------------------------------------------------------------

    async def read_stream(self, stream: str, *, after_version: int = 0) -> list[Recorded]:
        """Return the events of one job, batch or delivery, in order."""
        with driver_errors(f"reading {stream}"):
            query = {"stream": stream, "version": {"$gt": after_version}}
            return [parse(document) async for document in self._events.find(query, sort=[("version", ASCENDING)])]

    async def head(self) -> int:
        """Return the largest position in the log, 0 when it is empty."""
        with driver_errors("reading the head of the log"):
            newest = await self._events.find_one({}, {"_id": 1}, sort=[("_id", DESCENDING)])
            return int(newest["_id"]) if newest else 0

    async def read(self, *, after: int = 0, limit: int | None = None) -> list[Recorded]:
        """Return up to `limit` events after a position, in order and with none missing.

        Empty means that nothing later is there. A hole is waited for, then voided (see the head of this file).
        """
        with driver_errors("reading the log"):
            while True:
                query = {"_id": {"$gt": after}}
                cursor = self._events.find(query, sort=[("_id", ASCENDING)], limit=limit or self._limits.page_events)
                documents = await cursor.to_list()
                dense = [
                    document for position, document in enumerate(documents, after + 1) if document["_id"] == position
                ]
                if dense or not documents:
                    return [parse(document) for document in dense]
                await self._wait_out_hole(range(after + 1, documents[0]["_id"]), documents[0]["time"])

    async def _wait_out_hole(self, missing: range, later: datetime) -> None:
        """Give a slow writer its second, unless the event behind the hole is old; then void what is still missing.

        Voiding early is always safe (the writer takes another number), so a writer's clock may be trusted here.
        """
        if (datetime.now(UTC) - later).total_seconds() < 10 * self._limits.void_after_seconds:
            await asyncio.sleep(self._limits.void_after_seconds)
        present = {document["_id"] async for document in self._find(missing)}
        await self._void(position for position in missing if position not in present)

    def _find(self, positions: range) -> AsyncIterator[Document]:
        return self._events.find({"_id": {"$gte": positions.start, "$lt": positions.stop}}).__aiter__()

    # Subscribe ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def subscription(
        self, *, after: int, types: Collection[type[Event]] | None = None
    ) -> AsyncIterator[Subscription]:
        """Subscribe to every event after a position, history first, then live, for ever. Once entered, none is missed.

        Needs this process's change stream to be running. A slow subscriber costs nothing: it holds a cursor, no queue.
        """
        yield Subscription(self, self._tail, after, frozenset(types) if types is not None else None)

    async def resync(self, session: AsyncClientSession) -> None:
        newest = await self._events.find_one({}, {"_id": 1}, sort=[("_id", DESCENDING)], session=session)
        self._tail.begin_at(newest["_id"] if newest else 0)

    def changed(self, change: Mapping[str, Any]) -> None:
        if change["operationType"] == "insert":
            self._tail.add(change["fullDocument"])
            self._watch_for_holes()

    def _watch_for_holes(self) -> None:
        if self._tail.missing and self._hole_timer is None:
            self._hole_timer = asyncio.get_running_loop().call_later(
                self._limits.void_after_seconds, self._fill_hole, self._tail.missing.start
            )

    def _fill_hole(self, awaited: int) -> None:
        if self._tail.missing.start != awaited:  # that one has come; another hole has a time of its own
            self._hole_timer = None
            self._watch_for_holes()
            return
        task = asyncio.create_task(self._fill(self._tail.missing), name="fill-hole")
        self._hole_tasks.add(task)
        task.add_done_callback(self._hole_tasks.discard)

    async def _fill(self, missing: range) -> None:
        """Look for what the stream did not bring, void the rest. What is voided comes back through the stream."""
        try:
            present = [document async for document in self._find(missing)]
            seen = {document["_id"] for document in present}
            await self._void(position for position in missing if position not in seen)
            for document in present:
                self._tail.add(document)
        except PyMongoError as error:
            _log.warning("could not fill a hole yet", missing=str(missing), error=brief(error))
        finally:
            self._hole_timer = None
            self._watch_for_holes()


class Subscription:
    """A place in the log that moves on: iterate for single events, or take what is there with `chunk`."""

    def __init__(self, log: EventLog, tail: Tail, after: int, types: frozenset[type[Event]] | None) -> None:
        self._log = log
        self._tail = tail
        self._types = types
        self._buffer: deque[Recorded] = deque()
        self.position = after
        """The last position that was taken from the log, whether or not its type was wanted."""

    async def chunk(self, limit: int = 1000) -> list[Recorded]:
        """Wait for events and return those that are there, in order, at most `limit`.

        Raises:
            LedgerUnavailable: the database failed while history was read; calling again continues where it was.
        """
        while True:
            if self._tail.reaches(self.position):
                events = self._tail.after(self.position, limit)
                if not events:
                    await self._tail.growth()
                    continue
            else:
                events = await self._log.read(after=self.position, limit=limit)
                if not events:  # the tail was reset while we read
                    await asyncio.sleep(0)
                    continue
            self.position = events[-1].position
            wanted = events if self._types is None else [event for event in events if type(event.event) in self._types]
            if wanted:
                return wanted

    def __aiter__(self) -> Subscription:
        return self

    async def __anext__(self) -> Recorded:
        if not self._buffer:
            self._buffer.extend(await self.chunk())
        return self._buffer.popleft()


def _refuse_overlap(appends: Iterable[Append]) -> None:
    """Only one append can be at the end of a stream: written, two would be in each other's way for ever."""
    ends: dict[str, int] = {}
    for append in appends:
        if append.stream in ends:
            raise VersionConflict(append.stream, append.head.version, ends[append.stream])
        ends[append.stream] = append.head.version + len(append.events)


def _refusal(waiting: _Waiting) -> InvalidEvent | None:
    try:
        for document in waiting.documents:
            encoded(document)
    except InvalidEvent as refusal:
        return refusal
    return None


def _settle(group: Iterable[_Waiting], error: Exception | None = None) -> None:
    for waiting in group:
        if waiting.done.done():
            continue
        if error is None:
            waiting.done.set_result(None)
        else:
            waiting.done.set_exception(error)
