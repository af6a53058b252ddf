"""Run the inline jobs of one claim, many of them in one task, and complete those that end without waiting together.

A job that waits for anything continues in a task of its own (`child/containment.py`). Recording the others with one
append takes a fraction of the time that an append for each of them takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator, Sequence
from functools import partial
from typing import Any, Final

from jobledger.ledger.domain.commands import ReportEvent
from jobledger.ledger.domain.events import EventMetadata
from jobledger.ledger.store.command_handler import CommandRequest, CommandResult, handle_commands
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.attempts.executor import JobExecutor
from jobledger.workers.child.containment import ContainedWork, run_until_waiting
from jobledger.workers.child.messages import AttemptCompleted, AttemptFailed

_MAX_DELAY_SECONDS: Final = 0.02
"""How long the completion of a job may wait for that of others."""
_CLAIM_ITERATIONS: Final = 2
"""Iterations of the event loop in which the worker claims the next jobs, so that one append writes both."""
RunJobs = Callable[[Sequence[JobExecutor], Coroutine[Any, Any, None]], None]
"""Runs a coroutine in a task. Until it is done, the jobs are running."""


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
        self._completed: list[tuple[JobExecutor, ReportEvent]] = []
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

    def _on_end(
        self, executor: JobExecutor, outcome: AttemptCompleted | AttemptFailed | None, error: BaseException | None
    ) -> None:
        if (command := executor.build_completion(outcome)) is None:
            executor.end_inline(outcome, error)
            self._run_jobs([executor], executor.run())
            return
        now = asyncio.get_running_loop().time()
        if not self._completed:
            self._completed_at = now
        self._completed.append((executor, command))
        if now - self._completed_at > _MAX_DELAY_SECONDS:
            completed, self._completed = self._completed, []
            self._run_jobs([executor for executor, _ in completed], self._complete_together(completed))

    async def _complete_together(self, completed: Sequence[tuple[JobExecutor, ReportEvent]]) -> None:
        if not completed:
            return
        self._free_slots([executor for executor, _ in completed])
        for _ in range(_CLAIM_ITERATIONS):
            await asyncio.sleep(0)
        requests = [
            CommandRequest(executor.job_id, command, executor.begin_recording()) for executor, command in completed
        ]
        results = await handle_commands(self._event_store, requests, meta=self._metadata)
        for (executor, command), result in zip(completed, results, strict=True):
            if isinstance(result, CommandResult):
                executor.close()
            else:
                self._run_jobs([executor], executor.complete(command, result))
