"""Each report of a worker about its attempt, and the event that it causes."""

from __future__ import annotations

from datetime import timedelta

from jobledger.ledger.domain.commands import ConfirmCancel, FailAttempt, ReleaseJob, ReportEvent, WorkerCommand
from jobledger.ledger.domain.events import (
    ErrorInfo,
    JobAttemptFailed,
    JobCancelled,
    JobCompleted,
    JobEvent,
    JobLogged,
    JobProgressed,
    JobReleased,
    LogEntry,
    StepCompleted,
)
from tests.support.event_examples import NOON, make_results

LATER = NOON + timedelta(minutes=1)
OUTAGE = ErrorInfo(code="OUTAGE", message="no answer")


def make_reports(worker_id: str = "w1", attempt: int = 1) -> list[tuple[WorkerCommand, JobEvent]]:
    """Return each report of a worker, and its event in a job that has attempts left and no cancel request."""
    line = LogEntry(timestamp=NOON, level="info", message="hello")
    step = {"step": "page", "key": "k1", "output": [1], "duration_s": 0.5, "tokens_used": 3, "warnings": ["slow"]}
    recorded = (
        JobProgressed(attempt=attempt, step="page", percent=10.0, message="reading"),
        JobLogged(attempt=attempt, entries=[line]),
        StepCompleted(attempt=attempt, **step),
        JobCompleted(attempt=attempt, results=make_results()),
    )
    return [
        *((ReportEvent(worker_id, event), event) for event in recorded),
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
