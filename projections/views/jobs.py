"""projections: the view `jobs`, the concept's job document (konzept.md, "Event-Job Collection"), complete.

Its fold, its indexes, its questions. Extra to the concept: `attempt`, `steps` (what was finished, not what it yielded),
`version` and `position` (the last event folded in), `due_at` (when a waiting job may start), `queued_position` (its age
in the queue), `truncated` (fields of which the document shows a part, by the budgets of ledger/domain/limits.py),
`projection_error` (why the document does not show the job as the log has it, see
projections/views/projection_errors.py).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, assert_never

import orjson

from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.errors import InvalidEvent, UnreadableEvent, UnsupportedEvent
from jobledger.ledger.domain.events import (
    JOB_EVENTS,
    TERMINAL_STATUSES,
    Event,
    Failure,
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
    LogEntry,
    RecordedEvent,
    StepCompleted,
    Webhook,
    WorkerFenced,
)
from jobledger.ledger.domain.limits import (
    MAX_PARAMETERS_BYTES,
    MAX_PROGRESS_MESSAGE_CHARACTERS,
    MAX_PROGRESS_STEP_CHARACTERS,
    MAX_RESULTS_BYTES,
    MAX_VIEW_LOGS_BYTES,
    MAX_VIEW_STEPS_BYTES,
    count_newest_within,
    fits_in_document,
    json_bytes,
    truncate_failure,
    truncate_text,
)
from jobledger.ledger.domain.saved_files import find_saved_files, is_sha256
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.slots import Views
from jobledger.projections.views import list_index, projection_errors
from jobledger.projections.views.list_index import Facet, PageCursor

NAME: Final = "jobs"
MAX_STEP_FILES: Final = 10_000
"""Files that finished steps of a job name. With more, no file of any job is removed from the store: see `doctor`."""
MAX_LOG_LINES: Final = 100  # the job carries the newest; all of them are in its history
MAX_LOG_LINE_CHARACTERS: Final = 10_000  # of each: a hundred lines have to fit into a document, which holds 16 MB
MAX_COUNT: Final = 10_000
INDEXES: Final = list_index.INDEXES
_SESSION_FACETS: Final = (("track", "track"), ("event", "event"), ("day", "day"), ("language", "target_language"))
_SEARCHED: Final = ("session", "event", "track", "filename")
_LISTED_BY: Final = frozenset({"error", "parameters", "access_control"})
_SIZED: Final = frozenset({"parameters", "results", "logs", "steps"})


def fold(job: Document | None, event: RecordedEvent) -> Document | None:
    """Return the job's document as it is after one more event of its stream; None when it is deleted."""
    if job is not None and projection_errors.ERROR_FIELD in job and projection_errors.REDUCED_FIELD not in job:
        return _apply_event_type(job, event)
    try:
        happened = event.event
    except UnsupportedEvent:
        raise
    except UnreadableEvent:
        if job is None or event.type != JobProgressed.__name__:
            raise
        # The next progress replaces it, or it is passed over for that (`folding`): so it must not isolate the job.
        happened = JobProgressed(attempt=job["attempt"], step="unknown", percent=0.0, message="Cannot be read")
    if isinstance(happened, JobSubmitted):
        return _submitted(happened, event)
    if job is None:
        return None  # deleted: what a zombie still says changes nothing
    assert isinstance(happened, JOB_EVENTS)  # noqa: S101 - narrows the type; streams hold events of one kind
    changes = _changes(job, happened, event)  # type: ignore[arg-type]  # isinstance with a tuple is not narrowed to the union
    if changes is None:
        return None
    after = {**job, **changes, "updated_at": event.time, "version": event.version, "position": event.position}
    if not _SIZED.isdisjoint(changes):
        _apply_budgets(after, changes)
    if not _LISTED_BY.isdisjoint(changes) and any(after[name] is not job[name] for name in _LISTED_BY):
        _set_list_index(after)
    return after


_STATUS_AFTER: Final = {
    "JobClaimed": "processing",
    "JobCompleted": "completed",
    "JobFailed": "failed",
    "JobCancelled": "cancelled",
    "JobAttemptFailed": "pending",
    "JobLeaseExpired": "pending",
    "JobReleased": "pending",
    "JobRestarted": "pending",
}


