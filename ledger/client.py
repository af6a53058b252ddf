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
from collections import deque
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from typing import Self
from uuid import uuid4

import structlog

from ledger.changes import Changes
from ledger.errors import JobledgerError, LedgerUnavailable
from ledger.events import EVENT_TYPES, Event, Recorded
from ledger.log import EventLog, Subscription
from ledger.mongo import MAJORITY, Connection, Database, check_server, driver_errors

_log = structlog.get_logger()
SUBSCRIPTIONS = "subscriptions"
_SAVE_SECONDS = 1.0
_PAUSE_SECONDS = 0.5


class SubscriptionTaken(JobledgerError):
    """Another process has begun to use the subscription of this name; only the newest may go on."""


def ledger_client(uri: str, *, db_name: str = "event_processing", connect_timeout_ms: int = 5000) -> LedgerClient:
    """Return a client for a ledger. Nothing is connected before a subscription is opened."""
    return LedgerClient(Connection(uri, db_name, connect_timeout_ms=connect_timeout_ms))


class LedgerClient:
    """Opens subscriptions. Each has a connection and a change stream of its own, which end with its block."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @asynccontextmanager
    async def subscription(
        self,
        name: str | None = None,
        *,
        after: int | None = None,
        types: Collection[type[Event] | str] | None = None,
    ) -> AsyncIterator[Events]:
        """Subscribe to every event behind a position, in order, none missing: history first, then live, for ever.

        Without `name` it begins after `after` (0, the beginning of the log). With a name it goes on where the
        subscription of that name was, and `after` only counts the first time. Only `types` are delivered.

        Raises:
            ValueError: a type that is none.
            ConfigurationError: the URI is none, or the server cannot carry a ledger.
            LedgerUnavailable: the database cannot be reached. Once inside, subscriptions outlive interruptions.
        """
        wanted = None if types is None else frozenset(_type_of(it) for it in types)
        async with self._connection.client() as client:
            db = client[self._connection.db_name]
            await check_server(db, writing=False)
            log, changes = EventLog(db), Changes(db)
            changes.listen(log)
            place = Place(db, name) if name is not None else None
            begin = after or 0 if place is None else await place.take(first=after or 0)
            async with changes.running() as following, log.subscription(after=begin) as subscription:
                events = Events(subscription, wanted, place, following)
                finished = False
                try:
                    yield events
                    finished = True
                finally:
                    await events.close(finished=finished)
                    await log.aclose()


class Place:
    """How far a named subscription is, in the database. The newest holder owns it; others find out when they save."""

    def __init__(self, db: Database, name: str) -> None:
        self._places = db.get_collection(SUBSCRIPTIONS, read_concern=MAJORITY)
        self._name = name
        self._holder = uuid4().hex

    async def take(self, *, first: int) -> int:
        """Make it ours, and return where to go on: at `first` if it is new."""
        with driver_errors(f"opening the subscription {self._name}"):
            place = await self._places.find_one_and_update(
                {"_id": self._name},
                [{"$set": {"holder": self._holder, "position": {"$ifNull": ["$position", first]}}}],
                upsert=True,
                return_document=True,
            )
        return int(place["position"]) if place else first

    async def save(self, position: int) -> None:
        """Write down that everything up to a position is done.

        Raises:
            SubscriptionTaken: it is somebody else's by now.
        """
        with driver_errors(f"saving the position of the subscription {self._name}"):
            saved = await self._places.update_one(
                {"_id": self._name, "holder": self._holder},
                [{"$set": {"position": position, "saved_at": "$$NOW"}}],
            )
        if not saved.matched_count:
            raise SubscriptionTaken(f"The subscription {self._name!r} was taken over by another process.")


class Events:
    """The events of a subscription: iterate. Leaving the block counts the last one as done, unless by an error."""

    def __init__(
        self,
        subscription: Subscription,
        types: frozenset[str] | None,
        place: Place | None,
        following: asyncio.Task[None],
    ) -> None:
        self._subscription = subscription
        self._types = types
        self._place = place
        self._following = following
        self._waiting: deque[Recorded] = deque()
        self._done = self._saved = subscription.position
        self._saver: asyncio.Task[None] | None = None

    @property
    def position(self) -> int:
        """Everything up to here is done, or was not wanted."""
        return self._done

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Recorded:
        """Return the next event; the one before is done.

        Raises:
            SubscriptionTaken: another process goes on with the subscription of this name.
        """
        self._count_as_done()
        while not self._waiting:
            chunk = await self._chunk()
            self._waiting.extend(it for it in chunk if self._types is None or it.type in self._types)
            if not self._waiting:
                self._count_as_done()
        if self._saver is not None and self._saver.done():
            self._saver.result()  # raises if the place is somebody else's
        return self._waiting.popleft()

    async def save(self) -> None:
        """Write the position down now, instead of within a second.

        Raises:
            SubscriptionTaken: another process goes on with the subscription of this name.
            LedgerUnavailable: the database does not answer; a later save may succeed.
        """
        if self._place is not None and self._done > self._saved:
            done = self._done
            await self._place.save(done)
            self._saved = done

    def _count_as_done(self) -> None:
        """Whoever comes back for more is done with what was handed out."""
        self._done = self._waiting[0].position - 1 if self._waiting else self._subscription.position
        if self._place is not None and self._done > self._saved and self._saver is None:
            self._saver = asyncio.create_task(self._save_soon(), name="save-subscription")

    async def _save_soon(self) -> None:
        """Write down what is done in the meantime, once a second, until all of it is."""
        while self._done > self._saved:
            await asyncio.sleep(_SAVE_SECONDS)
            try:
                await self.save()
            except LedgerUnavailable as error:
                _log.warning("could not save the position of a subscription yet", error=str(error))
        self._saver = None

    async def _chunk(self) -> list[Recorded]:
        """Wait for events, however often the database is away meanwhile."""
        while True:
            reading = asyncio.create_task(self._subscription.chunk())
            try:
                await asyncio.wait({reading, self._following}, return_when=asyncio.FIRST_COMPLETED)
                if self._following.done():
                    self._following.result()
                return await reading
            except LedgerUnavailable as error:
                _log.warning("reading the log is interrupted", error=str(error))
                await asyncio.sleep(_PAUSE_SECONDS)
            finally:
                reading.cancel()

    async def close(self, *, finished: bool) -> None:
        """Write down how far it came; `finished` tells whether the last event handed out is done."""
        if finished:
            self._count_as_done()
        if self._saver is not None and not self._saver.cancel() and not self._saver.cancelled():
            self._saver.exception()  # if there is one, the saving below meets it again
        try:
            await self.save()
        except (LedgerUnavailable, SubscriptionTaken) as error:
            _log.warning("the position of a subscription is not saved", error=str(error))


def _type_of(wanted: type[Event] | str) -> str:
    name = wanted if isinstance(wanted, str) else wanted.__name__
    if name not in EVENT_TYPES:
        near = difflib.get_close_matches(name, EVENT_TYPES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(EVENT_TYPES))}"
        raise ValueError(f"there is no event type {name!r}{hint}")
    return name
