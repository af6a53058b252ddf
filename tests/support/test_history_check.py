"""check_history() reports every violation, and none in histories that the job decider produces."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jobledger.ledger.domain import job
from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    ClaimJob,
    ConfirmCancel,
    Delete,
    ExpireLease,
    FailAttempt,
    JobCommand,
    ReleaseJob,
    ReportEvent,
    RestartJob,
    SubmitJob,
    UpdateJob,
)
from jobledger.ledger.domain.errors import CommandRejected
from jobledger.ledger.domain.events import (
    ErrorInfo,
    EventMetadata,
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
    JobUpdated,
    LogEntry,
    StepCompleted,
    WorkerFenced,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.envelope import StreamAppend, StreamHead, build_documents, build_void_document
from tests.support.event_examples import NOON, make_job_submitted, make_results
from tests.support.history_check import check_history
from tests.support.worker_reports import report_log, report_progress, report_results, report_step

OUTAGE = ErrorInfo(code="OUTAGE", message="no answer")
LINE = LogEntry(timestamp=NOON, level="info", message="hello")


class InMemoryLog:
    """A log without a database. Each event gets the next position."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self._heads: dict[str, StreamHead] = {}

    def append(self, job_id: str, events: Sequence[JobEvent], actor: str = "test") -> None:
        if not events:
            return
        new: list[Document] = []
        build_documents(
            StreamAppend(job_id, self._heads.get(job_id, StreamHead()), events, EventMetadata(actor), NOON), new
        )
        for document in new:
            document["_id"] = len(self.documents) + 1
            self.documents.append(document)
        last = self.documents[-1]
        self._heads[job_id] = StreamHead(last["version"], last["_id"], last["hash"])


# Small histories ------------------------------------------------------------------------------------------------------

submitted = make_job_submitted(max_attempts=2)
completed, cancelled = JobCompleted(attempt=1, results=make_results()), JobCancelled(by="user:alice")
restarted, restarted_without_steps = JobRestarted(by="user:bob"), JobRestarted(by="user:bob", reuse_steps=False)


def claimed(attempt: int = 1) -> JobClaimed:
    """Return the event of worker `w<attempt>`, as the functions below do."""
    return JobClaimed(worker_id=f"w{attempt}", attempt=attempt)


def lease_expired(attempt: int = 1) -> JobLeaseExpired:
    return JobLeaseExpired(worker_id=f"w{attempt}", attempt=attempt)


def released(attempt: int = 1) -> JobReleased:
    return JobReleased(worker_id=f"w{attempt}", attempt=attempt, reason="shutdown")


def failed(attempt: int = 1) -> JobFailed:
    return JobFailed(attempt=attempt, error=OUTAGE)


def attempt_failed(attempt: int = 1) -> JobAttemptFailed:
    return JobAttemptFailed(attempt=attempt, error=OUTAGE, retry_at=NOON)


def step_completed(attempt: int = 1, key: str = "k1", *, repeat_on_restart: bool = False) -> StepCompleted:
    return StepCompleted(
        attempt=attempt, step="page", key=key, output=1, duration_s=1, repeat_on_restart=repeat_on_restart
    )


def fenced(attempt: int = 1, worker_id: str = "") -> WorkerFenced:
    return WorkerFenced(worker_id=worker_id or f"w{attempt}", attempt=attempt, rejected_event="JobCompleted")


def logged(attempt: int = 1) -> JobLogged:
    return JobLogged(attempt=attempt, entries=[LINE])


def progressed(attempt: int = 1) -> JobProgressed:
    return JobProgressed(attempt=attempt, step="page", percent=1, message="")


