"""cli: ends a process whose event loop is blocked for good, so that its supervisor starts it again.

The usual cause is an inline job that blocks (`time.sleep`, an endless loop). Leases are given up by themselves
(`jobledger.ledger.mongo.lease`); but the API, the views and the other jobs of this process would stand still for ever.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from jobledger.ledger.system.loop_progress import LoopProgress

_log = structlog.get_logger()
EXIT_LOOP_BLOCKED: Final = 4
_LOOKS: Final = 3
"""Looks in the time of a lease, as often as the lease is extended."""
_LEASES: Final = 5
"""After so many times of a lease others have everything, and a job that blocks for a while has had its chance."""


@contextmanager
def watch_event_loop(lease_seconds: float) -> Iterator[None]:
    """Log the stack of an event loop that is blocked for `lease_seconds`; end the process after five times as long."""
    progress = LoopProgress(min(lease_seconds / 12, 1.0))
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(progress, lease_seconds, done), name="loop-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        progress.stop()


def _watch(progress: LoopProgress, lease_seconds: float, done: threading.Event) -> None:
    while not done.wait(lease_seconds / _LOOKS):
        missed = progress.count_missed()
        if missed == _LOOKS:
            _log.error(
                "the event loop is blocked: jobs that block belong into a process (isolation = 'process')",
                seconds=lease_seconds,
                stack=progress.format_stack(),
            )
        elif missed >= _LEASES * _LOOKS:
            _log.critical("the event loop is still blocked, ending the process", stack=progress.format_stack())
            os._exit(EXIT_LOOP_BLOCKED)
