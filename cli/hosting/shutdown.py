"""Shutdown of a process: signals, failures, and the time limit."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Collection
from contextlib import suppress
from typing import Final

import structlog

from jobledger.cli.settings import Settings

SHUTDOWN_MARGIN_SECONDS: Final = 6.0
"""Time beyond the grace period of running jobs, for final database writes and open requests."""
_log = structlog.get_logger()


def compute_shutdown_timeout(settings: Settings, selected: Collection[str]) -> float:
    """Return the seconds after which a process that runs these roles exits, whatever the database does."""
    grace = settings.event_worker.shutdown_grace_seconds if "worker" in selected else 0.0
    return grace + SHUTDOWN_MARGIN_SECONDS


class Shutdown:
    """Requested by Ctrl-C, SIGTERM, or a role that failed. A second signal exits the process immediately.

    A process that has not exited `timeout_seconds` later exits too: a call may wait for a database that does not
    respond. No data is lost when a process is killed, and leases that were not released expire.
    """

    def __init__(self, timeout_seconds: float) -> None:
        self._event = asyncio.Event()
        self._timer = threading.Timer(timeout_seconds, self._exit_after_timeout, [timeout_seconds])
        self._timer.daemon = True
        self.error: BaseException | None = None

    def install_signal_handlers(self) -> None:
        """Handle SIGINT and SIGTERM of this process."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._handle_signal)

    def cancel_timeout(self) -> None:
        """Let the process take as long as it needs to exit."""
        self._timer.cancel()

    def _handle_signal(self) -> None:
        if self._event.is_set():
            os._exit(130)  # no data is lost when a process is killed
        self.request()

    def request_after_failure(self, error: BaseException) -> None:
        """Request the shutdown because a role failed."""
        if not self._event.is_set():
            _log.error("role failed, shutting down", exc_info=error)
        self.request(error)

    def request(self, error: BaseException | None = None) -> None:
        """Request the shutdown and start the time limit. Only the first request counts.

        Args:
            error: Why, if it is a failure. The caller reports it.
        """
        if self._event.is_set():
            return
        self.error = error
        self._event.set()  # first: if there is no memory for a thread, the process stops without a time limit
        with suppress(RuntimeError):
            self._timer.start()

    def _exit_after_timeout(self, timeout_seconds: float) -> None:
        _log.warning(
            "shutdown timed out, exiting",
            timeout_seconds=timeout_seconds,
            hint="leases expire by themselves; check that the database responds",
        )
        os._exit(0 if self.error is None else 1)

    async def wait(self) -> None:
        """Wait until the shutdown is requested."""
        await self._event.wait()
