"""benchmarks: append, against plain inserts of the same documents into a collection with the same index."""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.synchronize import Barrier

from benchmarks.event_factory import make_appends, make_documents
from benchmarks.measurement import Result, Stopwatch, compare_latencies, compare_rates
from jobledger.cli.composition import tune_garbage_collector
from jobledger.ledger.mongo.connection import DURABLE, Connection, Database
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventStore

CONCURRENCY = 1000
PROCESSES = 8


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure appends: of many callers, of whole lists, of one caller, and from several processes."""
    async with connection.client() as client:
        db = client[connection.db_name]
        log = EventStore(db)
        await prepare_collections(db, log)
        results = [
            await compare_rates(
                f"append: {CONCURRENCY:,} callers, one event each; plain insert_many of {CONCURRENCY:,}",
                lambda: _plain(db, events),
                lambda: _callers(log, events, CONCURRENCY),
                rounds=rounds,
                min_ratio=0.7,
            ),
            await compare_rates(
                f"append: 3 callers, lists of {CONCURRENCY:,}, all or nothing; plain transactions, 3 at once",
                lambda: _transactions(db, events, at_once=3),
                lambda: _lists(log, events, at_once=3),
                rounds=rounds,
                min_ratio=0.5,
            ),
            await _latency(db, log, rounds * 40),
        ]
        together = await compare_rates(
            f"append: {PROCESSES} processes, {CONCURRENCY // 4} callers each; plain insert_many of {CONCURRENCY // 4}",
            lambda: _processes(connection, "baseline", events),
            lambda: _processes(connection, "jobledger", events),
            rounds=max(2, rounds // 2),
            min_ratio=0.6,
        )
        voided = await db.events.count_documents({"stream": VOID_STREAM})
        share = f"{voided} of {await log.head_position():,} positions were voided"
        await log.aclose()
    return [*results, replace(together, notes=(share,))]


async def prepare_collections(db: Database, log: EventStore) -> None:
    """Give the plain collection the index that `events` has."""
    await log.prepare()
    await db.baseline.create_index([("stream", 1), ("version", 1)], unique=True)


async def _plain(db: Database, events: int) -> float:
    plain = db.get_collection("baseline", write_concern=DURABLE)
    made = make_documents(events)
    with Stopwatch() as watch:
        for begin in range(0, events, CONCURRENCY):
            await plain.insert_many(made[begin : begin + CONCURRENCY], ordered=False)
    return watch.rate(events)


async def _transactions(db: Database, events: int, *, at_once: int) -> float:
    made = make_documents(events)
    begins = iter(range(0, events, CONCURRENCY))

    async def caller() -> None:
        for begin in begins:
            async with (
                db.client.start_session() as session,
                await session.start_transaction(write_concern=DURABLE),
            ):
                await db.baseline.insert_many(made[begin : begin + CONCURRENCY], ordered=False, session=session)

    with Stopwatch() as watch:
        await asyncio.gather(*(caller() for _ in range(at_once)))
    return watch.rate(events)


async def _callers(log: EventStore, events: int, callers: int) -> float:
    todo = iter(make_appends(events))

    async def caller() -> None:
        for append in todo:
            await log.append(append)

    with Stopwatch() as watch:
        await asyncio.gather(*(caller() for _ in range(callers)))
    return watch.rate(events)


async def _lists(log: EventStore, events: int, *, at_once: int) -> float:
    made = make_appends(events)
    begins = iter(range(0, events, CONCURRENCY))

    async def caller() -> None:
        for begin in begins:
            await log.append(*made[begin : begin + CONCURRENCY])

    with Stopwatch() as watch:
        await asyncio.gather(*(caller() for _ in range(at_once)))
    return watch.rate(events)


async def _latency(db: Database, log: EventStore, number: int) -> Result:
    plain = db.get_collection("baseline", write_concern=DURABLE)
    theirs, ours = [], []
    for document, append in zip(make_documents(number), make_appends(number), strict=True):
        begin = time.perf_counter()
        await plain.insert_one(document)
        middle = time.perf_counter()
        await log.append(append)
        theirs.append(middle - begin)
        ours.append(time.perf_counter() - middle)
    return compare_latencies("append: one event, nobody else; plain insert_one", theirs, ours, max_ratio=2.5)


# Several processes ------------------------------------------------------------------------------------------------

_spawn = multiprocessing.get_context("spawn")


async def _processes(connection: Connection, what: str, events: int) -> float:
    """Have processes write at the same time; return the rate of all of them, from the first to the last write."""
    return await asyncio.to_thread(_run_processes, connection, what, events)


def _run_processes(connection: Connection, what: str, events: int) -> float:
    begin = _spawn.Barrier(PROCESSES)
    with _spawn.Pool(PROCESSES, initializer=_remember, initargs=(begin,)) as pool:
        spans: Sequence[tuple[float, float]] = pool.map(
            _write, [(connection, what, events // PROCESSES, number) for number in range(PROCESSES)], chunksize=1
        )
    return events // PROCESSES * PROCESSES / (max(end for _, end in spans) - min(start for start, _ in spans))


_begin: Barrier


def _remember(begin: Barrier) -> None:
    global _begin
    _begin = begin


def _write(task: tuple[Connection, str, int, int]) -> tuple[float, float]:
    connection, what, events, number = task
    return asyncio.run(_write_here(connection, what, events, number))


async def _write_here(connection: Connection, what: str, events: int, number: int) -> tuple[float, float]:
    group = CONCURRENCY // 4
    async with connection.client() as client:
        db = client[connection.db_name]
        await client.admin.command("ping")
        if what == "jobledger":
            log = EventStore(db)
            tune_garbage_collector()
            todo = iter(make_appends(events))

            async def caller() -> None:
                for append in todo:
                    await log.append(append)

            _begin.wait()
            start = time.time()
            await asyncio.gather(*(caller() for _ in range(group)))
        else:
            plain = db.get_collection("baseline", write_concern=DURABLE)
            made = make_documents(events, first=time.time_ns() // 1000 + number * 10**14)
            tune_garbage_collector()
            _begin.wait()
            start = time.time()
            for at in range(0, events, group):
                await plain.insert_many(made[at : at + group], ordered=False)
        return start, time.time()
