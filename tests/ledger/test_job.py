"""The job decider: each command in each state that matters, and invariants that hold for any sequence of commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jobledger.ledger.domain import job, limits
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
from jobledger.ledger.domain.errors import AlreadyExists, CommandRejected, InvalidEvent, InvalidState, NotFound
from jobledger.ledger.domain.events import (
    Event,
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
    JobUnarchived,
    JobUpdated,
    LogEntry,
    StepCompleted,
    WorkerFenced,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES
from tests.support.decider_spec import given_for, parametrize_histories, type_name
from tests.support.event_examples import ACCESS, NOON, make_job_submitted, make_results

given = given_for(job)
LATER = NOON + timedelta(minutes=1)
OUTAGE = Failure(code="OUTAGE", message="no answer")

submitted = make_job_submitted(max_attempts=2)
claimed = JobClaimed(worker_id="w1", attempt=1)
claimed_again = JobClaimed(worker_id="w2", attempt=2)
step = StepCompleted(attempt=1, step="page", key="k1", output=[1], duration_s=0.5)
retried = JobAttemptFailed(attempt=1, error=OUTAGE, retry_at=LATER)
completed = JobCompleted(attempt=1, results=make_results())
failed = JobFailed(attempt=1, error=OUTAGE)
expired = JobLeaseExpired(worker_id="w1", attempt=1)
released = JobReleased(worker_id="w1", attempt=1, reason="shutdown")
cancel_requested = JobCancelRequested(by="alice", reason="wrong talk")
cancelled = JobCancelled(by="alice", reason="wrong talk")
restarted = JobRestarted(by="bob")
deleted = JobDeleted(by="bob")
fenced = WorkerFenced(worker_id="w1", attempt=1, rejected_event="JobCompleted")

WAITING: dict[str, list[Event]] = {
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
EXISTING = WAITING | RUNNING | FINISHED


def make_reports(worker_id: str = "w1", attempt: int = 1) -> list[tuple[WorkerCommand, JobEvent]]:
    """Return each report of a worker, and its event in a job that has attempts left and no cancel request."""
    line = LogEntry(timestamp=NOON, level="info", message="hello")
    results = make_results()
    finish = CompleteStep(worker_id, attempt, "page", "k1", [1], 0.5, 3, ("slow",))
    return [
        (
            ReportProgress(worker_id, attempt, "page", 10.0, "reading"),
            JobProgressed(attempt=attempt, step="page", percent=10.0, message="reading"),
        ),
        (AddLogEntries(worker_id, attempt, (line,)), JobLogged(attempt=attempt, entries=[line])),
        (
            finish,
            StepCompleted(
                attempt=attempt,
                step="page",
                key="k1",
                output=[1],
                duration_s=0.5,
                tokens_used=3,
                warnings=["slow"],
            ),
        ),
        (CompleteJob(worker_id, attempt, results), JobCompleted(attempt=attempt, results=results)),
        (
            FailAttempt(worker_id, attempt, OUTAGE, LATER),
            JobAttemptFailed(attempt=attempt, error=OUTAGE, retry_at=LATER),
        ),
        (
            ReleaseJob(worker_id, attempt, "shutdown"),
            JobReleased(worker_id=worker_id, attempt=attempt, reason="shutdown"),
        ),
        (ConfirmCancel(worker_id, attempt), JobCancelled(by=f"worker:{worker_id}")),
    ]


ALL_COMMANDS: list[JobCommand] = [
    *(command for command, _ in make_reports()),
    ClaimJob("w1", NOON),
    ExpireLease("w1", 1),
    CancelJob("alice"),
    RestartJob("alice"),
    UpdateJob("alice", priority=2),
    ChangeAccess("alice", ACCESS),
    Archive("alice"),
    Unarchive("alice"),
    Delete("alice"),
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


@parametrize_histories({name: history for name, history in WAITING.items() if name != "submitted"})
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
@parametrize_histories(WAITING | FINISHED)
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
    given(*history).when(CompleteJob("w1", 1, make_results())).then(fenced)


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


@parametrize_histories(WAITING)
def test_cancel_waiting_job_cancels_at_once(history: list[Event]) -> None:
    given(*history).when(CancelJob("alice", "wrong talk")).then(cancelled)


def test_cancel_running_job_requests_cancel_once() -> None:
    given(submitted, claimed).when(CancelJob("alice", "wrong talk")).then(cancel_requested)
    given(submitted, claimed, cancel_requested).when(CancelJob("bob")).then_no_events()


@parametrize_histories(FINISHED)
def test_cancel_finished_job_is_rejected(history: list[Event]) -> None:
    given(*history).when(CancelJob("alice")).then_rejected(InvalidState, "cancelled")


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
    given(submitted, claimed, cancel_requested).when(CompleteJob("w1", 1, completed.results)).then(completed)


def test_cancel_request_ends_with_restart() -> None:
    history = [submitted, claimed, cancel_requested, cancelled, restarted, claimed_again]
    given(*history).when(FailAttempt("w2", 2, OUTAGE, LATER)).then(
        JobAttemptFailed(attempt=2, error=OUTAGE, retry_at=LATER)
    )


# Restarting -------------------------------------------------------------------------------------------------------


@parametrize_histories(FINISHED)
def test_restart_finished_job_resets_counted_attempts(history: list[Event]) -> None:
    given(*history).when(RestartJob("bob", "again", reuse_steps=False)).then(
        JobRestarted(by="bob", reason="again", reuse_steps=False)
    )
    state = given(*history, restarted).state
    assert (state.status, state.counted_attempts, state.worker_id, state.due_at) == ("pending", 0, None, None)


@parametrize_histories(WAITING | RUNNING)
def test_restart_unfinished_job_is_rejected(history: list[Event]) -> None:
    given(*history).when(RestartJob("bob")).then_rejected(InvalidState, "restarted")


def test_claim_after_restart_uses_new_attempt_number() -> None:
    given(submitted, claimed, failed, restarted).when(ClaimJob("w1", NOON)).then(JobClaimed(worker_id="w1", attempt=2))


def test_restart_keeps_completed_steps_unless_reuse_is_off() -> None:
    history = [submitted, claimed, step, failed]
    assert given(*history, restarted).state.steps == {"k1": step}
    assert given(*history, JobRestarted(by="bob", reuse_steps=False)).state.steps == {}


# Changing ---------------------------------------------------------------------------------------------------------


@parametrize_histories(WAITING)
def test_update_waiting_job_records_update(history: list[Event]) -> None:
    given(*history).when(UpdateJob("bob", {"text": "bye"}, 9, LATER)).then(
        JobUpdated(by="bob", parameters={"text": "bye"}, priority=9, not_before=LATER)
    )


@parametrize_histories(RUNNING | FINISHED)
def test_update_running_or_finished_job_is_rejected(history: list[Event]) -> None:
    given(*history).when(UpdateJob("bob", priority=9)).then_rejected(InvalidState, "changed")


def test_update_keeps_fields_that_are_not_given() -> None:
    planned = make_job_submitted(priority=3, not_before=LATER)
    state = given(planned, JobUpdated(by="bob", parameters={})).state
    assert state.spec == planned.model_copy(update={"parameters": {}})
    assert state.due_at == LATER
    assert given(planned, JobUpdated(by="bob", priority=0)).state.spec.priority == 0


def test_updated_start_time_applies_to_next_claim() -> None:
    moved = JobUpdated(by="bob", not_before=LATER)
    given(submitted, moved).when(ClaimJob("w1", NOON)).then_rejected(InvalidState)
    earlier = JobUpdated(by="bob", not_before=NOON)
    given(make_job_submitted(not_before=LATER), earlier).when(ClaimJob("w1", NOON)).then(claimed)


@parametrize_histories(EXISTING)
def test_change_access_in_any_state_succeeds(history: list[Event]) -> None:
    given(*history).when(ChangeAccess("bob", ACCESS)).then(JobAccessChanged(by="bob", access_control=ACCESS))
    assert given(*history, JobAccessChanged(by="bob", access_control=ACCESS)).state.spec.access_control == ACCESS


@parametrize_histories(EXISTING)
def test_repeated_archive_and_unarchive_record_nothing(history: list[Event]) -> None:
    archived = JobArchived(by="bob", reason="old")
    given(*history).when(Archive("bob", "old")).then(archived)
    given(*history, archived).when(Archive("bob")).then_no_events()
    given(*history, archived).when(Unarchive("bob")).then(JobUnarchived(by="bob"))
    given(*history).when(Unarchive("bob")).then_no_events()
    given(*history, archived, JobUnarchived(by="bob")).when(Unarchive("bob")).then_no_events()


@parametrize_histories(WAITING | FINISHED)
def test_delete_job_that_is_not_running_succeeds(history: list[Event]) -> None:
    given(*history).when(Delete("bob", "old")).then(JobDeleted(by="bob", reason="old"))


@parametrize_histories(RUNNING)
def test_delete_running_job_is_rejected(history: list[Event]) -> None:
    given(*history).when(Delete("bob")).then_rejected(InvalidState, "cancel it first")


# Invariants -------------------------------------------------------------------------------------------------------

OUTCOMES = (JobCompleted, JobAttemptFailed, JobFailed, JobLeaseExpired, JobReleased, JobCancelled)
ALWAYS_ALLOWED = (WorkerFenced, JobAccessChanged, JobArchived, JobUnarchived)
WORKERS = st.sampled_from(["w1", "w2", "w3"])


@dataclass(frozen=True)
class Grant:
    """The attempt that a worker was granted."""

    worker_id: str
    attempt: int


class JobStateMachine(RuleBasedStateMachine):
    """Commands of workers and users on one job, in any order. The model uses the events only, not the state."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Job | None = None
        self.history: list[JobEvent] = []
        self.grants: list[Grant] = []
        self.running: Grant | None = None
        self.outcomes: set[int] = set()
        self.is_finished = self.is_deleted = self.cancel_is_requested = False
        self.now = NOON

    @initialize(max_attempts=st.integers(1, 3), planned=st.booleans())
    def submit(self, max_attempts: int, planned: bool) -> None:
        self.max_attempts = max_attempts
        self.apply(SubmitJob(make_job_submitted(max_attempts=max_attempts, not_before=LATER if planned else None)))

    @rule(worker_id=WORKERS)
    def claim(self, worker_id: str) -> None:
        self.apply(ClaimJob(worker_id, self.now))

    @rule(seconds=st.integers(1, 90))
    def wait(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)

    @precondition(lambda self: self.grants)
    @rule(data=st.data(), kind=st.integers(0, 6))
    def report(self, data: st.DataObject, kind: int) -> None:
        grant = data.draw(st.sampled_from(self.grants))
        self.apply(make_reports(grant.worker_id, grant.attempt)[kind][0])

    @precondition(lambda self: self.grants)
    @rule(transient=st.booleans())
    def fail_newest_attempt(self, transient: bool) -> None:
        grant = self.grants[-1]
        self.apply(FailAttempt(grant.worker_id, grant.attempt, OUTAGE, self.now if transient else None))

    @rule(worker_id=WORKERS, attempt=st.integers(0, 9), kind=st.integers(0, 6))
    def report_wrong_attempt(self, worker_id: str, attempt: int, kind: int) -> None:
        self.apply(make_reports(worker_id, attempt)[kind][0])

    @precondition(lambda self: self.grants)
    @rule(data=st.data())
    def expire(self, data: st.DataObject) -> None:
        grant = data.draw(st.sampled_from(self.grants))
        first = self.apply(ExpireLease(grant.worker_id, grant.attempt))
        second = self.apply(ExpireLease(grant.worker_id, grant.attempt))
        assert not second
        assert bool(first) <= (grant == self.grants[-1])

    @rule(reuse_steps=st.booleans())
    def restart(self, reuse_steps: bool) -> None:
        self.apply(RestartJob("bob", reuse_steps=reuse_steps))

    @rule(
        command=st.sampled_from(
            [
                CancelJob("alice"),
                UpdateJob("bob", {"text": "bye"}),
                UpdateJob("bob", not_before=NOON + timedelta(minutes=2)),
                ChangeAccess("bob", ACCESS),
                Archive("bob"),
                Unarchive("bob"),
            ]
        )
    )
    def change_job(self, command: JobCommand) -> None:
        self.apply(command)

    @precondition(lambda self: len(self.history) > 8)
    @rule()
    def delete(self) -> None:
        self.apply(Delete("bob"))

    def apply(self, command: JobCommand) -> Iterable[JobEvent]:
        try:
            events = job.decide(command, self.state)
        except CommandRejected:
            return []
        assert not self.is_deleted, "an event was recorded for a deleted job"
        for event in events:
            self.check_event(command, event)
            self.history.append(event)
            self.state = job.evolve(self.state, event)
        return events

    def check_event(self, command: JobCommand, event: JobEvent) -> None:
        """Check one event against the invariants."""
        if self.is_finished:
            assert isinstance(event, (*ALWAYS_ALLOWED, JobRestarted, JobDeleted)), (
                "a finished job continued without a restart"
            )
        if isinstance(command, WorkerCommand):
            reporter = Grant(command.worker_id, command.attempt)
            assert isinstance(event, WorkerFenced) == (reporter != self.running), (
                "a report was accepted or fenced wrongly"
            )
        if isinstance(event, JobClaimed):
            assert self.running is None, "two attempts ran at once"
            assert not self.cancel_is_requested, "a job was claimed in spite of a cancel request"
            assert event.attempt == len(self.grants) + 1, "an attempt number was skipped or reused"
            self.running = Grant(event.worker_id, event.attempt)
            self.grants.append(self.running)
        if isinstance(event, OUTCOMES) and self.running is not None:
            assert self.running.attempt not in self.outcomes, "an attempt ended twice"
            self.outcomes.add(self.running.attempt)
            self.running = None
        if isinstance(event, JobCancelRequested):
            self.cancel_is_requested = True
        if isinstance(event, JobCompleted | JobFailed | JobCancelled):
            self.is_finished, self.cancel_is_requested = True, False
        if isinstance(event, JobRestarted):
            assert self.is_finished, "an unfinished job was restarted"
            self.is_finished = False
        self.is_deleted = isinstance(event, JobDeleted)

    @invariant()
    def state_agrees_with_history(self) -> None:
        if self.state is None:
            return
        assert (self.state.status in TERMINAL_STATUSES) == self.is_finished
        assert (self.state.status == "processing") == (self.running is not None)
        assert self.state.worker_id == (self.running.worker_id if self.running else None)
        assert 0 <= self.state.counted_attempts <= self.max_attempts
        assert self.state.counted_attempts <= self.state.attempt == len(self.grants)
        if self.state.status == "pending":
            assert self.state.counted_attempts < self.max_attempts, "a job is pending without attempts left"

    def teardown(self) -> None:
        state = None
        for event in self.history:
            state = job.evolve(state, event)
        assert state == self.state


TestJobStateMachine = JobStateMachine.TestCase
TestJobStateMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


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
        state = evolve_all(state, job.decide(CompleteStep("w1", 1, "page", key, text, 0.5), state))
    with pytest.raises(InvalidEvent, match="outputs of all completed steps together"):
        job.decide(CompleteStep("w1", 1, "page", "10", text + text, 0.5), state)
    assert job.decide(CompleteStep("w1", 1, "page", "10", "small", 0.5), state)
    assert job.decide(CompleteStep("w1", 1, "page", "10", 2**70, 0.5), state), "the append rejects it, with the reason"


def test_parameter_changes_beyond_total_limit_are_rejected() -> None:
    change = UpdateJob("alice", {"text": "x" * (limits.MAX_CHANGED_PARAMETERS_BYTES // 10)})
    state = evolve_all(None, WAITING["submitted"])
    for _ in range(9):
        state = evolve_all(state, job.decide(change, state))
    with pytest.raises(InvalidEvent, match="all changes of this job together"):
        job.decide(change, state)
    assert job.decide(UpdateJob("alice", priority=5), state)
