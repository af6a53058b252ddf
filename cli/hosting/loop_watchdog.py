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
from jobledger.ledger.system.loop_ticker import LoopTicker

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
    ticker = LoopTicker(min(lease_seconds / 12, 1.0))
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(ticker, lease_seconds, done), name="loop-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        ticker.stop()


def _watch(ticker: LoopTicker, lease_seconds: float, done: threading.Event) -> None:
    while not done.wait(lease_seconds / _CHECKS_PER_LEASE):
        missed = ticker.count_missed()
        if missed == _CHECKS_PER_LEASE:
            _log.error(
                "event loop blocked; run blocking jobs with isolation = 'process'",
                timeout_seconds=lease_seconds,
                stack=ticker.format_stack(),
            )
        elif missed >= _LEASES_UNTIL_EXIT * _CHECKS_PER_LEASE:
            _log.critical("event loop still blocked, exiting", stack=ticker.format_stack())
            os._exit(EXIT_UNAVAILABLE)
