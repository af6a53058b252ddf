"""Detect failures of the machine. They do not count as failed attempts of jobs.

Code that runs into a machine failure (`find_machine_failure`) releases its job without counting the attempt, and
reports the failure here. The worker then claims no jobs until the checks of the machine pass. Its lease document shows
the problem.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

import structlog

from jobledger.ledger.domain.errors import FileStoreUnavailable

_log = structlog.get_logger()
MIN_BACKOFF_SECONDS: Final = 1.0
MAX_BACKOFF_SECONDS: Final = 60.0
RELAPSE_SECONDS: Final = 120.0
"""If a failure occurs this soon after the checks passed, they do not detect it, so the backoff continues to grow."""
_CHECK_LIMIT_SECONDS = 30.0
_QUICK_CHECK_SECONDS: Final = 1.0
_QUICK_CHECK_LIMIT_SECONDS = 5.0
MIN_DESCRIPTORS: Final = 32
_MIN_MEMORY_BYTES: Final = 64 * 2**20

_DESCRIPTORS = "raise the limit (LimitNOFILE in the unit, ulimit -n)"
_PROCESSES = "raise the limit (TasksMax or LimitNPROC in the unit, ulimit -u), or run fewer jobs at the same time"
_MEMORY = "free memory, or run fewer jobs at the same time (event_worker.max_concurrent)"
_SPACE = "free some space, or set event_worker.scratch_dir to another directory"
_DISK = "check the disk and its mount, or set event_worker.scratch_dir to another directory"
_ADVICE: Final = {
    errno.EMFILE: _DESCRIPTORS,
    errno.ENFILE: "raise the system's limit (sysctl fs.file-max)",
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _PROCESSES,
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), _SPACE),
    **dict.fromkeys((errno.EROFS, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV), _DISK),
}
"""Failures of the machine wherever the worker gets them, with the fix."""
_SCRATCH_ERRORS: Final = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
)
"""Failures of the machine only if they concern the worker's own scratch directory."""


class MachineFailure(Exception):
    """This machine cannot run jobs. The text contains the problem and the fix."""


def build_disk_timeout_failure(seconds: float) -> MachineFailure:
    """Return the failure for a call that used a disk and did not return within `seconds`."""
    return MachineFailure(f"A call that uses a disk did not return within {seconds:g} s: {_DISK}")


