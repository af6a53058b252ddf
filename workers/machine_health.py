"""workers: is this machine fit to run jobs? Trouble of the machine is not a failed attempt of a job.

Whoever meets trouble of the machine (`is_machine_failure`) gives its job back uncounted and reports it here. From
then on
the worker claims nothing until a check of the machine passes, and shows the reason in its heartbeat document.
"""

from __future__ import annotations

import asyncio
import errno
import os
import random
import resource
import threading
import time
from collections.abc import Callable, Sequence
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
"""Trouble so soon after a check has passed is trouble that the check does not see: the pause grows on."""
_CHECK_LIMIT_SECONDS = 30.0
_QUICK_CHECK_SECONDS: Final = 1.0
_QUICK_CHECK_LIMIT_SECONDS = 5.0
MIN_DESCRIPTORS: Final = 32
_MIN_MEMORY_BYTES: Final = 64 * 2**20

_DESCRIPTORS = "raise the limit (LimitNOFILE in the unit, ulimit -n)"
_PROCESSES = "raise the limit (TasksMax or LimitNPROC in the unit, ulimit -u), or run fewer jobs at once"
_MEMORY = "free memory, or run fewer jobs at once (event_worker.max_concurrent)"
_SPACE = "free some space, or set event_worker.scratch_dir to another directory"
_DISK = "check the disk and its mount, or set event_worker.scratch_dir to another directory"
_ADVICE: Final = {
    errno.EMFILE: _DESCRIPTORS,
    errno.ENFILE: "raise the system's limit (sysctl fs.file-max)",
    errno.ENOMEM: _MEMORY,
    errno.EAGAIN: _PROCESSES,
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EROFS: _DISK,
    errno.EIO: _DISK,
    errno.ESTALE: _DISK,
    errno.ENXIO: _DISK,
    errno.ENODEV: _DISK,
}
"""What a job cannot be blamed for, wherever in the worker it is raised."""
_SCRATCH_ERRORS: Final = frozenset(
    {errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
)
"""Errors that are trouble of the machine only if they concern the worker's own scratch directory."""


class MachineFailure(Exception):
    """This machine cannot run jobs. The text says what is wrong and how to fix it."""


def disk_timeout_failure(seconds: float) -> MachineFailure:
    """Return what it means that a call which uses a disk has not returned within so many seconds."""
    return MachineFailure(f"A call that uses a disk did not end within {seconds:g} s: {_DISK}")


def find_machine_failure(error: BaseException, *, scratch_dir: Path | None = None) -> MachineFailure | None:
    """Return the trouble of this machine that an error shows, or None if the error has another cause.

    Args:
        error: what the worker's own work for a job raised, such as creating a directory or starting a process.
        scratch: the worker's scratch directory. Missing or forbidden files below it are trouble of the machine, too.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, MachineFailure):
            return cause
        if (text := _explanation(cause, scratch_dir)) is not None:
            trouble = MachineFailure(text)
            trouble.__cause__ = error
            return trouble
        cause = cause.__cause__
    return None


def _explanation(error: BaseException, scratch: Path | None) -> str | None:
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
    if error.errno in _SCRATCH_ERRORS and scratch is not None and _is_below(error, scratch):
        return f"{_format_os_error(error)}: {_DISK}"
    return None


def _format_os_error(error: OSError) -> str:
    return f"{error.strerror} ({error.filename})" if error.filename else str(error.strerror)


def _is_below(error: OSError, directory: Path) -> bool:
    return isinstance(error.filename, str | os.PathLike) and Path(error.filename).is_relative_to(directory)


class WorkerHealth:
    """Whether this worker may claim jobs; it may not from a report until every check passes.

    Args:
        quick_checks: called before jobs are claimed, at most once a second; must take microseconds.
        checks: called after a report. Both raise what is wrong: MachineTrouble, or any other exception. They are called
            in a thread.
        on_change: called on the event loop when `facts` change.
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
        """Stop claiming: this machine has trouble. Call on the event loop."""
        if self.problem is not None:
            return
        relapsed = time.monotonic() - self._recovered_at < RELAPSE_SECONDS
        self._pause = min(2 * self._pause, MAX_BACKOFF_SECONDS) if relapsed else MIN_BACKOFF_SECONDS
        self.problem, self.unhealthy_since = failure, datetime.now(UTC)
        _log.error("this machine has trouble: the worker claims no jobs until it passes", problem=str(failure))
        self._reported.set()
        self._on_change()

    def can_claim(self) -> bool:
        """Return whether jobs may be claimed, as far as is known now."""
        return self.problem is None

    async def run_quick_checks(self) -> None:
        """Run the quick checks, if the last ones are a second old, and report what they find."""
        if self.problem is None and time.monotonic() - self._quick_check_at >= _QUICK_CHECK_SECONDS:
            self._quick_check_at = time.monotonic()
            if (trouble := await self.run_checks(self._quick_checks, _QUICK_CHECK_LIMIT_SECONDS)) is not None:
                self.report(trouble)

    def document_fields(self) -> dict[str, Any]:
        """Return what the worker's heartbeat document says of its health."""
        problem = str(self.problem) if self.problem is not None else None
        return {"problem": problem, "unhealthy_since": self.unhealthy_since}

    async def run(self) -> None:
        """Check the machine after each report, with exponential back-off, until cancelled."""
        while True:
            await self._reported.wait()
            self._reported.clear()
            while self.problem is not None:
                await asyncio.sleep(self._pause * random.uniform(0.8, 1.0))  # noqa: S311 - spreads load
                trouble = await self.run_checks()
                if trouble is None:
                    self._recover()
                else:
                    self._replace_problem(trouble)
                    self._pause = min(2 * self._pause, MAX_BACKOFF_SECONDS)

    def _replace_problem(self, trouble: MachineFailure) -> None:
        if str(trouble) != str(self.problem):
            _log.error("this machine still has trouble", problem=str(trouble))
            self.problem = trouble
            self._on_change()

    def _recover(self) -> None:
        _log.warning("this machine is fit again: the worker claims jobs", problem_was=str(self.problem))
        self.problem = self.unhealthy_since = None
        self._recovered_at = time.monotonic()
        self._quick_check_at = float("-inf")
        self._on_change()

    async def run_checks(
        self, checks: Sequence[Callable[[], None]] | None = None, seconds: float | None = None
    ) -> MachineFailure | None:
        """Run checks, all by default, in a thread of their own: a disk that does not answer must block nothing else."""
        seconds = _CHECK_LIMIT_SECONDS if seconds is None else seconds
        if self._checking is not None and self._checking.is_alive():  # start no second thread that hangs
            return disk_timeout_failure(seconds)
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[MachineFailure | None] = loop.create_future()

        def run() -> None:
            found = _run_until_failure(self._checks if checks is None else checks)
            with suppress(RuntimeError):  # the loop is closed: nobody waits
                loop.call_soon_threadsafe(_set_result, answer, found)

        self._checking = threading.Thread(target=run, name="health-check", daemon=True)
        try:
            self._checking.start()
            found = await asyncio.wait_for(answer, seconds)
        except TimeoutError:
            return disk_timeout_failure(seconds)
        except RuntimeError as error:
            self._checking = None
            return find_machine_failure(error) or MachineFailure(f"The machine cannot be checked: {error}")
        self._checking = None  # it has answered, though it may take a moment to end
        return found


def _set_result(answer: asyncio.Future[MachineFailure | None], found: MachineFailure | None) -> None:
    if not answer.done():  # the time for it may be over
        answer.set_result(found)


def _run_until_failure(checks: Sequence[Callable[[], None]]) -> MachineFailure | None:
    for check in checks:
        try:
            check()
        except Exception as error:  # noqa: BLE001 - whatever a check raises says that the machine is not fit
            return find_machine_failure(error) or MachineFailure(f"{type(error).__name__}: {error}")
    return None


def check_descriptors() -> None:
    """Check that there are file descriptors left for a job. Takes microseconds.

    Raises:
        MachineTrouble: there are too few.
        OSError: there are none.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open("/", os.O_RDONLY | os.O_DIRECTORY)
    os.close(lowest_free)
    if limit != resource.RLIM_INFINITY and limit - lowest_free < MIN_DESCRIPTORS:
        raise MachineFailure(f"Fewer than {MIN_DESCRIPTORS} of {limit} file descriptors are free: {_DESCRIPTORS}")


def check_memory() -> None:
    """Check that memory can be had.

    Raises:
        MachineTrouble: there is too little.
        MemoryError: the process may have no more.
    """
    bytearray(_MIN_MEMORY_BYTES // 16)
    with suppress(OSError, StopIteration, ValueError):
        with open("/proc/meminfo", encoding="ascii") as file:  # noqa: PTH123 - it is no file to be kept
            line = next(line for line in file if line.startswith("MemAvailable:"))
        if (available := int(line.split()[1]) * 1024) < _MIN_MEMORY_BYTES:
            raise MachineFailure(f"Only {available / 2**20:.0f} MiB of memory are available: {_MEMORY}")
