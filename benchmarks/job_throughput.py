"""Measure the latency until an idle worker starts a job, and the number of jobs per second, views included."""

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

EVENTS_PER_JOB = 4
"""With the default of 20,000 events per round, there are 5,000 jobs."""
FEW_WORKERS = 2
MANY_WORKERS = 8
TOTAL_SLOTS = 200
"""Slots of all workers together."""
BASELINE_CONCURRENCY = 10
"""Concurrent jobs in each process of the baseline queue. With more, they conflict and become slower."""
_PAUSE_SECONDS = 0.02
"""Pause between two jobs, in which the end of the previous one is processed."""
_WARM_UP_JOBS = 20
_META = EventMetadata("user:bench")
_spawn = multiprocessing.get_context("spawn")


class _AnyParameters(BaseModel):
    model_config = ConfigDict(extra="allow")


class StartTimeProcessor:
    """A processor that only returns its start time."""

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
    """Measure single jobs on idle workers, and a backlog of jobs with two and with many workers."""
    jobs = events // EVENTS_PER_JOB
    with tempfile.TemporaryDirectory() as store:
        pickup = await _measure_pickup(connection, Path(store), rounds * 40)
        backlog = [
            await _measure_backlog(connection, Path(store), jobs, workers=FEW_WORKERS, files=False, min_rate=2000),
            await _measure_backlog(connection, Path(store), jobs, workers=FEW_WORKERS, files=True),
            await _measure_backlog(connection, Path(store), jobs, workers=MANY_WORKERS, files=False),
        ]
    return [*pickup, *backlog]


# Processes ---------------------------------------------------------------------------------------------------------


def _build_settings(connection: Connection, store: Path, slots: int) -> Settings:
    options = {
        "mongodb": {"uri": connection.uri, "db_name": connection.db_name},
        "results": {"store": str(store)},
        "event_worker": {"max_concurrent": slots},
    }
    settings, _ = read_settings(None, options, defaults_only=True)
    return settings


def _run_role(connection: Connection, store: Path, role: Role, slots: int) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    load_processors()["clock"] = StartTimeProcessor
    asyncio.run(_run_until_terminated(_build_settings(connection, store, slots), connection, role))


async def _run_until_terminated(settings: Settings, connection: Connection, role: Role) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with start_roles(settings, connection, frozenset({role}), on_failure=lambda error: stop.set()):
        await stop.wait()


