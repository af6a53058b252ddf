"""tests: the processes in which a worker's jobs run. Worker, fork server, supervisor, job process: each a child."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tests.support.installation import descendants
from tests.support.running import RealProcess


def job_processes(worker: RealProcess) -> list[int]:
    """Return the processes in which a worker's jobs run."""
    return jobs_below(worker.pid)


def jobs_below(worker: int) -> list[int]:
    """Return the job processes of the worker with this process id."""
    return [pid for pid in descendants(worker) if _ancestor(pid, 3) == worker]


def own_job_processes() -> list[int]:
    """Return the job processes of the worker that runs in the test's own process."""
    return jobs_below(os.getpid())


def parent(pid: int) -> int:
    """Return the parent's process id, or 0 if there is no such process."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def is_gone(pid: int) -> bool:
    """Return whether a process is dead, or only waits to be reaped."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def _ancestor(pid: int, steps: int) -> int:
    for _ in range(steps):
        pid = parent(pid)
    return pid
