"""A store or a database that is away for a while costs a job nothing: no work, no attempt, and none of its time."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import JobClaimed, JobLogged, JobReleased, RecordedEvent
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.envelope import StreamAppend
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.cooperative_threads import CooperativeWork
from jobledger.workers.attempt_timeout import AttemptTimeout
from jobledger.workers.child.confinement import ConfinementSettings
from jobledger.workers.directory_removal import remove_tree
from jobledger.workers.step_cache import StepCache
from tests.support.role_runner import RunningRoles, WorkerOptions, poll_until, run_roles_in_process
from tests.workers.misbehaving import misbehaving_processors

__all__ = ["misbehaving_processors"]
OFF = ConfinementSettings(mode="off")  # what the kernel refuses a job depends on its version
pytestmark = pytest.mark.usefixtures("misbehaving_processors")
TYPES = ["misbehaving", "misbehaving-inline"]
STORE_ERRORS = ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENOENT", "ENOTCONN", "ETIMEDOUT"]


async def save(here: RunningRoles, job_type: str = "misbehaving-inline", **fields: Any) -> str:
    return await here.submit({"action": "save"}, job_type=job_type, **fields)


async def waits_for_store(here: RunningRoles, job_id: str) -> str:
    """Wait until the job's log says that it waits; return that line."""
    logged = await here.wait_for_event(JobLogged, job_id, predicate=lambda event: "result store" in str(event.entries))
    assert isinstance(logged.event, JobLogged)
    return logged.event.entries[0].message


def replace(store: Path, *, by_file: Path) -> None:
    store.rename(by_file)
    store.write_text("where the directory was")


def put_back(away: Path, store: Path) -> None:
    store.unlink()
    away.rename(store)


def check_digests(store: Path) -> None:
    for path in store.glob("??/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


async def test_job_waits_for_store_that_has_gone(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.workers.request_handler._STORE_RETRY_DELAYS", (0.2,))
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(confinement=OFF)) as here:
        away = tmp_path / "away"
        await here.wait_until_finished(
            await here.submit({"action": "nothing"}, job_type="misbehaving")
        )  # the fork server is there
        replace(store, by_file=away)
        job_ids = [await save(here, job_type, timeout_s=1.5, max_attempts=1) for job_type in TYPES]
        for job_id in job_ids:
            assert str(store) in await waits_for_store(here, job_id)
        await asyncio.sleep(1.5)
        put_back(away, store)
        await here.wait_until_finished(*job_ids)
        for job_id in job_ids:
            job = await here.load_job(job_id)
            assert (job["status"], job["attempt"], job["error"]) == ("completed", 1, None)
            assert here.store.path(job["results"]["files"][0]["sha256"]).read_bytes() == b"# text\n"
            assert "is writable again" in str(job["logs"])


def missing(_store: Path) -> None:
    """Leave nothing."""


def empty_mount_point(store: Path) -> None:
    store.mkdir()


def file_in_its_place(store: Path) -> None:
    store.write_text("")


def move_away(store: Path, away: Path, place: Callable[[Path], None]) -> None:
    store.rename(away)
    place(store)


def move_back(store: Path, away: Path) -> None:
    if store.is_dir():
        store.rmdir()  # nothing was written there
    store.unlink(missing_ok=True)
    away.rename(store)


@pytest.mark.parametrize("place", [missing, empty_mount_point, file_in_its_place])
async def test_worker_without_its_store_claims_nothing_and_leaves_the_jobs_to_others(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Callable[[Path], None]
) -> None:
    monkeypatch.setattr("jobledger.workers.request_handler._STORE_RETRY_DELAYS", (0.1,))
    monkeypatch.setattr("jobledger.workers.machine_health.MIN_BACKOFF_SECONDS", 0.1)
    options = WorkerOptions(confinement=OFF, slots=4)
    async with run_roles_in_process(connection, store, projector=True, worker=options) as here:
        assert here.worker is not None
        await here.wait_until_finished(await here.submit())
        move_away(store, tmp_path / "away", place)
        first = await save(here)
        await waits_for_store(here, first)
        await poll_until(
            lambda: here.worker is not None and here.worker.health.problem is not None, "it claims nothing"
        )
        assert str(store) in str(here.worker.health.problem)
        later = [await save(here) for _ in range(3)]
        await here.wait_for_views()
        assert not here.worker.health.can_claim()
        assert [await here.read_event_types(job_id) for job_id in later] == [["JobSubmitted"]] * 3
        move_back(store, tmp_path / "away")
        await here.wait_until_finished(first, *later)
        assert here.worker.health.problem is None


@pytest.mark.parametrize("job_type", TYPES)
async def test_inbox_file_that_cannot_be_opened_now_is_waited_for(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, job_type: str
) -> None:
    monkeypatch.setattr("jobledger.workers.request_handler._STORE_RETRY_DELAYS", (0.1,))
    real, failed = os.open, list[str]()

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if len(str(path)) == 64 and len(failed) < 3:
            failed.append(str(path))
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return real(path, *arguments, **named)

    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(confinement=OFF)) as here:
        await here.wait_until_finished(
            await here.submit({"action": "nothing"}, job_type=job_type)
        )  # the fork server is there
        monkeypatch.setattr(os, "open", failing)
        job = await here.wait_until_finished(await save(here, job_type, max_attempts=1))
        assert (job["status"], job["attempt"], len(failed)) == ("completed", 1, 3)


