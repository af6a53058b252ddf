"""projections: the view `jobs`, the concept's job document (konzept.md, "Event-Job Collection"), complete.

Its fold, its indexes, its questions. Extra to the concept: `attempt`, `steps` (what was finished, not what it yielded),
`version` and `position` (the last event folded in), `due_at` (when a waiting job may start), `queued_position` (its age
in the queue).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, assert_never

from pymongo import ASCENDING, DESCENDING, IndexModel

from ledger.events import (
    JOB_EVENTS,
    JobAccessChanged,
    JobArchived,
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
    JobSubmitted,
    JobUnarchived,
    JobUpdated,
    LogLine,
    Recorded,
    StepCompleted,
    Webhook,
    WorkerFenced,
)
from ledger.log import EventLog
from ledger.mongo import Database, Document, driver_errors

NAME: Final = "jobs"
LOG_LINES: Final = 100  # the job carries the newest; all of them are in its history
LOG_CHARACTERS: Final = 10_000  # of each: a hundred lines have to fit into a document, which holds 16 MB
COUNTED_UP_TO: Final = 10_000
INDEXES: Final = [
    IndexModel([("created_at", DESCENDING), ("_id", DESCENDING)]),
    IndexModel([("status", ASCENDING), ("created_at", DESCENDING), ("_id", DESCENDING)]),
    IndexModel([("batch_id", ASCENDING), ("created_at", DESCENDING), ("_id", DESCENDING)]),
    IndexModel([("worker_id", ASCENDING)], partialFilterExpression={"status": "processing"}),
]


def fold(job: Document | None, event: Recorded) -> Document | None:
    """Return the job's document as it is after one more event of its stream; None when it is deleted."""
    happened = event.event
    if isinstance(happened, JobSubmitted):
        return _submitted(happened, event)
    if job is None:
        return None  # deleted: what a zombie still says changes nothing
    assert isinstance(happened, JOB_EVENTS)  # noqa: S101 - narrows the type; streams hold events of one kind
    changes = _changes(job, happened, event)  # type: ignore[arg-type]  # isinstance with a tuple is not narrowed to the union
    if changes is None:
        return None
    return {**job, **changes, "updated_at": event.time, "version": event.version, "position": event.position}


def _submitted(asked: JobSubmitted, event: Recorded) -> Document:
    return {
        "_id": event.stream,
        "job_id": event.stream,
        "job_type": asked.job_type,
        "job_name": asked.job_name,
        "status": "pending",
        "created_at": event.time,
        "updated_at": event.time,
        "started_at": None,
        "completed_at": None,
        "parameters": asked.parameters,
        "webhook": shown_webhook(asked.webhook),
        "batch_id": asked.batch_id,
        "progress": {"step": "waiting", "percent": 0.0, "message": "Waiting for a worker"},
        "results": None,
        "error": None,
        "logs": [],
        "worker_id": None,
        "attempt": 0,
        "retries": 0,
        "max_attempts": asked.max_attempts,
        "timeout_s": asked.timeout_s,
        "priority": asked.priority,
        "due_at": asked.not_before,
        "user_id": asked.user_id,
        "access_control": asked.access_control.model_dump(),
        "cancel_requested": False,
        "archived": False,
        "steps": [],
        "queued_position": event.position,
        "version": event.version,
        "position": event.position,
    }


def shown_webhook(webhook: Webhook | None) -> Document | None:
    """Return a webhook as everyone may see it: header names, but not their values, which are secrets."""
    if webhook is None:
        return None
    return {
        "url": webhook.url,
        "headers": dict.fromkeys(webhook.header_names, "***"),
        "include_markdown": webhook.include_markdown,
        "include_metadata": webhook.include_metadata,
    }


def _changes(job: Document, happened: JobEvent, event: Recorded) -> Document | None:
    match happened:
        case JobClaimed():
            return {
                "status": "processing",
                "started_at": job["started_at"] or event.time,
                "worker_id": happened.worker_id,
                "attempt": happened.attempt,
                "due_at": None,
                "progress": {"step": "starting", "percent": 0.0, "message": "A worker has taken the job"},
            }
        case JobProgressed():
            return {"progress": {"step": happened.step, "percent": happened.percent, "message": happened.message}}
        case JobLogged():
            return _logged(job, *happened.entries)
        case StepCompleted():
            return {"steps": [*job.get("steps", ()), _finished(happened, event)]}
        case WorkerFenced() | JobSubmitted():
            return {}
        case JobCompleted():
            return {
                "status": "completed",
                "completed_at": event.time,
                "worker_id": job["worker_id"],
                "results": {"markdown_file": None, "markdown_url": None, **happened.results.model_dump()},
                "error": None,
                "progress": {"step": "completed", "percent": 100.0, "message": "Done"},
            }
        case JobAttemptFailed():
            line = _line(event, f"Attempt {happened.attempt} failed and will be repeated: {happened.error.message}")
            return {
                "status": "pending",
                "worker_id": None,
                "retries": job["retries"] + 1,
                "due_at": happened.retry_at,
                "error": happened.error.model_dump(),
                "progress": {"step": "waiting", "percent": 0.0, "message": "Waiting for the next attempt"},
                **_logged(job, line),
            }
        case JobFailed():
            return {
                "status": "failed",
                "completed_at": event.time,
                "error": happened.error.model_dump(),
                "progress": {**job["progress"], "message": "Failed"},
                **_logged(job, _line(event, f"Failed: {happened.error.message}", "error")),
            }
        case JobLeaseExpired():
            line = _line(event, f"Worker {happened.worker_id} gave no sign of life; the job is free for another one.")
            return {
                "status": "pending",
                "worker_id": None,
                "retries": job["retries"] + 1,
                "progress": {"step": "waiting", "percent": 0.0, "message": "Waiting for another worker"},
                **_logged(job, line),
            }
        case JobReleased():
            line = _line(event, f"Worker {happened.worker_id} gave the job back: {happened.reason}", "info")
            return {
                "status": "pending",
                "worker_id": None,
                "progress": {"step": "waiting", "percent": 0.0, "message": "Waiting for a worker"},
                **_logged(job, line),
            }
        case JobCancelRequested():
            return {"cancel_requested": True}
        case JobCancelled():
            return {
                "status": "cancelled",
                "completed_at": event.time,
                "cancel_requested": False,
                "due_at": None,
                "progress": {**job["progress"], "message": "Cancelled"},
            }
        case JobRestarted():
            return {
                "status": "pending",
                "completed_at": None,
                "started_at": None,
                "worker_id": None,
                "retries": 0,
                "due_at": None,
                "results": None,
                "error": None,
                "cancel_requested": False,
                "queued_position": event.position,
                "steps": job.get("steps", []) if happened.reuse_steps else [],
                "progress": {"step": "waiting", "percent": 0.0, "message": "Restarted, waiting for a worker"},
            }
        case JobUpdated():
            given = {
                "parameters": happened.parameters,
                "priority": happened.priority,
                "due_at": happened.not_before,
            }
            return {name: value for name, value in given.items() if value is not None}
        case JobAccessChanged():
            return {"access_control": happened.access_control.model_dump()}
        case JobArchived():
            return {"archived": True}
        case JobUnarchived():
            return {"archived": False}
        case JobDeleted():
            return None
        case _:
            assert_never(happened)


