"""Write what the code of a job logs with `logging` to the log of the job.

In a job process, everything belongs to its one job: all records from level INFO on, and warnings. In the worker, inline
jobs run beside its own code. A record belongs to the inline job in whose context it was created: its tasks, and the
threads of `asyncio.to_thread`. Threads that a job starts itself have no context.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Final

from jobledger.workers.job_types.context import JobLogHandler

AddLogEntry = Callable[..., object]
"""Adds an entry to the log of a job: `JobContext.log`."""


@dataclass(slots=True)
class _Target:
    """Where the records of a context go. It is empty after the attempt, whose tasks may keep their contexts."""

    log: AddLogEntry | None


_current: ContextVar[_Target] = ContextVar("job_log")
_only: list[AddLogEntry] = []
"""The log of the only job of this process. Empty in a worker."""


@contextmanager
def capture_to(log: AddLogEntry | None) -> Iterator[None]:
    """Write records to the log of a job in the block, and in everything that it starts."""
    target = _Target(log)
    token = _current.set(target)
    try:
        yield
    finally:
        target.log = None
        _current.reset(token)


def outside_job() -> AbstractContextManager[None]:
    """In the block, records do not belong to a job. The worker's own code runs here."""
    return capture_to(None)


def _add_entry(level: str, text: str, *, logger: str) -> None:
    target = _current.get(None)
    log = _only[0] if _only else target and target.log
    if log:
        log(level, text, logger=logger)


_handler: Final = JobLogHandler(_add_entry, keeps_name=True)


def install() -> None:
    """Write records to the logs of jobs from now on. Idempotent."""
    if _handler not in logging.root.handlers:
        logging.root.addHandler(_handler)


def capture_process(log: AddLogEntry) -> None:
    """Write all records of this process to the log of its only job, also those of threads without a context.

    The output of the process is in the log as well. So handlers that print records are removed, and nothing is in the
    log twice.
    """
    _only[:] = [log]
    for handler in list(logging.root.handlers):
        if type(handler) is logging.StreamHandler and handler.stream in (sys.stdout, sys.stderr):
            logging.root.removeHandler(handler)
    install()
    if logging.root.level == logging.WARNING:  # the default
        logging.root.setLevel(logging.INFO)
    logging.captureWarnings(True)  # noqa: FBT003 - it takes no name


@contextmanager
def capture_all(log: AddLogEntry) -> Iterator[None]:
    """In the block, write all records and warnings of this process to a log, as `capture_process` does for good."""
    was_installed, level, only = _handler in logging.root.handlers, logging.root.level, _only[:]
    _only[:] = [log]
    install()
    if level == logging.WARNING:  # the default
        logging.root.setLevel(logging.INFO)
    show = warnings.showwarning
    logging.captureWarnings(True)  # noqa: FBT003 - it takes no name
    try:
        yield
    finally:
        logging.captureWarnings(False)  # noqa: FBT003 - it takes no name
        warnings.showwarning = show
        logging.root.setLevel(level)
        if not was_installed:
            logging.root.removeHandler(_handler)
        _only[:] = only
