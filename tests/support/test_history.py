"""The history check finds every violation and reports none for histories that the decider allows."""

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
    AddLogEntries,
    Archive,
    CancelJob,
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
    UpdateJob,
)
from jobledger.ledger.domain.errors import CommandRejected
from jobledger.ledger.domain.events import (
    EventMetadata,
    Failure,
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

OUTAGE = Failure(code="OUTAGE", message="no answer")
LINE = LogEntry(timestamp=NOON, level="info", message="hello")


class Log:
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

asked = make_job_submitted(max_attempts=2)
completed, cancelled = JobCompleted(attempt=1, results=make_results()), JobCancelled(by="alice")
restarted, anew = JobRestarted(by="bob"), JobRestarted(by="bob", reuse_steps=False)


def claimed(attempt: int = 1) -> JobClaimed:
    return JobClaimed(worker_id=f"w{attempt}", attempt=attempt)


def expired(attempt: int = 1) -> JobLeaseExpired:
    return JobLeaseExpired(worker_id=f"w{attempt}", attempt=attempt)


def released(attempt: int = 1) -> JobReleased:
    return JobReleased(worker_id=f"w{attempt}", attempt=attempt, reason="shutdown")


def failed(attempt: int = 1) -> JobFailed:
    return JobFailed(attempt=attempt, error=OUTAGE)


def retried(attempt: int = 1) -> JobAttemptFailed:
    return JobAttemptFailed(attempt=attempt, error=OUTAGE, retry_at=NOON)


def step(attempt: int = 1, key: str = "k1") -> StepCompleted:
    return StepCompleted(attempt=attempt, step="page", key=key, output=1, duration_s=1)


def fenced(attempt: int = 1, worker_id: str = "") -> WorkerFenced:
    return WorkerFenced(worker_id=worker_id or f"w{attempt}", attempt=attempt, rejected_event="JobCompleted")


def logged(attempt: int = 1) -> JobLogged:
    return JobLogged(attempt=attempt, entries=[LINE])


def progressed(attempt: int = 1) -> JobProgressed:
    return JobProgressed(attempt=attempt, step="page", percent=1, message="")


History = list[JobEvent]
RIGHT: dict[str, History] = {
    "completed": [asked, claimed(), progressed(), logged(), step(), completed],
    "cancelled while waiting": [asked, cancelled],
    "cancelled while running": [asked, claimed(), JobCancelRequested(by="alice"), cancelled],
    "cancelled when its worker died": [asked, claimed(), JobCancelRequested(by="alice"), expired(), cancelled],
    "lost twice": [asked, claimed(), expired(), claimed(2), expired(2), failed(2)],
    "given back more often than it may fail": [asked, claimed(), released(), claimed(2), released(2), claimed(3)],
    "as many attempts as before": [asked, claimed(), failed(), restarted, claimed(2), retried(2), claimed(3)],
    "a zombie": [asked, claimed(), expired(), fenced(), claimed(2), fenced(), failed(2), fenced(2)],
    "steps are kept": [asked, claimed(), step(), expired(), claimed(2), step(2, "k2")],
    "a step done twice in one attempt": [asked, claimed(), step(), step(), completed],
    "steps are not kept": [asked, claimed(), step(), completed, anew, claimed(2), step(2)],
    "deleted": [asked, JobUpdated(by="bob", priority=2), JobDeleted(by="bob")],
}
WRONG: dict[str, tuple[History, str]] = {
    "no beginning": ([claimed()], "position 1: JobClaimed must be the first"),
    "two beginnings": ([asked, asked], "position 2: JobSubmitted must be the first"),
    "two live attempts": ([asked, claimed(), claimed(2)], "position 3: JobClaimed of attempt 2 while 1 is live"),
    "a number left out": ([asked, claimed(2)], "position 2: .* 2 follows attempt 0"),
    "a number used again": ([asked, claimed(), released(), claimed(1)], "position 4: .* 1 follows attempt 1"),
    "progress before the claim": ([asked, progressed()], "position 2: .* attempt 1 while none is live"),
    "log lines after the end of the attempt": ([asked, claimed(), retried(), logged()], "position 4: JobLogged"),
    "a step of the attempt before": (
        [asked, claimed(), expired(), claimed(2), step()],
        "position 5: .* attempt 1 while 2",
    ),
    "completed by a zombie": ([asked, claimed(), expired(), claimed(2), completed], "position 5: JobCompleted"),
    "failed while waiting": ([asked, claimed(), released(), failed()], "position 4: JobFailed"),
    "failed with its lease though it has attempts left": ([asked, claimed(), expired(), failed()], "position 4"),
    "given back by a stranger": (
        [asked, claimed(), JobReleased(worker_id="w2", attempt=1, reason="")],
        "position 3: JobReleased of w2",
    ),
    "the lease of a stranger": ([asked, claimed(), JobLeaseExpired(worker_id="w2", attempt=1)], "position 3: .* w2"),
    "the lease of an attempt that is over": ([asked, claimed(), retried(), expired()], "position 4: JobLeaseExpired"),
    "two ends": ([asked, claimed(), completed, failed()], "position 4: JobFailed after the job has ended"),
    "claimed after its end": ([asked, cancelled, claimed()], "position 3: JobClaimed after the job has ended"),
    "restarted before its end": ([asked, claimed(), restarted], "position 3: JobRestarted before"),
    "alive after its deletion": ([asked, JobDeleted(by="bob"), fenced()], "position 3: .* after the job was deleted"),
    "deleted while it runs": ([asked, claimed(), JobDeleted(by="bob")], "position 3: .* while attempt 1 is live"),
    "asked to stop while it waits": ([asked, JobCancelRequested(by="alice")], "position 2: .* while no attempt"),
    "a step repeated": (
        [asked, claimed(), step(), expired(), claimed(2), step(2)],
        "position 6: .* 'page' in attempt 2, but attempt 1",
    ),
    "a step repeated after a restart that keeps it": (
        [asked, claimed(), step(), completed, restarted, claimed(2), step(2)],
        "position 7: .* 'page' in attempt 2",
    ),
    "the living fenced": ([asked, claimed(), fenced()], "position 3: WorkerFenced of attempt 1, which is live"),
    "fenced who never had it": ([asked, claimed(), expired(), fenced(1, "w2")], "position 4: .* of w2"),
    "fenced for an attempt that never was": ([asked, claimed(), expired(), fenced(2)], "position 4: .* attempt 2"),
    "fenced for no attempt": ([asked, fenced(0, "w1")], "position 2: .* attempt 0"),
    "one attempt too many": (
        [asked, claimed(), expired(), claimed(2), retried(2), claimed(3)],
        "position 6: .* 3 attempts, 2",
    ),
}


def told(events: History, actor: str = "test") -> list[Document]:
    log = Log()
    for event in events:
        log.append("job-1", [event], actor)
    return log.documents


@pytest.mark.parametrize("history", RIGHT.values(), ids=RIGHT.keys())
def test_what_may_happen_is_let_pass(history: History) -> None:
    check_history(told(history))


@pytest.mark.parametrize(("history", "match"), WRONG.values(), ids=WRONG.keys())
def test_what_must_not_happen_is_found_where_it_happened(history: History, match: str) -> None:
    with pytest.raises(AssertionError, match=f"job-1, {match}"):
        check_history(told(history))
    check_history(told(history[:-1]))


@pytest.mark.parametrize("word", [progressed(), completed, cancelled], ids=lambda event: type(event).__name__)
def test_a_worker_that_speaks_with_the_number_of_another_is_found(word: JobEvent) -> None:
    log = Log()
    log.append("job-1", [asked, claimed()])
    log.append("job-1", [word], "worker:w2")
    with pytest.raises(AssertionError, match=r"position 3: .* of w2, but the attempt is that of w1"):
        check_history(log.documents)


def test_a_job_that_fails_with_its_last_lease_fails_in_the_same_transaction() -> None:
    log = Log()
    log.append("job-1", [make_job_submitted(max_attempts=1), claimed(), expired()])
    log.append("job-2", [asked])
    log.append("job-1", [failed()])
    with pytest.raises(AssertionError, match="job-1, position 5: JobFailed of attempt 1 while none is live"):
        check_history(log.documents)


@pytest.mark.parametrize(
    "last", [[], [claimed()], [claimed(), released()], [cancelled, restarted]], ids=lambda events: str(len(events))
)
def test_a_job_that_has_not_ended_is_found_if_all_of_them_should_have(last: History) -> None:
    log = Log()
    log.append("job-1", [asked, cancelled])
    log.append("job-2", [asked, *last])
    log.append("job-3", [asked, JobDeleted(by="bob")])
    check_history(log.documents)
    with pytest.raises(AssertionError, match=f"job-2, position {3 + len(last)}: .* has not ended"):
        check_history(log.documents, all_finished=True)


def test_a_hole_a_lost_version_and_a_changed_event_are_found() -> None:
    def broken(change: Callable[[list[Document]], Any]) -> list[Document]:
        log = told([asked, claimed(), completed])
        change(log)
        return log

    for change in (
        lambda log: log.pop(1),
        lambda log: log[1].update(version=3),
        lambda log: log[1]["data"].update(worker_id="w2"),
    ):
        with pytest.raises(AssertionError):
            check_history(broken(change))


def test_voids_and_other_streams_are_no_concern() -> None:
    log = told([asked])
    log.append(build_void_document(2))
    batch: list[Document] = []
    build_documents(StreamAppend("batch-1", StreamHead(), [progressed()], EventMetadata(), NOON), batch)
    check_history([*log, {**batch[0], "_id": 3}])


# Whatever the rules let happen ----------------------------------------------------------------------------------------

Decide = Callable[[JobCommand, Job | None], list[JobEvent]]
Evolve = Callable[[Job | None, JobEvent], Job]
Action = tuple[str, str, int, str]


@dataclass
class Grant:
    """The state of a worker: its attempt and the completed steps."""

    attempt: int
    finished: set[str]


@dataclass
class Scene:
    """Workers, lease reapers and users with a few jobs. A worker is not notified of its expired lease."""

    decide: Decide = job.decide
    evolve: Evolve = job.evolve
    log: Log = field(default_factory=Log)
    jobs: dict[str, Job] = field(default_factory=dict)
    grants: dict[tuple[str, str], Grant] = field(default_factory=dict)
    """By worker and job. A finished attempt stays here until its worker is notified."""

    def act(self, action: str, job_id: str, choice: int, key: str) -> None:
        """Run one action if possible."""
        state = self.jobs.get(job_id)
        if state is None:
            self.do(job_id, "user:alice", SubmitJob(make_job_submitted(max_attempts=2 + int(job_id[-1]))))
        elif action == "claim":
            worker_id = WORKERS[choice]
            if self.do(job_id, f"worker:{worker_id}", ClaimJob(worker_id, NOON)):
                self.grants[worker_id, job_id] = Grant(state.attempt + 1, set(state.steps))
        elif action == "expire":
            if state.worker_id is not None:
                for watcher in WORKERS[:2]:  # all notice
                    self.do(job_id, f"worker:{watcher}", ExpireLease(state.worker_id, state.attempt))
        elif action in PEOPLE:
            self.do(job_id, "user:bob", PEOPLE[action])
        elif able := [worker_id for worker_id, granted in self.grants if granted == job_id]:
            self.speak(action, job_id, able[choice % len(able)], key)

    def speak(self, action: str, job_id: str, worker_id: str, key: str) -> None:
        grant = self.grants[worker_id, job_id]
        if action == "step":
            if key in grant.finished:
                return
            grant.finished.add(key)
        caused = self.do(job_id, f"worker:{worker_id}", report(action, worker_id, grant.attempt, key))
        if any(not isinstance(event, (JobProgressed, JobLogged, StepCompleted)) for event in caused):
            del self.grants[worker_id, job_id]  # fenced, or done

    def do(self, job_id: str, actor: str, command: JobCommand) -> list[JobEvent]:
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


def report(action: str, worker_id: str, attempt: int, key: str) -> JobCommand:
    commands: dict[str, JobCommand] = {
        "progress": ReportProgress(worker_id, attempt, "page", 50, ""),
        "log": AddLogEntries(worker_id, attempt, (LINE,)),
        "step": CompleteStep(worker_id, attempt, "page", key, 1, 1.0),
        "complete": CompleteJob(worker_id, attempt, make_results()),
        "fail": FailAttempt(worker_id, attempt, OUTAGE, NOON),
        "fail for good": FailAttempt(worker_id, attempt, OUTAGE, None),
        "release": ReleaseJob(worker_id, attempt, "shutdown"),
        "confirm": ConfirmCancel(worker_id, attempt),
    }
    return commands[action]


PEOPLE: dict[str, JobCommand] = {
    "cancel": CancelJob("bob"),
    "restart": RestartJob("bob"),
    "restart anew": RestartJob("bob", reuse_steps=False),
    "update": UpdateJob("bob", priority=3),
    "archive": Archive("bob"),
    "delete": Delete("bob"),
}
WORKERS = ["w1", "w2", "w3"]
THINGS = ["claim"] * 10 + ["step"] * 8 + ["expire", "fail", "progress", "release"] * 3
THINGS += ["log", "complete", "fail for good", "confirm"] + ["restart"] * 3 + [*PEOPLE]
JOBS, CHOICES, KEYS = ["job-0", "job-1"], range(3), ["k1", "k2"]
SCHEDULES = st.lists(
    st.tuples(st.sampled_from(THINGS), st.sampled_from(JOBS), st.sampled_from(CHOICES), st.sampled_from(KEYS)),
    min_size=10,
    max_size=100,
)


def played(schedule: Sequence[Action], decide: Decide = job.decide, evolve: Evolve = job.evolve) -> Log:
    scene = Scene(decide, evolve)
    for action in schedule:
        scene.act(*action)
    return scene.log


@given(SCHEDULES)
@hypothesis.settings(max_examples=200, deadline=None)
def test_whatever_the_rules_let_happen_is_a_history_that_keeps_the_promises(
    schedule: list[Action],
) -> None:
    check_history(played(schedule).documents)


# Rules with a mistake -------------------------------------------------------------------------------------------------


def no_fence(command: JobCommand, state: Job | None) -> list[JobEvent]:
    """Accepts events from any worker."""
    if state is not None and isinstance(command, (ReportProgress, CompleteStep, CompleteJob, ReleaseJob)):
        state = replace(state, status="processing", worker_id=command.worker_id, attempt=command.attempt)
    return job.decide(command, state)


def no_lock(command: JobCommand, state: Job | None) -> list[JobEvent]:
    """Allows a claim of a running job."""
    if state is not None and isinstance(command, ClaimJob) and state.status == "processing":
        state = replace(state, status="pending")
    return job.decide(command, state)


def fences_the_living(command: JobCommand, state: Job | None) -> list[JobEvent]:
    """Wrongly rejects progress when a worker has claimed the job twice."""
    decided = job.decide(command, state)
    if isinstance(command, ReportProgress) and command.attempt > 1:
        return [WorkerFenced(worker_id=command.worker_id, attempt=command.attempt, rejected_event="JobProgressed")]
    return decided


def uncounted(state: Job | None, event: JobEvent) -> Job:
    """Does not count an attempt with an expired lease."""
    after = job.evolve(state, event)
    return replace(after, counted_attempts=after.counted_attempts - 1) if isinstance(event, JobLeaseExpired) else after


def forgetful(state: Job | None, event: JobEvent) -> Job:
    """Forgets completed steps after their attempt."""
    after = job.evolve(state, event)
    return replace(after, steps={}) if isinstance(event, JobClaimed) else after


@pytest.mark.parametrize(
    ("decide", "evolve"),
    [
        (no_fence, job.evolve),
        (no_lock, job.evolve),
        (fences_the_living, job.evolve),
        (job.decide, uncounted),
        (job.decide, forgetful),
    ],
    ids=lambda rule: rule.__name__,
)
def test_rules_with_a_mistake_are_found_out(decide: Decide, evolve: Evolve) -> None:
    def is_found_out(dice: random.Random) -> bool:
        choose = dice.choice
        schedule = [(choose(THINGS), choose(JOBS), choose(CHOICES), choose(KEYS)) for _ in range(60)]
        try:
            check_history(played(schedule, decide, evolve).documents)
        except AssertionError:
            return True
        return False

    assert any(is_found_out(random.Random(seed)) for seed in range(500))
