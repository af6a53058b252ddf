"""Start the jobs that were claimed for this worker when they were submitted (`projections/engine/dispatcher.py`).

The worker receives such a claim from the change stream, directly after the submission. It starts the job from these two
events, without a query.

Why a claim is started at most once: one open change stream delivers each event once, and an event at a position that
was not in the log when the stream was opened cannot have been delivered by an earlier stream. Only such events start
jobs without a query, and only if the worker is not claiming the job itself. All other claims are checked, one check at
a time for each job: the job must not be running here, and its stream, read after that, must show that the worker has
the job. Nobody else can have started this attempt: if the worker is claiming the job itself, the check waits until that
has ended, and the worker does not claim the job again before the check has ended. If a claim is checked before its
event arrives, the event starts nothing.

Why each claim is started or released: if the worker also claims the job itself, this fails, and the job is checked. If
the change stream was interrupted or paused, the views name the jobs of this worker as soon as they have reached the
head of the log, and each of them that is not running is checked. If the worker has ended, the lease reaper frees the
job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from typing import Any, Final

import structlog

from jobledger.ledger.domain.commands import ReleaseJob
from jobledger.ledger.domain.errors import CommandRejected, LedgerBusy, LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import EventMetadata, RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState, handle_command, load_stream_state
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.views import job_list
from jobledger.workers.claims.claim_queue import ClaimQueue
from jobledger.workers.claims.claimer import ClaimedJob

_log = structlog.get_logger()
_RETRY_SECONDS: Final = 1.0
_CANNOT_START: Final = "the worker for which it was claimed at its submission cannot start it now"


class DispatchedClaims:
    """Starts or releases the jobs that the API has claimed for one worker.

    Args:
        can_start: Returns whether the worker may start a job of a type now.
        is_running: Returns whether the worker runs a job, or could not record its outcome.
        wait_until_settled: Waits until the worker is not claiming a job itself.
        start_jobs: Called with claimed jobs.
        on_unreadable: Called when a job that was claimed for this worker has an unreadable event.
    """

    def __init__(
        self,
        event_store: EventStore,
        checkpoint: CheckpointFollower,
        queue: ClaimQueue,
        *,
        can_start: Callable[[str], bool],
        is_running: Callable[[str], bool],
        wait_until_settled: Callable[[str], Awaitable[None]],
        start_jobs: Callable[[Sequence[ClaimedJob]], None],
        on_unreadable: Callable[[UnreadableEvent], None],
    ) -> None:
        self._event_store = event_store
        self._checkpoint = checkpoint
        self._queue = queue
        self._can_start = can_start
        self._is_running = is_running
        self._wait_until_settled = wait_until_settled
        self._start_jobs = start_jobs
        self._on_unreadable = on_unreadable
        self._head = 0
        """The head of the log when the change stream was opened."""
        self._search: asyncio.Task[None] | None = None
        self._is_search_needed = False
        self._found_job_ids: set[str] = set()
        """The jobs that the search has found. Their events may arrive later."""
        self._checks: dict[str, asyncio.Task[None]] = {}
        queue.excluded_job_ids = self._checks.keys()

    @property
    def checked_job_ids(self) -> Collection[str]:
        """The jobs whose claims are being checked."""
        return self._checks.keys()

    def resync(self, head: int) -> None:
        """Look for claims that may have been missed. `head` is the head of the log when the stream was opened."""
        self._head = head
        self._found_job_ids.clear()  # their events have smaller positions than the new head
        self._is_search_needed = True
        if self._search is None or self._search.done():
            self._search = asyncio.create_task(self._find_missed(), name="find-missed-claims")

    def handle_claim(self, document: Mapping[str, Any], new_job: StreamState | None) -> None:
        """Handle a claim for this worker. `new_job` is the job after its submission, if the queue has it."""
        job_id = document["stream"]
        if job_id in self._checks or job_id in self._found_job_ids:
            return
        is_new = document["_id"] > self._head and job_id not in self._queue.pending_claims
        if new_job is not None and is_new:
            try:
                claimed = new_job.apply([RecordedEvent(document)])
            except UnreadableEvent as error:
                self._on_unreadable(error)
                return
            job = claimed.aggregate
            if isinstance(job, Job) and self._can_start(job.spec.job_type):
                self._start_jobs([ClaimedJob(job_id, claimed)])
                return
        self._check(job_id)

    async def cancel(self) -> None:
        """Stop all checks, because the lease has ended."""
        tasks = [*self._checks.values(), *([self._search] if self._search is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def wait_for_checks(self) -> None:
        """Wait until all claims that are known have been started or released."""
        while self._checks:
            await asyncio.wait(self._checks.values())

    async def _find_missed(self) -> None:
        """Search for missed claims, again if the change stream was opened again meanwhile.

        Each search ends, also if the change stream is opened again before the views have reached its head.
        """
        while self._is_search_needed:
            self._is_search_needed = False
            await self._checkpoint.wait_for_position(self._head)
            for job in await self._find_jobs(self._queue.worker_id):
                self._found_job_ids.add(job["_id"])
                if job["_id"] not in self._checks and not self._is_running(job["_id"]):
                    self._check(job["_id"])

    async def _find_jobs(self, worker_id: str) -> Sequence[Document]:
        while True:
            try:
                return await job_list.find_jobs_of_worker(self._checkpoint.views, worker_id)
            except Exception as error:  # noqa: BLE001 - the claims would be missed
                _log.warning("cannot look for missed claims yet", error=repr(error))
            await asyncio.sleep(_RETRY_SECONDS)

    def _check(self, job_id: str) -> None:
        task = asyncio.create_task(self._start_or_release(job_id), name=f"check-claim-{job_id}")
        self._checks[job_id] = task
        task.add_done_callback(partial(self._on_check_done, job_id))

    def _on_check_done(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._checks.pop(job_id, None)
        if not self._is_running(job_id):
            self._queue.request_query()  # its row may have been left out
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("unexpected error while checking a claim", job_id=job_id, error=repr(error))

    async def _start_or_release(self, job_id: str) -> None:
        while True:
            try:
                return await self._try_start_or_release(job_id)
            except (LedgerUnavailable, LedgerBusy) as error:
                _log.warning("cannot check a claim yet", job_id=job_id, error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
            except UnreadableEvent as error:
                return self._on_unreadable(error)

    async def _try_start_or_release(self, job_id: str) -> None:
        await self._wait_until_settled(job_id)
        if self._is_running(job_id):
            return
        worker_id = self._queue.worker_id
        stream_state = await load_stream_state(self._event_store, job_id)
        job = stream_state.aggregate
        if worker_id != self._queue.worker_id:  # the lease has ended
            return
        if not isinstance(job, Job) or (job.status, job.worker_id) != ("processing", worker_id):
            return
        if job.cancel_request is None and self._can_start(job.spec.job_type):
            self._start_jobs([ClaimedJob(job_id, stream_state)])
            return
        try:
            release = ReleaseJob(worker_id, job.attempt, reason=_CANNOT_START)
            meta = EventMetadata(f"worker:{worker_id}")
            await handle_command(self._event_store, job_id, release, meta=meta, stream_state=stream_state)
        except CommandRejected as error:
            _log.info("claim not released, the job rejects it", job_id=job_id, reason=str(error))