History = list[JobEvent]
ALLOWED_HISTORIES: dict[str, History] = {
    "completed": [submitted, claimed(), progressed(), logged(), step_completed(), completed],
    "cancelled while pending": [submitted, cancelled],
    "cancelled while running": [submitted, claimed(), JobCancelRequested(by="user:alice"), cancelled],
    "lease expired after cancel request": [
        submitted,
        claimed(),
        JobCancelRequested(by="user:alice"),
        lease_expired(),
        cancelled,
    ],
    "two expired leases": [submitted, claimed(), lease_expired(), claimed(2), lease_expired(2), failed(2)],
    "more releases than max_attempts": [submitted, claimed(), released(), claimed(2), released(2), claimed(3)],
    "restart resets counted attempts": [
        submitted,
        claimed(),
        failed(),
        restarted,
        claimed(2),
        attempt_failed(2),
        claimed(3),
    ],
    "zombie worker fenced": [
        submitted,
        claimed(),
        lease_expired(),
        fenced(),
        claimed(2),
        fenced(),
        failed(2),
        fenced(2),
    ],
    "steps kept for the next attempt": [
        submitted,
        claimed(),
        step_completed(),
        lease_expired(),
        claimed(2),
        step_completed(2, "k2"),
    ],
    "step completed twice in one attempt": [submitted, claimed(), step_completed(), step_completed(), completed],
    "restart without steps": [
        submitted,
        claimed(),
        step_completed(),
        completed,
        restarted_without_steps,
        claimed(2),
        step_completed(2),
    ],
    "step repeated by a restart": [
        submitted,
        claimed(),
        step_completed(repeat_on_restart=True),
        completed,
        restarted,
        claimed(2),
        step_completed(2),
    ],
    "deleted": [submitted, JobUpdated(by="user:bob", priority=2), JobDeleted(by="user:bob")],
}
FORBIDDEN_HISTORIES: dict[str, tuple[History, str]] = {
    "not submitted": ([claimed()], "position 1: JobClaimed must be the first"),
    "submitted twice": ([submitted, submitted], "position 2: JobSubmitted must be the first"),
    "two live attempts": ([submitted, claimed(), claimed(2)], "position 3: JobClaimed of attempt 2 while 1 is live"),
    "attempt number skipped": ([submitted, claimed(2)], "position 2: .* 2 follows attempt 0"),
    "attempt number reused": ([submitted, claimed(), released(), claimed(1)], "position 4: .* 1 follows attempt 1"),
    "progress before the claim": ([submitted, progressed()], "position 2: .* attempt 1 while none is live"),
    "log entries after the attempt": ([submitted, claimed(), attempt_failed(), logged()], "position 4: JobLogged"),
    "step of the previous attempt": (
        [submitted, claimed(), lease_expired(), claimed(2), step_completed()],
        "position 5: .* attempt 1 while 2",
    ),
    "completed by zombie worker": (
        [submitted, claimed(), lease_expired(), claimed(2), completed],
        "position 5: JobCompleted",
    ),
    "failed while pending": ([submitted, claimed(), released(), failed()], "position 4: JobFailed"),
    "failed after expired lease with attempts left": ([submitted, claimed(), lease_expired(), failed()], "position 4"),
    "released by another worker": (
        [submitted, claimed(), JobReleased(worker_id="w2", attempt=1, reason="")],
        "position 3: JobReleased of w2",
    ),
    "lease of another worker expired": (
        [submitted, claimed(), JobLeaseExpired(worker_id="w2", attempt=1)],
        "position 3: .* w2",
    ),
    "lease of an ended attempt expired": (
        [submitted, claimed(), attempt_failed(), lease_expired()],
        "position 4: JobLeaseExpired",
    ),
    "ended twice": ([submitted, claimed(), completed, failed()], "position 4: JobFailed after the job has ended"),
    "claimed after the job ended": (
        [submitted, cancelled, claimed()],
        "position 3: JobClaimed after the job has ended",
    ),
    "restarted before the job ended": ([submitted, claimed(), restarted], "position 3: JobRestarted before"),
    "event after deletion": (
        [submitted, JobDeleted(by="user:bob"), fenced()],
        "position 3: .* after the job was deleted",
    ),
    "deleted while processing": (
        [submitted, claimed(), JobDeleted(by="user:bob")],
        "position 3: .* while attempt 1 is live",
    ),
    "cancel requested while pending": (
        [submitted, JobCancelRequested(by="user:alice")],
        "position 2: .* while no attempt",
    ),
    "step repeated in the next attempt": (
        [submitted, claimed(), step_completed(), lease_expired(), claimed(2), step_completed(2)],
        "position 6: .* 'page' in attempt 2, but attempt 1",
    ),
    "step repeated before the restart": (
        [submitted, claimed(), step_completed(repeat_on_restart=True), lease_expired(), claimed(2), step_completed(2)],
        "position 6: .* 'page' in attempt 2",
    ),
    "step repeated after restart with steps": (
        [submitted, claimed(), step_completed(), completed, restarted, claimed(2), step_completed(2)],
        "position 7: .* 'page' in attempt 2",
    ),
    "running attempt fenced": (
        [submitted, claimed(), fenced()],
        "position 3: WorkerFenced of attempt 1, which is live",
    ),
    "fenced worker never had the attempt": (
        [submitted, claimed(), lease_expired(), fenced(1, "w2")],
        "position 4: .* of w2",
    ),
    "fenced attempt does not exist": ([submitted, claimed(), lease_expired(), fenced(2)], "position 4: .* attempt 2"),
    "fenced attempt 0": ([submitted, fenced(0, "w1")], "position 2: .* attempt 0"),
    "more attempts than max_attempts": (
        [submitted, claimed(), lease_expired(), claimed(2), attempt_failed(2), claimed(3)],
        "position 6: .* 3 attempts, 2",
    ),
}


