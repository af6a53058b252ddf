"""Run one attempt at a job, and provide its `JobContext`. Runs in a job process, or inline in the worker.

Everything that the processor reports becomes a message (`messages.py`) to the worker. Only the worker writes to the
event store. The methods of the job context may be called concurrently from any number of tasks, and from the event
loops of other threads.
"""

from __future__ import annotations

import asyncio
import inspect
import operator
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from jobledger.ledger.domain.canonical_json import compute_canonical_digest
from jobledger.ledger.domain.errors import FileTooLarge, NotARegularFile
from jobledger.ledger.domain.events import ResultFile, StepCompleted
from jobledger.ledger.domain.limits import MAX_STEP_WARNING_BYTES
from jobledger.ledger.domain.result_files import find_result_files, find_step_files
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import StoredFile
from jobledger.workers.child import log_capture, messages
from jobledger.workers.child.failures import convert_exception_to_failure
from jobledger.workers.job_types.context import is_asynchronous, is_context, run_in_thread
from jobledger.workers.processor import JSON, LogLevel, Processor, ProcessorError, Results, SavedFile
from jobledger.workers.registry import get_retry
from jobledger.workers.results.conversion import InvalidResult, get_type_name, to_json, to_safe_str, to_text
from jobledger.workers.results.paths import normalize_path
from jobledger.workers.results.typed_values import (
    UnsupportedType,
    dump_argument,
    dump_value,
    get_return_adapter,
    load_value,
)
from jobledger.workers.sandbox.confinement import ConfinementSettings

T = TypeVar("T")
SendMessage = Callable[[messages.Message], Coroutine[Any, Any, Any]]
"""Sends a request to the worker and returns the response. Raises ProcessorError if it is rejected."""
PostMessage = Callable[[messages.LogEntries | messages.Progress], None]
"""Sends a report to the worker, from any thread. There is no response."""
MAX_WARNINGS: Final = 200
_WARNING_BYTES: Final = 512 * 1024
"""Maximum size of all warnings of a job."""
_LEVELS: Final = frozenset(get_args(LogLevel))
# Do not use the event loop's default executor: a processor may occupy all of its threads.
_file_threads = ThreadPoolExecutor(8, thread_name_prefix="save")


class Assignment(BaseModel):
    """What a job process needs to run an attempt.

    Attributes:
        settings: The section `processors.<job_type>` of config.yaml.
        completed_steps: Steps of earlier attempts, by digest of name and inputs.
        can_use_shared_steps: Whether the attempt may use completed steps of other jobs.
        attempt_dir: The attempt's directory. It exists if the attempt runs in a job process.
        confinement: How the job process is confined.
        can_share_steps: Whether the job type has a version, so that its steps can be shared.
        has_files: Whether the attempt may have files, because this process has used its directories.
    """

    job_id: str
    attempt: int
    job_type: str
    parameters: dict[str, Any]
    settings: dict[str, Any]
    completed_steps: dict[str, StepCompleted]
    can_use_shared_steps: bool = False
    can_share_steps: bool = True
    attempt_dir: Path
    confinement: ConfinementSettings = ConfinementSettings()
    has_files: bool = Field(default=False, exclude=True)

    @property
    def inbox_dir(self) -> Path:
        """Directory of saved files, by digest. The worker copies them to the result store."""
        self.has_files = True
        return self.attempt_dir / "saved"

    @property
    def scratch_dir(self) -> Path:
        """The processor's directory for temporary files."""
        self.has_files = True
        return self.attempt_dir / "scratch"


