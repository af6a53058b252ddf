"""ledger: what can be asked for. One class a command, imperative; answered by `decide` in `job.py` and `batch.py`.

Worker commands carry `attempt`: they are refused when the job has moved on to another one. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jobledger.ledger.domain.events import (
    AccessControl,
    BatchCounts,
    BatchSubmitted,
    BatchSummary,
    Failure,
    JobResults,
    JobSubmitted,
    LogEntry,
)


@dataclass(frozen=True, slots=True)
class SubmitJob:
    """Ask for a job: the event holds everything that is asked for."""

    job: JobSubmitted


@dataclass(frozen=True, slots=True)
class ClaimJob:
    """Take a waiting job whose time has come (`now` is not before its `not_before` or retry time)."""

    worker_id: str
    now: datetime


@dataclass(frozen=True, slots=True)
class ReportProgress:
    worker_id: str
    attempt: int
    step: str
    percent: float
    message: str


@dataclass(frozen=True, slots=True)
class AddLogEntries:
    worker_id: str
    attempt: int
    entries: tuple[LogEntry, ...]


@dataclass(frozen=True, slots=True)
class CompleteStep:
    """Remember that a step is done; `key` is the digest of its inputs, `duration_s` in seconds."""

    worker_id: str
    attempt: int
    step: str
    key: str
    output: Any
    duration_s: float
    tokens_used: int = 0
    warnings: tuple[str, ...] = ()
    reused_from: str | None = None
    cache_version: str | None = None


@dataclass(frozen=True, slots=True)
class CompleteJob:
    worker_id: str
    attempt: int
    results: JobResults


@dataclass(frozen=True, slots=True)
class FailAttempt:
    """The attempt failed. `retry_at` is when to try again if the error may pass, None if it will not."""

    worker_id: str
    attempt: int
    error: Failure
    retry_at: datetime | None


@dataclass(frozen=True, slots=True)
class ReleaseJob:
    """Give a running job back unharmed. `is_machine_failure`: because the worker's machine cannot run it."""

    worker_id: str
    attempt: int
    reason: str
    is_machine_failure: bool = False


@dataclass(frozen=True, slots=True)
class ConfirmCancel:
    """The worker has stopped the job as it was asked to."""

    worker_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class ExpireLease:
    """The server's clock says that the worker's lease has run out."""

    worker_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class CancelJob:
    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class RestartJob:
    by: str
    reason: str | None = None
    reuse_steps: bool = True


@dataclass(frozen=True, slots=True)
class UpdateJob:
    """Change what is named. `access_control` can be changed at any time, the rest only while the job waits."""

    by: str
    parameters: Mapping[str, Any] | None = None
    priority: int | None = None
    not_before: datetime | None = None
    access_control: AccessControl | None = None


@dataclass(frozen=True, slots=True)
class ChangeAccess:
    by: str
    access_control: AccessControl


@dataclass(frozen=True, slots=True)
class Archive:
    """Put a job or batch out of sight."""

    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Unarchive:
    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a job or batch from the views; a running job has to be cancelled first."""

    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class SubmitBatch:
    batch: BatchSubmitted


@dataclass(frozen=True, slots=True)
class PauseBatch:
    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class ResumeBatch:
    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class FinishBatch:
    """The views say that every job of the batch has ended, so and so many in each way."""

    counts: BatchCounts
    summary: BatchSummary


@dataclass(frozen=True, slots=True)
class ReopenBatch:
    """The views say that a finished batch has an unfinished job again."""


@dataclass(frozen=True, slots=True)
class RecordAttempt:
    """The receiver was called, and this came of it. `next_attempt_at` is when to try again, None: not any more."""

    duration_s: float
    body_sha256: str | None
    status_code: int | None = None
    error: Failure | None = None
    response: str = ""
    next_attempt_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class AbandonDelivery:
    """Give up without another try."""

    reason: str


@dataclass(frozen=True, slots=True)
class RequeueDelivery:
    """Have it sent, whether it was delivered already, given up, or waits for its next try."""

    by: str
    reason: str | None = None


WorkerCommand = ReportProgress | AddLogEntries | CompleteStep | CompleteJob | FailAttempt | ReleaseJob | ConfirmCancel
JobCommand = (
    SubmitJob
    | ClaimJob
    | WorkerCommand
    | ExpireLease
    | CancelJob
    | RestartJob
    | UpdateJob
    | ChangeAccess
    | Archive
    | Unarchive
    | Delete
)
BatchCommand = (
    SubmitBatch | PauseBatch | ResumeBatch | FinishBatch | ReopenBatch | ChangeAccess | Archive | Unarchive | Delete
)
DeliveryCommand = RecordAttempt | AbandonDelivery | RequeueDelivery
