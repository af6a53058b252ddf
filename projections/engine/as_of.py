"""projections: the whole queue as it was: what waited, who worked on what, how the batches stood. Reads the log only.

In memory are the jobs that had not ended, and a few numbers for each batch. What ended is counted and forgotten; the
few jobs to which something happens afterwards are read again from their own streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from jobledger.ledger.domain import batch as batch_rules
from jobledger.ledger.domain import job as job_rules
from jobledger.ledger.domain.events import (
    BatchSubmitted,
    JobArchived,
    JobClaimed,
    JobLogged,
    JobProgressed,
    JobUnarchived,
    RecordedEvent,
    StepCompleted,
)
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES
from jobledger.ledger.store.event_store import EventStore

_IGNORED_EVENTS: Final = frozenset(
    event.__name__ for event in (JobProgressed, JobLogged, StepCompleted, JobArchived, JobUnarchived)
)
PointInTime = int | datetime
"""A position of the log, or a moment."""


@dataclass(slots=True)
class BatchState:
    """How a batch stood."""

    submission: BatchSubmitted
    status: str = "processing"
    paused: bool = False
    job_counts: Counter[str] = field(default_factory=Counter)

    def to_dict(self, batch_id: str) -> dict[str, Any]:
        """Return it for programs."""
        return {
            "batch_id": batch_id,
            "batch_name": self.submission.batch_name,
            "status": self.status,
            "paused": self.paused,
            "total_jobs": self.submission.total_jobs,
            "jobs": +self.job_counts,
        }


@dataclass(slots=True)
class OpenJob:
    """A job that had not ended: what the rules know of it, when it was submitted, and since when it is as it is."""

    job: Job
    submitted_at: datetime
    status_since: datetime


class HistoricalState:
    """Takes in the log, event by event, and says how everything stands then."""

    def __init__(self, log: EventStore) -> None:
        self._log = log
        self.position = 0
        self.time: datetime | None = None
        self.open_jobs: dict[str, OpenJob] = {}
        self.job_counts: Counter[str] = Counter()
        self.batches: dict[str, BatchState] = {}
        self.status_changes: dict[str, list[str | None]] = {}
        """Status before and now of the jobs that got another since `watch_changes`; None is: not there."""
        self._watching = False

    def track_changes(self) -> None:
        """From now on, keep which jobs change their status."""
        self._watching = True

    async def apply(self, event: RecordedEvent) -> None:
        """Take in the next event.

        Raises:
            LedgerUnavailable: the database failed.
            UnreadableEvent: a later version of this program has written the event.
        """
        self.position, self.time = event.position, event.time
        kind = event.stream.partition("-")[0]
        if kind == "batch":
            self._batch(event)
        elif kind == "job" and event.type not in _IGNORED_EVENTS:
            await self._job(event)

    def _batch(self, event: RecordedEvent) -> None:
        happened: Any = event.event
        if isinstance(happened, BatchSubmitted):
            self.batches[event.stream] = BatchState(happened)
            return
        known = self.batches.get(event.stream)
        if known is None:
            return
        rules = batch_rules.Batch(known.submission, known.status, known.paused)  # type: ignore[arg-type]  # as it was read
        after = batch_rules.evolve(rules, happened)
        known.status, known.paused = after.status, after.paused
        if after.deleted:
            del self.batches[event.stream]

    async def _job(self, event: RecordedEvent) -> None:
        happened: Any = event.event
        known = self.open_jobs.get(event.stream)
        before = known.job if known is not None else await self._load_finished_job(event)
        after = job_rules.evolve(before, happened)
        was, status = _status(before), _status(after)
        if was == status and not isinstance(happened, JobClaimed):
            if known is not None:
                known.job = after
            return
        batch = self.batches.get(after.spec.batch_id or "")
        for counter in (self.job_counts, batch.job_counts if batch is not None else Counter[str]()):
            counter.subtract([was] if was else [])
            counter.update([status] if status else [])
        if status is None or status in TERMINAL_STATUSES:
            self.open_jobs.pop(event.stream, None)
        else:
            submitted = known.submitted_at if known is not None else event.time
            self.open_jobs[event.stream] = OpenJob(after, submitted, event.time)
        if self._watching and was != status:
            self.status_changes.setdefault(event.stream, [was, None])[1] = status

    async def _load_finished_job(self, event: RecordedEvent) -> Job | None:
        """Return what the rules know of a job that is not open: read from its stream."""
        job: Job | None = None
        if event.version > 1:
            for earlier in await self._log.read_stream(event.stream):
                if earlier.position >= event.position:
                    break
                job = job_rules.evolve(job, earlier.event)  # type: ignore[arg-type]  # streams hold events of one kind
        return job

    def to_dict(self) -> dict[str, Any]:
        """Return how everything stands, for programs."""
        waiting = [it for it in self.open_jobs.values() if it.job.status == "pending"]
        running = {job_id: it for job_id, it in self.open_jobs.items() if it.job.status == "processing"}
        return {
            "position": self.position,
            "time": self.time,
            "jobs": {
                name: self.job_counts[name] for name in ("pending", "processing", "completed", "failed", "cancelled")
            },
            "oldest_pending_submitted_at": min((it.submitted_at for it in waiting), default=None),
            "running": [
                {
                    "job_id": job_id,
                    "job_type": it.job.spec.job_type,
                    "job_name": it.job.spec.job_name,
                    "batch_id": it.job.spec.batch_id,
                    "worker_id": it.job.worker_id,
                    "attempt": it.job.attempt,
                    "claimed_at": it.status_since,
                }
                for job_id, it in sorted(running.items(), key=lambda item: item[1].status_since)
            ],
            "batches": [batch.to_dict(batch_id) for batch_id, batch in self.batches.items()],
        }


def _status(job: Job | None) -> str | None:
    return None if job is None or job.deleted else job.status


async def load_state_as_of(
    log: EventStore,
    as_of: PointInTime,
    *,
    until: PointInTime | None = None,
    on_progress: Callable[[int, int], None] = lambda position, upto: None,
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, list[str | None]]]:
    """Return how everything stood at one instant and, if asked for, at a later one, and which jobs changed between.

    `told` is told how far the reading has got, and the position where it ends at the latest.

    Raises:
        LedgerUnavailable, UnreadableEvent: as `Lookback.take`.
    """
    seen = HistoricalState(log)
    head = await log.head_position()
    async for event in _events(log, as_of, after=0):
        await seen.apply(event)
        if event.position % 1000 == 0:
            on_progress(event.position, head)
    first = seen.to_dict()
    if until is None:
        return first, None, {}
    seen.track_changes()
    async for event in _events(log, until, after=seen.position):
        await seen.apply(event)
        if event.position % 1000 == 0:
            on_progress(event.position, head)
    changed = {job_id: change for job_id, change in seen.status_changes.items() if change[0] != change[1]}
    return first, seen.to_dict(), changed


async def _events(log: EventStore, then: PointInTime, *, after: int) -> AsyncIterator[RecordedEvent]:
    """Yield the events up to a position, or before the first that is later than a moment by its writer's clock."""
    while page := await log.read(after=after, limit=5000, without_metadata=True):
        for event in page:
            if (event.position if isinstance(then, int) else event.time) > then:  # type: ignore[operator]  # alike
                return
            yield event
        after = page[-1].position
