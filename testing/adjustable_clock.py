"""A clock of the database server that a test can advance.

All times that decide when something is due come from `ServerClock`, and all times of events as well. So an offset in
the one process that runs all roles is consistent. No event is changed. Leases, timeouts of attempts and requests, and
the clock that the code of a job reads are not affected: they do not use `ServerClock`.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.server_clock import ServerClock

_MAX_SLEEP_SECONDS: Final = 0.05
"""The longest timer. What becomes due when a test advances the clock starts after this time."""


class AdjustableClock(ServerClock):
    """The time of the server plus an offset."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = timedelta()

    def estimate(self) -> datetime:
        """Return the estimated time of the server plus the offset."""
        return super().estimate() + self.offset

    def compute_sleep_seconds(self, moment: datetime) -> float:
        """Return how long to sleep before `compute_seconds_until` must be called again."""
        return min(super().compute_sleep_seconds(moment), _MAX_SLEEP_SECONDS)


class AdjustableConnection(Connection):
    """A connection whose clients have the clock `clock`."""

    def _create_clock(self) -> ServerClock:
        return AdjustableClock()
