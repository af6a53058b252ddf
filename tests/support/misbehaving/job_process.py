"""Actions that crash, block or flood a job process, or leave programs behind."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jobledger.workers.child import main as child
from jobledger.workers.child.messages import FRAME_HEADER
from jobledger.workers.processor import JobContext, Results
from tests.support.misbehaving.processor import ACTIONS, action, write_marker_file


@action
async def exit_at_once(job: JobContext) -> Results:
    os._exit(job.parameters.code)


@action
async def crash(job: JobContext) -> Results:
    print("output before the crash", flush=True)
    ctypes.string_at(0)
    return Results()


@action
async def sleep(job: JobContext) -> Results:
    write_marker_file(job, os.getpid())
    await asyncio.sleep(3600)
    return Results()


@action
async def block_with_gil(job: JobContext) -> Results:
    """Sleep in C with the GIL held and signals blocked, so that no Python code runs."""
    signal.pthread_sigmask(signal.SIG_BLOCK, set(signal.valid_signals()))
    write_marker_file(job, os.getpid())
    ctypes.PyDLL(None).sleep(3600)
    return Results()


DAEMON = """
import os, signal, sys, time
if os.fork(): os._exit(0)
os.setsid()
if os.fork(): os._exit(0)
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT): signal.signal(number, signal.SIG_IGN)
with open(sys.argv[1] + ".new", "w") as file: file.write(str(os.getpid()))
os.rename(sys.argv[1] + ".new", sys.argv[1])
time.sleep(3600)
"""


def start_background_programs(job: JobContext) -> list[subprocess.Popen[bytes]]:
    """Start programs that outlive the job. One of them inherits all open descriptors of the job process."""
    daemon = [sys.executable, "-S", "-c", DAEMON, f"{job.parameters.file}-daemon"]
    descriptors = [number for number in range(3, 64) if is_open(number)]
    stopped = subprocess.Popen(["sleep", "3600"], start_new_session=True)
    os.kill(stopped.pid, signal.SIGSTOP)
    holder = subprocess.Popen(["sleep", "3600"], pass_fds=descriptors)
    Path(f"{job.parameters.file}-stopped").write_text(str(stopped.pid))
    Path(f"{job.parameters.file}-holder").write_text(str(holder.pid))
    return [subprocess.Popen(daemon), stopped, holder]


def is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def wait_for_file(path: Path) -> None:
    while not path.exists():  # noqa: ASYNC110, ASYNC240
        await asyncio.sleep(0.01)


@action
async def start_programs(job: JobContext) -> Results:
    """Start programs and end in the way that the parameters name."""
    start_background_programs(job)
    await wait_for_file(Path(f"{job.parameters.file}-daemon"))
    write_marker_file(job, os.getpid())
    match job.parameters.end:
        case "return":
            return Results()
        case "exit":
            os._exit(0)
        case "kill the supervisor":
            os.kill(os.getppid(), signal.SIGKILL)
        case "stop the supervisor":
            os.kill(os.getppid(), signal.SIGSTOP)
            return Results()
        case "kill the fork server":
            os.kill(parent_of(os.getppid()), signal.SIGKILL)
            return Results()
        case "kill the group":
            os.killpg(0, signal.SIGKILL)
    await asyncio.sleep(3600)
    return Results()


def connection_to_worker() -> socket.socket:
    """Find the socket that connects this process to its worker, as hostile code would."""
    for number in range(3, 64):
        try:
            candidate = socket.socket(fileno=os.dup(number))
        except OSError:
            continue
        if (
            candidate.family == socket.AF_UNIX
            and candidate.type == socket.SOCK_STREAM
            and candidate.getpeername() == ""
        ):
            credentials = candidate.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            if int.from_bytes(credentials[:4], "little") not in (0, os.getpid()):
                return candidate
        candidate.close()
    raise AssertionError("no socket to the worker found")


def add_sending_action(name: str, content: Callable[[], bytes], *, then_sleep: bool = True) -> None:
    async def run(job: JobContext) -> Results:
        connection_to_worker().sendall(content())
        if then_sleep:
            time.sleep(3600)  # noqa: ASYNC251 - nothing else may be sent
        return Results()

    ACTIONS[name] = run


add_sending_action("send half a message", lambda: FRAME_HEADER.pack(1000) + b'{"request_id": 1, "mess')

add_sending_action("send half a header", lambda: b"\0\0")

add_sending_action("send garbage", lambda: FRAME_HEADER.pack(7) + b"garbage")

add_sending_action(
    "send the wrong kind", lambda: FRAME_HEADER.pack(43) + b'{"request_id":1,"message":{"kind":"fancy"}}'
)

add_sending_action("send too much", lambda: FRAME_HEADER.pack(2**32 - 1))


@action
async def fail_while_writing(job: JobContext) -> Results:
    """Raise MemoryError in the thread that sends messages."""
    vars(child)["encode_frame"] = raise_memory_error
    await job.log("info", "cannot be sent")
    await asyncio.sleep(3600)
    return Results()


@action
async def fail_while_reading(job: JobContext) -> Results:
    async def step() -> str:
        return "done"

    vars(child)["_receive"] = raise_memory_error
    for number in range(2):
        await job.step(f"step {number}", step)
    await asyncio.sleep(3600)
    return Results()


def raise_memory_error(*_: Any) -> Any:
    raise MemoryError("out of memory")


@action
async def flood_the_worker(job: JobContext) -> Results:
    connection = connection_to_worker()
    text = b'{"request_id":0,"message":{"kind":"log","entries":[[0,"info","flood",""]]}}'
    frames = (FRAME_HEADER.pack(len(text)) + text) * 1000
    write_marker_file(job, os.getpid())
    while True:
        connection.sendall(frames)


@action
async def stop_mid_message(job: JobContext) -> Results:
    connection_to_worker().sendall(FRAME_HEADER.pack(1000) + b"{")
    write_marker_file(job, os.getpid())
    os.kill(os.getpid(), signal.SIGSTOP)
    return Results()


@action
async def close_everything(job: JobContext) -> Results:
    os.closerange(3, 1024)
    return Results()
