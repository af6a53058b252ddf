"""workers: run one claimed job and tell the log what becomes of it.

A pipeline of few steps: assign, run (child process or inline), take messages, record the end. Progress and log lines
are gathered for a moment, so that many of them become few events; nothing is held back for longer than a second.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import random
import shutil
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

import orjson
import structlog

from ledger.commands import (
    CompleteJob,
    ConfirmCancel,
    FailAttempt,
    FinishStep,
    ReleaseJob,
    ReportProgress,
    WorkerCommand,
    WriteLog,
)
from ledger.errors import InvalidEvent, LedgerBusy, LedgerUnavailable, NotFound
from ledger.events import Asset, Failure, JobResults, LogLine, Meta, ResultFile, ResultMetadata, WorkerFenced
from ledger.files import FileStore
from ledger.handle import Handled, Known, handle, outcome
from ledger.job import MAX_MACHINE_TROUBLES, Job
from ledger.log import EventLog
from workers import child
from workers.attempt import Assignment, FinishedStep, Message, run
from workers.confinement import Confinement, minimal_environment
from workers.confinement import check as check_confinement
from workers.health import MachineTrouble, WorkerHealth, machine_trouble
from workers.path_reservations import PathReservations
from workers.processor import ProcessorError, Results, SavedFile
from workers.registry import find_processor, processor_version
from workers.scratch import Scratch
from workers.shared_steps import SharedSteps

_log = structlog.get_logger()
GATHER_SECONDS: Final = 0.5
STOP_SECONDS: Final = 1.0  # a child that is to stop may do so itself within this time
_CHECK_SECONDS: Final = 20.0
LARGEST_OUTPUT: Final = 64 * 1024 * 1024  # what a child may say in one message
_FILES_URL: Final = "/api/events/files/"
_context = multiprocessing.get_context("forkserver")


@dataclass(frozen=True, slots=True)
class Settings:
    """How jobs are run. `processors` holds the sections `processors.<job_type>` of config.yaml."""

    store: FileStore
    processors: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memory_limit_mb: int = 4096
    retry_base_seconds: float = 5.0
    retry_longest_seconds: float = 600.0
    confinement: Confinement = field(default_factory=Confinement)


class Fenced(BaseException):  # a state of affairs, no error, and nothing that an inline processor may catch
    """The attempt is over: somebody else has the job, or it is gone. Whatever we would still say is refused."""


def prepare_children(settings: Settings) -> None:
    """Name what the server process that children are forked from loads beforehand. Call once, before the first job.

    Raises:
        ConfigurationError: children must be confined, and the system does not allow it.
    """
    check_confinement(settings.confinement.mode)
    _context.set_forkserver_preload(["workers.child", "workers.preload"])
    # Else every child would load the program that we were started with, a second each; this is where it would find it.
    main = sys.modules["__main__"]
    main.__spec__ = None
    vars(main).pop("__file__", None)


def check_processes() -> None:
    """Start a process the way jobs do, and end it. Blocks.

    Raises:
        MachineTrouble: that failed.
    """
    process = _context.Process(target=os.getpid, daemon=True)
    try:
        process.start()
        process.join(_CHECK_SECONDS)
    except (OSError, EOFError) as error:
        raise machine_trouble(error) or MachineTrouble(f"No process can be started: {error!r}") from error
    if process.exitcode != 0:
        process.kill()
        raise MachineTrouble(f"A process that was started as a check did not end within {_CHECK_SECONDS:.0f} s")


class Execution:
    """One attempt at one job, from its claim to its end."""

    def __init__(
        self,
        log: EventLog,
        known: Known,
        *,
        job_id: str,
        worker_id: str,
        settings: Settings,
        steps: SharedSteps,
        scratch: Scratch,
        health: WorkerHealth,
        paths: PathReservations,
    ) -> None:
        assert isinstance(known.state, Job)  # noqa: S101 - a job's stream has a job's state
        self.job_id = job_id
        self._job = known.state
        self._attempt = known.state.attempt
        self._known = known
        self._log = log
        self._worker_id = worker_id
        self._settings = settings
        self._steps = steps
        self._scratch = scratch
        self._health = health
        self._meta = Meta(f"worker:{worker_id}")
        self._writing = asyncio.Lock()
        self._flushing = asyncio.Lock()
        self._progress: ReportProgress | None = None
        self._lines: list[LogLine] = []
        self._flusher: asyncio.Task[None] | None = None
        self._task: asyncio.Task[None] | None = None
        self._inbox = Path()
        self._stopped_for: str | None = None
        self._paths = paths
        self._reserved: set[str] = set()

    @property
    def job_type(self) -> str:
        return self._job.asked.job_type

    # Stopping it from outside -------------------------------------------------------------------------------------

    def cancel(self) -> None:
        """Stop because somebody asked for the job to be cancelled."""
        self._stop("cancel")

    def release(self) -> None:
        """Stop and give the job back, because the worker shuts down."""
        self._stop("release")

    def abandon(self) -> None:
        """Stop and say nothing: the lease is lost, so the job is another's."""
        self._stop("abandon")

    def _stop(self, reason: str) -> None:
        if self._stopped_for is None or reason == "abandon":
            self._stopped_for = reason
            if self._task is not None:
                self._task.cancel()

    # Running ------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Run the job to its end and record that. Raises nothing but LedgerUnavailable and faults of ours."""
        self._task = asyncio.create_task(self._run(), name=f"run-{self.job_id}")
        if self._stopped_for is not None:
            self._task.cancel()
        try:
            await asyncio.wait({self._task})
            if self._stopped_for is None or not self._task.cancelled():
                self._task.result()
            elif self._stopped_for == "cancel":
                await self._flush()
                await self._say(ConfirmCancel(self._worker_id, self._attempt))
            elif self._stopped_for == "release":
                await self._flush()
                await self._say(ReleaseJob(self._worker_id, self._attempt, "the worker shuts down"))
        except Fenced:
            _log.warning("fenced: this attempt is over", job_id=self.job_id, attempt=self._attempt)
        finally:
            if self._flusher is not None:
                self._flusher.cancel()
            self._task.cancel()

    async def _run(self) -> None:
        scratch = saved = None
        try:
            scratch = self._scratch.for_attempt(self.job_id, self._attempt)
            saved = scratch.with_suffix(".saved")
            async with asyncio.timeout(self._job.asked.timeout_s):
                self._inbox = self._settings.store.inbox(saved)
                await self._run_in(scratch)
        except TimeoutError:
            message = f"The job took longer than its time limit of {self._job.asked.timeout_s:g} seconds."
            await self._fail(Failure(code="TIMEOUT", message=message), transient=True)
        except Fenced:
            raise
        except ProcessorError as error:
            await self._fail(Failure(code=error.code, message=error.message, details=error.details), transient=False)
        except Exception as error:  # noqa: BLE001 - see below
            if (trouble := machine_trouble(error, scratch=self._scratch.directory)) is not None:
                await self._give_back(trouble)
                return
            # Whatever goes wrong here has to end the attempt: under a living lease the job would hang for ever.
            _log.exception("fault while running a job", job_id=self.job_id)
            message = f"The worker failed while running the job: {type(error).__name__}: {error}"
            await self._fail(Failure(code="WORKER_FAULT", message=message), transient=True)
        finally:
            for place in (scratch, saved):
                if place is not None and os.path.exists(place):  # noqa: ASYNC240, PTH110 - a look costs less than a thread; few inline jobs have one
                    await asyncio.to_thread(shutil.rmtree, place, ignore_errors=True)

    async def _run_in(self, scratch: Path) -> None:
        processor = find_processor(self._job.asked.job_type)
        assignment = Assignment(
            job_id=self.job_id,
            attempt=self._attempt,
            job_type=self._job.asked.job_type,
            parameters=self._job.asked.parameters,
            settings=dict(self._settings.processors.get(self._job.asked.job_type, {})),
            steps={
                key: FinishedStep(output=step.output, tokens_used=step.tokens_used, warnings=step.warnings)
                for key, step in self._job.steps.items()
            },
            seek=not self._job.anew,
            inbox=self._inbox,
            scratch=scratch,
            confinement=self._settings.confinement,
        )
        if processor.isolation == "inline":
            await run(assignment, processor, self._take, threading.Event())  # stopped by cancelling its task
            return
        await asyncio.to_thread(scratch.mkdir, mode=0o700)
        async with _child(assignment, self._settings.memory_limit_mb) as (messages, process, answer):
            async for message in messages:
                taken = await self._take(message)
                if message["is"] in ("seek", "saved"):
                    await answer(taken)
                if message["is"] in ("done", "failed"):
                    return
            await asyncio.to_thread(process.join, 5)
            await self._fail(_why_it_died(process), transient=True)

    # What the processor says --------------------------------------------------------------------------------------

    async def _take(self, message: Message) -> Any:
        """Take what the processor says; return the answer to what it asks."""
        match message["is"]:
            case "seek":
                return await self._step_of_another(message["key"], message["max_age_s"])
            case "progress":
                self._progress = ReportProgress(
                    self._worker_id, self._attempt, message["step"], message["percent"], message["message"]
                )
                self._flush_soon()
            case "log":
                at = datetime.fromisoformat(message["at"])
                self._lines.append(LogLine(timestamp=at, level=message["level"], message=message["message"]))
                self._flush_soon()
            case "saved":
                return await self._take_over(message["sha256"], message["path"])
            case "step":
                await self._finish_step(message)
            case "done":
                await self._complete(message)
            case "failed":
                failure = Failure(code=message["code"], message=message["message"], details=message["details"])
                await self._fail(failure, transient=message["transient"])
            case other:
                raise ValueError(f"a processor's job said {other!r}, which means nothing")
        return None

    async def _take_over(self, sha256: str, path: str) -> str:
        """Make a saved file durable and return the path that it gets. Events name the file only after this."""
        while True:
            try:
                await self._settings.store.take_over(self._inbox, sha256)
                break
            except LedgerUnavailable as error:
                _log.warning("a file is not stored yet", job_id=self.job_id, error=str(error))
                await asyncio.sleep(1)
        return await self._reserve(path)

    async def _reserve(self, path: str) -> str:
        """Return the path that a file of this job gets, and try again while the database is away."""
        while True:
            try:
                reserved = await self._paths.reserve(path, self.job_id)
            except LedgerUnavailable as error:
                _log.warning("a path is not reserved yet", job_id=self.job_id, error=str(error))
                await asyncio.sleep(1)
            else:
                self._reserved.add(reserved)
                return reserved

    async def _step_of_another(self, key: str, max_age_s: float) -> dict[str, Any] | None:
        """Return the output of a step that another job shares, and which job that is."""
        try:
            found = await self._steps.find(key, self.job_id, self._job.asked, max_age=timedelta(seconds=max_age_s))
        except LedgerUnavailable as error:
            _log.warning("finished steps could not be looked for", job_id=self.job_id, error=str(error))
            return None
        return {"job_id": found[0], "output": found[1].output} if found is not None else None

    async def _finish_step(self, message: Message) -> None:
        await self._flush()
        await self._say(
            FinishStep(
                self._worker_id,
                self._attempt,
                message["step"],
                message["key"],
                message["output"],
                message["duration_s"],
                tokens_used=message["tokens_used"],
                warnings=tuple(message["warnings"]),
                reused_from=message["reused_from"],
                shared_version=processor_version(self.job_type) if message["share"] else None,
            )
        )

    async def _complete(self, message: Message) -> None:
        results = await self._with_own_paths(Results.model_validate(message["results"]))
        await self._flush()
        await self._say(
            CompleteJob(
                self._worker_id,
                self._attempt,
                _job_results(results, message["warnings"], message["duration_s"]),
            )
        )

    async def _with_own_paths(self, results: Results) -> Results:
        """Return results whose paths belong to this job.

        Paths that were saved in this attempt do. Others are from a finished step, or made up by a job process.

        Raises:
            ProcessorError: INVALID_PATH, PATH_TAKEN; DUPLICATE_PATH, if two different files have the same path.
        """
        digests: dict[str, str] = {}

        async def own(file: SavedFile) -> SavedFile:
            path = file.path if file.path in self._reserved else await self._reserve(file.path)
            if digests.setdefault(path, file.sha256) != file.sha256:
                raise ProcessorError("DUPLICATE_PATH", f"The results have two different files with the path '{path}'.")
            return file.model_copy(update={"path": path})

        return results.model_copy(
            update={
                "markdown": await own(results.markdown) if results.markdown else None,
                "assets": [await own(file) for file in results.assets],
            }
        )

    async def _fail(self, failure: Failure, *, transient: bool) -> None:
        await self._flush()
        retry_at = datetime.now(UTC) + self._retry_delay() if transient else None
        failure = failure.model_copy(update={"details": {**failure.details, "retryable": transient}})
        await self._say(FailAttempt(self._worker_id, self._attempt, failure, retry_at))

    async def _give_back(self, trouble: MachineTrouble) -> None:
        """Give the job back uncounted, because this machine cannot run it; unless it seems to be the cause."""
        self._health.report(trouble)
        await self._flush()
        if self._job.machine_troubles >= MAX_MACHINE_TROUBLES:
            message = (
                f"The job met machine trouble {self._job.machine_troubles + 1} times in a row. The last: {trouble}"
            )
            await self._fail(Failure(code="MACHINE_TROUBLE", message=message), transient=True)
        else:
            reason = f"the worker's machine cannot run it: {trouble}"
            await self._say(ReleaseJob(self._worker_id, self._attempt, reason, machine_trouble=True))

    def _retry_delay(self) -> timedelta:
        """Exponential back-off with full jitter, so that jobs which failed together do not come back together."""
        longest = min(
            self._settings.retry_base_seconds * 2 ** (self._job.counted - 1), self._settings.retry_longest_seconds
        )
        return timedelta(seconds=random.uniform(0.1, longest))  # noqa: S311 - spreads load, guards no secret

    # Saying it to the log -----------------------------------------------------------------------------------------

    def _flush_soon(self) -> None:
        if self._flusher is None or self._flusher.done():
            self._flusher = asyncio.create_task(self._flush_later(), name=f"flush-{self.job_id}")

    async def _flush_later(self) -> None:
        await asyncio.sleep(GATHER_SECONDS)
        try:
            await self._flush()
        except Fenced:
            self.abandon()

    async def _flush(self) -> None:
        async with self._flushing:  # who says the attempt's last word waits until a flush on its way is through
            lines, self._lines = self._lines, []
            progress, self._progress = self._progress, None
            if lines:
                await self._say(WriteLog(self._worker_id, self._attempt, tuple(lines)))
            if progress is not None:
                await self._say(progress)

    async def _say(self, command: WorkerCommand) -> None:
        """Append what the command causes; one at a time, each on top of the last.

        While the database is away it is tried again: until it is back, or the lease is lost and we are stopped.

        Raises:
            Fenced: the attempt is over. The refusal is on record as `WorkerFenced`.
        """
        async with self._writing:
            handled: Handled | None = None
            while handled is None:
                try:
                    handled = await handle(self._log, self.job_id, command, meta=self._meta, known=self._known)
                except (LedgerUnavailable, LedgerBusy) as error:
                    if self._stopped_for == "abandon":
                        raise Fenced from error
                    _log.warning("not recorded yet", job_id=self.job_id, error=str(error))
                    await asyncio.sleep(1)
                    handled = await self._landed(command)
                except NotFound as gone:
                    raise Fenced from gone
                except InvalidEvent as error:
                    message = f"What the processor said cannot be stored: {error}"
                    failure = Failure(code="INVALID_RESULT", message=message)
                    command = FailAttempt(self._worker_id, self._attempt, failure, None)
            self._known = handled.known
        if any(isinstance(event.event, WorkerFenced) for event in handled.events):
            raise Fenced

    async def _landed(self, command: WorkerCommand) -> Handled | None:
        try:
            return await outcome(self._log, self.job_id, command, known=self._known)
        except LedgerUnavailable:
            return None


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


