"""workers: the supervisor of one job process: starts it, watches it, and ends it with all that it has started.

It is a small process between the fork server and the job process, because only a parent can do this reliably:

- It is the job's subreaper (prctl(2)): a descendant whose parent has died becomes its child, whatever session or
  process group that is in. So it finds and kills all of them, and none is left when it has no child.
- It watches the job process itself and not a pipe, which a helper program could hold open.
- The worker's end of `control` closes when the worker dies, even by SIGKILL; then the supervisor ends the job, even one
  that is in the middle of a long call of a C library.
- If the supervisor itself is killed, the kernel kills the job process (PR_SET_PDEATHSIG), and what that has started
  becomes a child of the fork server, which kills it.

It has one thread and does not import processors' code. It sends lines of JSON through `control`: `job` (process ids),
`output` (what the job printed), `exit` (its exit code). It closes `control` when no descendant is left. It receives
`end`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any, Final, NoReturn

import orjson

from jobledger.workers.child import main as child

STOP_SECONDS: Final = 1.0
"""How long a job process that is to stop may take to do so itself."""
KILL_SECONDS: Final = 30.0  # after that, what is left cannot be killed (it waits for a disk, or belongs to root)
MAX_OUTPUT_BYTES: Final = 64 * 1024  # bytes of output that are forwarded
OUTPUT_TAIL_BYTES: Final = 8192  # bytes of output that are kept for the report of an unexpected end
_LAST_READS: Final = 32
_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_libc = ctypes.CDLL(None, use_errno=True)


def become_subreaper() -> None:
    """Become the parent of every descendant whose own parent dies."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def ignore_signals() -> None:
    """Pass over the signals by which a terminal or a service manager ends all processes: the worker decides.

    A handler rather than SIG_IGN, which programs that a processor starts would inherit.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _ignore_signal)


def supervise(control: socket.socket, connection: socket.socket, memory_limit_mb: int) -> None:
    """Run one job process to its end, and return when nothing of it is left. Called in a process of its own."""
    os.setpgid(0, 0)
    become_subreaper()
    output, theirs = os.pipe()
    us = os.getpid()
    try:
        job = os.fork()
    except OSError as error:
        _send(control, {"fork_errno": error.errno})
        return
    if job == 0:
        os.close(output)
        control.close()
        _run_job(us, connection, theirs, memory_limit_mb)
    connection.close()
    os.close(theirs)
    _send(control, {"job": job, "supervisor": us})
    _Supervisor(control, job, output).run()


def _run_job(supervisor: int, connection: socket.socket, output: int, memory_limit_mb: int) -> NoReturn:
    try:
        _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != supervisor:  # it died before that call
            os._exit(1)
        os.setpgid(0, 0)  # so a processor that signals its process group does not reach the supervisor
        for number in (1, 2):
            os.dup2(output, number)
        os.close(output)
        sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # nothing is lost in a crash
        child.run_job_process(connection, memory_limit_mb)
    except BaseException:  # noqa: BLE001 - nothing may return into the code of the fork server
        sys.excepthook(*sys.exc_info())
        sys.stderr.flush()
    finally:
        os._exit(1)


class _Supervisor:
    def __init__(self, control: socket.socket, job: int, output: int) -> None:
        self._control = control
        self._job = job
        self._output = output
        self._forwarded = 0
        self._left_out = 0
        self._tail = b""

    def run(self) -> None:
        handle = os.pidfd_open(self._job)
        os.set_blocking(self._output, False)
        poll = select.poll()
        for descriptor in (handle, self._output, self._control.fileno()):
            poll.register(descriptor, select.POLLIN)
        deadline: float | None = None
        while True:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = {descriptor for descriptor, _ in poll.poll(timeout)}
            if self._output in ready and self._read_output() is None:
                poll.unregister(self._output)
            if handle in ready or (deadline is not None and time.monotonic() >= deadline):
                break
            if self._control.fileno() in ready:
                poll.unregister(self._control)
                deadline = time.monotonic() + (STOP_SECONDS if self._receive() else 0)
        ended = handle in ready
        if ended:
            self._report()
        kill_children(KILL_SECONDS)
        if not ended:
            self._send_exit(-signal.SIGKILL)

    def _receive(self) -> bool:
        """Return whether the worker is there, and only wants the job to end."""
        try:
            return bool(self._control.recv(16))
        except OSError:
            return False

    def _report(self) -> None:
        for _ in range(_LAST_READS):  # bounded: a descendant may go on printing
            if not self._read_output():
                break
        _, status = os.waitpid(self._job, 0)
        self._send_exit(os.waitstatus_to_exitcode(status))

    def _send_exit(self, code: int) -> None:
        tail = self._tail.decode(errors="replace")
        _send(self._control, {"exit": code, "tail": tail, "omitted_bytes": self._left_out})

    def _read_output(self) -> bool | None:
        """Take some of what the job prints; return whether there was something, and None if there will be no more."""
        try:
            text = os.read(self._output, 65536)
        except BlockingIOError:
            return False
        if not text:
            return None
        self._tail = (self._tail + text)[-OUTPUT_TAIL_BYTES:]
        part = text[: MAX_OUTPUT_BYTES - self._forwarded]
        self._forwarded += len(part)
        self._left_out += len(text) - len(part)
        if part:
            _send(self._control, {"output": part.decode(errors="replace")})
        return True


def kill_children(seconds: float, exclude: frozenset[int] = frozenset()) -> None:
    """Kill all children of this process but `spare`, and theirs, which become ours when these die.

    Stops after so many seconds: what has not died by then cannot be killed.
    """
    deadline, pause = time.monotonic() + seconds, 0.001
    while time.monotonic() < deadline:
        left = list_children() - exclude
        for pid in left:
            # Also one that is stopped dies of this. The number is no other process's: we have not reaped it yet.
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        reaped = [pid for pid in left if _reap(pid)]
        if not left:
            return
        if not reaped:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)


def list_children() -> set[int]:
    """Return the children of this process."""
    found: set[int] = set()
    try:
        for path in Path("/proc/self/task").glob("*/children"):
            found.update(map(int, path.read_text().split()))
    except OSError:
        return _children_by_parent()
    return found if found or _has_children_files() else _children_by_parent()


def _has_children_files() -> bool:
    return os.path.exists(f"/proc/self/task/{os.getpid()}/children")  # noqa: PTH110 - called in a loop


def _children_by_parent() -> set[int]:
    """Return the children of this process on a kernel without /proc/…/children."""
    found, us = set(), os.getpid()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == us:
                found.add(int(path.parent.name))
    return found


def _reap(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True


def _send(control: socket.socket, content: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the worker is gone
        control.sendall(orjson.dumps(content) + b"\n")


def _ignore_signal(*_: object) -> None:
    """Do nothing about a signal."""


def _prctl(option: int, value: int) -> None:
    if _libc.prctl(option, value, 0, 0, 0) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"prctl({option}): {errno.errorcode.get(number, number)}")
