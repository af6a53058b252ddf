"""Start job processes through the worker's fork server (`fork_server.py`)."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

import structlog

from jobledger.workers.child import fork_server
from jobledger.workers.sandbox.confinement import build_job_environment

_log = structlog.get_logger()
START_SECONDS: Final = 20.0
"""Timeout for forking a supervisor."""
LOAD_SECONDS: Final = 60.0
"""Timeout while the fork server imports modules: at its start, and before the first job of a type."""
PRELOAD_MODULES: Final = ["jobledger.workers.child.main"]
"""Modules that the fork server imports at its start, so that job processes start with them loaded."""
_RUN_FORK_SERVER: Final = """
import json, sys
sys.path[:] = json.loads(sys.argv.pop())
from jobledger.workers.child.fork_server import main
main()
"""


class ForkServerClient:
    """Manages the fork server of this process: starts it on demand, and replaces it when it has ended or hangs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._killed: list[subprocess.Popen[bytes]] = []
        """Killed fork servers that have not ended yet. A process that waits for a disk cannot be ended."""
        self._requests: socket.socket | None = None
        self._has_reported_ready = False
        self._loading: set[str] = set()
        """Job types whose modules the fork server was to import, and that no process was started for yet."""
        self._loaded: set[str] = set()
        self._is_preload_enabled = True

    @property
    def request_timeout(self) -> float:
        """Timeout of a request in seconds. It may have to wait for imports that earlier requests need."""
        return START_SECONDS if self._is_ready() and not self._loading else LOAD_SECONDS

    def request_supervisor(
        self,
        job_type: str,
        memory_limit_mb: int,
        control: socket.socket,
        connection: socket.socket,
        environment: Sequence[str],
    ) -> object:
        """Request a supervisor that uses `control`. Return the fork server that received the request.

        Args:
            job_type: Type of the job, whose modules are imported before.
            memory_limit_mb: Address space of the job process in MiB.
            control: The supervisor's end of its socket to the worker.
            connection: The job process's end of its socket to the worker.
            environment: Names of variables that job processes get besides the default ones.

        Raises:
            OSError: The fork server cannot be started or does not accept the request.
        """
        if self._killed:
            self._reap()
        if self._process is None or self._process.poll() is not None:
            self._start(environment)
        assert self._requests is not None  # noqa: S101 - set by _start()
        preload = job_type if self._is_preload_enabled else None
        request = json.dumps({"memory_limit_mb": memory_limit_mb, "preload": preload}).encode()
        try:
            socket.send_fds(self._requests, [request], [control.fileno(), connection.fileno()])
        except (BlockingIOError, ConnectionError) as error:  # it hangs or has ended
            self.replace(self._process)
            raise ConnectionError(f"the fork server does not accept requests: {error}") from error
        if preload is not None and preload not in self._loaded:
            self._loading.add(preload)
        return self._process

    def on_started(self, server: object, job_type: str) -> None:
        """Note that a fork server has started a process for a job of this type."""
        if server is self._process:
            self._loading.discard(job_type)
            self._loaded.add(job_type)

    def replace(self, server: object) -> None:
        """Stop a fork server that did not respond. The next request starts a new one.

        Job processes that it forked continue: each one has its supervisor.
        """
        if self._process is None or server is not self._process:  # another request has replaced it
            return
        if not self._is_ready() or self._loading:
            _log.error("preloading processor modules failed or timed out: job processes import them instead")
            self._is_preload_enabled = False
        self.stop()

    def stop(self) -> None:
        """Kill the fork server, if there is one. Do not wait for its end."""
        if self._process is not None:
            self._process.kill()
            self._killed.append(self._process)
        if self._requests is not None:
            self._requests.close()
        self._process = self._requests = None
        self._has_reported_ready = False
        self._loading.clear()
        self._loaded.clear()
        self._reap()

    def _reap(self) -> None:
        self._killed = [process for process in self._killed if process.poll() is None]

    def _start(self, environment: Sequence[str]) -> None:
        self.stop()
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._requests.setblocking(False)  # noqa: FBT003 - it takes no name
        modules = PRELOAD_MODULES if self._is_preload_enabled else []
        with theirs:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                [
                    *(sys.executable, *subprocess._args_from_interpreter_flags()),  # type: ignore[attr-defined]  # private
                    *("-c", _RUN_FORK_SERVER, str(theirs.fileno()), json.dumps(modules), json.dumps(sys.path)),
                ],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env=build_job_environment(environment),
            )

    def _is_ready(self) -> bool:
        if not self._has_reported_ready and self._requests is not None:
            with suppress(OSError):
                self._has_reported_ready = self._requests.recv(16) == fork_server.READY
        return self._has_reported_ready


fork_server_client = ForkServerClient()
