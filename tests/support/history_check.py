"""Check a whole log for violations of the rules for jobs and attempts, such as after killed workers.

This module shares no code with `jobledger.ledger.domain.job`, so it does not share its errors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from jobledger.ledger.domain.events import (
    JobAccessChanged,
    JobArchived,
    JobAttemptFailed,
    JobCancelled,
    JobCancelRequested,
    JobClaimed,
    JobCompleted,
    JobDeleted,
    JobFailed,
    JobLeaseExpired,
    JobLogged,
    JobProgressed,
    JobReleased,
    JobRestarted,
    JobSubmitted,
    JobUnarchived,
    JobUpdated,
    RecordedEvent,
    StepCompleted,
    WorkerFenced,
)
from jobledger.ledger.mongo.connection import Document
from tests.support.ledger_setup import check_log

WORKER_EVENTS = (JobProgressed, JobLogged, StepCompleted, JobCompleted, JobAttemptFailed, JobFailed, JobReleased)
"""Events that only the worker of the running attempt may cause. JobFailed can also follow an expired lease."""
TERMINAL_EVENTS = (JobCompleted, JobFailed, JobCancelled)
ALWAYS_ALLOWED_EVENTS = (WorkerFenced, JobAccessChanged, JobArchived, JobUnarchived)


def check_history(documents: Iterable[Document], *, all_finished: bool = False) -> None:
    """Check a complete log, the documents of `events` in order, against the rules for jobs and attempts.

    Raises:
        AssertionError: A rule is violated. The message has the job and the position.
    """
    documents = list(documents)
    check_log(documents)
    histories: dict[str, _JobHistory] = {}
    for event in map(RecordedEvent, documents):
        if event.stream.startswith("job-"):
            histories.setdefault(event.stream, _JobHistory()).apply(event)
    for history in histories.values() if all_finished else ():
        history.require(history.over, history.events[-1], "is the last event, and the job has not ended")


@dataclass(slots=True)
class _JobHistory:
    """The state of one job."""

    events: list[RecordedEvent] = field(default_factory=list)
    max_attempts: int = 0
    counted: int = 0
    workers: list[str] = field(default_factory=list)
    """The worker of each attempt."""
    live: int = 0
    """The running attempt, or 0."""
    over: bool = False
    steps: dict[str, int] = field(default_factory=dict)
    """Attempt that completed each step, by the key of the step."""
    repeated_steps: set[str] = field(default_factory=set)
    """Keys of the steps that the next restart repeats."""

    def require(self, holds: bool, event: RecordedEvent, wrong: str) -> None:
        assert holds, f"{event.stream}, position {event.position}: {event.type} {wrong}"

    def apply(self, event: RecordedEvent) -> None:
        happened = event.event
        self.require(isinstance(happened, JobSubmitted) == (not self.events), event, "must be the first event, once")
        if self.over:
            self.require(
                isinstance(happened, (*ALWAYS_ALLOWED_EVENTS, JobRestarted, JobDeleted)),
                event,
                "after the job has ended",
            )
        self.require(
            not self.events or not isinstance(self.events[-1].event, JobDeleted), event, "after the job was deleted"
        )
        if isinstance(happened, WORKER_EVENTS) and not self._fails_with_its_lease(event):
            self._check_worker_event(event, happened.attempt)
        match happened:
            case JobSubmitted():
                self.max_attempts = happened.max_attempts
            case JobClaimed():
                self._claim(event, happened)
            case StepCompleted():
                self._finish_step(event, happened)
            case JobLeaseExpired():
                self._require_running(event, happened.attempt)
                self._require_worker(event, happened.worker_id)
                self.live = 0
            case JobReleased():
                self._require_worker(event, happened.worker_id)
                self.live, self.counted = 0, self.counted - 1
            case JobAttemptFailed():
                self.live = 0
            case JobCompleted() | JobFailed() | JobCancelled():
                if self.live:  # JobCancelled has no attempt
                    self._require_actor(event)
                self.live, self.over = 0, True
            case JobRestarted():
                self.require(self.over, event, "before the job has ended")
                self.over, self.counted = False, 0
                for key in list(self.steps) if not happened.reuse_steps else self.repeated_steps:
                    del self.steps[key]
                self.repeated_steps.clear()
            case WorkerFenced():
                self._fence(event, happened)
            case JobUpdated() | JobDeleted():
                self.require(not self.live, event, f"while attempt {self.live} is live")
                self.over = self.over or isinstance(happened, JobDeleted)
            case JobCancelRequested():
                self.require(self.live > 0, event, "while no attempt is live")
        self.events.append(event)

    def _fails_with_its_lease(self, event: RecordedEvent) -> bool:
        """Return whether the job fails because of an expired lease. Both events are in one commit."""
        before = self.events[-1]
        return (
            isinstance(event.event, JobFailed)
            and isinstance(before.event, JobLeaseExpired)
            and event.position == before.position + 1
            and event.event.attempt == before.event.attempt
            and self.counted == self.max_attempts
        )

    def _check_worker_event(self, event: RecordedEvent, attempt: int) -> None:
        self._require_running(event, attempt)
        self._require_actor(event)

    def _require_actor(self, event: RecordedEvent) -> None:
        role, _, name = event.meta.actor.partition(":")
        if role == "worker":  # tests may act as a worker
            self._require_worker(event, name)

    def _require_running(self, event: RecordedEvent, attempt: int) -> None:
        now = f"{self.live} is live" if self.live else "none is live"
        self.require(attempt == self.live, event, f"of attempt {attempt} while {now}")

    def _require_worker(self, event: RecordedEvent, name: str) -> None:
        self.require(name == self.workers[-1], event, f"of {name}, but the attempt is that of {self.workers[-1]}")

    def _claim(self, event: RecordedEvent, claimed: JobClaimed) -> None:
        self.require(not self.live, event, f"of attempt {claimed.attempt} while {self.live} is live")
        before = len(self.workers)
        self.require(claimed.attempt == before + 1, event, f"of attempt {claimed.attempt} follows attempt {before}")
        self.workers.append(claimed.worker_id)
        self.live, self.counted = claimed.attempt, self.counted + 1
        self.require(
            self.counted <= self.max_attempts, event, f"makes {self.counted} attempts, {self.max_attempts} are allowed"
        )

    def _finish_step(self, event: RecordedEvent, step: StepCompleted) -> None:
        earlier = self.steps.setdefault(step.key, step.attempt)
        self.require(
            earlier == step.attempt,
            event,
            f"of {step.step!r} in attempt {step.attempt}, but attempt {earlier} had finished it",
        )
        if step.repeat_on_restart:
            self.repeated_steps.add(step.key)
        else:
            self.repeated_steps.discard(step.key)

    def _fence(self, event: RecordedEvent, fenced: WorkerFenced) -> None:
        claimed = self.workers[fenced.attempt - 1 : fenced.attempt] if fenced.attempt > 0 else []
        self.require(
            claimed == [fenced.worker_id], event, f"of {fenced.worker_id}, which never had attempt {fenced.attempt}"
        )
        self.require(fenced.attempt != self.live, event, f"of attempt {fenced.attempt}, which is live")
