"""Compare appends with plain inserts of the same documents into a collection with the same index."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from benchmarks.event_factory import make_appends, make_documents
from benchmarks.measurement import Result, compare_latencies, compare_rates, measure_rate, open_empty_database
from benchmarks.processes import Pipe, run_processes
from jobledger.cli.hosting.process_tuning import tune_garbage_collector
from jobledger.ledger.mongo.connection import DURABLE, Connection, Database, Document
from jobledger.ledger.store.envelope import VOID_STREAM, StreamAppend
from jobledger.ledger.store.event_store import EventStore

CONCURRENCY = 1000
PROCESSES = 8
CALLERS_PER_PROCESS = CONCURRENCY // 4
"""Concurrent callers in each of the processes, and documents in each insert_many of theirs."""


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure appends by many callers, of lists, by one caller, and by several processes."""
    async with open_empty_database(connection) as (db, event_store):
        await create_baseline_index(db)
        results = [
            await compare_rates(
                f"append: {CONCURRENCY:,} callers, one event each; driver: insert_many of {CONCURRENCY:,}",
                lambda: measure_rate(events, _insert(db, make_documents(events), size=CONCURRENCY)),
                lambda: measure_rate(events, _append(event_store, make_appends(events), callers=CONCURRENCY, size=1)),
                rounds=rounds,
                min_ratio=0.7,
            ),
            await compare_rates(
                f"append: 3 callers, atomic lists of {CONCURRENCY:,}; driver: 3 concurrent transactions",
                lambda: _measure_transactions(db, events, callers=3),
                lambda: measure_rate(events, _append(event_store, make_appends(events), callers=3, size=CONCURRENCY)),
                rounds=rounds,
                min_ratio=0.5,
            ),
            await _measure_latency(db, event_store, rounds * 40),
        ]
        processes = await compare_rates(
            f"append: {PROCESSES} processes, {CALLERS_PER_PROCESS} callers; "
            f"driver: insert_many of {CALLERS_PER_PROCESS}",
            lambda: _write_in_processes(connection, "baseline", events // PROCESSES),
            lambda: _write_in_processes(connection, "jobledger", events // PROCESSES),
            rounds=max(2, rounds // 2),
            min_ratio=0.6,
        )
        voided = await db.events.count_documents({"stream": VOID_STREAM})
        share = f"{voided} of {await event_store.read_head_position():,} positions were voided"
    return [*results, replace(processes, notes=(share,))]


async def create_baseline_index(db: Database) -> None:
    """Create the index of `events` on the baseline collection."""
    await db.baseline.create_index([("stream", 1), ("version", 1)], unique=True)


async def _insert(db: Database, documents: Sequence[Document], *, size: int) -> None:
    baseline = db.get_collection("baseline", write_concern=DURABLE)
    for begin in range(0, len(documents), size):
        await baseline.insert_many(documents[begin : begin + size], ordered=False)


async def _measure_transactions(db: Database, events: int, *, callers: int) -> float:
    documents = make_documents(events)
    begins = iter(range(0, events, CONCURRENCY))

    async def caller() -> None:
        for begin in begins:
            async with (
                db.client.start_session() as session,
                await session.start_transaction(write_concern=DURABLE),
            ):
                await db.baseline.insert_many(documents[begin : begin + CONCURRENCY], ordered=False, session=session)

    return await measure_rate(events, asyncio.gather(*(caller() for _ in range(callers))))


async def _append(event_store: EventStore, appends: Sequence[StreamAppend], *, callers: int, size: int) -> None:
    """Append in atomic lists of a size, by several concurrent callers."""
    begins = iter(range(0, len(appends), size))

    async def caller() -> None:
        for begin in begins:
            await event_store.append(*appends[begin : begin + size])

    await asyncio.gather(*(caller() for _ in range(callers)))


async def _measure_latency(db: Database, event_store: EventStore, number: int) -> Result:
    baseline = db.get_collection("baseline", write_concern=DURABLE)
    baseline_seconds, jobledger_seconds = [], []
    for document, append in zip(make_documents(number), make_appends(number), strict=True):
        begin = time.perf_counter()
        await baseline.insert_one(document)
        middle = time.perf_counter()
        await event_store.append(append)
        baseline_seconds.append(middle - begin)
        jobledger_seconds.append(time.perf_counter() - middle)
    return compare_latencies(
        "append: one event at a time; driver: insert_one", baseline_seconds, jobledger_seconds, max_ratio=2.5
    )


# Several processes ------------------------------------------------------------------------------------------------


async def _write_in_processes(connection: Connection, writer: str, events: int) -> float:
    """Write `events` events in each of several processes; return their total rate from the first to the last write."""
    async with run_processes(PROCESSES, _write, connection, writer, events) as children:
        for number, child in enumerate(children):
            child.pipe.send(number)
        spans = [await child.receive() for child in children]
    starts, ends = zip(*spans, strict=True)
    return events * PROCESSES / float(max(ends) - min(starts))


def _write(connection: Connection, writer: str, events: int, pipe: Pipe) -> None:
    asyncio.run(_write_events(connection, writer, events, pipe))


async def _write_events(connection: Connection, writer: str, events: int, pipe: Pipe) -> None:
    async with connection.create_client() as client:
        db = client[connection.db_name]
        await client.admin.command("ping")
        event_store = EventStore(db)
        appends, documents = make_appends(events), make_documents(events)
        tune_garbage_collector()
        pipe.send("ready")
        first = time.time_ns() // 1000 + pipe.recv() * 10**14
        for offset, document in enumerate(documents):
            document["_id"] = first + offset
        start = time.time()
        if writer == "jobledger":
            await _append(event_store, appends, callers=CALLERS_PER_PROCESS, size=1)
        else:
            await _insert(db, documents, size=CALLERS_PER_PROCESS)
        pipe.send((start, time.time()))
