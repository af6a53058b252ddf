"""The database away for longer than a lease: nobody is to blame, so no job is taken from the worker that runs it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobledger.ledger.domain.events import JobClaimed, JobProgressed
from jobledger.ledger.mongo.connection import Connection
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.replica_set import ReplicaSet
from tests.support.role_runner import run_roles_in_process, run_roles_subprocess

pytestmark = [needs_local_mongod, pytest.mark.timeout(180)]

LEASE = 2.0
JOBS = 9


@pytest.fixture
def replica_set(tmp_path: Path) -> Iterator[ReplicaSet]:
    with ReplicaSet(tmp_path / "replica-set") as replica_set:
        yield replica_set


@pytest.mark.parametrize("away", ["killed", "frozen"])
async def test_an_outage_of_several_leases_costs_no_attempt_and_a_death_in_it_is_noticed(
    replica_set: ReplicaSet, tmp_path: Path, away: str
) -> None:
    connection, store = Connection(replica_set.uri, "test"), tmp_path / "store"
    store.mkdir()
    with (
        run_roles_subprocess(connection, store, "worker", "projector", lease_seconds=LEASE) as first,
        run_roles_subprocess(connection, store, "worker", lease_seconds=LEASE) as second,
        run_roles_subprocess(connection, store, "worker", lease_seconds=LEASE) as third,
    ):
        for real in (first, second, third):
            await real.wait_until_started()
        async with run_roles_in_process(connection, store) as here:
            job_ids = [await here.submit({"seconds": 12}) for _ in range(JOBS)]
            for job_id in job_ids:
                await here.wait_for_event(JobProgressed, job_id)
            claims = [await here.wait_for_event(JobClaimed, job_id) for job_id in job_ids]
            holders = [claim.data["worker_id"] for claim in claims]
            mortal = next(it for it in (second, third) if any(f"-{it.pid}-" in holder for holder in holders))
            for node in replica_set.nodes:
                replica_set.kill(node) if away == "killed" else replica_set.suspend(node)
            mortal.send_signal(signal.SIGKILL)
            await asyncio.sleep(3 * LEASE)
            for node in replica_set.nodes:
                replica_set.restart_node(node) if away == "killed" else replica_set.resume(node)
            await asyncio.to_thread(replica_set.wait_until_in_sync)
            await here.wait_until_finished(*job_ids, seconds=60)
            jobs = [await here.load_job(job_id) for job_id in job_ids]
            histories = [await here.read_event_types(job_id) for job_id in job_ids]
    assert any(f"-{mortal.pid}-" not in holder for holder in holders), "others have had jobs, too"
    for job, history, holder in zip(jobs, histories, holders, strict=True):
        assert job["status"] == "completed"
        expired = int(f"-{mortal.pid}-" in holder)
        assert history.count("JobLeaseExpired") == expired, (away, history)
        assert (job["attempt"], job["retries"]) == (1 + expired, expired)
        assert "WorkerFenced" not in history
