"""Tests of machine health: a worker whose machine fails claims no jobs until its checks pass."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob, SubmitJob
from jobledger.ledger.domain.events import JobClaimed, JobReleased
from jobledger.ledger.domain.job import MAX_CONSECUTIVE_MACHINE_FAILURES
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.lease import EXPIRE_LEASE_UPDATE, Lease, LeaseObservation
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.workers import worker
from jobledger.workers.attempts import process_runner
from jobledger.workers.machine import health
from jobledger.workers.machine.health import MachineFailure, WorkerHealth, find_machine_failure
from jobledger.workers.machine.scratch import ScratchDirectory
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import WorkerOptions, make_echo_job, run_roles_in_process
from tests.workers.misbehaving_processors import misbehaving_processors

__all__ = ["misbehaving_processors"]
pytestmark = pytest.mark.usefixtures("misbehaving_processors")
SCRATCH = Path("/scratch/jobledger-0/worker-1")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EMFILE, "Too many open files"),
        OSError(errno.ENFILE, "Too many open files in system"),
        OSError(errno.ENOMEM, "Cannot allocate memory"),
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError(errno.EROFS, "Read-only file system"),
        OSError(errno.EIO, "Input/output error"),
        OSError(errno.ESTALE, "Stale file handle"),
        BlockingIOError(errno.EAGAIN, "Resource temporarily unavailable"),
        PermissionError(errno.EACCES, "Permission denied", str(SCRATCH / "job-1")),
        FileNotFoundError(errno.ENOENT, "No such file or directory", str(SCRATCH / "job-1")),
        NotADirectoryError(errno.ENOTDIR, "Not a directory", str(SCRATCH)),
        RuntimeError("can't start new thread"),
        MemoryError(),
        MachineFailure("The disk is gone"),
    ],
    ids=repr,
)
def test_find_machine_failure_recognizes_errors_of_the_machine(error: Exception) -> None:
    assert find_machine_failure(error, scratch_dir=SCRATCH) is not None
    wrapped = RuntimeError("while starting the job")
    wrapped.__cause__ = error
    assert find_machine_failure(wrapped, scratch_dir=SCRATCH) is not None


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(errno.EACCES, "Permission denied", "/etc/shadow"),
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/scratch/jobledger-0/worker-10/x"),
        ConnectionRefusedError(errno.ECONNREFUSED, "Connection refused"),
        TimeoutError("timed out"),
        OSError("without a number"),
        RuntimeError("anything"),
        ValueError("anything"),
    ],
    ids=repr,
)
def test_find_machine_failure_ignores_errors_of_a_job(error: Exception) -> None:
    assert find_machine_failure(error, scratch_dir=SCRATCH) is None


async def test_health_after_report_allows_claims_only_when_check_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.02)
    is_broken, check_count = True, 0

    def check() -> None:
        nonlocal check_count
        check_count += 1
        if is_broken:
            raise OSError(errno.ENOSPC, "No space left on device")

    worker = WorkerHealth([check])
    running = asyncio.create_task(worker.run())
    assert worker.can_claim()
    worker.report(MachineFailure("No space left on device"))
    assert not worker.can_claim()
    await poll_until(lambda: check_count > 2, "checks are repeated")
    assert not worker.can_claim()
    assert "scratch_dir" in worker.get_document_fields()["problem"]
    is_broken = False
    await poll_until(worker.can_claim, "the worker has recovered")
    assert worker.get_document_fields() == {"problem": None, "unhealthy_since": None}
    running.cancel()


async def test_health_failure_soon_after_recovery_doubles_the_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.05)
    worker = WorkerHealth()
    running = asyncio.create_task(worker.run())
    loop = asyncio.get_running_loop()
    pauses = []
    for _ in range(4):
        reported_at = loop.time()
        worker.report(MachineFailure("a failure that no check detects"))
        await poll_until(worker.can_claim, "the worker has recovered")
        pauses.append(loop.time() - reported_at)
    running.cancel()
    assert pauses[3] > 8 * 0.8 * health.MIN_BACKOFF_SECONDS


async def test_worker_without_scratch_claims_nothing_until_it_exists(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.1)
    scratch = tmp_path / "mount" / "scratch"
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(scratch_dir=scratch)
    ) as roles:
        await poll_until(lambda: roles.worker is not None and not roles.worker.health.can_claim(), "unhealthy")
        job_id = await roles.submit()
        reported = {"problem": {"$regex": "scratch_dir"}}
        await poll_until(lambda: roles.db.workers.find_one(reported), "the worker reports the problem")
        await asyncio.sleep(0.5)
        assert await roles.read_event_types(job_id) == ["JobSubmitted"]
        scratch.parent.mkdir()
        assert (await roles.wait_until_finished(job_id))["status"] == "completed"
        assert await roles.read_event_types(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]
    assert list(scratch.rglob("*/*")) == []


async def test_worker_recovering_before_its_first_lease_is_shown_healthy(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.02)
    scratch, real = tmp_path / "mount" / "scratch", Lease.acquire

    async def acquire_late(
        self: Lease, attributes: Mapping[str, Any], *, observation: LeaseObservation | None = None
    ) -> bool:
        if "problem" in attributes:
            assert attributes["problem"] is not None
            scratch.parent.mkdir()
            await asyncio.sleep(0.3)
        return await real(self, attributes, observation=observation)

    monkeypatch.setattr(Lease, "acquire", acquire_late)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(scratch_dir=scratch)
    ) as roles:
        await poll_until(lambda: roles.db.workers.find_one({"problem": None}), "the worker reports no problem")


async def test_job_with_repeated_machine_failures_fails(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(health, "RELAPSE_SECONDS", 0.0)
    real = ScratchDirectory.new_attempt_path

    def fail_for_one_job(self: ScratchDirectory, job_id: str, attempt: int) -> Path:
        if job_id == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, job_id, attempt)

    monkeypatch.setattr(ScratchDirectory, "new_attempt_path", fail_for_one_job)
    failing = create_job_id()
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        await roles.handle_commands(failing, SubmitJob(make_echo_job({}, max_attempts=2)))
        healthy = [await roles.submit() for _ in range(20)]
        job = await roles.wait_until_finished(failing, *healthy)
        assert (job["status"], job["error"]["code"]) == ("failed", "MACHINE_FAILURE")
        history = await roles.read_event_types(failing)
        assert history.count("JobReleased") == MAX_CONSECUTIVE_MACHINE_FAILURES * 2
        assert history.count("JobAttemptFailed") == 1
        for job_id in healthy:
            assert await roles.read_event_types(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]


async def test_hanging_check_is_a_failure_and_is_not_started_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_CHECK_LIMIT_SECONDS", 0.05)
    release, started = threading.Event(), 0

    def hang() -> None:
        nonlocal started
        started += 1
        release.wait()

    worker = WorkerHealth([hang])
    for _ in range(3):
        assert "did not return" in str(await worker.run_checks())
    assert started == 1
    release.set()
    await poll_until(
        lambda: not any(thread.name == "health-check" for thread in threading.enumerate()), "the thread has ended"
    )
    assert await worker.run_checks() is None


async def test_check_directly_after_another_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of the previous check may still be ending."""
    worker = WorkerHealth([lambda: None])
    for _ in range(300):
        assert await worker.run_checks() is None