def build_log(events: History, actor: str = "test") -> list[Document]:
    log = InMemoryLog()
    for event in events:
        log.append("job-1", [event], actor)
    return log.documents


@pytest.mark.parametrize("history", ALLOWED_HISTORIES.values(), ids=ALLOWED_HISTORIES.keys())
def test_check_history_accepts_allowed_history(history: History) -> None:
    check_history(build_log(history))


@pytest.mark.parametrize(("history", "match"), FORBIDDEN_HISTORIES.values(), ids=FORBIDDEN_HISTORIES.keys())
def test_check_history_reports_position_of_violation(history: History, match: str) -> None:
    with pytest.raises(AssertionError, match=f"job-1, {match}"):
        check_history(build_log(history))
    check_history(build_log(history[:-1]))


@pytest.mark.parametrize("event", [progressed(), completed, cancelled], ids=lambda event: type(event).__name__)
def test_check_history_reports_event_by_other_worker(event: JobEvent) -> None:
    log = InMemoryLog()
    log.append("job-1", [submitted, claimed()])
    log.append("job-1", [event], "worker:w2")
    with pytest.raises(AssertionError, match=r"position 3: .* of w2, but the attempt is that of w1"):
        check_history(log.documents)


def test_job_failed_after_last_lease_requires_same_commit() -> None:
    log = InMemoryLog()
    log.append("job-1", [make_job_submitted(max_attempts=1), claimed(), lease_expired()])
    log.append("job-2", [submitted])
    log.append("job-1", [failed()])
    with pytest.raises(AssertionError, match="job-1, position 5: JobFailed of attempt 1 while none is live"):
        check_history(log.documents)


@pytest.mark.parametrize(
    "last", [[], [claimed()], [claimed(), released()], [cancelled, restarted]], ids=lambda events: str(len(events))
)
def test_unfinished_job_is_reported_with_all_finished(last: History) -> None:
    log = InMemoryLog()
    log.append("job-1", [submitted, cancelled])
    log.append("job-2", [submitted, *last])
    log.append("job-3", [submitted, JobDeleted(by="user:bob")])
    check_history(log.documents)
    with pytest.raises(AssertionError, match=f"job-2, position {3 + len(last)}: .* has not ended"):
        check_history(log.documents, all_finished=True)


def test_gap_skipped_version_and_changed_event_are_reported() -> None:
    def build_changed_log(change: Callable[[list[Document]], Any]) -> list[Document]:
        log = build_log([submitted, claimed(), completed])
        change(log)
        return log

    for change in (
        lambda log: log.pop(1),
        lambda log: log[1].update(version=3),
        lambda log: log[1]["data"].update(worker_id="w2"),
    ):
        with pytest.raises(AssertionError):
            check_history(build_changed_log(change))