def isolate(job: Document | None, event: RecordedEvent, problem: Document) -> Document | None:
    """Return the document of a job one of whose events cannot be folded: as it was, with the reason."""
    before = job if job is not None else _placeholder_document(event)
    return _apply_event_type({**before, projection_errors.ERROR_FIELD: problem}, event)


def _apply_event_type(job: Document, event: RecordedEvent) -> Document | None:
    """Return an isolated job's document after one more event: of the event, only its type counts, which can be read."""
    if event.type == JobDeleted.__name__:
        return None
    status = _STATUS_AFTER.get(event.type, job["status"])
    changes: Document = {"status": status}
    if status in TERMINAL_STATUSES and job["status"] not in TERMINAL_STATUSES:
        changes["completed_at"] = event.time
    if status == "processing":
        changes |= {"started_at": job["started_at"] or event.time, "due_at": None}
    if status != "processing":
        changes["worker_id"] = None
    return {**job, **changes, "updated_at": event.time, "version": event.version, "position": event.position}


def _placeholder_document(event: RecordedEvent) -> Document:
    """Return a document for a job whose first event cannot be read: what of it is readable, only for admins."""

    def text(name: str, default: str | None = "") -> Any:
        value = event.payload.get(name)
        return truncate_text(value, 200) if isinstance(value, str) else default

    asked = JobSubmitted(
        job_type=text("job_type"),
        job_name=text("job_name", None),
        batch_id=text("batch_id", None),
        user_id=text("user_id"),
        parameters={},
    )
    return _submitted(asked, event)


def reduce_to_storable(job: Document, problem: Document) -> Document:
    """Return a document that can be stored, of one that cannot: without what may be large."""
    small = {name: value if name in _ALWAYS_SMALL or _is_small(value) else None for name, value in job.items()}
    access = job["access_control"] if fits_in_document(job["access_control"], _ACCESS_BYTES) else _PRIVATE_ACCESS
    document: Document = {
        **small,
        **_BLANK,
        "access_control": access,
        "teams": job["teams"] if fits_in_document(job["teams"], _ACCESS_BYTES) else [],
        "truncated": sorted(name for name in _BLANK if job[name] and name not in ("list_keys", "search_keys")),
        projection_errors.REDUCED_FIELD: True,
        projection_errors.ERROR_FIELD: problem,
    }
    _set_list_index(document)
    return document


_BLANK: Final[Document] = {
    "parameters": {},
    "webhook": None,
    "progress": {"step": "", "percent": 0.0, "message": ""},
    "results": None,
    "error": None,
    "logs": [],
    "steps": [],
    "list_keys": [],
    "search_keys": [],
}
_ALWAYS_SMALL: Final = frozenset({"_id", "job_id", "status", "version", "position"})
_PRIVATE_ACCESS: Final = {"visibility": "private", "read_access": [], "write_access": [], "admin_access": []}
_ACCESS_BYTES: Final = 512 * 1024
_SMALL_BYTES: Final = 4096


def _is_small(value: Any) -> bool:
    try:
        return fits_in_document(value, _SMALL_BYTES) and projection_errors.unstorable_reason({"": value}) is None
    except (InvalidEvent, TypeError, ValueError):
        return False


def _set_list_index(job: Document) -> None:
    """Say under which headings the job is listed, and under which words it is found."""
    scopes, facets, given = list_index.scopes_for_document(job), _facets(job), job["parameters"]
    job["list_keys"] = list_index.build_list_keys(scopes, facets)
    texts = [job["job_id"], job["job_name"], *(given.get(name) for name in _SEARCHED)]
    speakers = given.get("speakers")
    job["search_keys"] = list_index.build_search_keys(scopes, texts + (speakers if isinstance(speakers, list) else []))
    mark_truncated(job, "list_keys", truncated=list_index.is_truncated(job["list_keys"], scopes, facets))


def mark_truncated(job: Document, name: str, *, truncated: bool) -> None:
    """Say in `truncated` whether the document shows only a part of a field."""
    _set_field_flag(job, "truncated", name, holds=truncated)


def _set_field_flag(job: Document, kind: str, name: str, *, holds: bool) -> None:
    """Add a field's name to a list in the document, or remove it. An empty list is not there."""
    noted = job.get(kind, ())
    if holds == (name in noted):
        return
    names = sorted({*noted, name} if holds else {*noted} - {name})
    job.pop(kind, None)
    if names:
        job[kind] = names


