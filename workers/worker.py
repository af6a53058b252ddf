"""workers: the worker process. Wakes by the change stream, claims by appending, runs as many jobs as it has slots.

The stream, timers and slots that become free only wake the one claim loop; which jobs it tries is for `claims.py`.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import socket
from collections import OrderedDict
from collections.abc import Coroutine, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.errors import CommandRejected, LedgerBusy, LedgerUnavailable, NotDue, UnreadableEvent
from jobledger.ledger.domain.events import EventMetadata
from jobledger.ledger.domain.job import Job
from jobledger.ledger.mongo.connection import Connection, Database, Document, translate_errors
from jobledger.ledger.mongo.lease import Lease
from jobledger.ledger.store.change_stream import CallbackListener, ChangeStream
from jobledger.ledger.store.command_handler import CommandResult, StreamState, handle_command, load_stream_state
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.cooperative_threads import run_cooperatively
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.workers import claimer, lease_reaper
from jobledger.workers.claimer import ClaimQueue
from jobledger.workers.directory_removal import removal_executor
from jobledger.workers.executor import ExecutorSettings, JobExecutor, check_job_processes, check_process_start
from jobledger.workers.lease_reaper import LeaseReaper
from jobledger.workers.machine_health import WorkerHealth, check_descriptors, check_memory
from jobledger.workers.path_reservations import PathReservations
from jobledger.workers.registry import load_processors
from jobledger.workers.scratch import ScratchDirectory
from jobledger.workers.step_cache import StepCache

_log = structlog.get_logger()
_T = TypeVar("_T")
SUBSCRIBED_EVENT_TYPES: Final = claimer.CLAIMER_EVENT_TYPES | {"JobCancelRequested"}
"""The types of events that a worker has a use for."""
_CANCELS_KEPT: Final = 1000
_ORPHANS_PAUSE_SECONDS: Final = 6 * 3600.0
_DEAD_SCRATCH_PAUSE_SECONDS: Final = 60.0
_STOP_SECONDS: Final = 2.0
"""How long each last word at shutdown may take. What the database does not take by then is settled by the lease."""


class Worker:
    """Runs up to `slots` jobs at once, for as long as it holds its lease."""

    def __init__(
        self,
        db: Database,
        event_store: EventStore,
        checkpoint: Checkpoint,
        change_stream: ChangeStream,
        connection: Connection,
        *,
        settings: ExecutorSettings,
        slots: int = 5,
        slots_per_type: Mapping[str, int] | None = None,
        lease_seconds: float = 10.0,
        shutdown_grace_seconds: float = 30.0,
        scratch: ScratchDirectory | None = None,
    ) -> None:
        self._db = db
        self._log = event_store
        self._connection = connection
        self._settings = settings
        self._slots = slots
        self._lease_seconds = lease_seconds
        self._grace_seconds = shutdown_grace_seconds
        self._slots_of_type = dict(slots_per_type or {})
        self._job_types = frozenset(load_processors())
        self._running: dict[tuple[str, int], tuple[JobExecutor, asyncio.Task[None]]] = {}
        """By job and attempt: of an attempt that has ended, the files may still be removed while the next one runs."""
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._claiming: dict[str, tuple[str, asyncio.Task[None]]] = {}
        self._cancel_versions: OrderedDict[str, int] = OrderedDict()
        self._may_have_missed_cancels = False  # there may be some: the change stream was interrupted
        self._unreadable: UnreadableEvent | None = None
        self.worker_id = _new_worker_id()
        self._lease_reaper = LeaseReaper(db, event_store, checkpoint, change_stream)
        self._scratch = scratch or ScratchDirectory()
        self.health = WorkerHealth(
            [
                check_descriptors,
                self._scratch.check,
                settings.file_store.check_writable,
                check_memory,
                check_process_start,
            ],
            quick_checks=[check_descriptors, self._scratch.check_quickly],
            on_change=self._health_changed,
        )
        self._publishing: asyncio.Task[None] | None = None
        self._step_cache = StepCache(checkpoint.views, event_store)
        self._paths = PathReservations(db, event_store, checkpoint.views)
        self._claim_queue = ClaimQueue(
            event_store,
            checkpoint,
            job_types=self._job_types,
            slots=slots,
            eligible_workers=lambda: self._lease_reaper.healthy_workers,
            wake=self._wake.set,
            free_slots=self._free_slots,
            pending_claims=self._claiming.keys,
        )
        change_stream.add_listener(CallbackListener("events", self._on_event, self._resync))

    def stop(self) -> None:
        """Claim nothing more, let running jobs end within the grace time, give the rest back. `run` then returns."""
        self._stopping.set()
        self._wake.set()

    async def run(self) -> None:
        """Work until `stop` is called. A lost lease costs the running jobs; work goes on under a new one."""
        check_job_processes(self._settings)
        await self._run_startup_checks()
        watching = asyncio.create_task(self._lease_reaper.run(), name="lease-watch")
        checking = asyncio.create_task(self.health.run(), name="health")
        removing = [
            asyncio.create_task(self._remove_orphans(), name="remove-orphans"),
            asyncio.create_task(self._remove_stale_scratch(), name="remove-dead-scratch"),
        ]
        try:
            while not self._stopping.is_set():
                await self._run_with_lease(watching)
        finally:
            self._claim_queue.close()
            background = [task for task in (watching, checking, *removing, self._publishing) if task is not None]
            for task in background:
                task.cancel()
            await asyncio.gather(*background, return_exceptions=True)
            await asyncio.to_thread(self._scratch.close)

    async def _remove_orphans(self) -> None:
        """Look now and then for files in the store that killed writers left unfinished, until cancelled."""
        pause = 60.0
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))  # noqa: S311 - spreads load
            pause = _ORPHANS_PAUSE_SECONDS
            try:
                if removed := await self._settings.file_store.remove_orphans():
                    _log.info("removed unfinished files from the result store", count=removed)
            except LedgerUnavailable as error:
                _log.warning("unfinished files in the result store stay for now", error=str(error))

    async def _remove_stale_scratch(self) -> None:
        """Remove the scratch directories of killed workers, until cancelled."""
        while True:
            try:
                await run_cooperatively(self._scratch.remove_stale(), removal_executor)
            except OSError as error:
                _log.warning("scratch directories of dead workers stay for now", error=str(error))
            await asyncio.sleep(_DEAD_SCRATCH_PAUSE_SECONDS)

    async def _run_startup_checks(self) -> None:
        """The worker starts whatever is found, and claims nothing until it has passed."""
        checks = [self._scratch.prepare, self._scratch.check, self._settings.file_store.check_writable]
        if (trouble := await self.health.run_checks(checks)) is not None:
            self.health.report(trouble)

    async def _run_with_lease(self, watching: asyncio.Task[None]) -> None:
        lease = Lease(self._connection, lease_reaper.COLLECTION, self.worker_id, seconds=self._lease_seconds)
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slots": self._slots,
            "job_types": sorted(self._job_types),
            "started_at": datetime.now(UTC),
            **self.health.document_fields(),
        }
        try:
            if not await self._run_unless_stopped(lease.acquire(facts)):
                return
        except LedgerUnavailable as error:
            _log.warning("no lease yet", error=str(error))
            await self._run_unless_stopped(asyncio.sleep(1))
            return
        self._claim_queue.worker_id = self._lease_reaper.worker_id = self.worker_id
        self._lease_reaper.lease = lease
        self._wake.set()
        claiming = asyncio.create_task(self._claim_until_stopped(), name="claim")
        lost = asyncio.create_task(lease.wait_lost())
        stopping: asyncio.Task[Any] = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({claiming, lost, watching, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():  # claims on their way are ended first: a cancelled one may land, and nobody run the job
                await asyncio.wait({claiming, lost}, timeout=_STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)
            for task in (claiming, watching):
                if task.done():
                    task.result()
            claiming.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
            if lease.is_held:
                await self._finish_within_grace(lost)
            if not lease.is_held:
                _log.error(
                    "lease lost: every running job is given up", worker_id=self.worker_id, jobs=len(self._running)
                )
        finally:
            on_their_way = [task for _, task in self._claiming.values()]
            for task in (claiming, lost, stopping, *on_their_way):
                task.cancel()
            await asyncio.gather(claiming, *on_their_way, return_exceptions=True)
            await self._abandon_all()
            await lease.release()
            self._lease_reaper.worker_id, self._lease_reaper.lease = "", None
            self.worker_id = _new_worker_id()

    async def _run_unless_stopped(self, work: Coroutine[Any, Any, _T]) -> _T | None:
        """Return the result of `work`; None, and cancel it, if the worker is stopped meanwhile."""
        task = asyncio.ensure_future(work)
        stopping = asyncio.create_task(self._stopping.wait())
        try:
            await asyncio.wait({task, stopping}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            for it in (task, stopping):
                it.cancel()

    async def _abandon_all(self) -> None:
        """End what still runs without a word. Its last calls to a database that does not answer are cancelled."""
        for execution, _ in list(self._running.values()):
            execution.abandon()
        if running := [task for _, task in self._running.values()]:
            _, pending = await asyncio.wait(running, timeout=_STOP_SECONDS)
            for task in pending:
                task.cancel()
            await asyncio.gather(*pending, return_exceptions=True)

    async def _finish_within_grace(self, lost: asyncio.Task[None]) -> None:
        """Wait for running jobs, then give them back; or return because the lease was lost meanwhile."""
        if not self._running:
            return
        _log.info("waiting for running jobs", jobs=len(self._running), seconds=self._grace_seconds)
        ended = asyncio.gather(*(task for _, task in self._running.values()), return_exceptions=True)
        either: set[asyncio.Future[Any]] = {ended, lost}
        await asyncio.wait(either, timeout=self._grace_seconds, return_when=asyncio.FIRST_COMPLETED)
        if not lost.done():
            for execution, _ in list(self._running.values()):
                execution.release()
            # Where the database does not answer they are not given back, but taken, when our lease has run out.
            await asyncio.wait(either, timeout=_STOP_SECONDS, return_when=asyncio.FIRST_COMPLETED)

    # Waking up ----------------------------------------------------------------------------------------------------

    def _free_slots(self, job_type: str) -> int:
        """Return how many more jobs of a type may be run now."""
        free = self._slots - len(self._running) - len(self._claiming)
        if (most := self._slots_of_type.get(job_type)) is None:
            return free
        there = [execution.job_type for execution, _ in self._running.values()]
        there += [of_type for of_type, _ in self._claiming.values()]
        return min(free, most - there.count(job_type))

    async def _resync(self, session: AsyncClientSession) -> None:
        """Changes may have been missed: look at the queue, and whether a running job is to be cancelled."""
        self._may_have_missed_cancels = True
        self._claim_queue.resync(await self._log.head_position(session))

    def _on_event(self, change: Mapping[str, Any]) -> None:
        if change["operationType"] != "insert":
            return
        document = change["fullDocument"]
        if document["type"] != "JobCancelRequested":
            self._claim_queue.handle_event(document)
            return
        for (job_id, _), (execution, _) in list(self._running.items()):
            if job_id == document["stream"]:
                execution.cancel()
        # Perhaps its claim, which must have come before, is not yet on our own books.
        self._cancel_versions[document["stream"]] = document["version"]
        if len(self._cancel_versions) > _CANCELS_KEPT:
            self._cancel_versions.popitem(last=False)

    # Health -------------------------------------------------------------------------------------------------------

    def _health_changed(self) -> None:
        """Wake the claim loop, and tell the other workers, so that none waits for this one to claim a job."""
        self._wake.set()
        if self._publishing is None or self._publishing.done():
            self._publishing = asyncio.create_task(self._publish_health(), name="publish-health")

    async def _publish_health(self) -> None:
        """Write into the heartbeat document whether this worker is healthy, until that is what it says.

        Before there is a lease there is no document. It may then be created with facts that are out of date.
        """
        published: Document | None = None
        while published != (facts := self.health.document_fields()):
            with suppress(LedgerUnavailable), translate_errors("recording a worker's health"):
                found = await self._db[lease_reaper.COLLECTION].update_one({"_id": self.worker_id}, {"$set": facts})
                if found.matched_count:
                    published = facts
                    continue
            await asyncio.sleep(1)

    # Claiming -----------------------------------------------------------------------------------------------------

    async def _claim_until_stopped(self) -> None:
        """Claim whenever there is something to claim. Claims on their way at the stop are brought to their end.

        Cancelled, they would be made all the same, and nobody would run the jobs.
        """
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
                _log.warning("claiming interrupted", error=str(error))
                await asyncio.sleep(1)
                self._wake.set()
        if self._claiming:
            await asyncio.wait([task for _, task in self._claiming.values()])

    async def _claim_available(self) -> None:
        while not self._stopping.is_set():
            await self.health.run_quick_checks()
            if not self.health.can_claim() or not (found := await self._claim_queue.take_candidates()):
                return
            for job_id, known, job_type, _ in found:
                task = asyncio.create_task(self._claim(job_id, known), name=f"claim-{job_id}")
                self._claiming[job_id] = job_type, task
                task.add_done_callback(partial(self._on_claim_done, job_id))

    def _on_claim_done(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._claiming.pop(job_id, None)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("fault while claiming a job", job_id=job_id, error=repr(error))
            if isinstance(error, UnreadableEvent):
                self._stop_with_error(error)

    async def _load_missed_cancels(self) -> None:
        self._may_have_missed_cancels = False
        try:
            for (job_id, _), (execution, _) in list(self._running.items()):
                try:
                    known = await load_stream_state(self._log, job_id)
                except UnreadableEvent:  # its next word will find out, and then this process has to end
                    continue
                if isinstance(known.state, Job) and known.state.cancel_request is not None:
                    execution.cancel()
        except LedgerUnavailable:
            self._may_have_missed_cancels = True
            raise

    async def _claim(self, job_id: str, known: StreamState) -> None:
        """Claim a job by appending, and start it if we won."""
        try:
            handled = await self._append_claim(job_id, known)
        except NotDue:
            self._claim_queue.handle_not_due()
            return
        except CommandRejected:
            with suppress(LedgerUnavailable):  # then it is tried once more
                await self._claim_queue.handle_rejection(job_id)
            return
        except UnreadableEvent as error:
            _log.error("job left to workers of a later version", job_id=job_id, error=str(error))
            self._claim_queue.skip(job_id)
            return
        self._claim_queue.mark_claimed(job_id, handled.stream_state.head.position)
        execution = JobExecutor(
            self._log,
            handled.stream_state,
            job_id=job_id,
            worker_id=self.worker_id,
            settings=self._settings,
            step_cache=self._step_cache,
            scratch=self._scratch,
            health=self.health,
            path_reservations=self._paths,
        )
        task = asyncio.create_task(execution.run(), name=f"job-{job_id}")
        key = job_id, execution.attempt
        self._running[key] = (execution, task)
        if self._cancel_versions.pop(job_id, 0) > handled.stream_state.head.version:
            execution.cancel()
        task.add_done_callback(lambda ended: self._on_job_done(key, ended))

    async def _append_claim(self, job_id: str, known: StreamState) -> CommandResult:
        """Append a claim, and do not rest before it is known whether it landed: one that nobody runs would hang."""
        command = ClaimJob(self.worker_id, self._log.clock.estimate())
        while True:
            try:
                return await handle_command(
                    self._log, job_id, command, meta=EventMetadata(f"worker:{self.worker_id}"), stream_state=known
                )
            except LedgerBusy as error:
                _log.warning("claim put off", job_id=job_id, error=str(error))
                await asyncio.sleep(1)
            except LedgerUnavailable as error:
                _log.warning("claim in doubt", job_id=job_id, error=str(error))
                if (landed := await self._find_landed_claim(job_id)) is not None:
                    return landed

    async def _find_landed_claim(self, job_id: str) -> CommandResult | None:
        """Return the stream if the job is ours: we do not run it yet, and no worker's id is used twice."""
        while True:
            await asyncio.sleep(1)
            try:
                known = await load_stream_state(self._log, job_id)
            except LedgerUnavailable as error:
                _log.warning("claim still in doubt", job_id=job_id, error=str(error))
                continue
            except UnreadableEvent as error:
                self._stop_with_error(error)
                raise
            job = known.state
            ours = isinstance(job, Job) and job.status == "processing" and job.worker_id == self.worker_id
            return CommandResult([], known) if ours else None

    def _on_job_done(self, key: tuple[str, int], task: asyncio.Task[None]) -> None:
        self._running.pop(key, None)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("fault while ending a job", job_id=key[0], error=repr(error))
            if isinstance(error, UnreadableEvent):
                self._stop_with_error(error)

    def _stop_with_error(self, error: UnreadableEvent) -> None:
        """End: of a job that may be ours we can say nothing any more, and under our living lease nobody else may."""
        self._unreadable = error
        self._wake.set()


def _new_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
