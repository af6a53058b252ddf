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
from jobledger.ledger.domain.events import JobSubmitted, Meta, Recorded
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.change_stream import Changes
from jobledger.ledger.store.command_handler import Handled, Known, handle, new_job_id
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventLog, Limits, Subscription
from jobledger.ledger.store.hash_chain import GENESIS, chained_text
from tests.support.examples import a_job

DEADLINE_SECONDS = 15.0
META = Meta("user:alice")


@dataclass(frozen=True)
class Ledger:
    """What one process has of a ledger."""

    db: Database
    log: EventLog
    changes: Changes

    async def submit(self, job: JobSubmitted | None = None) -> Handled:
        return await handle(self.log, new_job_id(), SubmitJob(job or a_job()), meta=META, known=Known())


@asynccontextmanager
async def ledger_on(
    connection: Connection,
    limits: Limits | None = None,
    *,
    live: bool = True,
    kind: Callable[[Database, Limits], EventLog] = EventLog,
) -> AsyncIterator[Ledger]:
    """A log with a client of its own and, if `live`, a running change stream."""
    async with connection.client() as client:
        db = client[connection.db_name]
        log, changes = kind(db, limits or Limits()), Changes(db)
        changes.listen(log)
        await log.prepare()
        if live:
            async with changes.running():
                yield Ledger(db, log, changes)
        else:
            yield Ledger(db, log, changes)
        await log.aclose()


async def take(subscription: Subscription, count: int, seconds: float = DEADLINE_SECONDS) -> list[Recorded]:
    """The next `count` events."""
    taken: list[Recorded] = []
    async with asyncio.timeout(seconds):
        while len(taken) < count:
            taken.append(await anext(subscription))
    return taken


async def first(log: EventLog, count: int, *, after: int = 0) -> list[Recorded]:
    """The first `count` events after a position, by a subscription."""
    async with log.subscription(after=after) as events:
        return await take(events, count)


async def until(condition: Callable[[], bool], seconds: float = DEADLINE_SECONDS) -> None:
    """For conditions that nothing tells us of: look again and again, with a deadline."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - for what no event tells
            await asyncio.sleep(0.005)


async def lose_a_ticket(db: Database, count: int = 1) -> int:
    """Take numbers and die: return the first of them."""
    counter = await db.counters.find_one_and_update(
        {"_id": "events"}, {"$inc": {"next": count}}, upsert=True, return_document=True
    )
    assert counter
    return int(counter["next"]) - count + 1


async def whole(log: EventLog) -> list[Recorded]:
    """Read the log to its end, filling whatever holes there are."""
    events: list[Recorded] = []
    while page := await log.read(after=len(events)):
        events += page
    return events


async def stored(db: Database, query: Document | None = None) -> list[Document]:
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
    previous = GENESIS
    for document in documents:
        assert document["prev"] == previous, document["_id"]
        assert document["hash"] == sha256(chained_text(document)).digest(), document["_id"]
        previous = document["hash"]


def positions(events: Iterable[Recorded]) -> list[int]:
    return [event.position for event in events]


async def change_stream_operations(db: Database) -> list[dict[str, Any]]:
    """The server's view of the change streams open on this database: running `getMore`s and idle cursors."""
    namespaces = (f"{db.name}.$cmd", f"{db.name}.$cmd.aggregate")
    seen = await db.client.admin.aggregate([{"$currentOp": {"allUsers": True, "idleCursors": True}}])
    return [operation async for operation in seen if operation.get("cursor") and operation["ns"] in namespaces]