_LARGE_BYTES: Final = 64 * 1024
_BUDGETS: Final = {"parameters": MAX_PARAMETERS_BYTES, "results": MAX_RESULTS_BYTES}


def _apply_budgets(job: Document, changes: Document) -> None:
    """Cut what has just changed and is larger than its budget; say so in `truncated`.

    Each field has a budget of its own, so a document fits whatever the other fields are, and no document has to be
    measured as a whole.
    """
    for name, budget in _BUDGETS.items():
        if name in changes:
            size = json_bytes(job[name])
            if size <= _LARGE_BYTES and "large_fields" not in job and "truncated" not in job:
                continue  # as most are: nothing to cut and nothing to note
            cut = not fits_in_document(job[name], budget, text_bytes=size)
            _set_field_flag(job, "large_fields", name, holds=size > _LARGE_BYTES)
            if cut:
                if name == "results":  # they still belong to the job: the store keeps them
                    job |= _with_step_files(job, (file["sha256"] for file in job[name]["files"]))
                job[name] = {} if name == "parameters" else _essential_results(job[name])
            mark_truncated(job, name, truncated=cut)
    if (logs := changes.get("logs")) and (kept := count_newest_within(logs, MAX_VIEW_LOGS_BYTES)) < len(logs):
        job["logs"] = logs[len(logs) - kept :]
    if "steps" in changes:
        steps = changes["steps"]
        kept = count_newest_within(steps, MAX_VIEW_STEPS_BYTES)
        if kept < len(steps):
            job["steps"] = steps[len(steps) - kept :]
        # What was cut once is missing for as long as the others stay.
        mark_truncated(
            job, "steps", truncated=kept < len(steps) or (bool(steps) and "steps" in job.get("truncated", ()))
        )


def _essential_results(results: Document) -> Document:
    """Return results without what is large: their files and their metadata, but for what they cost."""
    spent = results["metadata"]
    metadata = {name: spent[name] for name in ("processed_at", "duration", "tokens_used")} | {"warnings": []}
    urls = {name: results[name] and truncate_text(results[name], 1000) for name in ("markdown_file", "markdown_url")}
    return {**results, **urls, "assets": [], "files": [], "metadata": metadata}


def shorten_error(failure: Failure) -> Document:
    """Return a failure as a document shows it: cut to its budget."""
    return truncate_failure(failure).model_dump()


def _facets(job: Document) -> list[Facet]:
    given, error = job["parameters"], job["error"]
    values = [
        ("batch", job["batch_id"]),
        ("user", job["user_id"]),
        ("type", job["job_type"]),
        ("error", error["code"] if error else None),
        *((facet, given.get(name)) for facet, name in _SESSION_FACETS),
    ]
    return [list_index.NO_FACET, *((name, value) for name, value in values if isinstance(value, str))]


def _submitted(asked: JobSubmitted, event: RecordedEvent) -> Document:
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
        "webhook": redact_webhook(asked.webhook),
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
    _apply_budgets(job, {"parameters": asked.parameters})
    _set_list_index(job)
    return job


_FIELDS: Final = (
    *("_id", "job_id", "job_type", "job_name", "status", "created_at", "updated_at", "started_at", "completed_at"),
    *("parameters", "webhook", "batch_id", "progress", "results", "error", "logs", "worker_id", "attempt", "retries"),
    *("max_attempts", "timeout_s", "priority", "due_at", "user_id", "access_control", "teams", "cancel_requested"),
    *("archived", "steps", "version", "position", "truncated", projection_errors.ERROR_FIELD),
)
"""What lists show of a job: all that is shown of one."""


def redact_webhook(webhook: Webhook | None) -> Document | None:
    """Return a webhook as everyone may see it: header names, but not their values, which are secrets."""
    if webhook is None:
        return None
    return {
        "url": webhook.url,
        "headers": dict.fromkeys(webhook.header_names, "***"),
        "include_markdown": webhook.include_markdown,
        "include_metadata": webhook.include_metadata,
        "has_own_secrets": webhook.has_own_secrets,
    }


