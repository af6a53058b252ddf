"""Tests of the lease reaper: a worker without heartbeats loses its jobs, and other workers take them over.

A worker that continues after its lease expired (a zombie) is rejected.
"""

from __future__ import annotations

import asyncio
import signal
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import ClaimJob, ExpireLease
from jobledger.ledger.domain.errors import StreamBusy
from jobledger.ledger.domain.events import (
    EventMetadata,
    JobClaimed,
    JobCompleted,
    JobLeaseExpired,
    JobProgressed,
    WorkerFenced,
)
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.lease import EXPIRE_LEASE_UPDATE, WORKERS_COLLECTION
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.views import job_list
from jobledger.workers import lease_reaper
from jobledger.workers.lease_reaper import LeaseReaper
from tests.projections.expected_views import make_results
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process, run_roles_subprocess
from tests.support.worker_reports import report_results

LEASE = 1.5
MAX_DELAY_SECONDS = 10.0  # on a busy machine
OPTIONS = WorkerOptions(lease_seconds=LEASE)


async def claim_as(roles: RunningRoles, job_id: str, worker_id: str = "ghost") -> None:
    await handle_command(roles.event_store, job_id, ClaimJob(worker_id, datetime.now(UTC)), meta=EventMetadata("test"))


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_jobs_of_crashed_worker_are_claimed_by_others_in_time(
    connection: Connection, store: Path, end: signal.Signals
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        with run_roles_subprocess(connection, store, "worker", lease_seconds=LEASE) as dead:
            await dead.wait_until_started()
            job_ids = [await roles.submit({"seconds": 5}) for _ in range(3)]  # they run when the worker dies
            for job_id in job_ids:
                await roles.wait_for_event(JobProgressed, job_id)
            ended_at = datetime.now(UTC)
            dead.send_signal(end)
            async with run_roles_in_process(connection, store, worker=OPTIONS):
                for job_id in job_ids:
                    reclaimed = await roles.wait_for_event(
                        JobClaimed, job_id, predicate=lambda claimed: claimed.attempt == 2
                    )
                    assert (reclaimed.time - ended_at).total_seconds() < LEASE + MAX_DELAY_SECONDS
                if end == signal.SIGSTOP:
                    dead.send_signal(signal.SIGCONT)
                job = await roles.wait_until_finished(*job_ids)
                assert (job["status"], job["attempt"], job["retries"]) == ("completed", 2, 1)
        for job_id in job_ids:
            history = await roles.read_event_types(job_id)
            assert history.count("JobLeaseExpired") == history.count("JobCompleted") == 1


async def test_fenced_worker_is_rejected_stops_and_is_recorded(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(max_concurrent=1)) as roles:
        job_id = await roles.submit({"seconds": 60}, max_attempts=1)
        progressed = await roles.wait_for_event(JobProgressed, job_id)
        claimed = await roles.wait_for_event(JobClaimed, job_id)
        assert isinstance(claimed.event, JobClaimed)
        # Another process finds that the lease expired. The worker does not know.
        await roles.handle_commands(job_id, ExpireLease(claimed.event.worker_id, 1))
        fenced = await roles.wait_for_event(WorkerFenced, job_id, after=progressed.position)
        assert isinstance(fenced.event, WorkerFenced)
        assert fenced.event.worker_id == claimed.event.worker_id
        assert (fenced.event.attempt, fenced.event.rejected_event) == (1, "JobProgressed")
        await roles.wait_for_views()
        job = await roles.load_job(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "WORKER_LOST")
        assert (await roles.wait_until_finished(await roles.submit()))["status"] == "completed", "the slot must be free"
        assert (await roles.read_event_types(job_id)).count("WorkerFenced") == 1


async def test_result_of_fenced_worker_is_rejected(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit()
        await roles.claim(job_id, "zombie")
        await roles.handle_commands(job_id, ExpireLease("zombie", 1))
        await roles.claim(job_id, "successor")
        rejected = await roles.handle_commands(job_id, report_results("zombie", 1, make_results(job_id)))
        assert [event.type for event in rejected] == ["WorkerFenced"]
        await roles.wait_for_views()
        assert (await roles.load_job(job_id))["status"] == "processing"
        assert await roles.db.files.count_documents({}) == 0


async def test_claim_of_unknown_worker_is_reaped(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        job_id = await roles.submit({"text": "late"}, not_before=datetime(2100, 1, 1, tzinfo=UTC))
        await handle_command(
            roles.event_store, job_id, ClaimJob("ghost", datetime(2101, 1, 1, tzinfo=UTC)), meta=EventMetadata("test")
        )
        await roles.wait_for_event(JobLeaseExpired, job_id)
        assert (await roles.wait_until_finished(job_id))["status"] == "completed"


async def test_claim_of_unknown_worker_before_the_start_is_reaped(connection: Connection, store: Path) -> None:
    """The views lag when the worker starts. They contain the claim of the unknown worker only later."""
    async with run_roles_in_process(connection, store) as roles:
        job_id = await roles.submit()
        await claim_as(roles, job_id)
        await roles.submit(
            not_before=datetime(2100, 1, 1, tzinfo=UTC)
        )  # otherwise the change stream would begin with the claim
        async with run_roles_in_process(connection, store, worker=OPTIONS) as worker_roles:
            reaper = worker_roles.worker._lease_reaper if worker_roles.worker else None
            assert reaper is not None
            assert await job_list.count_running_by_worker(roles.checkpoint.views) == {}
            await poll_until(lambda: bool(reaper._live_workers), "the worker has started")
            async with run_roles_in_process(connection, store, projector=True):
                await roles.wait_for_event(JobLeaseExpired, job_id)
                assert (await roles.wait_until_finished(job_id))["status"] == "completed"


async def test_busy_job_of_dead_worker_delays_only_itself(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy_ids: list[str] = []
    not_busy = asyncio.Event()

    async def handle_unless_busy(event_store: EventStore, stream: str, *arguments: Any, **options: Any) -> Any:
        if not busy_ids and stream.startswith("job-"):
            busy_ids.append(stream)
        if stream in busy_ids and not not_busy.is_set():
            raise StreamBusy(stream)
        return await handle_command(event_store, stream, *arguments, **options)

    monkeypatch.setattr(lease_reaper, "handle_command", handle_unless_busy)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_ids = {await roles.submit() for _ in range(2)}
        for job_id in job_ids:
            await claim_as(roles, job_id)
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, worker=OPTIONS):
            await poll_until(lambda: busy_ids, "the first job is tried")
            [other_id] = job_ids - {*busy_ids}
            await roles.wait_until_finished(other_id)
            assert "JobLeaseExpired" not in await roles.read_event_types(busy_ids[0])
            not_busy.set()
            await roles.wait_until_finished(busy_ids[0])


@pytest.mark.parametrize(
    "moment", ["before the head is read", "after the head is read", "after the document is removed"]
)
async def test_claim_by_a_worker_that_is_being_reaped_is_reaped_too(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        first = await roles.submit()
        await claim_as(roles, first)
        expire_now = [{"$set": {"seconds": 1.0, "released": False, "lease_until": "$$NOW"}}]
        await roles.db.workers.update_one({"_id": "ghost"}, expire_now, upsert=True)
        await roles.wait_for_views()
        reaping, resume = asyncio.Event(), asyncio.Event()
        checked: set[str] = set()
        check = LeaseReaper._check_if_unknown

        def record_check(reaper: LeaseReaper, worker_id: str) -> None:
            check(reaper, worker_id)
            checked.add(worker_id)

        async def pause() -> None:
            if not reaping.is_set():
                reaping.set()
                await resume.wait()

        monkeypatch.setattr(LeaseReaper, "_check_if_unknown", record_check)
        async with run_roles_in_process(
            connection, store, worker=WorkerOptions(max_concurrent=1, lease_seconds=LEASE)
        ) as worker_roles:
            assert worker_roles.worker is not None
            reaper = worker_roles.worker._lease_reaper
            head_position, find_jobs, reap = (
                worker_roles.event_store.read_head_position,
                job_list.find_jobs_of_worker,
                reaper._reap,
            )

            async def read_head_slowly() -> int:
                await pause()
                return await head_position()

            async def find_slowly(*arguments: object) -> object:
                documents = await find_jobs(*arguments)  # type: ignore[arg-type]
                if arguments[1] == "ghost":
                    await pause()
                return documents

            async def reap_slowly(worker_id: str, worker: Any, *, is_released: bool) -> None:
                await reap(worker_id, worker, is_released=is_released)
                if worker_id == "ghost":
                    await pause()

            if moment == "before the head is read":
                monkeypatch.setattr(worker_roles.event_store, "read_head_position", read_head_slowly)
            elif moment == "after the head is read":
                monkeypatch.setattr("jobledger.workers.lease_reaper.job_list.find_jobs_of_worker", find_slowly)
            else:
                monkeypatch.setattr(reaper, "_reap", reap_slowly)
            async with asyncio.timeout(DEADLINE_SECONDS):
                await reaping.wait()
            late = await roles.submit(not_before=datetime(2100, 1, 1, tzinfo=UTC))
            await handle_command(
                roles.event_store, late, ClaimJob("ghost", datetime(2101, 1, 1, tzinfo=UTC)), meta=EventMetadata("test")
            )
            await poll_until(lambda: "ghost" in checked, "the worker has received the late claim")
            resume.set()
            await roles.wait_for_event(JobLeaseExpired, late)
            for job_id in (first, late):
                await roles.wait_for_event(JobCompleted, job_id)


async def wait_for_worker_count(roles: RunningRoles, count: int) -> None:
    async def has_count() -> bool:
        return await roles.db[WORKERS_COLLECTION].count_documents({}) == count

    await poll_until(has_count, f"{count} workers")


async def test_document_of_stopped_worker_is_removed(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=OPTIONS) as roles:
        async with run_roles_in_process(connection, store, worker=OPTIONS):
            await wait_for_worker_count(roles, 2)
        await wait_for_worker_count(roles, 1)


async def test_worker_that_lost_its_lease_continues_with_a_new_id(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(max_concurrent=1, lease_seconds=1)
    ) as roles:
        job_id = await roles.submit({"seconds": 2})
        await roles.wait_for_event(JobProgressed, job_id)
        assert roles.worker is not None
        first_id = roles.worker.worker_id
        await roles.db.workers.update_one({"_id": first_id}, EXPIRE_LEASE_UPDATE)
        job = await roles.wait_until_finished(job_id)
        assert (job["status"], job["attempt"]) == ("completed", 2)
        assert job["worker_id"] == roles.worker.worker_id != first_id
