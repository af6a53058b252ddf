"""Tests of job processes that are killed or stopped, or send broken messages: only their own job fails.

No process is left behind.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import pytest

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.domain.events import JobClaimed
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.system import process_attributes
from jobledger.workers.attempts import process_runner
from jobledger.workers.attempts.process_runner import ProcessRunner
from jobledger.workers.child import fork_server_client
from jobledger.workers.child import process as job_process
from jobledger.workers.child.fork_server import _Server
from jobledger.workers.child.messages import MessageEnvelope, encode_frame
from jobledger.workers.child.process import JobProcess
from tests.support.installation import has_exited, list_descendants
from tests.support.job_processes import list_own_job_processes, parent_pid
from tests.support.polling import poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process, run_roles_subprocess
from tests.support.suspension import suspend
from tests.workers.misbehaving_processors import misbehaving_processors

__all__ = ["misbehaving_processors"]
NO_CONFINEMENT: Final = "off"  # what confinement denies depends on the kernel version
pytestmark = pytest.mark.usefixtures("misbehaving_processors")
JOB_TYPE = "misbehaving"
EXIT_SECONDS = 15.0  # on an idle machine about one second; far less than STALL_SECONDS and KILL_SECONDS


@pytest.mark.parametrize("hard_limit", [1 << 20, 1 << 50])
def test_set_limit_never_exceeds_the_limit_of_the_system(hard_limit: int) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard_limit, hard_limit))
            process_attributes.limit_resource(resource.RLIMIT_FSIZE, 1 << 30)
            code = int(resource.getrlimit(resource.RLIMIT_FSIZE) != (min(hard_limit, 1 << 30),) * 2)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture
async def roles(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=NO_CONFINEMENT, max_concurrent=10)
    ) as running:
        yield running
    assert list_own_job_processes() == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "digest"


def read_number(file: str | Path) -> int:
    return int(Path(file).read_text())


async def wait_for_start(file: Path) -> int:
    """Wait until the job wrote its process ID to the file, and return it."""
    await poll_until(file.exists, "the job has started")
    return read_number(file)


async def submit(roles: RunningRoles, file: Path, action: str, **parameters: object) -> str:
    fields = {"max_attempts": 1, "timeout_s": parameters.pop("timeout_s", 60)}
    return await roles.submit({"action": action, "file": str(file), **parameters}, job_type=JOB_TYPE, **fields)


async def test_requests_waiting_for_the_database_are_bounded_in_bytes(
    roles: RunningRoles, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handle_slowly(runner: ProcessRunner, process: JobProcess, received: MessageEnvelope) -> None:
        sizes[received.request_id] = len(encode_frame(received))
        sizes_in_memory.append(list(sizes.values()))
        try:
            await database_responds.wait()
            await handle_request(runner, process, received)
        finally:
            del sizes[received.request_id]

    handle_request = ProcessRunner._handle_request
    sizes: dict[int, int] = {}
    sizes_in_memory: list[list[int]] = []
    database_responds = asyncio.Event()
    monkeypatch.setattr(ProcessRunner, "_handle_request", handle_slowly)
    job_id = await submit(roles, file, "finish large steps")
    await poll_until(lambda: bool(sizes_in_memory), "the first request has arrived")
    await poll_until(lambda: len(sizes) == 4, "4 requests are in memory")
    await asyncio.sleep(0.5)
    assert len(sizes) == 4, "more requests were read before some were answered"
    database_responds.set()
    assert (await roles.wait_until_finished(job_id))["error"] is None
    assert all(
        sum(sizes_at_once) <= process_runner._MAX_REQUEST_BYTES or len(sizes_at_once) == 1
        for sizes_at_once in sizes_in_memory
    )
    assert max(map(sum, sizes_in_memory)) > 6_000_000, "a larger request is handled alone"
    assert 50 < max(map(len, sizes_in_memory)) <= process_runner._MAX_REQUESTS, "small requests are handled together"


def test_unkillable_fork_server_does_not_block_the_worker() -> None:
    class UnkillableProcess:
        has_exited = False
        kill = terminate = lambda self: None

        def poll(self) -> int | None:
            return 0 if self.has_exited else None

        def wait(self, timeout: float | None = None) -> int:
            raise AssertionError("the event loop would block")

    server, process = fork_server_client.ForkServerClient(), UnkillableProcess()
    server._process = process  # type: ignore[assignment]
    server.replace(process)
    server.stop()
    assert len(server._killed) == 1
    process.has_exited = True
    server._reap()
    assert server._killed == []


async def assert_other_jobs_complete(roles: RunningRoles) -> None:
    """Run an inline job, which needs no fork server, and a job process, which may wait for a new fork server."""
    process_job, inline = await roles.submit({"action": "nothing"}, job_type=JOB_TYPE), await roles.submit()
    await roles.wait_until_finished(inline)
    await roles.wait_until_finished(process_job)


# Programs that the job has started --------------------------------------------------------------------------------


EXPECTED_ENDS = {
    "return": ("completed", None),
    "exit": ("failed", "PROCESS_DIED"),
    "kill": ("failed", "PROCESS_KILLED"),
    "cancel": ("cancelled", None),
    "timeout": ("failed", "TIMEOUT"),
    "kill the group": ("failed", "PROCESS_KILLED"),
    "kill the supervisor": ("failed", "PROCESS_KILLED"),
    "stop the supervisor": ("completed", None),
    "kill the fork server": ("completed", None),
}


async def test_programs_of_a_job_end_with_it(roles: RunningRoles, tmp_path: Path) -> None:
    """One program is a daemon in its own session, one is stopped, one holds all open files of the job."""

    async def check(end: str) -> None:
        file = tmp_path / end
        limit = 10 if end == "timeout" else 60
        job_id = await submit(roles, file, "start programs", end=end, timeout_s=limit)
        pid = await wait_for_start(file)
        helpers = [read_number(f"{file}-{name}") for name in ("daemon", "stopped", "holder")]
        if end == "kill":
            os.kill(pid, signal.SIGKILL)
        elif end == "cancel":
            await roles.handle_commands(job_id, CancelJob("user-1"))
        waiting_since = time.monotonic()
        job = await roles.wait_until_finished(job_id)
        seconds = time.monotonic() - waiting_since
        assert (job["status"], (job["error"] or {}).get("code")) == EXPECTED_ENDS[end], (end, job["error"])
        if end not in ("stop the supervisor", "timeout"):
            assert seconds < EXIT_SECONDS, f"{end}: detected after {seconds} s"
        await poll_until(
            lambda: all(map(has_exited, [pid, *helpers])), f"{end}: all programs have exited", seconds=EXIT_SECONDS
        )

    await asyncio.gather(*map(check, ["return", "exit", "kill", "cancel", "timeout", "kill the group"]))
    for end in ("kill the supervisor", "stop the supervisor", "kill the fork server"):
        await check(end)
    await assert_other_jobs_complete(roles)


@pytest.mark.parametrize("action", ["start programs", "block with gil", "sleep"])
async def test_no_process_outlives_a_killed_worker(
    connection: Connection, store: Path, file: Path, action: str
) -> None:
    """A long call of a C library, which no Python signal handler interrupts, must end as well."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit({"action": action, "file": str(file), "end": "wait"}, job_type=JOB_TYPE, max_attempts=1)
        with run_roles_subprocess(connection, store, "worker", lease_seconds=3, confinement=0) as worker:
            await worker.wait_until_started()
            pid = await wait_for_start(file)
            descendants = list_descendants(worker.pid)
            assert pid in descendants
            worker.send_signal(signal.SIGKILL)
            await worker.wait_for_exit()
            await poll_until(
                lambda: all(map(has_exited, descendants)), "all processes have exited", seconds=EXIT_SECONDS
            )


