"""ledger: the rules of a job. `decide` answers a command with events or refuses it; `evolve` applies an event. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, assert_never

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    CompleteJob,
    ConfirmCancel,
    Delete,
    ExpireLease,
    FailAttempt,
    FinishStep,
    JobCommand,
    ReleaseJob,
    ReportProgress,
    RestartJob,
    SubmitJob,
    Unarchive,
    UpdateJob,
    WorkerCommand,
    WriteLog,
)
from jobledger.ledger.domain.errors import AlreadyExists, NotDue, NotFound, WrongState
from jobledger.ledger.domain.events import (
    ENDED,
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
    JobStatus,
    JobSubmitted,
    JobUnarchived,
    JobUpdated,
    StepCompleted,
    WorkerFenced,
)


@dataclass(frozen=True, slots=True)
class Job:
    """What the rules need to know of a job.

    `attempt` numbers its executions and is never reused; `counted` is how many of them count against
    `asked.max_attempts` (a released one does not). `due` is when it may next be claimed. `steps` maps the digest of a
    finished step's inputs to the event that holds its output. `anew` says that it was restarted to do all of it again.
    `machine_troubles` is how many times in a row it was given back because a machine could not run it. `step_bytes`,
    `changed_bytes` and `log_bytes` are the sizes of the outputs of `steps`, of all changes of its parameters and of its
    log.
    """

    asked: JobSubmitted
    status: JobStatus = "pending"
    attempt: int = 0
    counted: int = 0
    worker_id: str | None = None
    due: datetime | None = None
    cancel: JobCancelRequested | None = None
    archived: bool = False
    deleted: bool = False
    steps: Mapping[str, StepCompleted] = field(default_factory=dict)
    anew: bool = False
    machine_troubles: int = 0
    log_bytes: int = 0
    step_bytes: int = 0
    changed_bytes: int = 0


MAX_MACHINE_TROUBLES: Final = 5
"""A job given back this often in a row for machine trouble is taken for its cause: the next time counts as an attempt.