@asynccontextmanager
async def _run_processes(
    connection: Connection, store: Path, **role_counts: int
) -> AsyncIterator[Sequence[BaseProcess]]:
    """Run a number of processes of each role."""
    processes = [
        _spawn.Process(target=_run_role, args=(connection, store, role, TOTAL_SLOTS // number))
        for role, number in role_counts.items()
        for _ in range(number)
    ]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            await asyncio.to_thread(process.join)


@asynccontextmanager
async def _open_database(
    connection: Connection, *, follows_log: bool = False
) -> AsyncIterator[tuple[Database, EventStore, Checkpoint]]:
    """Yield an empty database.

    Without `follows_log`, this process follows only the checkpoint, which costs almost no time.
    """
    async with connection.client() as client:
        await client.drop_database(connection.db_name)
        db = client[connection.db_name]
        event_store, changes, checkpoint = EventStore(db), ChangeStream(db), Checkpoint(db)
        if follows_log:
            changes.add_listener(event_store)
        changes.add_listener(checkpoint)
        await event_store.prepare()
        async with changes.running():
            yield db, event_store, checkpoint
        await event_store.aclose()


# Measurements --------------------------------------------------------------------------------------------------


def _build_job(job_type: str, not_before: datetime | None = None, **parameters: Any) -> JobSubmitted:
    return JobSubmitted(job_type=job_type, parameters=parameters, user_id="bench", not_before=not_before)


async def _measure_pickup(connection: Connection, store: Path, number: int) -> list[Result]:
    """Measure the time from the submission of a job until its processor runs in another process, one job at a time.

    The baseline alternates with it: one process inserts a document, and another one sees it in a change stream and
    inserts a claim.
    """
    baseline_seconds, jobledger_seconds = [], []
    async with (
        _open_database(connection, follows_log=True) as (db, event_store, _checkpoint),
        _run_processes(connection, store, projector=1, worker=FEW_WORKERS) as processes,
        event_store.subscribe(after=0, types=[JobCompleted]) as ends,
        _run_baseline_claimer(connection) as claim_times,
    ):
        orders = db.get_collection("orders", write_concern=DURABLE)
        for n in range(number + _WARM_UP_JOBS):
            started = time.time()
            await orders.insert_one({"order": n})
            baseline_seconds.append(await asyncio.to_thread(claim_times.recv) - started)
            await asyncio.sleep(_PAUSE_SECONDS)
            started = time.time()
            await handle_command(
                event_store, new_job_id(), SubmitJob(_build_job("clock")), meta=_META, stream_state=StreamState()
            )
            [completed] = await ends.next_chunk()
            jobledger_seconds.append(completed.data["results"]["metadata"]["started"] - started)
            await asyncio.sleep(_PAUSE_SECONDS)
        cpu = await _cpu_percent(processes, 10)
    baseline_seconds, jobledger_seconds = baseline_seconds[_WARM_UP_JOBS:], jobledger_seconds[_WARM_UP_JOBS:]
    comparison = compare_latencies("", baseline_seconds, jobledger_seconds, max_ratio=1)
    p50, p99 = percentile(jobledger_seconds, 50) * 1000, percentile(jobledger_seconds, 99) * 1000
    return [
        replace(
            comparison,
            name="pickup: submission until processor runs, idle workers; driver: insert, change stream, insert",
            target="p50 ≤ 8 ms, p99 ≤ 30 ms",
            is_met=p50 <= 8 and p99 <= 30,
            notes=(),
        ),
        Result(
            "idle: CPU of a projector and two workers, in percent of one core",
            "",
            ", ".join(f"{share:.1f} %" for share in cpu),
            None,
            None,
            "< 1 %",
            max(cpu) < 1,
        ),
    ]


@asynccontextmanager
async def _run_baseline_claimer(connection: Connection) -> AsyncIterator[multiprocessing.connection.Connection]:
    """Run a process that claims with the plain driver. Yield the pipe that receives the times of its claims."""
    receiver, sender = _spawn.Pipe(duplex=False)
    process = _spawn.Process(target=_claim_baseline, args=(connection, sender), daemon=True)
    process.start()
    await asyncio.to_thread(receiver.recv)  # the change stream is open
    try:
        yield receiver
    finally:
        process.kill()
        await asyncio.to_thread(process.join)


def _claim_baseline(connection: Connection, sender: multiprocessing.connection.Connection) -> None:
    with MongoClient[Document](connection.uri) as client:
        db = client[connection.db_name]
        claims = db.get_collection("claims", write_concern=DURABLE)
        with db.orders.watch([{"$match": {"operationType": "insert"}}]) as orders:
            sender.send("listening")
            for change in orders:
                claims.insert_one({"order": change["fullDocument"]["order"]})
                sender.send(time.time())


async def _cpu_percent(processes: Sequence[BaseProcess], seconds: float) -> list[float]:
    """Return the CPU use of each process in percent of one core over a period without work."""
    await asyncio.sleep(1)
    before = [_cpu_seconds(process) for process in processes]
    await asyncio.sleep(seconds)
    used = [_cpu_seconds(process) - start for process, start in zip(processes, before, strict=True)]
    return [100 * cpu / seconds for cpu in used]


def _cpu_seconds(process: BaseProcess) -> float:
    times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()  # man 5 proc
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


async def _drain_baseline(
    connection: Connection, jobs: int, workers: int, concurrency: int = BASELINE_CONCURRENCY
) -> float:
    """Return the jobs per second of a usual MongoDB queue: findAndModify claims a document, an update completes it.

    It has the same durability and the same number of processes, but no event_store, history, leases or views.
    """
    async with connection.client() as client:
        await client.drop_database(connection.db_name)
        queue = client[connection.db_name].get_collection("queue", write_concern=DURABLE)
        await queue.create_index([("status", 1), ("priority", -1), ("created_at", 1)])
        now = datetime.now(UTC)
        job = {"job_type": "echo", "parameters": {"file": False}, "user_id": "bench", "created_at": now}
        await queue.insert_many([{"status": "pending", "priority": 1, **job} for _ in range(jobs)])
        start = _spawn.Event()
        processes = [
            _spawn.Process(target=_run_baseline_worker, args=(connection, start, concurrency)) for _ in range(workers)
        ]
        for process in processes:
            process.start()
        await asyncio.sleep(3 + workers)  # until all processes are ready
        started = time.monotonic()
        start.set()
        for process in processes:
            await asyncio.to_thread(process.join)
        seconds = time.monotonic() - started
        assert await queue.count_documents({"status": "completed"}) == jobs  # noqa: S101 - checks the benchmark itself
    return jobs / seconds


def _run_baseline_worker(connection: Connection, start: Any, concurrency: int) -> None:
    async def worker() -> None:
        async with connection.client() as client:
            queue = client[connection.db_name].get_collection("queue", write_concern=DURABLE)
            oldest = [("priority", -1), ("created_at", 1)]

            async def drain() -> None:
                claim = {
                    "$set": {"status": "processing", "worker_id": str(os.getpid()), "started_at": datetime.now(UTC)}
                }
                while (job := await queue.find_one_and_update({"status": "pending"}, claim, sort=oldest)) is not None:
                    completion = {"status": "completed", "completed_at": datetime.now(UTC)}
                    await queue.update_one({"_id": job["_id"]}, {"$set": completion})

            await asyncio.to_thread(start.wait)
            await asyncio.gather(*(drain() for _ in range(concurrency)))

    asyncio.run(worker())


async def _measure_backlog(
    connection: Connection, store: Path, jobs: int, *, workers: int, files: bool, min_rate: float = 0
) -> Result:
    """Measure a backlog of jobs with the same start time, from this time until the views show all jobs as completed.

    Without files, the baseline is a queue with the plain driver.
    """
    baseline = None if files else await _drain_baseline(connection, jobs, workers)
    async with _open_database(connection) as (db, event_store, checkpoint):
        async with _run_processes(connection, store, projector=1, worker=workers):
            due = datetime.now(UTC) + timedelta(seconds=6 + 2 * workers)  # when all processes are ready
            for begin in range(0, jobs, 1000):
                commands = [SubmitJob(_build_job("echo", due, file=files)) for _ in range(min(1000, jobs - begin))]
                await create_streams(event_store, [(new_job_id(), command) for command in commands], meta=_META)
            head = await event_store.head_position()
            await checkpoint.wait_for_position(head)
            assert datetime.now(UTC) < due, "the machine is too slow for this benchmark"  # noqa: S101 - checks the benchmark itself
            await checkpoint.wait_for_position(head + 2 * jobs)
            position = head + 2 * jobs
            while await db.jobs.count_documents({"status": "completed"}) < jobs:  # voided positions count as well
                position = max(position + 1, await event_store.head_position())
                await checkpoint.wait_for_position(position)
            rate = jobs / (datetime.now(UTC) - due).total_seconds()
        claims = await db.events.count_documents({"type": "JobClaimed"})
        voided = await db.events.count_documents({"type": "PositionVoided"})
    return Result(
        f"backlog: {jobs:,} jobs {'with one file each' if files else 'without work'}, {workers} workers, one projector",
        "" if baseline is None else f"{baseline:,.0f} jobs/s",
        f"{rate:,.0f} jobs/s",
        None if baseline is None else rate / baseline,
        None,
        f"≥ {min_rate:,.0f}/s" if min_rate else "",
        rate >= min_rate,
        notes=(f"{claims / jobs:.2f} claims per job, and {voided / jobs:.2f} lost claims (voided positions)",),
    )
