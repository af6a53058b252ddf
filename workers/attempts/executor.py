"""Run one claimed job, and record how its attempt ends.

An attempt has three phases:

1. Prepare. An error here is a failure of the machine.
2. Work. The processor runs in a job process or inline, and the worker handles its messages. Cancellation, the timeout,
   shutdown or a lost lease can stop the work at any time.
3. Record. A task that the processor cannot disturb records the outcome in the event store.

`workers/attempts/inline_batch.py` does these for inline jobs that end without waiting, many at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import structlog

from jobledger.ledger.domain.commands import ReportEvent
from jobledger.ledger.store.command_handler import StreamState
from jobledger.ledger.system.cooperative_threads import run_cooperatively
from jobledger.workers.attempts import process_runner
from jobledger.workers.attempts.attempt_timeout import AttemptTimeout
from jobledger.workers.attempts.attempt_writer import AttemptFenced, AttemptWriter
from jobledger.workers.attempts.dependencies import AttemptDependencies
from jobledger.workers.attempts.message_handler import MessageHandler
from jobledger.workers.attempts.outcome_recorder import Outcome, OutcomeRecorder, StopReason, convert_worker_fault
from jobledger.workers.attempts.process_runner import ProcessRunner, run_blocking
from jobledger.workers.child import log_capture
from jobledger.workers.child.attempt import Assignment, run_attempt
from jobledger.workers.child.containment import ContainedWork, Containment, outside_containment
from jobledger.workers.child.messages import AttemptCompleted, AttemptFailed, LogEntries, Message, Progress
from jobledger.workers.machine.directory_removal import removal_executor, remove_tree
from jobledger.workers.machine.health import CHECKS, MachineFailure, find_machine_failure, run_checks_until_failure
from jobledger.workers.registry import get_processor, get_processor_version

_log = structlog.get_logger()
STOP_SECONDS: Final = 1.0
"""Time in which an inline job can react to a cancellation."""
_removals: set[asyncio.Task[None]] = set()  # keeps removals of attempt directories from being garbage collected


class JobExecutor:
    """Runs a claimed job once, from its claim to the end of the attempt. Each attempt has its own executor."""

    def __init__(self, dependencies: AttemptDependencies, stream_state: StreamState, job_id: str) -> None:
        self._writer = AttemptWriter(
            dependencies.event_store, dependencies.secret_filter, stream_state, job_id, on_fenced=self.stop_fenced
        )
        self.job_id = job_id
        self.claimed_version = stream_state.head.version
        self.worker_id = self._writer.worker_id
        self.attempt = self._writer.attempt
        self._job = self._writer.job
        self.job_type = self._job.spec.job_type
        self._settings = dependencies.settings
        self._processor_settings = dependencies.processor_settings
        self._scratch = dependencies.scratch
        self._scratch_repairs = 0
        """`ScratchDirectory.repair_count` before the attempt."""
        self._timeout = AttemptTimeout(self._job.spec.timeout_s, partial(self._stop, "timeout"))
        self._message_handler = MessageHandler(dependencies, self._writer, self._timeout)
        self._outcome_recorder = OutcomeRecorder(dependencies, self._writer, self._message_handler)
        self._work: asyncio.Future[Outcome] | None = None
        self._recording: asyncio.Task[Any] | None = None
        """The task of `run()` while it records the outcome. `stop_fenced()` cancels it."""
        self._stop_reason: StopReason | None = None
        self._containment: Containment | None = None
        self._loop = asyncio.get_running_loop()

    # Stopping -----------------------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop because a user cancelled the job."""
        self._stop("cancel")

    def release(self) -> None:
        """Stop and release the job, because the worker is shutting down."""
        self._stop("release")

    def stop_fenced(self) -> None:
        """Stop and record nothing more, because another worker may have the job, or the job was deleted."""
        self._writer.is_fenced = True
        self._stop("fence")
        if self._recording is not None:
            self._recording.cancel()

    def _stop(self, reason: StopReason) -> None:
        if self._stop_reason is None or reason == "fence":
            self._stop_reason = reason
            if self._work is not None:
                self._interrupt(self._work)

    def _interrupt(self, work: asyncio.Future[Any]) -> None:
        """Cancel the work. Abandon inline work that ignores the cancellation, because it must not keep its slot.

        A job process always ends, and `ProcessRunner.run` waits for that.
        """
        if self._containment is None:
            work.cancel()
        else:
            self._containment.cancel(work)
            asyncio.get_running_loop().call_later(STOP_SECONDS, self._containment.abandon)

    # Inline jobs --------------------------------------------------------------------------------------------------

    @property
    def is_inline(self) -> bool:
        """Whether the processor runs in the worker's process."""
        return get_processor(self.job_type).isolation == "inline"

    def start_inline(
        self,
        on_end: Callable[[AttemptCompleted | AttemptFailed | None, BaseException | None], None],
        on_wait: Callable[[asyncio.Task[Any]], None],
    ) -> ContainedWork | None:
        """Return the work of an inline job, to be run by `run_until_waiting`. None: `run` can be called at once."""
        if self._stop_reason is not None:
            self.end_inline(None, None)
            return None
        try:
            # The processor need not poll for a stop: cancelling its task stops it.
            attempt = run_attempt(
                self._assign(),
                get_processor(self.job_type),
                self._handle_inline_message,
                lambda: False,
                post=self._post_inline_message,
            )
        except Exception as error:  # noqa: BLE001 - the job would hang as long as the worker keeps its lease
            self.end_inline(self._convert_fault(error), None)
            return None
        self._containment = Containment()
        return ContainedWork(attempt, self._containment, on_end, on_wait)

    def continue_inline(self, work: asyncio.Task[Any]) -> None:
        """Accept the task of an inline job that waits. Call `run` next."""
        self._timeout.start()
        self._set_work(work)

    def end_inline(self, outcome: Outcome | None, error: BaseException | None) -> None:
        """Accept the outcome of an inline job that did not wait. Call `run` next."""
        self._work = asyncio.get_running_loop().create_future()
        if error is not None:
            self._work.set_result(convert_worker_fault(error, self.job_id))
        elif outcome is not None:
            self._work.set_result(outcome)
        else:
            self._work.cancel()

    @property
    def is_fenced(self) -> bool:
        """Whether nothing more may be recorded."""
        return self._stop_reason == "fence"

    @property
    def is_idle(self) -> bool:
        """Whether an inline job that has ended left no tasks, threads, files and log entries behind."""
        return not (
            (self._containment is not None and self._containment.is_used)
            or self._assign().has_files
            or self._writer.has_entries
        )

    def build_completion(self, outcome: AttemptCompleted) -> ReportEvent | None:
        """Return the command that completes an inline job. None: `run` must record its outcome."""
        if self._stop_reason is not None or self._job.spec.webhook is not None or not self.is_idle:
            return None
        try:
            return self._outcome_recorder.build_completion(outcome)
        except Exception as error:  # noqa: BLE001 - `run` records it as the failure of this attempt
            _log.debug("completion not built", job_id=self.job_id, error=repr(error))
            return None

    def begin_recording(self) -> StreamState:
        """Note that the calling task records the outcome, and return the state of the job. `stop_fenced` cancels it."""
        self._recording = asyncio.current_task()
        return self._writer.stream_state

    # Running ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the job to its end, record the outcome, and remove its directory. An inline job has been started before.

        The outcome is recorded first, so that it is not lost while millions of files are removed. The job keeps its
        slot until the files are removed, so that files do not accumulate.

        Raises:
            UnreadableEvent: An event of the job's stream is damaged, or a newer version of Jobledger wrote it.
        """
        try:
            await self._record(self._run_and_record())
        finally:
            if (assignment := self._message_handler.assignment) is not None and assignment.has_files:
                # The removal continues if this task is cancelled or another worker owns the job.
                removal = asyncio.create_task(_remove_directory(assignment.attempt_dir), name=f"remove-{self.job_id}")
                _removals.add(removal)
                removal.add_done_callback(_removals.discard)
                if self._stop_reason != "fence":
                    await asyncio.shield(removal)
            self.close()

    async def complete(self, command: ReportEvent, previous_error: Exception | None) -> None:
        """Record the completion of an inline job after `handle_commands` could not.

        Raises:
            UnreadableEvent: As `run`.
        """
        self.begin_recording()
        await self._record(self._outcome_recorder.complete(command, previous_error))
        self.close()

    def close(self) -> None:
        """Let reference counting free the attempt. Garbage collection would interrupt a busy worker for long."""
        self._writer.on_fenced = self._timeout.on_expired = _do_nothing
        self._work = self._containment = None

    async def _run_and_record(self) -> None:
        outcome = await self._run_attempt()
        if self._stop_reason != "fence":
            self.begin_recording()
            await self._outcome_recorder.record(outcome, self._stop_reason)

    async def _record(self, recording: Coroutine[Any, Any, None]) -> None:
        try:
            await recording
        except AttemptFenced:
            _log.warning(
                "attempt fenced: another worker has the job, or it was deleted",
                job_id=self.job_id,
                attempt=self.attempt,
            )
        except asyncio.CancelledError:
            if self._stop_reason != "fence":
                raise
        finally:
            self._recording = None
            self._writer.close()

    async def _run_attempt(self) -> Outcome | None:
        """Run the processor and return the outcome; None if it was stopped. Never raises: the job would hang."""
        try:
            if self._work is None:
                self._start_process()
            outcome = await self._finish_work()
            if isinstance(outcome, AttemptFailed) and outcome.errno is not None:
                with suppress(TimeoutError):  # free the disk first, in case the job itself filled it
                    async with asyncio.timeout(process_runner.DISK_TIMEOUT_SECONDS):
                        await _remove_directory(self._assign().attempt_dir)
                outcome = await self._recheck_machine(outcome) or outcome
        except Exception as error:  # noqa: BLE001 - the job would hang as long as the worker keeps its lease
            return self._convert_fault(error)
        return outcome

    def _convert_fault(self, error: Exception) -> Outcome:
        return find_machine_failure(error, scratch_dir=self._scratch.path) or convert_worker_fault(error, self.job_id)

    def _start_process(self) -> None:
        runner = ProcessRunner(
            assignment := self._assign(),
            self._message_handler,
            self._timeout,
            memory_limit_mb=self._settings.memory_limit_mb,
            environment_variables=self._settings.pass_environment,
            create_directories=partial(self._create_directories, assignment),
        )
        self._set_work(asyncio.create_task(runner.run(), name=f"run-{self.job_id}"))

    def _set_work(self, work: asyncio.Task[Outcome]) -> None:
        self._work = work
        if self._stop_reason is not None:
            self._interrupt(work)

    async def _finish_work(self) -> Outcome | None:
        assert self._work is not None  # noqa: S101 - it was started
        try:
            await _wait_for(self._work)
            return self._get_outcome(self._work)
        finally:
            self._timeout.stop()
            if self._containment is not None:
                await self._containment.stop(STOP_SECONDS)

    def _create_directories(self, assignment: Assignment) -> None:
        self._scratch.create_directories(assignment.attempt_dir, assignment.scratch_dir, assignment.inbox_dir)
        self._scratch_repairs = self._scratch.repair_count

    async def _handle_inline_message(self, message: Message) -> Any:
        with outside_containment(), log_capture.outside_job():
            try:
                return await self._message_handler.handle(message)
            except AttemptFenced:
                self.stop_fenced()  # even if the processor catches everything
                raise

    def _post_inline_message(self, message: LogEntries | Progress) -> None:
        """Accept a report of an inline job, from any of its threads."""
        if asyncio._get_running_loop() is self._loop:
            with outside_containment(), log_capture.outside_job():
                self._message_handler.handle_report(message)
        else:
            with (
                suppress(RuntimeError),
                outside_containment(),
                log_capture.outside_job(),
            ):
                self._loop.call_soon_threadsafe(self._message_handler.handle_report, message)

    def _get_outcome(self, work: asyncio.Future[Outcome]) -> Outcome | None:
        if work.cancelled():
            return None
        try:
            outcome = work.result()
        except AttemptFenced:
            self.stop_fenced()
            return None
        # Stopped work often ends with an error caused by the stop, so only results count.
        return outcome if self._stop_reason is None or isinstance(outcome, AttemptCompleted) else None

    def _assign(self) -> Assignment:
        """Return the assignment of the attempt.

        Raises:
            MachineFailure: There is no scratch directory.
        """
        if (assignment := self._message_handler.assignment) is None:
            attempt_dir = self._scratch.new_attempt_path(self.job_id, self.attempt)
            self._scratch_repairs = self._scratch.repair_count
            assignment = self._message_handler.assignment = Assignment(
                job_id=self.job_id,
                attempt=self.attempt,
                job_type=self.job_type,
                parameters=self._job.spec.parameters,
                settings=dict(self._processor_settings.get(self.job_type, {})),
                completed_steps=dict(self._job.steps),
                can_use_shared_steps=not self._job.is_full_restart,
                can_share_steps=bool(get_processor_version(self.job_type)),
                attempt_dir=attempt_dir,
                confinement=self._settings,
            )
        return assignment

    async def _recheck_machine(self, failed: AttemptFailed) -> MachineFailure | None:
        """Return the machine failure that caused a processor's system error, if the machine still has it.

        A job that filled the disk itself is not a machine failure: its scratch directory has been removed by now.
        """
        scratch = self._scratch
        # Quick check first: the full check creates a missing directory, which would hide that it was missing.
        checks = (scratch.check_quickly, scratch.check, *CHECKS)
        failure = await run_blocking(partial(run_checks_until_failure, checks))
        if failure is not None:
            _log.warning("a job failed because of its machine", job_id=self.job_id, error=failed.message)
        elif scratch.repair_count != self._scratch_repairs:
            text = "The mode of the scratch directory was changed, perhaps by another job, and restored"
            failure = MachineFailure(text)
        return failure


def _do_nothing() -> None:
    """Replace callbacks of an attempt that has ended."""


async def _remove_directory(path: Path) -> None:
    try:
        await run_cooperatively(remove_tree(path), removal_executor)
    except Exception as error:  # noqa: BLE001 - the outcome must not get lost because of this
        _log.warning("cannot remove a job's directory", path=str(path), error=repr(error))


async def _wait_for(task: asyncio.Future[Any]) -> None:
    """Wait for a task without raising its error. Like `asyncio.wait` for one task, at a fraction of the cost."""
    done = asyncio.get_running_loop().create_future()
    task.add_done_callback(lambda _: None if done.done() else done.set_result(None))
    await done
