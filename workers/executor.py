"""workers: run one claimed job, and record in the event log how its attempt ends.

An attempt has three phases: prepare (trouble here is the machine's), work (the processor runs, in a job process or
inline, and its messages are handled), and record. The work can be stopped at any time: by cancellation, the time limit,
shutdown or a lost lease. What the work came to is recorded afterwards, by a task that nothing in it can disturb.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote

import structlog
from pydantic import ValidationError

from jobledger.ledger.domain.commands import CompleteJob, CompleteStep, ConfirmCancel, FailAttempt, ReleaseJob
from jobledger.ledger.domain.errors import FileLost, LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import Asset, Failure, JobResults, ResultFile, ResultMetadata
from jobledger.ledger.domain.job import MAX_CONSECUTIVE_MACHINE_FAILURES, Job
from jobledger.ledger.domain.saved_files import find_saved_files
from jobledger.ledger.files.directory import FileStore
from jobledger.ledger.store.command_handler import StreamState
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system.cooperative_threads import run_cooperatively
from jobledger.workers.attempt_recorder import AttemptRecorder, EventNotStorable, Fenced
from jobledger.workers.attempt_timeout import AttemptTimeout
from jobledger.workers.child import process as job_process
from jobledger.workers.child.attempt import Assignment, FinishedStep, run_attempt
from jobledger.workers.child.confinement import ConfinementSettings
from jobledger.workers.child.confinement import check_confinement as check_confinement
from jobledger.workers.child.containment import Containment, outside_containment
from jobledger.workers.child.messages import (
    AttemptCompleted,
    AttemptFailed,
    FileSaved,
    FindSharedStep,
    LogEntries,
    Message,
    MessageEnvelope,
    Progress,
    StepFinished,
)
from jobledger.workers.child.process import JobProcess, ProcessFailed, ProcessNotStarted
from jobledger.workers.directory_removal import removal_executor, remove_tree
from jobledger.workers.machine_health import (
    MachineFailure,
    WorkerHealth,
    check_descriptors,
    check_memory,
    disk_timeout_failure,
    find_machine_failure,
)
from jobledger.workers.path_reservations import PathReservations
from jobledger.workers.processor import ProcessorError, Results, SavedFile
from jobledger.workers.registry import get_processor, processor_version
from jobledger.workers.result_conversion import format_validation_error, to_text
from jobledger.workers.scratch import ScratchDirectory
from jobledger.workers.step_cache import StepCache

_log = structlog.get_logger()
STOP_SECONDS: Final = 1.0
"""How long an inline job that is to stop may take to do so itself."""
_MAX_REQUESTS: Final = 100  # of a job process, that are handled at the same time
_MAX_REQUEST_BYTES: Final = 4 * 1024 * 1024
"""Of the requests of a job process that are handled at the same time. In memory they may take 25 times as much. One
that is larger is handled alone."""
_MAX_TAKEOVERS: Final = 2  # of one job's saved files at the same time
_STORE_PAUSES: Final = (1.0, 2.0, 5.0, 10.0, 30.0)  # seconds between tries to write to the result store
# Not the event loop's own threads: jobs that run inline may occupy all of those.
_threads = ThreadPoolExecutor(4, thread_name_prefix="execution")
_removals: set[asyncio.Task[None]] = set()  # of the directories of attempts
_THREAD_SECONDS = 30.0
"""How long a call in one of these threads may take before the disk is taken for one that does not answer."""
_FILES_URL: Final = "/api/events/files/"
StopReason = Literal["cancel", "timeout", "release", "abandon"]


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """How jobs are run. `processors` holds the sections `processors.<job_type>` of config.yaml."""

    file_store: FileStore
    processor_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memory_limit_mb: int = 4096
    retry_base_seconds: float = 5.0
    retry_max_seconds: float = 600.0
    confinement: ConfinementSettings = field(default_factory=ConfinementSettings)


def check_job_processes(settings: ExecutorSettings) -> None:
    """Check that job processes can be run as the settings say. Call once, before the first job.

    Raises:
        ConfigurationError: they must be confined, and the system does not allow it.
    """
    check_confinement(settings.confinement.mode)


def check_process_start() -> None:
    """Start a program, and wait for its end. Blocks.

    Raises:
        MachineTrouble: that failed.
    """
    try:
        job_process.check_process_start()
    except Exception as error:  # any error - the machine cannot run a process
        raise find_machine_failure(error) or MachineFailure(f"No process can be started: {error!r}") from error


class SavedFileLost(ProcessorError):
    """What a job has saved is not in its inbox. Only the job itself can have done that."""


class JobExecutor:
    """One attempt at one job, from its claim to its end."""

    def __init__(
        self,
        log: EventStore,
        stream_state: StreamState,
        *,
        job_id: str,
        worker_id: str,
        settings: ExecutorSettings,
        step_cache: StepCache,
        scratch: ScratchDirectory,
        health: WorkerHealth,
        path_reservations: PathReservations,
    ) -> None:
        assert isinstance(stream_state.state, Job)  # noqa: S101 - a job's stream has a job's state
        self.job_id = job_id
        self._job = stream_state.state
        self.attempt = stream_state.state.attempt
        self._worker_id = worker_id
        self._settings = settings
        self._steps = step_cache
        self._scratch = scratch
        self._health = health
        self._paths = path_reservations
        self._repairs = 0
        """Of the scratch directory, before the attempt."""
        self._reserved: set[str] = set()
        self._saved: dict[str, int] = {}
        """Sizes by digest of the files that this attempt has saved, or taken from the steps of other jobs."""
        self._log = log
        self._recorder = AttemptRecorder(
            log,
            stream_state,
            job_id=job_id,
            worker_id=worker_id,
            attempt=stream_state.state.attempt,
            on_fenced=self.abandon,
        )
        self._assignment: Assignment | None = None
        self._working: asyncio.Task[AttemptCompleted | AttemptFailed | MachineFailure] | None = None
        self._recording: asyncio.Task[Any] | None = None
        """The task of `run`, while it records the end. Cancelled by `abandon`."""
        self._stopped_for: StopReason | None = None
        self._timeout: AttemptTimeout | None = None
        self._containment: Containment | None = None

    @property
    def job_type(self) -> str:
        return self._job.spec.job_type

    # Stopping it from outside -------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop because a user cancels the job."""
        self._stop("cancel")

    def release(self) -> None:
        """Stop and give the job back, because the worker shuts down."""
        self._stop("release")

    def abandon(self) -> None:
        """Stop and record nothing: the lease is lost, so the job is another worker's."""
        self._recorder.is_abandoned = True
        self._stop("abandon")
        if self._recording is not None:
            self._recording.cancel()

    def _stop(self, reason: StopReason) -> None:
        if self._stopped_for is None or reason == "abandon":
            self._stopped_for = reason
            if self._working is not None:
                self._interrupt(self._working)

    def _interrupt(self, working: asyncio.Task[Any]) -> None:
        """Cancel the work. Inline work that ignores that is abandoned: it must not keep its slot.

        A job process ends in any case, and `_run_process` waits for that.
        """
        working.cancel()
        if self._containment is not None:
            asyncio.get_running_loop().call_later(STOP_SECONDS, self._containment.abandon)

    # Running ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the job to its end, record that, and remove its directory. Raises only UnreadableEvent.

        The end is recorded first: a job may have left millions of files, and its result must not be lost meanwhile. Its
        slot is not free before they are removed, so that they do not pile up.
        """
        try:
            await self._run_and_record()
        finally:
            if self._assignment is not None and self._assignment.has_files:
                # If this task is cancelled, or the job is another worker's, the removal goes on without it.
                removal = asyncio.create_task(self._remove_directory(), name=f"remove-{self.job_id}")
                _removals.add(removal)
                removal.add_done_callback(_removals.discard)
                if self._stopped_for != "abandon":
                    await asyncio.shield(removal)

    async def _run_and_record(self) -> None:
        try:
            ending = await self._run_attempt()
            if self._stopped_for == "abandon":
                return
            self._recording = asyncio.current_task()
            await self._record_or_fail(ending)
        except Fenced:
            _log.warning("fenced: this attempt is over", job_id=self.job_id, attempt=self.attempt)
        except asyncio.CancelledError:
            if self._stopped_for != "abandon":
                raise
        finally:
            self._recording = None
            self._recorder.close()

    async def _run_attempt(self) -> AttemptCompleted | AttemptFailed | MachineFailure | None:
        """Do the work; return what it came to, or None if it was stopped. An exception would leave the job hanging."""
        try:
            place = self._scratch.new_attempt_path(self.job_id, self.attempt)
            self._repairs = self._scratch.repair_count
            ending = await self._run_processor(place)
            if isinstance(ending, AttemptFailed) and ending.errno is not None:
                with suppress(TimeoutError):  # if the job has filled the disk, it has room again
                    async with asyncio.timeout(_THREAD_SECONDS):
                        await self._remove_directory()
                return await self._find_machine_failure(ending) or ending
        except Exception as error:  # noqa: BLE001 - under a living lease the job would hang for ever
            return find_machine_failure(error, scratch_dir=self._scratch.path) or self._fault(error)
        else:
            return ending

    def _fault(self, error: BaseException) -> AttemptFailed:
        _log.error("fault while running a job", job_id=self.job_id, exc_info=error)
        text = f"The worker failed while running the job: {type(error).__name__}: {to_text(error, 1000)}"
        return AttemptFailed("WORKER_FAULT", text, transient=True)

    async def _remove_directory(self) -> None:
        if self._assignment is None or not self._assignment.has_files:
            return
        try:
            await run_cooperatively(remove_tree(self._assignment.attempt_dir), removal_executor)
        except Exception as error:  # noqa: BLE001 - what the work came to must not be lost for that
            _log.warning("a directory of a job stays", path=str(self._assignment.attempt_dir), error=repr(error))

    async def _run_processor(self, place: Path) -> AttemptCompleted | AttemptFailed | MachineFailure | None:
        processor = get_processor(self.job_type)
        self._assignment = assignment = self._make_assignment(place)
        if processor.isolation == "inline":
            self._containment = Containment()
            sending = run_attempt(
                assignment, processor, self._handle_inline_message, lambda: False
            )  # cancelling its task stops it
            self._timeout = AttemptTimeout(self._job.spec.timeout_s, self._on_timeout)
            self._working = self._containment.start(sending, f"run-{self.job_id}")
        else:
            self._working = asyncio.create_task(self._run_process(assignment), name=f"run-{self.job_id}")
        if self._stopped_for is not None:
            self._interrupt(self._working)
        try:
            await _wait_for(self._working)
            return self._result_of(self._working)
        finally:
            if self._timeout is not None:
                self._timeout.stop()
            if self._containment is not None:
                await self._containment.stop(STOP_SECONDS)

    def _on_timeout(self) -> None:
        self._stop("timeout")

    def _result_of(
        self, working: asyncio.Task[AttemptCompleted | AttemptFailed | MachineFailure]
    ) -> AttemptCompleted | AttemptFailed | MachineFailure | None:
        if working.cancelled():
            return None
        if (error := working.exception()) is not None:
            if isinstance(error, Fenced):
                self.abandon()
                return None
            return find_machine_failure(error, scratch_dir=self._scratch.path) or self._fault(error)
        ending = working.result()
        # Stopped work often ends with an error that comes of being stopped. A result counts all the same.
        return ending if self._stopped_for is None or isinstance(ending, AttemptCompleted) else None

    def _make_assignment(self, directory: Path) -> Assignment:
        return Assignment(
            job_id=self.job_id,
            attempt=self.attempt,
            job_type=self.job_type,
            parameters=self._job.spec.parameters,
            settings=dict(self._settings.processor_settings.get(self.job_type, {})),
            finished_steps={
                key: FinishedStep(output=step.output, tokens_used=step.tokens_used, warnings=step.warnings)
                for key, step in self._job.steps.items()
            },
            can_use_shared_steps=not self._job.is_full_restart,
            attempt_dir=directory,
            confinement=self._settings.confinement,
        )

    async def _find_machine_failure(self, failed: AttemptFailed) -> MachineFailure | None:
        """Return the trouble of this machine that made a processor fail with a system error, if it is still there.

        A job that has filled the disk itself has made room again: its scratch directory is removed by now.
        """
        scratch = self._scratch
        # The quick check first: `check` creates a directory that is missing, and nobody would know that it was.
        for check in (scratch.check_quickly, scratch.check, check_descriptors, check_memory, check_process_start):
            try:
                await _in_thread(check)
            except Exception as error:  # noqa: BLE001 - whatever a check raises says that the machine is not fit
                _log.warning("a job failed for trouble of the machine", job_id=self.job_id, error=failed.message)
                return find_machine_failure(error) or MachineFailure(to_text(error, 500))
        if scratch.repair_count != self._repairs:
            return MachineFailure(
                "The scratch directory had lost its mode, perhaps through another job, and got it back"
            )
        return None

    # In a job process ---------------------------------------------------------------------------------------------

    async def _run_process(self, assignment: Assignment) -> AttemptCompleted | AttemptFailed | MachineFailure:
        starting = asyncio.create_task(self._start_process(assignment))
        try:
            process = await asyncio.shield(starting)
        except (ProcessNotStarted, OSError, MachineFailure) as error:
            number = error.errno if isinstance(error, ProcessNotStarted) else None
            known = find_machine_failure(OSError(number, os.strerror(number)) if number else error)
            return known or MachineFailure(to_text(error, 500))
        except asyncio.CancelledError:
            await _stop_when_started(starting)
            raise
        self._timeout = AttemptTimeout(self._job.spec.timeout_s, self._on_timeout)
        try:
            return await self._exchange_messages(process, assignment)
        except ProcessFailed as error:
            return error.failure
        finally:
            self._timeout.stop()
            # Cancelled again meanwhile, it still has to end: `end` takes a few seconds at most.
            await _wait_uncancelled(asyncio.create_task(process.stop()))

    async def _start_process(self, assignment: Assignment) -> JobProcess:
        create = partial(
            self._scratch.create_directories, assignment.attempt_dir, assignment.scratch_dir, assignment.inbox_dir
        )
        await _in_thread(create)
        self._repairs = self._scratch.repair_count
        return await JobProcess.start(
            self._settings.memory_limit_mb, self._log_output, self._settings.confinement.environment_variables
        )

    def _log_output(self, text: str) -> None:
        """Take what the job process prints into the job's log."""
        at = datetime.now(UTC).timestamp()
        self._recorder.add_log_entries([(at, "info", to_text(line)) for line in text.splitlines() if line.strip()])

    async def _exchange_messages(self, process: JobProcess, assignment: Assignment) -> AttemptCompleted | AttemptFailed:
        """Give a job process its assignment and handle its messages, until the last one."""
        requests: dict[asyncio.Task[None], int] = {}  # their sizes in bytes
        failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def ended(request: asyncio.Task[None]) -> None:
            requests.pop(request)
            if not request.cancelled() and (error := request.exception()) is not None and not failing.done():
                failing.set_exception(error)

        hearing = asyncio.create_task(self._receive_messages(process, assignment, requests, ended))
        either: set[asyncio.Future[Any]] = {hearing, failing}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if failing.done():
                failing.result()
            return await hearing
        finally:
            failing.cancel()
            for task in (hearing, *requests):
                task.cancel()
            await asyncio.gather(hearing, *requests, return_exceptions=True)

    async def _receive_messages(
        self, process: JobProcess, assignment: Assignment, requests: dict[asyncio.Task[None], int], ended: Any
    ) -> AttemptCompleted | AttemptFailed:
        await process.send(assignment.model_dump(mode="json"))
        async with aclosing(process.iterate_messages()) as messages:
            async for received, size in messages:
                message = received.message
                if isinstance(message, AttemptCompleted | AttemptFailed):
                    return message
                if not received.request_id:
                    await self._handle_message(message)
                    continue
                while not _has_room(requests, size) and not process.exit_task.done():
                    await asyncio.wait({*requests, process.exit_task}, return_when=asyncio.FIRST_COMPLETED)
                request = asyncio.create_task(self._handle_request(process, received))
                requests[request] = size
                request.add_done_callback(ended)
        raise AssertionError("messages() ends by an exception")

    async def _handle_request(self, process: JobProcess, received: MessageEnvelope) -> None:
        answer: dict[str, Any] = {"id": received.request_id}
        try:
            answer["value"] = await self._handle_message(received.message)
        except SavedFileLost as error:  # with the clock paused for each, it might try for ever
            raise ProcessFailed(AttemptFailed(error.code, error.message, details=error.details)) from error
        except ProcessorError as error:
            answer["error"] = {
                "code": error.code,
                "message": error.message,
                "transient": error.transient,
                "details": error.details,
            }
        await process.send(answer)

    # What the processor reports -----------------------------------------------------------------------------------

    async def _handle_inline_message(self, message: Message) -> Any:
        with outside_containment():
            try:
                return await self._handle_message(message)
            except Fenced:
                self.abandon()  # also if the processor catches everything
                raise

    async def _handle_message(self, message: Message) -> Any:
        """Handle a message of the job; return the answer to it.

        Raises:
            Fenced: the attempt is over.
            ProcessorError: the message is refused, and the processor has to know.
        """
        match message:
            case LogEntries():
                self._recorder.add_log_entries([(at, level, to_text(text)) for at, level, text in message.entries])
            case Progress():
                self._recorder.set_progress(message.step, message.percent, message.message)
            case FindSharedStep():
                return await self._find_shared_step(message)
            case FileSaved():
                await self._store_file(message.sha256)
                return await self._reserve(message.path)
            case StepFinished():
                await self._finish_step(message)
            case _:
                raise AssertionError(f"{message.kind} is handled elsewhere")
        return None

    async def _find_shared_step(self, wanted: FindSharedStep) -> dict[str, Any] | None:
        """Return the output of a step that another job shares, and which job that is."""
        assert self._timeout is not None  # noqa: S101 - the work has begun
        try:
            max_age = timedelta(seconds=wanted.max_age_s)
            async with self._timeout.pause_while_waiting():
                found = await self._steps.find_shared_step(wanted.key, self.job_id, self._job.spec, max_age=max_age)
        except (LedgerUnavailable, OverflowError) as error:
            _log.warning("finished steps could not be looked for", job_id=self.job_id, error=str(error))
            return None
        if found is None:
            return None
        self._saved |= {file.sha256: file.size for file in find_saved_files(found[1].output)}
        return {"job_id": found[0], "output": found[1].output}

    async def _finish_step(self, step: StepFinished) -> None:
        assert self._timeout is not None  # noqa: S101 - the work has begun
        for file in find_saved_files(step.output):  # a later attempt takes them for the job's own
            what = f'step "{to_text(step.step, 200)}" output names'
            if (size := self._saved_size(file, what)) != file.size:
                text = f"{what} the file '{to_text(file.path, 200)}' with the size {file.size}. It has {size} bytes."
                raise ProcessorError("INVALID_RESULT", text)
        command = CompleteStep(
            self._worker_id,
            self.attempt,
            step.step,
            step.key,
            step.output,
            step.duration_s,
            tokens_used=step.tokens_used,
            warnings=tuple(step.warnings),
            reused_from=step.reused_from,
            cache_version=processor_version(self.job_type) if step.is_shared else None,
        )
        async with self._timeout.pause_while_waiting():
            await self._recorder.flush()
            try:
                await self._recorder.append(command)
            except EventNotStorable as error:
                text = f'step "{to_text(step.step, 200)}" output cannot be stored: {error}'
                raise ProcessorError("INVALID_RESULT", text) from error

    async def _store_file(self, sha256: str) -> None:
        """Move a saved file into the result store. Events name it only after this has returned.

        A store that cannot be written to is waited for: the job's work is kept, and its time limit does not run on.

        Raises:
            SavedFileLost: the job has not put it there, or has changed or removed it.
        """
        assert self._timeout is not None  # noqa: S101 - the work has begun
        assert self._assignment is not None  # noqa: S101 - the work has begun
        told, tries, begun = "", 0, asyncio.get_running_loop().time()
        async with self._timeout.pause_while_waiting(), self._store_locks[hash(sha256) % len(self._store_locks)]:
            while True:
                try:
                    self._saved[sha256] = await self._settings.file_store.ingest(self._assignment.inbox_dir, sha256)
                    break
                except (FileLost, ValueError) as error:
                    if sha256 in self._saved:  # it was saved twice at the same time, and both are moved
                        break
                    _log.warning("a saved file cannot be used", job_id=self.job_id, error=str(error))
                    text = "A saved file was changed or removed before it was stored."
                    raise SavedFileLost("INVALID_RESULT", text, details={"sha256": to_text(sha256, 100)}) from error
                except LedgerUnavailable as error:
                    if (reason := to_text(error, 500)) != told:
                        told = reason
                        _log.warning("waiting for the result store", job_id=self.job_id, error=reason)
                        self._add_log_line("warning", f"Waiting for the result store; the job's work is kept. {reason}")
                        if (trouble := find_machine_failure(error)) is not None:
                            self._health.report(trouble)
                await asyncio.sleep(_STORE_PAUSES[min(tries, len(_STORE_PAUSES) - 1)])
                tries += 1
        if told:
            waited = asyncio.get_running_loop().time() - begun
            self._add_log_line("info", f"The result store can be written to again, after {waited:.0f} seconds.")

    @cached_property
    def _store_locks(self) -> Sequence[asyncio.Lock]:
        """Each file is moved under one of these, by its digest: few at a time, and one content once at a time."""
        return [asyncio.Lock() for _ in range(_MAX_TAKEOVERS)]

    async def _reserve(self, path: str) -> str:
        """Return the path that a file of this job gets, and try again while the database is away.

        Raises:
            ProcessorError: the path is invalid, or taken.
        """
        assert self._timeout is not None  # noqa: S101 - the work has begun
        async with self._timeout.pause_while_waiting():
            while True:
                try:
                    reserved = await self._paths.reserve(path, self.job_id)
                except LedgerUnavailable as error:
                    _log.warning("a path is not reserved yet", job_id=self.job_id, error=str(error))
                    await asyncio.sleep(1)
                else:
                    self._reserved.add(reserved)
                    return reserved

    def _add_log_line(self, level: Literal["info", "warning"], text: str) -> None:
        self._recorder.add_log_entries([(datetime.now(UTC).timestamp(), level, text)])

    # Recording the end --------------------------------------------------------------------------------------------

    async def _record_or_fail(self, ending: AttemptCompleted | AttemptFailed | MachineFailure | None) -> None:
        try:
            await self._record(ending)
        except UnreadableEvent:
            raise
        except Exception as error:  # noqa: BLE001 - under a living lease the job would hang for ever
            await self._fail(self._fault(error))

    async def _record(self, ending: AttemptCompleted | AttemptFailed | MachineFailure | None) -> None:
        """Record how the attempt ended.

        Raises:
            Fenced: another worker has the job.
        """
        match ending:
            case AttemptCompleted():
                await self._complete(ending)
            case AttemptFailed():
                await self._fail(ending)
            case MachineFailure():
                await self._release_for_failure(ending)
            case None if self._stopped_for == "cancel":
                await self._recorder.append_final(ConfirmCancel(self._worker_id, self.attempt))
            case None if self._stopped_for == "release":
                await self._recorder.append_final(ReleaseJob(self._worker_id, self.attempt, "the worker shuts down"))
            case None if self._stopped_for == "timeout":
                message = f"The job took longer than its time limit of {self._job.spec.timeout_s:g} seconds."
                await self._fail(AttemptFailed("TIMEOUT", message, transient=True))
            case None if self._stopped_for is None:
                await self._fail(AttemptFailed("PROCESSOR_FAULT", "The processor cancelled its own task."))
            case None:
                raise Fenced

    async def _complete(self, done: AttemptCompleted) -> None:
        try:
            results = await self._check_files(Results.model_validate(done.results))
            job_results = _job_results(results, done.warnings, done.duration_s)
        except ValidationError as error:
            message = f"The results are invalid: {format_validation_error(error, 'results')}"
            await self._fail(AttemptFailed("INVALID_RESULT", message))
            return
        except ProcessorError as error:
            await self._fail(AttemptFailed(error.code, error.message, details=error.details))
            return
        await self._recorder.append_final(CompleteJob(self._worker_id, self.attempt, job_results))

    async def _check_files(self, results: Results) -> Results:
        """Return results whose files and paths belong to this job, with the sizes that the files have.

        Paths that were saved in this attempt do. Others are from a finished step, or made up by a job process.

        Raises:
            ProcessorError: INVALID_RESULT, if the job has not saved a file; INVALID_PATH, PATH_TAKEN; DUPLICATE_PATH,
                if two different files have the same path.
        """
        if results.markdown is None and not results.assets:
            return results
        digests: dict[str, str] = {}

        async def own(file: SavedFile) -> SavedFile:
            size = self._saved_size(file, "The results name")
            path = file.path if file.path in self._reserved else await self._reserve(file.path)
            if digests.setdefault(path, file.sha256) != file.sha256:
                raise ProcessorError("DUPLICATE_PATH", f"The results have two different files with the path '{path}'.")
            return file.model_copy(update={"path": path, "size": size})

        return results.model_copy(
            update={
                "markdown": await own(results.markdown) if results.markdown else None,
                "assets": [await own(file) for file in results.assets],
            }
        )

    def _saved_size(self, file: SavedFile | ResultFile, what: str) -> int:
        """Return the size of a file that this attempt or a finished step of this job has saved.

        The store has files of all jobs, and a job that knows the digest of another one must not publish it.

        Raises:
            ProcessorError: INVALID_RESULT, if the job has not saved it.
        """
        size = self._saved.get(file.sha256)
        size = self._files_of_steps.get(file.sha256) if size is None else size
        if size is None:
            text = f"{what} the file '{to_text(file.path, 200)}', which this job has not saved."
            advice = "Save it with job.save(), and use what that returns."
            details = {"sha256": to_text(file.sha256, 100)}
            raise ProcessorError("INVALID_RESULT", f"{text} {advice}", details=details)
        return size

    @cached_property
    def _files_of_steps(self) -> Mapping[str, int]:
        """Sizes by digest of the files in the outputs of steps that were finished before this attempt."""
        return {file.sha256: file.size for step in self._job.steps.values() for file in find_saved_files(step.output)}

    async def _fail(self, failed: AttemptFailed) -> None:
        retry_at = await self._log.server_time() + self._retry_delay() if failed.transient else None
        details = {**failed.details, "retryable": failed.transient}
        failure = Failure(code=to_text(failed.code, 100), message=to_text(failed.message), details=details)
        await self._recorder.append_final(FailAttempt(self._worker_id, self.attempt, failure, retry_at))

    async def _release_for_failure(self, trouble: MachineFailure) -> None:
        """Give the job back uncounted, because this machine cannot run it; unless it seems to be the cause."""
        self._health.report(trouble)
        if self._job.consecutive_machine_failures >= MAX_CONSECUTIVE_MACHINE_FAILURES:
            message = (
                f"The job met machine trouble {self._job.consecutive_machine_failures + 1} "
                f"times in a row. The last: {trouble}"
            )
            await self._fail(AttemptFailed("MACHINE_FAILURE", message, transient=True))
        else:
            reason = f"the worker's machine cannot run it: {trouble}"
            release = ReleaseJob(self._worker_id, self.attempt, reason, is_machine_failure=True)
            await self._recorder.append_final(release)

    def _retry_delay(self) -> timedelta:
        """Exponential back-off with full jitter, so that jobs which failed together do not come back together."""
        longest = min(
            self._settings.retry_base_seconds * 2 ** (self._job.counted_attempts - 1), self._settings.retry_max_seconds
        )
        return timedelta(seconds=random.uniform(0.1, longest))  # noqa: S311 - spreads load, guards no secret


