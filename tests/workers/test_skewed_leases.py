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
from jobledger.ledger.domain.events import JobLeaseExpired, JobProgressed, Meta
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.store.command_handler import handle
from tests.support.running import WorkerOptions, process, real_process, until

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
    async with process(connection, store, projector=True, worker=PATIENT) as here:
        job_id = await here.submit(not_before=datetime(2100, 1, 1, tzinfo=UTC))
        ghost = {"_id": "ghost", "epoch": 1, "beat": 7, "seconds": LEASE, "released": False}
        await here.db.workers.insert_one({**ghost, "lease_until": datetime(2100, 1, 1, tzinfo=UTC)})
        await skew(here.db, "workers", SKEW_MS, _id="ghost")
        await handle(here.log, job_id, ClaimJob("ghost", datetime(2101, 1, 1, tzinfo=UTC)), meta=Meta("test"))
        await here.heard(JobLeaseExpired, job_id, seconds=3 * LEASE + 2)
        async with asyncio.timeout(5):
            while await here.db.workers.find_one({"_id": "ghost"}):  # noqa: ASYNC110 - nobody tells us
                await asyncio.sleep(0.05)


async def test_living_worker_whose_lease_looks_expired_keeps_its_job(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True, worker=PATIENT) as here:
        job_id = await here.submit({"seconds": 2 * LEASE})
        await here.heard(JobProgressed, job_id)
        async with process(connection, store, worker=PATIENT):
            async with clock_ahead(here.db, "workers"):
                job = await here.ended(job_id)
            assert (job["status"], job["attempt"]) == ("completed", 1)
            assert "JobLeaseExpired" not in await here.history(job_id)


@pytest.mark.parametrize("ahead", [SKEW_MS, -SKEW_MS], ids=["ahead", "behind"])
async def test_leader_is_replaced_in_time_and_not_before_it_is_dead(
    connection: Connection, store: Path, ahead: int
) -> None:
    async with process(connection, store) as here:
        leaders = here.db.leaders
        with real_process(connection, store, "projector", lease_seconds=LEASE) as first:
            await first.started()
            async with asyncio.timeout(10):
                while (led := await leaders.find_one({"_id": "projector"})) is None:  # noqa: ASYNC110 - nobody tells us
                    await asyncio.sleep(0.05)
            async with process(connection, store, projector=True, projector_lease_seconds=LEASE) as standby:
                assert standby.projector is not None
                leadership = standby.projector._leadership
                await until(lambda: leadership._seen.alive, "it has heard two heartbeats")
                async with clock_ahead(here.db, "leaders"):
                    await asyncio.sleep(1.5 * LEASE)
                found = await leaders.find_one({"_id": "projector"})
                assert found is not None
                assert found["epoch"] == led["epoch"]
                first.send(signal.SIGKILL)
                await first.gone()
                await skew(here.db, "leaders", ahead, _id="projector")
                await until(lambda: leadership.epoch > led["epoch"], "it leads", seconds=LEASE + 3)
