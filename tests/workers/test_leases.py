"""Leases: a worker that gives no sign of life loses its jobs, a zombie is refused, and no job is left behind."""

from __future__ import annotations

import asyncio
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import ClaimJob, CompleteJob, ExpireLease
from jobledger.ledger.domain.events import (
    EventMetadata,
    JobClaimed,
    JobCompleted,
    JobLeaseExpired,
    JobProgressed,
    WorkerFenced,
)
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.lease import EXPIRE_LEASE_UPDATE
from jobledger.ledger.store.command_handler import handle_command
from jobledger.projections.views import jobs
from jobledger.workers import lease_reaper
from jobledger.workers.lease_reaper import LeaseReaper
from tests.projections.expected_views import make_results
from tests.support.role_runner import (
    RunningRoles,
    WorkerOptions,
    poll_until,
    run_roles_in_process,
    run_roles_subprocess,
)

LEASE = 1.5
PATIENT = WorkerOptions(lease_seconds=LEASE)


async def claimed_by_a_ghost(here: RunningRoles, job_id: str, worker_id: str = "ghost") -> None:
    await handle_command(here.event_store, job_id, ClaimJob(worker_id, datetime.now(UTC)), meta=EventMetadata("test"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "frozen"])
async def test_the_jobs_of_a_dead_worker_are_done_by_another_in_time(
    connection: Connection, store: Path, end: signal.Signals
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        with run_roles_subprocess(connection, store, "worker", lease_seconds=LEASE) as other:
            await other.wait_until_started()
            job_ids = [await here.submit({"seconds": 2.5}) for _ in range(3)]
            for job_id in job_ids:
                await here.wait_for_event(JobProgressed, job_id)
            before = datetime.now(UTC)
            other.send_signal(end)
            async with run_roles_in_process(connection, store, worker=PATIENT):
                for job_id in job_ids:
                    again = await here.wait_for_event(
                        JobClaimed, job_id, predicate=lambda claimed: claimed.attempt == 2
                    )
                    assert (again.time - before).total_seconds() < LEASE + 2
                if end == signal.SIGSTOP:
                    other.send_signal(signal.SIGCONT)
                job = await here.wait_until_finished(*job_ids)
                assert (job["status"], job["attempt"], job["retries"]) == ("completed", 2, 1)
        for job_id in job_ids:
            history = await here.read_event_types(job_id)
            assert history.count("JobLeaseExpired") == history.count("JobCompleted") == 1


async def test_a_zombie_is_refused_gives_up_and_its_report_is_on_record(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(slots=1)) as here:
        job_id = await here.submit({"seconds": 60}, max_attempts=1)
        begun = await here.wait_for_event(JobProgressed, job_id)
        claimed = await here.wait_for_event(JobClaimed, job_id)
        assert isinstance(claimed.event, JobClaimed)
        # Somebody has found that its lease has run out; the worker does not know of it.
        await here.handle_commands(job_id, ExpireLease(claimed.event.worker_id, 1))
        fenced = await here.wait_for_event(WorkerFenced, job_id, after=begun.position, seconds=5)
        assert isinstance(fenced.event, WorkerFenced)
        assert fenced.event.worker_id == claimed.event.worker_id
        assert (fenced.event.attempt, fenced.event.rejected_event) == (1, "JobProgressed")
        await here.wait_for_views()
        job = await here.load_job(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "WORKER_LOST")
        assert (await here.wait_until_finished(await here.submit(), seconds=5))["status"] == "completed", (
            "the slot is not free"
        )
        assert (await here.read_event_types(job_id)).count("WorkerFenced") == 1


async def test_a_zombies_result_is_refused(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit()
        await here.claim(job_id, "zombie")
        await here.handle_commands(job_id, ExpireLease("zombie", 1))
        await here.claim(job_id, "living")
        late = await here.handle_commands(job_id, CompleteJob("zombie", 1, make_results(job_id)))
        assert [event.type for event in late] == ["WorkerFenced"]
        await here.wait_for_views()
        assert (await here.load_job(job_id))["status"] == "processing"
        assert await here.db.files.count_documents({}) == 0


async def test_the_claim_of_an_unknown_worker_is_reaped(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=PATIENT) as here:
        job_id = await here.submit({"text": "late"}, not_before=datetime(2100, 1, 1, tzinfo=UTC))
        await handle_command(
            here.event_store, job_id, ClaimJob("ghost", datetime(2101, 1, 1, tzinfo=UTC)), meta=EventMetadata("test")
        )
        await here.wait_for_event(JobLeaseExpired, job_id, seconds=5)
        assert (await here.wait_until_finished(job_id))["status"] == "completed"


async def test_a_claim_by_an_unknown_worker_that_nobody_heard_is_reaped_after_the_next_start(
    connection: Connection, store: Path
) -> None:
    """The views are behind when the worker starts: that the ghost runs a job they learn only later."""
    async with run_roles_in_process(connection, store) as here:
        job_id = await here.submit()
        await claimed_by_a_ghost(here, job_id)
        await here.submit(not_before=datetime(2100, 1, 1, tzinfo=UTC))  # or the stream would begin with the claim
        async with run_roles_in_process(connection, store, worker=PATIENT) as there:
            watch = there.worker._lease_reaper if there.worker else None
            assert watch is not None
            assert await jobs.count_running_by_worker(here.checkpoint.views) == {}
            await poll_until(lambda: bool(watch._lease_seconds), "the worker is at work")
            async with run_roles_in_process(connection, store, projector=True):
                await here.wait_for_event(JobLeaseExpired, job_id, seconds=6)
                assert (await here.wait_until_finished(job_id))["status"] == "completed"


@pytest.mark.parametrize("moment", ["before the head is read", "after the head was read", "after the document is gone"])
async def test_a_zombies_claim_while_it_is_being_reaped_is_reaped_too(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        first = await here.submit()
        await claimed_by_a_ghost(here, first)
        now = [{"$set": {"seconds": 1.0, "released": False, "lease_until": "$$NOW"}}]
        await here.db.workers.update_one({"_id": "ghost"}, now, upsert=True)
        await here.wait_for_views()
        reaping, late = asyncio.Event(), asyncio.Event()
        heard: set[str] = set()
        told = LeaseReaper._check_if_unknown

        def heard_of(watch: LeaseReaper, worker_id: str) -> None:
            told(watch, worker_id)
            heard.add(worker_id)

        async def pause() -> None:
            if not reaping.is_set():
                reaping.set()
                await late.wait()

        monkeypatch.setattr(LeaseReaper, "_check_if_unknown", heard_of)
        async with run_roles_in_process(connection, store, worker=WorkerOptions(slots=1, lease_seconds=LEASE)) as there:
            assert there.worker is not None
            watch = there.worker._lease_reaper
            head, held_by, reap = there.event_store.head_position, jobs.find_jobs_of_worker, watch._reap

            async def slow_head() -> int:
                await pause()
                return await head()

            async def slow_held_by(*arguments: object) -> object:
                found = await held_by(*arguments)  # type: ignore[arg-type]
                if arguments[1] == "ghost":
                    await pause()
                return found

            async def slow_reap(worker_id: str, worker: Any, *, is_released: bool) -> None:
                await reap(worker_id, worker, is_released=is_released)
                if worker_id == "ghost":
                    await pause()

            if moment == "before the head is read":
                monkeypatch.setattr(there.event_store, "head_position", slow_head)
            elif moment == "after the head was read":
                monkeypatch.setattr("jobledger.workers.lease_reaper.jobs.find_jobs_of_worker", slow_held_by)
            else:
                monkeypatch.setattr(watch, "_reap", slow_reap)
            async with asyncio.timeout(10):
                await reaping.wait()
            third = await here.submit(not_before=datetime(2100, 1, 1, tzinfo=UTC))
            await handle_command(
                here.event_store, third, ClaimJob("ghost", datetime(2101, 1, 1, tzinfo=UTC)), meta=EventMetadata("test")
            )
            await poll_until(lambda: "ghost" in heard, "the worker has heard of the late claim")
            late.set()
            await here.wait_for_event(JobLeaseExpired, third, seconds=8)
            for job_id in (first, third):
                await here.wait_for_event(JobCompleted, job_id, seconds=8)


async def workers_are(here: RunningRoles, count: int) -> None:
    async with asyncio.timeout(5):
        while await here.db[lease_reaper.COLLECTION].count_documents({}) != count:  # noqa: ASYNC110 - nobody tells us
            await asyncio.sleep(0.05)


async def test_the_document_of_a_worker_that_stopped_in_good_order_is_cleared_away(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=PATIENT) as here:
        async with run_roles_in_process(connection, store, worker=PATIENT):
            await workers_are(here, 2)
        await workers_are(here, 1)


async def test_a_worker_that_lost_its_lease_goes_on_under_a_new_name(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(slots=1, lease_seconds=1)
    ) as here:
        job_id = await here.submit({"seconds": 2})
        await here.wait_for_event(JobProgressed, job_id)
        assert here.worker is not None
        first = here.worker.worker_id
        await here.db.workers.update_one({"_id": first}, EXPIRE_LEASE_UPDATE)
        job = await here.wait_until_finished(job_id)
        assert (job["status"], job["attempt"]) == ("completed", 2)
        assert job["worker_id"] == here.worker.worker_id != first
