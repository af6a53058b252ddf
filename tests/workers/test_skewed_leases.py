"""Leases after a fail-over to a primary with another clock: no takeover is late, no living holder loses its lease."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.events import EventMetadata, JobLeaseExpired, JobProgressed
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.store.command_handler import handle_command
from tests.support.role_runner import WorkerOptions, poll_until, run_roles_in_process, run_roles_subprocess

LEASE = 1.5
SKEW_MS = 120_000
PATIENT = WorkerOptions(lease_seconds=LEASE)


async def skew(db: Database, collection: str, milliseconds: int, **wanted: str) -> None:
    """Write `lease_until` as a primary would whose clock is that far ahead of this one."""
    expires = {"$add": ["$$NOW", int(LEASE * 1000) + milliseconds]}
    await db[collection].update_many(wanted, [{"$set": {"lease_until": expires}}])


@asynccontextmanager
async def clock_ahead(db: Database, collection: str) -> AsyncIterator[None]:
    """Let leases look expired inside the block, as under a primary that is two minutes ahead of the last one."""

    async def keep_on() -> None:
        while True:
            await skew(db, collection, -SKEW_MS)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(keep_on())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_lease_of_a_dead_worker_written_by_a_primary_that_is_ahead_expires_in_time(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=PATIENT) as here:
        job_id = await here.submit(not_before=datetime(2100, 1, 1, tzinfo=UTC))
        ghost = {"_id": "ghost", "fencing_token": 1, "heartbeat": 7, "seconds": LEASE, "released": False}
        await here.db.workers.insert_one({**ghost, "lease_until": datetime(2100, 1, 1, tzinfo=UTC)})
        await skew(here.db, "workers", SKEW_MS, _id="ghost")
        await handle_command(
            here.event_store, job_id, ClaimJob("ghost", datetime(2101, 1, 1, tzinfo=UTC)), meta=EventMetadata("test")
        )
        await here.wait_for_event(JobLeaseExpired, job_id, seconds=3 * LEASE + 2)
        async with asyncio.timeout(5):
            while await here.db.workers.find_one({"_id": "ghost"}):  # noqa: ASYNC110 - nobody tells us
                await asyncio.sleep(0.05)


async def test_living_worker_whose_lease_looks_expired_keeps_its_job(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=PATIENT) as here:
        job_id = await here.submit({"seconds": 2 * LEASE})
        await here.wait_for_event(JobProgressed, job_id)
        async with run_roles_in_process(connection, store, worker=PATIENT):
            async with clock_ahead(here.db, "workers"):
                job = await here.wait_until_finished(job_id)
            assert (job["status"], job["attempt"]) == ("completed", 1)
            assert "JobLeaseExpired" not in await here.read_event_types(job_id)


@pytest.mark.parametrize("ahead", [SKEW_MS, -SKEW_MS], ids=["ahead", "behind"])
async def test_leader_is_replaced_in_time_and_not_before_it_is_dead(
    connection: Connection, store: Path, ahead: int
) -> None:
    async with run_roles_in_process(connection, store) as here:
        leaders = here.db.leaders
        with run_roles_subprocess(connection, store, "projector", lease_seconds=LEASE) as first:
            await first.wait_until_started()
            async with asyncio.timeout(10):
                while (led := await leaders.find_one({"_id": "projector"})) is None:  # noqa: ASYNC110 - nobody tells us
                    await asyncio.sleep(0.05)
            async with run_roles_in_process(
                connection, store, projector=True, projector_lease_seconds=LEASE
            ) as standby:
                assert standby.projector is not None
                leadership = standby.projector._leader_election
                await poll_until(lambda: leadership._observation.was_extended, "it has heard two heartbeats")
                async with clock_ahead(here.db, "leaders"):
                    await asyncio.sleep(1.5 * LEASE)
                found = await leaders.find_one({"_id": "projector"})
                assert found is not None
                assert found["fencing_token"] == led["fencing_token"]
                first.send_signal(signal.SIGKILL)
                await first.wait_for_exit()
                await skew(here.db, "leaders", ahead, _id="projector")
                await poll_until(lambda: leadership.fencing_token > led["fencing_token"], "it leads", seconds=LEASE + 3)
