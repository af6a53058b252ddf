"""Run one attempt at a job, and provide its `JobContext`. Runs in a job process, or inline in the worker.

Everything that the processor reports becomes a message (`messages.py`) to the worker. Only the worker writes to the
event store. The methods of the job context may be called concurrently from any number of tasks, and from the event
loops of other threads.
"""

from __future__ import annotations

import asyncio
import operator
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from pydantic import BaseModel, Field

from jobledger.ledger.domain.canonical_json import compute_canonical_digest
from jobledger.ledger.domain.errors import FileTooLarge, NotARegularFile
from jobledger.ledger.domain.events import StepCompleted
from jobledger.ledger.domain.limits import MAX_STEP_WARNING_BYTES
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import StoredFile
from jobledger.workers.child import messages
from jobledger.workers.child.failures import convert_exception_to_failure
from jobledger.workers.processor import JSON, LogLevel, Processor, ProcessorError, Results, SavedFile
from jobledger.workers.results.conversion import InvalidResult, get_type_name, to_json, to_safe_str, to_text
from jobledger.workers.results.paths import normalize_path
from jobledger.workers.sandbox.confinement import ConfinementSettings

T = TypeVar("T")
SendMessage = Callable[[messages.Message], Coroutine[Any, Any, Any]]
"""Sends a message to the worker and returns the response, if there is one. Raises ProcessorError if it is rejected."""
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
        has_files: Whether the attempt may have files, because this process has used its directories.
    """

    job_id: str
    attempt: int
    job_type: str
    parameters: dict[str, Any]
    settings: dict[str, Any]
    completed_steps: dict[str, StepCompleted]
    can_use_shared_steps: bool = False
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
    assignment: Assignment, processor: type[Processor], send: SendMessage, is_stopping: Callable[[], bool]
) -> messages.AttemptCompleted | messages.AttemptFailed:
    """Run the processor and return the last message of the attempt. Never raises.

    Args:
        is_stopping: Returns whether the job must stop.
    """
    started_at = time.monotonic()
    job: _JobContext | None = None
    try:
        job = _JobContext(assignment, processor.Parameters.model_validate(assignment.parameters), send, is_stopping)
        results: object = await processor(processor.Settings.model_validate(assignment.settings)).run(job)
        return job.build_completed(results, time.monotonic() - started_at)
    except BaseException as error:  # noqa: BLE001 - a processor may raise anything; it fails only its job
        return convert_exception_to_failure(error, scratch_dir=assignment.attempt_dir.parent)
    finally:
        if job is not None:
            job.close()


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
    """Collects warnings and tokens of the job or of a step, including those of tasks and threads that it starts."""

    step: str
    warnings: _Warnings
    tokens: int = 0


_step_scopes: ContextVar[tuple[_Scope, ...]] = ContextVar("step_scopes", default=())
"""The scopes of the step that runs and of the steps around it, innermost first."""


class _JobContext:
    """Implements `processor.JobContext`."""

    def __init__(
        self, assignment: Assignment, parameters: BaseModel, send: SendMessage, is_stopping: Callable[[], bool]
    ) -> None:
        self.job_id = assignment.job_id
        self.attempt = assignment.attempt
        self._assignment = assignment
        self.parameters = parameters
        self._send = send
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

    async def run_step(
        self,
        name: str,
        inputs: Mapping[str, JSON],
        function: Callable[[], Awaitable[JSON]],
        *,
        share_max_age: timedelta | None = None,
    ) -> JSON:
        full_name, name = to_safe_str(name), to_text(name, 200)
        self._job_scope.step = name
        # The digest covers the whole name: truncated names of two steps may be equal.
        digest_name = name if full_name == name else ascii(full_name)
        key = compute_canonical_digest({"step": digest_name, "inputs": to_json(dict(inputs), f'step "{name}" inputs')})
        if (completed := self._assignment.completed_steps.get(key)) is not None:
            for warning in completed.warnings:
                self._add_warning(warning)
            self.add_tokens(completed.tokens_used)
            await self.log("info", f"Step {name} is reused from an earlier attempt.")
            return completed.output
        started_at, scope = time.monotonic(), _Scope(name, _Warnings(MAX_STEP_WARNING_BYTES))
        shared = None
        if share_max_age is not None and self._assignment.can_use_shared_steps:
            shared = await self._send_message(messages.FindSharedStep(key, share_max_age.total_seconds()))
        if shared is not None:
            await self.log("info", f"Step {name} is reused from {shared['job_id']}.")
            output = shared["output"]
        else:
            token = _step_scopes.set((scope, *_step_scopes.get()))
            try:
                output = to_json(await function(), f'step "{name}" output')
            finally:
                _step_scopes.reset(token)
        completed = StepCompleted(
            attempt=self.attempt,
            step=name,
            key=key,
            output=output,
            duration_s=round(time.monotonic() - started_at, 3),
            tokens_used=scope.tokens,
            warnings=scope.warnings.to_list(),
            reused_from=shared and shared["job_id"],
        )
        await self._send_message(messages.StepResult(completed, is_shared=share_max_age is not None))
        return output

    async def report_progress(self, percent: float, message: str) -> None:
        progress = messages.Progress(self._scopes[0].step, self._clip_percent(percent), to_text(message, 1000))
        await self._send_message(progress)

    def _clip_percent(self, percent: float) -> float:
        try:
            clipped = min(max(float(percent), 0.0), 100.0)
        except (TypeError, ValueError, OverflowError):
            return self._percent
        if clipped == clipped:  # not NaN
            self._percent = round(clipped, 1)
        return self._percent

    async def log(self, level: LogLevel, message: str) -> None:
        level = level if level in _LEVELS else "info"
        await self._send_message(messages.LogEntries([(time.time(), level, to_text(message))]))

    async def warn(self, message: str) -> None:
        text = to_text(message, 2000)
        self._add_warning(text)
        await self.log("warning", text)

    def _add_warning(self, warning: str) -> None:
        with self._count_lock:
            for scope in self._scopes:
                scope.warnings.add(warning)

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
        return SavedFile(path=path, sha256=stored.sha256, size=stored.size, media_type=media_type)

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

    async def _send_message(self, message: messages.Message) -> Any:
        if self._is_closed:
            raise RuntimeError("the attempt has ended: do not use the job context after run() has returned")
        if asyncio.get_running_loop() is self._loop:
            return await self._send(message)
        # Called on another thread's event loop. The connection belongs to the job's own loop.
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._send(message), self._loop))


def _make_store_call(inbox: DirectoryStore, content: object) -> Callable[[], StoredFile]:
    if isinstance(content, Path):
        return partial(inbox.put_file, content)
    if isinstance(content, bytes | bytearray | memoryview):
        return partial(inbox.put_bytes, bytes(content))
    raise TypeError(f"save() takes bytes or a Path as content, not a {get_type_name(content)}")