def _changes(job: Document, happened: JobEvent, event: RecordedEvent) -> Document | None:
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
            return {
                "progress": {
                    "step": truncate_text(happened.step, MAX_PROGRESS_STEP_CHARACTERS),
                    "percent": happened.percent,
                    "message": truncate_text(happened.message, MAX_PROGRESS_MESSAGE_CHARACTERS),
                }
            }
        case JobLogged():
            return _logged(job, event)
        case StepCompleted():
            return {"steps": [*job.get("steps", ()), _step_summary(happened, event)], **_step_files(job, happened)}
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
                "error": shorten_error(happened.error),
                "progress": {"step": "waiting", "percent": 0.0, "message": "Waiting for the next attempt"},
                **_logged(job, event),
            }
        case JobFailed():
            return {
                "status": "failed",
                "completed_at": event.time,
                "error": shorten_error(happened.error),
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
                "step_files": job.get("step_files", []) if happened.reuse_steps else [],
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


def _step_files(job: Document, step: StepCompleted) -> Document:
    """Return the digests of the files that finished steps name: the next attempt uses these files again."""
    text = orjson.dumps(step.output, default=str, option=orjson.OPT_NON_STR_KEYS)
    if b'"sha256"' not in text:
        return {}
    return _with_step_files(job, (file.sha256 for file in find_saved_files(step.output)))


def _with_step_files(job: Document, digests: Iterable[str]) -> Document:
    known = dict.fromkeys(job.get("step_files", ()))
    before = len(known)
    for digest in filter(is_sha256, digests):
        known[digest] = None
        if len(known) > MAX_STEP_FILES:
            break
    return {"step_files": list(known)} if len(known) > before else {}


def _step_summary(step: StepCompleted, event: RecordedEvent) -> Document:
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
        "cache_version": step.cache_version,
        "version": event.version,
    }


LOG_EVENT_TYPES: Final[tuple[type[Event], ...]] = (
    JobLogged,
    JobAttemptFailed,
    JobFailed,
    JobLeaseExpired,
    JobReleased,
)
"""The events that have lines for the job's log."""


def log_lines_of_event(event: RecordedEvent) -> list[LogEntry]:
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
            reason = "its machine cannot run it" if happened.is_machine_failure else happened.reason
            return [_line(event, f"The worker gave the job back: {reason}", "info")]
        case _:
            return []


def _line(event: RecordedEvent, message: str, level: Any = "warning") -> LogEntry:
    return LogEntry(timestamp=event.time, level=level, message=message)


def _logged(job: Document, event: RecordedEvent) -> Document:
    lines = log_lines_of_event(event)
    return {"logs": [*job["logs"], *(_shown_line(line) for line in lines[-MAX_LOG_LINES:])][-MAX_LOG_LINES:]}


def _shown_line(line: LogEntry) -> Document:
    cut = (
        line.message if len(line.message) <= MAX_LOG_LINE_CHARACTERS else f"{line.message[:MAX_LOG_LINE_CHARACTERS]} …"
    )
    return {**line.model_dump(), "message": cut}


# Questions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class JobFilter:
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

    def build_query(self, principal: Principal) -> Document:
        """Return the database query for those of these jobs that somebody may see."""
        facet, rest = self._narrowest()
        query = {**list_index.build_query(principal, facet, self.q or ""), **rest}
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
        facet: Facet = (given[0][0], given[0][2]) if given else list_index.NO_FACET
        return facet, {field: value for _, field, value in given[1:]}


async def get(views: Views, log: EventStore, job_id: str) -> Document | None:
    """Return a job's document, or None if there is no such job.

    A job that the projector has not reached yet is folded from the log, so who has just submitted it finds it.
    """
    with translate_errors(f"reading {job_id}"):
        job = await views[NAME].find_one({"_id": job_id})
    if job is None:
        for event in await log.read_stream(job_id):
            job = fold(job, event)
    return job


OMITTABLE_FIELDS: Final = ("parameters", "results", "error", "logs", "steps")
"""What lists leave out where it is large, unless it is asked for."""
MAX_LISTED_FIELD_BYTES: Final = 16 * 1024
_ESSENTIAL_RESULTS: Final = {
    "markdown_file": "$results.markdown_file",
    "markdown_url": "$results.markdown_url",
    "assets": [],
    "files": [],
    "metadata": {
        **{name: f"$results.metadata.{name}" for name in ("processed_at", "duration", "tokens_used")},
        "warnings": [],
        list_index.OMITTED: True,
    },
}
_BLANK_IN_LISTS: Final[Document] = {"parameters": {}, "error": None, "logs": [], "steps": []}


