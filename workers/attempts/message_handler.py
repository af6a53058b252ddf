"""Handle processor messages: log entries, progress, completed steps and saved files.

Job processes and inline jobs send the same messages (`child/messages.py`). A job process is not trusted: the handler
checks that every file named in a step or in the results was saved by this job.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from itertools import chain, repeat
from typing import Any, Final, Literal

import structlog

from jobledger.ledger.domain.commands import ReportEvent
from jobledger.ledger.domain.errors import FileLost, LedgerUnavailable
from jobledger.ledger.domain.events import ResultFile, StepCompleted
from jobledger.ledger.domain.result_files import find_step_files
from jobledger.workers.attempts.attempt_timeout import AttemptTimeout
from jobledger.workers.attempts.attempt_writer import AttemptWriter, EventNotStorable
from jobledger.workers.attempts.dependencies import AttemptDependencies
from jobledger.workers.child import messages
from jobledger.workers.child.attempt import Assignment
from jobledger.workers.machine.health import find_machine_failure
from jobledger.workers.processor import ProcessorError, Results, SavedFile
from jobledger.workers.registry import get_processor_version
from jobledger.workers.results.conversion import to_text

_log = structlog.get_logger()
_MAX_CONCURRENT_INGESTS: Final = 2
"""Maximum number of files of one attempt that are copied to the result store at the same time."""
_STORE_RETRY_DELAYS: Final = (1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds between tries to write to the result store."""


class SavedFileLost(ProcessorError):
    """A saved file is missing from the inbox or has changed. Only the job itself can have caused that."""


