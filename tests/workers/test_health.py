from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob, SubmitJob
from jobledger.ledger.domain.events import JobClaimed, JobReleased
from jobledger.ledger.domain.job import MAX_CONSECUTIVE_MACHINE_FAILURES
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.lease import Lease, LeaseObservation
from jobledger.ledger.store.command_handler import new_job_id
from jobledger.workers import machine_health as health
from jobledger.workers import process_runner
from jobledger.workers.child.confinement import ConfinementSettings
from jobledger.workers.machine_health import MachineFailure, WorkerHealth, find_machine_failure
from jobledger.workers.scratch import ScratchDirectory
from tests.support.role_runner import WorkerOptions, make_echo_job, poll_until, run_roles_in_process
from tests.workers.misbehaving import misbehaving_processors

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
def test_machine_trouble_of_the_machine_is_recognized(error: Exception) -> None:
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
def test_machine_trouble_of_the_job_is_not_the_machine(error: Exception) -> None:
    assert find_machine_failure(error, scratch_dir=SCRATCH) is None


async def test_health_after_report_allows_claims_only_when_check_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.02)
    sick, checked = True, 0

    def check() -> None:
        nonlocal checked
        checked += 1
        if sick:
            raise OSError(errno.ENOSPC, "No space left on device")

    worker = WorkerHealth([check])
    running = asyncio.create_task(worker.run())
    assert worker.can_claim()
    worker.report(MachineFailure("No space left on device"))
    assert not worker.can_claim()
    await poll_until(lambda: checked > 2, "checks are repeated")
    assert not worker.can_claim()
    assert "scratch_dir" in worker.document_fields()["problem"]
    sick = False
    await poll_until(worker.can_claim, "recovered")
    assert worker.document_fields() == {"problem": None, "unhealthy_since": None}
    running.cancel()


async def test_health_relapse_soon_after_recovery_lengthens_the_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.02)
    worker = WorkerHealth()
    running = asyncio.create_task(worker.run())
    loop = asyncio.get_running_loop()
    took = []
    for _ in range(4):
        begun = loop.time()
        worker.report(MachineFailure("trouble that no check sees"))
        await poll_until(worker.can_claim, "recovered")
        took.append(loop.time() - begun)
    running.cancel()
    assert took[3] > 3 * took[0]


async def test_worker_without_scratch_leaves_jobs_alone_until_it_is_there(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.1)
    place = tmp_path / "mount" / "scratch"
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(scratch=place)) as here:
        await poll_until(lambda: here.worker is not None and not here.worker.health.can_claim(), "noticed")
        job_id = await here.submit()
        async with asyncio.timeout(20):
            while not await here.db.workers.find_one({"problem": {"$regex": "scratch_dir"}}):  # noqa: ASYNC110 - nobody tells us
                await asyncio.sleep(0.05)
        await asyncio.sleep(0.5)
        assert await here.read_event_types(job_id) == ["JobSubmitted"]
        place.parent.mkdir()
        assert (await here.wait_until_finished(job_id))["status"] == "completed"
        assert await here.read_event_types(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]
    assert list(place.rglob("*/*")) == []


async def test_worker_that_recovers_before_its_lease_is_written_is_shown_as_healthy(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.02)
    place, real = tmp_path / "mount" / "scratch", Lease.acquire

    async def late(self: Lease, attributes: Mapping[str, Any], *, observation: LeaseObservation | None = None) -> bool:
        if "problem" in attributes:
            assert attributes["problem"] is not None
            place.parent.mkdir()
            await asyncio.sleep(0.3)
        return await real(self, attributes, observation=observation)

    monkeypatch.setattr(Lease, "acquire", late)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(scratch=place)) as here:
        async with asyncio.timeout(10):
            while not await here.db.workers.find_one({"problem": None}):  # noqa: ASYNC110 - nobody tells us
                await asyncio.sleep(0.05)


async def test_job_that_meets_machine_trouble_again_and_again_ends(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.01)
    monkeypatch.setattr(health, "RELAPSE_SECONDS", 0.0)
    real = ScratchDirectory.new_attempt_path

    def no_room(self: ScratchDirectory, job_id: str, attempt: int) -> Path:
        if job_id == bad:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, job_id, attempt)

    monkeypatch.setattr(ScratchDirectory, "new_attempt_path", no_room)
    bad = new_job_id()
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        await here.handle_commands(bad, SubmitJob(make_echo_job({}, max_attempts=2)))
        others = [await here.submit() for _ in range(20)]
        job = await here.wait_until_finished(bad, *others)
        assert (job["status"], job["error"]["code"]) == ("failed", "MACHINE_FAILURE")
        history = await here.read_event_types(bad)
        assert history.count("JobReleased") == MAX_CONSECUTIVE_MACHINE_FAILURES * 2
        assert history.count("JobAttemptFailed") == 1
        for other in others:
            assert await here.read_event_types(other) == ["JobSubmitted", "JobClaimed", "JobCompleted"]