def test_void_positions_and_other_streams_are_ignored() -> None:
    log = build_log([submitted])
    log.append(build_void_document(2))
    batch: list[Document] = []
    build_documents(StreamAppend("batch-1", StreamHead(), [progressed()], EventMetadata(), NOON), batch)
    check_history([*log, {**batch[0], "_id": 3}])


# Histories of the job decider ---------------------------------------------------------------------------------------

Decide = Callable[[JobCommand, Job | None], list[JobEvent]]
Evolve = Callable[[Job | None, JobEvent], Job]
Action = tuple[str, str, int, str]


@dataclass
class Grant:
    """The state of a worker: its attempt and the completed steps."""

    attempt: int
    completed_steps: set[str]


@dataclass
class Simulation:
    """Workers, lease reapers and users with a few jobs. A worker is not notified of its expired lease."""

    decide: Decide = job.decide
    evolve: Evolve = job.evolve
    log: InMemoryLog = field(default_factory=InMemoryLog)
    jobs: dict[str, Job] = field(default_factory=dict)
    grants: dict[tuple[str, str], Grant] = field(default_factory=dict)
    """By worker and job. A finished attempt stays here until its worker is notified."""

    def run_action(self, action: str, job_id: str, choice: int, key: str) -> None:
        """Run one action if possible."""
        state = self.jobs.get(job_id)
        if state is None:
            self.handle(job_id, "user:alice", SubmitJob(make_job_submitted(max_attempts=2 + int(job_id[-1]))))
        elif action == "claim":
            worker_id = WORKERS[choice]
            if self.handle(job_id, f"worker:{worker_id}", ClaimJob(worker_id, NOON)):
                self.grants[worker_id, job_id] = Grant(state.attempt + 1, set(state.steps))
        elif action == "expire":
            if state.worker_id is not None:
                for reaper in WORKERS[:2]:  # both find the expired lease
                    self.handle(job_id, f"worker:{reaper}", ExpireLease(state.worker_id, state.attempt))
        elif action in USER_COMMANDS:
            self.handle(job_id, "user:bob", USER_COMMANDS[action])
        elif claimants := [worker_id for worker_id, granted_job in self.grants if granted_job == job_id]:
            self.report(action, job_id, claimants[choice % len(claimants)], key)

    def report(self, action: str, job_id: str, worker_id: str, key: str) -> None:
        grant = self.grants[worker_id, job_id]
        if action == "step":
            if key in grant.completed_steps:
                return
            grant.completed_steps.add(key)
        events = self.handle(job_id, f"worker:{worker_id}", make_report(action, worker_id, grant.attempt, key))
        if any(not isinstance(event, (JobProgressed, JobLogged, StepCompleted)) for event in events):
            del self.grants[worker_id, job_id]  # fenced, or done

    def handle(self, job_id: str, actor: str, command: JobCommand) -> list[JobEvent]:
        state = self.jobs.get(job_id)
        try:
            events = self.decide(command, state)
        except CommandRejected:
            return []
        for event in events:
            state = self.evolve(state, event)
        if state is not None:
            self.jobs[job_id] = state
        self.log.append(job_id, events, actor)
        return events


def make_report(action: str, worker_id: str, attempt: int, key: str) -> JobCommand:
    commands: dict[str, JobCommand] = {
        "progress": report_progress(worker_id, attempt, "page", 50, ""),
        "log": report_log(worker_id, attempt, (LINE,)),
        "step": report_step(worker_id, attempt, "page", key, 1, 1.0),
        "complete": report_results(worker_id, attempt, make_results()),
        "fail": FailAttempt(worker_id, attempt, OUTAGE, NOON),
        "fail permanently": FailAttempt(worker_id, attempt, OUTAGE, None),
        "release": ReleaseJob(worker_id, attempt, "shutdown"),
        "confirm": ConfirmCancel(worker_id, attempt),
    }
    return commands[action]


