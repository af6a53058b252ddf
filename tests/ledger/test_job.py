"""The rules of a job: every command in every state where it matters, and laws that no sequence of commands breaks."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

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
from tests.support.decider_spec import given_for
from tests.support.event_examples import ACCESS, NOON, make_job_submitted, make_results

given = given_for(job)
LATER = NOON + timedelta(minutes=1)
OUTAGE = Failure(code="OUTAGE", message="no answer")

asked = make_job_submitted(max_attempts=2)
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
    "submitted": [asked],
    "failed in a way that may pass": [asked, claimed, retried],
    "released": [asked, claimed, released],
    "lease expired": [asked, claimed, expired],
    "restarted": [asked, claimed, completed, restarted],
}
RUNNING: dict[str, list[Event]] = {
    "first attempt": [asked, claimed],
    "asked to cancel": [asked, claimed, cancel_requested],
    "second attempt": [asked, claimed, released, claimed_again],
}
OVER: dict[str, list[Event]] = {
    "completed": [asked, claimed, completed],
    "failed": [asked, claimed, failed],
    "cancelled while waiting": [asked, cancelled],
    "cancelled while running": [asked, claimed, cancel_requested, cancelled],
}
ALIVE = WAITING | RUNNING | OVER


def in_each(histories: dict[str, list[Event]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("history", histories.values(), ids=histories.keys())


def reports(worker_id: str = "w1", attempt: int = 1) -> list[tuple[WorkerCommand, JobEvent]]:
    """Everything a worker can say, and what it causes in a job with attempts left that nobody wants cancelled."""
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


EVERY_COMMAND: list[JobCommand] = [
    *(command for command, _ in reports()),
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


def by_name(command: Any) -> str:
    return type(command).__name__


# Beginning and end ------------------------------------------------------------------------------------------------


def test_what_is_asked_for_is_submitted() -> None:
    given().when(SubmitJob(asked)).then(asked)


def test_an_id_is_taken_only_once_even_after_the_job_was_deleted() -> None:
    given(asked).when(SubmitJob(asked)).then_rejected(AlreadyExists)
    given(asked, deleted).when(SubmitJob(asked)).then_rejected(AlreadyExists)


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=by_name)
def test_nothing_can_be_done_with_a_job_that_does_not_exist_or_is_deleted(command: JobCommand) -> None:
    given().when(command).then_rejected(NotFound)
    given(asked, deleted).when(command).then_rejected(NotFound)
    given(asked, claimed, completed, deleted).when(command).then_rejected(NotFound)


def test_a_stream_that_does_not_begin_with_a_submission_cannot_be_folded() -> None:
    with pytest.raises(NotFound, match="JobClaimed"):
        job.evolve(None, claimed)


# Claiming ---------------------------------------------------------------------------------------------------------


def test_a_claim_begins_the_first_attempt() -> None:
    given(asked).when(ClaimJob("w1", NOON)).then(claimed)


@in_each({name: history for name, history in WAITING.items() if name != "submitted"})
def test_every_later_claim_begins_the_next_attempt(history: list[Event]) -> None:
    given(*history).when(ClaimJob("w2", LATER)).then(JobClaimed(worker_id="w2", attempt=2))


@in_each(RUNNING | OVER)
def test_only_a_waiting_job_can_be_claimed(history: list[Event]) -> None:
    given(*history).when(ClaimJob("w2", LATER)).then_rejected(InvalidState, "claimed")


def test_a_job_with_a_start_time_cannot_be_claimed_before_it() -> None:
    planned = make_job_submitted(not_before=LATER)
    given(planned).when(ClaimJob("w1", LATER - timedelta(milliseconds=1))).then_rejected(
        InvalidState, LATER.isoformat()[:19]
    )
    given(planned).when(ClaimJob("w1", LATER)).then(claimed)


def test_a_failed_attempt_is_not_repeated_before_its_retry_time() -> None:
    given(asked, claimed, retried).when(ClaimJob("w2", NOON)).then_rejected(InvalidState)
    given(asked, claimed, retried).when(ClaimJob("w2", LATER)).then(claimed_again)


@pytest.mark.parametrize("end", [released, expired], ids=by_name)
def test_a_job_that_lost_its_worker_can_be_claimed_at_once_whatever_its_start_time_was(end: Event) -> None:
    given(make_job_submitted(not_before=NOON), claimed, end).when(ClaimJob("w2", NOON)).then(claimed_again)


# What a worker says -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("command", "event"), reports(), ids=lambda it: by_name(it))
def test_the_worker_of_the_attempt_is_believed(command: WorkerCommand, event: JobEvent) -> None:
    given(asked, claimed).when(command).then(event)


@pytest.mark.parametrize(("command", "event"), reports(), ids=lambda it: by_name(it))
@in_each(WAITING | OVER)
def test_a_worker_that_speaks_for_a_job_it_does_not_run_is_fenced(
    history: list[Event], command: WorkerCommand, event: JobEvent
) -> None:
    given(*history).when(command).then(WorkerFenced(worker_id="w1", attempt=1, rejected_event=type(event).__name__))


@pytest.mark.parametrize("command", [command for command, _ in reports("w1", 1)], ids=by_name)
def test_a_worker_whose_attempt_another_has_followed_is_fenced(command: WorkerCommand) -> None:
    decided = job.decide(command, given(asked, claimed, expired, claimed_again).state)
    assert [type(event) for event in decided] == [WorkerFenced]


@pytest.mark.parametrize("command", [command for command, _ in reports("w2", 1)], ids=by_name)
def test_the_right_attempt_in_the_mouth_of_another_worker_is_fenced(command: WorkerCommand) -> None:
    decided = job.decide(command, given(asked, claimed).state)
    assert [type(event) for event in decided] == [WorkerFenced]


def test_the_same_worker_is_fenced_for_its_own_earlier_attempt() -> None:
    history = [asked, claimed, released, JobClaimed(worker_id="w1", attempt=2)]
    given(*history).when(CompleteJob("w1", 1, make_results())).then(fenced)


def test_being_fenced_changes_nothing() -> None:
    assert (
        given(asked, claimed, expired, claimed_again, fenced).state
        == given(asked, claimed, expired, claimed_again).state
    )


# Attempts ---------------------------------------------------------------------------------------------------------


def test_an_error_that_will_not_pass_fails_the_job_at_once() -> None:
    given(asked, claimed).when(FailAttempt("w1", 1, OUTAGE, None)).then(JobFailed(attempt=1, error=OUTAGE))


def test_the_last_attempt_fails_the_job() -> None:
    history = [asked, claimed, retried, claimed_again]
    given(*history).when(FailAttempt("w2", 2, OUTAGE, LATER)).then(JobFailed(attempt=2, error=OUTAGE))


def test_an_attempt_that_was_given_back_does_not_count() -> None:
    history = [asked, claimed, released, claimed_again]
    given(*history).when(FailAttempt("w2", 2, OUTAGE, LATER)).then(
        JobAttemptFailed(attempt=2, error=OUTAGE, retry_at=LATER)
    )


def test_an_attempt_that_lost_its_lease_counts() -> None:
    history = [asked, claimed, expired, claimed_again]
    given(*history).when(FailAttempt("w2", 2, OUTAGE, LATER)).then(JobFailed(attempt=2, error=OUTAGE))


def test_an_expired_lease_frees_the_job() -> None:
    given(asked, claimed).when(ExpireLease("w1", 1)).then(expired)


def test_an_expired_lease_in_the_last_attempt_fails_the_job() -> None:
    decided = job.decide(ExpireLease("w2", 2), given(asked, claimed, retried, claimed_again).state)
    assert decided[0] == JobLeaseExpired(worker_id="w2", attempt=2)
    assert isinstance(decided[1], JobFailed)
    assert (decided[1].attempt, decided[1].error.code) == (2, "WORKER_LOST")
    assert given(asked, claimed, retried, claimed_again, *decided).state.status == "failed"


@pytest.mark.parametrize(
    "history",
    [
        [asked, claimed, expired],
        [asked, claimed, expired, claimed_again],
        [asked, claimed, released],
        [asked, claimed, completed],
        [asked],
    ],
)
def test_an_expired_lease_is_noticed_once(history: list[Event]) -> None:
    given(*history).when(ExpireLease("w1", 1)).then_no_events()


def test_an_expired_lease_of_another_worker_is_of_no_concern() -> None:
    given(asked, claimed).when(ExpireLease("w2", 1)).then_no_events()
    given(asked, claimed).when(ExpireLease("w1", 2)).then_no_events()


# Cancelling -------------------------------------------------------------------------------------------------------


@in_each(WAITING)
def test_a_waiting_job_is_cancelled_at_once(history: list[Event]) -> None:
    given(*history).when(CancelJob("alice", "wrong talk")).then(cancelled)


def test_a_running_job_is_asked_to_stop_once() -> None:
    given(asked, claimed).when(CancelJob("alice", "wrong talk")).then(cancel_requested)
    given(asked, claimed, cancel_requested).when(CancelJob("bob")).then_no_events()


@in_each(OVER)
def test_an_ended_job_cannot_be_cancelled(history: list[Event]) -> None:
    given(*history).when(CancelJob("alice")).then_rejected(InvalidState, "cancelled")


@pytest.mark.parametrize(
    "command",
    [
        ConfirmCancel("w1", 1),
        FailAttempt("w1", 1, OUTAGE, LATER),
        FailAttempt("w1", 1, OUTAGE, None),
        ReleaseJob("w1", 1, "shutdown"),
    ],
    ids=["confirmed", "failed in a way that may pass", "failed", "given back"],
)
def test_however_the_worker_stops_a_job_it_was_asked_to_stop_the_job_is_cancelled(command: WorkerCommand) -> None:
    given(asked, claimed, cancel_requested).when(command).then(cancelled)


def test_a_job_whose_worker_died_before_it_could_obey_is_cancelled() -> None:
    given(asked, claimed, cancel_requested).when(ExpireLease("w1", 1)).then(expired, cancelled)


def test_a_worker_that_was_done_before_it_heard_of_the_cancellation_has_completed_the_job() -> None:
    given(asked, claimed, cancel_requested).when(CompleteJob("w1", 1, completed.results)).then(completed)


def test_a_cancellation_does_not_outlive_a_restart() -> None:
    history = [asked, claimed, cancel_requested, cancelled, restarted, claimed_again]
    given(*history).when(FailAttempt("w2", 2, OUTAGE, LATER)).then(
        JobAttemptFailed(attempt=2, error=OUTAGE, retry_at=LATER)
    )


# Restarting -------------------------------------------------------------------------------------------------------


@in_each(OVER)
def test_an_ended_job_can_be_restarted_with_all_its_attempts(history: list[Event]) -> None:
    given(*history).when(RestartJob("bob", "again", reuse_steps=False)).then(
        JobRestarted(by="bob", reason="again", reuse_steps=False)
    )
    state = given(*history, restarted).state
    assert (state.status, state.counted_attempts, state.worker_id, state.due_at) == ("pending", 0, None, None)


@in_each(WAITING | RUNNING)
def test_a_job_that_has_not_ended_cannot_be_restarted(history: list[Event]) -> None:
    given(*history).when(RestartJob("bob")).then_rejected(InvalidState, "restarted")


def test_a_restart_does_not_use_an_attempt_number_again() -> None:
    given(asked, claimed, failed, restarted).when(ClaimJob("w1", NOON)).then(JobClaimed(worker_id="w1", attempt=2))


def test_finished_steps_survive_failed_attempts_and_restarts_unless_told_otherwise() -> None:
    history = [asked, claimed, step, failed]
    assert given(*history, restarted).state.steps == {"k1": step}
    assert given(*history, JobRestarted(by="bob", reuse_steps=False)).state.steps == {}


# Changing ---------------------------------------------------------------------------------------------------------


@in_each(WAITING)
def test_a_waiting_job_can_be_changed(history: list[Event]) -> None:
    given(*history).when(UpdateJob("bob", {"text": "bye"}, 9, LATER)).then(
        JobUpdated(by="bob", parameters={"text": "bye"}, priority=9, not_before=LATER)
    )


@in_each(RUNNING | OVER)
def test_only_a_waiting_job_can_be_changed(history: list[Event]) -> None:
    given(*history).when(UpdateJob("bob", priority=9)).then_rejected(InvalidState, "changed")


def test_what_is_not_named_stays_as_it_is() -> None:
    planned = make_job_submitted(priority=3, not_before=LATER)
    state = given(planned, JobUpdated(by="bob", parameters={})).state
    assert state.spec == planned.model_copy(update={"parameters": {}})
    assert state.due_at == LATER
    assert given(planned, JobUpdated(by="bob", priority=0)).state.spec.priority == 0


def test_a_new_start_time_counts_for_the_next_claim() -> None:
    moved = JobUpdated(by="bob", not_before=LATER)
    given(asked, moved).when(ClaimJob("w1", NOON)).then_rejected(InvalidState)
    earlier = JobUpdated(by="bob", not_before=NOON)
    given(make_job_submitted(not_before=LATER), earlier).when(ClaimJob("w1", NOON)).then(claimed)


@in_each(ALIVE)
def test_access_can_be_changed_at_any_time(history: list[Event]) -> None:
    given(*history).when(ChangeAccess("bob", ACCESS)).then(JobAccessChanged(by="bob", access_control=ACCESS))
    assert given(*history, JobAccessChanged(by="bob", access_control=ACCESS)).state.spec.access_control == ACCESS


@in_each(ALIVE)
def test_archiving_is_done_once_and_undone_once(history: list[Event]) -> None:
    archived = JobArchived(by="bob", reason="old")
    given(*history).when(Archive("bob", "old")).then(archived)
    given(*history, archived).when(Archive("bob")).then_no_events()
    given(*history, archived).when(Unarchive("bob")).then(JobUnarchived(by="bob"))
    given(*history).when(Unarchive("bob")).then_no_events()
    given(*history, archived, JobUnarchived(by="bob")).when(Unarchive("bob")).then_no_events()


@in_each(WAITING | OVER)
def test_a_job_that_is_not_running_can_be_deleted(history: list[Event]) -> None:
    given(*history).when(Delete("bob", "old")).then(JobDeleted(by="bob", reason="old"))


@in_each(RUNNING)
def test_a_running_job_has_to_be_cancelled_before_it_is_deleted(history: list[Event]) -> None:
    given(*history).when(Delete("bob")).then_rejected(InvalidState, "cancel it first")


# Laws -------------------------------------------------------------------------------------------------------------

OUTCOMES = (JobCompleted, JobAttemptFailed, JobFailed, JobLeaseExpired, JobReleased, JobCancelled)
HARMLESS = (WorkerFenced, JobAccessChanged, JobArchived, JobUnarchived)
WORKERS = st.sampled_from(["w1", "w2", "w3"])


@dataclass(frozen=True)
class Grant:
    """What a worker believes: that it runs this attempt."""

    worker_id: str
    attempt: int


class JobLaws(RuleBasedStateMachine):
    """Workers and people at one job, in any order. What holds is computed from the events alone, not from the state."""

    def __init__(self) -> None:
        super().__init__()
        self.state: Job | None = None
        self.history: list[JobEvent] = []
        self.grants: list[Grant] = []
        self.running: Grant | None = None
        self.outcomes: set[int] = set()
        self.over = self.gone = self.to_be_cancelled = False
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
        self.apply(reports(grant.worker_id, grant.attempt)[kind][0])

    @precondition(lambda self: self.grants)
    @rule(transient=st.booleans())
    def fail_the_newest(self, transient: bool) -> None:
        grant = self.grants[-1]
        self.apply(FailAttempt(grant.worker_id, grant.attempt, OUTAGE, self.now if transient else None))

    @rule(worker_id=WORKERS, attempt=st.integers(0, 9), kind=st.integers(0, 6))
    def lie(self, worker_id: str, attempt: int, kind: int) -> None:
        self.apply(reports(worker_id, attempt)[kind][0])

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
    def meddle(self, command: JobCommand) -> None:
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
        assert not self.gone, "something happened to a deleted job"
        for event in events:
            self.witness(command, event)
            self.history.append(event)
            self.state = job.evolve(self.state, event)
        return events

    def witness(self, command: JobCommand, event: JobEvent) -> None:
        """Hold one event against the laws."""
        if self.over:
            assert isinstance(event, (*HARMLESS, JobRestarted, JobDeleted)), "an ended job went on without a restart"
        if isinstance(command, WorkerCommand):
            speaker = Grant(command.worker_id, command.attempt)
            assert isinstance(event, WorkerFenced) == (speaker != self.running), "a report of the wrong attempt counted"
        if isinstance(event, JobClaimed):
            assert self.running is None, "two attempts at once"
            assert not self.to_be_cancelled, "a job was started that somebody wants cancelled"
            assert event.attempt == len(self.grants) + 1, "an attempt number was skipped or used again"
            self.running = Grant(event.worker_id, event.attempt)
            self.grants.append(self.running)
        if isinstance(event, OUTCOMES) and self.running is not None:
            assert self.running.attempt not in self.outcomes, "an attempt ended twice"
            self.outcomes.add(self.running.attempt)
            self.running = None
        if isinstance(event, JobCancelRequested):
            self.to_be_cancelled = True
        if isinstance(event, JobCompleted | JobFailed | JobCancelled):
            self.over, self.to_be_cancelled = True, False
        if isinstance(event, JobRestarted):
            assert self.over, "a job was restarted that had not ended"
            self.over = False
        self.gone = isinstance(event, JobDeleted)

    @invariant()
    def the_state_agrees_with_the_laws(self) -> None:
        if self.state is None:
            return
        assert (self.state.status in TERMINAL_STATUSES) == self.over
        assert (self.state.status == "processing") == (self.running is not None)
        assert self.state.worker_id == (self.running.worker_id if self.running else None)
        assert 0 <= self.state.counted_attempts <= self.max_attempts
        assert self.state.counted_attempts <= self.state.attempt == len(self.grants)
        if self.state.status == "pending":
            assert self.state.counted_attempts < self.max_attempts, "a job waits although its attempts are used up"

    def teardown(self) -> None:
        state = None
        for event in self.history:
            state = job.evolve(state, event)
        assert state == self.state


TestJobLaws = JobLaws.TestCase
TestJobLaws.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def test_a_moment_is_kept_in_utc_and_in_milliseconds() -> None:
    local = datetime.fromisoformat("2025-02-01T14:00:00.123456+02:00")
    assert make_job_submitted(not_before=local).not_before == datetime(2025, 2, 1, 12, 0, 0, 123000, tzinfo=UTC)


@pytest.mark.parametrize("moment", ["9999-12-31T23:59:59-05:00", "0001-01-01T00:00:00+05:00"])
def test_a_moment_beyond_the_calendar_is_an_invalid_value_and_not_a_fault(moment: str) -> None:
    with pytest.raises(ValueError, match="not_before"):
        make_job_submitted(not_before=moment)


def after(state: Job | None, events: Iterable[Event]) -> Job:
    for event in events:
        state = job.evolve(state, event)  # type: ignore[arg-type]
    assert state is not None
    return state


def test_outputs_of_steps_are_limited_together() -> None:
    text = "x" * (limits.MAX_STEP_OUTPUT_BYTES // 10)
    state = after(None, RUNNING["first attempt"])
    for key in [*"123456789", "9"]:  # one that is finished again counts once
        state = after(state, job.decide(CompleteStep("w1", 1, "page", key, text, 0.5), state))
    with pytest.raises(InvalidEvent, match="outputs of all completed steps together"):
        job.decide(CompleteStep("w1", 1, "page", "10", text + text, 0.5), state)
    assert job.decide(CompleteStep("w1", 1, "page", "10", "small", 0.5), state)
    assert job.decide(CompleteStep("w1", 1, "page", "10", 2**70, 0.5), state), "refused by the append, which says why"


def test_changes_of_parameters_are_limited_together() -> None:
    change = UpdateJob("alice", {"text": "x" * (limits.MAX_CHANGED_PARAMETERS_BYTES // 10)})
    state = after(None, WAITING["submitted"])
    for _ in range(9):
        state = after(state, job.decide(change, state))
    with pytest.raises(InvalidEvent, match="all changes of this job together"):
        job.decide(change, state)
    assert job.decide(UpdateJob("alice", priority=5), state)
