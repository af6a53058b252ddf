"""Record how an attempt ended: the job completed, failed, was cancelled, or is released for another worker."""

from __future__ import annotations

from collections.abc import Coroutine
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal
from urllib.parse import quote

import structlog
from pydantic import ValidationError

from jobledger.ledger.domain.commands import ConfirmCancel, FailAttempt, ReleaseJob, ReportEvent
from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import Asset, ErrorInfo, JobCompleted, JobResults, ResultFile, ResultMetadata
from jobledger.ledger.domain.job import MAX_CONSECUTIVE_MACHINE_FAILURES
from jobledger.workers.attempts.attempt_writer import AttemptFenced, AttemptWriter
from jobledger.workers.attempts.dependencies import AttemptDependencies
from jobledger.workers.attempts.message_handler import MessageHandler
from jobledger.workers.child.messages import AttemptCompleted, AttemptFailed
from jobledger.workers.machine.health import MachineFailure
from jobledger.workers.processor import ProcessorError, Results, SavedFile
from jobledger.workers.registry import get_processor, get_retry
from jobledger.workers.results.conversion import format_validation_error, to_text
from jobledger.workers.retry import Retry

_log = structlog.get_logger()
_FILES_URL: Final = "/api/events/files/"
StopReason = Literal["cancel", "timeout", "release", "fence"]
Outcome = AttemptCompleted | AttemptFailed | MachineFailure
"""How the work of an attempt ended. A `MachineFailure` was caught: the job is released, and the attempt not counted."""


def convert_worker_fault(error: BaseException, job_id: str) -> AttemptFailed:
    """Convert an unexpected error of the worker to the failure of the attempt, and log it."""
    _log.error("worker failed while running a job, the attempt fails", job_id=job_id, exc_info=error)
    text = f"The worker failed while running the job: {type(error).__name__}: {to_text(error, 1000)}"
    return AttemptFailed("WORKER_FAULT", text, transient=True)


