"""An outage of the database for longer than a lease takes no job from a worker that still runs."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import pytest

from jobledger.ledger.domain.events import JobClaimed, JobProgressed
from jobledger.ledger.mongo.connection import Connection
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.replica_set import ReplicaSet
from tests.support.role_runner import run_roles_in_process, run_roles_subprocess

pytestmark = [needs_local_mongod, pytest.mark.timeout(180)]

LEASE_SECONDS = 2.0
JOBS = 9


@pytest.mark.parametrize("fault", ["killed", "suspended"])
async def test_outage_of_several_leases_expires_only_the_lease_of_a_killed_worker(
    replica_set: ReplicaSet, tmp_path: Path, fault: str
) -> None:
    connection, store = Connection(replica_set.uri, "test"), tmp_path / "store"
    store.mkdir()
    with (
        run_roles_subprocess(connection, store, "worker", "projector", lease_seconds=LEASE_SECONDS) as first,
        run_roles_subprocess(connection, store, "worker", lease_seconds=LEASE_SECONDS) as second,
        run_roles_subprocess(connection, store, "worker", lease_seconds=LEASE_SECONDS) as third,
    ):
        for process in (first, second, third):
            await process.wait_until_started()
        async with run_roles_in_process(connection, store) as roles:
            job_ids = [await roles.submit({"seconds": 12}) for _ in range(JOBS)]
            for job_id in job_ids:
                await roles.wait_for_event(JobProgressed, job_id)
            claims = [await roles.wait_for_event(JobClaimed, job_id) for job_id in job_ids]
            holders = [claim.data["worker_id"] for claim in claims]
            victim = next(
                worker for worker in (second, third) if any(f"-{worker.pid}-" in holder for holder in holders)
            )
            for node in replica_set.nodes:
                replica_set.kill(node) if fault == "killed" else replica_set.suspend(node)
            victim.send_signal(signal.SIGKILL)
            await asyncio.sleep(3 * LEASE_SECONDS)
            for node in replica_set.nodes:
                replica_set.restart_node(node) if fault == "killed" else replica_set.resume(node)
            await asyncio.to_thread(replica_set.wait_until_in_sync)
            await roles.wait_until_finished(*job_ids, seconds=90)
            jobs = [await roles.load_job(job_id) for job_id in job_ids]
            histories = [await roles.read_event_types(job_id) for job_id in job_ids]
    assert any(f"-{victim.pid}-" not in holder for holder in holders), "other workers have jobs, too"
    for job, history, holder in zip(jobs, histories, holders, strict=True):
        assert job["status"] == "completed"
        expired = int(f"-{victim.pid}-" in holder)
        assert history.count("JobLeaseExpired") == expired, (fault, history)
        assert (job["attempt"], job["retries"]) == (1 + expired, expired)
        assert "WorkerFenced" not in history
