"""The job decider: invariants that hold for any sequence of commands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jobledger.ledger.domain import job
from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    Delete,
    ExpireLease,
    FailAttempt,
    JobCommand,
    RestartJob,
    SubmitJob,
    Unarchive,
    UpdateJob,
    WorkerCommand,
)
from jobledger.ledger.domain.errors import CommandRejected
from jobledger.ledger.domain.events import (
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
    WorkerFenced,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES
from tests.ledger.job_reports import LATER, OUTAGE, make_reports
from tests.support.event_examples import ACCESS, NOON, make_job_submitted

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

    @rule(reuse_steps=st.booleans(), parameters=st.none() | st.just({"text": "new"}))
    def restart(self, reuse_steps: bool, parameters: dict[str, str] | None) -> None:
        self.apply(RestartJob("user:bob", reuse_steps=reuse_steps, parameters=parameters))

    @rule(
        command=st.sampled_from(
            [
                CancelJob("user:alice"),
                UpdateJob("user:bob", {"text": "bye"}),
                UpdateJob("user:bob", not_before=NOON + timedelta(minutes=2)),
                ChangeAccess("user:bob", ACCESS),
                Archive("user:bob"),
                Unarchive("user:bob"),
            ]
        )
    )
    def change_job(self, command: JobCommand) -> None:
        self.apply(command)

    @precondition(lambda self: len(self.history) > 8)
    @rule()
    def delete(self) -> None:
        self.apply(Delete("user:bob"))

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
