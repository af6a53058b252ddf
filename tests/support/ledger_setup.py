"""tests: a ledger on a database of its own, as one process would have it, and waiting with a deadline."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.events import EventMetadata, JobSubmitted, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.command_handler import CommandResult, StreamState, handle_command, new_job_id
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.hash_chain import GENESIS_HASH, hash_input
from jobledger.ledger.store.subscription import Subscription
from tests.support.event_examples import make_job_submitted

DEADLINE_SECONDS = 15.0
EVENT_METADATA = EventMetadata("user:alice")


@dataclass(frozen=True)
class Ledger:
    """What one process has of a ledger."""

    db: Database
    event_store: EventStore
    changes: ChangeStream

    async def submit_job(self, job: JobSubmitted | None = None) -> CommandResult:
        return await handle_command(
            self.event_store,
            new_job_id(),
            SubmitJob(job or make_job_submitted()),
            meta=EVENT_METADATA,
            stream_state=StreamState(),
        )


@asynccontextmanager
async def open_ledger(
    connection: Connection,
    limits: EventStoreLimits | None = None,
    *,
    with_change_stream: bool = True,
    store_class: Callable[[Database, EventStoreLimits], EventStore] = EventStore,
) -> AsyncIterator[Ledger]:
    """A log with a client of its own and, if `live`, a running change stream."""
    async with connection.client() as client:
        db = client[connection.db_name]
        log, changes = store_class(db, limits or EventStoreLimits()), ChangeStream(db)
        changes.add_listener(log)
        await log.prepare()
        if with_change_stream:
            async with changes.running():
                yield Ledger(db, log, changes)
        else:
            yield Ledger(db, log, changes)
        await log.aclose()


async def take_events(subscription: Subscription, count: int, seconds: float = DEADLINE_SECONDS) -> list[RecordedEvent]:
    """The next `count` events."""
    taken: list[RecordedEvent] = []
    async with asyncio.timeout(seconds):
        while len(taken) < count:
            taken.append(await anext(subscription))
    return taken


async def read_first_events(log: EventStore, count: int, *, after: int = 0) -> list[RecordedEvent]:
    """The first `count` events after a position, by a subscription."""
    async with log.subscribe(after=after) as events:
        return await take_events(events, count)


async def poll_until(condition: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """For conditions that nothing tells us of: look again and again, with a deadline."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - for what no event tells
            await asyncio.sleep(0.005)


async def create_position_gap(db: Database, count: int = 1) -> int:
    """Take numbers and die: return the first of them."""
    counter = await db.counters.find_one_and_update(
        {"_id": "events"}, {"$inc": {"next": count}}, upsert=True, return_document=True
    )
    assert counter
    return int(counter["next"]) - count + 1


async def read_all_events(log: EventStore) -> list[RecordedEvent]:
    """Read the log to its end, filling whatever holes there are."""
    events: list[RecordedEvent] = []
    while page := await log.read(after=len(events)):
        events += page
    return events


async def load_event_documents(db: Database, query: Document | None = None) -> list[Document]:
    return await db.events.find(query or {}, sort=[("_id", 1)]).to_list()


def check_log(documents: Iterable[Document]) -> None:
    """The promises about a whole log: dense positions, dense versions in the order of positions, intact chains."""
    documents = list(documents)
    assert [document["_id"] for document in documents] == list(range(1, len(documents) + 1))
    streams: defaultdict[str, list[Document]] = defaultdict(list)
    for document in documents:
        streams[document["stream"]].append(document)
    for void in streams.pop(VOID_STREAM, []):
        assert void["version"] == void["_id"]
        check_chain([void])
    for events in streams.values():
        assert [event["version"] for event in events] == list(range(1, len(events) + 1))
        check_chain(events)


def check_chain(documents: Iterable[Document]) -> None:
    previous = GENESIS_HASH
    for document in documents:
        assert document["prev"] == previous, document["_id"]
        assert document["hash"] == sha256(hash_input(document)).digest(), document["_id"]
        previous = document["hash"]


def event_positions(events: Iterable[RecordedEvent]) -> list[int]:
    return [event.position for event in events]


async def change_stream_operations(db: Database) -> list[dict[str, Any]]:
    """The server's view of the change streams open on this database: running `getMore`s and idle cursors."""
    namespaces = (f"{db.name}.$cmd", f"{db.name}.$cmd.aggregate")
    seen = await db.client.admin.aggregate([{"$currentOp": {"allUsers": True, "idleCursors": True}}])
    return [operation async for operation in seen if operation.get("cursor") and operation["ns"] in namespaces]
