"""workers: leases of workers, and what happens when one runs out.

A worker process holds one lease, a document in `workers`; heartbeats are not in the log. All workers hear of each
other's heartbeats by the change stream and set timers. Whoever has heard none of a worker for the time of its lease, by
its own steady clock, declares the lease over and appends `JobLeaseExpired` for every job its worker held; any number of
them may, one append wins.

Why no clock can be wrong: whoever declares a lease over demands the beat that it has seen all the time, so a worker
that has extended its lease meanwhile keeps it. The server's clock may shorten the wait, but only for workers that were
never seen to extend theirs, and not below half of a lease, in which they would have been: after a crash of everything,
leases have expired long ago. So it does not matter that a lease was written under the clock of another primary.

Nobody is blamed for an outage of the database: only who has extended a lease of its own for a while, without a beat
missing, judges others. What they could not do, it could not either; when it can, they have had the time to.

Why no job is left behind: a claim is an event. Once the views contain every event up to the head of the log, they name
all jobs that the dead worker held. A zombie's claim that comes even later is heard as `JobClaimed` from a worker that
is not alive, and is reaped as well; who was not there to hear it finds it at start, among the jobs of unknown workers.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping
from typing import Any, Final

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.commands import ExpireLease
from jobledger.ledger.domain.errors import CommandRejected, LedgerBusy, LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import EventMetadata
from jobledger.ledger.mongo.connection import Database, translate_errors
from jobledger.ledger.mongo.lease import EXPIRE_LEASE_UPDATE, Lease, LeaseObservation
from jobledger.ledger.store.change_stream import CallbackListener, ChangeStream
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.views import jobs

_log = structlog.get_logger()
COLLECTION: Final = "workers"
_JITTER_SECONDS: Final = 0.3  # up to so long a watcher waits, so that not all of them act at once
_UNKNOWN_SECONDS: Final = 1.0
_STEADY_FRACTION: Final = (
    0.5  # of a lease: so long a watcher must have beaten without a gap; a lease is extended thrice as often
)
_LEFT_MS: Final = {"$subtract": ["$lease_until", "$$NOW"]}
_READ: Final = {"left_ms": _LEFT_MS, "seconds": 1, "released": 1, "heartbeat": 1}
_UNKNOWN_WORKERS: Final = ""  # in place of a worker's id: all that are named by running jobs and hold no lease


class LeaseReaper:
    """Notices workers that gave no sign of life, and frees their jobs."""

    def __init__(self, db: Database, log: EventStore, checkpoint: Checkpoint, changes: ChangeStream) -> None:
        self._db = db
        self._log = log
        self._checkpoint = checkpoint
        self.worker_id = ""
        """The worker on whose behalf we watch, while it has a lease."""
        self.lease: Lease | None = None
        """The lease of that worker."""
        self._observed: dict[str, LeaseObservation] = {}
        self._seconds: dict[str, float] = {}
        self._unhealthy: set[str] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._check_queue: asyncio.Queue[str] = asyncio.Queue()
        changes.add_listener(CallbackListener(COLLECTION, self._on_heartbeat, self._resync))
        changes.add_listener(CallbackListener("events", self._on_event, _ignore_resync))

    @property
    def live_workers(self) -> Collection[str]:
        """The ids of the workers that give signs of life, as far as we have heard."""
        return self._seconds.keys()

    @property
    def healthy_workers(self) -> Collection[str]:
        """The ids of the workers that are alive and healthy: those that may claim a job."""
        return self._seconds.keys() - self._unhealthy if self._unhealthy else self._seconds.keys()

    async def run(self) -> None:
        """Check leases whose time should be over, one after the other, until cancelled."""
        try:
            while True:
                worker_id = await self._check_queue.get()
                self._timers.pop(worker_id, None)  # from here on, a claim that is heard sets a new one
                try:
                    await self._check(worker_id)
                except (LedgerUnavailable, LedgerBusy) as error:
                    _log.warning("lease could not be checked yet", worker_id=worker_id, error=str(error))
                    self._schedule_check(worker_id, 1.0)
        finally:
            for timer in self._timers.values():
                timer.cancel()

    # Hearing ------------------------------------------------------------------------------------------------------

    async def _resync(self, session: AsyncClientSession) -> None:
        """Learn who is alive, and for how long; then look for those named by a running job but not among them."""
        alive = self._db[COLLECTION].find({}, {**_READ, "problem": 1}, session=session)
        self._seconds.clear()
        self._unhealthy.clear()
        async for worker in alive:
            self._seconds[worker["_id"]] = worker["seconds"]
            self._update_health(worker["_id"], worker)
            self._schedule_check(worker["_id"], 0.0 if worker["released"] else self._remaining_seconds(worker))
        self._schedule_check(_UNKNOWN_WORKERS, 0.0)

    def _on_heartbeat(self, change: Mapping[str, Any]) -> None:
        worker_id = change["documentKey"]["_id"]
        if change["operationType"] == "delete":
            # The timer stays: a claim later than what its reaper has seen may have been heard before this.
            self._seconds.pop(worker_id, None)
            self._unhealthy.discard(worker_id)
            self._observed.pop(worker_id, None)
            return
        changed = change.get("fullDocument") or change.get("updateDescription", {}).get("updatedFields", {})
        self._update_health(worker_id, changed)
        if (
            "heartbeat" not in changed and "fullDocument" not in change
        ):  # expired by a process that may die: keep our timer
            return
        self._seconds[worker_id] = changed.get("seconds", self._seconds.get(worker_id, 10.0))
        self._observed.setdefault(worker_id, LeaseObservation()).record(changed.get("heartbeat"))
        self._schedule_check(worker_id, 0.0 if changed.get("released") else self._seconds[worker_id])

    def _update_health(self, worker_id: str, fields: Mapping[str, Any]) -> None:
        if fields.get("problem"):
            self._unhealthy.add(worker_id)
        elif "problem" in fields:
            self._unhealthy.discard(worker_id)

    def _on_event(self, change: Mapping[str, Any]) -> None:
        if change["operationType"] == "insert" and change["fullDocument"]["type"] == "JobClaimed":
            self._check_if_unknown(change["fullDocument"]["data"]["worker_id"])

    def _check_if_unknown(self, worker_id: str) -> None:
        """Have a look at a worker that runs a job, unless we know that it is alive."""
        if worker_id not in self._seconds and worker_id not in self._timers:
            self._schedule_check(worker_id, _UNKNOWN_SECONDS)

    def _schedule_check(self, worker_id: str, seconds: float) -> None:
        """Passing time makes no change event: set a timer for when the lease should be over."""
        if (timer := self._timers.pop(worker_id, None)) is not None:
            timer.cancel()
        pause = max(0.0, seconds) + random.uniform(0.05, _JITTER_SECONDS)  # noqa: S311 - spreads load
        loop = asyncio.get_running_loop()
        self._timers[worker_id] = loop.call_later(pause, self._check_queue.put_nowait, worker_id)

    def _remaining_seconds(self, worker: Mapping[str, Any]) -> float:
        """Take in the document of a lease; return in how many seconds the lease has expired, 0 or less if it has."""
        seen = self._observed.setdefault(worker["_id"], LeaseObservation())
        seen.record(worker.get("heartbeat"))
        left = worker["seconds"] - seen.seconds_since_heartbeat
        if seen.was_extended:
            return float(left)
        by_the_server = max(
            worker["left_ms"] / 1000, _STEADY_FRACTION * worker["seconds"] - seen.seconds_since_heartbeat
        )
        return float(min(left, by_the_server))

    # Acting -------------------------------------------------------------------------------------------------------

    async def _check(self, worker_id: str) -> None:
        if worker_id == _UNKNOWN_WORKERS:
            await self._checkpoint.wait_for_position(await self._log.head_position())
            for stranger in await jobs.count_running_by_worker(self._checkpoint.views):
                self._check_if_unknown(stranger)
            return
        with translate_errors("checking a lease"):
            worker = await self._db[COLLECTION].find_one({"_id": worker_id}, _READ)
        if worker is not None and not worker["released"]:
            if (left := self._remaining_seconds(worker)) > 0:
                self._schedule_check(worker_id, left)
                return
            steady = self.lease.uninterrupted_seconds if self.lease is not None else 0.0
            if (missing := _STEADY_FRACTION * worker["seconds"] - steady) > 0:
                self._schedule_check(worker_id, missing if steady > 0 else _UNKNOWN_SECONDS)
                return
            with translate_errors("declaring a lease over"):
                # Only with the beat that we have seen all the time: whoever has extended it meanwhile keeps it.
                same = {"_id": worker_id, "heartbeat": worker.get("heartbeat")}
                over = await self._db[COLLECTION].update_one(same, EXPIRE_LEASE_UPDATE)
            if not over.matched_count:  # it was extended just now, or another watcher is done with it
                self._schedule_check(worker_id, _UNKNOWN_SECONDS)
                return
        self._seconds.pop(worker_id, None)  # before the head is read: what is claimed after that is heard of
        await self._reap(worker_id, worker, quietly=worker is None or worker["released"])

    async def _reap(self, worker_id: str, worker: Mapping[str, Any] | None, *, quietly: bool) -> None:
        await self._checkpoint.wait_for_position(await self._log.head_position())
        held = await jobs.find_jobs_of_worker(self._checkpoint.views, worker_id)
        if held or not quietly:
            _log.warning("worker gave no sign of life", worker_id=worker_id, jobs=len(held))
        left, meta = False, EventMetadata(f"worker:{self.worker_id}")
        for job in held:
            try:
                await handle_command(self._log, job["_id"], ExpireLease(worker_id, job["attempt"]), meta=meta)
            except CommandRejected as refused:
                _log.info("job left as it is", job_id=job["_id"], reason=str(refused))
            except UnreadableEvent as error:
                _log.error("job left to a later version", job_id=job["_id"], error=str(error))
                left = True
        if left or worker is None:
            return  # with its lease, by which workers of that version will find it
        with translate_errors("removing a lease that has run out"):
            await self._db[COLLECTION].delete_one({"_id": worker_id, "heartbeat": worker.get("heartbeat")})


async def _ignore_resync(_session: AsyncClientSession) -> None:
    """Claims missed while the stream was closed are found among the jobs of unknown workers."""