USER_COMMANDS: dict[str, JobCommand] = {
    "cancel": CancelJob("user:bob"),
    "restart": RestartJob("user:bob"),
    "restart without steps": RestartJob("user:bob", reuse_steps=False),
    "update": UpdateJob("user:bob", priority=3),
    "archive": Archive("user:bob"),
    "delete": Delete("user:bob"),
}
WORKERS = ["w1", "w2", "w3"]
ACTIONS = ["claim"] * 10 + ["step"] * 8 + ["expire", "fail", "progress", "release"] * 3
ACTIONS += ["log", "complete", "fail permanently", "confirm"] + ["restart"] * 3 + [*USER_COMMANDS]
JOBS, CHOICES, KEYS = ["job-0", "job-1"], range(3), ["k1", "k2"]
SCHEDULES = st.lists(
    st.tuples(st.sampled_from(ACTIONS), st.sampled_from(JOBS), st.sampled_from(CHOICES), st.sampled_from(KEYS)),
    min_size=10,
    max_size=100,
)


def simulate(schedule: Sequence[Action], decide: Decide = job.decide, evolve: Evolve = job.evolve) -> InMemoryLog:
    simulation = Simulation(decide, evolve)
    for action in schedule:
        simulation.run_action(*action)
    return simulation.log


@given(SCHEDULES)
@hypothesis.settings(max_examples=200, deadline=None)
def test_check_history_accepts_any_history_of_the_decider(
    schedule: list[Action],
) -> None:
    check_history(simulate(schedule).documents)


# Faulty deciders ------------------------------------------------------------------------------------------------------


def decide_without_fence(command: JobCommand, state: Job | None) -> list[JobEvent]:
    """Accepts events from any worker."""
    if state is not None and isinstance(command, ReportEvent | ReleaseJob):
        state = replace(state, status="processing", worker_id=command.worker_id, attempt=command.attempt)
    return job.decide(command, state)


def decide_claim_of_running_job(command: JobCommand, state: Job | None) -> list[JobEvent]:
    """Allows a claim of a running job."""
    if state is not None and isinstance(command, ClaimJob) and state.status == "processing":
        state = replace(state, status="pending")
    return job.decide(command, state)


def decide_fencing_live_worker(command: JobCommand, state: Job | None) -> list[JobEvent]:
    """Wrongly rejects progress when a worker has claimed the job twice."""
    events = job.decide(command, state)
    if isinstance(command, ReportEvent) and isinstance(command.event, JobProgressed) and command.attempt > 1:
        return [WorkerFenced(worker_id=command.worker_id, attempt=command.attempt, rejected_event="JobProgressed")]
    return events


def evolve_without_counting_expired(state: Job | None, event: JobEvent) -> Job:
    """Does not count an attempt with an expired lease."""
    evolved = job.evolve(state, event)
    return (
        replace(evolved, counted_attempts=evolved.counted_attempts - 1)
        if isinstance(event, JobLeaseExpired)
        else evolved
    )


def evolve_without_keeping_steps(state: Job | None, event: JobEvent) -> Job:
    """Forgets completed steps after their attempt."""
    evolved = job.evolve(state, event)
    return replace(evolved, steps={}) if isinstance(event, JobClaimed) else evolved


@pytest.mark.parametrize(
    ("decide", "evolve"),
    [
        (decide_without_fence, job.evolve),
        (decide_claim_of_running_job, job.evolve),
        (decide_fencing_live_worker, job.evolve),
        (job.decide, evolve_without_counting_expired),
        (job.decide, evolve_without_keeping_steps),
    ],
    ids=lambda rule: rule.__name__,
)
def test_check_history_detects_faulty_decider(decide: Decide, evolve: Evolve) -> None:
    def is_detected(generator: random.Random) -> bool:
        choose = generator.choice
        schedule = [(choose(ACTIONS), choose(JOBS), choose(CHOICES), choose(KEYS)) for _ in range(60)]
        try:
            check_history(simulate(schedule, decide, evolve).documents)
        except AssertionError:
            return True
        return False

    assert any(is_detected(random.Random(seed)) for seed in range(500))
