"""Open an event store on the database of a test, and wait for events and conditions with a timeout."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from operator import itemgetter
from typing import Any, TypeVar

from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.events import EventMetadata, JobSubmitted, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.command_handler import CommandResult, StreamState, create_job_id, handle_command
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.hash_chain import GENESIS_HASH, build_hash_input
from jobledger.ledger.store.subscription import Subscription
from tests.support.event_examples import make_job_submitted
from tests.support.polling import DEADLINE_SECONDS

EVENT_METADATA = EventMetadata("user:alice")
T = TypeVar("T")


@dataclass(frozen=True)
class Ledger:
    """The event store objects of one process."""

    db: Database
    event_store: EventStore
    changes: ChangeStream

    async def submit_job(self, job: JobSubmitted | None = None) -> CommandResult:
        return await handle_command(
            self.event_store,
            create_job_id(),
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
    """Open an event store with its own client and, by default, a running change stream."""
    async with connection.create_client() as client:
        db = client[connection.db_name]
        log, changes = store_class(db, limits or EventStoreLimits()), ChangeStream(db)
        changes.add_listener(log)
        await log.prepare()
        if with_change_stream:
            async with changes.keep_open():
                yield Ledger(db, log, changes)
        else:
            yield Ledger(db, log, changes)
        await log.aclose()


async def collect_outcomes(outcomes: AsyncIterator[Sequence[tuple[int, T]]]) -> list[T]:
    """Return the outcomes of `append_each` or `handle_commands` in the order of the requests."""
    collected = [item async for part in outcomes for item in part]
    assert sorted(index for index, _ in collected) == list(range(len(collected)))
    return [outcome for _, outcome in sorted(collected, key=itemgetter(0))]


async def take_events(subscription: Subscription, count: int, seconds: float = DEADLINE_SECONDS) -> list[RecordedEvent]:
    """Return the next `count` events."""
    events: list[RecordedEvent] = []
    async with asyncio.timeout(seconds):
        while len(events) < count:
            events.append(await anext(subscription))
    return events


async def read_first_events(event_store: EventStore, count: int, *, after: int = 0) -> list[RecordedEvent]:
    """Return the first `count` events after a position from a subscription."""
    async with event_store.subscribe(after=after) as events:
        return await take_events(events, count)


async def create_position_gap(db: Database, count: int = 1) -> int:
    """Allocate positions without appending events. Return the first position."""
    counter = await db.counters.find_one_and_update(
        {"_id": "events"}, {"$inc": {"next": count}}, upsert=True, return_document=True
    )
    assert counter
    return int(counter["next"]) - count + 1


async def read_all_events(event_store: EventStore) -> list[RecordedEvent]:
    """Read the log to its end and void all gaps."""
    events: list[RecordedEvent] = []
    while page := await event_store.read(after=len(events)):
        events += page
    return events


async def load_event_documents(db: Database, query: Document | None = None) -> list[Document]:
    return await db.events.find(query or {}, sort=[("_id", 1)]).to_list()


def check_log(documents: Iterable[Document]) -> None:
    """Check a whole log: no gaps in positions, no gaps in stream versions, intact hash chains."""
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
        assert document["hash"] == sha256(build_hash_input(document)).digest(), document["_id"]
        previous = document["hash"]


def event_positions(events: Iterable[RecordedEvent]) -> list[int]:
    return [event.position for event in events]


async def change_stream_operations(db: Database) -> list[dict[str, Any]]:
    """Return the open change streams of this database: running `getMore` commands and idle cursors."""
    namespaces = (f"{db.name}.$cmd", f"{db.name}.$cmd.aggregate")
    operations = await db.client.admin.aggregate([{"$currentOp": {"allUsers": True, "idleCursors": True}}])
    return [operation async for operation in operations if operation.get("cursor") and operation["ns"] in namespaces]
