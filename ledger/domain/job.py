"""The decider of a job: which events a command causes, and the state after each event. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, assert_never

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.commands import (
    AddLogEntries,
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    CompleteJob,
    CompleteStep,
    ConfirmCancel,
    Delete,
    ExpireLease,
    FailAttempt,
    JobCommand,
    ReleaseJob,
    ReportProgress,
    RestartJob,
    SubmitJob,
    Unarchive,
    UpdateJob,
    WorkerCommand,
)
from jobledger.ledger.domain.errors import AlreadyExists, InvalidState, NotDue, NotFound
from jobledger.ledger.domain.events import (
    Failure,
    JobAccessChanged,
    JobArchived,
    JobAttemptFailed,
    JobCancelled,
    JobCancelRequested,
    JobClaimed,
    JobCompleted,
    JobDeleted,
    JobEvent,
    JobFailed,
    JobLeaseExpired,
    JobLogged,
    JobProgressed,
    JobReleased,
    JobRestarted,
    JobSubmitted,
    JobUnarchived,
    JobUpdated,
    StepCompleted,
    WorkerFenced,
)
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES, JobStatus


@dataclass(frozen=True, slots=True)
class Job:
    """The state of a job that decisions need.

    `attempt` numbers the attempts and is never reused. `counted_attempts` is how many of them count against
    `spec.max_attempts`; a released attempt does not. `due_at` is when the job may next be claimed. `steps` maps the
    digest of a completed step's inputs to the event with its output. `is_full_restart`: the job was restarted without
    its completed steps. `consecutive_machine_failures` is how many times in a row it was released because a machine
    could not run it. `step_output_bytes`, `changed_parameters_bytes` and `log_bytes` are the total sizes of the outputs
    of `steps`, of all changes of its parameters, and of its log.
    """

    spec: JobSubmitted
    status: JobStatus = "pending"
    attempt: int = 0
    counted_attempts: int = 0
    worker_id: str | None = None
    due_at: datetime | None = None
    cancel_request: JobCancelRequested | None = None
    is_archived: bool = False
    is_deleted: bool = False
    steps: Mapping[str, StepCompleted] = field(default_factory=dict)
    is_full_restart: bool = False
    consecutive_machine_failures: int = 0
    log_bytes: int = 0
    step_output_bytes: int = 0
    changed_parameters_bytes: int = 0


MAX_CONSECUTIVE_MACHINE_FAILURES: Final = 5
"""After this many releases in a row for machine failures, the job is assumed to cause them. The next one counts as
an attempt.

