"""cli: keep the embedded MongoDB server running for as long as a process does, whatever the disk does."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

import structlog

from jobledger.ledger.domain.errors import DatabaseUnsuitable, ResourceUnavailable
from jobledger.ledger.mongo.embedded import MIN_FREE_BYTES, EmbeddedServer
from jobledger.ledger.system.disk_space import find_space_problem, nearest_existing_directory

if TYPE_CHECKING:
    from jobledger.cli.shutdown import Shutdown

DISK_CHECK_SECONDS: Final = 2.0
"""How often a disk that could not be used is tried again."""
_LONGEST_PAUSE_SECONDS: Final = 60.0
_HEALTHY_SECONDS: Final = 120.0
"""A server that ran for this long is started at once when it ends; the pauses before begin anew."""
_SAY_AGAIN_SECONDS: Final = 600.0
_log = structlog.get_logger()


def start_when_space_available(data_dir: Path, *, oplog_mb: int | None) -> EmbeddedServer:
    """Start the embedded server; while its disk is full, say so and wait for space.

    Raises:
        DatabaseUnsuitable: It cannot start for another reason.
    """
    told = False
    while True:
        try:
            problem = find_space_problem(nearest_existing_directory(data_dir), MIN_FREE_BYTES)
            if problem is None or not problem.is_out_of_space:
                return EmbeddedServer.start(data_dir, oplog_mb=oplog_mb)
        except (DatabaseUnsuitable, ResourceUnavailable):
            # It may have filled the disk itself: a start needs more than a restart.
            problem = find_space_problem(nearest_existing_directory(data_dir), MIN_FREE_BYTES)
            if problem is None or not problem.is_out_of_space:
                raise
        if not told:
            _log.error("the embedded MongoDB server cannot start and waits for space", disk=str(problem))
            told = True
        time.sleep(DISK_CHECK_SECONDS)


async def supervise_until_shutdown(server: EmbeddedServer | None, stop: Shutdown) -> None:
    """Wait until stopped; meanwhile start the embedded server again whenever it ends.

    Raises:
        DatabaseUnsuitable: It cannot run again; the message says why.
    """
    stopped = asyncio.create_task(stop.wait())
    tasks: set[asyncio.Task[None]] = {stopped}
    if server is not None:
        tasks.add(asyncio.create_task(_supervise(server), name="embedded-server"))
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _supervise(server: EmbeddedServer) -> None:
    failures = 0
    while True:
        begun = time.monotonic()
        await server.wait_exited()
        ended = time.monotonic()
        if ended - begun > _HEALTHY_SECONDS:
            failures = 0
        failures = await _bring_back(server, failures)
        _log.info("the embedded MongoDB server is back", seconds=round(time.monotonic() - ended, 1))


async def _bring_back(server: EmbeddedServer, failures: int) -> int:
    """Start the server again, as often as it takes; return how often in a row it has ended.

    A missing disk is waited for at a steady pace. After any other end the pause doubles up to a minute: there is no
    number of attempts after which leaving the installation without a database would be better.

    Raises:
        DatabaseUnsuitable: Its data files are of another version or damaged.
    """
    told: tuple[bool, float] | None = None
    while True:
        outage = await asyncio.to_thread(server.diagnose_exit)
        if outage.is_permanent:
            raise DatabaseUnsuitable(
                f"The embedded MongoDB server cannot run on {server.data_dir} any more: {outage.reason}"
            )
        if told is None or told[0] != outage.waits_for_disk or time.monotonic() - told[1] > _SAY_AGAIN_SECONDS:
            told = outage.waits_for_disk, time.monotonic()
            if outage.waits_for_disk:
                _log.error("the embedded MongoDB server has ended and waits for its disk", disk=outage.reason)
            else:
                _log.error("the embedded MongoDB server has ended and is started again", reason=outage.reason)
        if outage.waits_for_disk:
            await asyncio.sleep(DISK_CHECK_SECONDS)
            continue
        if failures:
            await asyncio.sleep(min(2.0 ** (failures - 1), _LONGEST_PAUSE_SECONDS))
        failures += 1
        try:
            await server.restart()
        except (DatabaseUnsuitable, ResourceUnavailable, OSError) as error:
            _log.warning("the embedded MongoDB server did not start", attempt=failures, error=str(error))
        else:
            return failures
