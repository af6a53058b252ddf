"""Tests of outages: an unavailable store or database costs a job no work, no attempt and no time of its limit."""

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
from typing import Any, Final

import pytest

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import JobClaimed, JobLogged, JobReleased, RecordedEvent
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.envelope import StreamAppend
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.cooperative_threads import CooperativeWork
from jobledger.workers.attempts.attempt_timeout import AttemptTimeout
from jobledger.workers.attempts.shared_step_finder import SharedStepFinder
from jobledger.workers.machine.directory_removal import remove_tree
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.workers.misbehaving_processors import misbehaving_processors

__all__ = ["misbehaving_processors"]
NO_CONFINEMENT: Final = "off"  # what confinement denies depends on the kernel version
pytestmark = pytest.mark.usefixtures("misbehaving_processors")
TYPES = ["misbehaving", "misbehaving-inline"]
TIME_LIMIT = 3.0
"""The time limit of jobs that work for milliseconds, on a busy machine too."""
WAIT_SECONDS = TIME_LIMIT + 0.5
STOP_SECONDS = 30.0
"""Within this time a worker stops, although the store is unavailable. About a second on an idle machine."""
STORE_ERRORS = ["ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "ESTALE", "ENOENT", "ENOTCONN", "ETIMEDOUT"]


async def submit_save(roles: RunningRoles, job_type: str = "misbehaving-inline", **fields: Any) -> str:
    return await roles.submit({"action": "save"}, job_type=job_type, **fields)


async def wait_for_store_message(roles: RunningRoles, job_id: str) -> str:
    """Wait until the job logs that it waits for the store. Return that line."""
    logged = await roles.wait_for_event(JobLogged, job_id, predicate=lambda event: "result store" in str(event.entries))
    assert isinstance(logged.event, JobLogged)
    return logged.event.entries[0].message


def assert_digests_match(store: Path) -> None:
    for path in store.glob("??/*"):
        assert hashlib.sha256(path.read_bytes()).hexdigest() == path.name


async def test_job_waits_while_the_store_is_unavailable(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.workers.attempts.attempt_timeout.PAUSE_AFTER_SECONDS", 0.3)
    monkeypatch.setattr("jobledger.workers.attempts.message_handler._STORE_RETRY_DELAYS", (0.2,))
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT)
    ) as roles:
        away = tmp_path / "away"
        await roles.wait_until_finished(
            await roles.submit({"action": "nothing"}, job_type="misbehaving")
        )  # starts the fork server
        move_away(store, away, create_file)
        job_ids = [await submit_save(roles, job_type, timeout_s=TIME_LIMIT, max_attempts=1) for job_type in TYPES]
        for job_id in job_ids:
            assert str(store) in await wait_for_store_message(roles, job_id)
        await asyncio.sleep(TIME_LIMIT)
        move_back(store, away)
        await roles.wait_until_finished(*job_ids)
        for job_id in job_ids:
            job = await roles.load_job(job_id)
            assert (job["status"], job["attempt"], job["error"]) == ("completed", 1, None)
            assert roles.store.get_path(job["results"]["files"][0]["sha256"]).read_bytes() == b"# text\n"
            assert "is writable again" in str(job["logs"])


def create_nothing(_store: Path) -> None:
    """Leave the path without a file."""


def create_empty_directory(store: Path) -> None:
    store.mkdir()


def create_file(store: Path) -> None:
    store.write_text("")


def move_away(store: Path, away: Path, replace: Callable[[Path], None]) -> None:
    store.rename(away)
    replace(store)


def move_back(store: Path, away: Path) -> None:
    if store.is_dir():
        store.rmdir()  # nothing was written there
    store.unlink(missing_ok=True)
    away.rename(store)


