"""Measure the latency until an idle worker starts a job, and the number of jobs per second, views included."""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict
from pymongo import MongoClient

from benchmarks.measurement import Result, compare_latencies, compute_percentile, measure_rate, open_empty_database
from benchmarks.processes import Child, Pipe, run_processes, run_role
from jobledger.cli.composition import Role
from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.events import EventMetadata, JobCompleted, JobSubmitted
from jobledger.ledger.mongo.connection import DURABLE, Connection, Document
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.command_handler import StreamState, create_job_id, create_streams, handle_command
from jobledger.projections.engine.checkpoint import CheckpointFollower
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
        changes.add_listener(event_store)
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
            await handle_command(
                event_store, create_job_id(), SubmitJob(_build_job("clock")), meta=_META, stream_state=StreamState()
            )
            [completed] = await ends.read_chunk()
            jobledger_seconds.append(completed.data["results"]["metadata"]["started"] - started)
            await asyncio.sleep(_PAUSE_SECONDS)
        cpu = await _measure_cpu_percent([role.process for role in roles], 10)
    baseline_seconds, jobledger_seconds = baseline_seconds[_WARM_UP_JOBS:], jobledger_seconds[_WARM_UP_JOBS:]
    comparison = compare_latencies("", baseline_seconds, jobledger_seconds, max_ratio=1)
    p50, p99 = compute_percentile(jobledger_seconds, 50) * 1000, compute_percentile(jobledger_seconds, 99) * 1000
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
    before = [_read_cpu_seconds(process) for process in processes]
    await asyncio.sleep(seconds)
    used = [_read_cpu_seconds(process) - start for process, start in zip(processes, before, strict=True)]
    return [100 * cpu / seconds for cpu in used]


def _read_cpu_seconds(process: BaseProcess) -> float:
    times = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()  # man 5 proc
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK")


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


async def _measure_backlog(
    connection: Connection, store: Path, jobs: int, *, workers: int, files: bool, min_rate: float = 0
) -> Result:
    """Measure a backlog of jobs with the same start time, from this time until the views show all jobs as completed.

    Without files, the baseline is a queue with the plain driver.
    """
    baseline = None if files else await _drain_baseline(connection, jobs, workers)
    async with open_empty_database(connection) as (db, event_store):
        changes, checkpoint = ChangeStream(db), CheckpointFollower(db)
        changes.add_listener(checkpoint)
        async with changes.keep_open(), _run_roles(connection, store, workers=workers):
            due = datetime.now(UTC) + timedelta(seconds=6 + 2 * workers)  # when all jobs are submitted
            for begin in range(0, jobs, 1000):
                commands = [SubmitJob(_build_job("echo", due, file=files)) for _ in range(min(1000, jobs - begin))]
                await create_streams(event_store, [(create_job_id(), command) for command in commands], meta=_META)
            head = await event_store.read_head_position()
            await checkpoint.wait_for_position(head)
            assert datetime.now(UTC) < due, "the machine is too slow for this benchmark"  # noqa: S101 - checks the benchmark itself
            await checkpoint.wait_for_position(head + 2 * jobs)
            position = head + 2 * jobs
            while await db.jobs.count_documents({"status": "completed"}) < jobs:  # voided positions count as well
                position = max(position + 1, await event_store.read_head_position())
                await checkpoint.wait_for_position(position)
            rate = jobs / (datetime.now(UTC) - due).total_seconds()
        claims = await db.events.count_documents({"type": "JobClaimed"})
        voided = await db.events.count_documents({"type": "PositionVoided"})
    return Result(
        f"backlog: {jobs:,} jobs {'with one file each' if files else 'without work'}, {workers} workers, one projector",
        "" if baseline is None else f"{baseline:,.0f} jobs/s",
        f"{rate:,.0f} jobs/s",
        f"≥ {min_rate:,.0f}/s" if min_rate else "",
        rate >= min_rate,
        None if baseline is None else rate / baseline,
        notes=(f"{claims / jobs:.2f} claims per job, and {voided / jobs:.2f} lost claims (voided positions)",),
    )
