"""The interface between processors and Jobledger.

A processor implements one job type. It imports only this module, or the same names from `jobledger`.
`attempts/executor.py` runs processors, in job processes or inline.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

JSON = Any
"""A JSON value: object, list, string, number, boolean or null."""

Isolation = Literal["process", "inline"]
LogLevel = Literal["debug", "info", "warning", "error"]


class ProcessorError(Exception):
    """Signals that the processor could not do its work. Becomes the job's `error`.

    Attributes:
        code: Stable UPPER_CASE identifier of the error, for programs.
        message: Description of the error, for people. A complete sentence.
        transient: Whether the same work may succeed later, for example after a timeout or a 503. Only transient errors
            are retried.
        details: More information about the error, as JSON.
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
        metadata: Additional facts about the results. They are shown in `results.metadata`.
        tokens_used: Language model tokens used in addition to those reported with `JobContext.add_tokens`.
    """

    model_config = ConfigDict(frozen=True)

    markdown: SavedFile | None = None
    assets: list[SavedFile] = Field(default_factory=list)
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

    async def run_step(
        self,
        name: str,
        inputs: Mapping[str, JSON],
        function: Callable[[], Awaitable[JSON]],
        *,
        share_max_age: timedelta | None = None,
    ) -> JSON:
        """Run a step whose output is stored, so that a later attempt does not repeat it.

        If an earlier attempt completed the step with the same inputs, `function` is not called, and the stored output
        is returned. The output must contain the files saved in the step, as `SavedFile.model_dump()`.

        Args:
            name: Name of the step. Different names identify different steps.
            inputs: Everything that the output depends on, as JSON.
            function: Does the work and returns the output, as JSON.
            share_max_age: If set, jobs share the step: other jobs may reuse its output, and this job may reuse the
                output of another job instead of calling `function`. Reuse requires the same owner, job type, step name,
                inputs, and version of the processor's distribution. The reused step must also have been shared, have
                completed without warnings, and not be older than `share_max_age`. Do not share a step with an effect
                that each job needs, such as sending a mail.

        Returns:
            The output as stored. For example, a tuple is returned as a list.

        Raises:
            ProcessorError: INVALID_RESULT if the inputs or the output cannot be stored, or if the output contains a
                file that the job has not saved.
        """

    async def report_progress(self, percent: float, message: str) -> None:
        """Report the progress of the whole job.

        Args:
            percent: Progress from 0 to 100. A value below an earlier one of the attempt counts as the earlier one.
            message: Short description of the current activity, for people.
        """

    async def log(self, level: LogLevel, message: str) -> None:
        """Add an entry to the job's log.

        Args:
            level: Severity of the entry.
            message: Text of the entry. Text beyond 10,000 characters is cut off.
        """

    async def warn(self, message: str) -> None:
        """Record that the results are incomplete or of lower quality. The warning appears in `metadata.warnings`.

        Args:
            message: What could not be done, for people. A complete sentence.
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

    An optional static method `shared_directories()` returns the directories to which all jobs of the type write.
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
