"""benchmarks: jobs: how long until an idle worker starts one, and how many a second are done, views and all."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

import structlog
from pydantic import BaseModel, ConfigDict
from pymongo import MongoClient

from benchmarks.measurement import Result, compare_latencies, percentile
from jobledger.cli.composition import Role, start_roles
from jobledger.cli.settings import Settings
from jobledger.cli.settings_file import read_settings
from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.events import EventMetadata, JobCompleted, JobSubmitted
from jobledger.ledger.mongo.connection import DURABLE, Connection, Database, Document
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.command_handler import StreamState, create_streams, handle_command, new_job_id
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.workers.processor import Isolation, JobContext, Results
from jobledger.workers.registry import load_processors

EVENTS_PER_JOB = 4  # of the events of the other benchmarks: 5,000 jobs
FEW_WORKERS = 2
MANY_WORKERS = 8
TOTAL_SLOTS = 200  # of all workers together
BASELINE_CONCURRENCY = 10  # jobs at a time in each process of the plain queue: with more they are in each other's way
_PAUSE_SECONDS = 0.02  # between two jobs: the last one's end has to be through
_META = EventMetadata("user:bench")
_spawn = multiprocessing.get_context("spawn")


class _AnyParameters(BaseModel):
    model_config = ConfigDict(extra="allow")


class StartTimeProcessor:
    """A job type that notes when it was started, and does nothing."""

    job_type: ClassVar[str] = "clock"
    isolation: ClassVar[Isolation] = "inline"
    preload: ClassVar[Sequence[str]] = ()
    Parameters: ClassVar[type[BaseModel]] = _AnyParameters
    Settings: ClassVar[type[BaseModel]] = _AnyParameters

    def __init__(self, settings: Any) -> None:
        pass

    async def run(self, job: JobContext) -> Results:
        return Results(metadata={"started": time.time()})


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure a single job on idle workers, and the way through a backlog with two and with many workers."""
    jobs = events // EVENTS_PER_JOB
    with tempfile.TemporaryDirectory() as store:
        pickup = await _pickup(connection, Path(store), rounds * 40)
        drained = [
            await _drain(connection, Path(store), jobs, workers=FEW_WORKERS, files=False, at_least=2000),
            await _drain(connection, Path(store), jobs, workers=FEW_WORKERS, files=True),
            await _drain(connection, Path(store), jobs, workers=MANY_WORKERS, files=False),
        ]
    return [*pickup, *drained]


# Roles as processes of their own -----------------------------------------------------------------------------------


def _settings(connection: Connection, store: Path, slots: int) -> Settings:
    chosen = {
        "mongodb": {"uri": connection.uri, "db_name": connection.db_name},
        "results": {"store": str(store)},
        "event_worker": {"max_concurrent": slots},
    }
    settings, _ = read_settings(None, chosen, defaults_only=True)
    return settings


def _role(connection: Connection, store: Path, role: Role, slots: int) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    load_processors()["clock"] = StartTimeProcessor
    asyncio.run(_until_terminated(_settings(connection, store, slots), connection, role))


async def _until_terminated(settings: Settings, connection: Connection, role: Role) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with start_roles(settings, connection, frozenset({role}), on_failure=lambda error: stop.set()):
        await stop.wait()


