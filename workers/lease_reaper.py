"""Expire the leases of crashed workers and make their jobs pending again.

Each worker process holds one lease, a document in the collection `workers`. Heartbeats are not in the event store. All
workers observe each other's heartbeats through the change stream and set timers. When a reaper has observed no
heartbeat of a worker for the duration of its lease, by the reaper's monotonic clock, it expires the lease. It appends
`JobLeaseExpired` for every job of that worker. Several reapers may do so; one append wins.

No clock can cause a wrong expiry. The update that expires a lease matches the last observed heartbeat, so a worker that
has extended its lease in the meantime keeps it. The server's clock may shorten the wait only for workers that were
never observed to extend their lease. Even then a reaper waits for at least half the duration of the lease, in which a
running worker extends it. Therefore the clock of an earlier primary, which may have written the lease, does no harm.

A database outage expires no leases of healthy workers. Only a reaper that has extended its own lease for a while
without a gap expires the leases of others. When it could not write heartbeats, the others could not either.

All jobs of a crashed worker become pending again. A claim is an event. Once the views contain every event up to the
head of the log, they name all jobs of that worker. If a job is claimed for it even later, reapers observe a
`JobClaimed` of a worker without a lease, and expire its lease as well. A reaper that starts later finds such jobs among
those of unknown workers.

A reaper also provides the IDs of the workers that may claim jobs, because it observes the lease documents of all
workers.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Collection, Mapping
from typing import Any, Final

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.commands import ExpireLease, ReportLostWorker
from jobledger.ledger.domain.errors import CommandRejected, LedgerBusy, LedgerUnavailable, StreamBusy, UnreadableEvent
from jobledger.ledger.domain.events import EventMetadata
from jobledger.ledger.domain.worker import build_worker_stream
from jobledger.ledger.mongo.connection import Database, translate_errors
from jobledger.ledger.mongo.lease import EXPIRE_LEASE_UPDATE, WORKERS_COLLECTION, Lease, LeaseObservation
from jobledger.ledger.store.change_stream import CallbackListener, ChangeStream
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.views import job_list

_log = structlog.get_logger()
_JITTER_SECONDS: Final = 0.3
"""Random delay, so that not all reapers act at the same time."""
_RECHECK_SECONDS: Final = 1.0
"""Delay before the check of a worker without a lease, and before a check that cannot be completed is repeated."""
_STEADY_FRACTION: Final = 0.5
"""Fraction of a lease for which a reaper must have extended its own lease without a gap before it expires others.

