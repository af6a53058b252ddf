"""The commands: one class each, in the imperative. `decide` in `job`, `batch` and `delivery` handles them. Pure.

Commands of workers carry `attempt`. They are rejected if the job has moved on to another attempt.
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
    """Create a job. The event holds the whole submission."""

    job: JobSubmitted


@dataclass(frozen=True, slots=True)
class ClaimJob:
    """Start the next attempt of a pending job. `now` must not be before `not_before` or the retry time."""

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
    """Record a completed step. `key` is the digest of its inputs; `duration_s` is in seconds."""

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
    """End the attempt with an error. `retry_at` is the time of the retry if the error is transient, else None."""

    worker_id: str
    attempt: int
    error: Failure
    retry_at: datetime | None


@dataclass(frozen=True, slots=True)
class ReleaseJob:
    """Return a running job to the queue. `is_machine_failure`: the worker's machine cannot run it."""

    worker_id: str
    attempt: int
    reason: str
    is_machine_failure: bool = False


@dataclass(frozen=True, slots=True)
class ConfirmCancel:
    """Report that the worker has stopped the job after a request to cancel it."""

    worker_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class ExpireLease:
    """Report that the worker's lease has expired."""

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
    """Change the given fields. `access_control` can change at any time, the others only while the job is pending."""

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
    """Hide a job or batch from default lists."""

    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Unarchive:
    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Delete:
    """Remove a job or batch from the views. Cancel a running job first."""

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
    """Report that every job of the batch has ended, with the number of jobs per outcome."""

    counts: BatchCounts
    summary: BatchSummary


@dataclass(frozen=True, slots=True)
class ReopenBatch:
    """Report that a finished batch has an unfinished job again."""


@dataclass(frozen=True, slots=True)
class RecordAttempt:
    """Record a delivery attempt and its outcome. `retry_at` is the time of the next attempt; None means no retry."""

    duration_s: float
    body_sha256: str | None
    status_code: int | None = None
    error: Failure | None = None
    response: str = ""
    next_attempt_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class AbandonDelivery:
    """Stop retrying a delivery."""

    reason: str


@dataclass(frozen=True, slots=True)
class RequeueDelivery:
    """Send a delivery again, whatever its status."""

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
