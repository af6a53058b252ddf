"""Measure the latency until an idle worker starts a job, and the rate and CPU time of jobs, views included."""

from __future__ import annotations

import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pymongo import MongoClient

from benchmarks.measurement import Result, compare_latencies, compute_percentile, measure_rate, open_empty_database
from benchmarks.processes import (
    Child,
    Pipe,
    read_cpu_seconds,
    read_server_cpu_seconds,
    run_processes,
    run_role,
)
from jobledger.cli.composition import Role
from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.events import EventMetadata, JobCompleted, JobSubmitted
from jobledger.ledger.mongo.connection import DURABLE, Connection, Database, Document
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.command_handler import create_job_id, create_streams
from jobledger.projections.engine.checkpoint import CheckpointFollower, load_checkpoint
from jobledger.projections.engine.dispatcher import Dispatcher
from jobledger.workers.processor import Isolation, JobContext, Results
from jobledger.workers.registry import load_processors

EVENTS_PER_JOB = 4
"""With the default of 20,000 events per round, there are 5,000 jobs."""
FEW_WORKERS = 2
MANY_WORKERS = 8
TOTAL_SLOTS = 200
"""Slots of all workers together."""
CPU_LIMITS = {"database": 130, "workers": 120, "projector": 85, "total": 330}
"""CPU time in microseconds per job."""
BASELINE_CONCURRENCY = 10
"""Concurrent jobs in each process of the baseline queue. With more, they conflict and become slower."""
_PAUSE_SECONDS = 0.02
"""Pause between two jobs, in which the end of the previous one is processed."""
_POLL_SECONDS = 0.05
_WARM_UP_JOBS = 20
_META = EventMetadata("user:bench")


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
    """Measure a backlog of jobs with few workers, in several rounds, and once with files and with many workers.

    The baseline of each is drained immediately before it.
    """
    jobs = events // EVENTS_PER_JOB
    with tempfile.TemporaryDirectory() as store:
        drain = partial(_drain, connection, Path(store), jobs)
        baseline = partial(_drain_baseline, connection, jobs)
        pairs = [(await baseline(FEW_WORKERS), await drain(FEW_WORKERS)) for _ in range(rounds)]
        return [
            _build_rate_result(f"{jobs:,} jobs without work, {FEW_WORKERS} workers", pairs, min_ratio=1.0),
            *_build_cpu_results([drained for _, drained in pairs]),
            _build_rate_result(
                f"{jobs:,} jobs with one file each, {FEW_WORKERS} workers",
                [(None, await drain(FEW_WORKERS, files=True))],
            ),
            _build_rate_result(
                f"{jobs:,} jobs without work, {MANY_WORKERS} workers",
                [(await baseline(MANY_WORKERS), await drain(MANY_WORKERS))],
            ),
        ]


