"""Write the events of an attempt to the event store, one command at a time. Hide secrets in them.

Progress reports and log entries are collected for `FLUSH_INTERVAL_SECONDS`, so that many of them become few events.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from jobledger.ledger.domain.commands import FailAttempt, ReportEvent, WorkerCommand
from jobledger.ledger.domain.errors import InvalidEvent, JobledgerError, NotFound
from jobledger.ledger.domain.events import (
    ErrorInfo,
    EventMetadata,
    JobAttemptFailed,
    JobFailed,
    JobLogged,
    JobProgressed,
    WorkerFenced,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import StreamState, handle_command_with_retries
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.attempts.log_buffer import LogBuffer
from jobledger.workers.attempts.secret_filter import SecretFilter
from jobledger.workers.child.messages import RawLogEntry
from jobledger.workers.results.conversion import to_text

_log = structlog.get_logger()
FLUSH_INTERVAL_SECONDS: Final = 0.5
_RETRY_SECONDS: Final = 1.0


class AttemptFenced(BaseException):
    """Another worker has the job, or the job was deleted. The attempt is over, and its commands are rejected.

    It is no `Exception`, so that an inline processor with `except Exception` does not catch it.
    """


class EventNotStorable(Exception):
    """An event cannot be stored. Nothing was written. The text contains the reason."""


class AttemptWriter:
    """Appends the events of one attempt. All parts of the executor write to the job's stream through it.

    Args:
        stream_state: The job's stream after the claim.
        on_fenced: Called when the attempt turns out to be fenced while entries or progress are written.
    """

    def __init__(
        self,
        event_store: EventStore,
        secret_filter: SecretFilter,
        stream_state: StreamState,
        job_id: str,
        on_fenced: Callable[[], None],
    ) -> None:
        job = stream_state.aggregate
        assert isinstance(job, Job)  # noqa: S101 - the state of a job's stream is a Job
        assert job.worker_id is not None  # noqa: S101 - a worker has claimed it
        self.job = job
        """The state of the job after the claim."""
        self.job_id = job_id
        self.worker_id = job.worker_id
        self.attempt = job.attempt
        self.is_fenced = False
        """Whether another worker may have the job. If so, commands are not retried."""
        self._event_store = event_store
        self._secret_filter = secret_filter
        self.stream_state = stream_state
        self._metadata = EventMetadata(f"worker:{self.worker_id}")
        self.on_fenced = on_fenced
        self._write_lock = asyncio.Lock()
        self._flush_lock = asyncio.Lock()
        self._progress: JobProgressed | None = None
        self._percent = 0.0
        self._log_buffer = LogBuffer(job.log_bytes)
        self._flusher: asyncio.Task[None] | None = None
        self._flushes: set[asyncio.Task[None]] = set()

    @property
    def has_entries(self) -> bool:
        """Whether log entries or progress are collected or being written."""
        return not self._log_buffer.is_empty or self._progress is not None or bool(self._flushes)

    # Collecting ---------------------------------------------------------------------------------------------------

    def add_log_entries(self, entries: list[RawLogEntry]) -> None:
        """Add entries to the job's log."""
        for entry in entries:
            self._log_buffer.add(entry)
        self._flush_soon()

    def set_progress(self, step: str, percent: float, message: str) -> None:
        """Report the progress of the job. It never falls. Only the last report of a flush interval is stored."""
        percent = self._percent = max(self._percent, percent)
        step, message = to_text(step, 200), to_text(message, 1000)
        self._progress = JobProgressed(attempt=self.attempt, step=step, percent=percent, message=message)
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush_later(), name=f"flush-later-{self.job_id}")

    async def _flush_later(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_SECONDS)
            try:
                await self.flush()
            except AttemptFenced:
                self.on_fenced()
                return
            if self._progress is None and self._log_buffer.is_empty:
                return

    async def flush(self, *, is_last: bool = False) -> None:
        """Write the collected entries and progress, even if the caller is cancelled.

        Args:
            is_last: Whether this is the last flush of the attempt.
        """
        if self._log_buffer.is_empty and self._progress is None and not self._flush_lock.locked():
            return
        flush = asyncio.create_task(self._flush(is_last=is_last), name=f"flush-{self.job_id}")
        self._flushes.add(flush)
        flush.add_done_callback(self._flushes.discard)
        await asyncio.shield(flush)

    async def _flush(self, *, is_last: bool) -> None:
        async with self._flush_lock:  # the last event of the attempt must come after a pending flush
            for entries in self._log_buffer.take(is_last=is_last):
                await self._append_text(JobLogged(attempt=self.attempt, entries=entries))
            progress, self._progress = self._progress, None
            if progress is not None:
                await self._append_text(progress)

    async def _append_text(self, event: JobLogged | JobProgressed) -> None:
        """Append text for people. An error here must not fail the job."""
        try:
            await self.append(ReportEvent(self.worker_id, event))
        except EventNotStorable as error:
            _log.warning("cannot store a job's log or progress", job_id=self.job_id, error=str(error))

    def close(self) -> None:
        """Stop collecting, and discard what has not been written."""
        for task in (self._flusher, *self._flushes):
            if task is not None:
                task.cancel()

    # Writing ------------------------------------------------------------------------------------------------------

    async def append(self, command: WorkerCommand, previous_error: Exception | None = None) -> None:
        """Append the events of a command, without secrets.

        Retry while the database is unavailable or busy, until the lease is lost.

        Args:
            previous_error: As in `handle_command_with_retries`.

        Raises:
            AttemptFenced: Another worker has the job, which a `WorkerFenced` event records, or the job was deleted.
            EventNotStorable: The event cannot be stored.
        """
        command = await self._secret_filter.hide_in_command(command)
        async with self._write_lock:
            try:
                result = await handle_command_with_retries(
                    self._event_store,
                    self.job_id,
                    command,
                    meta=self._metadata,
                    stream_state=self.stream_state,
                    retry_seconds=_RETRY_SECONDS,
                    on_retry=self._on_retry,
                    previous_error=previous_error,
                )
            except NotFound as error:
                raise AttemptFenced from error
            except InvalidEvent as error:
                raise EventNotStorable(str(error)) from error
            self.stream_state = result.stream_state
            for recorded in result.events:
                if isinstance(recorded.event, JobAttemptFailed | JobFailed):
                    self._log_failure(recorded.event)
        if any(isinstance(event.event, WorkerFenced) for event in result.events):
            raise AttemptFenced

    async def append_last(self, command: WorkerCommand, previous_error: Exception | None = None) -> None:
        """Flush, then append the last event of the attempt. If it cannot be stored, fail the job instead.

        Args:
            previous_error: As in `append`.

        Raises:
            AttemptFenced: See `append`.
        """
        await self.flush(is_last=True)
        try:
            await self.append(command, previous_error)
        except EventNotStorable as error:
            failure = ErrorInfo(code="INVALID_RESULT", message=f"The result cannot be stored: {error}.")
            if isinstance(command, FailAttempt):  # keep the original error
                text = to_text(command.error.message, 2000)
                failure = ErrorInfo(
                    code=to_text(command.error.code, 100), message=f"{text} (Details omitted: {error}.)"
                )
            try:
                await self.append(FailAttempt(self.worker_id, self.attempt, failure, None))
            except EventNotStorable:
                failure = ErrorInfo(code="INVALID_RESULT", message="The result cannot be stored.")
                await self.append(FailAttempt(self.worker_id, self.attempt, failure, None))

    def _log_failure(self, event: JobAttemptFailed | JobFailed) -> None:
        """Write the one line of the worker's log about a failed attempt. The job has the details."""
        retry_at = event.retry_at.isoformat() if isinstance(event, JobAttemptFailed) else None
        _log.warning(
            "attempt failed",
            job_id=self.job_id,
            job_type=self.job.spec.job_type,
            attempt=event.attempt,
            code=event.error.code,
            retry_at=retry_at,
        )

    def _on_retry(self, error: JobledgerError) -> None:
        if self.is_fenced:
            raise AttemptFenced from error
        _log.warning("cannot record an event yet", job_id=self.job_id, error=str(error))