def find_machine_failure(error: BaseException, *, scratch_dir: Path | None = None) -> MachineFailure | None:
    """Return the machine failure behind an error; None if the error has another cause.

    Args:
        error: Raised by the worker's own work for a job, such as creating a directory or starting a process.
        scratch_dir: The worker's scratch directory. Missing or forbidden files below it are machine failures as well.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MachineFailure):
            return cause
        if (text := _describe_failure(cause, scratch_dir)) is not None:
            failure = MachineFailure(text)
            failure.__cause__ = error
            return failure
        cause = cause.__cause__
    return None


def _describe_failure(error: BaseException, scratch_dir: Path | None) -> str | None:
    if isinstance(error, FileStoreUnavailable):
        return str(error)
    if isinstance(error, MemoryError):
        return f"Out of memory: {_MEMORY}"
    if isinstance(error, RuntimeError) and "can't start new thread" in str(error):
        return f"No thread can be started: {_PROCESSES}"
    if not isinstance(error, OSError) or error.errno is None:
        return None
    if error.errno in _ADVICE:
        return f"{_format_os_error(error)}: {_ADVICE[error.errno]}"
    if error.errno in _SCRATCH_ERRORS and scratch_dir is not None and _is_below(error, scratch_dir):
        return f"{_format_os_error(error)}: {_DISK}"
    return None


def _format_os_error(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)


def _is_below(error: OSError, directory: Path) -> bool:
    return isinstance(error.filename, str | os.PathLike) and Path(error.filename).is_relative_to(directory)


class WorkerHealth:
    """Decides whether this worker may claim jobs. After a report it may not, until all checks pass.

    Args:
        checks: Called after a report, in a thread. A check raises MachineFailure or any other exception if it fails.
        quick_checks: Called before claims, at most once a second, in a thread. Must take microseconds.
        on_change: Called on the event loop when the result of `get_document_fields` changes.
    """

    def __init__(
        self,
        checks: Sequence[Callable[[], None]] = (),
        *,
        quick_checks: Sequence[Callable[[], None]] = (),
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._checks = checks
        self._quick_checks = quick_checks
        self._on_change = on_change
        self._reported = asyncio.Event()
        self._checking: threading.Thread | None = None
        self._pause = MIN_BACKOFF_SECONDS
        self._recovered_at = float("-inf")
        self._quick_check_at = float("-inf")
        self.problem: MachineFailure | None = None
        self.unhealthy_since: datetime | None = None

    def report(self, failure: MachineFailure) -> None:
        """Report a machine failure and stop claiming. Call on the event loop."""
        if self.problem is not None:
            return
        relapsed = time.monotonic() - self._recovered_at < RELAPSE_SECONDS
        self._pause = min(2 * self._pause, MAX_BACKOFF_SECONDS) if relapsed else MIN_BACKOFF_SECONDS
        self.problem, self.unhealthy_since = failure, datetime.now(UTC)
        _log.error("machine failure: the worker claims no jobs until the checks pass", reason=str(failure))
        self._reported.set()
        self._on_change()

    def can_claim(self) -> bool:
        """Return whether the worker may claim jobs."""
        return self.problem is None

    async def run_quick_checks(self) -> None:
        """Run the quick checks unless they ran within the last second, and report a failure."""
        if self.problem is None and time.monotonic() - self._quick_check_at >= _QUICK_CHECK_SECONDS:
            self._quick_check_at = time.monotonic()
            if (failure := await self.run_checks(self._quick_checks, _QUICK_CHECK_LIMIT_SECONDS)) is not None:
                self.report(failure)

    def get_document_fields(self) -> dict[str, Any]:
        """Return the fields about health for the worker's lease document."""
        problem = str(self.problem) if self.problem is not None else None
        return {"problem": problem, "unhealthy_since": self.unhealthy_since}

    async def run(self) -> None:
        """Check the machine after each report, with exponential backoff, until cancelled."""
        while True:
            await self._reported.wait()
            self._reported.clear()
            while self.problem is not None:
                await asyncio.sleep(self._pause * random.uniform(0.8, 1.0))  # noqa: S311 - spreads load
                failure = await self.run_checks()
                if failure is None:
                    self._recover()
                else:
                    self._replace_problem(failure)
                    self._pause = min(2 * self._pause, MAX_BACKOFF_SECONDS)

    def _replace_problem(self, failure: MachineFailure) -> None:
        if str(failure) != str(self.problem):
            _log.error("machine failure continues", reason=str(failure))
            self.problem = failure
            self._on_change()

    def _recover(self) -> None:
        _log.warning("machine recovered: the worker claims jobs", previous_reason=str(self.problem))
        self.problem = self.unhealthy_since = None
        self._recovered_at = time.monotonic()
        self._quick_check_at = float("-inf")
        self._on_change()

    async def run_checks(
        self, checks: Sequence[Callable[[], None]] | None = None, seconds: float | None = None
    ) -> MachineFailure | None:
        """Run checks and return the first failure; None if all pass.

        They run in their own thread, so that a disk that does not respond blocks nothing else.

        Args:
            checks: The checks to run. Default: all.
            seconds: Timeout.
        """
        seconds = _CHECK_LIMIT_SECONDS if seconds is None else seconds
        if self._checking is not None and self._checking.is_alive():  # do not start a second thread that hangs
            return build_disk_timeout_failure(seconds)
        result: Future[MachineFailure | None] = Future()
        result.set_running_or_notify_cancel()  # so a timeout does not cancel it before the thread sets its result

        def run() -> None:
            result.set_result(run_checks_until_failure(self._checks if checks is None else checks))

        self._checking = threading.Thread(target=run, name="health-check", daemon=True)
        try:
            self._checking.start()
            async with asyncio.timeout(seconds):
                failure = await asyncio.wrap_future(result)
        except TimeoutError:
            return build_disk_timeout_failure(seconds)
        except RuntimeError as error:
            self._checking = None
            return find_machine_failure(error) or MachineFailure(f"The machine cannot be checked: {error}")
        self._checking = None  # it has sent its result, and ends soon
        return failure


def run_checks_until_failure(checks: Sequence[Callable[[], None]]) -> MachineFailure | None:
    """Run checks until one fails, and return its failure; None if all pass. Blocks."""
    for check in checks:
        try:
            check()
        except Exception as error:  # noqa: BLE001 - any error of a check means that the machine is unhealthy
            return find_machine_failure(error) or MachineFailure(f"{type(error).__name__}: {error}")
    return None


def check_descriptors() -> None:
    """Check that file descriptors are available for a job. Takes microseconds.

    Raises:
        MachineFailure: Too few descriptors are left.
        OSError: No descriptor is left.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.close(lowest_free)
    if limit != resource.RLIM_INFINITY and limit - lowest_free < MIN_DESCRIPTORS:
        raise MachineFailure(f"Fewer than {MIN_DESCRIPTORS} of {limit} file descriptors are free: {_DESCRIPTORS}")


def check_process_start() -> None:
    """Start a program and wait for its end. Blocks.

    Raises:
        OSError: The program could not be started.
    """
    subprocess.run([sys.executable, "-S", "-c", ""], stdin=subprocess.DEVNULL, check=True, timeout=20)


def check_memory() -> None:
    """Check that memory is available.

    Raises:
        MachineFailure: Too little memory is left.
        MemoryError: The process cannot allocate more memory.
    """
    bytearray(_MIN_MEMORY_BYTES // 16)
    with suppress(OSError, StopIteration, ValueError):
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - a path in /proc
            line = next(line for line in file if line.startswith("MemAvailable:"))
        if (available := int(line.split()[1]) * 1024) < _MIN_MEMORY_BYTES:
            raise MachineFailure(f"Only {available / 2**20:.0f} MiB of memory are available: {_MEMORY}")


CHECKS: Final = (check_descriptors, check_memory, check_process_start)
"""Checks of the machine. Checks of the scratch directory and the result store are with these."""
