"""api: one command for each job of a batch, many at a time. Each is decided on for itself, whatever the others do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from jobledger.api.http.errors import ERROR_RESPONSES, ApiError
from jobledger.api.http.idempotency import IdempotencyKey
from jobledger.ledger.domain import job as rules
from jobledger.ledger.domain.commands import JobCommand
from jobledger.ledger.domain.errors import CommandRejected, JobledgerError, NotFound, UnreadableEvent, VersionConflict
from jobledger.ledger.domain.events import EventMetadata, RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import JobStatus
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState, handle_command
from jobledger.ledger.store.event_store import EventStore

JOBS_PER_CHUNK: Final = 200
MAX_REJECTIONS_LISTED: Final = 100


@dataclass(slots=True)
class BulkResult:
    """What became of one command for many jobs. `position` is that of the last event any of them has."""

    total: int = 0
    changed: int = 0
    event_counts: Counter[str] = field(default_factory=Counter)
    rejections: list[Document] = field(default_factory=list)
    position: int = 0

    def to_response(self) -> Document:
        """Return it as clients see it: everything counted, and the first refusals told."""
        unchanged = self.total - self.changed - len(self.rejections)
        return {
            "jobs": {
                "total": self.total,
                "changed": self.changed,
                "unchanged": unchanged,
                "rejected": len(self.rejections),
            },
            "events": dict(self.event_counts),
            "rejections": self.rejections[:MAX_REJECTIONS_LISTED],
        }

    def add_rejection(self, job_id: str, error: JobledgerError) -> None:
        """Note that a job was left as it is, and why."""
        code = next(code for kind, _, code, _ in ERROR_RESPONSES if isinstance(error, kind))
        self.rejections.append({"job_id": job_id, "code": code, "message": str(error)})


async def apply_to_jobs(
    event_store: EventStore,
    job_ids: Sequence[str],
    command: JobCommand,
    *,
    meta: EventMetadata,
    statuses: Collection[JobStatus],
    check: Callable[[StreamState], None] = lambda known: None,
    idempotency_key: IdempotencyKey | None = None,
) -> BulkResult:
    """Apply `command` to the jobs that have one of the `statuses`; deleted ones are passed over.

    A job that the rules or `check` refuse, perhaps because it has changed meanwhile, is noted and does not keep the
    others back; one that who asks may not see is passed over. What the same request (`once`) has done before is not
    done again.

    Raises:
        InvalidEvent, LedgerBusy, LedgerUnavailable: as `handle`. Some jobs may have been changed then.
    """
    outcome = BulkResult()
    for begin in range(0, len(job_ids), JOBS_PER_CHUNK):
        async with aclosing(_read(event_store, job_ids[begin : begin + JOBS_PER_CHUNK])) as parts:
            async for jobs in parts:
                ended = await asyncio.gather(
                    *(
                        _one(
                            outcome,
                            event_store,
                            job,
                            command,
                            meta,
                            () if job.is_done(idempotency_key) else statuses,
                            check,
                        )
                        for job in jobs
                    ),
                    return_exceptions=True,  # so that nothing goes on behind the answer
                )
                for error in ended:
                    if error is not None:
                        raise error
    return outcome


@dataclass(slots=True)
class _Job:
    """A job as its stream says, as far as it was read. `requests` are the events that requests with a key caused."""

    job_id: str
    known: StreamState = field(default_factory=StreamState)
    requests: list[RecordedEvent] = field(default_factory=list)
    unreadable: UnreadableEvent | None = None

    def take(self, event: RecordedEvent) -> None:
        """Take in the next event of the stream."""
        if event.meta.request_fingerprint is not None:
            self.requests.append(event)
        if self.unreadable is None:
            try:
                self.known = self.known.apply((event,))
            except UnreadableEvent as error:
                self.unreadable = error

    def is_done(self, once: IdempotencyKey | None) -> bool:
        """Return whether the same request has acted on the job before."""
        return once is not None and once.find_in(self.requests) is not None


async def _read(log: EventStore, job_ids: Collection[str]) -> AsyncGenerator[list[_Job], None]:
    """Yield jobs whose streams were read to their ends: after each part, so that no more than that is in memory."""
    job: _Job | None = None
    async with aclosing(log.iterate_stream_batches(job_ids)) as parts:
        async for events in parts:
            complete: list[_Job] = []
            for event in events:
                if job is None or job.job_id != event.stream:
                    complete += [job] if job is not None else []
                    job = _Job(event.stream)
                job.take(event)
            yield complete
    if job is not None:
        yield [job]


async def _one(
    outcome: BulkResult,
    log: EventStore,
    read: _Job,
    command: JobCommand,
    meta: EventMetadata,
    statuses: Collection[JobStatus],
    check: Callable[[StreamState], None],
) -> None:
    outcome.total += 1
    job_id, known = read.job_id, read.known
    try:
        if read.unreadable is not None:
            raise read.unreadable
        job = known.state
        assert isinstance(job, Job)  # noqa: S101 - narrows the type; a batch and its jobs are written together
        if job.deleted:
            raise NotFound("the job was deleted")
        check(known)
        if job.status in statuses and rules.decide(command, job):
            handled = await handle_command(log, job_id, command, meta=meta, stream_state=known, check=check)
            known = handled.stream_state
            outcome.changed += bool(handled.events)
            outcome.event_counts.update(event.type for event in handled.events)
        outcome.position = max(outcome.position, known.head.position)
    except NotFound:  # deleted meanwhile
        outcome.total -= 1
    except ApiError as error:
        if error.status == 404:
            outcome.total -= 1
        else:
            outcome.rejections.append({"job_id": job_id, "code": error.code, "message": error.message})
    except (CommandRejected, UnreadableEvent, VersionConflict) as error:
        outcome.add_rejection(job_id, error)
