"""api: one command for each job of a batch, many at a time. Each is decided on for itself, whatever the others do."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Final

from jobledger.api.http.errors import TABLE, ApiError
from jobledger.api.http.preconditions import Once
from jobledger.ledger.domain import job as rules
from jobledger.ledger.domain.commands import JobCommand
from jobledger.ledger.domain.errors import CommandRefused, JobledgerError, NotFound, UnreadableEvent, VersionConflict
from jobledger.ledger.domain.events import JobStatus, Meta, Recorded
from jobledger.ledger.domain.job import Job
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import Known, handle
from jobledger.ledger.store.event_store import EventLog

AT_ONCE: Final = 200
REFUSALS_TOLD: Final = 100


@dataclass(slots=True)
class Outcome:
    """What became of one command for many jobs. `position` is that of the last event any of them has."""

    total: int = 0
    changed: int = 0
    caused: Counter[str] = field(default_factory=Counter)
    refused: list[Document] = field(default_factory=list)
    position: int = 0

    def shown(self) -> Document:
        """Return it as clients see it: everything counted, and the first refusals told."""
        unchanged = self.total - self.changed - len(self.refused)
        return {
            "jobs": {
                "total": self.total,
                "changed": self.changed,
                "unchanged": unchanged,
                "refused": len(self.refused),
            },
            "events": dict(self.caused),
            "refused": self.refused[:REFUSALS_TOLD],
        }

    def refuse(self, job_id: str, error: JobledgerError) -> None:
        """Note that a job was left as it is, and why."""
        code = next(code for kind, _, code, _ in TABLE if isinstance(error, kind))
        self.refused.append({"job_id": job_id, "code": code, "message": str(error)})


async def for_each(
    log: EventLog,
    job_ids: Sequence[str],
    command: JobCommand,
    *,
    meta: Meta,
    statuses: Collection[JobStatus],
    check: Callable[[Known], None] = lambda known: None,
    once: Once | None = None,
) -> Outcome:
    """Apply `command` to the jobs that have one of the `statuses`; deleted ones are passed over.

    A job that the rules or `check` refuse, perhaps because it has changed meanwhile, is noted and does not keep the
    others back; one that who asks may not see is passed over. What the same request (`once`) has done before is not
    done again.

    Raises:
        InvalidEvent, LedgerBusy, LedgerUnavailable: as `handle`. Some jobs may have been changed then.
    """
    outcome = Outcome()
    for begin in range(0, len(job_ids), AT_ONCE):
        async with aclosing(_read(log, job_ids[begin : begin + AT_ONCE])) as parts:
            async for jobs in parts:
                ended = await asyncio.gather(
                    *(
                        _one(outcome, log, job, command, meta, () if job.is_done(once) else statuses, check)
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
    known: Known = field(default_factory=Known)
    requests: list[Recorded] = field(default_factory=list)
    unreadable: UnreadableEvent | None = None

    def take(self, event: Recorded) -> None:
        """Take in the next event of the stream."""
        if event.meta.request is not None:
            self.requests.append(event)
        if self.unreadable is None:
            try:
                self.known = self.known.after((event,))
            except UnreadableEvent as error:
                self.unreadable = error

    def is_done(self, once: Once | None) -> bool:
        """Return whether the same request has acted on the job before."""
        return once is not None and once.found_in(self.requests) is not None


async def _read(log: EventLog, job_ids: Collection[str]) -> AsyncGenerator[list[_Job], None]:
    """Yield jobs whose streams were read to their ends: after each part, so that no more than that is in memory."""
    job: _Job | None = None
    async with aclosing(log.read_in_parts(job_ids)) as parts:
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
    outcome: Outcome,
    log: EventLog,
    read: _Job,
    command: JobCommand,
    meta: Meta,
    statuses: Collection[JobStatus],
    check: Callable[[Known], None],
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
            handled = await handle(log, job_id, command, meta=meta, known=known, check=check)
            known = handled.known
            outcome.changed += bool(handled.events)
            outcome.caused.update(event.type for event in handled.events)
        outcome.position = max(outcome.position, known.head.position)
    except NotFound:  # deleted meanwhile
        outcome.total -= 1
    except ApiError as error:
        if error.status == 404:
            outcome.total -= 1
        else:
            outcome.refused.append({"job_id": job_id, "code": error.code, "message": error.message})
    except (CommandRefused, UnreadableEvent, VersionConflict) as error:
        outcome.refuse(job_id, error)
