"""Run the inline jobs of one claim, many of them in one task, and complete those that end without waiting together.

A job that waits for anything continues in a task of its own (`child/containment.py`). Recording the others with one
append takes a fraction of the time that an append for each of them takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing
from functools import partial
from typing import Any, Final, NamedTuple

import structlog

from jobledger.ledger.domain.commands import ReportEvent
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import EventMetadata
from jobledger.ledger.store.command_handler import CommandRequest, CommandResult, handle_commands
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.attempts.executor import JobExecutor
from jobledger.workers.child.containment import ContainedWork, run_until_waiting
from jobledger.workers.child.messages import AttemptCompleted, AttemptFailed

_log = structlog.get_logger()
_MAX_DELAY_SECONDS: Final = 0.02
"""How long the completion of a job may wait for that of others."""
_CLAIM_ITERATIONS: Final = 2
"""Iterations of the event loop in which the worker claims the next jobs, so that one append writes both."""
RunJobs = Callable[[Sequence[JobExecutor], Coroutine[Any, Any, None]], None]
"""Runs a coroutine in a task. Until it is done, the jobs are running."""


class _Completed(NamedTuple):
    executor: JobExecutor
    outcome: AttemptCompleted
    command: ReportEvent


class InlineBatch:
    """Inline jobs that were claimed together.

    Args:
        run_jobs: Starts the rest of some of the jobs. They do not belong to the batch any longer.
        free_slots: Called when the work of some of the jobs is done, before it is recorded.
    """

    def __init__(
        self,
        event_store: EventStore,
        executors: Sequence[JobExecutor],
        run_jobs: RunJobs,
        free_slots: Callable[[Sequence[JobExecutor]], None],
    ) -> None:
        self._event_store = event_store
        self._executors = executors
        self._run_jobs = run_jobs
        self._free_slots = free_slots
        self._metadata = EventMetadata(f"worker:{executors[0].worker_id}")
        self._completed: list[_Completed] = []
        """Jobs whose completion has not been recorded."""
        self._completed_at = 0.0
        """When the first of them was completed, on the event loop's clock."""

    async def run(self) -> None:
        """Start all jobs, and complete those that belong to the batch in the end."""
        await run_until_waiting(self._start_jobs())
        await self._complete_together(self._completed)

    def _start_jobs(self) -> Iterator[ContainedWork]:
        for executor in self._executors:
            work = executor.start_inline(partial(self._on_end, executor), partial(self._on_wait, executor))
            if work is not None:
                yield work
            else:
                self._run_jobs([executor], executor.run())

    def _on_wait(self, executor: JobExecutor, work: asyncio.Task[Any]) -> None:
        executor.continue_inline(work)
        self._run_jobs([executor], executor.run())
        self._complete_overdue()

    def _on_end(
        self, executor: JobExecutor, outcome: AttemptCompleted | AttemptFailed | None, error: BaseException | None
    ) -> None:
        if isinstance(outcome, AttemptCompleted) and (command := executor.build_completion(outcome)) is not None:
            if not self._completed:
                self._completed_at = asyncio.get_running_loop().time()
            self._completed.append(_Completed(executor, outcome, command))
        else:
            executor.end_inline(outcome, error)
            self._run_jobs([executor], executor.run())
        self._complete_overdue()

    def _complete_overdue(self) -> None:
        """Complete jobs that have waited for others of the batch for too long."""
        if self._completed and asyncio.get_running_loop().time() - self._completed_at > _MAX_DELAY_SECONDS:
            completed, self._completed = self._completed, []
            self._run_jobs([job.executor for job in completed], self._complete_together(completed))

    async def _complete_together(self, completed: Sequence[_Completed]) -> None:
        if not completed:
            return
        self._free_slots([job.executor for job in completed])
        for _ in range(_CLAIM_ITERATIONS):
            await asyncio.sleep(0)
        jobs = [job for job in completed if self._can_complete(job)]
        requests = [CommandRequest(job.executor.job_id, job.command, job.executor.begin_recording()) for job in jobs]
        open_jobs = dict(enumerate(jobs))
        try:
            async with aclosing(handle_commands(self._event_store, requests, meta=self._metadata)) as handled:
                async for outcomes in handled:
                    for index, outcome in outcomes:
                        self._finish(open_jobs.pop(index), outcome)
        except Exception as error:  # noqa: BLE001 - the jobs would hang as long as the worker keeps its lease
            _log.error("unexpected error while completing jobs", error=repr(error))
            for job in open_jobs.values():  # their events may have been written
                self._finish(job, LedgerUnavailable(f"The outcome of an append is unknown: {error!r}"))

    def _can_complete(self, job: _Completed) -> bool:
        """Return whether to complete a job with others. Otherwise, its rest is started."""
        if job.executor.is_fenced:
            return False
        if job.executor.is_idle:
            return True
        job.executor.end_inline(job.outcome, None)
        self._run_jobs([job.executor], job.executor.run())
        return False

    def _finish(self, job: _Completed, outcome: CommandResult | Exception | None) -> None:
        if isinstance(outcome, CommandResult):
            job.executor.close()
        else:
            self._run_jobs([job.executor], job.executor.complete(job.command, outcome))
