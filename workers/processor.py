"""The interface between processors and Jobledger.

A processor implements one job type. It imports only this module, or the same names from `jobledger`.
`attempts/executor.py` runs processors, in job processes or inline.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol, TypeVar, overload

from pydantic import BaseModel, ConfigDict, Field

from jobledger.workers.retry import Duration, parse_duration

R = TypeVar("R")

JSON = Any
"""A JSON value: object, list, string, number, boolean or null."""

Isolation = Literal["process", "inline"]
LogLevel = Literal["debug", "info", "warning", "error"]


class ProcessorError(Exception):
    """Signals that the processor could not do its work. Becomes the job's `error`.

    Attributes:
        code: Stable UPPER_CASE identifier of the error, for programs.
        message: Description of the error, for people. A complete sentence.
        transient: Whether the same work may succeed later, for example after a timeout or a 503. Errors of this class
            are retried only if they are transient. Any other exception is retried, see `Retry`.
        details: More information about the error, as JSON. `retry_after`: if the error is transient, the job is not
            retried for so many seconds, at most for `event_worker.retry_max_seconds`.
    """

    def __init__(
        self, code: str, message: str, *, transient: bool = False, details: Mapping[str, JSON] | None = None
    ) -> None:
        """Initialize the error. See the class for the arguments."""
        super().__init__(message)
        self.code = code
        self.message = message
        self.transient = transient
        self.details = dict(details or {})


class PermanentError(ProcessorError):
    """Ends the job: the same work would fail again."""

    def __init__(
        self, message: str, *, code: str = "PERMANENT_ERROR", details: Mapping[str, JSON] | None = None
    ) -> None:
        """Initialize the error. See `ProcessorError` for the arguments."""
        super().__init__(code, message, details=details)


class TransientError(ProcessorError):
    """Fails the attempt. The job is retried, unless its attempts are used up or its type has `retry=None`."""

    def __init__(
        self,
        message: str,
        *,
        code: str = "TRANSIENT_ERROR",
        retry_after: Duration | None = None,
        details: Mapping[str, JSON] | None = None,
    ) -> None:
        """Initialize the error. See `ProcessorError` for the other arguments.

        Args:
            retry_after: The job is not retried earlier.
        """
        wait = {} if retry_after is None else {"retry_after": parse_duration(retry_after, "retry_after")}
        super().__init__(code, message, transient=True, details={**(details or {}), **wait})


class SavedFile(BaseModel):
    """A result file in the result store.

    Attributes:
        path: Relative path below the location where results are served.
        sha256: SHA-256 digest of the content, in hexadecimal.
        size: Size of the content in bytes.
        media_type: Media type of the content, for example `text/markdown`.
    """

    model_config = ConfigDict(frozen=True)

    path: str
    sha256: str
    size: int
    media_type: str


class Results(BaseModel):
    """The results of a job.

    Attributes:
        markdown: The main file, if there is one.
        assets: Other files that belong to the results.
        output: Any JSON. It is shown in `results.output`.
        metadata: Additional facts about the results. They are shown in `results.metadata`.
        tokens_used: Language model tokens used in addition to those reported with `JobContext.add_tokens`.
    """

    model_config = ConfigDict(frozen=True)

    markdown: SavedFile | None = None
    assets: list[SavedFile] = Field(default_factory=list)
    output: JSON = None
    metadata: dict[str, JSON] = Field(default_factory=dict)
    tokens_used: int = 0


class JobContext(Protocol):
    """One attempt at a job, as seen by its processor.

    All methods may be called concurrently from any number of tasks, and from the event loops of other threads.
    """

    @property
    def job_id(self) -> str:
        """The ID of the job."""

    @property
    def attempt(self) -> int:
        """The number of the attempt. The first attempt is 1."""

    @property
    def parameters(self) -> Any:
        """The job's parameters, as a validated instance of the processor's `Parameters`."""

    @property
    def scratch_dir(self) -> Path:
        """A directory for temporary files of this attempt. Empty at first, and removed after the attempt."""

    @property
    def is_cancelled(self) -> bool:
        """Whether the job was cancelled or must stop for another reason. Stop as soon as possible."""

    @property
    def saved_files(self) -> Sequence[SavedFile]:
        """The files that this attempt has saved, and those of the steps that it has reused."""

    @overload
    async def step(
        self,
        name: str,
        function: Callable[..., Awaitable[R]],
        /,
        *args: Any,
        share: timedelta | None = None,
        **kwargs: Any,
    ) -> R: ...

    @overload
    async def step(
        self, name: str, function: Callable[..., R], /, *args: Any, share: timedelta | None = None, **kwargs: Any
    ) -> R: ...

    async def step(
        self,
        name: str,
        function: Callable[..., Any],
        /,
        *args: Any,
        share: timedelta | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run a step whose output is stored, so that a later attempt does not repeat it.

        Name and arguments identify the step. If an earlier attempt completed it, `function` is not called, and the
        stored output is returned. Files that were saved in the step are kept with it. After a restart of the job, a
        step that called `warn` with `repeat_on_restart` is not reused.

        The output is stored as JSON, and returned as the type that `function` declares as its result. Without a
        declaration, it is returned as stored: for example, a tuple is returned as a list. A stored output that is not
        valid for the declared type is ignored, and the step runs again.

        A step may run other steps. Those that completed are reused even if the outer step did not complete or is
        repeated.

        Args:
            name: Name of the step. Different names identify different steps.
            function: Does the work. If it is not asynchronous, it runs in a thread.
            args: Arguments of `function`, as JSON, pydantic models or dataclasses. A job context is passed and not
                part of the inputs. Bind anything else on which the output does not depend, such as a client, with a
                closure or `functools.partial`.
            share: If set, jobs share the step: other jobs may reuse its output, and this job may reuse the output of
                another job instead of calling `function`, if it is not older. Reuse requires the same owner, job type,
                version of the job type, step name and arguments. The reused step must also have been shared and have
                completed without warnings. Do not share a step with an effect that each job needs, such as sending a
                mail.
            kwargs: Keyword arguments of `function`.

        Returns:
            The output.

        Raises:
            ProcessorError: INVALID_RESULT if the arguments or the output cannot be stored, if the output does not have
                the declared type, or if it contains a file that the job has not saved. STEP_NOT_SHAREABLE if the job
                type has no version.
        """

    def report_progress(self, percent: float, message: str) -> Awaitable[None]:
        """Report the progress of the whole job. Takes effect at the call: awaiting it is optional.

        Args:
            percent: Progress from 0 to 100. A value below an earlier one of the attempt counts as the earlier one.
            message: Short description of the current activity, for people.
        """

    def log(self, level: LogLevel, message: str, *, logger: str = "") -> Awaitable[None]:
        """Add an entry to the job's log. Takes effect at the call: awaiting it is optional.

        Args:
            level: Severity of the entry.
            message: Text of the entry. Text beyond 10,000 characters is cut off.
            logger: Name of the logger, if the entry comes from one.
        """

    def warn(self, message: str, *, repeat_on_restart: bool = False) -> Awaitable[None]:
        """Record that the results are incomplete or of lower quality. The warning appears in `metadata.warnings`.

        Takes effect at the call: awaiting it is optional.

        Args:
            message: What could not be done, for people. A complete sentence.
            repeat_on_restart: Whether the same work may give a better result later, because the cause may be gone: a
                service was down, a key was wrong, a file or program was missing. If the job is restarted, it repeats
                the current step and the steps around it. Without effect outside of a step.
        """

    def add_tokens(self, tokens: int) -> None:
        """Add to the number of language model tokens used. They are counted for the current step and the job.

        Args:
            tokens: Number of tokens to add.

        Raises:
            TypeError: `tokens` is not an integer.
        """

    async def save(self, path: str, content: bytes | Path, media_type: str) -> SavedFile:
        """Save a result file.

        The path of the returned file may differ from `path`. It is in Unicode normal form C. If another job owns the
        path, a suffix of this job is inserted before the extension. Use the returned path in links. Saving a path again
        replaces the file: the `SavedFile` in the results counts.

        Args:
            path: Relative path below the location where results are served, such as `reports/2025/summary.md`.
            content: The content, or the path of a regular file, which is moved and not copied.
            media_type: Media type of the content.

        Returns:
            The saved file.

        Raises:
            ProcessorError: INVALID_PATH if `path` is absolute, has an empty part, `.` or `..`, has a part that begins
                or ends with a space or ends with a dot, contains a control or format character, a backslash or a
                percent-encoded character, ends in `/link`, or is longer than 1000 bytes or 200 bytes in a part.
                PATH_TAKEN if other jobs own `path` and all paths derived from it. INVALID_RESULT if `content` is not a
                regular file or is larger than 16 GiB.
            TypeError: `content` is neither bytes nor a Path.
        """


