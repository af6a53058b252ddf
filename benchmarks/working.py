"""benchmarks: jobs: how long until an idle worker starts one, and how many a second are done, views and all."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, ClassVar

import structlog
from pydantic import BaseModel, ConfigDict

from benchmarks.measure import Result, percentile
from cli.settings import Settings, read_settings
from cli.wiring import Role, roles
from ledger.changes import Changes
from ledger.commands import SubmitJob
from ledger.events import JobCompleted, JobSubmitted, Meta
from ledger.handle import handle, handle_new, new_job_id
from ledger.log import EventLog
from ledger.mongo import Connection, Database
from projections.checkpoint import Checkpoint
from workers.processor import Isolation, Job, Results
from workers.registry import processors

SHARE = 4  # of the events of the other benchmarks: 5,000 jobs
WORKERS = 2
CROWD = 8
SLOTS = 200  # of all workers together
_META = Meta("user:bench")
_spawn = multiprocessing.get_context("spawn")


class _Anything(BaseModel):
    model_config = ConfigDict(extra="allow")


class Clock:
    """A job type that notes when it was started, and does nothing."""

    job_type: ClassVar[str] = "clock"
    isolation: ClassVar[Isolation] = "inline"
    preload: ClassVar[Sequence[str]] = ()
    Parameters: ClassVar[type[BaseModel]] = _Anything
    Settings: ClassVar[type[BaseModel]] = _Anything

    def __init__(self, settings: Any) -> None:
        pass

    async def run(self, job: Job) -> Results:
        return Results(metadata={"started": time.time()})


async def run(connection: Connection, *, events: int, rounds: int) -> list[Result]:
    """Measure a single job on idle workers, and the way through a backlog with two and with many workers."""
    jobs = events // SHARE
    with tempfile.TemporaryDirectory() as store:
        pickup = await _pickup(connection, Path(store), rounds * 40)
        drained = [
            await _drain(connection, Path(store), jobs, workers=WORKERS, files=False, at_least=2000),
            await _drain(connection, Path(store), jobs, workers=WORKERS, files=True),
            await _drain(connection, Path(store), jobs, workers=CROWD, files=False),
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
    processors()["clock"] = Clock
    asyncio.run(_until_terminated(_settings(connection, store, slots), connection, role))


async def _until_terminated(settings: Settings, connection: Connection, role: Role) -> None:
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with roles(settings, connection, frozenset({role}), failed=lambda error: stop.set()):
        await stop.wait()


@asynccontextmanager
async def _processes(connection: Connection, store: Path, **wanted: int) -> AsyncIterator[None]:
    started = [
        _spawn.Process(target=_role, args=(connection, store, role, SLOTS // number))
        for role, number in wanted.items()
        for _ in range(number)
    ]
    for process in started:
        process.start()
    try:
        yield
    finally:
        for process in started:
            process.terminate()
        for process in started:
            await asyncio.to_thread(process.join)


@asynccontextmanager
async def _database(
    connection: Connection, *, live: bool = False
) -> AsyncIterator[tuple[Database, EventLog, Checkpoint]]:
    """Yield an empty database; who is not `live` hears only how far the views are, and costs as good as nothing."""
    async with connection.client() as client:
        await client.drop_database(connection.db_name)
        db = client[connection.db_name]
        log, changes, checkpoint = EventLog(db), Changes(db), Checkpoint(db)
        if live:
            changes.listen(log)
        changes.listen(checkpoint)
        await log.prepare()
        async with changes.running():
            yield db, log, checkpoint
        await log.aclose()


# What is measured --------------------------------------------------------------------------------------------------


def _job(job_type: str, due: datetime | None = None, **parameters: Any) -> JobSubmitted:
    return JobSubmitted(job_type=job_type, parameters=parameters, user_id="bench", not_before=due)


async def _pickup(connection: Connection, store: Path, number: int) -> list[Result]:
    """From the call that submits a job until its processor runs, in another process, one job at a time."""
    async with (
        _database(connection, live=True) as (_, log, _checkpoint),
        _processes(connection, store, projector=1, worker=WORKERS),
        log.subscription(after=0, types=[JobCompleted]) as ends,
    ):
        delays = []
        for n in range(number + 20):
            begun = time.time()
            await handle(log, new_job_id(), SubmitJob(_job("clock")), meta=_META)
            [done] = await ends.chunk()
            if n >= 20:
                delays.append(done.data["results"]["metadata"]["started"] - begun)
            await asyncio.sleep(0.005)
    p50, p99 = percentile(delays, 50) * 1000, percentile(delays, 99) * 1000
    return [
        Result(
            "pickup: a job submitted until its processor runs, idle workers",
            "",
            f"p50 {p50:.1f} ms, p99 {p99:.1f} ms",
            None,
            None,
            "p50 ≤ 8 ms, p99 ≤ 30 ms",
            p50 <= 8 and p99 <= 30,
        )
    ]


async def _drain(
    connection: Connection, store: Path, jobs: int, *, workers: int, files: bool, at_least: float = 0
) -> Result:
    """A backlog that is due all at once; from that moment until the views know that all is done."""
    async with _database(connection) as (db, log, checkpoint):
        async with _processes(connection, store, projector=1, worker=workers):
            due = datetime.now(UTC) + timedelta(seconds=4 + workers)  # when all of them are there and wait
            for begin in range(0, jobs, 1000):
                asked = [SubmitJob(_job("echo", due, file=files)) for _ in range(min(1000, jobs - begin))]
                await handle_new(log, [(new_job_id(), command) for command in asked], meta=_META)
            head = await log.head()
            await checkpoint.reached(head)
            assert datetime.now(UTC) < due, "the machine is too slow for this benchmark"  # noqa: S101 - checks itself
            await checkpoint.reached(head + 2 * jobs)
            position = head + 2 * jobs
            while await db.jobs.count_documents({"status": "completed"}) < jobs:  # void positions count as well
                position = max(position + 1, await log.head())
                await checkpoint.reached(position)
            rate = jobs / (datetime.now(UTC) - due).total_seconds()
        claims = await db.events.count_documents({"type": "JobClaimed"})
        voided = await db.events.count_documents({"type": "PositionVoided"})
    return Result(
        f"drain: {jobs:,} jobs {'with a file each' if files else 'that do nothing'}, {workers} workers, one projector",
        "",
        f"{rate:,.0f} jobs/s",
        None,
        None,
        f"≥ {at_least:,.0f}/s" if at_least else "",
        rate >= at_least,
        notes=(f"{claims / jobs:.2f} claims a job, and {voided / jobs:.2f} that were lost (void positions)",),
    )