# The child process ------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _child(
    assignment: Assignment, memory_limit_mb: int
) -> AsyncIterator[tuple[AsyncIterator[Message], BaseProcess, Callable[[Any], Awaitable[None]]]]:
    """Start a child with an assignment; yield what it says, the process, and how to answer it.

    It is dead when the block is left.
    """
    ours, theirs = _context.Pipe()

    async def answer(content: Any) -> None:
        with suppress(OSError):  # it is gone, as we shall hear
            await asyncio.to_thread(ours.send_bytes, orjson.dumps(content))

    process = _context.Process(target=child.main, args=(theirs, memory_limit_mb), daemon=True)
    try:
        await asyncio.to_thread(_start, process, assignment.confinement.environment)
        await asyncio.to_thread(ours.send_bytes, assignment.model_dump_json().encode())
        theirs.close()
        yield _messages(ours), process, answer
    finally:
        theirs.close()
        await asyncio.shield(asyncio.to_thread(_end, process, ours))


def _start(process: BaseProcess, environment: Sequence[str]) -> None:
    """Start a child. The first one, and one after a crash of the server process, starts that with this environment."""
    with minimal_environment(environment):
        process.start()


def _end(process: BaseProcess, pipe: Connection) -> None:
    """Ask the child to stop, kill it with all it has started if it does not, and close the pipe that nobody reads."""
    if process.pid is not None:
        if process.is_alive():
            with suppress(OSError):
                pipe.send_bytes(child.STOP)
            process.join(STOP_SECONDS)
        if process.is_alive():
            process.kill()
        with suppress(ProcessLookupError, PermissionError):  # none is left, or it had not come so far
            os.killpg(process.pid, signal.SIGKILL)
        process.join(5)
    pipe.close()


async def _messages(pipe: Connection) -> AsyncIterator[Message]:
    """Yield messages until the child closes its end. The pipe is read when it has something: no thread waits on it."""
    while True:
        await _readable(pipe)
        while pipe.poll():
            try:
                # A message that has begun to arrive may take a moment to be whole: not on the event loop.
                text = await asyncio.to_thread(pipe.recv_bytes, LARGEST_OUTPUT)
            except (EOFError, ConnectionError):
                return
            except OSError:
                said = f"The processor said more than {LARGEST_OUTPUT // 2**20} MiB at once."
                yield {"is": "failed", "code": "INVALID_RESULT", "message": said, "details": {}, "transient": False}
                return
            yield orjson.loads(text)


async def _readable(pipe: Connection) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(pipe.fileno(), ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(pipe.fileno())


def _why_it_died(process: BaseProcess) -> Failure:
    code = process.exitcode
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        message = f"The process that ran the job was killed by {name}."
        return Failure(code="PROCESS_KILLED", message=message, details={"signal": name})
    message = f"The process that ran the job ended without a result (exit code {code})."
    return Failure(code="PROCESS_DIED", message=message, details={"exit_code": code})
