"""ledger: leases, judged by nobody's clock but the database server's.

A lease that has run out by the server's clock can never be extended again: the extending update demands that it has
not. So "run out" is final, without anybody having to mark it. Leases are extended from a thread of their own, with a
client of its own, so a busy event loop cannot starve them.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import structlog
from pymongo import ReturnDocument, timeout
from pymongo.collection import Collection
from pymongo.errors import PyMongoError

from ledger.mongo import Connection, Document, brief, driver_errors

_log = structlog.get_logger()


def _until(seconds: float) -> Document:
    return {"$add": ["$$NOW", int(seconds * 1000)]}


RUN_OUT: Document = {"$expr": {"$lte": ["$lease_until", "$$NOW"]}}
"""Matches lease documents whose time is over, by the server's clock."""


class Lease:
    """A document `{_id, epoch, lease_until, seconds, released, …}` kept alive by this process, one holder at a time.

    `epoch` grows with every new holder: it is the fencing token of what the holder writes.
    """

    def __init__(self, connection: Connection, collection: str, lease_id: str, *, seconds: float) -> None:
        self._connection = connection
        self._collection = collection
        self._id = lease_id
        self._seconds = seconds
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._lost: asyncio.Event = asyncio.Event()
        self.epoch = 0

    async def acquire(self, facts: Mapping[str, Any]) -> bool:
        """Take the lease if nobody holds it; from then on it is extended until `release`. False if somebody holds it.

        Raises:
            LedgerUnavailable: the database cannot be reached.
        """
        self._lost = lost = asyncio.Event()
        self._stop = stop = threading.Event()
        loop = asyncio.get_running_loop()
        acquired: asyncio.Future[int | None] = loop.create_future()
        # The thread keeps its own events: after a cancelled `acquire` the next one makes new ones while it still runs.
        thread = threading.Thread(
            target=self._keep, args=(loop, acquired, dict(facts), stop, lost), name=f"lease-{self._id}", daemon=True
        )
        thread.start()
        try:
            with driver_errors("taking a lease"):
                epoch = await acquired
        except asyncio.CancelledError:
            stop.set()  # else the thread would go on holding what nobody uses
            raise
        if epoch is None:
            return False
        self._thread, self.epoch = thread, epoch
        return True

    async def lost(self) -> None:
        """Return when the lease is lost: it ran out, or could not be extended in time."""
        await self._lost.wait()

    @property
    def held(self) -> bool:
        return self._thread is not None and not self._lost.is_set()

    async def release(self) -> None:
        """Stop extending and let go at once, so that others need not wait."""
        if self._thread is None:
            return
        self._stop.set()
        await asyncio.to_thread(self._thread.join)
        self._thread = None

    def _keep(
        self,
        loop: asyncio.AbstractEventLoop,
        acquired: asyncio.Future[int | None],
        facts: Document,
        stop: threading.Event,
        lost: asyncio.Event,
    ) -> None:
        try:
            with self._connection.blocking_client() as client:
                leases = client[self._connection.db_name][self._collection]
                begun = time.monotonic()
                epoch = self._take(leases, facts)
                _tell(loop, _resolve, acquired, epoch)
                if epoch is None or self._beat(leases, epoch, begun + self._seconds, stop):
                    return
        except Exception as error:  # noqa: BLE001 - whoever waits has to hear of it, or would wait for ever
            _tell(loop, _resolve, acquired, error)
        _tell(loop, lost.set)

    def _take(self, leases: Collection[Document], facts: Document) -> int | None:
        """Take the lease in one step if it has run out or never was; return its epoch, None if somebody holds it."""
        token = secrets.token_hex(8)
        mine: Document = {
            **{name: {"$literal": value} for name, value in facts.items()},
            "epoch": {"$add": [{"$ifNull": ["$epoch", 0]}, 1]},
            "seconds": self._seconds,
            "released": False,
            "token": token,
            "lease_until": _until(self._seconds),
        }
        free = {"$lte": [{"$ifNull": ["$lease_until", datetime.fromtimestamp(0, UTC)]}, "$$NOW"]}
        taken = {"$replaceWith": {"$cond": [free, {"$mergeObjects": ["$$ROOT", mine]}, "$$ROOT"]}}
        with timeout(max(self._seconds, self._connection.connect_timeout_ms / 1000)):
            document = leases.find_one_and_update(
                {"_id": self._id}, [taken], upsert=True, return_document=ReturnDocument.AFTER
            )
        return int(document["epoch"]) if document and document["token"] == token else None

    def _beat(self, leases: Collection[Document], epoch: int, good_until: float, stop: threading.Event) -> bool:
        """Extend the lease until told to stop, and give it back then. False if it is lost before.

        No call lasts longer than the lease: over a silent network it would not return for minutes.
        """
        alive = {"_id": self._id, "epoch": epoch, "$expr": {"$gt": ["$lease_until", "$$NOW"]}}
        while not stop.wait(self._seconds / 3):
            begun = time.monotonic()
            try:
                with timeout(max(good_until - begun, 0.1)):
                    extended = leases.update_one(alive, [{"$set": {"lease_until": _until(self._seconds)}}])
                if not extended.matched_count:
                    return False
                good_until = begun + self._seconds
            except PyMongoError as error:
                _log.warning("lease not extended", lease=self._id, error=brief(error))
                if time.monotonic() > good_until:
                    return False
        try:
            with timeout(max(good_until - time.monotonic(), 0.1)):
                leases.update_one(
                    {"_id": self._id, "epoch": epoch}, [{"$set": {"lease_until": "$$NOW", "released": True}}]
                )
        except PyMongoError as error:
            _log.warning("lease not given back, it will run out", lease=self._id, error=brief(error))
        return True


def _resolve(future: asyncio.Future[int | None], answer: int | Exception | None) -> None:
    if future.done():
        return
    if isinstance(answer, Exception):
        future.set_exception(answer)
    else:
        future.set_result(answer)


def _tell(loop: asyncio.AbstractEventLoop, call: Any, *args: Any) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(call, *args)