async def test_check_that_hangs_is_trouble_and_is_not_started_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_CHECK_LIMIT_SECONDS", 0.05)
    answered, started = threading.Event(), 0

    def hang() -> None:
        nonlocal started
        started += 1
        answered.wait()

    worker = WorkerHealth([hang])
    for _ in range(3):
        assert "did not return" in str(await worker.run_checks())
    assert started == 1
    answered.set()
    await poll_until(lambda: not any(it.name == "health-check" for it in threading.enumerate()), "the thread has ended")
    assert await worker.run_checks() is None


async def test_check_right_after_another_is_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of the one before may still be about to end."""
    worker = WorkerHealth([lambda: None])
    for _ in range(300):
        assert await worker.run_checks() is None


async def test_files_of_attempts_are_never_touched_on_the_event_loop(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that does not answer would stop all jobs, the API and the lease with it."""
    loop_thread, place, touched = threading.get_ident(), tmp_path / "scratch", list[str]()

    def watched(name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            if threading.get_ident() == loop_thread and str(place) in str(path):
                touched.append(f"{name} {path}")
            return real(path, *arguments, **options)

        return call

    options = WorkerOptions(scratch=place, confinement=ConfinementSettings(mode="off"))
    async with run_roles_in_process(connection, store, projector=True, worker=options) as here:
        await here.wait_until_finished(await here.submit())
        for name in ("stat", "lstat", "statvfs", "mkdir", "chmod", "open", "listdir", "rmdir", "unlink"):
            monkeypatch.setattr(os, name, watched(name))
        monkeypatch.setattr(health, "_QUICK_CHECK_SECONDS", 0.0)
        for job_type in ("echo", "misbehaving"):
            job = await here.wait_until_finished(
                await here.submit({"action": "nothing"}, job_type=job_type), seconds=30
            )
            assert job["status"] == "completed"
        assert touched == []
        monkeypatch.undo()


async def test_disk_that_does_not_answer_holds_up_only_jobs_that_use_it(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(self: ScratchDirectory, *directories: Path) -> None:
        waiting.set()
        answers.wait(20)
        create(self, *directories)

    create, waiting, answers = ScratchDirectory.create_directories, threading.Event(), threading.Event()
    monkeypatch.setattr(ScratchDirectory, "create_directories", wait)
    monkeypatch.setattr(process_runner, "DISK_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.1)
    options = WorkerOptions(scratch=tmp_path / "scratch", confinement=ConfinementSettings(mode="off"))
    async with run_roles_in_process(connection, store, projector=True, worker=options) as here:
        cancelled, released = [await here.submit({"action": "nothing"}, job_type="misbehaving") for _ in range(2)]
        await poll_until(waiting.is_set, "its directory is being created")
        await here.wait_for_event(JobClaimed, released)
        assert (await here.wait_until_finished(await here.submit()))["status"] == "completed"
        await here.handle_commands(cancelled, CancelJob("user-1"))
        assert (await here.wait_until_finished(cancelled))["status"] == "cancelled"
        await here.wait_for_event(JobReleased, released)
        answers.set()
        assert (await here.wait_until_finished(released))["status"] == "completed"


async def test_quick_check_that_hangs_is_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "_QUICK_CHECK_LIMIT_SECONDS", 0.05)
    answered = threading.Event()

    def hang() -> None:
        answered.wait()

    worker = WorkerHealth(quick_checks=[hang])
    await worker.run_quick_checks()
    answered.set()
    assert not worker.can_claim()
    assert "did not return" in worker.document_fields()["problem"]


async def test_sick_worker_of_three_costs_no_job_an_attempt_and_recovers(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health, "MIN_BACKOFF_SECONDS", 0.2)
    places = [tmp_path / f"scratch-{number}" for number in range(3)]
    options = [WorkerOptions(scratch=place, shutdown_grace_seconds=0.5) for place in places]
    async with (
        run_roles_in_process(connection, store, projector=True, worker=options[0]) as here,
        run_roles_in_process(connection, store, worker=options[1]),
        run_roles_in_process(connection, store, worker=options[2]) as sick,
    ):
        assert sick.worker is not None
        await poll_until(lambda: len(list(tmp_path.glob("scratch-*/*/*"))) == 3, "all have started")
        assert sick.worker.health.can_claim(), "its next quick check is a second away"
        places[2].rename(tmp_path / "away")
        places[2].write_text("a file where the directory was")
        begun = time.monotonic()
        _, job_ids = await here.submit_batch(*({"seconds": 0.01} for _ in range(60)))
        await here.wait_until_finished(*job_ids)
        assert time.monotonic() - begun < 10
        for job_id in job_ids:
            history = await here.read_event_types(job_id)
            assert history[-1] == "JobCompleted"
            assert history.count("JobClaimed") == 1 + history.count("JobReleased")
            assert "JobAttemptFailed" not in history
        await poll_until(lambda: not sick.worker.health.can_claim(), "it knows")  # type: ignore[union-attr]
        places[2].unlink()
        (tmp_path / "away").rename(places[2])
        await poll_until(sick.worker.health.can_claim, "it has recovered")
