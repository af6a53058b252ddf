"""Estimate the time of the database server, which decides when something is due.

The estimate is the last measurement plus the time that has passed on the boot-time clock, which is never set and
continues while the machine is suspended. A measurement is the server's time in the response to `hello`. An estimate is
ahead of the server by at most `TOLERANCE_SECONDS`, and behind it by at most the time that the response took.

The driver sends `hello` to each member every ten seconds anyway, and immediately after a failover. So an idle process
sends nothing for its clock. It asks the server only if a heartbeat contradicts the estimate in a way that a slow
response would also explain. The primary may be another one, or its clock was set back.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError
from pymongo.monitoring import (
    ServerHeartbeatFailedEvent,
    ServerHeartbeatListener,
    ServerHeartbeatStartedEvent,
    ServerHeartbeatSucceededEvent,
)

TOLERANCE_SECONDS: Final = 0.1
"""A heartbeat may be this far behind the estimate, because its response was slow or this process was busy."""
MAX_SLEEP_SECONDS: Final = 5.0
"""The longest timer until a time of the server's clock. An event loop's timers do not count a suspension."""
_BOOT_TIME_CLOCK: Final = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
_TRIES: Final = 3


def _read_boot_time_clock() -> float:
    """Return the seconds since the machine was started, including the time for which it was suspended."""
    return time.clock_gettime(_BOOT_TIME_CLOCK)


class ServerClock(ServerHeartbeatListener):
    """The clock of the primary, for the users of one client. A listener of the client's heartbeats."""

    def __init__(self) -> None:
        self._offset: float | None = None
        self._primary: Any = None
        self.is_uncertain = False
        """Whether the estimate may be wrong, so that the server has to be asked."""
        self._client: AsyncMongoClient[Any] | None = None
        self._measuring: asyncio.Task[None] | None = None

    def attach_client(self, client: AsyncMongoClient[Any]) -> None:
        """Set the client that asks the server when a heartbeat has made the estimate uncertain."""
        self._client = client

    def estimate(self) -> datetime:
        """Return the estimated time of the server. Before the first response: this machine's time."""
        if self._offset is None:
            return datetime.now(UTC)
        return datetime.fromtimestamp(self._offset + _read_boot_time_clock(), UTC)

    def compute_seconds_until(self, moment: datetime) -> float:
        """Return the seconds until a time of the server's clock, 0 if it has passed."""
        return max(0.0, (moment - self.estimate()).total_seconds())

    def compute_sleep_seconds(self, moment: datetime) -> float:
        """Return how long to sleep before `compute_seconds_until` must be called again."""
        return min(self.compute_seconds_until(moment), MAX_SLEEP_SECONDS)

    async def now(self, client: AsyncMongoClient[Any]) -> datetime:
        """Return the server's time. Asks the server if the estimate is uncertain.

        Raises:
            PyMongoError: The server was asked and did not respond.
        """
        if self.is_uncertain or self._offset is None:
            await self._measure(client)
        return self.estimate()

    async def _measure(self, client: AsyncMongoClient[Any]) -> None:
        """Ask the server. Of several responses the fastest counts: it bounds the server's clock best."""
        best: float | None = None
        for _ in range(_TRIES):
            asked_at = _read_boot_time_clock()
            response = await client.admin.command("hello")
            responded_at = _read_boot_time_clock()
            offset = response["localTime"].replace(tzinfo=UTC).timestamp() - responded_at
            best = offset if best is None else max(best, offset)
            if responded_at - asked_at <= TOLERANCE_SECONDS:
                break
        self._offset, self.is_uncertain = best, False

    # Heartbeats of the driver -------------------------------------------------------------------------------------

    def started(self, event: ServerHeartbeatStartedEvent) -> None:
        """Do nothing: this heartbeat has no response yet."""

    def succeeded(self, event: ServerHeartbeatSucceededEvent) -> None:
        """Observe the clock of the member if it is the primary."""
        document = event.reply.document
        if document.get("isWritablePrimary") or document.get(
            "ismaster"
        ):  # `ismaster`: in the first response of a connection
            self.observe(document["localTime"].replace(tzinfo=UTC).timestamp(), event.connection_id)

    def failed(self, event: ServerHeartbeatFailedEvent) -> None:
        """Do nothing: the next primary's heartbeat reports its clock."""

    def observe(self, server_seconds: float, primary: Any) -> None:
        """Observe the server's time, in seconds since 1970, that a primary has just sent.

        The server's clock now shows at least this time. So an estimate that is behind is wrong and is replaced. An
        estimate that is ahead may be right if the response was slow, so the server must be asked.
        """
        offset = server_seconds - _read_boot_time_clock()
        if self._offset is None or offset > self._offset:
            self._offset = offset
        elif offset < self._offset - TOLERANCE_SECONDS:
            self.is_uncertain = True
        if primary != self._primary:
            self.is_uncertain |= self._primary is not None
            self._primary = primary
        if self.is_uncertain and self._client is not None and (self._measuring is None or self._measuring.done()):
            self._measuring = asyncio.create_task(self._measure_in_background(self._client), name="measure-clock")

    async def _measure_in_background(self, client: AsyncMongoClient[Any]) -> None:
        """Ask the server for callers of `estimate`. Without a response, the next heartbeat asks again."""
        with suppress(PyMongoError):
            await self._measure(client)


def get_server_clock(client: AsyncMongoClient[Any]) -> ServerClock:
    """Return the clock that listens to the heartbeats of a client (`Connection.create_client`)."""
    return next(it for it in client.options.event_listeners if isinstance(it, ServerClock))
