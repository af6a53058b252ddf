"""Rolling upgrades: what roles of this version do when a later one has written to the log. One event stops nothing."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from pydantic import create_model

from jobledger.ledger.domain.events import Event, EventMetadata, JobCompleted, JobSubmitted
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import new_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine import health
from jobledger.projections.engine.projector import Projector
from tests.support.role_runner import (
    WAIT_TIMEOUT_SECONDS,
    RunningRoles,
    WorkerOptions,
    make_echo_job,
    poll_until,
    run_roles_in_process,
)

UNKNOWN: type[Event] = create_model("JobRepainted", __base__=Event, colour=(str, ...))
RED = UNKNOWN.model_validate({"colour": "red"})
NEWER = create_model("JobSubmitted", __base__=JobSubmitted)
NEWER.schema_version = JobSubmitted.schema_version + 1


async def go_on(log: EventStore, stream: str, event: Event) -> None:
    """Append to a stream without reading what stands there."""
    there = await log.read_stream(stream)
    head = StreamHead(there[-1].version, there[-1].position, there[-1].hash) if there else StreamHead()
    await log.append(StreamAppend(stream, head, [event], EventMetadata("user:tomorrow"), datetime.now(UTC)))


async def test_streams_of_a_kind_that_the_projector_does_not_know_are_passed_over(
    connection: Connection, tmp_path: Path
) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as here:
        await go_on(here.event_store, "painting-1", RED)
        job_id = await here.submit()
        assert here.projector_task is not None
        projecting = here.projector_task
        await poll_until(lambda: projecting.done() or here.checkpoint.position == 2, "the views are up to date")
        assert (await here.load_job(job_id))["status"] == "pending"
        assert here.checkpoint.position == 2


async def test_views_stand_still_before_what_the_projector_cannot_read_and_are_never_wrong(
    connection: Connection, tmp_path: Path
) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as here:
        job_id = await here.submit()
        await here.wait_for_views()
        before = await here.load_job(job_id)
    async with run_roles_in_process(connection, tmp_path) as here:
        await go_on(here.event_store, job_id, RED)
        await here.submit()
    async with run_roles_in_process(connection, tmp_path) as here:
        projector = Projector(here.db, here.event_store, connection, here.checkpoint, holder="this-version")
        projecting = asyncio.create_task(projector.run())
        async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
            while "At position 2 of the log" not in await health.stall_reason(here.db, 1, 3):  # noqa: ASYNC110 - no signal
                await asyncio.sleep(0.05)
        assert not projecting.done(), "it waits for a projector of a later version"
        projecting.cancel()
        await asyncio.gather(projecting, return_exceptions=True)
        assert here.checkpoint.position == 1
        assert await here.load_job(job_id) == before


async def test_a_job_that_cannot_be_read_does_not_keep_a_worker_from_the_others(
    connection: Connection, tmp_path: Path
) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as here:
        unreadable, other = await here.submit(), await here.submit()
        await here.wait_for_views()
    async with run_roles_in_process(connection, tmp_path) as here:
        await go_on(here.event_store, unreadable, RED)
    async with run_roles_in_process(connection, tmp_path, worker=WorkerOptions(), worker_events_only=True) as here:
        await _completed(connection, tmp_path, other)
        assert await here.read_event_types(unreadable) == ["JobSubmitted", "JobRepainted"]
        assert here.worker_task is not None
        assert not here.worker_task.done()


async def test_a_submission_that_cannot_be_read_does_not_keep_a_worker_from_the_others(
    connection: Connection, tmp_path: Path
) -> None:
    async with run_roles_in_process(connection, tmp_path, worker=WorkerOptions(), worker_events_only=True) as here:
        await _works(here)
        await go_on(here.event_store, new_job_id(), NEWER.model_validate(make_echo_job().to_payload()))
        await _works(here)
        assert here.worker_task is not None
        assert not here.worker_task.done()


async def _works(here: RunningRoles) -> None:
    """Wait until it runs a job; without a projector it hears only of those that come while it is idle."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS / 2):
        while True:
            job_id = await here.submit()
            for _ in range(50):
                if "JobCompleted" in await here.read_event_types(job_id):
                    return
                await asyncio.sleep(0.02)


async def _completed(connection: Connection, store: Path, job_id: str) -> None:
    """Hear of it as another process does: the one that works has no ear for it."""
    async with run_roles_in_process(connection, store) as watcher:
        await watcher.wait_for_event(JobCompleted, job_id)