async def test_every_error_of_the_store_is_waited_for(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = DirectoryStore._adopt, list(STORE_ERRORS)

    def failing(self: DirectoryStore, file: Any, target: Path) -> Any:
        if left:
            number = getattr(errno, left.pop())
            raise OSError(number, os.strerror(number), str(target))
        return real(self, file, target)

    monkeypatch.setattr(DirectoryStore, "_adopt", failing)
    monkeypatch.setattr("jobledger.workers.request_handler._STORE_RETRY_DELAYS", (0.01,))
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(confinement=OFF)) as here:
        job = await here.wait_until_finished(await save(here, max_attempts=1))
        assert (job["status"], left) == ("completed", [])
        lines = [line["message"] for line in job["logs"] if "Waiting for the result store" in line["message"]]
        assert len(lines) == len(STORE_ERRORS)


async def test_job_that_waits_for_store_can_be_cancelled_and_given_back(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: DirectoryStore, file: Any, target: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(DirectoryStore, "_adopt", failing)
    options = WorkerOptions(confinement=OFF, shutdown_grace_seconds=0.1)
    async with run_roles_in_process(connection, store, projector=True) as here:
        async with run_roles_in_process(connection, store, worker=options, worker_events_only=True):
            job_ids = [await save(here, job_type, max_attempts=1) for job_type in TYPES * 2]
            for job_id in job_ids:
                await waits_for_store(here, job_id)
            for job_id in job_ids[:2]:
                await here.handle_commands(job_id, CancelJob("user-1"))
            await here.wait_until_finished(*job_ids[:2], seconds=5)
            assert [(await here.load_job(job_id))["status"] for job_id in job_ids[:2]] == ["cancelled"] * 2
            began = time.monotonic()
        assert time.monotonic() - began < 5
        for job_id in job_ids[2:]:
            await here.wait_for_event(JobReleased, job_id)


async def test_job_process_killed_while_its_many_requests_wait_is_noticed_at_once(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: DirectoryStore, file: Any, target: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(DirectoryStore, "_adopt", failing)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(confinement=OFF)) as here:
        file = tmp_path / "pid"
        job_id = await here.submit({"action": "save many", "file": str(file)}, job_type="misbehaving", max_attempts=1)
        await waits_for_store(here, job_id)
        await asyncio.sleep(1)
        os.kill(int(file.read_text()), signal.SIGKILL)
        job = await here.wait_until_finished(job_id, seconds=5)
        assert (job["status"], job["error"]["code"]) == ("failed", "PROCESS_KILLED")


async def test_time_limit_does_not_cover_the_wait_for_a_shared_step(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = StepCache.find_shared_step

    async def slow(self: StepCache, *arguments: Any, **more: Any) -> Any:
        await asyncio.sleep(3)
        return await real(self, *arguments, **more)

    monkeypatch.setattr(StepCache, "find_shared_step", slow)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(confinement=OFF)) as here:
        fields: dict[str, Any] = {"timeout_s": 2.5, "max_attempts": 1}
        job_ids = [await here.submit({"action": "share a step"}, job_type=job_type, **fields) for job_type in TYPES]
        await here.wait_until_finished(*job_ids)
        assert [(await here.load_job(job_id))["error"] for job_id in job_ids] == [None] * 2


async def test_file_that_is_changed_after_it_was_saved_is_never_stored(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(confinement=OFF)) as here:
        job_ids = [await here.submit({"action": "modify saved file"}, job_type="misbehaving") for _ in range(3)]
        await here.wait_until_finished(*job_ids)
        for job_id in job_ids:
            job = await here.load_job(job_id)
            if job["status"] == "failed":
                assert job["error"]["code"] in ("INVALID_RESULT", "PROCESSOR_FAULT")
        check_digests(store)


@pytest.mark.parametrize("gridfs", [False, True])
async def test_same_content_saved_many_times_at_once_is_stored(
    connection: Connection, store: Path, gridfs: bool
) -> None:
    options = WorkerOptions(confinement=OFF, gridfs=gridfs)
    async with run_roles_in_process(connection, store, projector=True, worker=options) as here:
        job_ids = [
            await here.submit({"action": "save the same"}, job_type=job_type, max_attempts=1) for job_type in TYPES
        ]
        await here.wait_until_finished(*job_ids)
        for job_id in job_ids:
            job = await here.load_job(job_id)
            assert (job["error"], len(job["results"]["files"])) == (None, 21)
            assert {file["size"] for file in job["results"]["files"]} == {5}


@pytest.mark.parametrize("gridfs", [False, True])
async def test_job_that_names_a_foreign_file_fails_and_the_file_stays(
    connection: Connection, store: Path, gridfs: bool
) -> None:
    options = WorkerOptions(confinement=OFF, gridfs=gridfs)
    async with run_roles_in_process(connection, store, projector=True, worker=options) as here:
        assert here.worker is not None
        other = await here.wait_until_finished(await save(here))
        [file] = other["results"]["files"]
        parameters = {"action": "claim foreign file", "value": {"sha256": file["sha256"], "store": str(store)}}
        for job_type in TYPES:
            job = await here.wait_until_finished(await here.submit(parameters, job_type=job_type, max_attempts=1))
            assert job["error"]["code"] == "INVALID_RESULT"
        await here.worker._settings.file_store.verify(file["sha256"], file["size"])
        assert here.worker.health.problem is None


async def test_file_that_is_too_large_fails_its_job(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(confinement=OFF)) as here:
        job_ids = [
            await here.submit({"action": "save too large"}, job_type=job_type, max_attempts=1) for job_type in TYPES
        ]
        await here.wait_until_finished(*job_ids)
        errors = [(await here.load_job(job_id))["error"] for job_id in job_ids]
        assert [error["code"] for error in errors] == ["PROCESSOR_FAULT", "INVALID_RESULT"]
        assert "File too large" in errors[0]["message"]
        assert "are allowed" in errors[1]["message"]


async def test_end_of_a_job_is_recorded_before_its_directory_is_removed(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However much some jobs have left, the others' directories are removed meanwhile, and their slots are free."""
    removing, release = list[Path](), threading.Event()

    def slow(path: Path) -> CooperativeWork[None]:
        if (path / "scratch" / "much").exists():
            removing.append(path)
            while not release.wait(0.01):
                yield
        yield from remove_tree(path)

    monkeypatch.setattr("jobledger.workers.executor.remove_tree", slow)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=OFF, slots=6)
    ) as here:
        assert here.worker is not None
        try:
            much = [await here.submit({"action": "leave a file"}, job_type=job_type) for job_type in TYPES * 2]
            assert [job["status"] for job in [await here.wait_until_finished(job_id) for job_id in much]] == [
                "completed"
            ] * 4
            await poll_until(lambda: len(removing) == 4, "the directories are being removed")
            assert {path.name.rsplit("-", 2)[0] for path in removing} == set(much)
            assert set(here.worker._running) == {(job_id, 1) for job_id in much}
            for _ in range(3):
                assert (await here.wait_until_finished(await save(here, "misbehaving")))["status"] == "completed"
            await poll_until(
                lambda: here.worker is not None and len(here.worker._running) == 4, "the other slots are free"
            )
        finally:
            release.set()
        await poll_until(lambda: here.worker is not None and not here.worker._running, "the slots are free")
        assert not any(path.exists() for path in removing)


