"""The decider of a job: which events a command causes, and the job after each event. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final, assert_never

from jobledger.ledger.domain import commands, events, limits
from jobledger.ledger.domain.differences import find_differences
from jobledger.ledger.domain.errors import AlreadyExists, InvalidState, NotDue, NotFound
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES, JobStatus


@dataclass(frozen=True, slots=True)
class Job:
    """The state of a job that decisions need.

    Attributes:
        spec: The submission, with later changes.
        status: The status.
        attempt: The number of the last attempt. Numbers are never reused.
        counted_attempts: The attempts since the last restart that count against `spec.max_attempts`. Released attempts
            do not count.
        worker_id: The worker of the running attempt.
        due_at: When the job may next be claimed.
        cancel_request: The request to cancel the running attempt.
        is_archived: Whether default lists hide it.
        is_deleted: Whether it was deleted.
        steps: The completed steps, by the digest of their inputs.
        is_full_restart: Whether it was restarted without its completed steps.
        consecutive_machine_failures: How many times in a row it was released because a machine could not run it.
        log_bytes: The total size of its log.
        step_output_bytes: The total size of the outputs of `steps`.
        changed_parameters_bytes: The total size of all changes of its parameters.
    """

    spec: events.JobSubmitted
    status: JobStatus = "pending"
    attempt: int = 0
    counted_attempts: int = 0
    worker_id: str | None = None
    due_at: datetime | None = None
    cancel_request: events.JobCancelRequested | None = None
    is_archived: bool = False
    is_deleted: bool = False
    steps: Mapping[str, events.StepCompleted] = field(default_factory=dict)
    is_full_restart: bool = False
    consecutive_machine_failures: int = 0
    log_bytes: int = 0
    step_output_bytes: int = 0
    changed_parameters_bytes: int = 0


MAX_CONSECUTIVE_MACHINE_FAILURES: Final = 5
"""After this many releases in a row for machine failures, the job is assumed to cause them. The next failure counts
as a failed attempt, and the count of releases begins again.