def _has_room(requests: Mapping[asyncio.Task[None], int], size: int) -> bool:
    """Return whether a request of this size may be handled beside others of the same job process."""
    if not requests:
        return True
    return len(requests) < _MAX_REQUESTS and sum(requests.values()) + size <= _MAX_REQUEST_BYTES


async def _in_thread(function: Callable[[], None]) -> None:
    """Call a function in a thread.

    Raises:
        MachineTrouble: it does not return, because a disk does not answer.
    """
    try:
        async with asyncio.timeout(_THREAD_SECONDS):
            await asyncio.get_running_loop().run_in_executor(_threads, function)
    except TimeoutError as error:
        raise disk_timeout_failure(_THREAD_SECONDS) from error


async def _wait_for(task: asyncio.Task[Any]) -> None:
    """Wait for a task, whatever comes of it: `asyncio.wait` for one, at a fraction of its cost."""
    done = asyncio.get_running_loop().create_future()
    task.add_done_callback(lambda _: None if done.done() else done.set_result(None))
    await done


async def _wait_uncancelled(task: asyncio.Task[Any]) -> None:
    """Wait for a task although the one that waits is cancelled."""
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})


async def _stop_when_started(starting: asyncio.Task[JobProcess]) -> None:
    """End a job process that is being started, and is not wanted any more."""
    starting.cancel()
    await _wait_uncancelled(starting)
    if not starting.cancelled() and starting.exception() is None:
        await _wait_uncancelled(asyncio.create_task(starting.result().stop()))


def _job_results(results: Results, warnings: list[str], seconds: float) -> JobResults:
    """Put a processor's results into the concept's shape, with the paths and URLs under which they are served."""
    files = [results.markdown, *results.assets] if results.markdown else list(results.assets)
    return JobResults(
        markdown_file=f"/events/{results.markdown.path}" if results.markdown else None,
        markdown_url=_url(results.markdown) if results.markdown else None,
        assets=[
            Asset(type=file.media_type.partition("/")[0], path=f"/events/{file.path}", url=_url(file))
            for file in results.assets
        ],
        files=[ResultFile(**file.model_dump()) for file in files],
        metadata=ResultMetadata(
            **{
                **results.metadata,
                "processed_at": datetime.now(UTC),
                "duration": seconds,
                "tokens_used": results.tokens_used,
                "warnings": warnings,
            }
        ),
    )


def _url(file: SavedFile) -> str:
    return _FILES_URL + quote(file.path, safe="/&,+;=@!$~")