Why 5: a failing worker reports at its first such job and claims nothing until its health check passes. So a healthy job
meets several failing machines only if they fail at the same time. A job that is the cause fails on every machine and
pauses each for a second or more. It must end: after 5 failures and then `max_attempts`.
"""


def decide(command: JobCommand, job: Job | None) -> list[JobEvent]:
    """Return the events that a command causes.

    A worker that reports for an attempt that is over gets no error. The event `WorkerFenced` records the rejection.

    Raises:
        NotFound: There is no such job, or it was deleted.
        AlreadyExists: A job with this ID exists.
        InvalidState: The job's state does not allow the command.
        InvalidEvent: The job has too many completed steps, or too large ones.
    """
    if isinstance(command, SubmitJob):
        if job is not None:
            raise AlreadyExists("a job with this ID already exists")
        return [command.job]
    if job is None or job.is_deleted:
        raise NotFound("there is no such job")
    match command:
        case ClaimJob():
            return _claim(command, job)
        case ExpireLease():
            return _expire(command, job)
        case (
            ReportProgress()
            | AddLogEntries()
            | CompleteStep()
            | CompleteJob()
            | FailAttempt()
            | ReleaseJob()
            | ConfirmCancel()
        ):
            return _report(command, job)
        case CancelJob():
            return _cancel(command, job)
        case RestartJob():
            _require(job.status in TERMINAL_STATUSES, job, "restarted", "only a job that has ended can be")
            return [JobRestarted(by=command.by, reason=command.reason, reuse_steps=command.reuse_steps)]
        case UpdateJob():
            return _update(command, job)
        case ChangeAccess():
            return [JobAccessChanged(by=command.by, access_control=command.access_control)]
        case Archive():
            return [] if job.is_archived else [JobArchived(by=command.by, reason=command.reason)]
        case Unarchive():
            return [JobUnarchived(by=command.by, reason=command.reason)] if job.is_archived else []
        case Delete():
            _require(
                job.status != "processing", job, "deleted", "cancel it first: only a job that is not running can be"
            )
            return [JobDeleted(by=command.by, reason=command.reason)]
        case _:
            assert_never(command)


def _require(allowed: bool, job: Job, done: str, why: str) -> None:
    if not allowed:
        raise InvalidState(f"the job is {job.status} and cannot be {done}: {why}")


def _claim(command: ClaimJob, job: Job) -> list[JobEvent]:
    _require(job.status == "pending", job, "claimed", "only a pending job can be")
    if job.due_at is not None and command.now < job.due_at:
        raise NotDue(f"the job must not start before {job.due_at.isoformat()}")
    return [JobClaimed(worker_id=command.worker_id, attempt=job.attempt + 1)]


def _expire(command: ExpireLease, job: Job) -> list[JobEvent]:
    """Expire the lease once. Any number of processes may report it; only the first report has an effect."""
    if (job.status, job.worker_id, job.attempt) != ("processing", command.worker_id, command.attempt):
        return []
    expired = JobLeaseExpired(worker_id=command.worker_id, attempt=command.attempt)
    if job.cancel_request is not None:
        return [expired, JobCancelled(by=job.cancel_request.by, reason=job.cancel_request.reason)]
    if job.counted_attempts >= job.spec.max_attempts:
        error = Failure(
            code="WORKER_LOST",
            message=f"The worker stopped sending heartbeats in attempt {job.attempt}, and all "
            f"{job.spec.max_attempts} attempts are used up.",
            details={"worker_id": command.worker_id},
        )
        return [expired, JobFailed(attempt=job.attempt, error=error)]
    return [expired]


def _report(command: WorkerCommand, job: Job) -> list[JobEvent]:
    """Reject reports for a stale attempt. This is the only place; the attempt number is the fencing token."""
    event = _build_event(command, job)
    if (job.status, job.worker_id, job.attempt) != ("processing", command.worker_id, command.attempt):
        return [WorkerFenced(worker_id=command.worker_id, attempt=command.attempt, rejected_event=type(event).__name__)]
    if isinstance(event, StepCompleted):
        if event.key not in job.steps:
            limits.check_steps(len(job.steps) + 1)
        limits.check_step_outputs(_step_bytes(job, event))
    return [event]


def _build_event(command: WorkerCommand, job: Job) -> JobEvent:
    match command:
        case ReportProgress():
            return JobProgressed(
                attempt=command.attempt,
                step=limits.truncate_text(command.step, limits.MAX_PROGRESS_STEP_CHARACTERS),
                percent=command.percent,
                message=limits.truncate_text(command.message, limits.MAX_PROGRESS_MESSAGE_CHARACTERS),
            )
        case AddLogEntries():
            return JobLogged(attempt=command.attempt, entries=list(command.entries))
        case CompleteStep():
            return StepCompleted(
                attempt=command.attempt,
                step=command.step,
                key=command.key,
                output=command.output,
                duration_s=command.duration_s,
                tokens_used=command.tokens_used,
                warnings=list(command.warnings),
                reused_from=command.reused_from,
                cache_version=command.cache_version,
            )
        case CompleteJob():
            return JobCompleted(attempt=command.attempt, results=command.results)
        case FailAttempt():
            return _fail(command, job)
        case ReleaseJob():
            if job.cancel_request is not None:  # otherwise the next worker would start a cancelled job
                return JobCancelled(by=job.cancel_request.by, reason=job.cancel_request.reason)
            return JobReleased(
                worker_id=command.worker_id,
                attempt=command.attempt,
                reason=command.reason,
                is_machine_failure=command.is_machine_failure,
            )
        case ConfirmCancel():
            return JobCancelled(
                by=job.cancel_request.by if job.cancel_request else f"worker:{command.worker_id}",
                reason=job.cancel_request.reason if job.cancel_request else None,
            )
        case _:
            assert_never(command)


def _fail(command: FailAttempt, job: Job) -> JobEvent:
    if job.cancel_request is not None:
        return JobCancelled(by=job.cancel_request.by, reason=job.cancel_request.reason)
    error = limits.truncate_failure(command.error)
    if command.retry_at is None or job.counted_attempts >= job.spec.max_attempts:
        return JobFailed(attempt=command.attempt, error=error)
    return JobAttemptFailed(attempt=command.attempt, error=error, retry_at=command.retry_at)


def _cancel(command: CancelJob, job: Job) -> list[JobEvent]:
    if job.status == "pending":
        return [JobCancelled(by=command.by, reason=command.reason)]
    _require(job.status == "processing", job, "cancelled", "it has already ended")
    return [] if job.cancel_request else [JobCancelRequested(by=command.by, reason=command.reason)]


def _update(command: UpdateJob, job: Job) -> list[JobEvent]:
    events: list[JobEvent] = []
    if (command.parameters, command.priority, command.not_before) != (None, None, None):
        _require(job.status == "pending", job, "changed", "only a pending job can be")
        limits.check_changed_parameters(_changed_bytes(job, command.parameters))
        events.append(
            JobUpdated(
                by=command.by,
                parameters=dict(command.parameters) if command.parameters is not None else None,
                priority=command.priority,
                not_before=command.not_before,
            )
        )
    if command.access_control is not None:
        events.append(JobAccessChanged(by=command.by, access_control=command.access_control))
    return events


def evolve(job: Job | None, event: JobEvent) -> Job:
    """Return the job after an event. Events of the log are trusted, so nothing is rejected here."""
    if isinstance(event, JobSubmitted):
        return Job(spec=event, due_at=event.not_before)
    if job is None:
        raise NotFound(f"{type(event).__name__} in a stream that does not begin with JobSubmitted")
    match event:
        case JobClaimed():
            return replace(
                job,
                status="processing",
                attempt=event.attempt,
                counted_attempts=job.counted_attempts + 1,
                worker_id=event.worker_id,
                due_at=None,
            )
        case JobProgressed() | WorkerFenced():
            return job
        case JobLogged():
            return replace(job, log_bytes=job.log_bytes + _log_bytes(event))
        case StepCompleted():
            return replace(job, steps={**job.steps, event.key: event}, step_output_bytes=_step_bytes(job, event))
        case JobCompleted():
            return _end(job, "completed")
        case JobAttemptFailed():
            return replace(job, status="pending", worker_id=None, due_at=event.retry_at, consecutive_machine_failures=0)
        case JobFailed():
            return _end(job, "failed")
        case JobLeaseExpired():
            return replace(job, status="pending", worker_id=None)
        case JobReleased():
            return replace(
                job,
                status="pending",
                worker_id=None,
                counted_attempts=job.counted_attempts - 1,
                consecutive_machine_failures=job.consecutive_machine_failures + event.is_machine_failure,
            )
        case JobCancelRequested():
            return replace(job, cancel_request=event)
        case JobCancelled():
            return _end(job, "cancelled")
        case JobRestarted():
            kept = job.steps if event.reuse_steps else {}
            return replace(
                job,
                status="pending",
                counted_attempts=0,
                due_at=None,
                cancel_request=None,
                steps=kept,
                step_output_bytes=job.step_output_bytes if event.reuse_steps else 0,
                is_full_restart=not event.reuse_steps,
                consecutive_machine_failures=0,
            )
        case JobUpdated():
            return _with_changes(job, event)
        case JobAccessChanged():
            return replace(job, spec=job.spec.model_copy(update={"access_control": event.access_control}))
        case JobArchived():
            return replace(job, is_archived=True)
        case JobUnarchived():
            return replace(job, is_archived=False)
        case JobDeleted():
            return replace(job, is_deleted=True)
        case _:
            assert_never(event)


def _log_bytes(event: JobLogged) -> int:
    return sum(len(line.message) + limits.LOG_ENTRY_OVERHEAD_BYTES for line in event.entries)


def _end(job: Job, status: JobStatus) -> Job:
    return replace(job, status=status, worker_id=None, due_at=None, cancel_request=None)


def _with_changes(job: Job, event: JobUpdated) -> Job:
    changes: dict[str, Any] = {
        name: value for name in ("parameters", "priority", "not_before") if (value := getattr(event, name)) is not None
    }
    return replace(
        job,
        spec=job.spec.model_copy(update=changes),
        due_at=changes.get("not_before", job.due_at),
        changed_parameters_bytes=_changed_bytes(job, event.parameters),
    )


def _step_bytes(job: Job, step: StepCompleted) -> int:
    """Return the total size of the outputs of a job's steps after one more step, which may replace an earlier one."""
    previous = job.steps.get(step.key)
    previous_bytes = _bytes(previous.output) if previous is not None else 0
    return job.step_output_bytes - previous_bytes + _bytes(step.output)


def _changed_bytes(job: Job, parameters: Mapping[str, Any] | None) -> int:
    return job.changed_parameters_bytes + (_bytes(parameters) if parameters is not None else 0)


def _bytes(value: Any) -> int:
    try:
        return limits.json_bytes(value)
    except TypeError:  # not JSON, so the append rejects the event with a reason
        return 0