@pytest.mark.parametrize("replace", [create_nothing, create_empty_directory, create_file])
async def test_worker_without_its_store_claims_nothing(
    connection: Connection,
    store: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    replace: Callable[[Path], None],
) -> None:
    monkeypatch.setattr("jobledger.workers.attempts.message_handler._STORE_RETRY_DELAYS", (0.1,))
    monkeypatch.setattr("jobledger.workers.machine.health.MIN_BACKOFF_SECONDS", 0.1)
    options = WorkerOptions(confinement=NO_CONFINEMENT, max_concurrent=4)
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        assert roles.worker is not None
        await roles.wait_until_finished(await roles.submit())
        move_away(store, tmp_path / "away", replace)
        first = await submit_save(roles)
        await wait_for_store_message(roles, first)
        await poll_until(
            lambda: roles.worker is not None and roles.worker.health.problem is not None, "the worker claims nothing"
        )
        assert str(store) in str(roles.worker.health.problem)
        waiting = [await submit_save(roles) for _ in range(3)]
        await roles.wait_for_views()
        assert not roles.worker.health.can_claim()
        assert [await roles.read_event_types(job_id) for job_id in waiting] == [["JobSubmitted"]] * 3
        move_back(store, tmp_path / "away")
        await roles.wait_until_finished(first, *waiting)
        assert roles.worker.health.problem is None


@pytest.mark.parametrize("job_type", TYPES)
async def test_inbox_file_that_cannot_be_opened_is_retried(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, job_type: str
) -> None:
    monkeypatch.setattr("jobledger.workers.attempts.message_handler._STORE_RETRY_DELAYS", (0.1,))
    open_file, failed = os.open, list[str]()

    def fail(path: Any, *arguments: Any, **options: Any) -> int:
        if len(str(path)) == 64 and len(failed) < 3:
            failed.append(str(path))
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))
        return open_file(path, *arguments, **options)

    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT)
    ) as roles:
        await roles.wait_until_finished(
            await roles.submit({"action": "nothing"}, job_type=job_type)
        )  # starts the fork server
        monkeypatch.setattr(os, "open", fail)
        job = await roles.wait_until_finished(await submit_save(roles, job_type, max_attempts=1))
        assert (job["status"], job["attempt"], len(failed)) == ("completed", 1, 3)


async def test_every_error_of_the_store_is_retried(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adopt, errors = DirectoryStore._write, list(STORE_ERRORS)

    def fail(self: DirectoryStore, file: Any, target: Path) -> Any:
        if errors:
            number = getattr(errno, errors.pop())
            raise OSError(number, os.strerror(number), str(target))
        return adopt(self, file, target)

    monkeypatch.setattr(DirectoryStore, "_write", fail)
    monkeypatch.setattr("jobledger.workers.attempts.message_handler._STORE_RETRY_DELAYS", (0.01,))
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT)
    ) as roles:
        job = await roles.wait_until_finished(await submit_save(roles, max_attempts=1))
        assert (job["status"], errors) == ("completed", [])
        lines = [line["message"] for line in job["logs"] if "Waiting for the result store" in line["message"]]
        assert len(lines) == len(STORE_ERRORS)


async def test_job_waiting_for_the_store_can_be_cancelled_and_released(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DirectoryStore, file: Any, target: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(DirectoryStore, "_write", fail)
    options = WorkerOptions(confinement=NO_CONFINEMENT, shutdown_grace_seconds=0.1)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        async with run_roles_in_process(connection, store, worker=options, is_worker_process=True):
            job_ids = [await submit_save(roles, job_type, max_attempts=1) for job_type in TYPES * 2]
            for job_id in job_ids:
                await wait_for_store_message(roles, job_id)
            for job_id in job_ids[:2]:
                await roles.handle_commands(job_id, CancelJob("user-1"))
            await roles.wait_until_finished(*job_ids[:2])
            assert [(await roles.load_job(job_id))["status"] for job_id in job_ids[:2]] == ["cancelled"] * 2
            stopping_since = time.monotonic()
        assert time.monotonic() - stopping_since < STOP_SECONDS
        for job_id in job_ids[2:]:
            await roles.wait_for_event(JobReleased, job_id)


async def test_job_process_killed_while_its_requests_wait_is_detected(
    connection: Connection, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: DirectoryStore, file: Any, target: Path) -> None:
        raise OSError(errno.EACCES, "Permission denied", str(target))

    monkeypatch.setattr(DirectoryStore, "_write", fail)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT)
    ) as roles:
        file = tmp_path / "pid"
        job_id = await roles.submit({"action": "save many", "file": str(file)}, job_type="misbehaving", max_attempts=1)
        await wait_for_store_message(roles, job_id)
        await asyncio.sleep(1)  # more requests arrive
        os.kill(int(file.read_text()), signal.SIGKILL)
        job = await roles.wait_until_finished(job_id)
        assert (job["status"], job["error"]["code"]) == ("failed", "PROCESS_KILLED")


