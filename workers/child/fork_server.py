"""workers: the fork server: a process that has the processors loaded, from which supervisors of jobs are forked.

One for each worker process, started by `job_process.py`. It imports what the processors name (`preload`), then forks a
supervisor for each request. A request is a packet of JSON with two sockets: `control`, for the supervisor, and the one
for the job process. It ends when the worker's end of its socket closes.

It is a subreaper, too: when a supervisor has been killed, what that has supervised becomes a child of this process, and
is killed.
"""

from __future__ import annotations

import gc
import json
import os
import select
import socket
import sys
from importlib import import_module
from typing import Final

from jobledger.workers.child import supervisor
from jobledger.workers.child.confinement import detect_mount_support

READY: Final = b"ready"
_KILL_SECONDS: Final = 2.0  # what has not died by then is tried again when the next supervisor ends


def main() -> None:
    """Serve requests. Arguments: the socket's descriptor, and the modules to import as a JSON list."""
    requests = socket.socket(fileno=int(sys.argv[1]))
    os.setpgid(0, 0)
    supervisor.ignore_signals()
    supervisor.become_subreaper()
    detect_mount_support()  # before there are threads
    for module in json.loads(sys.argv[2]):
        _load(module)
    gc.freeze()  # children that collect garbage do not copy what they share with us
    requests.send(READY)
    _Server(requests).serve()


def _load(module: str) -> None:
    """Import a module. One that cannot be imported fails in the jobs that need it, and says there why."""
    try:
        import_module(module)
    except BaseException as error:  # noqa: BLE001 - foreign code must not end the process that serves all job types
        print(f"{module} could not be loaded beforehand: {type(error).__name__}", file=sys.stderr, flush=True)


class _Server:
    def __init__(self, requests: socket.socket) -> None:
        self._requests = requests
        self._poll = select.poll()
        self._poll.register(requests, select.POLLIN)
        self._supervisors: dict[int, int] = {}  # process id by pidfd

    def serve(self) -> None:
        while True:
            for descriptor, _ in self._poll.poll():
                if descriptor != self._requests.fileno():
                    self._ended(descriptor)
                elif not self._accept():
                    return

    def _accept(self) -> bool:
        """Take a request; return False if the worker is gone. The supervisors find that out themselves."""
        try:
            text, descriptors, _, _ = socket.recv_fds(self._requests, 4096, 2)
        except OSError:
            return False
        if not text:
            return False
        if len(descriptors) != 2:  # those that exceed a limit of ours are not received
            for descriptor in descriptors:
                os.close(descriptor)
            return True  # the worker sees that its sockets are closed
        control, connection = (socket.socket(fileno=descriptor) for descriptor in descriptors)
        with control, connection:
            self._fork(control, connection, json.loads(text)["memory_limit_mb"])
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
        handle = os.pidfd_open(pid)
        self._supervisors[handle] = pid
        self._poll.register(handle, select.POLLIN)

    def _ended(self, handle: int) -> None:
        self._poll.unregister(handle)
        os.close(handle)
        os.waitpid(self._supervisors.pop(handle), 0)
        # A supervisor that ended by itself has left nothing. One that was killed has left what it supervised.
        if supervisor.list_children() - set(self._supervisors.values()):
            supervisor.kill_children(_KILL_SECONDS, frozenset(self._supervisors.values()))


if __name__ == "__main__":
    main()
