"""Leader election: one process leads, and others stand by.

The change stream delivers the leader's heartbeats, which extend its lease. A standby takes over when it has seen no
heartbeat for the duration of the lease, by its own monotonic clock. It takes over immediately when the leader releases
the lease. `fencing_token`, which grows with each leader, fences what a leader writes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.errors import LedgerBusy, LedgerUnavailable
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.lease import Lease, LeaseObservation

_log = structlog.get_logger()
_MAX_PAUSE_SECONDS: Final = 5.0
T = TypeVar("T")


class LeadershipLost(Exception):
    """This process may no longer lead. The text is the reason: another process leads, or the lease was lost."""

    def __init__(self, reason: str = "another process is the leader") -> None:
        super().__init__(reason)


class LeaderElection:
    """The election for one task, such as "projector". A listener of the process's change stream."""

    collection = "leaders"

    def __init__(self, connection: Connection, name: str, *, holder: str, lease_seconds: float) -> None:
        self._name = name
        self._holder = holder
        self._lease_seconds = lease_seconds
        self._lease = Lease(connection, self.collection, name, seconds=lease_seconds)
        self._observation = LeaseObservation()
        """Of the leader, while another process leads."""
        self._changed = asyncio.Event()
        self._vacant = asyncio.Event()

    @property
    def fencing_token(self) -> int:
        """The fencing token of this leader."""
        return self._lease.fencing_token

    async def run(self, lead: Callable[[], Awaitable[None]]) -> None:
        """Stand by and lead repeatedly, until cancelled.

        `lead` is cancelled when the lease is lost. It may raise LeadershipLost.
        """
        while True:
            await self.run_once(lead)

    async def run_once(self, lead: Callable[[], Awaitable[T]]) -> T:
        """Stand by and lead until `lead` returns, and return its result.

        Its exceptions propagate, except LeadershipLost, LedgerUnavailable and LedgerBusy. After these it tries again.
        """
        pause, is_logged = 0.1, False
        while True:
            try:
                self._vacant.clear()  # first, because the leader may release the lease before our response arrives
                if await self._lease.acquire({"holder": self._holder}, observation=self._observation):
                    self._observation = LeaseObservation()
                    begun, is_logged = time.monotonic(), False
                    try:
                        return await self._lead(lead)
                    finally:
                        await self._lease.release()
                        if time.monotonic() - begun > self._lease_seconds:
                            pause = 0.1  # it was stable for a while, so this is a new failure
                current = self._lease.current_lease
                self._observation.record(current.get("heartbeat"), current.get("seconds"))
                if not is_logged:
                    _log.info("another process is leader, standing by", task=self._name)
                    is_logged = True
                await self._wait_for_vacancy()
                continue
            except LeadershipLost as lost:
                _log.warning("leadership lost, standing by", task=self._name, reason=str(lost))
            except (LedgerUnavailable, LedgerBusy) as error:
                _log.warning("leadership interrupted, retrying", task=self._name, error=str(error))
            await asyncio.sleep(pause)
            pause = min(2 * pause, _MAX_PAUSE_SECONDS)

    async def resync(self, session: AsyncClientSession) -> None:
        self._changed.set()

    def on_change(self, change: Mapping[str, Any]) -> None:
        if change["documentKey"]["_id"] != self._name:
            return
        fields = change.get("fullDocument") or change.get("updateDescription", {}).get("updatedFields", {})
        if "heartbeat" in fields:
            self._observation.record(fields["heartbeat"])
        self._changed.set()
        if fields.get("released"):
            self._vacant.set()

    async def _wait_for_vacancy(self) -> None:
        """Wait until the leader misses a heartbeat or releases its lease."""
        while not self._vacant.is_set():
            self._changed.clear()
            try:
                missing = self._lease_seconds / 3 + 1
                left = self._lease_seconds - self._observation.seconds_since_heartbeat
                async with asyncio.timeout(min(missing, left) if left > 0 else missing):
                    await self._changed.wait()
            except TimeoutError:
                return

    async def _lead(self, lead: Callable[[], Awaitable[T]]) -> T:
        """Return the result of `lead`.

        Raises:
            LeadershipLost: The lease was lost before, or `lead` was fenced.
        """
        leading = asyncio.ensure_future(lead())
        lost = asyncio.create_task(self._lease.wait_lost())
        try:
            await asyncio.wait({leading, lost}, return_when=asyncio.FIRST_COMPLETED)
            if not leading.done():
                raise LeadershipLost("its lease was lost")
            return leading.result()
        finally:
            for task in (leading, lost):
                task.cancel()
            await asyncio.gather(leading, lost, return_exceptions=True)
