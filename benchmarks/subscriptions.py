"""Compare subscriptions with a plain cursor and a plain change stream over the same documents."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from pymongo import MongoClient

from benchmarks.append_throughput import create_baseline_index
from benchmarks.event_factory import make_appends, make_documents
from benchmarks.measurement import (
    Result,
    compare_latencies,
    compare_rates,
    measure_rate,
    open_empty_database,
    read_in_order,
)
from benchmarks.processes import Pipe, run_processes
from jobledger.ledger.domain.events import Event, RecordedEvent
from jobledger.ledger.mongo.connection import DURABLE, Connection, Database, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore

_PIPELINE = [{"$match": {"ns.coll": "baseline", "operationType": "insert"}}]


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure live events, reading the history, and the latency between an append and its subscriber."""
    async with open_empty_database(connection) as (db, event_store):
        await create_baseline_index(db)
        live = await compare_rates(
            "subscribe: live events of another process; driver: change stream",
            lambda: _read_change_stream(connection, db, events),
            lambda: _read_subscription(connection, db, event_store, events),
            rounds=rounds,
            min_ratio=0.7,
        )
        await db.baseline.delete_many({})
        await db.baseline.insert_many(await db.events.find().to_list())
        number, head = await db.baseline.count_documents({}), await event_store.read_head_position()
        log_without_tail, changes = EventStore(db, EventStoreLimits(max_tail_events=1)), ChangeStream(db)
        changes.add_listener(log_without_tail)
        async with changes.keep_open():
            history = await compare_rates(
                "subscribe: history from the beginning; driver: sorted cursor",
                lambda: measure_rate(number, read_in_order(db.baseline)),
                lambda: measure_rate(number, _read_history(log_without_tail, head)),
                rounds=rounds,
                min_ratio=0.6,
            )
        latency = await _measure_latency(db, event_store, rounds * 40)
    return [live, history, latency]


# Live -------------------------------------------------------------------------------------------------------------


async def _read_change_stream(connection: Connection, db: Database, events: int) -> float:
    first = time.time_ns() // 1000
    async with await db.watch(_PIPELINE, batch_size=1000) as stream:
        await stream.try_next()
        async with run_processes(1, _write, connection, "baseline", first, events) as [writer]:

            async def read() -> None:
                writer.pipe.send("start")
                for _ in range(events):
                    await stream.next()

            return await measure_rate(events, read())


async def _read_subscription(connection: Connection, db: Database, event_store: EventStore, events: int) -> float:
    head = await event_store.read_head_position()
    changes = ChangeStream(db)
    changes.add_listener(event_store)
    async with (
        run_processes(1, _write, connection, "events", head + 1, events) as [writer],
        changes.keep_open(),
        event_store.subscribe(after=head) as subscription,
    ):

        async def read() -> None:
            writer.pipe.send("start")
            seen = 0
            while seen < events:
                seen += _count_payloads(await subscription.read_chunk())

        rate = await measure_rate(events, read())
    await db.counters.update_one({"_id": "events"}, {"$max": {"next": head + events}}, upsert=True)
    return rate


def _write(connection: Connection, collection: str, first: int, number: int, pipe: Pipe) -> None:
    """Write documents with the plain driver, faster than they can be read."""
    documents = make_documents(number, first=first)
    with MongoClient[Document](connection.uri) as client:
        target = client[connection.db_name].get_collection(collection, write_concern=DURABLE)
        client.admin.command("ping")
        pipe.send("ready")
        pipe.recv()
        for begin in range(0, number, 500):
            target.insert_many(documents[begin : begin + 500], ordered=False)


# History ----------------------------------------------------------------------------------------------------------


async def _read_history(event_store: EventStore, head: int) -> None:
    async with event_store.subscribe(after=0) as subscription:
        while subscription.position < head:
            _count_payloads(await subscription.read_chunk())


def _count_payloads(events: Sequence[RecordedEvent]) -> int:
    """Count the events with a valid payload, which reads and validates each payload."""
    return sum(isinstance(recorded.event, Event) for recorded in events)


# Latency ----------------------------------------------------------------------------------------------------------


async def _measure_latency(db: Database, event_store: EventStore, number: int) -> Result:
    """Measure the time from the call of append until the subscriber has the event.

    The baseline is insert_one with a plain change stream.
    """
    baseline_seconds, jobledger_seconds = [], []
    baseline = db.get_collection("baseline", write_concern=DURABLE)
    changes = ChangeStream(db)
    changes.add_listener(event_store)
    async with (
        await db.watch(_PIPELINE) as stream,
        changes.keep_open(),
        event_store.subscribe(after=await event_store.read_head_position()) as subscription,
    ):
        await stream.try_next()
        for document, append in zip(
            make_documents(number, first=time.time_ns() // 1000), make_appends(number), strict=True
        ):
            begin = time.perf_counter()
            inserting = asyncio.create_task(baseline.insert_one(document))
            while await stream.try_next() is None:
                pass
            baseline_seconds.append(time.perf_counter() - begin)
            await inserting
            begin = time.perf_counter()
            appending = asyncio.create_task(event_store.append(append))
            await subscription.read_chunk()
            jobledger_seconds.append(time.perf_counter() - begin)
            await appending
    return compare_latencies(
        "subscribe: latency from append to subscriber; driver: insert_one, change stream",
        baseline_seconds,
        jobledger_seconds,
        max_ratio=3.0,
    )
