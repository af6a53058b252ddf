"""A job process that is killed, stopped, half-written, flooding or left behind costs its own job, and nothing stays."""

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

import pytest

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.mongo.connection import Connection
from jobledger.workers import process_runner
from jobledger.workers.child import fork_server_client, main
from jobledger.workers.child import process as job_process
from jobledger.workers.child.confinement import ConfinementSettings
from jobledger.workers.child.fork_server import _Server
from jobledger.workers.child.messages import MessageEnvelope, encode_frame
from jobledger.workers.child.process import JobProcess
from jobledger.workers.process_runner import ProcessRunner
from tests.support.installation import list_descendants
from tests.support.job_processes import has_exited, list_own_job_processes, parent_pid
from tests.support.role_runner import (
    RunningRoles,
    WorkerOptions,
    poll_until,
    run_roles_in_process,
    run_roles_subprocess,
)
from tests.workers.misbehaving import misbehaving_processors

__all__ = ["misbehaving_processors"]
OFF = ConfinementSettings(mode="off")  # what the kernel refuses a job depends on its version
pytestmark = pytest.mark.usefixtures("misbehaving_processors")
TYPE = "misbehaving"
SOON_SECONDS = 2.5  # what is promised is about one second


@pytest.mark.parametrize("highest", [1 << 20, 1 << 50])
def test_limits_of_job_processes_never_exceed_those_that_the_system_sets(highest: int) -> None:
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (highest, highest))
            main._set_limit(resource.RLIMIT_FSIZE, 1 << 30)
            code = int(resource.getrlimit(resource.RLIMIT_FSIZE) != (min(highest, 1 << 30),) * 2)
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@pytest.fixture
async def here(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(confinement=OFF, slots=10)
    ) as running:
        yield running
    assert list_own_job_processes() == []


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "digest"


def number_in(file: str | Path) -> int:
    return int(Path(file).read_text())


async def started(file: Path) -> int:
    await poll_until(file.exists, "the job is at work", seconds=30)
    return number_in(file)


async def submit(here: RunningRoles, file: Path, do: str, **more: object) -> str:
    fields = {"max_attempts": 1, "timeout_s": more.pop("timeout_s", 60)}
    return await here.submit({"action": do, "file": str(file), **more}, job_type=TYPE, **fields)


