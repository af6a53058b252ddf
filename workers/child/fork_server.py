"""The fork server: a process with the processors loaded, from which supervisors of jobs are forked.

Each worker process has one, started by `fork_server_client.py`. It forks a supervisor for each request. A request is a
packet of JSON with two sockets: `control` for the supervisor, and the connection of the job process. Before the first
job of a type, the fork server imports the modules in `preload` of its processor. It ends when the worker closes its
socket.

It is also a subreaper: when a supervisor was killed, the processes below it become children of the fork server, which
kills them.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Final

from jobledger.ledger.system import process_attributes
from jobledger.workers.child import supervisor
from jobledger.workers.sandbox.confinement import detect_mount_support
from jobledger.workers.sandbox.process_tree import kill_children

READY: Final = b"ready"
_KILL_SECONDS: Final = 2.0
"""Time to kill processes. Those that survive are killed when the next supervisor ends."""


def main() -> None:
    """Serve requests. Command line arguments: the socket's descriptor, and the modules to import as a JSON list."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    os.setpgid(0, 0)
    supervisor.ignore_signals()
    process_attributes.become_subreaper()
    detect_mount_support()  # before there are threads
    for module in json.loads(sys.argv[2]):
        _load(module, partial(import_module, module))
    requests.send(READY)
    _Server(requests).serve()


def _load(name: str, load: Callable[[], object]) -> None:
    """Load modules. If that fails, the jobs that need them fail and report the error."""
    try:
        load()
    except BaseException as error:  # noqa: BLE001 - third-party code must not end the process that serves all job types
        print(f"{name} could not be preloaded: {type(error).__name__}", file=sys.stderr, flush=True)
    gc.freeze()  # avoids copying shared memory when children collect garbage


def _preload(job_type: str) -> None:
    from jobledger.workers.child.preload import preload

    preload(job_type)


class _Server:
    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._poll = select.poll()
        self._poll.register(requests, select.POLLIN)
        self._supervisors: dict[int, int] = {}  # process id by pidfd
        self._loaded: set[str] = set()

    def serve(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._requests.fileno():
                    self._on_supervisor_exit(descriptor)
                elif not self._accept():
                    return

    def _accept(self) -> bool:
        """Handle a request. Return False if the worker has ended. Supervisors detect that themselves."""
        try:
            text, descriptors, _, _ = socket.recv_fds(self._requests, 4096, 2)
        except OSError:
            return False
        if not text:
            return False
        if len(descriptors) != 2:  # descriptors beyond our limit are not received
            for descriptor in descriptors:
                os.close(descriptor)
            return True  # closing them signals the worker
        control, connection = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        with control, connection:
            request = json.loads(text)
            job_type = request.get("preload")
            if job_type is not None and job_type not in self._loaded:
                self._loaded.add(job_type)
                _load(f"job type {job_type}", partial(_preload, job_type))
            self._fork(control, connection, request["memory_limit_mb"])
        return True

    def _fork(self, control: socket.socket, connection: socket.socket, memory_limit_mb: int) -> None:
        try:
            pid = os.fork()
        except OSError as error:
            control.sendall(json.dumps({"fork_errno": error.errno}).encode() + b"\n")
            return
        if pid == 0:
            try:
                self._requests.close()
                for descriptor in self._supervisors:
                    os.close(descriptor)
                supervisor.supervise(control, connection, memory_limit_mb)
            except BaseException:  # noqa: BLE001 - nothing may return into the code of the fork server
                sys.excepthook(*sys.exc_info())
            finally:
                os._exit(0)
        pidfd = os.pidfd_open(pid)
        self._supervisors[pidfd] = pid
        self._poll.register(pidfd, select.POLLIN)

    def _on_supervisor_exit(self, pidfd: int) -> None:
        self._poll.unregister(pidfd)
        os.close(pidfd)
        os.waitpid(self._supervisors.pop(pidfd), 0)
        # A supervisor that ended regularly leaves no processes. One that was killed leaves those below it.
        kill_children(_KILL_SECONDS, frozenset(self._supervisors.values()))
