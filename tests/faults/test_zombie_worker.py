"""SIGSTOP and kill -9 on a worker at work: another takes its jobs over in time; what a zombie says of them is void."""

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
from tests.support.driver_hooks import is_suspended
from tests.support.history_check import check_history
from tests.support.job_processes import list_job_processes
from tests.support.ledger_setup import load_event_documents
from tests.support.role_runner import (
    RolesSubprocess,
    RunningRoles,
    poll_until,
    run_roles_in_process,
    run_roles_subprocess,
)
from tests.support.slow_site import SlowSite, serve_site
from tests.support.soak_only import soak_only
from tests.support.zombie_worker import run_zombie_worker

LEASE_SECONDS = 2.0
DEFAULT_LEASE_SECONDS = 10.0
PROMISE = timedelta(seconds=2)  # after the lease, counted from the last heartbeat


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Connection:
    return Connection(mongodb_uri, db_name)


Start = Callable[..., AbstractContextManager[RolesSubprocess]]


def real_worker(connection: Connection, store: Path, **options: Any) -> AbstractContextManager[RolesSubprocess]:
    return run_roles_subprocess(connection, store, "worker", **options)


class Gate:
    """What a site waits for. The first who asks for `/mute` is never answered."""

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


async def begun(here: RunningRoles, site: SlowSite, kind: str, seconds: float = 8) -> list[str]:
    """Submit jobs and wait until they are worked on; the first of them will have something to say soon."""
    if kind == "inline":
        job_id = await here.submit({"seconds": seconds})
        await here.wait_for_event(JobProgressed, job_id)
        return [job_id]
    job_ids = [await here.submit(site.job_parameters(path), job_type="session") for path in ("/talk", "/mute")]
    async with asyncio.timeout(30):
        for _ in job_ids:
            await site.requested_paths.get()
    return job_ids


async def signalled(here: RunningRoles, worker: RolesSubprocess, number: signal.Signals) -> Document:
    """Send a signal right after a heartbeat, so that none is on its way; return the lease as it stays from then on."""
    before, lease = None, None
    async with asyncio.timeout(DEFAULT_LEASE_SECONDS):
        while before is None or lease == before:
            await asyncio.sleep(0.005)
            before, lease = lease, await here.db.workers.find_one({"pid": worker.pid})
    worker.send_signal(number)
    assert lease is not None
    return lease


async def taken_over(here: RunningRoles, job_id: str, lease: Document) -> None:
    """Wait until another worker has claimed the job: not before the lease has run out, and soon after that."""
    again = await here.wait_for_event(JobClaimed, job_id, predicate=lambda claimed: claimed.attempt == 2)
    expired = await here.wait_for_event(JobLeaseExpired, job_id)
    assert again.event.model_dump()["worker_id"] != lease["_id"]
    assert lease["lease_until"] <= expired.time <= again.time <= lease["lease_until"] + PROMISE


@pytest.mark.parametrize(
    ("kind", "start"),
    [("inline", run_zombie_worker), ("child", real_worker)],
    ids=["inline, speaks before it hears", "child, as it comes"],
)
async def test_a_frozen_worker_loses_its_jobs_and_when_it_thaws_nothing_it_says_of_them_counts(
    connection: Connection, tmp_path: Path, gate: Gate, site: SlowSite, kind: str, start: Start
) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as here:
        with start(connection, tmp_path, lease_seconds=LEASE_SECONDS) as frozen:
            await frozen.wait_until_started()
            job_ids = await begun(here, site, kind)
            with real_worker(connection, tmp_path, lease_seconds=LEASE_SECONDS) as other:
                await other.wait_until_started()
                lease = await signalled(here, frozen, signal.SIGSTOP)
                for job_id in job_ids:
                    await taken_over(here, job_id, lease)
                gate.opened.set()
                await here.wait_until_finished(*job_ids)
                assert is_suspended(frozen.pid)
                assert bool(list_job_processes(frozen)) == (kind == "child"), "one was never answered"
                other.send_signal(signal.SIGTERM)
                await other.wait_for_exit()

            frozen.send_signal(signal.SIGCONT)
            await poll_until(lambda: not list_job_processes(frozen), "the children are gone", seconds=5)
            if start is run_zombie_worker:
                fenced = await here.wait_for_event(WorkerFenced, job_ids[0])
                assert isinstance(fenced.event, WorkerFenced)
                assert (fenced.event.worker_id, fenced.event.attempt) == (lease["_id"], 1)
            await does_other_jobs(here, frozen, site, lease)

        for job_id in job_ids:
            history = await here.read_event_types(job_id)
            assert (history.count("JobClaimed"), history.count("JobCompleted")) == (2, 1)
            # As a rule the other kind is silent; but who knows what the kernel lets run first.
            assert history.count("WorkerFenced") <= 2
        check_history(await load_event_documents(here.db), all_finished=True)


async def does_other_jobs(here: RunningRoles, worker: RolesSubprocess, site: SlowSite, lost: Document) -> None:
    """Inline and in a child, under a lease other than the one it lost."""
    async with asyncio.timeout(DEFAULT_LEASE_SECONDS):
        while not await here.db.workers.find_one({"pid": worker.pid, "_id": {"$ne": lost["_id"]}}):  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    lease = None
    async with asyncio.timeout(10):
        while lease is None:
            await asyncio.sleep(0.02)
            lease = await here.db.workers.find_one({"pid": worker.pid, "_id": {"$ne": lost["_id"]}})
    job_ids = [await here.submit(), await here.submit(site.job_parameters(), job_type="session")]
    await here.wait_until_finished(*job_ids)
    for job_id in job_ids:
        job = await here.load_job(job_id)
        assert (job["status"], job["attempt"], job["worker_id"]) == ("completed", 1, lease["_id"])


@soak_only
async def test_the_jobs_of_a_killed_worker_are_taken_over_in_time_with_the_lease_that_is_the_default(
    connection: Connection, tmp_path: Path, site: SlowSite
) -> None:
    async with run_roles_in_process(connection, tmp_path, projector=True) as here:
        with real_worker(connection, tmp_path) as killed:
            await killed.wait_until_started()
            job_ids = await begun(here, site, "inline", 60) + await begun(here, site, "child")
            with real_worker(connection, tmp_path) as other:
                await other.wait_until_started()
                lease = await signalled(here, killed, signal.SIGKILL)
                assert lease["seconds"] == DEFAULT_LEASE_SECONDS
                for job_id in job_ids:
                    await taken_over(here, job_id, lease)
        check_history(await load_event_documents(here.db))
