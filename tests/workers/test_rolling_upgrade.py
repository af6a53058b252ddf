"""Tests of rolling upgrades: roles of this version continue when a later version has written to the log."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

from pydantic import create_model

from jobledger.ledger.domain.events import Event, EventMetadata, JobCompleted, JobSubmitted
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine import stalls
from jobledger.projections.engine.projector import Projector
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, make_echo_job, run_roles_in_process

UNKNOWN: type[Event] = create_model("JobRepainted", __base__=Event, colour=(str, ...))
RED = UNKNOWN.model_validate({"colour": "red"})
NEWER = create_model("JobSubmitted", __base__=JobSubmitted)
NEWER.schema_version = JobSubmitted.schema_version + 1


async def append_blindly(event_store: EventStore, stream: str, event: Event) -> None:
    """Append to a stream without decoding its events."""
    events = await event_store.read_stream(stream)
    head = StreamHead(events[-1].version, events[-1].position, events[-1].hash) if events else StreamHead()
    await event_store.append(StreamAppend(stream, head, [event], EventMetadata("user:tomorrow"), datetime.now(UTC)))


async def test_projector_skips_streams_of_unknown_kind(connection: Connection, tmp_path: Path) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as roles:
        await append_blindly(roles.event_store, "painting-1", RED)
        job_id = await roles.submit()
        assert roles.projector_task is not None
        projector_task = roles.projector_task
        await poll_until(lambda: projector_task.done() or roles.checkpoint.position == 2, "the views are up to date")
        assert (await roles.load_job(job_id))["status"] == "pending"
        assert roles.checkpoint.position == 2


async def test_projector_stops_before_an_unreadable_event(connection: Connection, tmp_path: Path) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as roles:
        job_id = await roles.submit()
        await roles.wait_for_views()
        before = await roles.load_job(job_id)
    async with run_roles_in_process(connection, tmp_path) as roles:
        await append_blindly(roles.event_store, job_id, RED)
        await roles.submit()
    async with run_roles_in_process(connection, tmp_path) as roles:
        projector = Projector(roles.db, roles.event_store, connection, roles.checkpoint, holder="this-version")
        projector_task = asyncio.create_task(projector.run())

        async def is_stalled() -> bool:
            return "At position 2 of the log" in await stalls.find_stall_reason(roles.db, 1, 3)

        await poll_until(is_stalled, "the projector reports why it waits")
        assert not projector_task.done(), "the projector waits for a later version"
        projector_task.cancel()
        await asyncio.gather(projector_task, return_exceptions=True)
        assert roles.checkpoint.position == 1
        assert await roles.load_job(job_id) == before


async def test_worker_skips_an_unreadable_job_and_runs_others(connection: Connection, tmp_path: Path) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as roles:
        unreadable, readable = await roles.submit(), await roles.submit()
        await roles.wait_for_views()
    async with run_roles_in_process(connection, tmp_path) as roles:
        await append_blindly(roles.event_store, unreadable, RED)
    async with run_roles_in_process(connection, tmp_path, worker=WorkerOptions(), is_worker_process=True) as roles:
        await _wait_for_completion(connection, tmp_path, readable)
        assert await roles.read_event_types(unreadable) == ["JobSubmitted", "JobRepainted"]
        assert roles.worker_task is not None
        assert not roles.worker_task.done()


async def test_worker_skips_an_unreadable_submission_and_runs_others(connection: Connection, tmp_path: Path) -> None:
    async with run_roles_in_process(connection, tmp_path, worker=WorkerOptions(), is_worker_process=True) as roles:
        await _wait_until_worker_completes_a_job(roles)
        await append_blindly(roles.event_store, create_job_id(), NEWER.model_validate(make_echo_job().to_payload()))
        await _wait_until_worker_completes_a_job(roles)
        assert roles.worker_task is not None
        assert not roles.worker_task.done()


async def _wait_until_worker_completes_a_job(roles: RunningRoles) -> None:
    """Submit jobs until one completes. Without a projector, an idle worker finds only jobs submitted from now on."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            job_id = await roles.submit()
            for _ in range(50):
                if "JobCompleted" in await roles.read_event_types(job_id):
                    return
                await asyncio.sleep(0.02)


async def _wait_for_completion(connection: Connection, store: Path, job_id: str) -> None:
    """Wait as another process: the worker's process does not receive events of this type."""
    async with run_roles_in_process(connection, store) as observer:
        await observer.wait_for_event(JobCompleted, job_id)