class Processor(Protocol):
    """A job type.

    Register the class as an entry point in the group `jobledger.processors`. The name of the entry point is the job
    type. Each attempt has its own instance.

    Attributes:
        job_type: Name of the job type.
        isolation: `process` runs each attempt in its own process, which contains crashes, leaks and hangs. Use `inline`
            only for cheap asynchronous work.
        preload: Names of modules that take long to import. They are imported once, before job processes are forked.
        Parameters: Pydantic model that validates the `parameters` of a submitted job.
        Settings: Pydantic model that validates the section `processors.<job_type>` of config.yaml.

    Optional attributes:
        retry: A `Retry`, or None: jobs are never retried. Default: `Retry()`.
        timeout: Timeout of jobs whose submission has none, as a `Duration`. Default: one hour.
        version: Version of the job type for shared steps. Default: that of the distribution with the entry point.
        shared_directories: Static method. Returns the directories to which all jobs of the type write.
    """

    job_type: ClassVar[str]
    isolation: ClassVar[Isolation]
    preload: ClassVar[Sequence[str]]
    Parameters: ClassVar[type[BaseModel]]
    Settings: ClassVar[type[BaseModel]]

    def __init__(self, settings: Any) -> None:
        """Initialize the processor for one attempt.

        Args:
            settings: Validated instance of `Settings`.
        """

    async def run(self, job: JobContext) -> Results:
        """Do the work of one attempt.

        Args:
            job: The attempt.

        Returns:
            The results of the job.

        Raises:
            ProcessorError: The work could not be done.
        """