Leases are extended three times per lease duration.
"""
_REMAINING_MS: Final = {"$subtract": ["$lease_until", "$$NOW"]}
_FIELDS: Final = {"remaining_ms": _REMAINING_MS, "seconds": 1, "released": 1, "heartbeat": 1}
_UNKNOWN_WORKERS: Final = ""
"""Stands for all workers that have running jobs and no lease."""


class LeaseReaper:
    """Detects workers without heartbeats, and makes their jobs pending again. Knows which workers may claim jobs."""

    def __init__(
        self, db: Database, event_store: EventStore, checkpoint: CheckpointFollower, change_stream: ChangeStream
    ) -> None:
        self._db = db
        self._event_store = event_store
        self._checkpoint = checkpoint
        self.worker_id = ""
        """The worker that this reaper belongs to, while it has a lease."""
        self.lease: Lease | None = None
        """The lease of that worker."""
        self._observed: dict[str, LeaseObservation] = {}
        self._live_workers: dict[str, float] = {}
        """The workers with a lease, until it is found expired, and the duration of the lease in seconds."""
        self._unhealthy: set[str] = set()
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._check_queue: asyncio.Queue[str] = asyncio.Queue()
        change_stream.add_listener(CallbackListener(WORKERS_COLLECTION, self._on_lease_change, self._resync))
        change_stream.add_listener(CallbackListener("events", self._on_event, _ignore_resync))

    @property
    def healthy_workers(self) -> Collection[str]:
        """The IDs of the workers that extend their leases and are healthy. Only these claim jobs."""
        return self._live_workers.keys() - self._unhealthy if self._unhealthy else self._live_workers.keys()

    async def run(self) -> None:
        """Check leases that may be overdue, one after the other, until cancelled."""
        try:
            while True:
                worker_id = await self._check_queue.get()
                self._timers.pop(worker_id, None)  # an observed claim after this sets a new timer
                try:
                    await self._check(worker_id)
                except (LedgerUnavailable, LedgerBusy) as error:
                    _log.warning("cannot check a lease yet", worker_id=worker_id, error=str(error))
                    self._schedule_check(worker_id, _RECHECK_SECONDS)
        finally:
            for timer in self._timers.values():
                timer.cancel()

    # Observing ----------------------------------------------------------------------------------------------------

    async def _resync(self, session: AsyncClientSession) -> None:
        """Load all lease documents with their remaining times, and look for running jobs of unknown workers."""
        workers = await self._db[WORKERS_COLLECTION].find({}, {**_FIELDS, "problem": 1}, session=session).to_list()
        self._live_workers.clear()
        self._unhealthy.clear()
        for worker in workers:
            self._live_workers[worker["_id"]] = worker["seconds"]
            self._update_health(worker["_id"], worker)
            self._schedule_check(worker["_id"], 0.0 if worker["released"] else self._observe_remaining_seconds(worker))
        self._schedule_check(_UNKNOWN_WORKERS, 0.0)

    def _on_lease_change(self, change: Mapping[str, Any]) -> None:
        """Handle a heartbeat, a change of the worker's health, or the end or deletion of a lease."""
        worker_id = change["documentKey"]["_id"]
        if change["operationType"] == "delete":
            # Keep the timer: a claim that its reaper did not see may have been observed before this deletion.
            self._live_workers.pop(worker_id, None)
            self._unhealthy.discard(worker_id)
            self._observed.pop(worker_id, None)
            return
        changed = change.get("fullDocument") or change.get("updateDescription", {}).get("updatedFields", {})
        self._update_health(worker_id, changed)
        if "heartbeat" not in changed and "fullDocument" not in change:
            return  # a change of the health, or another reaper expired the lease and may crash: keep the timer
        self._live_workers[worker_id] = changed.get("seconds", self._live_workers.get(worker_id, 10.0))
        self._observed.setdefault(worker_id, LeaseObservation()).record(changed.get("heartbeat"))
        self._schedule_check(worker_id, 0.0 if changed.get("released") else self._live_workers[worker_id])

    def _update_health(self, worker_id: str, fields: Mapping[str, Any]) -> None:
        if fields.get("problem"):
            self._unhealthy.add(worker_id)
        elif "problem" in fields:
            self._unhealthy.discard(worker_id)

    def _on_event(self, change: Mapping[str, Any]) -> None:
        if change["operationType"] == "insert" and change["fullDocument"]["type"] == "JobClaimed":
            self._check_if_unknown(change["fullDocument"]["data"]["worker_id"])

    def _check_if_unknown(self, worker_id: str) -> None:
        """Schedule a check of a worker that runs a job, unless it has a lease or a check is scheduled."""
        if worker_id not in self._live_workers and worker_id not in self._timers:
            self._schedule_check(worker_id, _RECHECK_SECONDS)

    def _schedule_check(self, worker_id: str, seconds: float) -> None:
        """Set a timer for when a lease may be overdue: the passing of time causes no change event."""
        if (timer := self._timers.pop(worker_id, None)) is not None:
            timer.cancel()
        pause = max(0.0, seconds) + random.uniform(0.05, _JITTER_SECONDS)  # noqa: S311 - spreads load
        loop = asyncio.get_running_loop()
        self._timers[worker_id] = loop.call_later(pause, self._check_queue.put_nowait, worker_id)

    def _observe_remaining_seconds(self, worker: Mapping[str, Any]) -> float:
        """Observe a lease document. Return the seconds until the lease is overdue, 0 or less if it is."""
        observation = self._observed.setdefault(worker["_id"], LeaseObservation())
        observation.record(worker.get("heartbeat"))
        remaining = worker["seconds"] - observation.seconds_since_heartbeat
        if observation.was_extended:
            return float(remaining)
        by_server_clock = max(
            worker["remaining_ms"] / 1000, _STEADY_FRACTION * worker["seconds"] - observation.seconds_since_heartbeat
        )
        return float(min(remaining, by_server_clock))

    # Expiring -----------------------------------------------------------------------------------------------------

    async def _check(self, worker_id: str) -> None:
        if worker_id == _UNKNOWN_WORKERS:
            await self._checkpoint.wait_for_position(await self._event_store.read_head_position())
            for unknown_worker in await job_list.count_running_by_worker(self._checkpoint.views):
                self._check_if_unknown(unknown_worker)
            return
        with translate_errors("checking a lease"):
            worker = await self._db[WORKERS_COLLECTION].find_one({"_id": worker_id}, _FIELDS)
        if worker is not None and not worker["released"]:
            if (remaining := self._observe_remaining_seconds(worker)) > 0:
                self._schedule_check(worker_id, remaining)
                return
            uninterrupted = self.lease.uninterrupted_seconds if self.lease is not None else 0.0
            if (missing := _STEADY_FRACTION * worker["seconds"] - uninterrupted) > 0:
                self._schedule_check(worker_id, missing if uninterrupted > 0 else _RECHECK_SECONDS)
                return
            with translate_errors("expiring a lease"):
                # Match the last observed heartbeat, so that a worker that has extended its lease since keeps it.
                unchanged = {"_id": worker_id, "heartbeat": worker.get("heartbeat")}
                expired = await self._db[WORKERS_COLLECTION].update_one(unchanged, EXPIRE_LEASE_UPDATE)
            if not expired.matched_count:  # it was extended, or another reaper has expired it
                self._schedule_check(worker_id, _RECHECK_SECONDS)
                return
        self._live_workers.pop(worker_id, None)  # before the head is read, so that later claims are observed
        await self._reap(worker_id, worker, is_released=worker is None or worker["released"])

    async def _reap(self, worker_id: str, worker: Mapping[str, Any] | None, *, is_released: bool) -> None:
        await self._checkpoint.wait_for_position(await self._event_store.read_head_position())
        running = await job_list.find_jobs_of_worker(self._checkpoint.views, worker_id)
        if running or not is_released:
            _log.warning("worker stopped sending heartbeats", worker_id=worker_id, jobs=len(running))
        has_unreadable = False
        meta = EventMetadata(f"worker:{self.worker_id}")
        has_busy = not await self._report_lost_worker(worker_id, meta)
        for job in running:
            try:
                await handle_command(self._event_store, job["_id"], ExpireLease(worker_id, job["attempt"]), meta=meta)
            except CommandRejected as error:
                _log.info("lease expiry not recorded, the job rejects it", job_id=job["_id"], reason=str(error))
            except UnreadableEvent as error:
                _log.error("cannot expire a job's lease: its stream is unreadable", job_id=job["_id"], error=str(error))
                has_unreadable = True
            except StreamBusy as error:
                _log.warning("cannot expire a job's lease yet", job_id=job["_id"], reason=str(error))
                has_busy = True
        if has_busy:
            self._schedule_check(worker_id, _RECHECK_SECONDS)
        if has_busy or has_unreadable or worker is None:
            return  # keep the lease document, so that other reapers find the job, for example those of a newer version
        with translate_errors("removing an expired lease"):
            await self._db[WORKERS_COLLECTION].delete_one({"_id": worker_id, "heartbeat": worker.get("heartbeat")})

    async def _report_lost_worker(self, worker_id: str, meta: EventMetadata) -> bool:
        """Record that a worker is lost, unless its end is recorded. Return whether there is nothing left to record."""
        stream, command = build_worker_stream(worker_id), ReportLostWorker(self.worker_id)
        try:
            await handle_command(self._event_store, stream, command, meta=meta)
        except StreamBusy:
            return False
        except (CommandRejected, UnreadableEvent) as error:
            _log.error("cannot record that a worker is lost", worker_id=worker_id, error=str(error))
        return True


async def _ignore_resync(_session: AsyncClientSession) -> None:
    """Ignore the resync: the check for unknown workers finds claims missed while the stream was closed."""