async def run_pickup(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure single jobs on idle workers, and the CPU use of idle processes."""
    with tempfile.TemporaryDirectory() as store:
        return await _measure_pickup(connection, Path(store), rounds * 40)


def _run_role(connection: Connection, store: Path, role: Role, slots: int, pipe: Pipe) -> None:
    load_processors()["clock"] = StartTimeProcessor
    run_role(connection, store, role, slots, pipe)


@asynccontextmanager
async def _run_roles(connection: Connection, store: Path, *, workers: int) -> AsyncIterator[Sequence[Child]]:
    """Run a projector and a number of workers."""
    async with (
        run_processes(1, _run_role, connection, store, "projector", TOTAL_SLOTS) as projector,
        run_processes(workers, _run_role, connection, store, "worker", TOTAL_SLOTS // workers) as children,
    ):
        yield [*projector, *children]


# Measurements --------------------------------------------------------------------------------------------------


def _build_job(job_type: str, not_before: datetime | None = None, **parameters: Any) -> JobSubmitted:
    return JobSubmitted(job_type=job_type, parameters=parameters, user_id="bench", not_before=not_before)


async def _measure_pickup(connection: Connection, store: Path, number: int) -> list[Result]:
    """Measure the time from the submission of a job until its processor runs in another process, one job at a time.

    The baseline alternates with it: one process inserts a document, and another one sees it in a change stream and
    inserts a claim.
    """
    baseline_seconds, jobledger_seconds = [], []
    async with open_empty_database(connection) as (db, event_store), AsyncExitStack() as stack:
        changes = ChangeStream(db)
        checkpoint = CheckpointFollower(db)
        for listener in (event_store, checkpoint):
            changes.add_listener(listener)
        dispatcher = Dispatcher(db, event_store, checkpoint, changes)
        stack.callback(dispatcher.close)
        await stack.enter_async_context(changes.keep_open())
        roles = await stack.enter_async_context(_run_roles(connection, store, workers=FEW_WORKERS))
        ends = await stack.enter_async_context(event_store.subscribe(after=0, types=[JobCompleted]))
        [claimer] = await stack.enter_async_context(run_processes(1, _claim_baseline, connection))
        orders = db.get_collection("orders", write_concern=DURABLE)
        for n in range(number + _WARM_UP_JOBS):
            started = time.time()
            await orders.insert_one({"order": n})
            baseline_seconds.append(await claimer.receive() - started)
            await asyncio.sleep(_PAUSE_SECONDS)
            started = time.time()
            await dispatcher.submit_job(create_job_id(), SubmitJob(_build_job("clock")), meta=_META)
            [completed] = await ends.read_chunk()
            jobledger_seconds.append(completed.data["results"]["metadata"]["started"] - started)
            await asyncio.sleep(_PAUSE_SECONDS)
        cpu = await _measure_cpu_percent([role.process for role in roles], 10)
    baseline_seconds, jobledger_seconds = baseline_seconds[_WARM_UP_JOBS:], jobledger_seconds[_WARM_UP_JOBS:]
    comparison = compare_latencies("", baseline_seconds, jobledger_seconds, max_ratio=1)
    p50, p99 = (compute_percentile(jobledger_seconds, percent) for percent in (50, 99))
    baseline_p50 = compute_percentile(baseline_seconds, 50)
    return [
        replace(
            comparison,
            name="pickup: submission until processor runs, idle workers; driver: insert, change stream, insert",
            target="p50 ≤ 1.6 ×, p99 ≤ 2.5 × p50",
            is_met=p50 <= 1.6 * baseline_p50 and p99 <= 2.5 * p50,
            notes=(),
        ),
        Result(
            "idle: CPU of a projector and two workers, in percent of one core",
            "",
            ", ".join(f"{share:.1f} %" for share in cpu),
            "< 1 %",
            max(cpu) < 1,
        ),
    ]


def _claim_baseline(connection: Connection, pipe: Pipe) -> None:
    """Claim with the plain driver, and send the time of each claim."""
    with MongoClient[Document](connection.uri) as client:
        db = client[connection.db_name]
        claims = db.get_collection("claims", write_concern=DURABLE)
        with db.orders.watch([{"$match": {"operationType": "insert"}}]) as orders:
            pipe.send("listening")
            for change in orders:
                claims.insert_one({"order": change["fullDocument"]["order"]})
                pipe.send(time.time())


async def _measure_cpu_percent(processes: Sequence[BaseProcess], seconds: float) -> list[float]:
    """Return the CPU use of each process in percent of one core over a period without work."""
    await asyncio.sleep(1)
    before = [read_cpu_seconds(process) for process in processes]
    await asyncio.sleep(seconds)
    used = [read_cpu_seconds(process) - start for process, start in zip(processes, before, strict=True)]
    return [100 * cpu / seconds for cpu in used]


async def _drain_baseline(
    connection: Connection, jobs: int, workers: int, concurrency: int = BASELINE_CONCURRENCY
) -> float:
    """Return the jobs per second of a usual MongoDB queue: findAndModify claims a document, an update completes it.

    It has the same durability and the same number of processes, but no event store, history, leases or views.
    """
    async with open_empty_database(connection) as (db, _event_store):
        queue = db.get_collection("queue", write_concern=DURABLE)
        await queue.create_index([("status", 1), ("priority", -1), ("created_at", 1)])
        now = datetime.now(UTC)
        job = {"job_type": "echo", "parameters": {"file": False}, "user_id": "bench", "created_at": now}
        await queue.insert_many([{"status": "pending", "priority": 1, **job} for _ in range(jobs)])
        async with run_processes(workers, _run_baseline_worker, connection, concurrency) as children:

            async def drain() -> None:
                for child in children:
                    child.pipe.send("start")
                await asyncio.gather(*(child.receive() for child in children))

            rate = await measure_rate(jobs, drain())
        assert await queue.count_documents({"status": "completed"}) == jobs  # noqa: S101 - checks the benchmark itself
    return rate


def _run_baseline_worker(connection: Connection, concurrency: int, pipe: Pipe) -> None:
    async def worker() -> None:
        async with connection.create_client() as client:
            queue = client[connection.db_name].get_collection("queue", write_concern=DURABLE)
            oldest = [("priority", -1), ("created_at", 1)]

            async def drain() -> None:
                claim = {
                    "$set": {"status": "processing", "worker_id": str(os.getpid()), "started_at": datetime.now(UTC)}
                }
                while (job := await queue.find_one_and_update({"status": "pending"}, claim, sort=oldest)) is not None:
                    completion = {"status": "completed", "completed_at": datetime.now(UTC)}
                    await queue.update_one({"_id": job["_id"]}, {"$set": completion})

            pipe.send("ready")
            await asyncio.to_thread(pipe.recv)
            await asyncio.gather(*(drain() for _ in range(concurrency)))
            pipe.send("done")

    asyncio.run(worker())


@dataclass(frozen=True, slots=True)
class _Drain:
    """One drain of a backlog.

    Attributes:
        rate: Jobs per second.
        cpu: CPU time in microseconds per job, by kind of process.
        claims: Claims per job.
        voided: Voided positions, one for each lost claim, per job.
    """

    rate: float
    cpu: Mapping[str, float]
    claims: float
    voided: float


async def _drain(connection: Connection, store: Path, jobs: int, workers: int, *, files: bool = False) -> _Drain:
    """Drain jobs with the same start time, from this time until the views show all of them as completed.

    The benchmark polls: a change stream of its own would cost the database as much as that of another worker.
    """
    async with open_empty_database(connection) as (db, event_store):
        async with _run_roles(connection, store, workers=workers) as [projector, *others]:
            due = datetime.now(UTC) + timedelta(seconds=6 + 2 * workers)  # when all jobs are submitted
            for begin in range(0, jobs, 1000):
                commands = [SubmitJob(_build_job("echo", due, file=files)) for _ in range(min(1000, jobs - begin))]
                await create_streams(event_store, [(create_job_id(), command) for command in commands], meta=_META)
            head = await event_store.read_head_position()
            await _wait_for_views(db, head)
            assert datetime.now(UTC) < due, "the machine is too slow for this benchmark"  # noqa: S101 - checks the benchmark itself
            before = await _read_cpu_times(db, projector, others)
            await _wait_for_views(db, head + 2 * jobs)
            # Voided positions count as well.
            while await db.jobs.count_documents({"status": "completed"}) < jobs:  # noqa: ASYNC110 - other processes
                await asyncio.sleep(_POLL_SECONDS)
            rate = jobs / (datetime.now(UTC) - due).total_seconds()
            after = await _read_cpu_times(db, projector, others)
        claims = await db.events.count_documents({"type": "JobClaimed"})
        voided = await db.events.count_documents({"type": "PositionVoided"})
    cpu = {name: (after[name] - before[name]) * 1e6 / jobs for name in before}
    return _Drain(rate, cpu | {"total": sum(cpu.values())}, claims / jobs, voided / jobs)


async def _wait_for_views(db: Database, position: int) -> None:
    while (await load_checkpoint(db)).get("position", 0) < position:  # noqa: ASYNC110 - another process
        await asyncio.sleep(_POLL_SECONDS)


async def _read_cpu_times(db: Database, projector: Child, workers: Sequence[Child]) -> dict[str, float]:
    """Return the CPU time of each kind of process in seconds since it started."""
    return {
        "database": await read_server_cpu_seconds(db),
        "workers": sum(read_cpu_seconds(worker.process) for worker in workers),
        "projector": read_cpu_seconds(projector.process),
    }


def _build_rate_result(name: str, pairs: Sequence[tuple[float | None, _Drain]], *, min_ratio: float = 0) -> Result:
    """Return the result of one or several drains and their baselines."""
    ratios = sorted(drained.rate / baseline for baseline, drained in pairs if baseline is not None)
    ratio = statistics.median(ratios) if ratios else None
    claims, voided = (
        statistics.median(values) for values in zip(*((it.claims, it.voided) for _, it in pairs), strict=True)
    )
    return Result(
        f"backlog: {name}, one projector",
        f"{statistics.median(it for it, _ in pairs if it is not None):,.0f} jobs/s" if ratios else "",
        f"{statistics.median(it.rate for _, it in pairs):,.0f} jobs/s",
        f"≥ {min_ratio}" if min_ratio else "",
        ratio is None or ratio >= min_ratio,
        ratio,
        (ratios[0], ratios[-1]) if ratios else None,
        notes=(f"{claims:.2f} claims per job, and {voided:.2f} lost claims (voided positions)",),
    )


def _build_cpu_results(drains: Sequence[_Drain]) -> list[Result]:
    """Return the median CPU time per job of each kind of process."""
    results = []
    for name, limit in CPU_LIMITS.items():
        microseconds = statistics.median(drained.cpu[name] for drained in drains)
        results.append(
            Result(f"CPU per job: {name}", "", f"{microseconds:,.0f} µs", f"≤ {limit} µs", microseconds <= limit)
        )
    return results
