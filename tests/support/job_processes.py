"""tests: the processes in which a worker's jobs run, told by their descent."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from tests.support.running import RealProcess, alive_in_session


def job_processes(worker: RealProcess) -> list[int]:
    """Return the children in which jobs run: not the worker forks them, but a server process that is its child."""
    found = []
    for pid in alive_in_session(worker.pid):
        with suppress(FileNotFoundError, ProcessLookupError):
            parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            if worker.pid not in (pid, parent):
                found.append(pid)
    return found