# Job processes with broken messages --------------------------------------------------------------------------------


BROKEN_MESSAGES = {
    "send half a message": "PROCESS_STALLED",
    "send half a header": "PROCESS_STALLED",
    "stop mid message": "PROCESS_STALLED",
    "send garbage": "INVALID_MESSAGE",
    "send the wrong kind": "INVALID_MESSAGE",
    "send too much": "INVALID_MESSAGE",
    "close everything": "PROCESS_DIED",
    "exit at once": "PROCESS_DIED",
    "fail while writing": "PROCESS_DIED",
    "fail while reading": "PROCESS_DIED",
}


async def test_job_process_with_broken_messages_fails_only_its_job(
    roles: RunningRoles, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_process, "STALL_SECONDS", 1.0)
    job_ids = {action: await submit(roles, file, action, code=0) for action in BROKEN_MESSAGES}
    await assert_other_jobs_complete(roles)
    await roles.wait_until_finished(*job_ids.values())
    codes = {action: (await roles.load_job(job_id))["error"]["code"] for action, job_id in job_ids.items()}
    assert codes == BROKEN_MESSAGES
    for action in ("fail while writing", "fail while reading"):
        assert "MemoryError: out of memory" in (await roles.load_job(job_ids[action]))["error"]["details"]["output"]


