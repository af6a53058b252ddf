"""workers: what a processor is, and what a job offers it.

Only this interface may be imported by processors; how a job really runs (child process or inline) is `execution.py`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

JSON = Any
"""What JSON can say: objects, lists, strings, numbers, booleans, null."""

Isolation = Literal["process", "inline"]
LogLevel = Literal["debug", "info", "warning", "error"]


class ProcessorError(Exception):
    """The work could not be done; becomes the job's `error`.

    `code` is a stable UPPER_CASE word for programs, the message a sentence for people. `transient` says that the same
    work may succeed later (a timeout, a 503): only then is the job tried again.
    """

    def __init__(
        self, code: str, message: str, *, transient: bool = False, details: Mapping[str, JSON] | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.transient = transient
        self.details = dict(details or {})


class SavedFile(BaseModel):
    """A result file in the store. `path` is relative, below the place where results are served; `size` in bytes."""

    model_config = ConfigDict(frozen=True)

    path: str
    sha256: str
    size: int
    media_type: str


class Results(BaseModel):
    """What a processor hands over when it is done: its main file, the files that belong to it, and what it cost."""

    model_config = ConfigDict(frozen=True)

    markdown: SavedFile | None = None
    assets: list[SavedFile] = Field(default_factory=list)
    metadata: dict[str, JSON] = Field(default_factory=dict)
    """Free facts about the result, shown in `results.metadata`."""
    tokens_used: int = 0
    """Beyond those that were told by `Job.spent`."""


class JobContext(Protocol):
    """One attempt at a job, as its processor sees it."""

    @property
    def job_id(self) -> str: ...

    @property
    def attempt(self) -> int:
        """1 for the first execution."""

    @property
    def parameters(self) -> Any:
        """The processor's own `Parameters` model, validated."""

    @property
    def scratch_dir(self) -> Path:
        """An empty directory of this attempt's own, removed afterwards."""

    @property
    def is_cancelled(self) -> bool:
        """Somebody asked for the job to be cancelled: stop at the next convenient point."""

    async def run_step(
        self,
        name: str,
        inputs: Mapping[str, JSON],
        function: Callable[[], Awaitable[JSON]],
        *,
        share_max_age: timedelta | None = None,
    ) -> JSON:
        """Run `function` as the checkpointed step `name` and return its JSON output.

        A step that already finished with the same `inputs` in an earlier attempt is not run again: its output is
        returned as it was. Files saved inside belong into the output (`SavedFile.model_dump()`).

        Args:
            name: The name of the step. Steps with different names are different steps.
            inputs: Everything that the output depends on, as JSON.
            function: Does the work and returns the output.
            share: Without it, the step belongs to this job alone. With it, other jobs may reuse the output, and the
                output of another job is reused instead of calling `function`: of a job with the same owner, job type
                and version of the processor's distribution, whose step was shared too, had the same name and inputs,
                finished without warnings, and is not older than `share`. Never share a step with an effect that each
                job needs, such as a mail.
        """

    async def report_progress(self, percent: float, message: str) -> None:
        """Tell how far the whole job is: `percent` 0 to 100, and a short sentence for people."""

    async def log(self, level: LogLevel, message: str) -> None:
        """Add a line to the job's log."""

    async def warn(self, message: str) -> None:
        """Note that something could not be done and the result is poorer for it; ends up in `metadata.warnings`."""

    def add_tokens(self, tokens: int) -> None:
        """Note tokens of language models that were used: they are told of the step, and summed up for the job."""

    async def save(self, path: str, content: bytes | Path, media_type: str) -> SavedFile:
        """Store a result file and return it.

        The path in the result may differ from `path`: it is in Unicode normal form C, and if another job has that path,
        a mark of this job stands before the extension. Make links to the file from it. Saving a path again replaces the
        file: the `SavedFile` that is in the results counts.

        Args:
            path: Relative path below the place where results are served, such as `reports/2025/summary.md`.
            content: The bytes, or a file, which is moved and not copied.
            media_type: Media type of the content.

        Raises:
            ProcessorError: INVALID_PATH, if `path` is absolute, has an empty part, `.` or `..`, has a part that begins
                or ends with a space or ends with a dot, contains a control or format character, a backslash or a
                percent-encoded character, ends in `/link`, or is longer than 1000 bytes or 200 bytes in a part.
                INVALID_RESULT, if `content` is no regular file or larger than 16 GiB.
        """


class Processor(Protocol):
    """A job type. Found by entry point in the group `jobledger.processors`; one instance per attempt."""

    job_type: ClassVar[str]
    isolation: ClassVar[Isolation]
    """`process`, as a rule: a child process, so a crash, leak or hang is contained. `inline`: cheap async work."""
    preload: ClassVar[Sequence[str]]
    """Modules that take long to import: loaded once, before child processes are forked."""
    Parameters: ClassVar[type[BaseModel]]
    """Validates `parameters` when a job is submitted."""
    Settings: ClassVar[type[BaseModel]]
    """Validates the section `processors.<job_type>` of config.yaml."""

    def __init__(self, settings: Any) -> None: ...

    async def run(self, job: JobContext) -> Results:
        """Do the work.

        Raises:
            ProcessorError: it could not be done, and why.
        """
