"""The job decider: each command in each state that matters."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobledger.ledger.domain import job, limits
from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    ConfirmCancel,
    Delete,
    ExpireLease,
    FailAttempt,
    JobCommand,
    ReleaseJob,
    RestartJob,
    SubmitJob,
    Unarchive,
    UpdateJob,
    WorkerCommand,
)
from jobledger.ledger.domain.differences import find_differences
from jobledger.ledger.domain.errors import AlreadyExists, InvalidEvent, InvalidState, NotFound
from jobledger.ledger.domain.events import (
    Event,
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
    JobReleased,
    JobRestarted,
    JobUnarchived,
    JobUpdated,
    StepCompleted,
    WorkerFenced,
)
from jobledger.ledger.domain.job import Job
from tests.ledger.job_reports import LATER, OUTAGE, make_reports
from tests.support.decider_spec import given_for, parametrize_histories, type_name
from tests.support.event_examples import ACCESS, NOON, make_job_submitted, make_results
from tests.support.worker_reports import report_results, report_step

given = given_for(job)

submitted = make_job_submitted(max_attempts=2)
claimed = JobClaimed(worker_id="w1", attempt=1)
claimed_again = JobClaimed(worker_id="w2", attempt=2)
step = StepCompleted(attempt=1, step="page", key="k1", output=[1], duration_s=0.5)
retried = JobAttemptFailed(attempt=1, error=OUTAGE, retry_at=LATER)
completed = JobCompleted(attempt=1, results=make_results())
failed = JobFailed(attempt=1, error=OUTAGE)
expired = JobLeaseExpired(worker_id="w1", attempt=1)
released = JobReleased(worker_id="w1", attempt=1, reason="shutdown")
cancel_requested = JobCancelRequested(by="user:alice", reason="wrong talk")
cancelled = JobCancelled(by="user:alice", reason="wrong talk")
restarted = JobRestarted(by="user:bob")
deleted = JobDeleted(by="user:bob")
fenced = WorkerFenced(worker_id="w1", attempt=1, rejected_event="JobCompleted")

PENDING: dict[str, list[Event]] = {
    "submitted": [submitted],
    "transient failure": [submitted, claimed, retried],
    "released": [submitted, claimed, released],
    "lease expired": [submitted, claimed, expired],
    "restarted": [submitted, claimed, completed, restarted],
}
RUNNING: dict[str, list[Event]] = {
    "first attempt": [submitted, claimed],
    "cancel requested": [submitted, claimed, cancel_requested],
    "second attempt": [submitted, claimed, released, claimed_again],
}
FINISHED: dict[str, list[Event]] = {
    "completed": [submitted, claimed, completed],
    "failed": [submitted, claimed, failed],
    "cancelled while waiting": [submitted, cancelled],
    "cancelled while running": [submitted, claimed, cancel_requested, cancelled],
}
EXISTING = PENDING | RUNNING | FINISHED

ALL_COMMANDS: list[JobCommand] = [
    *(command for command, _ in make_reports()),
    ClaimJob("w1", NOON),
    ExpireLease("w1", 1),
    CancelJob("user:alice"),
    RestartJob("user:alice"),
    UpdateJob("user:alice", priority=2),
    ChangeAccess("user:alice", ACCESS),
    Archive("user:alice"),
    Unarchive("user:alice"),
    Delete("user:alice"),
]

# Submission -------------------------------------------------------------------------------------------------------


def test_submit_new_job_records_submission() -> None:
    given().when(SubmitJob(submitted)).then(submitted)


def test_submit_existing_or_deleted_job_is_rejected() -> None:
    given(submitted).when(SubmitJob(submitted)).then_rejected(AlreadyExists)
    given(submitted, deleted).when(SubmitJob(submitted)).then_rejected(AlreadyExists)


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=type_name)
def test_command_on_missing_or_deleted_job_is_rejected(command: JobCommand) -> None:
    given().when(command).then_rejected(NotFound)
    given(submitted, deleted).when(command).then_rejected(NotFound)
    given(submitted, claimed, completed, deleted).when(command).then_rejected(NotFound)


def test_evolve_without_submission_raises_not_found() -> None:
    with pytest.raises(NotFound, match="JobClaimed"):
        job.evolve(None, claimed)


# Claiming ---------------------------------------------------------------------------------------------------------


def test_first_claim_starts_first_attempt() -> None:
    given(submitted).when(ClaimJob("w1", NOON)).then(claimed)


@parametrize_histories({name: history for name, history in PENDING.items() if name != "submitted"})
def test_later_claim_starts_next_attempt(history: list[Event]) -> None:
    given(*history).when(ClaimJob("w2", LATER)).then(JobClaimed(worker_id="w2", attempt=2))


@parametrize_histories(RUNNING | FINISHED)
def test_claim_running_or_finished_job_is_rejected(history: list[Event]) -> None:
    given(*history).when(ClaimJob("w2", LATER)).then_rejected(InvalidState, "claimed")


def test_claim_before_start_time_is_rejected() -> None:
    planned = make_job_submitted(not_before=LATER)
    given(planned).when(ClaimJob("w1", LATER - timedelta(milliseconds=1))).then_rejected(
        InvalidState, LATER.isoformat()[:19]
    )
    given(planned).when(ClaimJob("w1", LATER)).then(claimed)


def test_claim_before_retry_time_is_rejected() -> None:
    given(submitted, claimed, retried).when(ClaimJob("w2", NOON)).then_rejected(InvalidState)
    given(submitted, claimed, retried).when(ClaimJob("w2", LATER)).then(claimed_again)


@pytest.mark.parametrize("end", [released, expired], ids=type_name)
def test_claim_after_release_or_expiry_ignores_start_time(end: Event) -> None:
    given(make_job_submitted(not_before=NOON), claimed, end).when(ClaimJob("w2", NOON)).then(claimed_again)


# Reports of workers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "event"), make_reports(), ids=type_name)
def test_report_of_current_attempt_is_recorded(command: WorkerCommand, event: JobEvent) -> None:
    given(submitted, claimed).when(command).then(event)


@pytest.mark.parametrize(("command", "event"), make_reports(), ids=type_name)
@parametrize_histories(PENDING | FINISHED)
def test_report_for_job_that_is_not_running_is_fenced(
    history: list[Event], command: WorkerCommand, event: JobEvent
) -> None:
    given(*history).when(command).then(WorkerFenced(worker_id="w1", attempt=1, rejected_event=type(event).__name__))


@pytest.mark.parametrize("command", [command for command, _ in make_reports("w1", 1)], ids=type_name)
def test_report_of_superseded_attempt_is_fenced(command: WorkerCommand) -> None:
    decided = job.decide(command, given(submitted, claimed, expired, claimed_again).state)
    assert [type(event) for event in decided] == [WorkerFenced]


@pytest.mark.parametrize("command", [command for command, _ in make_reports("w2", 1)], ids=type_name)
def test_report_by_other_worker_is_fenced(command: WorkerCommand) -> None:
    decided = job.decide(command, given(submitted, claimed).state)
    assert [type(event) for event in decided] == [WorkerFenced]


def test_report_of_own_earlier_attempt_is_fenced() -> None:
    history = [submitted, claimed, released, JobClaimed(worker_id="w1", attempt=2)]
    given(*history).when(report_results("w1", 1, make_results())).then(fenced)


def test_fenced_report_leaves_state_unchanged() -> None:
    assert (
        given(submitted, claimed, expired, claimed_again, fenced).state
        == given(submitted, claimed, expired, claimed_again).state
    )


# Attempts ---------------------------------------------------------------------------------------------------------


def test_permanent_error_fails_job_at_once() -> None:
    given(submitted, claimed).when(FailAttempt("w1", 1, OUTAGE, None)).then(JobFailed(attempt=1, error=OUTAGE))


def test_transient_error_in_last_attempt_fails_job() -> None:
    history = [submitted, claimed, retried, claimed_again]
    given(*history).when(FailAttempt("w2", 2, OUTAGE, LATER)).then(JobFailed(attempt=2, error=OUTAGE))


def test_released_attempt_does_not_count() -> None:
    history = [submitted, claimed, released, claimed_again]
    given(*history).when(FailAttempt("w2", 2, OUTAGE, LATER)).then(
        JobAttemptFailed(attempt=2, error=OUTAGE, retry_at=LATER)
    )


def test_attempt_with_expired_lease_counts() -> None:
    history = [submitted, claimed, expired, claimed_again]
    given(*history).when(FailAttempt("w2", 2, OUTAGE, LATER)).then(JobFailed(attempt=2, error=OUTAGE))


def test_expire_lease_of_running_job_records_expiry() -> None:
    given(submitted, claimed).when(ExpireLease("w1", 1)).then(expired)


def test_expire_lease_in_last_attempt_fails_job() -> None:
    decided = job.decide(ExpireLease("w2", 2), given(submitted, claimed, retried, claimed_again).state)
    assert decided[0] == JobLeaseExpired(worker_id="w2", attempt=2)
    assert isinstance(decided[1], JobFailed)
    assert (decided[1].attempt, decided[1].error.code) == (2, "WORKER_LOST")
    assert given(submitted, claimed, retried, claimed_again, *decided).state.status == "failed"


@pytest.mark.parametrize(
    "history",
    [
        [submitted, claimed, expired],
        [submitted, claimed, expired, claimed_again],
        [submitted, claimed, released],
        [submitted, claimed, completed],
        [submitted],
    ],
)
def test_expire_lease_of_ended_attempt_records_nothing(history: list[Event]) -> None:
    given(*history).when(ExpireLease("w1", 1)).then_no_events()


def test_expire_lease_of_other_worker_or_attempt_records_nothing() -> None:
    given(submitted, claimed).when(ExpireLease("w2", 1)).then_no_events()
    given(submitted, claimed).when(ExpireLease("w1", 2)).then_no_events()


# Cancelling -------------------------------------------------------------------------------------------------------


@parametrize_histories(PENDING)
def test_cancel_pending_job_cancels_immediately(history: list[Event]) -> None:
    given(*history).when(CancelJob("user:alice", "wrong talk")).then(cancelled)


def test_cancel_running_job_requests_cancel_once() -> None:
    given(submitted, claimed).when(CancelJob("user:alice", "wrong talk")).then(cancel_requested)
    given(submitted, claimed, cancel_requested).when(CancelJob("user:bob")).then_no_events()


@parametrize_histories(FINISHED)
def test_cancel_finished_job_is_rejected(history: list[Event]) -> None:
    given(*history).when(CancelJob("user:alice")).then_rejected(InvalidState, "cancelled")


@pytest.mark.parametrize(
    "command",
    [
        ConfirmCancel("w1", 1),
        FailAttempt("w1", 1, OUTAGE, LATER),
        FailAttempt("w1", 1, OUTAGE, None),
        ReleaseJob("w1", 1, "shutdown"),
    ],
    ids=["confirmed", "transient failure", "permanent failure", "released"],
)
def test_any_end_after_cancel_request_cancels_job(command: WorkerCommand) -> None:
    given(submitted, claimed, cancel_requested).when(command).then(cancelled)


def test_expire_lease_after_cancel_request_cancels_job() -> None:
    given(submitted, claimed, cancel_requested).when(ExpireLease("w1", 1)).then(expired, cancelled)


def test_complete_after_cancel_request_completes_job() -> None:
    given(submitted, claimed, cancel_requested).when(report_results("w1", 1, completed.results)).then(completed)


def test_cancel_request_ends_with_restart() -> None:
    history = [submitted, claimed, cancel_requested, cancelled, restarted, claimed_again]
    given(*history).when(FailAttempt("w2", 2, OUTAGE, LATER)).then(
        JobAttemptFailed(attempt=2, error=OUTAGE, retry_at=LATER)
    )


# Restarting -------------------------------------------------------------------------------------------------------


@parametrize_histories(FINISHED)
def test_restart_finished_job_resets_counted_attempts(history: list[Event]) -> None:
    given(*history).when(RestartJob("user:bob", "again", reuse_steps=False)).then(
        JobRestarted(by="user:bob", reason="again", reuse_steps=False)
    )
    state = given(*history, restarted).state
    assert (state.status, state.counted_attempts, state.worker_id, state.due_at) == ("pending", 0, None, None)


@parametrize_histories(PENDING | RUNNING)
def test_restart_unfinished_job_is_rejected(history: list[Event]) -> None:
    given(*history).when(RestartJob("user:bob")).then_rejected(InvalidState, "restarted")


def test_claim_after_restart_uses_new_attempt_number() -> None:
    given(submitted, claimed, failed, restarted).when(ClaimJob("w1", NOON)).then(JobClaimed(worker_id="w1", attempt=2))


def test_restart_keeps_completed_steps_unless_reuse_is_off() -> None:
    history = [submitted, claimed, step, failed]
    assert given(*history, restarted).state.steps == {"k1": step}
    assert given(*history, JobRestarted(by="user:bob", reuse_steps=False)).state.steps == {}


def test_restart_drops_steps_whose_warning_may_have_lost_its_cause() -> None:
    repeated = StepCompleted(attempt=1, step="enrich", key="k2", output=["x"], duration_s=1, repeat_on_restart=True)
    history = [submitted, claimed, step, repeated]
    assert given(*history, retried).state.steps == {"k1": step, "k2": repeated}
    state = given(*history, failed, restarted).state
    assert (state.steps, state.is_full_restart) == ({"k1": step}, False)
    assert state.step_output_bytes == given(submitted, claimed, step).state.step_output_bytes > 0


@parametrize_histories(FINISHED)
def test_restart_with_parameters_restarts_and_changes_job_in_one_commit(history: list[Event]) -> None:
    new = {**submitted.parameters, "text": "corrected"}
    [first, second] = job.decide(RestartJob("user:bob", "typo", parameters=new), given(*history).state)
    assert first == JobRestarted(by="user:bob", reason="typo")
    assert isinstance(second, JobUpdated)
    assert (second.by, second.parameters, second.priority, second.not_before) == ("user:bob", new, None, None)
    assert [change.name for change in second.difference] == ["text"]
    state = given(*history, first, second).state
    assert (state.status, state.spec.parameters, state.due_at) == ("pending", new, None)
    assert state.changed_parameters_bytes > given(*history).state.changed_parameters_bytes


def test_restart_with_the_same_parameters_records_no_change() -> None:
    command = RestartJob("user:bob", parameters=dict(submitted.parameters))
    given(submitted, claimed, failed).when(command).then(JobRestarted(by="user:bob"))


def test_restart_with_too_many_changed_parameters_is_rejected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_CHANGED_PARAMETERS_BYTES", 100)
    with pytest.raises(InvalidEvent, match="at most 100 bytes"):
        job.decide(RestartJob("user:bob", parameters={"text": "x" * 200}), given(submitted, claimed, failed).state)


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (
            {"a": 1, "b": 2},
            {"b": 3, "c": None},
            [("a", "removed", 1, None), ("b", "changed", 2, 3), ("c", "added", None, None)],
        ),
        ({"a": 1}, {"a": True}, [("a", "changed", 1, True)]),
        ({"a": None}, {}, [("a", "removed", None, None)]),
        ({"a": {"x": 1, "y": 2}}, {"a": {"y": 2, "x": 1}}, []),
        ({"a": 2**70}, {"a": 2**70 + 1}, [("a", "changed", 2**70, 2**70 + 1)]),
        ({"a": "x" * 2000}, {"a": "y"}, [("a", "changed", None, "y")]),
    ],
)
def test_difference_lists_changed_parameters(
    before: dict[str, Any], after: dict[str, Any], expected: list[tuple[str, str, Any, Any]]
) -> None:
    found = [(change.name, change.kind, change.before, change.after) for change in find_differences(before, after)]
    assert [tuple(map(repr, change)) for change in found] == [tuple(map(repr, change)) for change in expected]


def test_difference_of_many_large_parameters_is_limited() -> None:
    changes = find_differences({}, {f"{number:05}" + "n" * 1000: "x" * 1000 for number in range(5000)})
    assert len(changes) == 100
    assert limits.compute_json_size([change.model_dump() for change in changes]) < 200_000


# Changing ---------------------------------------------------------------------------------------------------------


@parametrize_histories(PENDING)
def test_update_pending_job_records_update(history: list[Event]) -> None:
    given(*history).when(UpdateJob("user:bob", {"text": "bye"}, 9, LATER)).then(
        JobUpdated(
            by="user:bob",
            parameters={"text": "bye"},
            priority=9,
            not_before=LATER,
            difference=find_differences(submitted.parameters, {"text": "bye"}),
        )
    )


@parametrize_histories(RUNNING | FINISHED)
def test_update_running_or_finished_job_is_rejected(history: list[Event]) -> None:
    given(*history).when(UpdateJob("user:bob", priority=9)).then_rejected(InvalidState, "changed")


def test_update_keeps_fields_that_are_not_given() -> None:
    planned = make_job_submitted(priority=3, not_before=LATER)
    state = given(planned, JobUpdated(by="user:bob", parameters={})).state
    assert state.spec == planned.model_copy(update={"parameters": {}})
    assert state.due_at == LATER
    assert given(planned, JobUpdated(by="user:bob", priority=0)).state.spec.priority == 0


def test_updated_start_time_applies_to_next_claim() -> None:
    moved = JobUpdated(by="user:bob", not_before=LATER)
    given(submitted, moved).when(ClaimJob("w1", NOON)).then_rejected(InvalidState)
    earlier = JobUpdated(by="user:bob", not_before=NOON)
    given(make_job_submitted(not_before=LATER), earlier).when(ClaimJob("w1", NOON)).then(claimed)


@parametrize_histories(EXISTING)
def test_change_access_in_any_state_succeeds(history: list[Event]) -> None:
    given(*history).when(ChangeAccess("user:bob", ACCESS)).then(JobAccessChanged(by="user:bob", access_control=ACCESS))
    assert given(*history, JobAccessChanged(by="user:bob", access_control=ACCESS)).state.spec.access_control == ACCESS


@parametrize_histories(EXISTING)
def test_repeated_archive_and_unarchive_record_nothing(history: list[Event]) -> None:
    archived = JobArchived(by="user:bob", reason="old")
    given(*history).when(Archive("user:bob", "old")).then(archived)
    given(*history, archived).when(Archive("user:bob")).then_no_events()
    given(*history, archived).when(Unarchive("user:bob")).then(JobUnarchived(by="user:bob"))
    given(*history).when(Unarchive("user:bob")).then_no_events()
    given(*history, archived, JobUnarchived(by="user:bob")).when(Unarchive("user:bob")).then_no_events()


@parametrize_histories(PENDING | FINISHED)
def test_delete_job_that_is_not_running_succeeds(history: list[Event]) -> None:
    given(*history).when(Delete("user:bob", "old")).then(JobDeleted(by="user:bob", reason="old"))


@parametrize_histories(RUNNING)
def test_delete_running_job_is_rejected(history: list[Event]) -> None:
    given(*history).when(Delete("user:bob")).then_rejected(InvalidState, "cancel the job first")


def test_start_time_is_stored_in_utc_milliseconds() -> None:
    local = datetime.fromisoformat("2025-02-01T14:00:00.123456+02:00")
    assert make_job_submitted(not_before=local).not_before == datetime(2025, 2, 1, 12, 0, 0, 123000, tzinfo=UTC)


@pytest.mark.parametrize("start_time", ["9999-12-31T23:59:59-05:00", "0001-01-01T00:00:00+05:00"])
def test_start_time_outside_calendar_is_invalid(start_time: str) -> None:
    with pytest.raises(ValueError, match="not_before"):
        make_job_submitted(not_before=start_time)


def evolve_all(state: Job | None, events: Iterable[Event]) -> Job:
    for event in events:
        state = job.evolve(state, event)  # type: ignore[arg-type]
    assert state is not None
    return state


def test_step_outputs_beyond_total_limit_are_rejected() -> None:
    text = "x" * (limits.MAX_STEP_OUTPUT_BYTES // 10)
    state = evolve_all(None, RUNNING["first attempt"])
    for key in [*"123456789", "9"]:  # a step that is completed again counts once
        state = evolve_all(state, job.decide(report_step("w1", 1, "page", key, text, 0.5), state))
    with pytest.raises(InvalidEvent, match="outputs of all completed steps of a job"):
        job.decide(report_step("w1", 1, "page", "10", text + text, 0.5), state)
    assert job.decide(report_step("w1", 1, "page", "10", "small", 0.5), state)
    assert job.decide(report_step("w1", 1, "page", "10", 2**70, 0.5), state), "the append rejects it, with the reason"


def test_parameter_changes_beyond_total_limit_are_rejected() -> None:
    change = UpdateJob("user:alice", {"text": "x" * (limits.MAX_CHANGED_PARAMETERS_BYTES // 10)})
    state = evolve_all(None, PENDING["submitted"])
    for _ in range(9):
        state = evolve_all(state, job.decide(change, state))
    with pytest.raises(InvalidEvent, match="all changes of a job's `parameters` together"):
        job.decide(change, state)
    assert job.decide(UpdateJob("user:alice", priority=5), state)
