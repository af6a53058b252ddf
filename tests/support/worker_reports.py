"""Build `ReportEvent` commands of a worker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jobledger.ledger.domain.commands import ReportEvent
from jobledger.ledger.domain.events import JobCompleted, JobLogged, JobProgressed, JobResults, LogEntry, StepCompleted


def report_progress(worker_id: str, attempt: int, step: str, percent: float, message: str) -> ReportEvent:
    return ReportEvent(worker_id, JobProgressed(attempt=attempt, step=step, percent=percent, message=message))


def report_log(worker_id: str, attempt: int, entries: Sequence[LogEntry]) -> ReportEvent:
    return ReportEvent(worker_id, JobLogged(attempt=attempt, entries=list(entries)))


def report_step(
    worker_id: str, attempt: int, step: str, key: str, output: Any, duration_s: float, **fields: Any
) -> ReportEvent:
    completed = StepCompleted(attempt=attempt, step=step, key=key, output=output, duration_s=duration_s, **fields)
    return ReportEvent(worker_id, completed)


def report_results(worker_id: str, attempt: int, results: JobResults) -> ReportEvent:
    return ReportEvent(worker_id, JobCompleted(attempt=attempt, results=results))
