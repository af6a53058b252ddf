"""ledger: for other programs: follow the log, with nothing but access to its MongoDB.

    async with ledger_client("mongodb://…").subscription("cms-import", types=["JobCompleted"]) as events:
        async for event in events:
            await publish(event.stream, event.data)

A subscription with a name goes on where it was: its position is kept in the database. An event counts as done when the
next one is asked for, and the position is written at most a second later; so after a crash the events of the last
second come again, and none is left out. Whoever needs exactly once writes `event.position` with what it does.
"""

from __future__ import annotations

import asyncio
import difflib
import re
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self
from uuid import uuid4

import structlog
from pymongo import timeout

from jobledger.ledger.domain.errors import ConfigurationError, JobledgerError, LedgerUnavailable
from jobledger.ledger.domain.events import EVENT_TYPES, Event, RecordedEvent
from jobledger.ledger.mongo.connection import MAJORITY, Connection, Database, check_server, translate_errors
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import MAX_POSITION, EventStore, ReadPosition
from jobledger.ledger.store.subscription import Subscription

_log = structlog.get_logger()
SUBSCRIPTIONS = "subscriptions"
_SAVE_SECONDS = 1.0
_PAUSE_SECONDS = 0.5
_LAST_SAVE_SECONDS = 5.0
_DB_NAME = re.compile("[A-Za-z0-9_-]{1,63}")


class SubscriptionTakenOver(JobledgerError):
    """Another process has begun to use the subscription of this name; only the newest may go on."""


def ledger_client(uri: str, *, db_name: str = "event_processing", connect_timeout_ms: int = 5000) -> LedgerClient:
    """Return a client for a ledger, for use in one event loop. Nothing is connected before a subscription is opened.

    Raises:
        ConfigurationError: no database can have this name.
    """
    if not _DB_NAME.fullmatch(db_name):
        raise ConfigurationError(f"{db_name!r} is no name of a database: expected 1 to 63 letters, digits, - and _")
    return LedgerClient(Connection(uri, db_name, connect_timeout_ms=connect_timeout_ms))


@dataclass(frozen=True, slots=True)
class _Opened:
    db: Database
    log: EventStore
    following: asyncio.Task[None]


