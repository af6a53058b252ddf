"""Client library for other programs: subscribe to the log. It needs only access to its MongoDB.

    async with ledger_client("mongodb://…").subscribe("cms-import", types=["JobCompleted"]) as events:
        async for event in events:
            await publish(event.stream, event.data)

A named subscription continues where it stopped: the database stores its position. An event counts as processed when the
next one is requested, and the position is saved at most a second later. So after a crash the events of the last second
are delivered again, and none is skipped. For exactly-once processing, store `event.position` together with your
results.
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
from jobledger.ledger.store.event_store import EventStore, ReadPosition, check_position
from jobledger.ledger.store.subscription import Subscription

_log = structlog.get_logger()
SUBSCRIPTIONS = "subscriptions"
_SAVE_SECONDS = 1.0
_PAUSE_SECONDS = 0.5
_LAST_SAVE_SECONDS = 5.0
_DB_NAME = re.compile("[A-Za-z0-9_-]{1,63}")


class SubscriptionTakenOver(JobledgerError):
    """Another process has started to use this named subscription. Only the newest process may continue."""


def ledger_client(uri: str, *, db_name: str = "event_processing", connect_timeout_ms: int = 5000) -> LedgerClient:
    """Return a client for use in one event loop. It connects when the first subscription is opened.

    Raises:
        ConfigurationError: The database name is not valid.
    """
    if not _DB_NAME.fullmatch(db_name):
        raise ConfigurationError(f"{db_name!r} is not a database name: expected 1 to 63 letters, digits, - and _")
    return LedgerClient(Connection(uri, db_name, connect_timeout_ms=connect_timeout_ms))


@dataclass(frozen=True, slots=True)
class _Opened:
    db: Database
    event_store: EventStore
    change_stream_task: asyncio.Task[None]


class LedgerClient:
    """Opens subscriptions that share one connection and one change stream. Both close with the last subscription."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._opening = asyncio.Lock()
        self._users = 0
        self._stack = AsyncExitStack()
        self._opened: _Opened | None = None

    @asynccontextmanager
    async def subscribe(
        self, name: str | None = None, *, after: int | None = None, types: Collection[type[Event] | str] | None = None
    ) -> AsyncIterator[SubscriptionEvents]:
        """Subscribe to every event after a position, in order and without gaps: history first, then live.

        Args:
            name: The name under which the database stores the position. Without a name the position is not stored.
            after: Start after this position; 0 is the beginning of the log. With a name, this counts only the first
                time.
            types: Deliver only events of these types. Default: all.

        Raises:
            ValueError: A type, the position or the name is not valid.
            ConfigurationError: The URI is not valid, the server is unsuitable, or this user may not read changes.
            LogTruncated: The log ends before the position of the named subscription.
            LedgerUnavailable: The database is unreachable. Open subscriptions survive interruptions.
        """
        wanted, begin = _get_type_names(types), check_position(after or 0)
        _check_name(name)
        async with self._connect() as opened:
            cursor = SubscriptionCursor(opened.db, name) if name is not None else None
            if cursor is not None:
                read = await cursor.acquire(initial_position=begin)
                await opened.event_store.check_not_truncated(read, f"the subscription {name!r}")
                begin = read.position
            async with opened.event_store.subscribe(after=begin) as subscription:
                events = SubscriptionEvents(opened.event_store, subscription, wanted, cursor, opened.change_stream_task)
                is_last_processed = False
                try:
                    yield events
                    is_last_processed = True
                finally:
                    await events.close(is_last_processed=is_last_processed)

    @asynccontextmanager
    async def _connect(self) -> AsyncIterator[_Opened]:
        """Share the connection. The first subscription opens it, the last one closes it."""
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
    async with connection.create_client() as client:
        db = client[connection.db_name]
        await check_server(db, needs_write=False)
        event_store, change_stream = EventStore(db), ChangeStream(db)
        change_stream.add_listener(event_store)
        async with change_stream.keep_open() as change_stream_task:
            yield _Opened(db, event_store, change_stream_task)
            await event_store.aclose()


class SubscriptionCursor:
    """The cursor of a named subscription in the database. The newest holder owns it; others fail when they save."""

    def __init__(self, db: Database, name: str) -> None:
        self._cursors = db.get_collection(SUBSCRIPTIONS, read_concern=MAJORITY)
        self._name = name
        self._holder = uuid4().hex

    async def acquire(self, *, initial_position: int) -> ReadPosition:
        """Take over the subscription and return its position: `initial_position` if it is new."""
        with translate_errors(f"opening the subscription {self._name}"):
            stored = await self._cursors.find_one_and_update(
                {"_id": self._name},
                [{"$set": {"holder": self._holder, "position": {"$ifNull": ["$position", initial_position]}}}],
                upsert=True,
                return_document=True,
            )
        return ReadPosition.from_document(stored) if stored else ReadPosition(initial_position)

    async def save(self, done: ReadPosition) -> None:
        """Save the position up to which all events are processed.

        Raises:
            SubscriptionTakenOver: Another process has taken over the subscription.
        """
        moved = {"$gt": [done.position, "$position"]}
        changes = {
            "position": {"$cond": [moved, done.position, "$position"]},
            "hash": {"$cond": [moved, done.hash, "$hash"]},
            "saved_at": "$$NOW",
        }
        with translate_errors(f"saving the cursor of the subscription {self._name}"):
            saved = await self._cursors.update_one({"_id": self._name, "holder": self._holder}, [{"$set": changes}])
        if not saved.matched_count:
            raise SubscriptionTakenOver(f"The subscription {self._name!r} was taken over by another process.")