Why 5: a sick worker reports at its first such job and claims nothing until its check passes, so a healthy job meets
more than one sick machine only if several fall ill at the same time. A job that is itself the cause meets trouble on
every machine, stops each for a pause of a second or more, and has to end: after 5 times, and then `max_attempts`.
"""


def decide(command: JobCommand, job: Job | None) -> list[JobEvent]:
    """Answer a command with the events it causes, or refuse it.

    Raises:
        NotFound, AlreadyExists, WrongState: the rules say no. A worker that speaks for an attempt that is over is
            not an error here: the answer is the event `WorkerFenced`, so that the refusal is on record.
        InvalidEvent: the job has too many finished steps.
    """
    if isinstance(command, SubmitJob):
        if job is not None:
            raise AlreadyExists("a job with this id exists already")
        return [command.job]
    if job is None or job.deleted:
        raise NotFound("there is no such job")
    match command:
        case ClaimJob():
            return _claim(command, job)
        case ExpireLease():
            return _expire(command, job)
        case (
            ReportProgress()
            | WriteLog()
            | FinishStep()
            | CompleteJob()
            | FailAttempt()
            | ReleaseJob()
            | ConfirmCancel()
        ):
            return _report(command, job)
        case CancelJob():
            return _cancel(command, job)
        case RestartJob():
            _require(job.status in ENDED, job, "restarted", "only a job that has ended can be")
            return [JobRestarted(by=command.by, reason=command.reason, reuse_steps=command.reuse_steps)]
        case UpdateJob():
            return _update(command, job)
        case ChangeAccess():
            return [JobAccessChanged(by=command.by, access_control=command.access_control)]
        case Archive():
            return [] if job.archived else [JobArchived(by=command.by, reason=command.reason)]
        case Unarchive():
            return [JobUnarchived(by=command.by, reason=command.reason)] if job.archived else []
        case Delete():
            _require(
                job.status != "processing", job, "deleted", "cancel it first: only a job that is not running can be"
            )
            return [JobDeleted(by=command.by, reason=command.reason)]
        case _:
            assert_never(command)


def _require(allowed: bool, job: Job, done: str, why: str) -> None:
    if not allowed:
        raise WrongState(f"the job is {job.status} and cannot be {done}: {why}")


def _claim(command: ClaimJob, job: Job) -> list[JobEvent]:
    _require(job.status == "pending", job, "claimed", "only a waiting job can be")
    if job.due is not None and command.now < job.due:
        raise NotDue(f"the job is not to be started before {job.due.isoformat()}")
    return [JobClaimed(worker_id=command.worker_id, attempt=job.attempt + 1)]


def _expire(command: ExpireLease, job: Job) -> list[JobEvent]:
    """Whoever notices may say so, any number of them: only the first has an effect."""
    if (job.status, job.worker_id, job.attempt) != ("processing", command.worker_id, command.attempt):
        return []
    expired = JobLeaseExpired(worker_id=command.worker_id, attempt=command.attempt)
    if job.cancel is not None:
        return [expired, JobCancelled(by=job.cancel.by, reason=job.cancel.reason)]
    if job.counted >= job.asked.max_attempts:
        error = Failure(
            code="WORKER_LOST",
            message=f"The worker stopped giving signs of life in attempt {job.attempt}, and all "
            f"{job.asked.max_attempts} attempts are used up.",
            details={"worker_id": command.worker_id},
        )
        return [expired, JobFailed(attempt=job.attempt, error=error)]
    return [expired]


def _report(command: WorkerCommand, job: Job) -> list[JobEvent]:
    """The one place where a stale attempt is refused (the attempt number is the fencing token)."""
    event = _reported(command, job)
    if (job.status, job.worker_id, job.attempt) != ("processing", command.worker_id, command.attempt):
        return [WorkerFenced(worker_id=command.worker_id, attempt=command.attempt, refused=type(event).__name__)]
    if isinstance(event, StepCompleted):
        if event.key not in job.steps:
            limits.check_steps(len(job.steps) + 1)
        limits.check_step_outputs(_step_bytes(job, event))
    return [event]


def _reported(command: WorkerCommand, job: Job) -> JobEvent:
    match command:
        case ReportProgress():
            return JobProgressed(
                attempt=command.attempt,
                step=limits.shortened(command.step, limits.PROGRESS_STEP_CHARACTERS),
                percent=command.percent,
                message=limits.shortened(command.message, limits.PROGRESS_MESSAGE_CHARACTERS),
            )
        case WriteLog():
            return JobLogged(attempt=command.attempt, entries=list(command.entries))
        case FinishStep():
            return StepCompleted(
                attempt=command.attempt,
                step=command.step,
                key=command.key,
                output=command.output,
                duration_s=command.duration_s,
                tokens_used=command.tokens_used,
                warnings=list(command.warnings),
                reused_from=command.reused_from,
                shared_version=command.shared_version,
            )
        case CompleteJob():
            return JobCompleted(attempt=command.attempt, results=command.results)
        case FailAttempt():
            return _failed(command, job)
        case ReleaseJob():
            if job.cancel is not None:  # else the next worker would start what nobody wants
                return JobCancelled(by=job.cancel.by, reason=job.cancel.reason)
            return JobReleased(
                worker_id=command.worker_id,
                attempt=command.attempt,
                reason=command.reason,
                machine_trouble=command.machine_trouble,
            )
        case ConfirmCancel():
            return JobCancelled(
                by=job.cancel.by if job.cancel else f"worker:{command.worker_id}",
                reason=job.cancel.reason if job.cancel else None,
            )
        case _:
            assert_never(command)


def _failed(command: FailAttempt, job: Job) -> JobEvent:
    if job.cancel is not None:
        return JobCancelled(by=job.cancel.by, reason=job.cancel.reason)
    error = limits.shortened_failure(command.error)
    if command.retry_at is None or job.counted >= job.asked.max_attempts:
        return JobFailed(attempt=command.attempt, error=error)
    return JobAttemptFailed(attempt=command.attempt, error=error, retry_at=command.retry_at)


def _cancel(command: CancelJob, job: Job) -> list[JobEvent]:
    if job.status == "pending":
        return [JobCancelled(by=command.by, reason=command.reason)]
    _require(job.status == "processing", job, "cancelled", "it has ended already")
    return [] if job.cancel else [JobCancelRequested(by=command.by, reason=command.reason)]


def _update(command: UpdateJob, job: Job) -> list[JobEvent]:
    events: list[JobEvent] = []
    if (command.parameters, command.priority, command.not_before) != (None, None, None):
        _require(job.status == "pending", job, "changed", "only a waiting job can be")
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
    """Return the job as it is after the event. The log is trusted: nothing is refused here."""
    if isinstance(event, JobSubmitted):
        return Job(asked=event, due=event.not_before)
    if job is None:
        raise NotFound(f"{type(event).__name__} in a stream that does not begin with JobSubmitted")
    match event:
        case JobClaimed():
            return replace(
                job,
                status="processing",
                attempt=event.attempt,
                counted=job.counted + 1,
                worker_id=event.worker_id,
                due=None,
            )
        case JobProgressed() | WorkerFenced():
            return job
        case JobLogged():
            return replace(job, log_bytes=job.log_bytes + _log_bytes(event))
        case StepCompleted():
            return replace(job, steps={**job.steps, event.key: event}, step_bytes=_step_bytes(job, event))
        case JobCompleted():
            return _ended(job, "completed")
        case JobAttemptFailed():
            return replace(job, status="pending", worker_id=None, due=event.retry_at, machine_troubles=0)
        case JobFailed():
            return _ended(job, "failed")
        case JobLeaseExpired():
            return replace(job, status="pending", worker_id=None)
        case JobReleased():
            return replace(
                job,
                status="pending",
                worker_id=None,
                counted=job.counted - 1,
                machine_troubles=job.machine_troubles + event.machine_trouble,
            )
        case JobCancelRequested():
            return replace(job, cancel=event)
        case JobCancelled():
            return _ended(job, "cancelled")
        case JobRestarted():
            kept = job.steps if event.reuse_steps else {}
            return replace(
                job,
                status="pending",
                counted=0,
                due=None,
                cancel=None,
                steps=kept,
                step_bytes=job.step_bytes if event.reuse_steps else 0,
                anew=not event.reuse_steps,
                machine_troubles=0,
            )
        case JobUpdated():
            return _with_changes(job, event)
        case JobAccessChanged():
            return replace(job, asked=job.asked.model_copy(update={"access_control": event.access_control}))
        case JobArchived():
            return replace(job, archived=True)
        case JobUnarchived():
            return replace(job, archived=False)
        case JobDeleted():
            return replace(job, deleted=True)
        case _:
            assert_never(event)


def _log_bytes(event: JobLogged) -> int:
    return sum(len(line.message) + limits.LOG_LINE_BYTES for line in event.entries)


def _ended(job: Job, status: JobStatus) -> Job:
    return replace(job, status=status, worker_id=None, due=None, cancel=None)


def _with_changes(job: Job, event: JobUpdated) -> Job:
    changes: dict[str, Any] = {
        name: value for name in ("parameters", "priority", "not_before") if (value := getattr(event, name)) is not None
    }
    return replace(
        job,
        asked=job.asked.model_copy(update=changes),
        due=changes.get("not_before", job.due),
        changed_bytes=_changed_bytes(job, event.parameters),
    )


def _step_bytes(job: Job, step: StepCompleted) -> int:
    """Return how large the outputs of a job's steps are when one more is finished, or finished again."""
    known = job.steps.get(step.key)
    replaced = _bytes(known.output) if known is not None else 0
    return job.step_bytes - replaced + _bytes(step.output)


def _changed_bytes(job: Job, parameters: Mapping[str, Any] | None) -> int:
    return job.changed_bytes + (_bytes(parameters) if parameters is not None else 0)


def _bytes(value: Any) -> int:
    try:
        return limits.json_bytes(value)
    except TypeError:  # JSON cannot hold it, so no event can: the append refuses it, and says why
        return 0
