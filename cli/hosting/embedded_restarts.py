"""Restart the embedded MongoDB server when it exits, and wait while its disk is full or missing."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from jobledger.ledger.domain.errors import DatabaseUnsuitable, ResourceUnavailable
from jobledger.ledger.mongo.embedded import MIN_FREE_BYTES, EmbeddedServer
from jobledger.ledger.system.disk_space import find_existing_directory, find_space_problem

if TYPE_CHECKING:
    from jobledger.cli.hosting.shutdown import Shutdown

DISK_CHECK_SECONDS: Final = 2.0
"""Interval of checks whether an unusable disk is usable again."""
_MAX_RESTART_DELAY_SECONDS: Final = 60.0
_HEALTHY_SECONDS: Final = 120.0
"""A server that ran for this long is restarted without delay, and later delays start again from the shortest."""
_LOG_INTERVAL_SECONDS: Final = 600.0
_log = structlog.get_logger()


def start_when_space_available(data_dir: Path, *, oplog_mb: int | None) -> EmbeddedServer:
    """Start the embedded server. While its disk is full, log that and wait.

    Raises:
        DatabaseUnsuitable: It cannot start for another reason.
    """
    is_logged = False
    while True:
        try:
            problem = find_space_problem(find_existing_directory(data_dir), MIN_FREE_BYTES)
            if problem is None or not problem.is_out_of_space:
                return EmbeddedServer.start(data_dir, oplog_mb=oplog_mb)
        except (DatabaseUnsuitable, ResourceUnavailable):
            # The start itself may have filled the disk: it needs more space than a restart.
            problem = find_space_problem(find_existing_directory(data_dir), MIN_FREE_BYTES)
            if problem is None or not problem.is_out_of_space:
                raise
        if not is_logged:
            _log.error("embedded MongoDB server waiting for disk space", reason=str(problem))
            is_logged = True
        time.sleep(DISK_CHECK_SECONDS)


async def restart_until_shutdown(server: EmbeddedServer | None, shutdown: Shutdown) -> None:
    """Wait for the shutdown. Until then, restart the embedded server whenever it exits.

    Raises:
        DatabaseUnsuitable: It cannot run again; the message says why.
    """
    stopped = asyncio.create_task(shutdown.wait())
    tasks: set[asyncio.Task[None]] = {stopped}
    if server is not None:
        tasks.add(asyncio.create_task(_restart_after_each_exit(server), name="embedded-server"))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _restart_after_each_exit(server: EmbeddedServer) -> None:
    restarts = 0
    while True:
        started_at = time.monotonic()
        await server.wait_exited()
        exited_at = time.monotonic()
        if exited_at - started_at > _HEALTHY_SECONDS:
            restarts = 0
        restarts = await _restart(server, restarts)
        duration = round(time.monotonic() - exited_at, 1)
        _log.info("embedded MongoDB server restarted", duration_seconds=duration)


async def _restart(server: EmbeddedServer, restarts: int) -> int:
    """Restart the server, with any number of attempts.

    It waits for a missing disk at a constant interval. After other exits the delay doubles up to a minute. There is no
    limit, because an installation without a database is never better.

    Args:
        server: The server.
        restarts: Number of consecutive attempts before.

    Returns:
        The number of consecutive attempts.

    Raises:
        DatabaseUnsuitable: Its data files are from another version or damaged.
    """
    logged: tuple[bool, float] | None = None
    while True:
        outage = await asyncio.to_thread(server.diagnose_exit)
        if outage.is_permanent:
            raise DatabaseUnsuitable(
                f"The embedded MongoDB server can no longer run on {server.data_dir}: {outage.reason}"
            )
        now = time.monotonic()
        if logged is None or logged[0] != outage.is_waiting_for_disk or now - logged[1] > _LOG_INTERVAL_SECONDS:
            logged = outage.is_waiting_for_disk, now
            if outage.is_waiting_for_disk:
                _log.error("embedded MongoDB server exited, waiting for its disk", reason=outage.reason)
            else:
                _log.error("embedded MongoDB server exited, restarting", reason=outage.reason)
        if outage.is_waiting_for_disk:
            await asyncio.sleep(DISK_CHECK_SECONDS)
            continue
        if restarts:
            await asyncio.sleep(min(2.0 ** (restarts - 1), _MAX_RESTART_DELAY_SECONDS))
        restarts += 1
        try:
            await server.restart()
        except (DatabaseUnsuitable, ResourceUnavailable, OSError) as error:
            _log.warning("embedded MongoDB server failed to start", attempt=restarts, error=str(error))
        else:
            return restarts
