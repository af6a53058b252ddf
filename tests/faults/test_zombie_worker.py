"""SIGSTOP and SIGKILL for a worker that runs jobs: another takes them over in time. Events of a zombie are rejected."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.events import JobClaimed, JobLeaseExpired, JobProgressed, WorkerFenced
from jobledger.ledger.mongo.connection import Connection, Document
from tests.support.history_check import check_history
from tests.support.job_processes import list_job_processes
from tests.support.ledger_setup import load_event_documents
from tests.support.polling import poll_until
from tests.support.role_runner import RolesSubprocess, RunningRoles, run_roles_in_process, run_roles_subprocess
from tests.support.slow_site import SlowSite, serve_site
from tests.support.soak_only import soak_only
from tests.support.suspension import is_suspended
from tests.support.zombie_worker import run_zombie_worker

LEASE_SECONDS = 2.0
DEFAULT_LEASE_SECONDS = 10.0
TAKEOVER_LIMIT = timedelta(seconds=2)  # after the lease, counted from the last heartbeat
NOISE = timedelta(seconds=5)  # for a loaded machine, not a promise
WorkerFactory = Callable[..., AbstractContextManager[RolesSubprocess]]


def run_usual_worker(connection: Connection, store: Path, **options: Any) -> AbstractContextManager[RolesSubprocess]:
    return run_roles_subprocess(connection, store, "worker", **options)


class Gate:
    """Holds the responses of a site until it is opened. The first request for `/mute` never gets a response."""

    def __init__(self) -> None:
        self.opened = asyncio.Event()
        self._muted = False

    async def __call__(self, path: str) -> None:
        if path == "/mute" and not self._muted:
            self._muted = True
            await asyncio.Event().wait()
        await self.opened.wait()


@pytest.fixture
async def gate() -> Gate:
    return Gate()


@pytest.fixture
async def site(gate: Gate) -> AsyncIterator[SlowSite]:
    async with serve_site(SlowSite(gate)) as site:
        yield site


async def start_jobs(roles: RunningRoles, site: SlowSite, kind: str, seconds: float = 8) -> list[str]:
    """Submit jobs and wait until they run. The first of them soon appends an event."""
    if kind == "inline":
        job_id = await roles.submit({"seconds": seconds})
        await roles.wait_for_event(JobProgressed, job_id)
        return [job_id]
    job_ids = [await roles.submit(site.job_parameters(path), job_type="session") for path in ("/talk", "/mute")]
    async with asyncio.timeout(60):
        for _ in job_ids:
            await site.requested_paths.get()
    return job_ids


async def send_signal_after_heartbeat(roles: RunningRoles, worker: RolesSubprocess, number: signal.Signals) -> Document:
    """Send a signal right after a heartbeat, so that none is in flight. Return the lease, which no longer changes."""
    before, lease = None, None
    async with asyncio.timeout(DEFAULT_LEASE_SECONDS):
        while before is None or lease == before:
            await asyncio.sleep(0.005)
            before, lease = lease, await roles.db.workers.find_one({"pid": worker.pid})
    worker.send_signal(number)
    assert lease is not None
    return lease


async def wait_for_takeover(roles: RunningRoles, job_id: str, lease: Document) -> None:
    """Wait until another worker claims the job. Check that this is after the lease expired, and soon."""
    second_claim = await roles.wait_for_event(JobClaimed, job_id, predicate=lambda claimed: claimed.attempt == 2)
    expired = await roles.wait_for_event(JobLeaseExpired, job_id)
    assert second_claim.event.model_dump()["worker_id"] != lease["_id"]
    assert lease["lease_until"] <= expired.time <= second_claim.time <= lease["lease_until"] + TAKEOVER_LIMIT + NOISE


@pytest.mark.parametrize(
    ("kind", "start"),
    [("inline", run_zombie_worker), ("child", run_usual_worker)],
    ids=["inline job, zombie appends before its heartbeat", "job processes, usual worker"],
)
async def test_suspended_worker_loses_its_jobs_and_is_fenced_after_it_resumes(
    connection: Connection, tmp_path: Path, gate: Gate, site: SlowSite, kind: str, start: WorkerFactory
) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as roles:
        with start(connection, tmp_path, lease_seconds=LEASE_SECONDS) as suspended:
            await suspended.wait_until_started()
            job_ids = await start_jobs(roles, site, kind)
            with run_usual_worker(connection, tmp_path, lease_seconds=LEASE_SECONDS) as other:
                await other.wait_until_started()
                lease = await send_signal_after_heartbeat(roles, suspended, signal.SIGSTOP)
                for job_id in job_ids:
                    await wait_for_takeover(roles, job_id, lease)
                gate.opened.set()
                await roles.wait_until_finished(*job_ids)
                assert is_suspended(suspended.pid)
                assert bool(list_job_processes(suspended)) == (kind == "child"), "the request for /mute got no response"
                other.send_signal(signal.SIGTERM)
                await other.wait_for_exit()

            suspended.send_signal(signal.SIGCONT)
            await poll_until(lambda: not list_job_processes(suspended), "the job processes exited")
            if start is run_zombie_worker:
                fenced = await roles.wait_for_event(WorkerFenced, job_ids[0])
                assert isinstance(fenced.event, WorkerFenced)
                assert (fenced.event.worker_id, fenced.event.attempt) == (lease["_id"], 1)
            await check_runs_other_jobs(roles, suspended, site, lease)

        for job_id in job_ids:
            history = await roles.read_event_types(job_id)
            assert (history.count("JobClaimed"), history.count("JobCompleted")) == (2, 1)
            # Usually only the zombie is fenced, but the order in which the kernel runs threads is not certain.
            assert history.count("WorkerFenced") <= 2
        check_history(await load_event_documents(roles.db), all_finished=True)


async def check_runs_other_jobs(
    roles: RunningRoles, worker: RolesSubprocess, site: SlowSite, lost_lease: Document
) -> None:
    """Check that a worker runs an inline job and one in a job process under a new lease."""
    lease = None
    try:
        async with asyncio.timeout(60):
            while lease is None:
                await asyncio.sleep(0.02)
                lease = await roles.db.workers.find_one({"pid": worker.pid, "_id": {"$ne": lost_lease["_id"]}})
    except TimeoutError:
        await worker.print_stacks()
        raise
    job_ids = [await roles.submit(), await roles.submit(site.job_parameters(), job_type="session")]
    await roles.wait_until_finished(*job_ids)
    for job_id in job_ids:
        job = await roles.load_job(job_id)
        assert (job["status"], job["attempt"], job["worker_id"]) == ("completed", 1, lease["_id"])


@soak_only
async def test_jobs_of_a_killed_worker_are_taken_over_after_the_default_lease(
    connection: Connection, tmp_path: Path, site: SlowSite
) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as roles:
        with run_usual_worker(connection, tmp_path) as killed:
            await killed.wait_until_started()
            job_ids = await start_jobs(roles, site, "inline", 60) + await start_jobs(roles, site, "child")
            with run_usual_worker(connection, tmp_path) as other:
                await other.wait_until_started()
                lease = await send_signal_after_heartbeat(roles, killed, signal.SIGKILL)
                assert lease["seconds"] == DEFAULT_LEASE_SECONDS
                for job_id in job_ids:
                    await wait_for_takeover(roles, job_id, lease)
        check_history(await load_event_documents(roles.db))
