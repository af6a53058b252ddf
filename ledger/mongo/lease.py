"""Leases in MongoDB. Processes measure their duration on monotonic clocks, which clock corrections do not move.

Each extension increments `heartbeat`. To an observer, a lease is overdue when the observer has seen no new heartbeat
for the duration of the lease, by its own monotonic clock. Then another process may acquire it, or the lease reaper may
expire it if only its owner can hold it. Both updates require the heartbeat that was observed, so a holder that has
extended its lease meanwhile keeps it. A released lease, and one that is overdue by the server's clock and was never
observed to be extended, can be acquired without this condition.

Acquiring and expiring increment `fencing_token`. After that, the lease has expired: the old holder cannot extend it.
Until then it can, although the lease is overdue. Therefore, no process loses its lease by a database outage, during
which no process can extend a lease.

A separate thread with its own client extends leases, so a busy event loop cannot delay it. If the event loop makes no
progress for the duration of a lease, the thread stops extending it, and other processes take over.
"""

from __future__ import annotations

import asyncio
import math
import secrets
import threading
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import structlog
from pymongo import ReturnDocument, timeout
from pymongo.collection import Collection
from pymongo.errors import PyMongoError

from jobledger.ledger.mongo.connection import Connection, Document, summarize_error, translate_errors
from jobledger.ledger.system.loop_ticker import LoopTicker

_log = structlog.get_logger()


def _build_expiry(seconds: float) -> Document:
    return {"$add": ["$$NOW", int(seconds * 1000)]}


OVERDUE_LEASE_FILTER: Document = {"$expr": {"$lte": ["$lease_until", "$$NOW"]}}
"""Matches leases that are overdue by the server's clock, whether or not a process has expired them."""
EXPIRE_LEASE_UPDATE: Document = {"$inc": {"fencing_token": 1}}
"""Expires a lease. Combine it with a filter on the observed `heartbeat`. The holder's next extension then fails: it
finds another fencing token."""
_NEXT_HEARTBEAT: Document = {"$add": [{"$ifNull": ["$heartbeat", 0]}, 1]}
WORKERS_COLLECTION = "workers"
"""The leases of the workers."""
_RETRY_SECONDS = 0.5
_RELEASE_SECONDS = 1.0
"""How long releasing may take. A lease that could not be released in this time expires."""
_CHECKS_PER_LEASE = 3
"""A lease is extended, and its holder's event loop checked, three times per duration (`loop_ticker`)."""
_TICKS_PER_LEASE = 12
MISSED_HEARTBEAT_SHARE = 0.6
"""A holder that has not extended its lease for this share of the duration has missed a heartbeat. Leases are extended
after each third of their duration. So an outage after which a lease is overdue lasts at least two thirds of it, and
every other holder has missed a heartbeat, too."""


class LeaseObservation:
    """What a process has observed of another process's lease, on its own monotonic clock."""

    def __init__(self) -> None:
        self.heartbeat: int | None = None
        self.was_extended = False
        """Whether it was extended while this process observed it."""
        self._since = time.monotonic()
        self._seconds = 0.0

    def record(self, heartbeat: int | None, seconds: float | None = None) -> None:
        """Record the current heartbeat of the lease, and its duration in seconds."""
        if heartbeat != self.heartbeat:
            self.was_extended = self.heartbeat is not None
            self.heartbeat, self._since = heartbeat, time.monotonic()
        if seconds is not None:
            self._seconds = seconds

    @property
    def seconds_since_heartbeat(self) -> float:
        """The time since the last new heartbeat."""
        return time.monotonic() - self._since

    def is_overdue(self, seconds: float = 0.0) -> bool:
        """Return whether there was no new heartbeat for the duration of the lease, and for `seconds`."""
        return self.heartbeat is not None and self.seconds_since_heartbeat >= max(self._seconds, seconds)