async def test_time_limit_excludes_the_wait_for_a_shared_step(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find_shared_step = SharedStepFinder.find_shared_step

    async def find_slowly(self: SharedStepFinder, *arguments: Any, **options: Any) -> Any:
        await asyncio.sleep(WAIT_SECONDS)
        return await find_shared_step(self, *arguments, **options)

    monkeypatch.setattr("jobledger.workers.attempts.attempt_timeout.PAUSE_AFTER_SECONDS", 0.3)
    monkeypatch.setattr(SharedStepFinder, "find_shared_step", find_slowly)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT)
    ) as roles:
        fields: dict[str, Any] = {"timeout_s": TIME_LIMIT, "max_attempts": 1}
        job_ids = [await roles.submit({"action": "share a step"}, job_type=job_type, **fields) for job_type in TYPES]
        await roles.wait_until_finished(*job_ids)
        assert [(await roles.load_job(job_id))["error"] for job_id in job_ids] == [None] * 2


async def test_file_changed_after_it_was_saved_is_never_stored(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT)
    ) as roles:
        job_ids = [await roles.submit({"action": "modify saved file"}, job_type="misbehaving") for _ in range(3)]
        await roles.wait_until_finished(*job_ids)
        for job_id in job_ids:
            job = await roles.load_job(job_id)
            if job["status"] == "failed":
                assert job["error"]["code"] in ("INVALID_RESULT", "PROCESSOR_FAULT")
        assert_digests_match(store)


@pytest.mark.parametrize("gridfs", [False, True])
async def test_same_content_saved_concurrently_is_stored(connection: Connection, store: Path, gridfs: bool) -> None:
    options = WorkerOptions(confinement=NO_CONFINEMENT, gridfs=gridfs)
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        job_ids = [
            await roles.submit({"action": "save the same"}, job_type=job_type, max_attempts=1) for job_type in TYPES
        ]
        await roles.wait_until_finished(*job_ids)
        for job_id in job_ids:
            job = await roles.load_job(job_id)
            assert (job["error"], len(job["results"]["files"])) == (None, 21)
            assert {file["size"] for file in job["results"]["files"]} == {5}


@pytest.mark.parametrize("gridfs", [False, True])
async def test_job_that_names_a_file_of_another_job_fails_and_keeps_it(
    connection: Connection, store: Path, gridfs: bool
) -> None:
    options = WorkerOptions(confinement=NO_CONFINEMENT, gridfs=gridfs)
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        assert roles.worker is not None
        owner = await roles.wait_until_finished(await submit_save(roles))
        [file] = owner["results"]["files"]
        parameters = {"action": "claim foreign file", "value": {"sha256": file["sha256"], "store": str(store)}}
        for job_type in TYPES:
            job = await roles.wait_until_finished(await roles.submit(parameters, job_type=job_type, max_attempts=1))
            assert job["error"]["code"] == "INVALID_RESULT"
        await roles.worker._file_store.verify(file["sha256"], file["size"])
        assert roles.worker.health.problem is None


async def test_too_large_file_fails_its_job(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT)
    ) as roles:
        job_ids = [
            await roles.submit({"action": "save too large"}, job_type=job_type, max_attempts=1) for job_type in TYPES
        ]
        await roles.wait_until_finished(*job_ids)
        errors = [(await roles.load_job(job_id))["error"] for job_id in job_ids]
        assert [error["code"] for error in errors] == ["PROCESSOR_FAULT", "INVALID_RESULT"]
        assert "File too large" in errors[0]["message"]
        assert "are allowed" in errors[1]["message"]


