"""Compare appends with plain inserts of the same documents into a collection with the same index."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.synchronize import Barrier

from benchmarks.event_factory import make_appends, make_documents
from benchmarks.measurement import Result, Stopwatch, compare_latencies, compare_rates
from jobledger.cli.process_tuning import tune_garbage_collector
from jobledger.ledger.mongo.connection import DURABLE, Connection, Database
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventStore

CONCURRENCY = 1000
PROCESSES = 8


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure appends by many callers, of lists, by one caller, and by several processes."""
    async with connection.client() as client:
        db = client[connection.db_name]
        event_store = EventStore(db)
        await prepare_collections(db, event_store)
        results = [
            await compare_rates(
                f"append: {CONCURRENCY:,} callers, one event each; driver: insert_many of {CONCURRENCY:,}",
                lambda: _insert_batches(db, events),
                lambda: _append_singly(event_store, events, CONCURRENCY),
                rounds=rounds,
                min_ratio=0.7,
            ),
            await compare_rates(
                f"append: 3 callers, atomic lists of {CONCURRENCY:,}; driver: 3 concurrent transactions",
                lambda: _insert_in_transactions(db, events, concurrency=3),
                lambda: _append_lists(event_store, events, concurrency=3),
                rounds=rounds,
                min_ratio=0.5,
            ),
            await _measure_latency(db, event_store, rounds * 40),
        ]
        processes = await compare_rates(
            f"append: {PROCESSES} processes, {CONCURRENCY // 4} callers; driver: insert_many of {CONCURRENCY // 4}",
            lambda: _write_in_processes(connection, "baseline", events),
            lambda: _write_in_processes(connection, "jobledger", events),
            rounds=max(2, rounds // 2),
            min_ratio=0.6,
        )
        voided = await db.events.count_documents({"stream": VOID_STREAM})
        share = f"{voided} of {await event_store.head_position():,} positions were voided"
        await event_store.aclose()
    return [*results, replace(processes, notes=(share,))]


async def prepare_collections(db: Database, event_store: EventStore) -> None:
    """Create the index of `events` on the baseline collection."""
    await event_store.prepare()
    await db.baseline.create_index([("stream", 1), ("version", 1)], unique=True)


async def _insert_batches(db: Database, events: int) -> float:
    baseline = db.get_collection("baseline", write_concern=DURABLE)
    documents = make_documents(events)
    with Stopwatch() as watch:
        for begin in range(0, events, CONCURRENCY):
            await baseline.insert_many(documents[begin : begin + CONCURRENCY], ordered=False)
    return watch.rate(events)


async def _insert_in_transactions(db: Database, events: int, *, concurrency: int) -> float:
    documents = make_documents(events)
    begins = iter(range(0, events, CONCURRENCY))

    async def caller() -> None:
        for begin in begins:
            async with (
                db.client.start_session() as session,
                await session.start_transaction(write_concern=DURABLE),
            ):
                await db.baseline.insert_many(documents[begin : begin + CONCURRENCY], ordered=False, session=session)

    with Stopwatch() as watch:
        await asyncio.gather(*(caller() for _ in range(concurrency)))
    return watch.rate(events)


async def _append_singly(event_store: EventStore, events: int, callers: int) -> float:
    appends = iter(make_appends(events))

    async def caller() -> None:
        for append in appends:
            await event_store.append(append)

    with Stopwatch() as watch:
        await asyncio.gather(*(caller() for _ in range(callers)))
    return watch.rate(events)


async def _append_lists(event_store: EventStore, events: int, *, concurrency: int) -> float:
    documents = make_appends(events)
    begins = iter(range(0, events, CONCURRENCY))

    async def caller() -> None:
        for begin in begins:
            await event_store.append(*documents[begin : begin + CONCURRENCY])

    with Stopwatch() as watch:
        await asyncio.gather(*(caller() for _ in range(concurrency)))
    return watch.rate(events)


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

_spawn = multiprocessing.get_context("spawn")


async def _write_in_processes(connection: Connection, writer: str, events: int) -> float:
    """Write in several processes at once; return their total rate from the first to the last write."""
    return await asyncio.to_thread(_run_processes, connection, writer, events)


def _run_processes(connection: Connection, writer: str, events: int) -> float:
    begin = _spawn.Barrier(PROCESSES)
    with _spawn.Pool(PROCESSES, initializer=_set_barrier, initargs=(begin,)) as pool:
        spans: Sequence[tuple[float, float]] = pool.map(
            _write, [(connection, writer, events // PROCESSES, number) for number in range(PROCESSES)], chunksize=1
        )
    return events // PROCESSES * PROCESSES / (max(end for _, end in spans) - min(start for start, _ in spans))


_begin: Barrier


def _set_barrier(begin: Barrier) -> None:
    global _begin
    _begin = begin


def _write(task: tuple[Connection, str, int, int]) -> tuple[float, float]:
    connection, writer, events, number = task
    return asyncio.run(_write_events(connection, writer, events, number))


async def _write_events(connection: Connection, writer: str, events: int, number: int) -> tuple[float, float]:
    concurrency = CONCURRENCY // 4
    async with connection.client() as client:
        db = client[connection.db_name]
        await client.admin.command("ping")
        if writer == "jobledger":
            event_store = EventStore(db)
            tune_garbage_collector()
            appends = iter(make_appends(events))

            async def caller() -> None:
                for append in appends:
                    await event_store.append(append)

            _begin.wait()
            start = time.time()
            await asyncio.gather(*(caller() for _ in range(concurrency)))
        else:
            baseline = db.get_collection("baseline", write_concern=DURABLE)
            documents = make_documents(events, first=time.time_ns() // 1000 + number * 10**14)
            tune_garbage_collector()
            _begin.wait()
            start = time.time()
            for begin in range(0, events, concurrency):
                await baseline.insert_many(documents[begin : begin + concurrency], ordered=False)
        return start, time.time()
