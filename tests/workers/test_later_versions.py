"""Rolling upgrades: what roles of this version do when a later one has written to the log. One event stops nothing."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from pydantic import create_model

from jobledger.ledger.domain.events import Event, JobCompleted, JobSubmitted, Meta
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import new_job_id
from jobledger.ledger.store.envelope import Append, Head
from jobledger.ledger.store.event_store import EventLog
from jobledger.projections.engine import health
from jobledger.projections.engine.projector import Projector
from tests.support.running import PATIENCE_SECONDS, Process, WorkerOptions, asked, process, until

UNKNOWN: type[Event] = create_model("JobRepainted", __base__=Event, colour=(str, ...))
RED = UNKNOWN.model_validate({"colour": "red"})
NEWER = create_model("JobSubmitted", __base__=JobSubmitted)
NEWER.schema_version = JobSubmitted.schema_version + 1


async def go_on(log: EventLog, stream: str, event: Event) -> None:
    """Append to a stream without reading what stands there."""
    there = await log.read_stream(stream)
    head = Head(there[-1].version, there[-1].position, there[-1].hash) if there else Head()
    await log.append(Append(stream, head, [event], Meta("user:tomorrow"), datetime.now(UTC)))


async def test_streams_of_a_kind_that_the_projector_does_not_know_are_passed_over(
    connection: Connection, tmp_path: Path
) -> None:
    async with process(connection, tmp_path, projector=True) as here:
        await go_on(here.log, "painting-1", RED)
        job_id = await here.submit()
        assert here.projecting is not None
        projecting = here.projecting
        await until(lambda: projecting.done() or here.checkpoint.position == 2, "the views are up to date")
        assert (await here.job(job_id))["status"] == "pending"
        assert here.checkpoint.position == 2


async def test_views_stand_still_before_what_the_projector_cannot_read_and_are_never_wrong(
    connection: Connection, tmp_path: Path
) -> None:
    async with process(connection, tmp_path, projector=True) as here:
        job_id = await here.submit()
        await here.views_reach()
        before = await here.job(job_id)
    async with process(connection, tmp_path) as here:
        await go_on(here.log, job_id, RED)
        await here.submit()
    async with process(connection, tmp_path) as here:
        projector = Projector(here.db, here.log, connection, here.checkpoint, holder="this-version")
        projecting = asyncio.create_task(projector.run())
        async with asyncio.timeout(PATIENCE_SECONDS):
            while "At position 2 of the log" not in await health.why_stalled(here.db, 1, 3):  # noqa: ASYNC110 - no signal
                await asyncio.sleep(0.05)
        assert not projecting.done(), "it waits for a projector of a later version"
        projecting.cancel()
        await asyncio.gather(projecting, return_exceptions=True)
        assert here.checkpoint.position == 1
        assert await here.job(job_id) == before


async def test_a_job_that_cannot_be_read_does_not_keep_a_worker_from_the_others(
    connection: Connection, tmp_path: Path
) -> None:
    async with process(connection, tmp_path, projector=True) as here:
        unreadable, other = await here.submit(), await here.submit()
        await here.views_reach()
    async with process(connection, tmp_path) as here:
        await go_on(here.log, unreadable, RED)
    async with process(connection, tmp_path, worker=WorkerOptions(), deaf=True) as here:
        await _completed(connection, tmp_path, other)
        assert await here.history(unreadable) == ["JobSubmitted", "JobRepainted"]
        assert here.working is not None
        assert not here.working.done()


async def test_a_submission_that_cannot_be_read_does_not_keep_a_worker_from_the_others(
    connection: Connection, tmp_path: Path
) -> None:
    async with process(connection, tmp_path, worker=WorkerOptions(), deaf=True) as here:
        await _works(here)
        await go_on(here.log, new_job_id(), NEWER.model_validate(asked().payload()))
        await _works(here)
        assert here.working is not None
        assert not here.working.done()


async def _works(here: Process) -> None:
    """Wait until it runs a job; without a projector it hears only of those that come while it is idle."""
    async with asyncio.timeout(PATIENCE_SECONDS / 2):
        while True:
            job_id = await here.submit()
            for _ in range(50):
                if "JobCompleted" in await here.history(job_id):
                    return
                await asyncio.sleep(0.02)


async def _completed(connection: Connection, store: Path, job_id: str) -> None:
    """Hear of it as another process does: the one that works has no ear for it."""
    async with process(connection, store) as watcher:
        await watcher.heard(JobCompleted, job_id)