@pytest.mark.parametrize("end", ["cancel", "timeout", "shutdown"])
async def test_unresponsive_job_process_ends_on_cancel_timeout_and_shutdown(
    connection: Connection, store: Path, tmp_path: Path, end: str
) -> None:
    actions = ["sleep", "block with gil", "flood the worker", "stop mid message"]
    options = WorkerOptions(confinement=NO_CONFINEMENT, max_concurrent=6, shutdown_grace_seconds=0.2)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        async with run_roles_in_process(connection, store, worker=options, is_worker_process=True):
            limit = 8 if end == "timeout" else 60
            job_ids = {action: await submit(roles, tmp_path / action, action, timeout_s=limit) for action in actions}
            pids = {action: await wait_for_start(tmp_path / action) for action in actions}
            suspend(pids["sleep"])
            await assert_other_jobs_complete(roles)
            if end == "cancel":
                for job_id in job_ids.values():
                    await roles.handle_commands(job_id, CancelJob("user-1"))
            if end != "shutdown":
                await roles.wait_until_finished(*job_ids.values(), seconds=EXIT_SECONDS + limit)
                for action, job_id in job_ids.items():
                    job = await roles.load_job(job_id)
                    assert job["status"] == ("cancelled" if end == "cancel" else "failed"), action
                    assert end == "cancel" or job["error"]["code"] == "TIMEOUT"
            stopping_since = time.monotonic()
        assert time.monotonic() - stopping_since < EXIT_SECONDS, "shutdown took too long"
        assert all(map(has_exited, pids.values()))
        if end == "shutdown":
            assert [(await roles.read_event_types(job_id))[-1] for job_id in job_ids.values()] == ["JobReleased"] * len(
                actions
            )


async def test_hanging_fork_server_is_replaced(
    roles: RunningRoles, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    job_id = await submit(roles, file, "sleep")
    pid = await wait_for_start(file)
    server = parent_pid(parent_pid(pid))
    monkeypatch.setattr(fork_server_client, "START_SECONDS", 1.0)
    suspend(server)
    await assert_other_jobs_complete(roles)
    await poll_until(lambda: has_exited(server), "the fork server is replaced", seconds=EXIT_SECONDS)
    assert not has_exited(pid), "jobs that it started continue"
    await roles.handle_commands(job_id, CancelJob("user-1"))
    assert (await roles.wait_until_finished(job_id))["status"] == "cancelled"
    assert has_exited(pid)


async def test_fork_server_imports_only_what_the_jobs_of_the_worker_need(roles: RunningRoles) -> None:
    def has_loaded(library: str) -> bool:
        return library in Path(f"/proc/{server}/maps").read_text()

    fork_server_client.fork_server_client.stop()
    await roles.wait_until_finished(await roles.submit({"action": "nothing"}, job_type=JOB_TYPE))
    server = next(pid for pid in list_descendants(os.getpid()) if is_fork_server(pid))
    assert not has_loaded("lxml")
    session = {"event": "E", "session": "S", "url": "http://127.0.0.1:9/", "filename": "s.md"}
    await roles.wait_until_finished(await roles.submit(session, job_type="session"))
    assert has_loaded("lxml")


async def test_hanging_process_start_does_not_delay_shutdown(connection: Connection, store: Path, file: Path) -> None:
    options = WorkerOptions(confinement=NO_CONFINEMENT, max_concurrent=2, shutdown_grace_seconds=0.2)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        async with run_roles_in_process(connection, store, worker=options, is_worker_process=True):
            await assert_other_jobs_complete(roles)
            server = next(pid for pid in list_descendants(os.getpid()) if is_fork_server(pid))
            suspend(server)
            job_id = await submit(roles, file, "sleep")
            await roles.wait_for_event(JobClaimed, job_id)
            await asyncio.sleep(0.2)  # the worker waits for the stopped fork server
            stopping_since = time.monotonic()
        assert time.monotonic() - stopping_since < EXIT_SECONDS
        assert (await roles.read_event_types(job_id))[-1] == "JobReleased"
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


def is_fork_server(pid: int) -> bool:
    with suppress(OSError):
        return parent_pid(pid) == os.getpid() and b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.mark.parametrize("count", [0, 1])
def test_fork_server_skips_a_request_without_its_two_sockets(count: int) -> None:
    """The kernel drops the sockets of a request if the process may open no more descriptors."""
    worker_end, server_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with worker_end, server_end:
        socket.send_fds(worker_end, [b'{"memory_limit_mb": 100}'], [worker_end.fileno()] * count)
        before = len([*Path("/proc/self/fd").iterdir()])
        assert _Server(server_end)._accept()
        assert len([*Path("/proc/self/fd").iterdir()]) == before, "received sockets are closed"