class MessageHandler:
    """Handles the processor messages (`child/messages.py`) of one attempt."""

    def __init__(self, dependencies: AttemptDependencies, writer: AttemptWriter, timeout: AttemptTimeout) -> None:
        self._dependencies = dependencies
        self._writer = writer
        self._job = writer.job
        self._job_id = writer.job_id
        self._timeout = timeout
        self.assignment: Assignment | None = None
        """The assignment of the attempt. Set it before the first message."""
        self._unfinished_line: list[str] = []
        """Output of the job process after its last line break, as it was read."""
        self._reserved_paths: set[str] = set()
        self._saved_sizes: dict[str, int] = {}
        """Sizes in bytes by digest of the files that this attempt saved, or reused from the steps of other jobs."""

    def handle_report(self, message: messages.LogEntries | messages.Progress) -> None:
        """Add log entries or progress. They are written soon."""
        if isinstance(message, messages.Progress):
            self._writer.set_progress(message.step, message.percent, message.message)
            return
        self._writer.add_log_entries(
            [(at, level, to_text(text), to_text(logger, 200)) for at, level, text, logger in message.entries]
        )

    async def handle(self, message: messages.Message) -> Any:
        """Handle a processor message and return the response.

        Raises:
            AttemptFenced: Another worker has the job, or the job was deleted.
            ProcessorError: The message is rejected. The processor receives the error.
        """
        match message:
            case messages.LogEntries() | messages.Progress():
                self.handle_report(message)
            case messages.FindSharedStep():
                return await self._find_shared_step(message)
            case messages.FileSaved():
                await self._store_file(message.sha256)
                return await self._reserve_path(message.path)
            case messages.StepResult():
                await self._complete_step(message.completed, is_shared=message.is_shared)
            case _:
                raise AssertionError(f"{message.kind} is not a request")
        return None

    def add_output(self, text: str) -> None:
        """Add what the job process has printed to the job's log, when lines are complete: one may contain a secret."""
        lines = text.splitlines(keepends=True)
        is_last_complete = bool(lines) and lines[-1] != lines[-1].splitlines()[0]
        unfinished = [] if is_last_complete else lines[-1:]
        complete = lines if is_last_complete else lines[:-1]
        if complete:
            complete[0] = "".join([*self._unfinished_line, complete[0]])
            self._unfinished_line.clear()
            self._add_lines(complete)
        self._unfinished_line += unfinished

    def finish_output(self) -> None:
        """Add the last line of the output, if it has no end."""
        self._add_lines(["".join(self._unfinished_line)])
        self._unfinished_line.clear()

    def _add_lines(self, lines: Sequence[str]) -> None:
        now = datetime.now(UTC).timestamp()
        entries: list[messages.RawLogEntry] = [
            (now, "info", to_text(line.splitlines()[0]), "") for line in lines if line.strip()
        ]
        if entries:
            self._writer.add_log_entries(entries)

    async def check_results(self, results: Results) -> Results:
        """Return the results with verified files, reserved paths and actual sizes.

        Paths saved in this attempt are already reserved. Other paths come from a completed step, or a job process made
        them up.

        Raises:
            ProcessorError: INVALID_RESULT if the job has not saved a file, INVALID_PATH, PATH_TAKEN, or DUPLICATE_PATH
                if two different files have the same path.
        """
        digests: dict[str, str] = {}

        async def check_file(file: SavedFile) -> SavedFile:
            size = self._find_saved_size(file, "The results name")
            path = file.path if file.path in self._reserved_paths else await self._reserve_path(file.path)
            if digests.setdefault(path, file.sha256) != file.sha256:
                raise ProcessorError("DUPLICATE_PATH", f"The results have two different files with the path '{path}'.")
            return file.model_copy(update={"path": path, "size": size})

        return results.model_copy(
            update={
                "markdown": await check_file(results.markdown) if results.markdown else None,
                "assets": [await check_file(file) for file in results.assets],
            }
        )

    # Steps --------------------------------------------------------------------------------------------------------

    async def _find_shared_step(self, request: messages.FindSharedStep) -> dict[str, Any] | None:
        """Return the output of a step that another job shares, with the ID of that job; None if there is none."""
        try:
            max_age = timedelta(seconds=request.max_age_s)
            async with self._timeout.pause_while_waiting():
                shared = await self._dependencies.shared_step_finder.find_shared_step(
                    request.key, self._job_id, self._job.spec, max_age=max_age
                )
        except (LedgerUnavailable, OverflowError) as error:
            _log.warning("cannot look up shared steps", job_id=self._job_id, error=str(error))
            return None
        if shared is None:
            return None
        job_id, step = shared
        self._saved_sizes |= {file.sha256: file.size for file in find_step_files(step)}
        return {"job_id": job_id, "output": step.output, "files": [file.model_dump() for file in step.files]}

    async def _complete_step(self, completed: StepCompleted, *, is_shared: bool) -> None:
        for file in find_step_files(completed):  # a later attempt trusts these files
            subject = f'step "{to_text(completed.step, 200)}" output names'
            if (size := self._find_saved_size(file, subject)) != file.size:
                text = f"{subject} the file '{to_text(file.path, 200)}' with the size {file.size}. It has {size} bytes."
                raise ProcessorError("INVALID_RESULT", text)
        cache_version = get_processor_version(self._job.spec.job_type) if is_shared else None
        event = completed.model_copy(update={"attempt": self._writer.attempt, "cache_version": cache_version})
        async with self._timeout.pause_while_waiting():
            await self._writer.flush()
            try:
                await self._writer.append(ReportEvent(self._writer.worker_id, event))
            except EventNotStorable as error:
                text = f'step "{to_text(completed.step, 200)}" output cannot be stored: {error}'
                raise ProcessorError("INVALID_RESULT", text) from error

    # Files --------------------------------------------------------------------------------------------------------

    async def _store_file(self, sha256: str) -> None:
        """Move a saved file into the result store. Events may name it only after this returns.

        If the store is not writable, wait for it: the job keeps its work, and its timeout is paused.

        Raises:
            SavedFileLost: The job did not save the file, or changed or removed it.
        """
        assert self.assignment is not None  # noqa: S101 - set before the first message
        file_store = self._dependencies.file_store
        last_reason, started_at = "", asyncio.get_running_loop().time()
        delays = chain(_STORE_RETRY_DELAYS, repeat(_STORE_RETRY_DELAYS[-1]))
        async with self._timeout.pause_while_waiting(), self._ingest_locks[hash(sha256) % len(self._ingest_locks)]:
            while True:
                try:
                    self._saved_sizes[sha256] = await file_store.ingest(self.assignment.inbox_dir, sha256)
                    break
                except (FileLost, ValueError) as error:
                    if sha256 in self._saved_sizes:  # two saves of the same content: the first one moved the file
                        break
                    _log.warning("a saved file cannot be stored", job_id=self._job_id, error=str(error))
                    text = "A saved file was changed or removed before it was stored."
                    raise SavedFileLost("INVALID_RESULT", text, details={"sha256": to_text(sha256, 100)}) from error
                except LedgerUnavailable as error:
                    if (reason := to_text(error, 500)) != last_reason:
                        last_reason = reason
                        _log.warning("waiting for result store", job_id=self._job_id, error=reason)
                        text = f"Waiting for the result store. The job's work is kept. {reason}"
                        self._add_log_entry("warning", text)
                        if (failure := find_machine_failure(error)) is not None:
                            self._dependencies.health.report(failure)
                await asyncio.sleep(next(delays))
        if last_reason:
            waited = asyncio.get_running_loop().time() - started_at
            self._add_log_entry("info", f"The result store is writable again after {waited:.0f} seconds.")

    @cached_property
    def _ingest_locks(self) -> Sequence[asyncio.Lock]:
        """Locks chosen by digest: they bound concurrent ingests, and serialize ingests of the same content."""
        return [asyncio.Lock() for _ in range(_MAX_CONCURRENT_INGESTS)]

    async def _reserve_path(self, path: str) -> str:
        """Reserve a path for a file of this job and return it. Retry while the database is unavailable.

        Raises:
            ProcessorError: The path is invalid or taken.
        """
        async with self._timeout.pause_while_waiting():
            while True:
                try:
                    reserved = await self._dependencies.path_reservations.reserve(path, self._job_id)
                except LedgerUnavailable as error:
                    _log.warning("cannot reserve a result path yet", job_id=self._job_id, error=str(error))
                    await asyncio.sleep(1)
                else:
                    self._reserved_paths.add(reserved)
                    return reserved

    def _find_saved_size(self, file: SavedFile | ResultFile, subject: str) -> int:
        """Return the size of a file that this attempt or a completed step of this job saved.

        The store holds the files of all jobs. A job that knows the digest of another job's file must not publish it.

        Raises:
            ProcessorError: INVALID_RESULT if the job has not saved the file.
        """
        size = self._saved_sizes.get(file.sha256)
        size = self._step_file_sizes.get(file.sha256) if size is None else size
        if size is None:
            text = f"{subject} the file '{to_text(file.path, 200)}', which this job has not saved."
            advice = "Save it with job.save() and use the returned SavedFile."
            details = {"sha256": to_text(file.sha256, 100)}
            raise ProcessorError("INVALID_RESULT", f"{text} {advice}", details=details)
        return size

    @cached_property
    def _step_file_sizes(self) -> Mapping[str, int]:
        """Sizes in bytes by digest of the files in outputs of steps that earlier attempts completed."""
        return {file.sha256: file.size for step in self._job.steps.values() for file in find_step_files(step)}

    def _add_log_entry(self, level: Literal["info", "warning"], text: str) -> None:
        self._writer.add_log_entries([(datetime.now(UTC).timestamp(), level, text, "")])