async def run_attempt(
    assignment: Assignment,
    processor: type[Processor],
    send: SendMessage,
    is_stopping: Callable[[], bool],
    *,
    post: PostMessage,
) -> messages.AttemptCompleted | messages.AttemptFailed:
    """Run the processor and return the last message of the attempt. Never raises.

    Args:
        send: Sends requests.
        is_stopping: Returns whether the job must stop.
        post: Sends log entries and progress.
    """
    started_at = time.monotonic()
    job: _JobContext | None = None
    try:
        parameters = processor.Parameters.model_validate(assignment.parameters)
        job = _JobContext(assignment, parameters, send, post, is_stopping)
        with log_capture.capture_to(job.log):
            results: object = await processor(processor.Settings.model_validate(assignment.settings)).run(job)
        return job.build_completed(results, time.monotonic() - started_at)
    except BaseException as error:  # noqa: BLE001 - a processor may raise anything; it fails only its job
        scratch_dir = assignment.attempt_dir.parent
        return convert_exception_to_failure(error, scratch_dir=scratch_dir, retry=get_retry(processor))
    finally:
        if job is not None:
            job.close()


class _Done:
    """An awaitable that is done. It makes awaiting a report optional."""

    def __await__(self) -> Generator[None, None, None]:
        return
        yield


_DONE: Final = _Done()


# The job ----------------------------------------------------------------------------------------------------------


class _Warnings:
    """Warnings that fit into an event, and the number of those that do not."""

    _OVERHEAD_BYTES: Final = 16  # of BSON, per warning
    _SUMMARY_BYTES: Final = 100

    def __init__(self, max_bytes: int) -> None:
        self._kept: list[str] = []
        self._bytes_left = max_bytes - self._SUMMARY_BYTES
        self._dropped = 0

    def add(self, warning: str) -> None:
        size = len(warning.encode()) + self._OVERHEAD_BYTES
        if len(self._kept) < MAX_WARNINGS and size <= self._bytes_left:
            self._kept.append(warning)
            self._bytes_left -= size
        else:
            self._dropped += 1

    def to_list(self) -> list[str]:
        """Return the warnings. The last one states how many were dropped."""
        return [*self._kept, *([f"{self._dropped} more warnings were dropped."] if self._dropped else [])]


@dataclass(slots=True)
class _Scope:
    """Collects what the job or a step reports, including reports of tasks and threads that it starts."""

    step: str
    warnings: _Warnings
    tokens: int = 0
    repeat_on_restart: bool = False
    files: dict[str, SavedFile] = field(default_factory=dict)
    """The saved files by path."""


_step_scopes: ContextVar[tuple[_Scope, ...]] = ContextVar("step_scopes", default=())
"""The scopes of the step that runs and of the steps around it, innermost first."""


class _Restored(NamedTuple):
    """The stored output of a step."""

    value: Any


