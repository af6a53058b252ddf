"""The supervisor of one job process: it starts and watches the process, and ends it with all its descendants.

It is a small process between the fork server and the job process, because only a parent can do this reliably:

- It is the job's subreaper (prctl(2)). A descendant whose parent has ended becomes its child, in any session and
  process group. The supervisor kills its children until it has none.
- It watches the job process itself and not a pipe, which a helper program could hold open.
- When the worker ends, even by SIGKILL, its end of `control` closes. The supervisor then kills the job, even during a
  long call of a C library.
- If the supervisor itself is killed, the kernel kills the job process (PR_SET_PDEATHSIG). Its descendants become
  children of the fork server, which kills them.

The supervisor has one thread and does not import the code of processors. It sends lines of JSON through `control`:
`job` (process IDs), `output` (what the job printed), `exit` (its exit code). It closes `control` when no descendant is
left. It receives `end`.
"""

from __future__ import annotations

import codecs
import os
import select
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import Any, Final, NoReturn

import orjson

from jobledger.ledger.system import process_attributes
from jobledger.workers.child.main import run_job_process
from jobledger.workers.sandbox.process_tree import kill_children

STOP_SECONDS: Final = 1.0
"""Time in which a job process can react to the stop message."""
KILL_SECONDS: Final = 30.0
"""Time to kill all descendants. One that survives cannot be killed: it waits for a disk or belongs to root."""
MAX_OUTPUT_BYTES: Final = 64 * 1024
"""Maximum size of the output that is forwarded to the worker."""
OUTPUT_TAIL_BYTES: Final = 8192
"""Size of the end of the output that is kept, to report an unexpected end."""
_MAX_FINAL_READS: Final = 32


def ignore_signals() -> None:
    """Ignore the signals by which a terminal or a service manager ends all processes: the worker decides.

    This uses a handler, because programs started by a processor would inherit SIG_IGN.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: None)


def supervise(control: socket.socket, connection: socket.socket, memory_limit_mb: int) -> None:
    """Run one job process to its end, and return when no descendant is left. Call in a dedicated process."""
    os.setpgid(0, 0)
    process_attributes.become_subreaper()
    output, job_output = os.pipe()
    own_pid = os.getpid()
    try:
        job = os.fork()
    except OSError as error:
        _send(control, {"fork_errno": error.errno})
        return
    if job == 0:
        os.close(output)
        control.close()
        _run_job(own_pid, connection, job_output, memory_limit_mb)
    connection.close()
    os.close(job_output)
    _send(control, {"job": job, "supervisor": own_pid})
    _Supervisor(control, job, output).run()


def _run_job(supervisor: int, connection: socket.socket, output: int, memory_limit_mb: int) -> NoReturn:
    try:
        process_attributes.set_parent_death_signal(signal.SIGKILL)
        if os.getppid() != supervisor:  # the supervisor ended before the call
            os._exit(1)
        os.setpgid(0, 0)  # signals of a processor to its process group must not reach the supervisor
        for number in (1, 2):
            os.dup2(output, number)
        os.close(output)
        # No output is lost in a crash, and a line is written as a whole, also with PYTHONUNBUFFERED.
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(line_buffering=True, write_through=False)  # type: ignore[union-attr]  # a text file
        run_job_process(connection, memory_limit_mb)
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
        self._omitted_bytes = 0
        self._tail = b""
        self._is_tail_cut = False
        # A character may be in two reads.
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def run(self) -> None:
        pidfd = os.pidfd_open(self._job)
        os.set_blocking(self._output, False)
        poll = select.poll()
        for descriptor in (pidfd, self._output, self._control.fileno()):
            poll.register(descriptor, select.POLLIN)
        deadline: float | None = None
        while True:
            timeout = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            ready = {descriptor for descriptor, _ in poll.poll(timeout)}
            if self._output in ready and self._read_output() is None:
                poll.unregister(self._output)
            if pidfd in ready or (deadline is not None and time.monotonic() >= deadline):
                break
            if self._control.fileno() in ready:
                poll.unregister(self._control)
                deadline = time.monotonic() + (STOP_SECONDS if self._receive() else 0)
        ended = pidfd in ready
        if ended:
            self._report_exit()
        kill_children(KILL_SECONDS)
        if not ended:
            self._send_exit(-signal.SIGKILL)

    def _receive(self) -> bool:
        """Return whether the worker still runs and requests the end of the job."""
        try:
            return bool(self._control.recv(16))
        except OSError:
            return False

    def _report_exit(self) -> None:
        for _ in range(_MAX_FINAL_READS):  # bounded, because a descendant may continue to print
            if not self._read_output():
                break
        _, status = os.waitpid(self._job, 0)
        self._send_exit(os.waitstatus_to_exitcode(status))

    def _send_exit(self, code: int) -> None:
        if rest := self._decoder.decode(b"", final=True):
            _send(self._control, {"output": rest})
        tail = self._tail.decode(errors="replace")
        if self._is_tail_cut:
            tail = "…" + tail.lstrip("\N{REPLACEMENT CHARACTER}")
        _send(self._control, {"exit": code, "tail": tail, "omitted_bytes": self._omitted_bytes})

    def _read_output(self) -> bool | None:
        """Read output of the job. Return whether there was any; None if there will be no more."""
        try:
            data = os.read(self._output, 65536)
        except BlockingIOError:
            return False
        if not data:
            return None
        self._is_tail_cut |= len(self._tail) + len(data) > OUTPUT_TAIL_BYTES
        self._tail = (self._tail + data)[-OUTPUT_TAIL_BYTES:]
        forwarded = data[: MAX_OUTPUT_BYTES - self._forwarded]
        self._forwarded += len(forwarded)
        self._omitted_bytes += len(data) - len(forwarded)
        if text := self._decoder.decode(forwarded):
            _send(self._control, {"output": text})
        return True


def _send(control: socket.socket, content: dict[str, Any]) -> None:
    with suppress(OSError):  # the worker has ended
        control.sendall(orjson.dumps(content) + b"\n")