class OutcomeRecorder:
    """Chooses the last event of one attempt according to its outcome and the retry policy, and appends it."""

    def __init__(
        self, dependencies: AttemptDependencies, writer: AttemptWriter, message_handler: MessageHandler
    ) -> None:
        self._dependencies = dependencies
        self._writer = writer
        self._job = writer.job
        self._attempt_key = writer.worker_id, writer.attempt
        """Identifies the attempt in commands."""
        self._message_handler = message_handler

    async def record(self, outcome: Outcome | None, stop_reason: StopReason | None) -> None:
        """Record the outcome. If that fails unexpectedly, record that failure: the job must not hang under a lease.

        Args:
            outcome: How the work ended; None if it was stopped.
            stop_reason: Why it was stopped; None if the processor cancelled itself.

        Raises:
            AttemptFenced: Another worker has the job.
            UnreadableEvent: An event of the job's stream is damaged, or a newer version of Jobledger wrote it.
        """
        await self._fail_if_impossible(self._record(outcome, stop_reason))

    async def complete(self, command: ReportEvent, previous_error: Exception | None) -> None:
        """Append a command of `build_completion` after it was tried with an error. Otherwise as `record`."""
        await self._fail_if_impossible(self._writer.append_last(command, previous_error))

    async def _fail_if_impossible(self, recording: Coroutine[Any, Any, None]) -> None:
        try:
            await recording
        except UnreadableEvent:
            raise
        except Exception as error:  # noqa: BLE001 - the job would hang as long as the worker keeps its lease
            await self._fail(convert_worker_fault(error, self._writer.job_id))

    async def _record(self, outcome: Outcome | None, stop_reason: StopReason | None) -> None:
        match outcome:
            case AttemptCompleted():
                await self._complete(outcome)
            case AttemptFailed():
                await self._fail(outcome)
            case MachineFailure():
                await self._release_for_machine_failure(outcome)
            case None if stop_reason == "cancel":
                await self._writer.append_last(ConfirmCancel(*self._attempt_key))
            case None if stop_reason == "release":
                await self._writer.append_last(ReleaseJob(*self._attempt_key, "the worker is shutting down"))
            case None if stop_reason == "timeout":
                message = f"The job took longer than its time limit of {self._job.spec.timeout_s:g} seconds."
                await self._fail(AttemptFailed("TIMEOUT", message, transient=True))
            case None if stop_reason is None:
                await self._fail(
                    AttemptFailed("PROCESSOR_FAULT", "The processor cancelled its own task.", transient=True)
                )
            case None:
                raise AttemptFenced

    def build_completion(self, completed: AttemptCompleted) -> ReportEvent | None:
        """Return the command that completes the job. None: `record` must check results, files or warnings."""
        try:
            results = Results.model_validate(completed.results)
            if results.markdown is not None or results.assets or completed.warnings:
                return None
            return self._build_completion(_build_job_results(results, completed.warnings, completed.duration_s))
        except ValidationError:
            return None

    def _build_completion(self, results: JobResults) -> ReportEvent:
        return ReportEvent(self._writer.worker_id, JobCompleted(attempt=self._writer.attempt, results=results))

    async def _complete(self, completed: AttemptCompleted) -> None:
        try:
            results = await self._message_handler.check_results(Results.model_validate(completed.results))
            job_results = _build_job_results(results, completed.warnings, completed.duration_s)
        except ValidationError as error:
            message = f"The results are invalid: {format_validation_error(error, 'results')}"
            await self._fail(AttemptFailed("INVALID_RESULT", message))
            return
        except ProcessorError as error:
            await self._fail(AttemptFailed(error.code, error.message, details=error.details))
            return
        await self._writer.append_last(self._build_completion(job_results))

    async def _fail(self, failed: AttemptFailed) -> None:
        retry_at, retry = None, self._get_retry()
        if failed.transient and retry is not None:
            delay = self._choose_retry_delay(failed, retry)
            retry_at = await self._dependencies.event_store.read_server_time() + delay
        details = {**failed.details, "retryable": retry_at is not None}
        failure = ErrorInfo(code=to_text(failed.code, 100), message=to_text(failed.message), details=details)
        await self._writer.append_last(FailAttempt(*self._attempt_key, failure, retry_at))

    async def _release_for_machine_failure(self, failure: MachineFailure) -> None:
        """Release the job without counting the attempt, because this machine cannot run it.

        After `MAX_CONSECUTIVE_MACHINE_FAILURES` in a row, the job itself is the likely cause, and the attempt fails.
        """
        self._dependencies.health.report(failure)
        failures = self._job.consecutive_machine_failures
        if failures >= MAX_CONSECUTIVE_MACHINE_FAILURES:
            message = f"Running the job led to {failures + 1} machine failures in a row. Last failure: {failure}"
            await self._fail(AttemptFailed("MACHINE_FAILURE", message, transient=True))
        else:
            reason = f"the worker's machine cannot run it: {failure}"
            await self._writer.append_last(ReleaseJob(*self._attempt_key, reason, is_machine_failure=True))

    def _get_retry(self) -> Retry | None:
        """Return the retry policy of the job type. A worker whose job type became unusable uses the default."""
        try:
            return get_retry(get_processor(self._job.spec.job_type))
        except LookupError:
            return Retry()

    def _choose_retry_delay(self, failed: AttemptFailed, retry: Retry) -> timedelta:
        """Return the time until the next attempt, after the time that the other side requested (`retry_after`)."""
        settings, requested = self._dependencies.settings, failed.details.get("retry_after")
        seconds = retry.choose_delay(
            self._job.counted_attempts,
            base_seconds=settings.retry_base_seconds,
            max_seconds=settings.retry_max_seconds,
            requested_seconds=requested if isinstance(requested, int | float) else 0.0,
        )
        return timedelta(seconds=seconds)


def _build_job_results(results: Results, warnings: list[str], duration_s: float) -> JobResults:
    """Convert a processor's results to the stored format, with the paths and URLs under which the API serves files."""
    files = [results.markdown, *results.assets] if results.markdown else list(results.assets)
    return JobResults(
        output=results.output,
        markdown_file=f"/events/{results.markdown.path}" if results.markdown else None,
        markdown_url=_build_file_url(results.markdown) if results.markdown else None,
        assets=[
            Asset(type=file.media_type.partition("/")[0], path=f"/events/{file.path}", url=_build_file_url(file))
            for file in results.assets
        ],
        files=[ResultFile(**file.model_dump()) for file in files],
        metadata=ResultMetadata(
            **{
                **results.metadata,
                "processed_at": datetime.now(UTC),
                "duration": duration_s,
                "tokens_used": results.tokens_used,
                "warnings": warnings,
            }
        ),
    )


def _build_file_url(file: SavedFile) -> str:
    return _FILES_URL + quote(file.path, safe="/&,+;=@!$~")