class _JobContext:
    """Implements `processor.JobContext`."""

    def __init__(
        self,
        assignment: Assignment,
        parameters: BaseModel,
        send: SendMessage,
        post: PostMessage,
        is_stopping: Callable[[], bool],
    ) -> None:
        self.job_id = assignment.job_id
        self.attempt = assignment.attempt
        self._assignment = assignment
        self.parameters = parameters
        self._send = send
        self._post = post
        self._job_scope = _Scope("starting", _Warnings(_WARNING_BYTES))
        """The scope of the job. Its step is the one that started last."""
        self._percent = 0.0
        self._count_lock = threading.Lock()
        self._is_stopping = is_stopping
        self._loop = asyncio.get_running_loop()
        self._is_closed = False

    @property
    def _scopes(self) -> tuple[_Scope, ...]:
        return (*_step_scopes.get(), self._job_scope)

    @property
    def is_cancelled(self) -> bool:
        return self._is_stopping()

    @property
    def scratch_dir(self) -> Path:
        scratch = self._assignment.scratch_dir
        for directory in (scratch.parent, scratch):  # not its parents, which belong to the worker
            directory.mkdir(mode=0o700, exist_ok=True)
        return scratch

    @property
    def saved_files(self) -> Sequence[SavedFile]:
        with self._count_lock:
            return list(self._job_scope.files.values())

    async def step(
        self, name: str, function: Callable[..., Any], /, *args: Any, share: timedelta | None = None, **kwargs: Any
    ) -> Any:
        full_name, name = to_safe_str(name), to_text(name, 200)
        self._job_scope.step = name
        try:
            adapter = get_return_adapter(function)
        except UnsupportedType as error:
            raise ProcessorError("INVALID_RESULT", f'step "{name}" cannot be stored: {error}.') from error
        # The digest covers the whole name: truncated names of two steps may be equal.
        digest_name = name if full_name == name else ascii(full_name)
        inputs = to_json(_bind_inputs(function, args, kwargs), f'step "{name}" inputs')
        key = compute_canonical_digest({"step": digest_name, "inputs": inputs})
        if (completed := self._assignment.completed_steps.get(key)) is not None:
            restored = self._restore(adapter, completed.output, f"Step {name}", "an earlier attempt")
            if restored is not None:
                self._add_completed(completed)
                return restored.value
        started_at, scope = time.monotonic(), _Scope(name, _Warnings(MAX_STEP_WARNING_BYTES))
        if share is not None and not self._assignment.can_share_steps:
            message = f'step "{name}" cannot be shared, because the job type has no version: @job(…, version="1").'
            raise ProcessorError("STEP_NOT_SHAREABLE", message)
        shared = restored = None
        if share is not None and self._assignment.can_use_shared_steps:
            shared = await self._send_message(messages.FindSharedStep(key, share.total_seconds()))
        if shared is not None:
            restored = self._restore(adapter, shared["output"], f"Step {name}", shared["job_id"])
        if shared is not None and restored is not None:
            output, value, reused_from = shared["output"], restored.value, shared["job_id"]
            self._add_files(find_result_files([output, shared["files"]]), scope)
        else:
            token = _step_scopes.set((scope, *_step_scopes.get()))
            try:
                output = dump_value(adapter, await _call(function, args, kwargs), f'step "{name}" output')
            finally:
                _step_scopes.reset(token)
            value, reused_from = load_value(adapter, output), None
        named = {(file.path, file.sha256) for file in find_result_files(output)}
        completed = StepCompleted(
            attempt=self.attempt,
            step=name,
            key=key,
            output=output,
            duration_s=round(time.monotonic() - started_at, 3),
            tokens_used=scope.tokens,
            warnings=scope.warnings.to_list(),
            reused_from=reused_from,
            repeat_on_restart=scope.repeat_on_restart,
            files=[
                ResultFile(**file.model_dump())
                for file in scope.files.values()
                if (file.path, file.sha256) not in named
            ],
        )
        await self._send_message(messages.StepResult(completed, is_shared=share is not None))
        return value

    def _restore(self, adapter: TypeAdapter[Any], output: JSON, what: str, source: str) -> _Restored | None:
        """Return a stored output with its type; None if it is not valid for the type, so that the step must run."""
        try:
            restored = _Restored(load_value(adapter, output))
        except ValidationError:
            self.log("warning", f"{what} of {source} runs again: its stored output does not have the declared type.")
            return None
        self.log("info", f"{what} is reused from {source}.")
        return restored

    def _add_completed(self, completed: StepCompleted) -> None:
        """Count a step of an earlier attempt as if it had run."""
        for warning in completed.warnings:
            self._add_warning(warning)
        if completed.repeat_on_restart:
            self._mark_for_restart()
        self.add_tokens(completed.tokens_used)
        self._add_files(find_step_files(completed))

    def _add_files(self, files: Iterable[ResultFile], *scopes: _Scope) -> None:
        saved = [SavedFile(**file.model_dump()) for file in files]
        with self._count_lock:
            for scope in (*scopes, *self._scopes):
                scope.files |= {file.path: file for file in saved}

    def report_progress(self, percent: float, message: str) -> Awaitable[None]:
        self._report(messages.Progress(self._scopes[0].step, self._clip_percent(percent), to_text(message, 1000)))
        return _DONE

    def _clip_percent(self, percent: float) -> float:
        try:
            clipped = min(max(float(percent), 0.0), 100.0)
        except (TypeError, ValueError, OverflowError):
            return self._percent
        if clipped == clipped:  # not NaN
            self._percent = round(clipped, 1)
        return self._percent

    def log(self, level: LogLevel, message: str, *, logger: str = "") -> Awaitable[None]:
        level = level if level in _LEVELS else "info"
        self._report(messages.LogEntries([(time.time(), level, to_text(message), to_text(logger, 200))]))
        return _DONE

    def warn(self, message: str, *, repeat_on_restart: bool = False) -> Awaitable[None]:
        text = to_text(message, 2000)
        self._add_warning(text)
        if repeat_on_restart:
            self._mark_for_restart()
        return self.log("warning", text)

    def _add_warning(self, warning: str) -> None:
        with self._count_lock:
            for scope in self._scopes:
                scope.warnings.add(warning)

    def _mark_for_restart(self) -> None:
        """Let a restart of the job repeat the steps that run now: the current one and those around it."""
        for scope in _step_scopes.get():
            scope.repeat_on_restart = True

    def add_tokens(self, tokens: int) -> None:
        tokens = operator.index(tokens)  # raises TypeError unless it is an integer
        with self._count_lock:
            for scope in self._scopes:
                scope.tokens += tokens

    async def save(self, path: str, content: bytes | Path, media_type: str) -> SavedFile:
        path, media_type = normalize_path(to_json(path, "save() path")), to_json(media_type, "save() media_type")
        store_content = _make_store_call(DirectoryStore(self._assignment.inbox_dir, is_durable=False), content)
        try:
            stored = await asyncio.get_running_loop().run_in_executor(_file_threads, store_content)
        except NotARegularFile as error:
            message = f"save() content {to_text(error)}. Give the path of a regular file, or bytes."
            raise ProcessorError("INVALID_RESULT", message) from error
        except FileTooLarge as error:
            raise ProcessorError("INVALID_RESULT", f"save() content {to_text(error)}.") from error
        path = await self._send_message(messages.FileSaved(stored.sha256, path))
        saved = SavedFile(path=path, sha256=stored.sha256, size=stored.size, media_type=media_type)
        self._add_files([ResultFile(**saved.model_dump())])
        return saved

    def build_completed(self, results: object, seconds: float) -> messages.AttemptCompleted:
        if not isinstance(results, Results):
            problem = f"the processor returned a {get_type_name(results)}"
            raise InvalidResult("The result", problem, "Return jobledger.Results.")
        values = {name: getattr(results, name) for name in Results.model_fields}
        values["tokens_used"] += self._job_scope.tokens
        data = {name: to_json(value, f"results.{name}") for name, value in values.items()}
        return messages.AttemptCompleted(data, self._job_scope.warnings.to_list(), round(seconds, 3))

    def close(self) -> None:
        """Reject further messages. A task that the processor did not end must not report after the attempt."""
        self._is_closed = True

    def _require_open(self) -> None:
        if self._is_closed:
            raise RuntimeError("the attempt has ended: do not use the job context after run() has returned")

    def _report(self, message: messages.LogEntries | messages.Progress) -> None:
        self._require_open()
        self._post(message)

    async def _send_message(self, message: messages.Message) -> Any:
        self._require_open()
        if asyncio.get_running_loop() is self._loop:
            return await self._send(message)
        # Called on another thread's event loop. The connection belongs to the job's own loop.
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._send(message), self._loop))


def _bind_inputs(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a step by parameter, so that `f(1)` and `f(x=1)` are the same step.

    Raises:
        TypeError: The function does not accept the arguments.
    """
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function of C without a signature
        bound: dict[str, Any] = {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    else:
        bound = dict(signature.bind(*args, **kwargs).arguments)
    return {name: dump_argument(function, name, value) for name, value in bound.items() if not is_context(value)}


async def _call(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    """Call the function of a step. One that is not asynchronous runs in a thread."""
    if is_asynchronous(function):
        return await function(*args, **kwargs)
    value = await run_in_thread(partial(function, *args, **kwargs))
    return await value if inspect.isawaitable(value) else value


def _make_store_call(inbox: DirectoryStore, content: object) -> Callable[[], StoredFile]:
    if isinstance(content, Path):
        return partial(inbox.put_file, content)
    if isinstance(content, bytes | bytearray | memoryview):
        return partial(inbox.put_bytes, bytes(content))
    raise TypeError(f"save() takes bytes or a Path as content, not a {get_type_name(content)}")
