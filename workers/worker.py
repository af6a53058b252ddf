"""The worker process. It claims jobs and runs as many of them as it has slots.

The change stream, timers and free slots wake one claim loop. `claims/claim_queue.py` decides which jobs it tries to
claim.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import secrets
import socket
from collections.abc import Coroutine, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.errors import LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import JobCancelRequested, WorkerStopReason
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.mongo.connection import Connection, Database, Document, translate_errors
from jobledger.ledger.mongo.lease import WORKERS_COLLECTION, Lease
from jobledger.ledger.store.change_stream import CallbackListener, ChangeStream
from jobledger.ledger.store.command_handler import DISPATCH_ACTOR
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.cooperative_threads import run_cooperatively
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.engine.dispatcher import DISPATCH_VERSION
from jobledger.workers.attempts.dependencies import AttemptDependencies
from jobledger.workers.attempts.executor import JobExecutor
from jobledger.workers.attempts.inline_batch import InlineBatch
from jobledger.workers.attempts.secret_filter import SecretFilter
from jobledger.workers.attempts.shared_step_finder import SharedStepFinder
from jobledger.workers.child import log_capture
from jobledger.workers.claims.claim_queue import CLAIMER_EVENT_TYPES, ClaimQueue
from jobledger.workers.claims.claimer import ClaimedJob, Claimer
from jobledger.workers.claims.dispatched_claims import DispatchedClaims
from jobledger.workers.event_feed import EventFeed
from jobledger.workers.lease_reaper import LeaseReaper
from jobledger.workers.lifecycle import record_start, record_stop
from jobledger.workers.machine.directory_removal import removal_executor
from jobledger.workers.machine.health import CHECKS, WorkerHealth, check_descriptors
from jobledger.workers.machine.scratch import ScratchDirectory
from jobledger.workers.registry import load_processors
from jobledger.workers.results.path_reservations import PathReservations
from jobledger.workers.settings import WorkerSettings

_log = structlog.get_logger()
_T = TypeVar("_T")
SUBSCRIBED_EVENT_TYPES: Final = CLAIMER_EVENT_TYPES | {"JobCancelRequested"}
"""Types of events that a worker observes."""
_MAX_DELAY_SECONDS: Final = 0.1
"""How long a busy worker may not hear of changes, the request to cancel a running job among them."""
_MAX_CANCEL_VERSIONS: Final = 1000
_ORPHANS_INTERVAL_SECONDS: Final = 6 * 3600.0
_STALE_SCRATCH_INTERVAL_SECONDS: Final = 60.0
_ACCEPT_SECONDS: Final = 0.5
_REFUSE_SECONDS: Final = 0.05
"""Delay from a claim round to the check whether the worker now accepts, or no longer accepts, dispatched jobs."""
_LAST_DISPATCH_SECONDS: Final = 0.1
"""How long a stopping worker waits for claims by API processes that do not know yet that it stops."""
_STOP_SECONDS: Final = 2.0
"""Timeout of each operation at shutdown. Jobs that cannot be released by then are freed when the lease expires."""


class Worker:
    """Runs up to `max_concurrent` jobs at the same time, as long as it holds its lease."""

    def __init__(
        self,
        db: Database,
        event_store: EventStore,
        checkpoint: CheckpointFollower,
        change_stream: ChangeStream,
        connection: Connection,
        file_store: FileStore,
        *,
        settings: WorkerSettings,
        processor_settings: Mapping[str, Mapping[str, Any]],
        may_pause_stream: bool = False,
    ) -> None:
        """Create a worker.

        Args:
            may_pause_stream: Whether no other role of this process needs the change stream.
        """
        self._db = db
        self._event_store = event_store
        self._change_stream = change_stream
        self._connection = connection
        self._file_store = file_store
        self._settings = settings
        self._job_types = frozenset(load_processors())
        self._running: dict[JobExecutor, asyncio.Task[None]] = {}
        """Two may have the same job: while the files of an ended attempt are removed, the next attempt may run."""
        self._recording: set[JobExecutor] = set()
        """Those whose work is done. They need no slot."""
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._cancel_versions: dict[str, int] = {}
        """Versions of recent requests to cancel jobs that may become ours, oldest first."""
        self._may_have_missed_cancels = False  # the change stream was interrupted
        self._unreadable: UnreadableEvent | None = None
        self.worker_id = _new_worker_id()
        self._lease_reaper = LeaseReaper(db, event_store, checkpoint, change_stream)
        self._scratch = ScratchDirectory(settings.scratch_dir, min_free_mb=settings.scratch_min_free_mb)
        self.health = WorkerHealth(
            [self._scratch.check, self._file_store.check_writable, *CHECKS],
            quick_checks=[check_descriptors, self._scratch.check_quickly],
            on_change=self._on_health_changed,
        )
        self._unrecorded_job_ids: set[str] = set()
        """Jobs of this lease whose outcomes could not be recorded."""
        self._accepts_dispatch = False
        """Whether the API may claim jobs for this worker, because it has emptied the queue."""
        self._refused_at = -math.inf
        """When it last became False, on the event loop's clock."""
        self._acceptance_timer: asyncio.TimerHandle | None = None
        self._lease_publisher: asyncio.Task[None] | None = None
        models = {job_type: processor.Settings for job_type, processor in load_processors().items()}
        self.secret_filter = SecretFilter(processor_settings, models, os.environ)
        self._dependencies = AttemptDependencies(
            event_store,
            file_store,
            settings,
            processor_settings,
            self.secret_filter,
            SharedStepFinder(checkpoint.views, event_store),
            PathReservations(db, event_store, checkpoint.views),
            self._scratch,
            self.health,
        )
        self._claim_queue = ClaimQueue(
            event_store,
            checkpoint,
            job_types=self._job_types,
            slots=settings.max_concurrent,
            eligible_workers=lambda: self._lease_reaper.healthy_workers,
            free_slots=self._count_free_slots,
            wake=self._wake.set,
        )
        self._claimer = Claimer(
            event_store, self._claim_queue, start_jobs=self._start_jobs, on_unreadable=self._stop_with_error
        )
        self._dispatched_claims = DispatchedClaims(
            event_store,
            checkpoint,
            self._claim_queue,
            can_start=self._can_start,
            is_running=self._is_running,
            wait_until_settled=self._claimer.wait_until_settled,
            start_jobs=self._start_jobs,
            on_unreadable=self._stop_with_error,
        )
        self._event_feed = EventFeed(
            event_store,
            checkpoint,
            event_types=SUBSCRIBED_EVENT_TYPES,
            pause_stream=change_stream.pause if may_pause_stream else None,
            needs_jobs=self._needs_jobs,
            handle=self._handle_event,
        )
        change_stream.add_listener(CallbackListener("events", self._event_feed.on_change, self._resync))

    def stop(self) -> None:
        """Claim no more jobs, let running jobs end within the grace period, release the rest, and let `run` return."""
        self._stopping.set()
        self._wake.set()

    async def run(self) -> None:
        """Work until `stop` is called. If the lease is lost, fence all running jobs and continue with a new lease."""
        log_capture.install()
        await self._run_startup_checks()
        reaping = asyncio.create_task(self._lease_reaper.run(), name="lease-reaper")
        health_checks = asyncio.create_task(self.health.run(), name="health")
        event_feed = asyncio.create_task(self._event_feed.run(), name="event-feed")
        removals = [
            asyncio.create_task(self._remove_orphans(), name="remove-orphans"),
            asyncio.create_task(self._remove_stale_scratch(), name="remove-stale-scratch"),
        ]
        try:
            while not self._stopping.is_set():
                await self._run_with_lease(reaping)
        finally:
            self._claim_queue.close()
            if self._acceptance_timer is not None:
                self._acceptance_timer.cancel()
            tasks = (reaping, health_checks, event_feed, *removals, self._lease_publisher)
            background = [task for task in tasks if task is not None]
            for task in background:
                task.cancel()
            await asyncio.gather(*background, self._dispatched_claims.cancel(), return_exceptions=True)
            await asyncio.to_thread(self._scratch.close)

    async def _remove_orphans(self) -> None:
        """Remove unfinished files of killed processes from the result store periodically, until cancelled."""
        pause = 60.0
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
            pause = _ORPHANS_INTERVAL_SECONDS
            try:
                if removed := await self._file_store.remove_orphans():
                    _log.info("removed unfinished files from the result store", count=removed)
            except LedgerUnavailable as error:
                _log.warning("cannot remove unfinished files from the result store yet", error=str(error))

    async def _remove_stale_scratch(self) -> None:
        """Remove the scratch directories of killed workers periodically, until cancelled."""
        while True:
            try:
                await run_cooperatively(self._scratch.remove_stale(), removal_executor)
            except OSError as error:
                _log.warning("cannot remove scratch directories of killed workers yet", error=str(error))
            await asyncio.sleep(_STALE_SCRATCH_INTERVAL_SECONDS)

    async def _run_startup_checks(self) -> None:
        """Run checks before the first claim. If they fail, the worker starts and claims nothing until they pass."""
        await self.secret_filter.refresh()
        checks = [self._scratch.prepare, self._scratch.check, self._file_store.check_writable]
        if (failure := await self.health.run_checks(checks)) is not None:
            self.health.report(failure)

    async def _run_with_lease(self, reaping: asyncio.Task[None]) -> None:
        lease = Lease(self._connection, WORKERS_COLLECTION, self.worker_id, seconds=self._settings.lease_seconds)
        fields = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slots": self._settings.max_concurrent,
            "job_types": sorted(self._job_types),
            "started_at": datetime.now(UTC),
            **self._get_lease_fields(),
        }
        try:
            if not await self._run_unless_stopped(lease.acquire(fields)):
                return
        except LedgerUnavailable as error:
            _log.warning("cannot acquire a lease yet", error=str(error))
            await self._run_unless_stopped(asyncio.sleep(1))
            return
        self._claim_queue.worker_id = self.worker_id
        self._lease_reaper.worker_id = self.worker_id
        self._lease_reaper.lease = lease
        self._wake.set()
        claiming = asyncio.create_task(self._claim_until_stopped(), name="claim")
        lost = asyncio.create_task(lease.wait_lost())
        stopping: asyncio.Task[Any] = asyncio.create_task(self._stopping.wait())
        stop_reason: WorkerStopReason = "failed"
        try:
            await asyncio.wait({claiming, lost, reaping, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                # Complete pending claims: a cancelled one may still be written, and no worker would run the job.
                await asyncio.wait({claiming, lost}, timeout=_STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in (claiming, reaping):
                if task.done():
                    task.result()
            claiming.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
            if lease.is_held:
                await self._refuse_dispatch()
                await self._finish_within_grace(lost)
                await self._finish_checks(lost)
            if not lease.is_held:
                _log.error("lease lost: stopping all running jobs", worker_id=self.worker_id, jobs=len(self._running))
            stop_reason = "stopped"
        finally:
            self._lease_reaper.lease = None  # dispatched jobs no longer start
            if self._accepts_dispatch:
                self._set_acceptance(accepts=False)
            if self._acceptance_timer is not None:
                self._acceptance_timer.cancel()
                self._acceptance_timer = None
            for task in (claiming, lost, stopping):
                task.cancel()
            await self._claimer.cancel_pending()
            await self._dispatched_claims.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
            await self._stop_fenced_jobs()
            if lease.is_held:
                await record_stop(self._event_store, self.worker_id, stop_reason)
            await lease.release()
            self._lease_reaper.worker_id = ""
            self.worker_id = _new_worker_id()
            self._unrecorded_job_ids.clear()

    async def _refuse_dispatch(self) -> None:
        """Tell the API to claim no more jobs for this worker, and wait for the last ones, to release them."""
        if self._accepts_dispatch:
            self._set_acceptance(accepts=False)
        await asyncio.sleep(self._refused_at + _LAST_DISPATCH_SECONDS - asyncio.get_running_loop().time())

    async def _finish_checks(self, lost: asyncio.Task[None]) -> None:
        """Wait until dispatched claims that are being checked are released. Return early if the lease is lost."""
        checks = asyncio.create_task(self._dispatched_claims.wait_for_checks())
        await asyncio.wait({checks, lost}, timeout=_STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        checks.cancel()

    async def _run_unless_stopped(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        """Return the result of `work`. If the worker is stopped first, cancel `work` and return None."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            task.cancel()
            stopping.cancel()

    async def _stop_fenced_jobs(self) -> None:
        """Fence all running jobs. Cancel their last calls to a database that does not respond."""
        for executor in list(self._running):
            executor.stop_fenced()
        await self._wait_for_jobs(_STOP_SECONDS)
        while pending := set(self._running.values()):
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _finish_within_grace(self, lost: asyncio.Task[None]) -> None:
        """Wait for running jobs within the grace period, then release them. Return early if the lease is lost."""
        if not self._running:
            return
        _log.info("waiting for running jobs", jobs=len(self._running), seconds=self._settings.shutdown_grace_seconds)
        await self._wait_for_jobs(self._settings.shutdown_grace_seconds, lost)
        if not lost.done():
            for executor in list(self._running):
                executor.release()
            # If the database does not respond, other workers get the jobs when our lease has expired.
            await self._wait_for_jobs(_STOP_SECONDS, lost)

    async def _wait_for_jobs(self, seconds: float, *stops: asyncio.Task[None]) -> None:
        """Wait for the running jobs, which may move to other tasks. Return early if one of `stops` is done."""
        loop = asyncio.get_running_loop()
        end_at = loop.time() + seconds
        while self._running and not any(stop.done() for stop in stops) and (left := end_at - loop.time()) > 0:
            tasks = {*self._running.values(), *stops}
            await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            await asyncio.sleep(0)  # the callbacks of the tasks update the running jobs

    # Waking up ----------------------------------------------------------------------------------------------------

    def get_max_delay(self) -> float:
        """Return after how many seconds it must hear of changes: at once if it has a free slot and knows no jobs."""
        return 0.0 if self._needs_jobs() else _MAX_DELAY_SECONDS

    def _hurry_if_needed(self) -> None:
        if self._needs_jobs():
            self._event_feed.hurry()  # first, so that a pause that is not noticed yet leaves the stream open
            self._change_stream.hurry()

    def _needs_jobs(self) -> bool:
        return self._count_all_free_slots() > 0 and self._claim_queue.is_exhausted

    def _count_all_free_slots(self) -> int:
        """Return how many more jobs may be run now.

        Jobs whose outcome is being recorded need no slot, but they must not pile up when the database is slow.
        """
        slots = self._settings.max_concurrent
        used = len(self._running) + len(self._claim_queue.pending_claims)
        return min(slots + len(self._recording), 2 * slots) - used

    def _count_free_slots(self, job_type: str) -> int:
        """Return how many more jobs of a type may be run now."""
        claiming = self._claim_queue.pending_claims
        free = self._count_all_free_slots()
        if (max_slots := self._settings.max_concurrent_per_type.get(job_type)) is None:
            return free
        used = [executor.job_type for executor in self._running.keys() - self._recording] + [*claiming.values()]
        return min(free, max_slots - used.count(job_type))

    async def _resync(self, session: AsyncClientSession) -> None:
        """Changes may have been missed: query the queue, and check whether running jobs were cancelled."""
        self._may_have_missed_cancels = True
        head = await self._event_store.read_head_position(session)
        self._claim_queue.resync(head)
        self._dispatched_claims.resync(head)

    def _handle_event(self, document: Mapping[str, Any]) -> None:
        if document["type"] != "JobCancelRequested":
            is_dispatched = self._is_dispatched_claim(document)
            new_job = self._claim_queue.get_new_job(document["stream"]) if is_dispatched else None
            self._claim_queue.handle_event(document)
            if is_dispatched:
                self._dispatched_claims.handle_claim(document, new_job)
            return
        for executor in list(self._running):
            if executor.job_id == document["stream"] and executor.claimed_version < document["version"]:
                executor.cancel()
        # This worker's claim of the job may be written already, although the append has not returned.
        self._cancel_versions[document["stream"]] = document["version"]
        if len(self._cancel_versions) > _MAX_CANCEL_VERSIONS:
            del self._cancel_versions[next(iter(self._cancel_versions))]

    def _is_dispatched_claim(self, document: Mapping[str, Any]) -> bool:
        """Return whether a job was claimed for this worker when it was submitted.

        In a flood, events have no metadata; the search after the next resync finds the claim.
        """
        is_own = document["type"] == "JobClaimed" and document["data"]["worker_id"] == self.worker_id
        return is_own and bool(document.get("meta", {}).get("actor") == DISPATCH_ACTOR)

    def _is_running(self, job_id: str) -> bool:
        return job_id in self._unrecorded_job_ids or any(executor.job_id == job_id for executor in self._running)

    def _can_start(self, job_type: str) -> bool:
        """Return whether a job may be started now. A process that was suspended may have lost its lease by now."""
        lease = self._lease_reaper.lease
        return (
            not self._stopping.is_set()
            and lease is not None
            and lease.uninterrupted_seconds > 0
            and job_type in self._job_types
            and self.health.can_claim()
            and self._count_free_slots(job_type) > 0
        )

    # Health -------------------------------------------------------------------------------------------------------

    def _on_health_changed(self) -> None:
        """Wake the claim loop, and inform the other workers, so that none defers a job to an unhealthy worker."""
        self._wake.set()
        self._publish()

    def _reconsider_acceptance(self) -> None:
        """Check soon whether the API may claim jobs for this worker. It is called often, and must cost nothing."""
        if self._acceptance_timer is None:
            seconds = _REFUSE_SECONDS if self._accepts_dispatch else _ACCEPT_SECONDS
            self._acceptance_timer = asyncio.get_running_loop().call_later(seconds, self._update_acceptance)

    def _update_acceptance(self) -> None:
        self._acceptance_timer = None
        accepts = self._claim_queue.is_exhausted and not self._stopping.is_set()
        if accepts != self._accepts_dispatch:
            self._set_acceptance(accepts=accepts)

    def _set_acceptance(self, *, accepts: bool) -> None:
        self._accepts_dispatch = accepts
        if not accepts:
            self._refused_at = asyncio.get_running_loop().time()
        self._publish()

    def _get_lease_fields(self) -> Document:
        """Return the fields of the lease document that change."""
        accepts = self._accepts_dispatch and self.health.can_claim()
        accepted = self._job_types - self._settings.max_concurrent_per_type.keys() if accepts else ()
        return {
            **self.health.get_document_fields(),
            "accepted_job_types": sorted(accepted),
            "dispatch_version": DISPATCH_VERSION,
        }

    def _publish(self) -> None:
        if self._lease_publisher is None or self._lease_publisher.done():
            self._lease_publisher = asyncio.create_task(self._publish_lease_fields(), name="publish-lease-fields")

    async def _publish_lease_fields(self) -> None:
        """Write the fields that have changed to the lease document until it is up to date.

        Before the lease is acquired, there is no document. It may then be created with outdated fields.
        """
        published: Document | None = None
        while published != (fields := self._get_lease_fields()):
            with suppress(LedgerUnavailable), translate_errors("updating a lease document"):
                update = await self._db[WORKERS_COLLECTION].update_one({"_id": self.worker_id}, {"$set": fields})
                if update.matched_count:
                    published = fields
                    continue
            await asyncio.sleep(1)

    # Claiming -----------------------------------------------------------------------------------------------------

    async def _claim_until_stopped(self) -> None:
        """Record the start, then claim jobs whenever there are candidates, until stopped. Complete pending claims.

        If claims were cancelled, their events might still be written, and no worker would run the jobs.
        """
        await record_start(self._event_store, self.worker_id, self._settings, self._job_types)
        while not self._stopping.is_set():
            await self._wake.wait()
            self._wake.clear()
            if self._unreadable is not None:
                raise self._unreadable
            try:
                if self._may_have_missed_cancels:
                    await self._load_missed_cancels()
                await self._claim_available()
            except LedgerUnavailable as error:
                _log.warning("claiming interrupted, retrying", error=str(error))
                await asyncio.sleep(1)
                self._wake.set()
        await self._claimer.wait_pending()

    async def _claim_available(self) -> None:
        while not self._stopping.is_set():
            await self.health.run_quick_checks()
            self._reconsider_acceptance()
            if not self.health.can_claim() or not await self._claimer.start_claims():
                self._reconsider_acceptance()  # the last query may have changed it
                self._hurry_if_needed()
                return

    async def _load_missed_cancels(self) -> None:
        self._may_have_missed_cancels = False
        may_become_ours = self._claim_queue.pending_claims.keys() | self._dispatched_claims.checked_job_ids
        job_ids = [*may_become_ours, *(executor.job_id for executor in self._running)]
        if not job_ids:
            return
        try:
            versions = await self._event_store.find_last_versions(job_ids, JobCancelRequested)
        except LedgerUnavailable:
            self._may_have_missed_cancels = True
            raise
        for executor in list(self._running):
            if versions.get(executor.job_id, 0) > executor.claimed_version:
                executor.cancel()
        self._cancel_versions |= {job_id: versions[job_id] for job_id in may_become_ours & versions.keys()}

    def _start_jobs(self, claimed: Sequence[ClaimedJob]) -> None:
        inline: list[JobExecutor] = []
        for job_id, stream_state in claimed:
            try:
                executor = JobExecutor(self._dependencies, stream_state, job_id)
                if self._cancel_versions.pop(job_id, 0) > stream_state.head.version:
                    executor.cancel()
                if executor.is_inline:
                    inline.append(executor)
                else:
                    self._run_jobs([executor], executor.run())
            except Exception as error:  # noqa: BLE001 - it must not keep the other jobs of the claim from starting
                _log.error(
                    "claimed job not started: restart the worker to release the job", job_id=job_id, error=repr(error)
                )
        if inline:
            self._run_jobs(inline, InlineBatch(self._event_store, inline, self._run_jobs, self._free_slots).run())

    def _run_jobs(self, executors: Sequence[JobExecutor], coroutine: Coroutine[Any, Any, None]) -> None:
        """Run a coroutine in a task. Jobs that no other task has taken over by then are done when it is done."""
        task = asyncio.create_task(coroutine, name=f"run-{executors[0].job_id}")
        for executor in executors:
            self._running[executor] = task
        task.add_done_callback(partial(self._on_jobs_done, executors))

    def _free_slots(self, executors: Sequence[JobExecutor]) -> None:
        """Let other jobs run while the outcomes of these are recorded."""
        self._recording.update(executors)
        self._wake.set()

    def _on_jobs_done(self, executors: Sequence[JobExecutor], task: asyncio.Task[None]) -> None:
        for executor in executors:
            if self._running.get(executor) is task:
                self._on_job_done(executor, task)
        self._wake.set()
        self._hurry_if_needed()

    def _on_job_done(self, executor: JobExecutor, task: asyncio.Task[None]) -> None:
        del self._running[executor]
        self._recording.discard(executor)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, UnreadableEvent):
                _log.error("job unreadable, stopping the worker", job_id=executor.job_id, error=repr(error))
                self._stop_with_error(error)
            else:
                self._unrecorded_job_ids.add(executor.job_id)
                _log.error(
                    "outcome of an attempt not recorded: restart the worker to release the job",
                    job_id=executor.job_id,
                    error=repr(error),
                )

    def _stop_with_error(self, error: UnreadableEvent) -> None:
        """Stop the process. A job that may be ours cannot be read, and no other worker may run it under our lease."""
        self._unreadable = error
        self._wake.set()


def _new_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
