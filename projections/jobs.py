"""projections: the view `jobs`, the concept's job document (konzept.md, "Event-Job Collection"), complete.

Its fold, its indexes, its questions. Extra to the concept: `attempt`, `steps` (what was finished, not what it yielded),
`version` and `position` (the last event folded in), `due_at` (when a waiting job may start), `queued_position` (its age
in the queue).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, assert_never

from ledger.access import Principal
from ledger.events import (
    JOB_EVENTS,
    Event,
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
from ledger.mongo import Document, driver_errors
from projections import headings
from projections.headings import Facet, Place
from projections.views import Views

NAME: Final = "jobs"
LOG_LINES: Final = 100  # the job carries the newest; all of them are in its history
LOG_CHARACTERS: Final = 10_000  # of each: a hundred lines have to fit into a document, which holds 16 MB
COUNTED_UP_TO: Final = 10_000
INDEXES: Final = headings.INDEXES
_SESSION_FACETS: Final = (("track", "track"), ("event", "event"), ("day", "day"), ("language", "target_language"))
_SEARCHED: Final = ("session", "event", "track", "filename")
_LISTED_BY: Final = frozenset({"error", "parameters", "access_control"})


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
    after = {**job, **changes, "updated_at": event.time, "version": event.version, "position": event.position}
    if not _LISTED_BY.isdisjoint(changes) and any(after[name] is not job[name] for name in _LISTED_BY):
        _list(after)
    return after


def _list(job: Document) -> None:
    """Say under which headings the job is listed, and under which words it is found."""
    scopes, given = headings.scopes(job), job["parameters"]
    job["headings"] = headings.headings(scopes, _facets(job))
    texts = [job["job_id"], job["job_name"], *(given.get(name) for name in _SEARCHED)]
    speakers = given.get("speakers")
    job["words"] = headings.words(scopes, texts + (speakers if isinstance(speakers, list) else []))


def _facets(job: Document) -> list[Facet]:
    given, error = job["parameters"], job["error"]
    values = [
        ("batch", job["batch_id"]),
        ("user", job["user_id"]),
        ("type", job["job_type"]),
        ("error", error["code"] if error else None),
        *((facet, given.get(name)) for facet, name in _SESSION_FACETS),
    ]
    return [headings.ALL, *((name, value) for name, value in values if isinstance(value, str))]


def _submitted(asked: JobSubmitted, event: Recorded) -> Document:
    job: Document = {
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
        "teams": asked.teams,
        "cancel_requested": False,
        "archived": False,
        "steps": [],
        "queued_position": event.position,
        "version": event.version,
        "position": event.position,
    }
    _list(job)
    return job


def shown_webhook(webhook: Webhook | None) -> Document | None:
    """Return a webhook as everyone may see it: header names, but not their values, which are secrets."""
    if webhook is None:
        return None
    return {
        "url": webhook.url,
        "headers": dict.fromkeys(webhook.header_names, "***"),
        "include_markdown": webhook.include_markdown,
        "include_metadata": webhook.include_metadata,
        "signed": webhook.signed,
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
            return _logged(job, event)
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
            return {
                "status": "pending",
                "worker_id": None,
                "retries": job["retries"] + 1,
                "due_at": happened.retry_at,
                "error": happened.error.model_dump(),
                "progress": {"step": "waiting", "percent": 0.0, "message": "Waiting for the next attempt"},
                **_logged(job, event),
            }
        case JobFailed():
            return {
                "status": "failed",
                "completed_at": event.time,
                "error": happened.error.model_dump(),
                "progress": {**job["progress"], "message": "Failed"},
                **_logged(job, event),
            }
        case JobLeaseExpired():
            return {
                "status": "pending",
                "worker_id": None,
                "retries": job["retries"] + 1,
                "progress": {"step": "waiting", "percent": 0.0, "message": "Waiting for another worker"},
                **_logged(job, event),
            }
        case JobReleased():
            return {
                "status": "pending",
                "worker_id": None,
                "progress": {"step": "waiting", "percent": 0.0, "message": "Waiting for a worker"},
                **_logged(job, event),
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
        "shared_version": step.shared_version,
        "version": event.version,
    }


SAYS_SOMETHING: Final[tuple[type[Event], ...]] = (
    JobLogged,
    JobAttemptFailed,
    JobFailed,
    JobLeaseExpired,
    JobReleased,
)
"""The events that have lines for the job's log."""


def lines_of(event: Recorded) -> list[LogLine]:
    """Return what an event has to say to who reads the job's log.

    Raises:
        UnreadableEvent: as `Recorded.event`.
    """
    happened = event.event
    match happened:
        case JobLogged():
            return happened.entries
        case JobAttemptFailed():
            message = f"Attempt {happened.attempt} failed and will be repeated: {happened.error.message}"
            return [_line(event, message)]
        case JobFailed():
            return [_line(event, f"Failed: {happened.error.message}", "error")]
        case JobLeaseExpired():
            message = "The worker stopped sending heartbeats; another worker picks up the job."
            return [_line(event, message)]
        case JobReleased():
            # Readers of the job see this line: it names neither the worker nor what its machine said.
            reason = "its machine cannot run it" if happened.machine_trouble else happened.reason
            return [_line(event, f"The worker gave the job back: {reason}", "info")]
        case _:
            return []


