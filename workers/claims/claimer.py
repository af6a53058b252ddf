"""Claim jobs for a worker by appending `JobClaimed` events, and start the jobs that were claimed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import replace
from functools import partial
from typing import Final, NamedTuple

import structlog

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.errors import (
    CommandRejected,
    LedgerBusy,
    LedgerUnavailable,
    NotDue,
    UnreadableEvent,
)
from jobledger.ledger.domain.events import EventMetadata
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import (
    CommandRequest,
    CommandResult,
    StreamState,
    handle_command_with_retries,
    handle_commands,
)
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.claims.claim_queue import ClaimQueue

_log = structlog.get_logger()
_RETRY_SECONDS: Final = 1.0


class ClaimedJob(NamedTuple):
    """A job that this worker has claimed, with the state of its stream after the claim."""

    job_id: str
    stream_state: StreamState


class Claimer:
    """Claims jobs for one worker.

    Args:
        start_jobs: Called with claimed jobs.
        on_unreadable: Called when a job that this worker may have claimed has an unreadable event.
    """

    def __init__(
        self,
        event_store: EventStore,
        queue: ClaimQueue,
        *,
        start_jobs: Callable[[Sequence[ClaimedJob]], None],
        on_unreadable: Callable[[UnreadableEvent], None],
    ) -> None:
        self._event_store = event_store
        self._queue = queue
        self._start_jobs = start_jobs
        self._on_unreadable = on_unreadable
        self._tasks: set[asyncio.Task[None]] = set()
        self._settled = asyncio.Event()

    async def wait_until_settled(self, job_id: str) -> None:
        """Wait until the worker is not claiming a job."""
        while job_id in self._queue.pending_claims:
            self._settled.clear()
            await self._settled.wait()

    async def start_claims(self) -> bool:
        """Start claims for as many jobs as slots are free. Return whether there were any candidates.

        Raises:
            LedgerUnavailable: The database failed.
        """
        if not (candidates := await self._queue.take_candidates()):
            return False
        group = {
            candidate.job_id: CommandRequest(
                candidate.job_id, self._queue.build_claim(candidate), candidate.stream_state
            )
            for candidate in candidates
        }
        self._queue.pending_claims.update((candidate.job_id, candidate.job_type) for candidate in candidates)
        task = asyncio.create_task(self._claim_together(group), name=f"claim-{candidates[0].job_id}")
        self._tasks.add(task)
        task.add_done_callback(partial(self._on_task_done, group))
        return True

    async def wait_pending(self) -> None:
        """Wait until all pending claims are done."""
        if self._tasks:
            await asyncio.wait(self._tasks)

    async def cancel_pending(self) -> None:
        """Cancel all pending claims."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _on_task_done(self, group: dict[str, CommandRequest], task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("unexpected error while claiming jobs", job_ids=list(group), error=repr(error))
        for job_id in list(group):
            self._settle(group, job_id)
        self._queue.wake()

    def _settle(self, group: dict[str, CommandRequest], job_id: str) -> None:
        """Note that the claim of a job is no longer pending. Later, the job may have another pending claim."""
        if group.pop(job_id, None) is not None:
            self._queue.pending_claims.pop(job_id, None)
            self._settled.set()

    async def _claim_together(self, group: dict[str, CommandRequest]) -> None:
        """Claim jobs with one write. Claims that do not succeed at once continue one by one.

        Args:
            group: The claims by job ID. A claim is removed when it is no longer pending.
        """
        requests = list(group.values())
        metadata = EventMetadata(f"worker:{self._queue.worker_id}")
        open_job_ids = set(group)
        async with asyncio.TaskGroup() as separate:

            def continue_separately(job_id: str, previous_error: Exception | None) -> None:
                separate.create_task(self._claim_separately(group, job_id, previous_error), name=f"claim-{job_id}")

            try:
                async with aclosing(handle_commands(self._event_store, requests, meta=metadata)) as handled:
                    async for outcomes in handled:
                        claimed: list[ClaimedJob] = []
                        for index, outcome in outcomes:
                            job_id = requests[index].stream
                            open_job_ids.discard(job_id)
                            if isinstance(outcome, CommandResult):
                                self._settle(group, job_id)
                                self._queue.mark_claimed(job_id, outcome.stream_state.head.position)
                                claimed.append(ClaimedJob(job_id, outcome.stream_state))
                            else:
                                continue_separately(job_id, outcome)
                        self._start_jobs(claimed)
            except Exception as error:  # noqa: BLE001 - claimed jobs would hang as long as the worker keeps its lease
                _log.error("unexpected error while claiming jobs", job_ids=sorted(open_job_ids), error=repr(error))
                for job_id in open_job_ids:  # their events may have been written
                    continue_separately(job_id, LedgerUnavailable(f"The outcome of an append is unknown: {error!r}"))

    async def _claim_separately(
        self, group: dict[str, CommandRequest], job_id: str, previous_error: Exception | None
    ) -> None:
        try:
            await self._claim(group[job_id], previous_error)
        except Exception as error:  # noqa: BLE001 - it must not end the other claims
            _log.error("unexpected error while claiming a job", job_id=job_id, error=repr(error))
            if isinstance(error, UnreadableEvent):
                self._on_unreadable(error)
        finally:
            self._settle(group, job_id)
            self._queue.wake()

    async def _claim(self, request: CommandRequest, previous_error: Exception | None) -> None:
        """Claim a job by appending an event. Start the job if the append succeeds.

        It ends only when it is certain whether the claim was written: a claimed job must not hang.
        """
        job_id, command = request.stream, request.command
        assert isinstance(command, ClaimJob)  # noqa: S101 - only claims are in a group
        may_be_ours = False

        def on_retry(error: LedgerUnavailable | LedgerBusy) -> None:
            nonlocal may_be_ours
            may_be_ours = may_be_ours or isinstance(error, LedgerUnavailable)
            _log.warning("cannot claim a job yet", job_id=job_id, error=str(error))

        worker_id = command.worker_id
        try:
            result = await handle_command_with_retries(
                self._event_store,
                job_id,
                replace(command, now=self._event_store.clock.estimate()),
                meta=EventMetadata(f"worker:{worker_id}"),
                stream_state=request.stream_state,
                retry_seconds=_RETRY_SECONDS,
                on_retry=on_retry,
                previous_error=previous_error,
            )
        except NotDue:
            self._queue.handle_not_due()
            return
        except CommandRejected:
            await self._handle_rejection(job_id)
            return
        except UnreadableEvent as error:
            _log.error("cannot claim a job: its stream is unreadable", job_id=job_id, error=str(error))
            self._queue.skip(job_id)
            if may_be_ours:
                self._on_unreadable(error)
            return
        job = result.stream_state.aggregate
        if not isinstance(job, Job) or job.worker_id != worker_id:  # the claim was written, and it has ended by now
            await self._handle_rejection(job_id)
            return
        self._queue.mark_claimed(job_id, result.stream_state.head.position)
        self._start_jobs([ClaimedJob(job_id, result.stream_state)])

    async def _handle_rejection(self, job_id: str) -> None:
        with suppress(LedgerUnavailable):  # in this case, the claim is retried once more
            await self._queue.handle_rejection(job_id)
