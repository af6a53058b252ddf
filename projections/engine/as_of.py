"""Compute the state of all jobs and batches as of an earlier position or time, from the log only.

Memory holds the jobs that were not finished and a few numbers per batch. Finished jobs are counted and dropped. The few
jobs with later events are read again from their streams.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from jobledger.ledger.domain import batch as batch_decider
from jobledger.ledger.domain import events
from jobledger.ledger.domain import job as job_decider
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES, WaitingFor
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.views.waiting import KINDS as WAITING_KINDS
from jobledger.projections.views.waiting import derive_waiting_for

_IGNORED_EVENTS: Final = frozenset({"JobProgressed", "JobLogged", "StepCompleted", "JobArchived", "JobUnarchived"})
_PAGE_EVENTS: Final = 5000
_EVENTS_PER_REPORT: Final = 1000
PointInTime = int | datetime
"""A position of the log, or a time."""


def build_as_of_filter(as_of: PointInTime) -> Callable[[RecordedEvent], bool]:
    """Return a predicate for the events up to a position of the log or a time, inclusive."""
    if isinstance(as_of, int):
        return lambda event: event.position <= as_of
    return lambda event: isinstance(event.document.get("time"), datetime) and event.time <= as_of


@dataclass(slots=True)
class BatchState:
    """The decider's state of a batch, and the number of its jobs by status."""

    batch: Batch
    job_counts: Counter[str] = field(default_factory=Counter)

    def to_dict(self, batch_id: str) -> dict[str, Any]:
        """Return the state for JSON output."""
        return {
            "batch_id": batch_id,
            "batch_name": self.batch.spec.batch_name,
            "status": self.batch.status,
            "paused": self.batch.is_paused,
            "total_jobs": self.batch.spec.total_jobs,
            "jobs": +self.job_counts,
        }


@dataclass(slots=True)
class UnfinishedJob:
    """A job that is not finished.

    Attributes:
        state: The decider's state.
        submitted_at: Time of its submission.
        status_since: Time of its last change of status, or of its last claim.
        due_reason: As in the view `jobs`.
    """

    state: Job
    submitted_at: datetime
    status_since: datetime
    due_reason: str = "due_time"

    def derive_waiting_for(self, *, is_batch_paused: bool, now: datetime) -> WaitingFor | None:
        """Return what the job waits for at a time, or None if it is not pending."""
        job = {"status": self.state.status, "due_at": self.state.due_at, "due_reason": self.due_reason}
        return derive_waiting_for(job, is_batch_paused=is_batch_paused, now=now)