def _finished(step: StepCompleted, event: Recorded) -> Document:
    """What a step took. What it yielded may be large and is for the next attempt: it stays in the log."""
    return {
        "step": step.step,
        "key": step.key,
        "attempt": step.attempt,
        "finished_at": event.time,
        "duration_s": step.duration_s,
        "tokens_used": step.tokens_used,
        "warnings": step.warnings,
        "reused_from": step.reused_from,
        "version": event.version,
    }


def _line(event: Recorded, message: str, level: Any = "warning") -> LogLine:
    return LogLine(timestamp=event.time, level=level, message=message)


def _logged(job: Document, *lines: LogLine) -> Document:
    return {"logs": [*job["logs"], *(_shown_line(line) for line in lines[-LOG_LINES:])][-LOG_LINES:]}


def _shown_line(line: LogLine) -> Document:
    cut = line.message if len(line.message) <= LOG_CHARACTERS else f"{line.message[:LOG_CHARACTERS]} …"
    return {**line.model_dump(), "message": cut}


# Questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Filter:
    """Which jobs are asked for; None means any."""

    status: str | None = None
    batch_id: str | None = None
    user_id: str | None = None
    track: str | None = None
    job_type: str | None = None
    archived: bool | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None

    def query(self) -> Document:
        wanted = {
            "status": self.status,
            "batch_id": self.batch_id,
            "user_id": self.user_id,
            "parameters.track": self.track,
            "job_type": self.job_type,
            "archived": self.archived,
        }
        query: Document = {name: value for name, value in wanted.items() if value is not None}
        if self.created_after or self.created_before:
            bounds = {"$gt": self.created_after, "$lt": self.created_before}
            query["created_at"] = {name: value for name, value in bounds.items() if value is not None}
        return query


async def get(db: Database, log: EventLog, job_id: str) -> Document | None:
    """Return a job's document, or None if there is no such job.

    A job that the projector has not reached yet is folded from the log, so who has just submitted it finds it.
    """
    with driver_errors(f"reading {job_id}"):
        job = await db[NAME].find_one({"_id": job_id})
    if job is None:
        for event in await log.read_stream(job_id):
            job = fold(job, event)
    return job


async def page(db: Database, wanted: Filter, *, limit: int, skip: int) -> list[Document]:
    """Return jobs, newest first."""
    with driver_errors("listing jobs"):
        cursor = db[NAME].find(
            wanted.query(), sort=[("created_at", DESCENDING), ("_id", DESCENDING)], limit=limit, skip=skip
        )
        return await cursor.to_list()


async def count(db: Database, wanted: Filter) -> int:
    """Count jobs, but never more than `COUNTED_UP_TO`: a count over everything would read everything."""
    with driver_errors("counting jobs"):
        return await db[NAME].count_documents(wanted.query(), limit=COUNTED_UP_TO)


async def waiting_in(db: Database, batch_ids: Collection[str]) -> list[Document]:
    """Return the waiting jobs of batches, without what is large and says nothing about their places in the queue."""
    with driver_errors("looking for the waiting jobs of batches"):
        query = {"batch_id": {"$in": sorted(batch_ids)}, "status": "pending"}
        return await db[NAME].find(query, {"parameters": 0, "logs": 0, "steps": 0, "error": 0}).to_list()


async def held_by(db: Database, worker_id: str) -> Sequence[Document]:
    """Return the jobs that a worker is running, as far as the view has got."""
    with driver_errors("looking for a worker's jobs"):
        return await db[NAME].find({"worker_id": worker_id, "status": "processing"}, {"attempt": 1}).to_list()


async def workers_at_work(db: Database) -> list[str]:
    """Return the ids of the workers that run a job, as far as the view has got."""
    with driver_errors("looking for busy workers"):
        return await db[NAME].distinct("worker_id", {"status": "processing"})