class LedgerClient:
    """Opens subscriptions, any number, which share one connection and one change stream; both end with the last."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._opening = asyncio.Lock()
        self._users = 0
        self._stack = AsyncExitStack()
        self._opened: _Opened | None = None

    @asynccontextmanager
    async def subscribe(
        self,
        name: str | None = None,
        *,
        after: int | None = None,
        types: Collection[type[Event] | str] | None = None,
    ) -> AsyncIterator[SubscriptionEvents]:
        """Subscribe to every event behind a position, in order, none missing: history first, then live, for ever.

        Without `name` it begins after `after` (0, the beginning of the log). With a name it goes on where the
        subscription of that name was, and `after` only counts the first time. Only `types` are delivered.

        Raises:
            ValueError: a type that is none, a position that can be none, an empty name.
            ConfigurationError: the URI is none, or the server cannot carry a ledger, or lets us not follow it.
            LogTruncated: the log ends before the position that the subscription of that name had reached.
            LedgerUnavailable: the database cannot be reached. Once inside, subscriptions outlive interruptions.
        """
        wanted, begin = _types_of(types), _position_of(after)
        _check_name(name)
        async with self._connected() as opened:
            place = SubscriptionCursor(opened.db, name) if name is not None else None
            if place is not None:
                read = await place.acquire(initial_position=begin)
                await opened.log.check_not_truncated(read, f"the subscription {name!r}")
                begin = read.position
            async with opened.log.subscribe(after=begin) as subscription:
                events = SubscriptionEvents(opened.log, subscription, wanted, place, opened.following)
                finished = False
                try:
                    yield events
                    finished = True
                finally:
                    await events.close(finished=finished)

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[_Opened]:
        """Share what is open already; the first opens it, the last closes it."""
        async with self._opening:
            if self._opened is None:
                self._opened = await self._stack.enter_async_context(_open(self._connection))
            opened = self._opened
            self._users += 1
        try:
            yield opened
        finally:
            self._users -= 1
            async with self._opening:
                if not self._users:
                    self._opened = None
                    await self._stack.aclose()


@asynccontextmanager
async def _open(connection: Connection) -> AsyncIterator[_Opened]:
    async with connection.client() as client:
        db = client[connection.db_name]
        await check_server(db, needs_write=False)
        log, changes = EventStore(db), ChangeStream(db)
        changes.add_listener(log)
        async with changes.running() as following:
            yield _Opened(db, log, following)
            await log.aclose()


class SubscriptionCursor:
    """How far a named subscription is, in the database. The newest holder owns it; others find out when they save."""

    def __init__(self, db: Database, name: str) -> None:
        self._places = db.get_collection(SUBSCRIPTIONS, read_concern=MAJORITY)
        self._name = name
        self._holder = uuid4().hex

    async def acquire(self, *, initial_position: int) -> ReadPosition:
        """Make it ours, and return where to go on: at `first` if it is new."""
        with translate_errors(f"opening the subscription {self._name}"):
            place = await self._places.find_one_and_update(
                {"_id": self._name},
                [{"$set": {"holder": self._holder, "position": {"$ifNull": ["$position", initial_position]}}}],
                upsert=True,
                return_document=True,
            )
        return ReadPosition.from_document(place) if place else ReadPosition(initial_position)

    async def save(self, done: ReadPosition) -> None:
        """Write down that everything up to a position is done.

        Raises:
            SubscriptionTaken: it is somebody else's by now.
        """
        moved = {"$gt": [done.position, "$position"]}
        changes = {
            "position": {"$cond": [moved, done.position, "$position"]},
            "hash": {"$cond": [moved, done.hash, "$hash"]},
            "saved_at": "$$NOW",
        }
        with translate_errors(f"saving the position of the subscription {self._name}"):
            saved = await self._places.update_one({"_id": self._name, "holder": self._holder}, [{"$set": changes}])
        if not saved.matched_count:
            raise SubscriptionTakenOver(f"The subscription {self._name!r} was taken over by another process.")


class SubscriptionEvents:
    """The events of a subscription: iterate. Leaving the block counts the last one as done, unless by an error."""

    def __init__(
        self,
        log: EventStore,
        subscription: Subscription,
        types: frozenset[str] | None,
        place: SubscriptionCursor | None,
        following: asyncio.Task[None],
    ) -> None:
        self._log = log
        self._subscription = subscription
        self._types = types
        self._place = place
        self._following = following
        self._reading: asyncio.Task[list[RecordedEvent]] | None = None
        self._waiting: deque[RecordedEvent] = deque()
        self._received = self._done = self._saved = subscription.position
        self._saving = asyncio.Lock()
        self._saver: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def position(self) -> int:
        """Everything up to here is done, or was not wanted."""
        return self._done

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RecordedEvent:
        """Return the next event; the one before is done. Whoever gives up waiting may come back and misses nothing.

        Raises:
            SubscriptionTaken: another process goes on with the subscription of this name.
        """
        if self._closed:
            raise RuntimeError("the block of this subscription has been left")
        self._count_as_done()
        while not self._waiting:
            await self._receive()
            self._count_as_done()
        return self._waiting.popleft()

    async def save(self) -> None:
        """Write the position down now, instead of within a second.

        Raises:
            SubscriptionTaken: another process goes on with the subscription of this name.
            LedgerUnavailable: the database does not answer; a later save may succeed.
        """
        async with self._saving:
            if self._place is not None and self._done > self._saved:
                done = self._done
                await self._place.save(ReadPosition(done, await self._log.hash_at(done)))
                self._saved = done

    def _count_as_done(self) -> None:
        """Whoever comes back for more is done with what was handed out."""
        self._done = self._waiting[0].position - 1 if self._waiting else self._received
        if self._place is not None and self._done > self._saved and self._saver is None:
            self._saver = asyncio.create_task(self._save_soon(), name="save-subscription")

    async def _save_soon(self) -> None:
        """Write down what is done in the meantime, once a second, until all of it is."""
        while self._done > self._saved:
            await asyncio.sleep(_SAVE_SECONDS)
            try:
                await self.save()
            except LedgerUnavailable as error:
                _log.warning("subscription position not saved, retrying", error=str(error))
        self._saver = None

    async def _receive(self) -> None:
        """Wait for events, or for what ends the subscription. The reading goes on when the caller gives up."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._subscription.next_chunk(), name="read-subscription")
        watched = {self._reading, self._following} | ({self._saver} if self._saver is not None else set())
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        for task in (self._following, self._saver):
            if task is not None and task.done():
                task.result()
        if self._reading.done():
            reading, self._reading = self._reading, None
            try:
                chunk = reading.result()
            except LedgerUnavailable as error:
                _log.warning("subscription read interrupted, retrying", error=str(error))
                await asyncio.sleep(_PAUSE_SECONDS)
                return
            self._received = chunk[-1].position
            self._waiting.extend(it for it in chunk if self._types is None or it.type in self._types)

    async def close(self, *, finished: bool) -> None:
        """Write down how far it came; `finished` tells whether the last event handed out is done."""
        self._closed = True
        if finished:
            self._count_as_done()
        for task in (self._reading, self._saver):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        try:
            with timeout(_LAST_SAVE_SECONDS):
                await self.save()
        except (LedgerUnavailable, SubscriptionTakenOver) as error:
            _log.warning("subscription position not saved", error=str(error))


def _types_of(wanted: Collection[type[Event] | str] | None) -> frozenset[str] | None:
    if wanted is None:
        return None
    if isinstance(wanted, str) or not wanted:
        raise ValueError(f"types is a list of the types that are wanted, or None for all, not {wanted!r}")
    return frozenset(_type_of(it) for it in wanted)


def _type_of(wanted: type[Event] | str) -> str:
    name = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", repr(wanted))
    if name not in EVENT_TYPES:
        near = difflib.get_close_matches(name, EVENT_TYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(EVENT_TYPES))}"
        raise ValueError(f"there is no event type {name!r}{hint}")
    return name


def _check_name(name: Any) -> None:
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"the name of a subscription is a text that is not empty, not {name!r}")


def _position_of(after: Any) -> int:
    if after is None:
        return 0
    if not isinstance(after, int) or isinstance(after, bool) or not 0 <= after <= MAX_POSITION:
        raise ValueError(f"after is a position, from 0 for the beginning of the log, not {after!r}")
    return after
