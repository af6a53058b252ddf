"""A worker process that resumes after its lease expired and continues before its next heartbeat.

Usually a resumed worker stops after its next heartbeat. Here the first heartbeat after the lease expired waits until an
append of the worker was rejected, as if the kernel scheduled the heartbeat thread last.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pymongo import monitoring

from jobledger.ledger.mongo.connection import Connection
from tests.support import role_runner
from tests.support.polling import DEADLINE_SECONDS
from tests.support.role_runner import RolesSubprocess, list_live_processes_in_session


class DelayedHeartbeat(monitoring.CommandListener):
    """Delays the first heartbeat after the lease expired until `WorkerFenced` is in the log."""

    def __init__(self, lease_seconds: float) -> None:
        self._lease_seconds = lease_seconds
        self._last_heartbeat_at = time.monotonic()
        self._rejection_request_id: int | None = None
        self._rejected = threading.Event()

    def started(self, event: monitoring.CommandStartedEvent) -> None:
        if event.command_name == "insert" and event.command["insert"] == "events":
            if any(document["type"] == "WorkerFenced" for document in event.command["documents"]):
                self._rejection_request_id = event.request_id
        elif event.command_name == "update" and event.command["update"] == "workers" and _is_heartbeat_thread():
            if time.monotonic() - self._last_heartbeat_at > self._lease_seconds:
                self._rejected.wait(DEADLINE_SECONDS)
            self._last_heartbeat_at = time.monotonic()

    def succeeded(self, event: monitoring.CommandSucceededEvent) -> None:
        if event.request_id == self._rejection_request_id:
            self._rejected.set()

    def failed(self, event: monitoring.CommandFailedEvent) -> None:
        """Ignore the failed heartbeat. It is retried."""


def _is_heartbeat_thread() -> bool:
    """Return whether a heartbeat is sent. The event loop, which must not block, updates other fields of the lease."""
    return threading.current_thread() is not threading.main_thread()


class ZombieWorkerProcess(RolesSubprocess):
    """A `RolesSubprocess` with a delayed heartbeat."""

    def __init__(self, connection: Connection, store: Path, **options: Any) -> None:
        arguments = [connection.uri, connection.db_name, str(store), "worker"]
        arguments += [f"{name}={value}" for name, value in options.items()]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.zombie_worker", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )


@contextmanager
def run_zombie_worker(
    connection: Connection, store: Path, *, lease_seconds: float, **options: Any
) -> Iterator[RolesSubprocess]:
    """Run a worker like `run_roles_subprocess`. It behaves normally unless it is suspended."""
    worker = ZombieWorkerProcess(connection, store, lease_seconds=lease_seconds, **options)
    try:
        yield worker
    finally:
        worker.process.kill()
        worker.process.wait()
        for pid in list_live_processes_in_session(worker.pid):
            os.kill(pid, signal.SIGKILL)
        assert worker.process.stdout is not None
        worker.process.stdout.close()


if __name__ == "__main__":
    (_lease_seconds,) = (float(item.partition("=")[2]) for item in sys.argv if item.startswith("lease_seconds="))
    monitoring.register(DelayedHeartbeat(_lease_seconds))
    asyncio.run(role_runner._main(*sys.argv[1:]))