async def test_attempt_that_begins_while_the_last_ones_directory_is_removed_is_known_to_its_worker(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removing, release = list[Path](), threading.Event()

    def slow(path: Path) -> CooperativeWork[None]:
        removing.append(path)
        while len(removing) == 1 and not release.wait(0.01):
            yield
        yield from remove_tree(path)

    monkeypatch.setattr("jobledger.workers.executor.remove_tree", slow)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=OFF, slots=2)
    ) as here:
        assert here.worker is not None
        job_id = await here.submit({"action": "fail once and leave a file"}, job_type="misbehaving-inline")
        await here.wait_for_event(JobClaimed, job_id, predicate=lambda event: event.attempt == 2)
        await poll_until(
            lambda: here.worker is not None and len(here.worker._running) == 2, "both attempts have a slot"
        )
        release.set()
        await poll_until(lambda: here.worker is not None and len(here.worker._running) == 1, "the first one is over")
        await here.handle_commands(job_id, CancelJob("user:tests"))
        assert (await here.wait_until_finished(job_id))["status"] == "cancelled"


class Away(EventStore):
    """A log whose database does not answer to what the work came to: for a while it hangs, then it says so."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.failed: set[str] = set()

    async def append(self, *appends: StreamAppend) -> list[RecordedEvent]:
        ends = ("JobCompleted", "StepCompleted")
        concerned = {it.stream for it in appends for event in it.events if type(event).__name__ in ends}
        if concerned - self.failed:
            self.failed |= concerned
            await asyncio.sleep(3)
            raise LedgerUnavailable("it did not answer")
        return await super().append(*appends)


async def test_time_limit_does_not_cover_the_wait_for_the_database(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=OFF), store_class=Away
    ) as here:
        jobs = [(do, job_type) for do in ("nothing", "one step") for job_type in TYPES]
        job_ids = [
            await here.submit({"action": do}, job_type=job_type, timeout_s=2.5, max_attempts=1) for do, job_type in jobs
        ]
        await here.wait_until_finished(*job_ids)
        assert [(await here.load_job(job_id))["error"] for job_id in job_ids] == [None] * 4


async def test_time_limit_runs_on_while_requests_are_short() -> None:
    """A processor that only asks, again and again and all the time, comes to its limit."""
    expired: list[float] = []
    begun = time.monotonic()
    limit = AttemptTimeout(0.3, lambda: expired.append(time.monotonic() - begun))

    async def ask() -> None:
        while not expired:
            async with limit.pause_while_waiting():
                await asyncio.sleep(0.05)

    async with asyncio.timeout(5):
        await asyncio.gather(*(ask() for _ in range(5)))
    assert 0.25 < expired[0] < 1


async def test_time_limit_pauses_while_a_request_waits() -> None:
    expired = asyncio.Event()
    limit = AttemptTimeout(1.3, expired.set)
    async with limit.pause_while_waiting():
        await asyncio.sleep(2)
    assert not expired.is_set()
    async with asyncio.timeout(2):
        await expired.wait()
    limit.stop()