class Lease:
    """A lease document `{_id, fencing_token, heartbeat, lease_until, seconds, released, …}` that this process extends.

    `fencing_token` grows with each holder and fences what a holder writes. `heartbeat` grows with each extension and
    each holder. `lease_until` is by the server's clock.
    """

    def __init__(self, connection: Connection, collection: str, lease_id: str, *, seconds: float) -> None:
        self._connection = connection
        self._collection = collection
        self._id = lease_id
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._ticker: LoopTicker | None = None
        self._lost: asyncio.Event = asyncio.Event()
        self.fencing_token = 0
        self.current_lease: Document = {}
        """The document of the lease, when `acquire` has last returned False."""
        self._heartbeats = (0.0, -math.inf)
        """On the monotonic clock: since when no heartbeat has been missed, and when the last one was sent."""

    async def acquire(self, attributes: Mapping[str, Any], *, observation: LeaseObservation | None = None) -> bool:
        """Acquire the lease if it is free, and extend it until `release`. Return False if another process holds it.

        Args:
            attributes: More fields of the document.
            observation: What this process has observed of the lease.

        Raises:
            LedgerUnavailable: The database is unreachable.
        """
        # Each thread has its own events: it may still run when the next `acquire` begins.
        self._lost = lost = asyncio.Event()
        self._stop = stop = threading.Event()
        loop = asyncio.get_running_loop()
        ticker = LoopTicker(min(self._seconds / _TICKS_PER_LEASE, 1.0))
        acquired: Future[int | None] = Future()
        acquired.set_running_or_notify_cancel()  # only the thread completes it

        def hold() -> None:
            with ExitStack() as stack:
                try:
                    client = stack.enter_context(
                        self._connection.create_blocking_client(response_timeout_seconds=self._seconds / 3)
                    )
                    leases = client[self._connection.db_name][self._collection]
                    begun = time.monotonic()
                    token = self._try_acquire(leases, attributes, observation or LeaseObservation())
                    self._heartbeats = (begun, begun)
                    acquired.set_result(token)
                    if token is None or self._extend_until_stopped(leases, token, stop, ticker):
                        return
                except Exception as error:  # noqa: BLE001 - the waiting caller must get the error
                    if not acquired.done():
                        acquired.set_exception(error)
                if not loop.is_closed():  # before the client is closed, which waits for the server
                    loop.call_soon_threadsafe(lost.set)

        thread = threading.Thread(target=hold, name=f"lease-{self._id}", daemon=True)
        thread.start()
        fencing_token = None
        try:
            with translate_errors("acquiring a lease"):
                fencing_token = await asyncio.wrap_future(acquired)
        except asyncio.CancelledError:
            stop.set()  # otherwise the thread would keep an unused lease
            raise
        finally:
            if fencing_token is None:
                ticker.stop()
        if fencing_token is None:
            return False
        self._thread, self._ticker, self.fencing_token = thread, ticker, fencing_token
        return True

    async def wait_lost(self) -> None:
        """Return when the lease is lost: another process has acquired or expired it."""
        await self._lost.wait()

    @property
    def uninterrupted_seconds(self) -> float:
        """For how long the lease was extended without a missing heartbeat; 0 while one is missing."""
        since, last = self._heartbeats
        now = time.monotonic()
        return now - since if now - last <= MISSED_HEARTBEAT_SHARE * self._seconds else 0.0

    @property
    def is_held(self) -> bool:
        return self._thread is not None and not self._lost.is_set()

    async def release(self) -> None:
        """Stop extending and release the lease, so that other processes need not wait."""
        if self._thread is None:
            return
        self._stop.set()
        if self._ticker is not None:
            self._ticker.stop()
        await asyncio.to_thread(self._thread.join, _RELEASE_SECONDS)
        self._thread = None

    def _try_acquire(
        self, leases: Collection[Document], attributes: Mapping[str, Any], observation: LeaseObservation
    ) -> int | None:
        """Acquire the lease in one write if it is free. Return its fencing token, None if another process holds it.

        The server's clock counts only for a holder that was never observed to extend its lease. So a process that has
        just started need not wait for a holder that crashed long ago. After a failover the server's clock may be wrong.
        Then the lease moves unnecessarily, and the fencing token fences the old holder.
        """
        acquisition_id = secrets.token_hex(8)
        mine: Document = {
            **{name: {"$literal": value} for name, value in attributes.items()},
            "fencing_token": {"$add": [{"$ifNull": ["$fencing_token", 0]}, 1]},
            "seconds": self._seconds,
            "released": False,
            "acquisition_id": acquisition_id,
            "heartbeat": _NEXT_HEARTBEAT,
            "lease_until": _build_expiry(self._seconds),
        }
        free: list[Any] = [{"$eq": [{"$ifNull": ["$fencing_token", 0]}, 0]}, {"$eq": ["$released", True]}]
        if not observation.was_extended:
            free.append({"$lte": ["$lease_until", "$$NOW"]})
        if observation.is_overdue(self._seconds):
            free.append({"$eq": ["$heartbeat", observation.heartbeat]})
        taken = {"$replaceWith": {"$cond": [{"$or": free}, {"$mergeObjects": ["$$ROOT", mine]}, "$$ROOT"]}}
        with timeout(max(self._seconds, self._connection.connect_timeout_ms / 1000)):
            document = leases.find_one_and_update(
                {"_id": self._id}, [taken], upsert=True, return_document=ReturnDocument.AFTER
            )
        if document and document["acquisition_id"] == acquisition_id:
            return int(document["fencing_token"])
        self.current_lease = document or {}
        return None

    def _extend_until_stopped(
        self,
        leases: Collection[Document],
        fencing_token: int,
        stop: threading.Event,
        ticker: LoopTicker,
    ) -> bool:
        """Extend the lease until `stop` is set, then release it. Return False if it was lost before.

        A silent server blocks a call for a third of the lease. The next call may find another primary. So after an
        outage every holder extends its lease within less than half of it, the time for which lease reapers wait. The
        limit is for each response, and not for the call, because opening a connection to a slow server may take longer.
        """
        mine = {"_id": self._id, "fencing_token": fencing_token}
        extend = {"heartbeat": _NEXT_HEARTBEAT, "lease_until": _build_expiry(self._seconds)}
        pause, is_interrupted = self._seconds / 3, False
        while not stop.wait(pause):
            if (missed := ticker.count_missed()) >= _CHECKS_PER_LEASE:
                if missed == _CHECKS_PER_LEASE:
                    _log.error("event loop blocked, lease not extended", lease_id=self._id)
                continue
            begun = time.monotonic()
            try:
                extended = leases.update_one(mine, [{"$set": extend}])
                if not extended.matched_count:
                    return False
                pause, is_interrupted = self._seconds / 3, False
                since, last = self._heartbeats
                is_uninterrupted = begun - last <= MISSED_HEARTBEAT_SHARE * self._seconds
                self._heartbeats = (since if is_uninterrupted else time.monotonic(), begun)
            except PyMongoError as error:
                if not is_interrupted:  # log once per outage
                    _log.warning("lease extension failed, retrying", lease_id=self._id, error=summarize_error(error))
                pause, is_interrupted = min(_RETRY_SECONDS, self._seconds / 3), True
        try:
            with timeout(self._seconds / 3):
                released = {"heartbeat": _NEXT_HEARTBEAT, "lease_until": "$$NOW", "released": True}
                leases.update_one(mine, [{"$set": released}])
        except PyMongoError as error:
            _log.warning("lease not released, it will expire", lease_id=self._id, error=summarize_error(error))
        return True