@asynccontextmanager
async def _processes(connection: Connection, store: Path, **wanted: int) -> AsyncIterator[Sequence[BaseProcess]]:
    started = [
        _spawn.Process(target=_role, args=(connection, store, role, TOTAL_SLOTS // number))
        for role, number in wanted.items()
        for _ in range(number)
    ]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.terminate()
        for process in started:
            await asyncio.to_thread(process.join)


@asynccontextmanager
async def _database(
    connection: Connection, *, live: bool = False
) -> AsyncIterator[tuple[Database, EventStore, Checkpoint]]:
    """Yield an empty database; who is not `live` hears only how far the views are, and costs as good as nothing."""
    async with connection.client() as client:
        await client.drop_database(connection.db_name)
        db = client[connection.db_name]
        log, changes, checkpoint = EventStore(db), ChangeStream(db), Checkpoint(db)
        if live:
            changes.add_listener(log)
        changes.add_listener(checkpoint)
        await log.prepare()
        async with changes.running():
            yield db, log, checkpoint
        await log.aclose()


# What is measured --------------------------------------------------------------------------------------------------


def _job(job_type: str, due: datetime | None = None, **parameters: Any) -> JobSubmitted:
    return JobSubmitted(job_type=job_type, parameters=parameters, user_id="bench", not_before=due)


async def _pickup(connection: Connection, store: Path, number: int) -> list[Result]:
    """From the call that submits a job until its processor runs, in another process, one job at a time.

    The plain driver's share of it, in turns: a document is inserted, another process hears of it and inserts its claim.
    """
    plain, ours = [], []
    async with (
        _database(connection, live=True) as (db, log, _checkpoint),
        _processes(connection, store, projector=1, worker=FEW_WORKERS) as processes,
        log.subscribe(after=0, types=[JobCompleted]) as ends,
        _plain_worker(connection) as claimed,
    ):
        orders = db.get_collection("orders", write_concern=DURABLE)
        for n in range(number + 20):
            begun = time.time()
            await orders.insert_one({"order": n})
            plain.append(await asyncio.to_thread(claimed.recv) - begun)
            await asyncio.sleep(_PAUSE_SECONDS)
            begun = time.time()
            await handle_command(log, new_job_id(), SubmitJob(_job("clock")), meta=_META, stream_state=StreamState())
            [done] = await ends.next_chunk()
            ours.append(done.data["results"]["metadata"]["started"] - begun)
            await asyncio.sleep(_PAUSE_SECONDS)
        cpu = await _cpu_percent(processes, 10)
    measured = compare_latencies("", plain[20:], ours[20:], max_ratio=1)
    p50, p99 = percentile(ours[20:], 50) * 1000, percentile(ours[20:], 99) * 1000
    return [
        replace(
            measured,
            name="pickup: a job submitted until its processor runs, idle workers; plain insert, change stream, insert",
            target="p50 ≤ 8 ms, p99 ≤ 30 ms",
            is_met=p50 <= 8 and p99 <= 30,
            notes=(),
        ),
        Result(
            "idle: a projector and two workers, of one core each",
            "",
            ", ".join(f"{share:.1f} %" for share in cpu),
            None,
            None,
            "< 1 %",
            max(cpu) < 1,
        ),
    ]


@asynccontextmanager
async def _plain_worker(connection: Connection) -> AsyncIterator[multiprocessing.connection.Connection]:
    """Yield where a process that does a worker's part with the plain driver says when it has claimed something."""
    ours, theirs = _spawn.Pipe(duplex=False)
    process = _spawn.Process(target=_claim_baseline, args=(connection, theirs), daemon=True)
    process.start()
    await asyncio.to_thread(ours.recv)  # it listens
    try:
        yield ours
    finally:
        process.kill()
        await asyncio.to_thread(process.join)


def _claim_baseline(connection: Connection, said: multiprocessing.connection.Connection) -> None:
    with MongoClient[Document](connection.uri) as client:
        db = client[connection.db_name]
        claims = db.get_collection("claims", write_concern=DURABLE)
        with db.orders.watch([{"$match": {"operationType": "insert"}}]) as orders:
            said.send("listening")
            for change in orders:
                claims.insert_one({"order": change["fullDocument"]["order"]})
                said.send(time.time())


async def _cpu_percent(processes: Sequence[BaseProcess], seconds: float) -> list[float]:
    """Return how much of one core each of these processes takes while nothing happens."""
    await asyncio.sleep(1)
    before = [_cpu_seconds(process) for process in processes]
    await asyncio.sleep(seconds)
    spent = [_cpu_seconds(process) - since for process, since in zip(processes, before, strict=True)]
    return [100 * used / seconds for used in spent]


def _cpu_seconds(process: BaseProcess) -> float:
    times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()  # man 5 proc
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


async def _drain_baseline(
    connection: Connection, jobs: int, workers: int, at_once: int = BASELINE_CONCURRENCY
) -> float:
    """The usual queue in MongoDB: one document a job, taken by findAndModify, ended by an update. Jobs a second.

    As durable as ours, by as many processes. There is no log, no history, no lease and no view.
    """
    async with connection.client() as client:
        await client.drop_database(connection.db_name)
        queue = client[connection.db_name].get_collection("queue", write_concern=DURABLE)
        await queue.create_index([("status", 1), ("priority", -1), ("created_at", 1)])
        created = datetime.now(UTC)
        content = {"job_type": "echo", "parameters": {"file": False}, "user_id": "bench", "created_at": created}
        await queue.insert_many([{"status": "pending", "priority": 1, **content} for _ in range(jobs)])
        start = _spawn.Event()
        processes = [
            _spawn.Process(target=_run_baseline_worker, args=(connection, start, at_once)) for _ in range(workers)
        ]
        for process in processes:
            process.start()
        await asyncio.sleep(3 + workers)  # until all of them stand there
        begun = time.monotonic()
        start.set()
        for process in processes:
            await asyncio.to_thread(process.join)
        seconds = time.monotonic() - begun
        assert await queue.count_documents({"status": "completed"}) == jobs  # noqa: S101 - checks itself
    return jobs / seconds


def _run_baseline_worker(connection: Connection, start: Any, at_once: int) -> None:
    async def worker() -> None:
        async with connection.client() as client:
            queue = client[connection.db_name].get_collection("queue", write_concern=DURABLE)
            oldest = [("priority", -1), ("created_at", 1)]

            async def one_after_the_other() -> None:
                taken = {
                    "$set": {"status": "processing", "worker_id": str(os.getpid()), "started_at": datetime.now(UTC)}
                }
                while (job := await queue.find_one_and_update({"status": "pending"}, taken, sort=oldest)) is not None:
                    ended = {"status": "completed", "completed_at": datetime.now(UTC)}
                    await queue.update_one({"_id": job["_id"]}, {"$set": ended})

            await asyncio.to_thread(start.wait)
            await asyncio.gather(*(one_after_the_other() for _ in range(at_once)))

    asyncio.run(worker())


async def _drain(
    connection: Connection, store: Path, jobs: int, *, workers: int, files: bool, at_least: float = 0
) -> Result:
    """A backlog that is due all at once; from that moment until the views know that all is done.

    Beside it, where nothing is written into files, the same by the plain driver.
    """
    plain = None if files else await _drain_baseline(connection, jobs, workers)
    async with _database(connection) as (db, log, checkpoint):
        async with _processes(connection, store, projector=1, worker=workers):
            due = datetime.now(UTC) + timedelta(seconds=6 + 2 * workers)  # when all of them are there and wait
            for begin in range(0, jobs, 1000):
                asked = [SubmitJob(_job("echo", due, file=files)) for _ in range(min(1000, jobs - begin))]
                await create_streams(log, [(new_job_id(), command) for command in asked], meta=_META)
            head = await log.head_position()
            await checkpoint.wait_for_position(head)
            assert datetime.now(UTC) < due, "the machine is too slow for this benchmark"  # noqa: S101 - checks itself
            await checkpoint.wait_for_position(head + 2 * jobs)
            position = head + 2 * jobs
            while await db.jobs.count_documents({"status": "completed"}) < jobs:  # void positions count as well
                position = max(position + 1, await log.head_position())
                await checkpoint.wait_for_position(position)
            rate = jobs / (datetime.now(UTC) - due).total_seconds()
        claims = await db.events.count_documents({"type": "JobClaimed"})
        voided = await db.events.count_documents({"type": "PositionVoided"})
    return Result(
        f"drain: {jobs:,} jobs {'with a file each' if files else 'that do nothing'}, {workers} workers, one projector",
        "" if plain is None else f"{plain:,.0f} jobs/s",
        f"{rate:,.0f} jobs/s",
        None if plain is None else rate / plain,
        None,
        f"≥ {at_least:,.0f}/s" if at_least else "",
        rate >= at_least,
        notes=(f"{claims / jobs:.2f} claims a job, and {voided / jobs:.2f} that were lost (void positions)",),
    )
