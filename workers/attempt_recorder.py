"""workers: write what happens in an attempt to the event log: one command at a time, each on top of the last.

Progress and log lines are gathered for a moment, so that many of them become few events; nothing is held back for
longer than a second.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

import structlog

from jobledger.ledger.domain.commands import AddLogEntries, FailAttempt, ReportProgress, WorkerCommand
from jobledger.ledger.domain.errors import InvalidEvent, LedgerBusy, LedgerUnavailable, NotFound
from jobledger.ledger.domain.events import EventMetadata, Failure, WorkerFenced
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import CommandResult, StreamState, find_outcome, handle_command
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.child.messages import LogLine
from jobledger.workers.log_buffer import LogBuffer
from jobledger.workers.result_conversion import to_text

_log = structlog.get_logger()
FLUSH_INTERVAL_SECONDS: Final = 0.5
_RETRY_SECONDS: Final = 1.0


class Fenced(BaseException):  # a state of affairs, no error, and nothing that an inline processor may catch
    """The attempt is over: another worker has the job, or it is deleted. All further commands are refused."""


class EventNotStorable(Exception):
    """A command cannot be stored, and nothing was written. The text says why."""


class AttemptRecorder:
    """The event log, for one attempt."""

    def __init__(
        self,
        log: EventStore,
        stream_state: StreamState,
        *,
        job_id: str,
        worker_id: str,
        attempt: int,
        on_fenced: Callable[[], None],
    ) -> None:
        self._log = log
        self._known = stream_state
        self._job_id = job_id
        self._worker_id = worker_id
        self._attempt = attempt
        self._meta = EventMetadata(f"worker:{worker_id}")
        self._on_fenced = on_fenced
        self._write_lock = asyncio.Lock()
        self._flush_lock = asyncio.Lock()
        self._progress: ReportProgress | None = None
        self._lines: LogBuffer | None = None
        self._flusher: asyncio.Task[None] | None = None
        self._flushes: set[asyncio.Task[None]] = set()
        self.is_abandoned = False
        """Set when another worker may have the job: nothing is tried again then."""

    # Gathering ----------------------------------------------------------------------------------------------------

    def add_log_entries(self, lines: list[LogLine]) -> None:
        """Add lines to the job's log."""
        if self._lines is None:
            assert isinstance(self._known.state, Job)  # noqa: S101 - a job's stream has a job's state
            self._lines = LogBuffer(self._known.state.log_bytes)
        for line in lines:
            self._lines.add(line)
        self._flush_soon()

    def set_progress(self, step: str, percent: float, message: str) -> None:
        """Report how far the job is. Of several reports within a moment, the last one counts."""
        self._progress = ReportProgress(
            self._worker_id, self._attempt, to_text(step, 200), percent, to_text(message, 1000)
        )
        self._flush_soon()

    def _flush_soon(self) -> None:
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush_later(), name=f"flush-later-{self._job_id}")

    async def _flush_later(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_INTERVAL_SECONDS)
            try:
                await self.flush()
            except Fenced:
                self._on_fenced()
                return
            if self._progress is None and (self._lines is None or self._lines.is_empty):
                return

    async def flush(self, *, final: bool = False) -> None:
        """Write what has been gathered, also if the caller is cancelled meanwhile. `final`: nothing more will come."""
        if self._lines is None and self._progress is None and not self._flush_lock.locked():
            return
        flush = asyncio.create_task(self._flush(final=final), name=f"flush-{self._job_id}")
        self._flushes.add(flush)
        flush.add_done_callback(self._flushes.discard)
        await asyncio.shield(flush)

    async def _flush(self, *, final: bool) -> None:
        async with self._flush_lock:  # the attempt's last event has to wait until a flush on its way is through
            for lines in self._lines.take(final=final) if self._lines is not None else ():
                await self._append_text(AddLogEntries(self._worker_id, self._attempt, lines))
            progress, self._progress = self._progress, None
            if progress is not None:
                await self._append_text(progress)

    async def _append_text(self, command: AddLogEntries | ReportProgress) -> None:
        """Append text for people, which is never a reason for a job to fail."""
        try:
            await self.append(command)
        except EventNotStorable as error:
            _log.warning("text of a job cannot be stored", job_id=self._job_id, error=str(error))

    def close(self) -> None:
        """Gather no more, and write no more of what was gathered."""
        for task in (self._flusher, *self._flushes):
            if task is not None:
                task.cancel()

    # Writing ------------------------------------------------------------------------------------------------------

    async def append(self, command: WorkerCommand) -> None:
        """Append the event that the command causes.

        While the database is away it is tried again: until it is back, or the lease is lost.

        Raises:
            Fenced: the attempt is over. The refusal is on record as `WorkerFenced`.
            Refused: the event cannot be stored.
        """
        async with self._write_lock:
            handled: CommandResult | None = None
            while handled is None:
                try:
                    handled = await handle_command(
                        self._log, self._job_id, command, meta=self._meta, stream_state=self._known
                    )
                except (LedgerUnavailable, LedgerBusy) as error:
                    if self.is_abandoned:
                        raise Fenced from error
                    _log.warning("not recorded yet", job_id=self._job_id, error=str(error))
                    await asyncio.sleep(_RETRY_SECONDS)
                    handled = await self._find_outcome(command)
                except NotFound as gone:
                    raise Fenced from gone
                except InvalidEvent as error:
                    raise EventNotStorable(str(error)) from error
            self._known = handled.stream_state
        if any(isinstance(event.event, WorkerFenced) for event in handled.events):
            raise Fenced

    async def append_final(self, command: WorkerCommand) -> None:
        """Append the last event of the attempt, after what has been gathered. One that is refused fails the job.

        Raises:
            Fenced: as `append`.
        """
        await self.flush(final=True)
        try:
            await self.append(command)
        except EventNotStorable as error:
            failure = Failure(code="INVALID_RESULT", message=f"The result cannot be stored: {error}.")
            if isinstance(command, FailAttempt):  # its cause must not be lost
                text = to_text(command.error.message, 2000)
                failure = Failure(code=to_text(command.error.code, 100), message=f"{text} (Details left out: {error}.)")
            try:
                await self.append(FailAttempt(self._worker_id, self._attempt, failure, None))
            except EventNotStorable:
                failure = Failure(code="INVALID_RESULT", message="The result cannot be stored.")
                await self.append(FailAttempt(self._worker_id, self._attempt, failure, None))

    async def _find_outcome(self, command: WorkerCommand) -> CommandResult | None:
        try:
            return await find_outcome(self._log, self._job_id, command, stream_state=self._known)
        except LedgerUnavailable:
            return None
