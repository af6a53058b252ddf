"""What one attempt of a job in a test led to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Generic, TypeVar, cast

from jobledger.ledger.domain.events import ErrorInfo, JobResults, LogEntry, StepCompleted
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import JobStatus

R_co = TypeVar("R_co", covariant=True)


class JobNotCompleted(AssertionError):
    """The result of a job was read that has none. The text contains its error and traceback."""


@dataclass(frozen=True, slots=True)
class Progress:
    """A report of progress, in percent of the whole job."""

    percent: float
    message: str
    step: str


@dataclass(frozen=True, slots=True)
class OutcomeFile:
    """A file in the results of a job."""

    content: bytes
    media_type: str

    @property
    def text(self) -> str:
        """The content as UTF-8."""
        return self.content.decode()


@dataclass(frozen=True, slots=True)
class Outcome(Generic[R_co]):
    """What one attempt of a job led to.

    Attributes:
        status: The status of the job after the attempt. `pending`: the job will be retried.
        attempt: The number of the attempt.
        error: The error of the attempt; None if there is none.
        retry_in: The time until the next attempt; None if there is none.
        logs: The entries of the job's log, in order: `ctx.log`, `logging`, warnings and output.
        progress: All reports of progress, in order.
        steps: The steps that ran in this attempt and completed. Reused steps are not included.
        files: The files in the results, by path. Empty if the job is not completed.
        warnings: The warnings in the results. Empty if the job is not completed; the log has them as well.
        results: The results as the API returns them; None if the job is not completed.
    """

    status: JobStatus
    attempt: int
    error: ErrorInfo | None
    retry_in: timedelta | None
    logs: Sequence[LogEntry]
    progress: Sequence[Progress]
    steps: Sequence[StepCompleted]
    files: Mapping[str, OutcomeFile]
    warnings: Sequence[str]
    results: JobResults | None
    job_id: str
    job: Job = field(repr=False)
    """The state of the job after the attempt, for `with_options(after=…)`."""
    contents: Mapping[str, bytes] = field(repr=False)
    """The contents of all files of this and earlier attempts, by digest."""
    read_result: Callable[[Any], Any] = field(repr=False)
    """Converts JSON to the type of the result."""

    @property
    def result(self) -> R_co:
        """What the job function returned, after a conversion to JSON and back.

        Raises:
            JobNotCompleted: The job is not completed.
        """
        if self.results is None:
            raise JobNotCompleted(self._describe())
        return cast("R_co", self.read_result(self.results.output))

    @property
    def will_retry(self) -> bool:
        """Whether the attempt failed and the job will be retried."""
        return self.status == "pending"

    def _describe(self) -> str:
        status = "pending and will be retried" if self.will_retry else self.status
        lines = [f"there is no result: the job is {status} after attempt {self.attempt}"]
        if self.error is not None:
            lines.append(f"{self.error.code}: {self.error.message}")
            lines.append(str(self.error.details.get("traceback", "")))
        return "\n".join(lines).rstrip()
