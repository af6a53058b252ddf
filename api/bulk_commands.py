"""Apply one command to many jobs concurrently. Each job is decided independently of the others."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from jobledger.api.http.errors import ERROR_RESPONSES, ApiError
from jobledger.api.idempotency import RequestFingerprint
from jobledger.ledger.domain import job as decider
from jobledger.ledger.domain.commands import JobCommand
from jobledger.ledger.domain.errors import CommandRejected, NotFound, StreamBusy, UnreadableEvent
from jobledger.ledger.domain.events import Event, EventMetadata, RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import JobStatus
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import CommandResult, StreamState, handle_command
from jobledger.ledger.store.event_store import EventStore

JOBS_PER_CHUNK: Final = 200
MAX_REJECTIONS_LISTED: Final = 100
MAX_JOBS_LISTED: Final = 100


@dataclass(slots=True)
class BulkResult:
    """The result of one command for many jobs.

    Attributes:
        total: How many jobs there are. Deleted and invisible jobs do not count.
        changed: How many jobs have new events.
        changed_ids: The first of them.
        event_counts: The new events by type.
        rejections: The jobs that rejected the command, with the error codes and messages.
        position: The highest position of an event of any of the jobs.
    """

    total: int = 0
    changed: int = 0
    changed_ids: list[str] = field(default_factory=list)
    event_counts: Counter[str] = field(default_factory=Counter)
    rejections: list[Document] = field(default_factory=list)
    position: int = 0

    def to_response(self) -> Document:
        """Return the fields of the response: all counts, and the first rejections."""
        return {
            "jobs": {
                "total": self.total,
                "changed": self.changed,
                "unchanged": self.total - self.changed - len(self.rejections),
                "rejected": len(self.rejections),
            },
            "events": dict(self.event_counts),
            "rejections": self.rejections[:MAX_REJECTIONS_LISTED],
        }

    def add(self, job_id: str, outcome: CommandResult | Sequence[Event] | BaseException) -> None:
        """Count the outcome of the command for a job. In a dry run, it is the events that the command would cause.

        Raises:
            BaseException: `outcome`, if it is an error that does not concern this job only.
        """
        match outcome:
            case NotFound() | ApiError(status=404):  # deleted, or the caller may not see the job
                return
            case ApiError():
                self.rejections.append({"job_id": job_id, "code": outcome.code, "message": outcome.message})
            case CommandRejected() | UnreadableEvent() | StreamBusy():
                code = next(code for kind, _, code, _ in ERROR_RESPONSES if isinstance(outcome, kind))
                self.rejections.append({"job_id": job_id, "code": code, "message": str(outcome)})
            case BaseException():
                raise outcome
            case CommandResult():
                self._count_events(job_id, [event.type for event in outcome.events])
                self.position = max(self.position, outcome.stream_state.head.position)
            case _:
                self._count_events(job_id, [type(event).__name__ for event in outcome])
        self.total += 1

    def _count_events(self, job_id: str, types: Sequence[str]) -> None:
        self.changed += bool(types)
        self.event_counts.update(types)
        if types and len(self.changed_ids) < MAX_JOBS_LISTED:
            self.changed_ids.append(job_id)


async def apply_to_jobs(
    event_store: EventStore,
    job_ids: Sequence[str],
    command: JobCommand,
    *,
    meta: EventMetadata,
    statuses: Collection[JobStatus],
    check: Callable[[StreamState], None] = lambda stream_state: None,
    fingerprint: RequestFingerprint | None = None,
    submitted_until: int | None = None,
    dry_run: bool = False,
    result: BulkResult | None = None,
) -> BulkResult:
    """Apply a command to the jobs that have one of the statuses.

    A job that rejects the command, perhaps because it has changed meanwhile, does not affect the others. Deleted jobs,
    and jobs that the caller may not see, are skipped.

    Args:
        meta: Metadata of the new events.
        check: Raises an error if the command is not allowed for a job.
        fingerprint: If the same request has changed a job before, the job is not changed again.
        submitted_until: Jobs that were submitted after this position are skipped.
        dry_run: Decide, but append nothing.
        result: The result to add to. Default: a new one.

    Raises:
        InvalidEvent, LedgerBusy, LedgerUnavailable: As `handle_command`. Some jobs may be changed already.
    """
    result = result or BulkResult()

    async def apply(job: _LoadedJob, is_done: bool) -> CommandResult | Sequence[Event]:
        if job.unreadable is not None:
            raise job.unreadable
        current = job.stream_state
        assert isinstance(current.aggregate, Job)  # noqa: S101 - narrows the type; the views and batches name only jobs
        if current.aggregate.is_deleted:
            raise NotFound("the job was deleted")
        if submitted_until is not None and job.first_position > submitted_until:
            raise NotFound("the job was submitted later")
        check(current)
        if is_done or current.aggregate.status not in statuses:
            return CommandResult([], current)
        expected = decider.decide(command, current.aggregate)
        if dry_run:
            return expected
        if not expected:
            return CommandResult([], current)
        return await handle_command(event_store, job.job_id, command, meta=meta, stream_state=current, check=check)

    for start in range(0, len(job_ids), JOBS_PER_CHUNK):
        async with aclosing(_load_jobs(event_store, job_ids[start : start + JOBS_PER_CHUNK])) as parts:
            async for jobs in parts:
                are_done = [fingerprint is not None and bool(fingerprint.find_in(job.keyed_events)) for job in jobs]
                # Wait for all commands, also after an error: none may run after the response.
                outcomes = await asyncio.gather(*map(apply, jobs, are_done), return_exceptions=True)
                for job, outcome in zip(jobs, outcomes, strict=True):
                    result.add(job.job_id, outcome)
    return result


@dataclass(slots=True)
class _LoadedJob:
    """A job, folded from its stream. `keyed_events` are the events of requests with an Idempotency-Key."""

    job_id: str
    first_position: int
    stream_state: StreamState = field(default_factory=StreamState)
    keyed_events: list[RecordedEvent] = field(default_factory=list)
    unreadable: UnreadableEvent | None = None

    def apply(self, event: RecordedEvent) -> None:
        """Apply the next event of the stream."""
        if event.meta.request_fingerprint is not None:
            self.keyed_events.append(event)
        if self.unreadable is None:
            try:
                self.stream_state = self.stream_state.apply((event,))
            except UnreadableEvent as error:
                self.unreadable = error


async def _load_jobs(event_store: EventStore, job_ids: Collection[str]) -> AsyncGenerator[list[_LoadedJob], None]:
    """Yield jobs whose streams are complete after each part that was read, so that only one part is in memory."""
    job: _LoadedJob | None = None
    async with aclosing(event_store.iterate_stream_batches(job_ids)) as parts:
        async for events in parts:
            complete: list[_LoadedJob] = []
            for event in events:
                if job is None or job.job_id != event.stream:
                    complete += [job] if job is not None else []
                    job = _LoadedJob(event.stream, event.position)
                job.apply(event)
            yield complete
    if job is not None:
        yield [job]
