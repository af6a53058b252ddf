"""workers: the worker process. Wakes by the change stream, claims by appending, runs as many jobs as it has slots.

The stream only wakes the one claim loop. An idle worker claims a fresh job from its own event, without any query; with
a backlog, jobs are taken from the view `queue`, by priority, then age. Why no job waits for ever: its row appears
in `queue` by a change that wakes the loop *after* the row can be read, a due time sets a timer, and a slot that becomes
free wakes the loop, too.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
from collections import OrderedDict
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Final

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from ledger.changes import Changes, Reaction
from ledger.commands import ClaimJob
from ledger.errors import CommandRefused, LedgerBusy, LedgerUnavailable, UnreadableEvent
from ledger.events import Meta, Recorded
from ledger.handle import Handled, Known, handle, load
from ledger.job import Job
from ledger.lease import Lease
from ledger.log import EventLog
from ledger.mongo import Connection, Database
from projections import queue
from projections.checkpoint import Checkpoint
from workers import leases
from workers.execution import Execution, Settings, prepare_children
from workers.leases import LeaseWatch
from workers.registry import processors

_log = structlog.get_logger()
HEARD_EVENTS: Final = ("JobSubmitted", "JobClaimed", "JobCancelRequested")
"""The types of events that a worker has a use for."""
_CANDIDATES: Final = 20
_CANCELS_KEPT: Final = 1000


class Worker:
    """Runs up to `slots` jobs at once, for as long as it holds its lease."""

    def __init__(
        self,
        db: Database,
        log: EventLog,
        checkpoint: Checkpoint,
        changes: Changes,
        connection: Connection,
        *,
        settings: Settings,
        slots: int = 5,
        lease_seconds: float = 10.0,
        shutdown_grace_seconds: float = 30.0,
    ) -> None:
        self._db = db
        self._log = log
        self._connection = connection
        self._settings = settings
        self._slots = slots
        self._lease_seconds = lease_seconds
        self._grace_seconds = shutdown_grace_seconds
        self._job_types = frozenset(processors())
        self._running: dict[str, tuple[Execution, asyncio.Task[None]]] = {}
        self._wake = asyncio.Event()
        self._stopping = asyncio.Event()
        self._idle = False  # nothing was left to claim when we looked last, and slots are free
        self._fresh: dict[str, Known] = {}
        self._cancels: OrderedDict[str, int] = OrderedDict()
        self._missed_cancels = False  # there may be some: the change stream was interrupted
        self._stale: set[str] = set()
        self._touched: set[str] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._unreadable: UnreadableEvent | None = None
        self.worker_id = _new_worker_id()
        self._watch = LeaseWatch(db, log, checkpoint, changes, watcher=self.worker_id)
        changes.listen(Reaction("events", self._heard_event, self._resync))
        changes.listen(Reaction("queue", self._heard_row, self._resync))

    def stop(self) -> None:
        """Claim nothing more, let running jobs end within the grace time, give the rest back. `run` then returns."""
        self._stopping.set()
        self._wake.set()

    async def run(self) -> None:
        """Work until `stop` is called. A lost lease costs the running jobs; work goes on under a new one."""
        prepare_children()
        watching = asyncio.create_task(self._watch.run(), name="lease-watch")
        try:
            while not self._stopping.is_set():
                await self._work_under_a_lease(watching)
        finally:
            if self._timer is not None:
                self._timer.cancel()
            watching.cancel()
            await asyncio.gather(watching, return_exceptions=True)

    async def _work_under_a_lease(self, watching: asyncio.Task[None]) -> None:
        lease = Lease(self._connection, leases.COLLECTION, self.worker_id, seconds=self._lease_seconds)
        facts = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "slots": self._slots,
            "job_types": sorted(self._job_types),
            "started_at": datetime.now(UTC),
        }
        try:
            await lease.acquire(facts)
        except LedgerUnavailable as error:
            _log.warning("no lease yet", error=str(error))
            await asyncio.sleep(1)
            return
        self._wake.set()
        claiming = asyncio.create_task(self._claim_until_stopped(), name="claim")
        lost = asyncio.create_task(lease.lost())
        try:
            await asyncio.wait({claiming, lost, watching}, return_when=asyncio.FIRST_COMPLETED)
            for task in (claiming, watching):
                if task.done():
                    task.result()
            claiming.cancel()
            await asyncio.gather(claiming, return_exceptions=True)
            if lease.held:
                await self._finish_within_grace(lost)
            if not lease.held:
                _log.error(
                    "lease lost: every running job is given up", worker_id=self.worker_id, jobs=len(self._running)
                )
        finally:
            for task in (claiming, lost):
                task.cancel()
            for execution, _ in list(self._running.values()):
                execution.abandon()
            await asyncio.gather(claiming, *(task for _, task in self._running.values()), return_exceptions=True)
            await lease.release()
            self.worker_id = _new_worker_id()

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
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)

    # Waking up ----------------------------------------------------------------------------------------------------

    async def _resync(self, _session: AsyncClientSession) -> None:
        """Changes may have been missed: look at the queue, and whether a running job is to be cancelled."""
        self._stale.clear()
        self._missed_cancels = True
        self._wake.set()

    def _heard_event(self, change: Mapping[str, Any]) -> None:
        if change["operationType"] != "insert":
            return
        document = change["fullDocument"]
        match document["type"]:
            case "JobSubmitted":
                self._heard_of_fresh(document)
            case "JobClaimed":
                self._fresh.pop(document["stream"], None)
            case "JobCancelRequested":
                if (running := self._running.get(document["stream"])) is not None:
                    running[0].cancel()
                else:  # perhaps its claim, which must have come before, is not yet on our own books
                    self._cancels[document["stream"]] = document["version"]
                    if len(self._cancels) > _CANCELS_KEPT:
                        self._cancels.popitem(last=False)

    def _heard_of_fresh(self, document: Mapping[str, Any]) -> None:
        """Keep a fresh job if a slot is free and nothing waits before it; else its row in `queue` stands for it."""
        asked = document["data"]
        claimable = asked["job_type"] in self._job_types and "not_before" not in asked
        if claimable and self._idle and len(self._fresh) < self._slots - len(self._running):
            with suppress(UnreadableEvent):  # of a later version: left to workers of that version
                self._fresh[document["stream"]] = Known().after([Recorded(document)])
                self._wake.set()

    def _heard_row(self, change: Mapping[str, Any]) -> None:
        job_id = change["documentKey"]["_id"]
        self._stale.discard(job_id)
        self._touched.add(job_id)
        if change["operationType"] != "delete":
            self._wake.set()

    def _wake_at(self, due: datetime | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if due is not None:
            seconds = max(0.0, (due - datetime.now(UTC)).total_seconds())
            self._timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)

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
                if self._missed_cancels:
                    await self._catch_up_on_cancels()
                while not self._stopping.is_set() and len(self._running) < self._slots and await self._claim_some():
                    pass
            except (LedgerUnavailable, LedgerBusy) as error:
                _log.warning("claiming interrupted", error=str(error))
                await asyncio.sleep(1)
                self._wake.set()

    async def _catch_up_on_cancels(self) -> None:
        self._missed_cancels = False
        try:
            for job_id, (execution, _) in list(self._running.items()):
                try:
                    known = await load(self._log, job_id)
                except UnreadableEvent:  # its next word will find out, and then this process has to end
                    continue
                if isinstance(known.state, Job) and known.state.cancel is not None:
                    execution.cancel()
        except LedgerUnavailable:
            self._missed_cancels = True
            raise

    async def _claim_some(self) -> bool:
        """Try to claim as many jobs as there are free slots. False when there is nothing left to try."""
        free = self._slots - len(self._running)
        self._touched.clear()
        if self._fresh:
            fresh = list(self._fresh.items())[:free]
            self._fresh.clear()
            await asyncio.gather(*(self._claim(job_id, known) for job_id, known in fresh))
            return True
        self._idle = False
        now = datetime.now(UTC)
        # Rows that proved stale are left out, so that they cannot hide the fresh ones behind them.
        candidates = await queue.candidates(
            self._db,
            job_types=self._job_types,
            without=self._stale | self._running.keys(),
            now=now,
            limit=max(free, _CANDIDATES),
        )
        if not candidates:
            self._idle = True
            self._wake_at(await queue.next_due(self._db, now=now))
            return False
        await asyncio.gather(*(self._claim(job_id, None) for job_id in candidates[:free]))
        return True

    async def _claim(self, job_id: str, known: Known | None) -> None:
        """Claim a job by appending, and start it if we won."""
        try:
            handled = await self._append_claim(job_id, known or await load(self._log, job_id))
        except UnreadableEvent as error:
            _log.error("job left to workers of a later version", job_id=job_id, error=str(error))
            self._stale.add(job_id)
            return
        except CommandRefused:
            # Another one was first, and the row in `queue` is only not gone yet. Unless it was written anew meanwhile.
            if job_id not in self._touched:
                self._stale.add(job_id)
            return
        execution = Execution(
            self._log, handled.known, job_id=job_id, worker_id=self.worker_id, settings=self._settings
        )
        task = asyncio.create_task(execution.run(), name=f"job-{job_id}")
        self._running[job_id] = (execution, task)
        if self._cancels.pop(job_id, 0) > handled.known.head.version:
            execution.cancel()
        task.add_done_callback(lambda ended: self._ended(job_id, ended))

    async def _append_claim(self, job_id: str, known: Known) -> Handled:
        """Append a claim, and do not rest before it is known whether it landed: one that nobody runs would hang."""
        command = ClaimJob(self.worker_id, datetime.now(UTC))
        while True:
            try:
                return await handle(self._log, job_id, command, meta=Meta(f"worker:{self.worker_id}"), known=known)
            except LedgerUnavailable as error:
                _log.warning("claim in doubt", job_id=job_id, error=str(error))
                if (landed := await self._landed(job_id)) is not None:
                    return landed

    async def _landed(self, job_id: str) -> Handled | None:
        """Return the stream if the job is ours: we do not run it yet, and no worker's id is used twice."""
        while True:
            await asyncio.sleep(1)
            try:
                known = await load(self._log, job_id)
            except LedgerUnavailable as error:
                _log.warning("claim still in doubt", job_id=job_id, error=str(error))
                continue
            except UnreadableEvent as error:
                self._end_for(error)
                raise
            job = known.state
            ours = isinstance(job, Job) and job.status == "processing" and job.worker_id == self.worker_id
            return Handled([], known) if ours else None

    def _ended(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._running.pop(job_id, None)
        self._wake.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("fault while ending a job", job_id=job_id, error=repr(error))
            if isinstance(error, UnreadableEvent):
                self._end_for(error)

    def _end_for(self, error: UnreadableEvent) -> None:
        """End: of a job that may be ours we can say nothing any more, and under our living lease nobody else may."""
        self._unreadable = error
        self._wake.set()


def _new_worker_id() -> str:
    return f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