async def test_event_loop_never_accesses_files_of_attempts(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not respond would block all jobs, the API and the lease extension."""
    loop_thread, scratch, accesses = threading.get_ident(), tmp_path / "scratch", list[str]()

    def watch(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == loop_thread and str(scratch) in str(path):
                accesses.append(f"{name} {path}")
            return real(path, *arguments, **options)

        return call

    options = WorkerOptions(scratch_dir=scratch, confinement="off")
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        await roles.wait_until_finished(await roles.submit())
        for name in ("stat", "lstat", "statvfs", "mkdir", "chmod", "open", "listdir", "rmdir", "unlink"):
            monkeypatch.setattr(os, name, watch(name))
        monkeypatch.setattr(health, "_QUICK_CHECK_SECONDS", 0.0)
        for job_type in ("echo", "misbehaving"):
            job = await roles.wait_until_finished(await roles.submit({"action": "nothing"}, job_type=job_type))
            assert job["status"] == "completed"
        assert accesses == []
        monkeypatch.undo()


async def test_unresponsive_disk_delays_only_jobs_that_use_it(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def create_late(self: ScratchDirectory, *directories: Path) -> None:
        waiting.set()
        disk_responds.wait(60)
        create(self, *directories)

    create, waiting, disk_responds = ScratchDirectory.create_directories, threading.Event(), threading.Event()
    monkeypatch.setattr(ScratchDirectory, "create_directories", create_late)
    monkeypatch.setattr(process_runner, "DISK_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.1)
    options = WorkerOptions(scratch_dir=tmp_path / "scratch", confinement="off")
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        cancelled, released = [await roles.submit({"action": "nothing"}, job_type="misbehaving") for _ in range(2)]
        await poll_until(waiting.is_set, "the directory is being created")
        await roles.wait_for_event(JobClaimed, released)
        assert (await roles.wait_until_finished(await roles.submit()))["status"] == "completed"
        await roles.handle_commands(cancelled, CancelJob("user-1"))
        assert (await roles.wait_until_finished(cancelled))["status"] == "cancelled"
        await roles.wait_for_event(JobReleased, released)
        disk_responds.set()
        assert (await roles.wait_until_finished(released))["status"] == "completed"


async def test_hanging_quick_check_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_QUICK_CHECK_LIMIT_SECONDS", 0.05)
    release = threading.Event()

    def hang() -> None:
        release.wait()

    worker = WorkerHealth(quick_checks=[hang])
    await worker.run_quick_checks()
    release.set()
    assert not worker.can_claim()
    assert "did not return" in worker.get_document_fields()["problem"]


@pytest.mark.parametrize("iterations", range(3))
async def test_worker_that_loses_its_lease_as_a_check_ends_continues_with_another(
    connection: Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, iterations: int
) -> None:
    """The claim loop runs the check, and must not ignore that it is cancelled.

    `iterations` of the event loop are between both, because a cancellation may be ignored in one of them only.
    """
    checking, release = threading.Event(), threading.Event()

    def check() -> None:
        checking.set()
        release.wait(DEADLINE_SECONDS)

    monkeypatch.setattr(health, "_QUICK_CHECK_SECONDS", 0)
    monkeypatch.setattr(worker, "check_descriptors", check)
    options = WorkerOptions(lease_seconds=2)
    async with run_roles_in_process(connection, tmp_path, projector=True, worker=options) as roles:
        await poll_until(checking.is_set, "a check runs")
        assert roles.worker is not None
        lost_worker_id = roles.worker.worker_id
        extending, running_check = find_thread(f"lease-{lost_worker_id}"), find_thread("health-check")
        with connection.create_blocking_client() as client:
            client[connection.db_name].workers.update_one({"_id": lost_worker_id}, EXPIRE_LEASE_UPDATE)
        join_thread(extending)
        for _ in range(iterations):
            await asyncio.sleep(0)
        release.set()
        join_thread(running_check)
        claimed = await roles.wait_for_event(JobClaimed, await roles.submit())
        assert claimed.meta.actor != f"worker:{lost_worker_id}"


def join_thread(thread: threading.Thread) -> None:
    """Wait for the end of a thread. Blocks the event loop."""
    thread.join(DEADLINE_SECONDS)
    assert not thread.is_alive()


def find_thread(name: str) -> threading.Thread:
    return next(thread for thread in threading.enumerate() if thread.name == name)


async def test_unhealthy_worker_of_three_costs_no_attempt_and_recovers(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.2)
    scratches = [tmp_path / f"scratch-{number}" for number in range(3)]
    options = [WorkerOptions(scratch_dir=path, shutdown_grace_seconds=0.5) for path in scratches]
    async with (
        run_roles_in_process(connection, store, projector=True, worker=options[0]) as roles,
        run_roles_in_process(connection, store, worker=options[1]),
        run_roles_in_process(connection, store, worker=options[2]) as unhealthy,
    ):
        assert unhealthy.worker is not None
        await poll_until(lambda: len(list(tmp_path.glob("scratch-*/*/*"))) == 3, "all workers have started")
        assert unhealthy.worker.health.can_claim(), "the next quick check is up to a second away"
        scratches[2].rename(tmp_path / "away")
        scratches[2].write_text("a file where the directory was")
        _, job_ids = await roles.submit_batch(*({"seconds": 0.01} for _ in range(60)))
        await roles.wait_until_finished(*job_ids)
        for job_id in job_ids:
            history = await roles.read_event_types(job_id)
            assert history[-1] == "JobCompleted"
            assert history.count("JobClaimed") == 1 + history.count("JobReleased")
            assert "JobAttemptFailed" not in history
        await poll_until(lambda: not unhealthy.worker.health.can_claim(), "the worker is unhealthy")  # type: ignore[union-attr]
        scratches[2].unlink()
        (tmp_path / "away").rename(scratches[2])
        await poll_until(unhealthy.worker.health.can_claim, "the worker has recovered")