Why 5: a failing worker reports at its first such job and claims nothing until its health check passes. A healthy job
encounters several failing machines only if they fail at the same time. A job that is the cause fails on every machine
and pauses each of them for a second or more. It must not run forever: each counted attempt is preceded by at most 5
releases, so it fails after at most 6 × `max_attempts` attempts.
"""


def decide(command: commands.JobCommand, job: Job | None) -> list[events.JobEvent]:
    """Return the events that a command causes.

    A worker that reports for an attempt that has ended gets no error. The event `WorkerFenced` records the rejection.

    Raises:
        NotFound: The job does not exist, or was deleted.
        AlreadyExists: A job with this ID exists.
        InvalidState: The job's state does not allow the command.
        InvalidEvent: The job has too many completed steps, or too large ones.
    """
    if isinstance(command, commands.SubmitJob):
        if job is not None:
            raise AlreadyExists("a job with this ID already exists")
        return [command.job]
    if job is None or job.is_deleted:
        raise NotFound("the job does not exist")
    match command:
        case commands.ClaimJob():
            return _claim(command, job)
        case commands.ExpireLease():
            return _expire(command, job)
        case commands.CancelJob():
            return _cancel(command, job)
        case commands.RestartJob():
            return _restart(command, job)
        case commands.UpdateJob():
            return _update(command, job)
        case commands.ChangeAccess():
            return [events.JobAccessChanged(by=command.by, access_control=command.access_control)]
        case commands.Archive():
            return [] if job.is_archived else [events.JobArchived(by=command.by, reason=command.reason)]
        case commands.Unarchive():
            return [events.JobUnarchived(by=command.by, reason=command.reason)] if job.is_archived else []
        case commands.Delete():
            _require(job.status != "processing", job, "running jobs cannot be deleted: cancel the job first")
            return [events.JobDeleted(by=command.by, reason=command.reason)]
        case _:
            return _report(command, job)


def _require(is_allowed: bool, job: Job, rule: str) -> None:
    if not is_allowed:
        raise InvalidState(f"the job is {job.status}: {rule}")


def _claim(command: commands.ClaimJob, job: Job) -> list[events.JobEvent]:
    _require(job.status == "pending", job, "only pending jobs can be claimed")
    if job.due_at is not None and command.now < job.due_at:
        raise NotDue(f"the job must not start before {job.due_at.isoformat()}")
    return [
        events.JobClaimed(
            worker_id=command.worker_id,
            attempt=job.attempt + 1,
            via=command.via,
            seen=command.seen,
            free_slots=command.free_slots,
        )
    ]


def _expire(command: commands.ExpireLease, job: Job) -> list[events.JobEvent]:
    """Expire the lease once. Any number of processes may report it; only the first report has an effect."""
    if (job.status, job.worker_id, job.attempt) != ("processing", command.worker_id, command.attempt):
        return []
    expired = events.JobLeaseExpired(worker_id=command.worker_id, attempt=command.attempt)
    if job.cancel_request is not None:
        return [expired, _confirm_cancel(job.cancel_request)]
    if job.counted_attempts >= job.spec.max_attempts:
        error = events.ErrorInfo(
            code="WORKER_LOST",
            message=f"The worker stopped sending heartbeats in attempt {job.attempt}, and all "
            f"{job.spec.max_attempts} attempts are used up.",
            details={"worker_id": command.worker_id},
        )
        return [expired, events.JobFailed(attempt=job.attempt, error=error)]
    return [expired]


def _report(command: commands.WorkerCommand, job: Job) -> list[events.JobEvent]:
    """Reject reports of an attempt that has ended. The number of the attempt shows it. No other code rejects them."""
    event = _build_event(command, job)
    if (job.status, job.worker_id, job.attempt) != ("processing", command.worker_id, command.attempt):
        rejected = type(event).__name__
        return [events.WorkerFenced(worker_id=command.worker_id, attempt=command.attempt, rejected_event=rejected)]
    if isinstance(event, events.StepCompleted):
        limits.check_steps(len(job.steps) + (event.key not in job.steps), _add_step_bytes(job, event))
    return [event]


def _build_event(command: commands.WorkerCommand, job: Job) -> events.JobEvent:
    match command:
        case commands.ReportEvent(event=events.JobProgressed() as event):
            step = limits.truncate_text(event.step, limits.MAX_PROGRESS_STEP_CHARACTERS)
            message = limits.truncate_text(event.message, limits.MAX_PROGRESS_MESSAGE_CHARACTERS)
            return event.model_copy(update={"step": step, "message": message})
        case commands.ReportEvent():
            return command.event
        case commands.FailAttempt() | commands.ReleaseJob() | commands.ConfirmCancel() if (
            job.cancel_request is not None
        ):
            return _confirm_cancel(job.cancel_request)  # otherwise, the next worker would start a cancelled job
        case commands.FailAttempt():
            error = limits.truncate_error(command.error)
            if command.retry_at is None or job.counted_attempts >= job.spec.max_attempts:
                return events.JobFailed(attempt=command.attempt, error=error)
            return events.JobAttemptFailed(attempt=command.attempt, error=error, retry_at=command.retry_at)
        case commands.ReleaseJob():
            return events.JobReleased(
                worker_id=command.worker_id,
                attempt=command.attempt,
                reason=command.reason,
                is_machine_failure=command.is_machine_failure,
            )
        case commands.ConfirmCancel():
            return events.JobCancelled(by=f"worker:{command.worker_id}")
        case _:
            assert_never(command)


def _confirm_cancel(request: events.JobCancelRequested) -> events.JobCancelled:
    return events.JobCancelled(by=request.by, reason=request.reason)


def _cancel(command: commands.CancelJob, job: Job) -> list[events.JobEvent]:
    if job.status == "pending":
        return [events.JobCancelled(by=command.by, reason=command.reason)]
    _require(job.status == "processing", job, "finished jobs cannot be cancelled")
    return [] if job.cancel_request else [events.JobCancelRequested(by=command.by, reason=command.reason)]


def _restart(command: commands.RestartJob, job: Job) -> list[events.JobEvent]:
    """Restart a job. New parameters are a change of the pending job in the same commit, if they differ."""
    _require(job.status in TERMINAL_STATUSES, job, "only finished jobs can be restarted")
    restarted = events.JobRestarted(by=command.by, reason=command.reason, reuse_steps=command.reuse_steps)
    if command.parameters is None or not find_differences(job.spec.parameters, command.parameters):
        return [restarted]
    return [restarted, _change_fields(job, command.by, command.parameters)]


def _change_fields(
    job: Job,
    by: str,
    parameters: Mapping[str, Any] | None,
    priority: int | None = None,
    not_before: datetime | None = None,
) -> events.JobUpdated:
    """Return the event that changes the given fields of a job.

    Raises:
        InvalidEvent: All changes of its parameters together are too large.
    """
    limits.check_changed_parameters(_add_changed_bytes(job, parameters))
    return events.JobUpdated(
        by=by,
        parameters=dict(parameters) if parameters is not None else None,
        priority=priority,
        not_before=not_before,
        difference=find_differences(job.spec.parameters, parameters) if parameters is not None else [],
    )


def _update(command: commands.UpdateJob, job: Job) -> list[events.JobEvent]:
    caused: list[events.JobEvent] = []
    if (command.parameters, command.priority, command.not_before) != (None, None, None):
        _require(job.status == "pending", job, "only pending jobs can be changed")
        caused.append(_change_fields(job, command.by, command.parameters, command.priority, command.not_before))
    if command.access_control is not None:
        caused.append(events.JobAccessChanged(by=command.by, access_control=command.access_control))
    return caused


def evolve(job: Job | None, event: events.JobEvent) -> Job:
    """Return the job after an event. Events of the log are trusted, so nothing is rejected here."""
    if isinstance(event, events.JobSubmitted):
        return Job(spec=event, due_at=event.not_before)
    if job is None:
        raise NotFound(f"{type(event).__name__} in a stream that does not begin with JobSubmitted")
    match event:
        case events.JobClaimed():
            return replace(
                job,
                status="processing",
                attempt=event.attempt,
                counted_attempts=job.counted_attempts + 1,
                worker_id=event.worker_id,
                due_at=None,
            )
        case events.JobProgressed() | events.WorkerFenced():
            return job
        case events.JobLogged():
            added_bytes = sum(len(line.message) + limits.LOG_ENTRY_OVERHEAD_BYTES for line in event.entries)
            return replace(job, log_bytes=job.log_bytes + added_bytes)
        case events.StepCompleted():
            return replace(job, steps={**job.steps, event.key: event}, step_output_bytes=_add_step_bytes(job, event))
        case events.JobCompleted():
            return _finish(job, "completed")
        case events.JobAttemptFailed():
            return replace(job, status="pending", worker_id=None, due_at=event.retry_at, consecutive_machine_failures=0)
        case events.JobFailed():
            return _finish(job, "failed")
        case events.JobLeaseExpired():
            return replace(job, status="pending", worker_id=None)
        case events.JobReleased():
            return replace(
                job,
                status="pending",
                worker_id=None,
                counted_attempts=job.counted_attempts - 1,
                consecutive_machine_failures=job.consecutive_machine_failures + event.is_machine_failure,
            )
        case events.JobCancelRequested():
            return replace(job, cancel_request=event)
        case events.JobCancelled():
            return _finish(job, "cancelled")
        case events.JobRestarted():
            steps = _select_reusable_steps(job) if event.reuse_steps else {}
            return replace(
                job,
                status="pending",
                counted_attempts=0,
                due_at=None,
                cancel_request=None,
                steps=steps,
                step_output_bytes=_update_step_bytes(job, steps),
                is_full_restart=not event.reuse_steps,
                consecutive_machine_failures=0,
            )
        case events.JobUpdated():
            return _apply_changes(job, event)
        case events.JobAccessChanged():
            return replace(job, spec=job.spec.model_copy(update={"access_control": event.access_control}))
        case events.JobArchived():
            return replace(job, is_archived=True)
        case events.JobUnarchived():
            return replace(job, is_archived=False)
        case events.JobDeleted():
            return replace(job, is_deleted=True)
        case _:
            assert_never(event)


def _finish(job: Job, status: JobStatus) -> Job:
    return replace(job, status=status, worker_id=None, due_at=None, cancel_request=None)


def _apply_changes(job: Job, event: events.JobUpdated) -> Job:
    changes: dict[str, Any] = {
        name: value for name in ("parameters", "priority", "not_before") if (value := getattr(event, name)) is not None
    }
    return replace(
        job,
        spec=job.spec.model_copy(update=changes),
        due_at=changes.get("not_before", job.due_at),
        changed_parameters_bytes=_add_changed_bytes(job, event.parameters),
    )


def _select_reusable_steps(job: Job) -> Mapping[str, events.StepCompleted]:
    """Return the steps that a restart does not repeat."""
    return {key: step for key, step in job.steps.items() if not step.repeat_on_restart}


def _update_step_bytes(job: Job, kept: Mapping[str, events.StepCompleted]) -> int:
    """Return the total size of the outputs of a job's steps if only `kept` remain."""
    if not kept:
        return 0
    removed = [step for key, step in job.steps.items() if key not in kept]
    return job.step_output_bytes - sum(_measure_json(step.output) for step in removed)


def _add_step_bytes(job: Job, step: events.StepCompleted) -> int:
    """Return the total size of the outputs of a job's steps after one more step, which may replace an earlier one."""
    previous = job.steps.get(step.key)
    previous_bytes = _measure_json(previous.output) if previous is not None else 0
    return job.step_output_bytes - previous_bytes + _measure_json(step.output)


def _add_changed_bytes(job: Job, parameters: Mapping[str, Any] | None) -> int:
    return job.changed_parameters_bytes + (_measure_json(parameters) if parameters is not None else 0)


def _measure_json(value: Any) -> int:
    try:
        return limits.compute_json_size(value)
    except TypeError:  # not JSON, so the append rejects the event with a reason
        return 0