def _line(event: Recorded, message: str, level: Any = "warning") -> LogLine:
    return LogLine(timestamp=event.time, level=level, message=message)


def _logged(job: Document, event: Recorded) -> Document:
    lines = lines_of(event)
    return {"logs": [*job["logs"], *(_shown_line(line) for line in lines[-LOG_LINES:])][-LOG_LINES:]}


def _shown_line(line: LogLine) -> Document:
    cut = line.message if len(line.message) <= LOG_CHARACTERS else f"{line.message[:LOG_CHARACTERS]} …"
    return {**line.model_dump(), "message": cut}


# Questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Filter:
    """Which jobs are asked for; None means any. `q`: all of these words are in name, id, session, event or speakers."""

    status: str | None = None
    batch_id: str | None = None
    user_id: str | None = None
    track: str | None = None
    event: str | None = None
    day: str | None = None
    language: str | None = None
    error_code: str | None = None
    job_type: str | None = None
    archived: bool | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    q: str | None = None

    def query(self, principal: Principal) -> Document:
        """Return the database query for those of these jobs that somebody may see."""
        facet, rest = self._narrowest()
        query = {**headings.query(principal, facet, self.q or ""), **rest}
        if self.status is not None:
            query["status"] = self.status
        if self.archived is not None:
            query["archived"] = self.archived
        if self.created_after or self.created_before:
            bounds = {"$gt": self.created_after, "$lt": self.created_before}
            query["created_at"] = {name: value for name, value in bounds.items() if value is not None}
        return query

    def _narrowest(self) -> tuple[Facet, Document]:
        """Return the facet that is looked up, and what else has to be looked at."""
        asked = [
            ("batch", "batch_id", self.batch_id),
            ("error", "error.code", self.error_code),
            ("event", "parameters.event", self.event),
            ("track", "parameters.track", self.track),
            ("day", "parameters.day", self.day),
            ("user", "user_id", self.user_id),
            ("language", "parameters.target_language", self.language),
            ("type", "job_type", self.job_type),
        ]
        given = [(name, field, value) for name, field, value in asked if value is not None]
        facet: Facet = (given[0][0], given[0][2]) if given else headings.ALL
        return facet, {field: value for _, field, value in given[1:]}


async def get(views: Views, log: EventLog, job_id: str) -> Document | None:
    """Return a job's document, or None if there is no such job.

    A job that the projector has not reached yet is folded from the log, so who has just submitted it finds it.
    """
    with driver_errors(f"reading {job_id}"):
        job = await views[NAME].find_one({"_id": job_id})
    if job is None:
        for event in await log.read_stream(job_id):
            job = fold(job, event)
    return job


async def page(
    views: Views,
    wanted: Document,
    *,
    limit: int,
    skip: int = 0,
    after: Place | None = None,
    newest_first: bool = True,
) -> tuple[list[Document], Place | None]:
    """Return a page of jobs in the order of creation, and where the next one begins."""
    with driver_errors("listing jobs"):
        return await headings.page(
            views[NAME],
            wanted,
            limit=limit,
            skip=skip,
            after=after,
            newest_first=newest_first,
            projection={"headings": 0, "words": 0},
        )


async def count(views: Views, wanted: Document) -> int:
    """Count jobs, but never more than `COUNTED_UP_TO`: a count over everything would read everything."""
    with driver_errors("counting jobs"):
        return await headings.count(views[NAME], wanted, most=COUNTED_UP_TO)


async def waiting_among(views: Views, job_ids: Sequence[str]) -> list[Document]:
    """Return the jobs that wait, without what is large and says nothing about their places in the queue."""
    with driver_errors("looking for waiting jobs"):
        left_out = dict.fromkeys(("parameters", "logs", "steps", "error", "headings", "words"), 0)
        return await views[NAME].find({"_id": {"$in": list(job_ids)}, "status": "pending"}, left_out).to_list()


async def oldest_waiting(views: Views) -> datetime | None:
    """Return when the oldest of the waiting jobs was submitted, None if none waits, as far as the view has got."""
    with driver_errors("looking for the oldest waiting job"):
        wanted = {"headings": headings.everything(headings.ALL), "status": "pending"}
        found, _ = await headings.page(views[NAME], wanted, limit=1, newest_first=False, projection={"created_at": 1})
    return found[0]["created_at"] if found else None


# Who runs what is found among the jobs that run, which are few: an index of workers would be one more to keep at every
# write of a job, an eighth of what that costs (docs/decisions/0018).
_RUNNING: Final[Document] = {"headings": headings.everything(headings.ALL), "status": "processing"}


async def held_by(views: Views, worker_id: str) -> Sequence[Document]:
    """Return the jobs that a worker is running, as far as the view has got."""
    running = {**_RUNNING, "worker_id": worker_id}
    with driver_errors("looking for a worker's jobs"):
        return await views[NAME].find(running, {"attempt": 1}, hint=headings.index_for(running)).to_list()


async def running_by_worker(views: Views) -> dict[str, int]:
    """Return how many jobs each worker is running, as far as the view has got; only of those that run any."""
    counting: list[Document] = [{"$match": _RUNNING}, {"$group": {"_id": "$worker_id", "jobs": {"$sum": 1}}}]
    with driver_errors("counting the jobs of workers"):
        counted = await views[NAME].aggregate(counting, hint=dict(headings.index_for(_RUNNING)))
        return {row["_id"]: row["jobs"] async for row in counted}
