"""Claim jobs for a worker by appending `JobClaimed` events, and start the jobs that were claimed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial

import structlog

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.errors import CommandRejected, LedgerBusy, LedgerUnavailable, NotDue, UnreadableEvent
from jobledger.ledger.domain.events import EventMetadata
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import CommandResult, StreamState, handle_command, load_stream_state
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.claims.claim_queue import ClaimQueue

_log = structlog.get_logger()


class Claimer:
    """Claims jobs for one worker.

    Args:
        start_job: Called with the ID of a claimed job and the state of its stream.
        on_unreadable: Called when a newer version of Jobledger wrote to the stream of a job that may be ours.
    """

    def __init__(
        self,
        event_store: EventStore,
        queue: ClaimQueue,
        *,
        start_job: Callable[[str, StreamState], None],
        on_unreadable: Callable[[UnreadableEvent], None],
    ) -> None:
        self._event_store = event_store
        self._queue = queue
        self._start_job = start_job
        self._on_unreadable = on_unreadable
        self._tasks: set[asyncio.Task[None]] = set()

    async def start_claims(self) -> bool:
        """Start claims for as many jobs as slots are free. Return whether there were any candidates.

        Raises:
            LedgerUnavailable: The database failed.
        """
        candidates = await self._queue.take_candidates()
        for job_id, stream_state, job_type, _ in candidates:
            self._queue.pending_claims[job_id] = job_type
            task = asyncio.create_task(self._claim(job_id, stream_state), name=f"claim-{job_id}")
            self._tasks.add(task)
            task.add_done_callback(partial(self._on_claim_done, job_id))
        return bool(candidates)

    async def wait_pending(self) -> None:
        """Wait until all pending claims are done."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel_pending(self) -> None:
        """Cancel all pending claims."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_claim_done(self, job_id: str, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._queue.pending_claims.pop(job_id, None)
        self._queue.wake()
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("unexpected error while claiming a job", job_id=job_id, error=repr(error))
            if isinstance(error, UnreadableEvent):
                self._on_unreadable(error)

    async def _claim(self, job_id: str, stream_state: StreamState) -> None:
        """Claim a job by appending an event. Start the job if the append succeeds."""
        try:
            result = await self._append_claim(job_id, stream_state)
        except NotDue:
            self._queue.handle_not_due()
            return
        except CommandRejected:
            with suppress(LedgerUnavailable):  # in this case, the claim is retried once more
                await self._queue.handle_rejection(job_id)
            return
        except UnreadableEvent as error:
            _log.error("cannot claim a job: a newer version of Jobledger wrote to it", job_id=job_id, error=str(error))
            self._queue.skip(job_id)
            return
        self._queue.mark_claimed(job_id, result.stream_state.head.position)
        self._start_job(job_id, result.stream_state)

    async def _append_claim(self, job_id: str, stream_state: StreamState) -> CommandResult:
        """Append a claim. Return only when it is certain whether it was written: a claimed job must not hang."""
        command = ClaimJob(self._queue.worker_id, self._event_store.clock.estimate())
        metadata = EventMetadata(f"worker:{self._queue.worker_id}")
        while True:
            try:
                return await handle_command(
                    self._event_store, job_id, command, meta=metadata, stream_state=stream_state
                )
            except LedgerBusy as error:
                _log.warning("cannot claim a job yet", job_id=job_id, error=str(error))
                await asyncio.sleep(1)
            except LedgerUnavailable as error:
                _log.warning("outcome of a claim unknown", job_id=job_id, error=str(error))
                if (result := await self._find_claim(job_id)) is not None:
                    return result

    async def _find_claim(self, job_id: str) -> CommandResult | None:
        """Return the stream if the claim was written; None if not.

        If the job is ours, the claim is this one: the job does not run yet, and worker IDs are never reused.
        """
        while True:
            await asyncio.sleep(1)
            try:
                stream_state = await load_stream_state(self._event_store, job_id)
            except LedgerUnavailable as error:
                _log.warning("outcome of a claim still unknown", job_id=job_id, error=str(error))
                continue
            except UnreadableEvent as error:
                self._on_unreadable(error)
                raise
            job = stream_state.aggregate
            is_ours = isinstance(job, Job) and job.status == "processing" and job.worker_id == self._queue.worker_id
            return CommandResult([], stream_state) if is_ours else None
