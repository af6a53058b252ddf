"""Check whether a directory is writable and how much space it has. Pure file operations.

`DiskSpaceMonitor` checks the disks of a process regularly, so that new work is rejected before a disk is full.
"""

from __future__ import annotations

import asyncio
import errno
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import structlog

MIB: Final = 2**20
CHECK_INTERVAL_SECONDS: Final = 2.0
_RESUME_FACTOR: Final = 1.25
"""Work is accepted again when this multiple of the reserve is free, so that the state does not alternate."""
_REASONS: Final = {
    errno.EDQUOT: "the disk quota is used up",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user has no permission to write there",
    errno.EPERM: "this user has no permission to write there",
    errno.EIO: "the disk reports errors",
    errno.ENOENT: "the directory does not exist (is its disk mounted?)",
    errno.ESTALE: "the network share is no longer available",
}
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class DiskProblem:
    """Why a directory is unusable. `reason` is for people; `is_out_of_space`: freeing space helps."""

    directory: Path
    reason: str
    is_out_of_space: bool

    def __str__(self) -> str:
        return f"{self.directory}: {self.reason}"


def read_free_bytes(directory: Path) -> int:
    """Return the space that this user can fill. 0 if the file system has no inodes left.

    Raises:
        OSError: The directory cannot be read.
    """
    found = os.statvfs(directory)
    if found.f_files and not found.f_ffree:
        return 0
    return (found.f_bfree if os.geteuid() == 0 else found.f_bavail) * found.f_frsize


def find_existing_directory(path: Path) -> Path:
    """Return the directory, or its nearest existing parent, which is on the same disk."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def find_space_problem(directory: Path, needed_bytes: int) -> DiskProblem | None:
    """Return the problem if less than `needed_bytes` are free in a directory."""
    try:
        free = read_free_bytes(directory)
    except OSError as error:
        return _describe_problem(directory, error)
    if free >= needed_bytes:
        return None
    reason = f"no space is left: {free / MIB:.0f} MiB are free, {needed_bytes / MIB:.0f} MiB are needed"
    return DiskProblem(directory, reason, is_out_of_space=True)


def find_write_problem(directory: Path, needed_bytes: int) -> DiskProblem | None:
    """Return why a directory cannot be written, after trying it, or None if it can."""
    if (problem := find_space_problem(directory, needed_bytes)) is not None:
        return problem
    try:
        with tempfile.TemporaryFile(dir=directory) as trial:
            trial.write(bytes(4096))
            trial.flush()
            os.fsync(trial.fileno())
    except OSError as error:
        return _describe_problem(directory, error)
    return None


def _describe_problem(directory: Path, error: OSError) -> DiskProblem:
    number = error.errno or 0
    reason = _REASONS.get(number, os.strerror(number))
    return DiskProblem(directory, reason, is_out_of_space=number in (errno.ENOSPC, errno.EDQUOT))


class DiskSpaceMonitor:
    """Checks the disks that a process fills. While one is nearly full, new work must be rejected."""

    def __init__(self, directories: Mapping[str, Path], reserve_bytes: int) -> None:
        """Monitor directories by name ("results", "data"). A reserve of 0 bytes disables the check."""
        self._directories = directories
        self._reserve = reserve_bytes
        self.problem: str | None = None
        """Why new work is rejected now; None if it is accepted. For all users, so it contains no path."""

    async def run(self) -> None:
        """Check the disks until cancelled. Uses a thread, because a network share may hang."""
        while self._reserve and self._directories:
            await self.check()
            await asyncio.sleep(CHECK_INTERVAL_SECONDS)

    async def check(self) -> None:
        """Check the disks once, and log changes."""
        problems = await asyncio.to_thread(self._find_problems)
        if bool(problems) == (self.problem is not None):
            return
        if problems:
            name, problem = problems[0]
            self.problem = f"The disk for {name} is nearly full: new jobs are rejected until space is freed."
            _log.warning("disk nearly full, rejecting new jobs", reason=str(problem))
        else:
            self.problem = None
            _log.info("disk space available, accepting new jobs")

    def _find_problems(self) -> list[tuple[str, DiskProblem]]:
        needed = int(self._reserve * (_RESUME_FACTOR if self.problem is not None else 1))
        found = [(name, find_space_problem(directory, needed)) for name, directory in self._directories.items()]
        return [(name, problem) for name, problem in found if problem is not None and problem.is_out_of_space]
