"""Run one attempt of a job in this process, without a server and a database.

The attempt runs with the code of the worker: parameters and results are converted to JSON and back, steps are stored,
and the same rules decide on retries. Only the parts in `memory` are replaced, and the job is not confined.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, ParamSpec, TypeVar, cast, overload

from pydantic import BaseModel

from jobledger.ledger.domain.commands import CancelJob, ClaimJob, RestartJob, SubmitJob
from jobledger.ledger.domain.events import (
    JobAttemptFailed,
    JobCompleted,
    JobFailed,
    JobLogged,
    JobSubmitted,
    StepCompleted,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.testing.memory import MemoryWriter, create_dependencies, decide, evolve
from jobledger.testing.outcome import Outcome, OutcomeFile, Progress
from jobledger.testing.output_capture import capture_output
from jobledger.workers.attempts.attempt_timeout import AttemptTimeout
from jobledger.workers.attempts.executor import STOP_SECONDS
from jobledger.workers.attempts.message_handler import MessageHandler
from jobledger.workers.attempts.outcome_recorder import OutcomeRecorder, StopReason
from jobledger.workers.child import log_capture, messages
from jobledger.workers.child.attempt import Assignment, run_attempt
from jobledger.workers.job_types.app import get_job_type_name
from jobledger.workers.job_types.function import JobFunction
from jobledger.workers.processor import Processor, Results
from jobledger.workers.registry import get_default_timeout, get_processor_version, get_retry, use_processor
from jobledger.workers.results.conversion import to_json, to_text
from jobledger.workers.results.typed_values import load_value
from jobledger.workers.retry import Duration, parse_duration

P = ParamSpec("P")
R = TypeVar("R")
_WORKER_ID: Final = "worker-test"


@dataclass(frozen=True, slots=True)
class Runner:
    """Runs attempts of jobs. See `with_options` for the attributes."""

    settings: Mapping[str, Any] | BaseModel | None = None
    attempt: int = 1
    after: Outcome[Any] | None = None
    cancel_after: Duration | None = None

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: An option is out of range, or two of them exclude each other.
            TypeError: `cancel_after` is not a duration.
        """
        if self.attempt < 1:
            raise ValueError(f"attempt must be at least 1, got {self.attempt}")
        if self.after is not None and self.attempt != 1:
            raise ValueError("use either attempt or after: the number of the attempt follows from after")
        if self.cancel_after is not None:
            parse_duration(self.cancel_after, "cancel_after")

    @overload
    def run(self, job: JobFunction[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Outcome[R]: ...

    @overload
    def run(self, job: type[Processor], /, **parameters: Any) -> Outcome[Any]: ...

    def run(self, job: JobFunction[..., Any] | type[Processor], /, *args: Any, **kwargs: Any) -> Outcome[Any]:
        """Run one attempt of a job in this process, without a server, and return what it led to.

        Errors of the job are in the outcome. Mocks and fixtures of the test apply to the job.

        Args:
            job: A job function, or a processor class.
            args: Arguments of the job function, without `ctx`.
            kwargs: Arguments of the job function, or the parameters of the processor.

        Raises:
            TypeError: An argument is missing or not a parameter, or `job` is not a job type.
            pydantic.ValidationError: An argument is not valid for its type: the API would reject the submission.
            RuntimeError: An event loop is running.
        """
        if asyncio._get_running_loop() is not None:
            raise RuntimeError("an event loop is running: in an asynchronous test, use `await arun(…)` instead of run")
        return asyncio.run(self.arun(cast("JobFunction[..., Any]", job), *args, **kwargs))

    @overload
    async def arun(self, job: JobFunction[P, R], /, *args: P.args, **kwargs: P.kwargs) -> Outcome[R]: ...

    @overload
    async def arun(self, job: type[Processor], /, **parameters: Any) -> Outcome[Any]: ...

    async def arun(self, job: JobFunction[..., Any] | type[Processor], /, *args: Any, **kwargs: Any) -> Outcome[Any]:
        """Run one attempt in an asynchronous test. Otherwise as `run`."""
        if isinstance(job, JobFunction):
            processor, parameters = job.processor, job.bind(*args, **kwargs)
        elif get_job_type_name(job) is None:
            raise TypeError(f"run() takes a job function or a processor class, not {job!r}: use @jobledger.job(…)")
        else:
            processor = job
            validated = processor.Parameters.model_validate(kwargs)
            parameters = to_json(validated.model_dump(mode="json", by_alias=True, exclude_unset=True), "parameters")
        with TemporaryDirectory(prefix="jobledger-test-") as directory, use_processor(processor):
            claimed = _claim(processor, parameters, self.attempt, self.after)
            attempt = _Attempt(self, processor, claimed, Path(directory))
            return await attempt.run(_create_result_reader(job))


def _claim(processor: type[Processor], parameters: dict[str, Any], attempt: int, after: Outcome[Any] | None) -> Job:
    """Return a job that a worker has claimed: a new one, or that of an earlier outcome."""
    now = datetime.now(UTC)
    if after is None:
        retry = get_retry(processor)
        submitted = JobSubmitted(
            job_type=processor.job_type,
            parameters=parameters,
            user_id="test",
            max_attempts=1 if retry is None else retry.max_attempts,
            timeout_s=get_default_timeout(processor),
        )
        job = evolve(None, decide(None, SubmitJob(submitted)))
        job = replace(job, attempt=attempt - 1, counted_attempts=attempt - 1)
    else:
        job = after.job
        if job.spec.job_type != processor.job_type:
            raise ValueError(f"after is an outcome of the job type {job.spec.job_type!r}, not {processor.job_type!r}")
        if job.status != "pending":
            job = evolve(job, decide(job, RestartJob("test")))
        job = replace(job, spec=job.spec.model_copy(update={"parameters": parameters}))
    return evolve(job, decide(job, ClaimJob(_WORKER_ID, max(now, job.due_at or now))))


def _create_result_reader(job: JobFunction[..., Any] | type[Processor]) -> Callable[[Any], Any]:
    """Return a function that converts JSON to the type of the result."""
    if not isinstance(job, JobFunction) or job.result_type.core_schema.get("cls") is Results:
        return lambda output: output
    return lambda output: load_value(job.result_type, output)


class _Attempt:
    """One attempt. `run` does what `JobExecutor` does in a worker."""

    def __init__(self, options: Runner, processor: type[Processor], claimed: Job, directory: Path) -> None:
        self._options = options
        self._processor = processor
        self._loop = asyncio.get_running_loop()
        self._store = directory / "results"
        dependencies = create_dependencies(self._store)
        job_id = create_job_id() if options.after is None else options.after.job_id
        self._writer = MemoryWriter(claimed, job_id, lambda: None)
        self._timeout = AttemptTimeout(claimed.spec.timeout_s, lambda: self._stop("timeout"))
        self._handler = MessageHandler(dependencies, self._writer, self._timeout)
        self._recorder = OutcomeRecorder(dependencies, self._writer, self._handler)
        settings = options.settings or {}
        self._assignment = self._handler.assignment = Assignment(
            job_id=job_id,
            attempt=claimed.attempt,
            job_type=claimed.spec.job_type,
            parameters=claimed.spec.parameters,
            settings=settings.model_dump(by_alias=True) if isinstance(settings, BaseModel) else dict(settings),
            completed_steps=dict(claimed.steps),
            can_use_shared_steps=not claimed.is_full_restart,
            can_share_steps=bool(get_processor_version(claimed.spec.job_type)),
            attempt_dir=directory / "attempt",
        )
        self._assignment.inbox_dir.mkdir(parents=True)
        self._is_inline = processor.isolation == "inline"
        self._stop_reason: StopReason | None = None
        self._stopped = asyncio.Event()
        self._progress: list[Progress] = []

    async def run(self, read_result: Callable[[Any], Any]) -> Outcome[Any]:
        """Run the attempt and return its outcome, whose result `read_result` converts."""
        with self._capture():
            work = asyncio.create_task(self._run_attempt())
            self._timeout.start()
            if (after := self._options.cancel_after) is not None:
                self._loop.call_later(parse_duration(after, "cancel_after"), self._stop, "cancel")
            stopped = asyncio.create_task(self._stopped.wait())
            await asyncio.wait({work, stopped}, return_when=asyncio.FIRST_COMPLETED)
            stopped.cancel()
            if not work.done():
                await self._end(work)
            self._timeout.stop()
        self._handler.finish_output()
        outcome = work.result() if work.done() and not work.cancelled() else None
        if self._stop_reason == "cancel":
            await self._writer.append(CancelJob("test"))
        # A worker does not read what a job process sends after the stop. Of an inline job, only a result counts then.
        counts = self._is_inline and isinstance(outcome, messages.AttemptCompleted)
        if self._stop_reason is not None and not counts:
            outcome = None
        await self._recorder.record(outcome, self._stop_reason)
        self._writer.close()
        return self._build_outcome(read_result)

    async def _run_attempt(self) -> messages.AttemptCompleted | messages.AttemptFailed:
        return await run_attempt(
            self._assignment, self._processor, self._handler.handle, self._is_stopping, post=self._post
        )

    def _is_stopping(self) -> bool:
        return self._stop_reason is not None and not self._is_inline

    def _stop(self, reason: StopReason) -> None:
        if self._stop_reason is None:
            self._stop_reason = reason
            self._stopped.set()

    async def _end(self, work: asyncio.Task[Any]) -> None:
        """End the work as the worker does: an inline job is cancelled at once, another one after a second."""
        if not self._is_inline:
            await asyncio.wait({work}, timeout=STOP_SECONDS)
        work.cancel()
        await asyncio.wait({work}, timeout=STOP_SECONDS)

    # Log and progress ---------------------------------------------------------------------------------------------

    @contextmanager
    def _capture(self) -> Iterator[None]:
        """Capture what the job logs and prints, as in a job process. Of inline jobs, output is not captured."""
        with ExitStack() as stack:
            if self._is_inline:
                log_capture.install()
            else:
                stack.enter_context(log_capture.capture_all(self._add_log_entry))
                stack.enter_context(capture_output(lambda line: self._call(self._handler.add_output, f"{line}\n")))
            yield

    def _add_log_entry(self, level: Any, text: str, *, logger: str) -> None:
        self._post(messages.LogEntries([(time.time(), level, to_text(text), to_text(logger, 200))]))

    def _post(self, message: messages.LogEntries | messages.Progress) -> None:
        self._call(self._handle_report, message)

    def _handle_report(self, message: messages.LogEntries | messages.Progress) -> None:
        if isinstance(message, messages.Progress):
            percent = max(message.percent, self._progress[-1].percent if self._progress else 0.0)  # it never falls
            self._progress.append(Progress(percent, message.message, message.step))
        self._handler.handle_report(message)

    def _call(self, function: Callable[[Any], None], argument: Any) -> None:
        """Call a function on the event loop, from any thread. The log keeps the order of the calls of each thread."""
        if asyncio._get_running_loop() is self._loop:
            function(argument)
        elif not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, argument)

    # The outcome --------------------------------------------------------------------------------------------------

    def _build_outcome(self, read_result: Callable[[Any], Any]) -> Outcome[Any]:
        events, job = self._writer.events, self._writer.current_job
        after = self._options.after
        contents = {**(after.contents if after is not None else {}), **self._read_files()}
        results = next((event.results for event in events if isinstance(event, JobCompleted)), None)
        failure = next((event for event in events if isinstance(event, JobAttemptFailed | JobFailed)), None)
        retry_at = failure.retry_at if isinstance(failure, JobAttemptFailed) else None
        return Outcome(
            status=job.status,
            attempt=job.attempt,
            error=failure.error if failure is not None else None,
            retry_in=retry_at - datetime.now(UTC) if retry_at is not None else None,
            logs=[entry for event in events if isinstance(event, JobLogged) for entry in event.entries],
            progress=self._progress,
            steps=[event for event in events if isinstance(event, StepCompleted)],
            files={
                file.path: OutcomeFile(contents[file.sha256], file.media_type)
                for file in (results.files if results is not None else ())
            },
            warnings=results.metadata.warnings if results is not None else [],
            results=results,
            job_id=self._writer.job_id,
            job=job,
            contents=contents,
            read_result=read_result,
        )

    def _read_files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in self._store.rglob("*") if path.is_file()}


def with_options(
    *,
    settings: Mapping[str, Any] | BaseModel | None = None,
    attempt: int = 1,
    after: Outcome[Any] | None = None,
    cancel_after: Duration | None = None,
) -> Runner:
    """Return a runner with options, for example `with_options(after=first).run(invoice, customer="x")`.

    Options are separate from the arguments of the job, so that type checkers check both.

    Args:
        settings: The section `processors.<job type>` of config.yaml, as a mapping or as the model.
        attempt: The number of the attempt.
        after: Continue the job of this outcome: the next attempt if it will be retried, otherwise a restart. Completed
            steps are reused.
        cancel_after: Cancel the job after this time, for example 0.1 or "2s". 0: as soon as it runs.

    Raises:
        ValueError: An option is out of range, or `attempt` and `after` are both given.
        TypeError: `cancel_after` is not a duration.
    """
    return Runner(settings, attempt, after, cancel_after)


run = Runner().run
arun = Runner().arun