def _list_projection(included: Collection[str]) -> Document:
    """Return what the database sends of each job: everything of the small ones."""
    fields: Document = dict.fromkeys(_FIELDS, 1)
    for name in OMITTABLE_FIELDS:
        if name not in included:
            instead = _ESSENTIAL_RESULTS if name == "results" else list_index.OMITTED
            fields[name] = list_index.omit_if_large(name, max_bytes=MAX_LISTED_FIELD_BYTES, replacement=instead)
    return fields


def _mark_omitted(job: Document) -> Document:
    """Return a job as lists have it: in `omitted` are the fields that are left out, and empty."""
    omitted = [name for name, blank in _BLANK_IN_LISTS.items() if job[name] == list_index.OMITTED]
    for name in omitted:
        job[name] = _BLANK_IN_LISTS[name]
    if job["results"] is not None and job["results"]["metadata"].pop(list_index.OMITTED, False):
        omitted.append("results")
    if omitted:
        job["omitted"] = omitted
    return job


async def find_page(
    views: Views,
    wanted: Document,
    *,
    limit: int,
    skip: int = 0,
    after: PageCursor | None = None,
    newest_first: bool = True,
    include: Collection[str] = (),
) -> tuple[list[Document], PageCursor | None]:
    """Return a page of jobs in the order of creation, and where the next one begins.

    Of the `LARGE_FIELDS` those that are large are left out, unless they are `included`.
    """
    with translate_errors("listing jobs"):
        found, following = await list_index.find_page(
            views[NAME],
            wanted,
            limit=limit,
            skip=skip,
            after=after,
            newest_first=newest_first,
            projection=_list_projection(include),
        )
    return [_mark_omitted(job) for job in found], following


async def count(views: Views, wanted: Document) -> int:
    """Count jobs, but never more than `COUNTED_UP_TO`: a count over everything would read everything."""
    with translate_errors("counting jobs"):
        return await list_index.count(views[NAME], wanted, limit=MAX_COUNT)


async def find_pending_jobs(views: Views, job_ids: Sequence[str]) -> list[Document]:
    """Return the jobs that wait, without what is large and says nothing about their places in the queue."""
    with translate_errors("looking for waiting jobs"):
        left_out = dict.fromkeys(("parameters", "logs", "steps", "error", "list_keys", "search_keys"), 0)
        return await views[NAME].find({"_id": {"$in": list(job_ids)}, "status": "pending"}, left_out).to_list()


async def oldest_pending_created_at(views: Views) -> datetime | None:
    """Return when the oldest of the waiting jobs was submitted, None if none waits, as far as the view has got."""
    with translate_errors("looking for the oldest waiting job"):
        wanted = {"list_keys": list_index.unrestricted_list_key(list_index.NO_FACET), "status": "pending"}
        found, _ = await list_index.find_page(
            views[NAME], wanted, limit=1, newest_first=False, projection={"created_at": 1}
        )
    return found[0]["created_at"] if found else None


# Who runs what is found among the jobs that run, which are few: an index of workers would be one more to keep at every
# write of a job, an eighth of what that costs (docs/decisions/0018).
_RUNNING: Final[Document] = {"list_keys": list_index.unrestricted_list_key(list_index.NO_FACET), "status": "processing"}


async def find_jobs_of_worker(views: Views, worker_id: str) -> Sequence[Document]:
    """Return the jobs that a worker is running, as far as the view has got."""
    running = {**_RUNNING, "worker_id": worker_id}
    with translate_errors("looking for a worker's jobs"):
        return await views[NAME].find(running, {"attempt": 1}, hint=list_index.index_for(running)).to_list()


async def oldest_running_started_at(views: Views) -> datetime | None:
    """Return when the first of the jobs that run was started, None if none runs, as far as the view has got."""
    with translate_errors("looking for the oldest running job"):
        index = list_index.index_for(_RUNNING)
        started = [it["started_at"] async for it in views[NAME].find(_RUNNING, {"started_at": 1}, hint=index)]
    return min((at for at in started if at is not None), default=None)


async def count_running_by_worker(views: Views) -> dict[str, int]:
    """Return how many jobs each worker is running, as far as the view has got; only of those that run any."""
    counting: list[Document] = [{"$match": _RUNNING}, {"$group": {"_id": "$worker_id", "jobs": {"$sum": 1}}}]
    with translate_errors("counting the jobs of workers"):
        counted = await views[NAME].aggregate(counting, hint=dict(list_index.index_for(_RUNNING)))
        return {row["_id"]: row["jobs"] async for row in counted}
