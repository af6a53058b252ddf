"""Find the processes of jobs: worker, fork server, supervisor and job process, each a child of the one before."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

from tests.support.installation import list_descendants
from tests.support.role_runner import RolesSubprocess


def list_job_processes(worker: RolesSubprocess) -> list[int]:
    """Return all job processes."""
    return list_job_processes_of(worker.pid)


def list_job_processes_of(worker: int) -> list[int]:
    """Return the job processes of the worker with this process ID."""
    return [pid for pid in list_descendants(worker) if _ancestor(pid, 3) == worker]


def list_own_job_processes() -> list[int]:
    """Return the job processes of the worker in the test's process."""
    return list_job_processes_of(os.getpid())


def parent_pid(pid: int) -> int:
    """Return the process ID of the parent, or 0 without such a process."""
    with suppress(FileNotFoundError, ProcessLookupError):
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    return 0


def _ancestor(pid: int, steps: int) -> int:
    for _ in range(steps):
        pid = parent_pid(pid)
    return pid