class SubscriptionEvents:
    """The events of a subscription, for iteration. Leaving the block without an error marks the last event as
    processed.
    """

    def __init__(
        self,
        event_store: EventStore,
        subscription: Subscription,
        types: frozenset[str] | None,
        cursor: SubscriptionCursor | None,
        change_stream_task: asyncio.Task[None],
    ) -> None:
        self._event_store = event_store
        self._subscription = subscription
        self._types = types
        self._cursor = cursor
        self._change_stream_task = change_stream_task
        self._reading: asyncio.Task[list[RecordedEvent]] | None = None
        self._pending: deque[RecordedEvent] = deque()
        self._received = self._processed = self._saved = subscription.position
        self._saving = asyncio.Lock()
        self._saver: asyncio.Task[None] | None = None
        self._is_closed = False

    @property
    def position(self) -> int:
        """All events up to this position are processed, or of other types."""
        return self._processed

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> RecordedEvent:
        """Return the next event and mark the previous one as processed. A cancelled call misses no event.

        Raises:
            SubscriptionTakenOver: Another process has taken over the subscription.
        """
        if self._is_closed:
            raise RuntimeError("this subscription is closed")
        self._mark_processed()
        while not self._pending:
            await self._receive()
            self._mark_processed()
        return self._pending.popleft()

    async def save(self) -> None:
        """Save the position now instead of within a second.

        Raises:
            SubscriptionTakenOver: Another process has taken over the subscription.
            LedgerUnavailable: The database does not respond. A later save may succeed.
        """
        async with self._saving:
            if self._cursor is not None and self._processed > self._saved:
                done = self._processed
                await self._cursor.save(ReadPosition(done, await self._event_store.read_hash_at(done)))
                self._saved = done

    def _mark_processed(self) -> None:
        """Mark the events that were returned as processed, because the caller requests the next one."""
        self._processed = self._pending[0].position - 1 if self._pending else self._received
        if self._cursor is not None and self._processed > self._saved and self._saver is None:
            self._saver = asyncio.create_task(self._save_soon(), name="save-subscription")

    async def _save_soon(self) -> None:
        """Save the position once a second until it is current."""
        while self._processed > self._saved:
            await asyncio.sleep(_SAVE_SECONDS)
            try:
                await self.save()
            except LedgerUnavailable as error:
                _log.warning("subscription cursor not saved, retrying", error=str(error))
        self._saver = None

    async def _receive(self) -> None:
        """Wait for events, or for the end of the subscription. Reading continues if the caller is cancelled."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._subscription.read_chunk(), name="read-subscription")
        watched = {self._reading, self._change_stream_task} | ({self._saver} if self._saver is not None else set())
        await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
        for task in (self._change_stream_task, self._saver):
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
            self._pending.extend(it for it in chunk if self._types is None or it.type in self._types)

    async def close(self, *, is_last_processed: bool) -> None:
        """Save the position. `is_last_processed`: the last event that was returned is processed."""
        self._is_closed = True
        if is_last_processed:
            self._mark_processed()
        for task in (self._reading, self._saver):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
        try:
            with timeout(_LAST_SAVE_SECONDS):
                await self.save()
        except (LedgerUnavailable, SubscriptionTakenOver) as error:
            _log.warning("subscription cursor not saved", error=str(error))


def _get_type_names(wanted: Collection[type[Event] | str] | None) -> frozenset[str] | None:
    if wanted is None:
        return None
    if isinstance(wanted, str) or not wanted:
        raise ValueError(f"types must be a list of event types, or None for all, got {wanted!r}")
    return frozenset(_get_type_name(it) for it in wanted)


def _get_type_name(wanted: type[Event] | str) -> str:
    name = wanted if isinstance(wanted, str) else getattr(wanted, "__name__", repr(wanted))
    if name not in EVENT_TYPES:
        near = difflib.get_close_matches(name, EVENT_TYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(EVENT_TYPES))}"
        raise ValueError(f"there is no event type {name!r}{hint}")
    return name


def _check_name(name: Any) -> None:
    if name is not None and not (isinstance(name, str) and name):
        raise ValueError(f"the name of a subscription must be a non-empty string, got {name!r}")
