"""Exit a process whose event loop is blocked, so that its service manager restarts it.

The usual cause is an inline job that blocks (`time.sleep`, an endless loop). The process then no longer extends its
leases (`jobledger.ledger.mongo.lease`), and the API, the views and the other jobs of this process hang.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import structlog

from jobledger.cli.exit_codes import EXIT_UNAVAILABLE
from jobledger.ledger.system.loop_progress import LoopProgress

_log = structlog.get_logger()
_CHECKS_PER_LEASE: Final = 3
"""As often as the lease is extended."""
_LEASES_UNTIL_EXIT: Final = 5
"""By then other processes have all leases, and a job that blocks for a limited time has ended."""


@contextmanager
def watch_event_loop(lease_seconds: float) -> Iterator[None]:
    """Watch the event loop inside the block.

    If it is blocked for `lease_seconds`, log its stack. If it is blocked for five times as long, exit the process.
    """
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
    while not done.wait(lease_seconds / _CHECKS_PER_LEASE):
        missed = progress.count_missed()
        if missed == _CHECKS_PER_LEASE:
            _log.error(
                "event loop blocked; run blocking jobs with isolation = 'process'",
                timeout_seconds=lease_seconds,
                stack=progress.format_stack(),
            )
        elif missed >= _LEASES_UNTIL_EXIT * _CHECKS_PER_LEASE:
            _log.critical("event loop still blocked, exiting", stack=progress.format_stack())
            os._exit(EXIT_UNAVAILABLE)