async def test_end_of_job_is_recorded_before_its_directory_is_removed(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A long removal keeps only the slot of its own job. Directories of other jobs are removed meanwhile."""
    removing, release = list[Path](), threading.Event()

    def remove_slowly(path: Path) -> CooperativeWork[None]:
        if (path / "scratch" / "much").exists():
            removing.append(path)
            while not release.wait(0.01):
                yield
        yield from remove_tree(path)

    monkeypatch.setattr("jobledger.workers.attempts.executor.remove_tree", remove_slowly)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT, max_concurrent=6)
    ) as roles:
        assert roles.worker is not None
        try:
            large = [await roles.submit({"action": "leave a file"}, job_type=job_type) for job_type in TYPES * 2]
            assert [job["status"] for job in [await roles.wait_until_finished(job_id) for job_id in large]] == [
                "completed"
            ] * 4
            await poll_until(lambda: len(removing) == 4, "the directories are being removed")
            assert {path.name.rsplit("-", 2)[0] for path in removing} == set(large)
            assert {executor.job_id for executor in roles.worker._running} == set(large)
            for _ in range(3):
                assert (await roles.wait_until_finished(await submit_save(roles, "misbehaving")))[
                    "status"
                ] == "completed"
            await poll_until(
                lambda: roles.worker is not None and len(roles.worker._running) == 4, "the other slots are free"
            )
        finally:
            release.set()
        await poll_until(lambda: roles.worker is not None and not roles.worker._running, "the slots are free")
        assert not any(path.exists() for path in removing)


async def test_attempt_can_be_cancelled_while_the_previous_directory_is_removed(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    removing, release = list[Path](), threading.Event()

    def remove_slowly(path: Path) -> CooperativeWork[None]:
        removing.append(path)
        while len(removing) == 1 and not release.wait(0.01):
            yield
        yield from remove_tree(path)

    monkeypatch.setattr("jobledger.workers.attempts.executor.remove_tree", remove_slowly)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT, max_concurrent=2)
    ) as roles:
        assert roles.worker is not None
        job_id = await roles.submit({"action": "fail once and leave a file"}, job_type="misbehaving-inline")
        await roles.wait_for_event(JobClaimed, job_id, predicate=lambda event: event.attempt == 2)
        await poll_until(
            lambda: roles.worker is not None and len(roles.worker._running) == 2, "both attempts have a slot"
        )
        release.set()
        await poll_until(
            lambda: roles.worker is not None and len(roles.worker._running) == 1, "the first attempt has ended"
        )
        await roles.handle_commands(job_id, CancelJob("user:tests"))
        assert (await roles.wait_until_finished(job_id))["status"] == "cancelled"


class HangingEventStore(EventStore):
    """An event store whose first append of a result hangs for longer than the time limit and then fails."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.failed: set[str] = set()

    async def append(self, *appends: StreamAppend) -> list[RecordedEvent]:
        results = ("JobCompleted", "StepCompleted")
        streams = {append.stream for append in appends for event in append.events if type(event).__name__ in results}
        if streams - self.failed:
            self.failed |= streams
            await asyncio.sleep(WAIT_SECONDS)
            raise LedgerUnavailable("the database did not respond")
        return await super().append(*appends)


async def test_time_limit_excludes_the_wait_for_the_database(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.workers.attempts.attempt_timeout.PAUSE_AFTER_SECONDS", 0.3)
    async with run_roles_in_process(
        connection,
        store,
        projector=True,
        worker=WorkerOptions(confinement=NO_CONFINEMENT),
        store_class=HangingEventStore,
    ) as roles:
        jobs = [(action, job_type) for action in ("nothing", "one step") for job_type in TYPES]
        job_ids = [
            await roles.submit({"action": action}, job_type=job_type, timeout_s=TIME_LIMIT, max_attempts=1)
            for action, job_type in jobs
        ]
        await roles.wait_until_finished(*job_ids)
        assert [(await roles.load_job(job_id))["error"] for job_id in job_ids] == [None] * 4


async def test_time_limit_continues_during_short_requests() -> None:
    """A processor that only sends requests, without a pause, reaches its limit."""
    expired: list[float] = []
    started_at = time.monotonic()
    limit = AttemptTimeout(0.3, lambda: expired.append(time.monotonic() - started_at))
    limit.start()

    async def send_requests() -> None:
        while not expired:
            async with limit.pause_while_waiting():
                await asyncio.sleep(0.05)

    async with asyncio.timeout(DEADLINE_SECONDS):
        await asyncio.gather(*(send_requests() for _ in range(5)))
    assert 0.25 < expired[0] < 10


async def test_time_limit_pauses_while_a_request_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.workers.attempts.attempt_timeout.PAUSE_AFTER_SECONDS", 0.3)
    expired = asyncio.Event()
    limit = AttemptTimeout(0.6, expired.set)
    limit.start()
    async with limit.pause_while_waiting():
        await asyncio.sleep(1)
    assert not expired.is_set()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await expired.wait()
    limit.stop()