class HistoricalState:
    """The state of all jobs and batches after the applied events.

    Attributes:
        position, time: Position and time of the last applied event.
        unfinished_jobs: The jobs that are not finished, by ID.
        job_counts: Number of jobs by status.
        batches: The batches by ID.
        status_changes: Previous and current status of the jobs whose status has changed since this was set to an empty
            dictionary. A status of None: the job does not exist. None: changes are not recorded.
    """

    def __init__(self, event_store: EventStore) -> None:
        self._event_store = event_store
        self.position = 0
        self.time: datetime | None = None
        self.unfinished_jobs: dict[str, UnfinishedJob] = {}
        self.job_counts: Counter[str] = Counter()
        self.batches: dict[str, BatchState] = {}
        self.status_changes: dict[str, list[str | None]] | None = None

    async def apply(self, event: RecordedEvent) -> None:
        """Apply the next event.

        Raises:
            LedgerUnavailable: The database failed.
            UnreadableEvent: The event is damaged, or a later version of the program wrote it.
        """
        self.position, self.time = event.position, event.time
        stream_type = event.stream.partition("-")[0]
        if stream_type == "batch":
            self._apply_to_batch(event)
        elif stream_type == "job" and event.type not in _IGNORED_EVENTS:
            await self._apply_to_job(event)

    def _apply_to_batch(self, event: RecordedEvent) -> None:
        payload: Any = event.event
        if isinstance(payload, events.BatchSubmitted):
            self.batches[event.stream] = BatchState(batch_decider.evolve(None, payload))
        elif (state := self.batches.get(event.stream)) is not None:
            state.batch = batch_decider.evolve(state.batch, payload)
            if state.batch.is_deleted:
                del self.batches[event.stream]

    async def _apply_to_job(self, event: RecordedEvent) -> None:
        payload: Any = event.event
        unfinished = self.unfinished_jobs.get(event.stream)
        before = unfinished.state if unfinished is not None else await self._load_finished_job(event)
        after = job_decider.evolve(before, payload)
        old_status, new_status = _get_status(before), _get_status(after)
        if old_status == new_status and not isinstance(payload, events.JobClaimed):
            if unfinished is not None:
                unfinished.state = after
                if isinstance(payload, events.JobUpdated) and payload.not_before is not None:
                    unfinished.due_reason = "due_time"
            return
        batch = self.batches.get(after.spec.batch_id or "")
        for counter in (self.job_counts, batch.job_counts if batch is not None else Counter[str]()):
            counter.subtract([old_status] if old_status else [])
            counter.update([new_status] if new_status else [])
        if new_status is None or new_status in TERMINAL_STATUSES:
            self.unfinished_jobs.pop(event.stream, None)
        else:
            submitted_at = unfinished.submitted_at if unfinished is not None else event.time
            due_reason = "retry" if isinstance(payload, events.JobAttemptFailed) else "due_time"
            self.unfinished_jobs[event.stream] = UnfinishedJob(after, submitted_at, event.time, due_reason)
        if self.status_changes is not None and old_status != new_status:
            self.status_changes.setdefault(event.stream, [old_status, None])[1] = new_status

    async def _load_finished_job(self, event: RecordedEvent) -> Job | None:
        """Return the state before an event of a job that was finished, from its stream."""
        job: Job | None = None
        if event.version > 1:
            for earlier in await self._event_store.read_stream(event.stream):
                if earlier.position >= event.position:
                    break
                job = job_decider.evolve(job, earlier.event)  # type: ignore[arg-type]  # a stream holds events of one aggregate
        return job

    def _count_waiting(self, now: datetime) -> dict[WaitingFor, int]:
        paused = {batch_id for batch_id, batch in self.batches.items() if batch.batch.is_paused}
        counts = Counter(
            job.derive_waiting_for(is_batch_paused=job.state.spec.batch_id in paused, now=now)
            for job in self.unfinished_jobs.values()
        )
        return {kind: counts[kind] for kind in WAITING_KINDS}

    def to_dict(self, now: datetime | None = None) -> dict[str, Any]:
        """Return the state for JSON output.

        Args:
            now: The time for which it says what jobs wait for. Default: that of the last event.
        """
        at = now or self.time
        pending = [job for job in self.unfinished_jobs.values() if job.state.status == "pending"]
        running = [(job_id, job) for job_id, job in self.unfinished_jobs.items() if job.state.status == "processing"]
        return {
            "position": self.position,
            "time": self.time,
            "jobs": {
                status: self.job_counts[status]
                for status in ("pending", "processing", "completed", "failed", "cancelled")
            },
            "waiting_for": self._count_waiting(at) if at is not None else dict.fromkeys(WAITING_KINDS, 0),
            "oldest_pending_submitted_at": min((job.submitted_at for job in pending), default=None),
            "running": [
                {
                    "job_id": job_id,
                    "job_type": job.state.spec.job_type,
                    "job_name": job.state.spec.job_name,
                    "batch_id": job.state.spec.batch_id,
                    "worker_id": job.state.worker_id,
                    "attempt": job.state.attempt,
                    "claimed_at": job.status_since,
                }
                for job_id, job in sorted(running, key=lambda item: item[1].status_since)
            ],
            "batches": [batch.to_dict(batch_id) for batch_id, batch in self.batches.items()],
        }


def _get_status(job: Job | None) -> str | None:
    return None if job is None or job.is_deleted else job.status


async def load_state_as_of(
    event_store: EventStore,
    as_of: PointInTime,
    *,
    until: PointInTime | None = None,
    on_progress: Callable[[int, int], None] = lambda position, head: None,
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, list[str | None]]]:
    """Return the state of all jobs and batches as of an earlier point, and optionally the changes until a later one.

    `on_progress` is called with the current position and the highest possible one.

    Returns:
        The state as of `as_of`; the state as of `until`, or None; and the previous and current status of each job whose
        status differs between them.

    Raises:
        LedgerUnavailable, UnreadableEvent: As `HistoricalState.apply`.
    """
    state = HistoricalState(event_store)
    head = await event_store.read_head_position()

    async def apply_until(end: PointInTime) -> dict[str, Any]:
        async for event in _iter_events(event_store, end, after=state.position):
            await state.apply(event)
            if event.position % _EVENTS_PER_REPORT == 0:
                on_progress(event.position, head)
        return state.to_dict(min(end, event_store.clock.estimate()) if isinstance(end, datetime) else None)

    first = await apply_until(as_of)
    if until is None:
        return first, None, {}
    state.status_changes = {}
    second = await apply_until(until)
    return first, second, {job_id: pair for job_id, pair in state.status_changes.items() if pair[0] != pair[1]}


async def _iter_events(event_store: EventStore, end: PointInTime, *, after: int) -> AsyncIterator[RecordedEvent]:
    """Yield the events up to a position, or before the first event with a later time."""
    while page := await event_store.read(after=after, limit=_PAGE_EVENTS, without_metadata=True):
        for event in page:
            if (event.position if isinstance(end, int) else event.time) > end:  # type: ignore[operator]  # alike
                return
            yield event
        after = page[-1].position
