"""Tests of leases after a failover to a primary with another clock.

No takeover is late, and no live holder loses its lease.
"""

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
from tests.support.polling import poll_until
from tests.support.role_runner import WorkerOptions, run_roles_in_process, run_roles_subprocess

LEASE = 1.5
SKEW_MS = 120_000
OPTIONS = WorkerOptions(lease_seconds=LEASE)


async def write_skewed_leases(db: Database, collection: str, milliseconds: int, **query: str) -> None:
    """Write `lease_until` as a primary would whose clock is ahead by `milliseconds`."""
    expires = {"$add": ["$$NOW", int(LEASE * 1000) + milliseconds]}
    await db[collection].update_many(query, [{"$set": {"lease_until": expires}}])


@asynccontextmanager
async def clock_ahead(db: Database, collection: str) -> AsyncIterator[None]:
    """Make leases look expired inside the block, as with a primary that is two minutes ahead of the previous one."""

    async def write_repeatedly() -> None:
        while True:
            await write_skewed_leases(db, collection, -SKEW_MS)
            await asyncio.sleep(0.02)

    task = asyncio.create_task(write_repeatedly())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_lease_written_by_a_primary_ahead_expires_in_time(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_id = await roles.submit(not_before=datetime(2100, 1, 1, tzinfo=UTC))
        ghost = {"_id": "ghost", "fencing_token": 1, "heartbeat": 7, "seconds": LEASE, "released": False}
        await roles.db.workers.insert_one({**ghost, "lease_until": datetime(2100, 1, 1, tzinfo=UTC)})
        await write_skewed_leases(roles.db, "workers", SKEW_MS, _id="ghost")
        await handle_command(
            roles.event_store, job_id, ClaimJob("ghost", datetime(2101, 1, 1, tzinfo=UTC)), meta=EventMetadata("test")
        )
        await roles.wait_for_event(JobLeaseExpired, job_id)

        async def is_removed() -> bool:
            return await roles.db.workers.find_one({"_id": "ghost"}) is None

        await poll_until(is_removed, "the document of the worker is removed")


async def test_live_worker_whose_lease_looks_expired_keeps_its_job(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_id = await roles.submit({"seconds": 2 * LEASE})
        await roles.wait_for_event(JobProgressed, job_id)
        async with run_roles_in_process(connection, store, worker=OPTIONS):
            async with clock_ahead(roles.db, "workers"):
                job = await roles.wait_until_finished(job_id)
            assert (job["status"], job["attempt"]) == ("completed", 1)
            assert "JobLeaseExpired" not in await roles.read_event_types(job_id)


@pytest.mark.parametrize("ahead", [SKEW_MS, -SKEW_MS], ids=["ahead", "behind"])
async def test_leader_is_replaced_only_after_it_crashed_and_in_time(
    connection: Connection, store: Path, ahead: int
) -> None:
    async with run_roles_in_process(connection, store) as roles:
        leaders = roles.db.leaders
        with run_roles_subprocess(connection, store, "projector", lease_seconds=LEASE) as first:
            await first.wait_until_started()
            await poll_until(lambda: leaders.find_one({"_id": "projector"}), "the first projector leads")
            leader = await leaders.find_one({"_id": "projector"})
            assert leader is not None
            async with run_roles_in_process(
                connection, store, projector=True, projector_lease_seconds=LEASE
            ) as standby:
                assert standby.projector is not None
                election = standby.projector._leader_election
                await poll_until(lambda: election._observation.was_extended, "the standby has observed two heartbeats")
                async with clock_ahead(roles.db, "leaders"):
                    await asyncio.sleep(1.5 * LEASE)
                current = await leaders.find_one({"_id": "projector"})
                assert current is not None
                assert current["fencing_token"] == leader["fencing_token"]
                first.send_signal(signal.SIGKILL)
                await first.wait_for_exit()
                await write_skewed_leases(roles.db, "leaders", ahead, _id="projector")
                await poll_until(lambda: election.fencing_token > leader["fencing_token"], "the standby leads")
