"""The commands, with names in the imperative. `decide` in `job`, `batch` and `delivery` handles them. Pure.

One command, `ReportEvent`, records all events that a running attempt reports.
Commands of workers carry the number of the attempt. Only those of the current attempt are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from jobledger.ledger.domain import events


@dataclass(frozen=True, slots=True)
class _UserCommand:
    by: str
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class _AttemptCommand:
    worker_id: str
    attempt: int


@dataclass(frozen=True, slots=True)
class SubmitJob:
    """Create a job. The event holds the whole submission."""

    job: events.JobSubmitted


@dataclass(frozen=True, slots=True)
class ClaimJob:
    """Start the next attempt of a pending job. `now` must not be before `not_before` or the retry time.

    `via`, `seen` and `free_slots`: what is recorded about the decision, see `JobClaimed`.
    """

    worker_id: str
    now: datetime
    via: events.ClaimVia | None = None
    seen: int | None = None
    free_slots: int | None = None


@dataclass(frozen=True, slots=True)
class ReportEvent:
    """Record progress, log entries, a completed step or the results of an attempt: the event holds all of it."""

    worker_id: str
    event: events.JobProgressed | events.JobLogged | events.StepCompleted | events.JobCompleted

    @property
    def attempt(self) -> int:
        return self.event.attempt


@dataclass(frozen=True, slots=True)
class FailAttempt(_AttemptCommand):
    """End the attempt with an error. `retry_at` is the time of the retry if the error is transient, else None."""

    error: events.ErrorInfo
    retry_at: datetime | None


@dataclass(frozen=True, slots=True)
class ReleaseJob(_AttemptCommand):
    """Return a running job to the queue. `is_machine_failure`: the worker's machine cannot run it."""

    reason: str
    is_machine_failure: bool = False


class ConfirmCancel(_AttemptCommand):
    """Report that the worker has stopped the job after a request to cancel it."""


class ExpireLease(_AttemptCommand):
    """Report that the worker's lease has expired."""


class CancelJob(_UserCommand):
    """Cancel a pending job, or request its worker to stop it."""


@dataclass(frozen=True, slots=True)
class RestartJob(_UserCommand):
    """Start a finished job again, with new parameters if any are given. `reuse_steps`: see `events.JobRestarted`."""

    reuse_steps: bool = True
    parameters: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class UpdateJob:
    """Change the given fields. `access_control` can change at any time, the others only while the job is pending."""

    by: str
    parameters: Mapping[str, Any] | None = None
    priority: int | None = None
    not_before: datetime | None = None
    access_control: events.AccessControl | None = None


@dataclass(frozen=True, slots=True)
class ChangeAccess:
    by: str
    access_control: events.AccessControl


class Archive(_UserCommand):
    """Hide a job or batch from default lists."""


class Unarchive(_UserCommand):
    """Show a job or batch in default lists again."""


class Delete(_UserCommand):
    """Remove a job or batch from the views. Cancel a running job first."""


@dataclass(frozen=True, slots=True)
class SubmitBatch:
    batch: events.BatchSubmitted


class PauseBatch(_UserCommand):
    """Do not start the pending jobs of a batch."""


class ResumeBatch(_UserCommand):
    """Start the pending jobs of a paused batch again."""


@dataclass(frozen=True, slots=True)
class FinishBatch:
    """Report that every job of the batch is finished, with the number of jobs per status."""

    counts: events.BatchJobCounts
    summary: events.BatchSummary


@dataclass(frozen=True, slots=True)
class ReopenBatch:
    """Report that a finished batch has an unfinished job again."""


@dataclass(frozen=True, slots=True)
class RecordAttempt:
    """Record a delivery attempt and its outcome. `next_attempt_at` is None if the delivery is not retried."""

    duration_s: float
    body_sha256: str | None
    status_code: int | None = None
    error: events.ErrorInfo | None = None
    response: str = ""
    next_attempt_at: datetime | None = None


@dataclass(frozen=True, slots=True)
class AbandonDelivery:
    """Stop retrying a delivery."""

    reason: str


class RequeueDelivery(_UserCommand):
    """Send a delivery again, whatever its status."""


@dataclass(frozen=True, slots=True)
class StartWorker:
    """Record that a worker begins to claim jobs."""

    worker: events.WorkerStarted


@dataclass(frozen=True, slots=True)
class StopWorker:
    """Record that a worker stops claiming jobs."""

    reason: events.WorkerStopReason


@dataclass(frozen=True, slots=True)
class ReportLostWorker:
    """Report that a worker sends no heartbeats. Only the first report of any process has an effect."""

    declared_by: str


WorkerCommand = ReportEvent | FailAttempt | ReleaseJob | ConfirmCancel
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
WorkerStreamCommand = StartWorker | StopWorker | ReportLostWorker