async def test_requests_that_wait_for_the_database_are_bounded_in_bytes(
    here: RunningRoles, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def slow(runner: ProcessRunner, process: JobProcess, received: MessageEnvelope) -> None:
        sizes[received.request_id] = len(encode_frame(received))
        in_hand.append(list(sizes.values()))
        try:
            await database.wait()
            await answer(runner, process, received)
        finally:
            del sizes[received.request_id]

    answer = ProcessRunner._handle_request
    sizes: dict[int, int] = {}
    in_hand: list[list[int]] = []
    database = asyncio.Event()
    monkeypatch.setattr(ProcessRunner, "_handle_request", slow)
    job_id = await submit(here, file, "finish large steps")
    await poll_until(lambda: bool(in_hand), "the first request is there", seconds=30)
    await asyncio.sleep(0.5)
    assert len(sizes) == 4
    database.set()
    assert (await here.wait_until_finished(job_id, seconds=30))["error"] is None
    assert all(sum(found) <= process_runner._MAX_REQUEST_BYTES or len(found) == 1 for found in in_hand)
    assert max(map(sum, in_hand)) > 6_000_000, "a larger one is handled alone"
    assert 50 < max(map(len, in_hand)) <= process_runner._MAX_REQUESTS, "small ones are handled together"


def test_fork_server_that_cannot_be_killed_is_not_waited_for() -> None:
    class Hung:
        died = False
        kill = terminate = lambda self: None

        def poll(self) -> int | None:
            return 0 if self.died else None

        def wait(self, timeout: float | None = None) -> int:
            raise AssertionError("the event loop would wait")

    server, hung = fork_server_client.ForkServerClient(), Hung()
    server._process = hung  # type: ignore[assignment]
    server.replace(hung)
    server.stop()
    assert len(server._killed) == 1
    hung.died = True
    server._reap()
    assert server._killed == []


async def others_go_on(here: RunningRoles) -> None:
    """Jobs of both kinds are done. An inline job at once; a job process may have to wait for a new fork server."""
    process_job, inline = await here.submit({"action": "nothing"}, job_type=TYPE), await here.submit()
    await here.wait_until_finished(inline, seconds=10)
    await here.wait_until_finished(process_job, seconds=40)


# Programs that the job has started --------------------------------------------------------------------------------


ENDS = {
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


async def test_programs_end_with_their_job(here: RunningRoles, tmp_path: Path) -> None:
    """One is a daemon in a session of its own, one is stopped, one holds everything that the job has open."""

    async def one(end: str) -> None:
        file = tmp_path / end
        limit = 8 if end == "timeout" else 60
        job_id = await submit(here, file, "start programs", end=end, timeout_s=limit)
        pid = await started(file)
        helpers = [number_in(f"{file}-{name}") for name in ("daemon", "stopped", "holder")]
        if end == "kill":
            os.kill(pid, signal.SIGKILL)
        elif end == "cancel":
            await here.handle_commands(job_id, CancelJob("user-1"))
        began = time.monotonic()
        job = await here.wait_until_finished(job_id, seconds=20)
        took = time.monotonic() - began
        assert (job["status"], (job["error"] or {}).get("code")) == ENDS[end], (end, job["error"])
        if end not in ("stop the supervisor", "timeout"):
            assert took < SOON_SECONDS, f"{end}: noticed after {took} s"
        await poll_until(
            lambda: all(has_exited(it) for it in [pid, *helpers]), f"{end}: all are gone", seconds=SOON_SECONDS
        )

    await asyncio.gather(*map(one, ["return", "exit", "kill", "cancel", "timeout", "kill the group"]))
    for end in ("kill the supervisor", "stop the supervisor", "kill the fork server"):
        await one(end)
    await others_go_on(here)


@pytest.mark.parametrize("do", ["start programs", "block with gil", "sleep"])
async def test_nothing_outlives_a_killed_worker(connection: Connection, store: Path, file: Path, do: str) -> None:
    """Not even a job that is in the middle of a long call of a C library, which nothing of Python interrupts."""
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.submit({"action": do, "file": str(file), "end": "wait"}, job_type=TYPE, max_attempts=1)
        with run_roles_subprocess(connection, store, "worker", lease_seconds=3, confinement=0) as worker:
            await worker.wait_until_started()
            pid = await started(file)
            family = list_descendants(worker.pid)
            assert pid in family
            worker.send_signal(signal.SIGKILL)
            await worker.wait_for_exit()
            await poll_until(lambda: all(map(has_exited, family)), "all are gone", seconds=SOON_SECONDS)


# A job process that does not speak properly -----------------------------------------------------------------------


SPEECHLESS = {
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


async def test_job_process_that_sends_no_messages_fails_alone(
    here: RunningRoles, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_process, "STALL_SECONDS", 1.0)
    job_ids = {do: await submit(here, file, do, code=0) for do in SPEECHLESS}
    await others_go_on(here)
    await here.wait_until_finished(*job_ids.values(), seconds=15)
    found = {do: (await here.load_job(job_id))["error"]["code"] for do, job_id in job_ids.items()}
    assert found == SPEECHLESS
    for do in ("fail while writing", "fail while reading"):
        assert "MemoryError: there is none" in (await here.load_job(job_ids[do]))["error"]["details"]["output"]


@pytest.mark.parametrize("end", ["cancel", "timeout", "shutdown"])
async def test_job_process_is_ended_whatever_it_does(
    connection: Connection, store: Path, tmp_path: Path, end: str
) -> None:
    kinds = ["sleep", "block with gil", "flood the worker", "stop mid message"]
    options = WorkerOptions(confinement=OFF, slots=6, shutdown_grace_seconds=0.2)
    async with run_roles_in_process(connection, store, projector=True) as here:
        async with run_roles_in_process(connection, store, worker=options, worker_events_only=True):
            limit = 3 if end == "timeout" else 60
            job_ids = {do: await submit(here, tmp_path / do, do, timeout_s=limit) for do in kinds}
            pids = {do: await started(tmp_path / do) for do in kinds}
            os.kill(pids["sleep"], signal.SIGSTOP)
            await others_go_on(here)
            if end == "cancel":
                for job_id in job_ids.values():
                    await here.handle_commands(job_id, CancelJob("user-1"))
            if end != "shutdown":
                await here.wait_until_finished(*job_ids.values(), seconds=12)
                for do, job_id in job_ids.items():
                    job = await here.load_job(job_id)
                    assert job["status"] == ("cancelled" if end == "cancel" else "failed"), do
                    assert end == "cancel" or job["error"]["code"] == "TIMEOUT"
            began = time.monotonic()
        assert time.monotonic() - began < 8, "shutdown took too long"
        assert all(map(has_exited, pids.values()))
        if end == "shutdown":
            assert [(await here.read_event_types(job_id))[-1] for job_id in job_ids.values()] == ["JobReleased"] * len(
                kinds
            )


async def test_fork_server_that_hangs_is_replaced(
    here: RunningRoles, monkeypatch: pytest.MonkeyPatch, file: Path
) -> None:
    job_id = await submit(here, file, "sleep")
    pid = await started(file)
    server = parent_pid(parent_pid(pid))
    monkeypatch.setattr(fork_server_client, "START_SECONDS", 1.0)
    os.kill(server, signal.SIGSTOP)
    await others_go_on(here)
    await poll_until(lambda: has_exited(server), "it is replaced", seconds=5)
    assert not has_exited(pid), "jobs that it has started go on"
    await here.handle_commands(job_id, CancelJob("user-1"))
    assert (await here.wait_until_finished(job_id))["status"] == "cancelled"
    assert has_exited(pid)


async def test_start_of_job_process_that_hangs_does_not_hold_up_shutdown(
    connection: Connection, store: Path, file: Path
) -> None:
    options = WorkerOptions(confinement=OFF, slots=2, shutdown_grace_seconds=0.2)
    async with run_roles_in_process(connection, store, projector=True) as here:
        async with run_roles_in_process(connection, store, worker=options, worker_events_only=True):
            await others_go_on(here)
            server = next(pid for pid in list_descendants(os.getpid()) if is_fork_server(pid))
            os.kill(server, signal.SIGSTOP)
            job_id = await submit(here, file, "sleep")
            await asyncio.sleep(0.5)
            began = time.monotonic()
        assert time.monotonic() - began < 5
        assert (await here.read_event_types(job_id))[-1] == "JobReleased"
        with suppress(ProcessLookupError):
            os.kill(server, signal.SIGKILL)


def is_fork_server(pid: int) -> bool:
    with suppress(OSError):
        return parent_pid(pid) == os.getpid() and b"fork_server" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


@pytest.mark.parametrize("count", [0, 1])
def test_fork_server_passes_over_a_request_without_its_two_sockets(count: int) -> None:
    """It does not receive the sockets of a request if it may have no more descriptors."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        socket.send_fds(ours, [b'{"memory_limit_mb": 100}'], [ours.fileno()] * count)
        before = len([*Path("/proc/self/fd").iterdir()])
        assert _Server(theirs)._accept()
        assert len([*Path("/proc/self/fd").iterdir()]) == before, "what was received is closed"
