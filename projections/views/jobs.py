"""View `jobs`: the job document of konzept.md, section "Event-Job Collection".

Lists of jobs are in projections/views/job_list.py.

Fields in addition to konzept.md:
    attempt: Number of the last attempt.
    steps: Summaries of completed steps, without their outputs.
    version, position: Version and position of the last applied event.
    due_at: Earliest start of a pending job.
    due_reason: Why a job is due later: `due_time` (its `not_before`) or `retry`. Without `due_at`, it has no meaning.
    pending_since: Time of the event that made the job pending the last time, or that changed its start time before it
        was due: it did not wait for a worker before.
    queued_position: Position of the event that queued the job; its age in the queue.
    truncated: Names of fields that contain only a part, by the budgets of ledger/domain/limits.py.
    projection_error: Why the document differs from the log, see projections/views/projection_errors.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, assert_never

from jobledger.ledger.domain import events
from jobledger.ledger.domain.errors import UnreadableEvent, UnsupportedEvent
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.domain.limits import (
    MAX_PROGRESS_MESSAGE_CHARACTERS,
    MAX_PROGRESS_STEP_CHARACTERS,
    fits_in_document,
    truncate_text,
)
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.slots import Views
from jobledger.projections.views import list_index, projection_errors, step_files
from jobledger.projections.views.documents import apply_changes, dump_truncated_error, load_or_fold, redact_webhook
from jobledger.projections.views.job_budgets import BUDGETED_FIELDS, apply_budgets
from jobledger.projections.views.job_log import append_log_entries
from jobledger.projections.views.list_index import Facet

NAME: Final = "jobs"
INDEXES: Final = [list_index.SEARCH_INDEX]
"""No index has a field that changes while a job runs: the list keys are in the view `job_list`."""
_SESSION_FACETS: Final = (("track", "track"), ("event", "event"), ("day", "day"), ("language", "target_language"))
_SEARCHED_PARAMETERS: Final = ("session", "event", "track", "filename")
_INDEXED_FIELDS: Final = frozenset({"error", "parameters", "access_control"})
"""The search keys, and the list keys except those of the status, are built from these fields and from fields that never
change."""


# Fold ---------------------------------------------------------------------------------------------------------------


def fold(job: Document | None, event: RecordedEvent) -> Document | None:
    """Apply one event of a job's stream; see `documents.Fold`."""
    payload: Any
    try:
        payload = event.event
    except UnsupportedEvent:
        raise
    except UnreadableEvent:
        if job is None or event.type != events.JobProgressed.__name__:
            raise
        # The next progress replaces this one, and the writer may skip it for that reason. If it isolated the job, the
        # result would depend on where chunks end.
        payload = events.JobProgressed(attempt=job["attempt"], step="unknown", percent=0.0, message="Cannot be read")
    if isinstance(payload, events.JobSubmitted):
        return _build_document(payload, event)
    if job is None:
        return None  # the job is deleted: later reports of a former worker change nothing
    changes = _build_changes(job, payload, event)
    if changes is None:
        return None
    after = apply_changes(job, changes, event)
    if not BUDGETED_FIELDS.isdisjoint(changes):
        apply_budgets(after, changes)
    if not _INDEXED_FIELDS.isdisjoint(changes) and any(after[name] is not job[name] for name in _INDEXED_FIELDS):
        _set_search_keys(after)
    return after


def _build_document(submitted: events.JobSubmitted, event: RecordedEvent) -> Document:
    job: Document = {
        "_id": event.stream,
        "job_id": event.stream,
        "job_type": submitted.job_type,
        "job_name": submitted.job_name,
        "status": "pending",
        "created_at": event.time,
        "updated_at": event.time,
        "started_at": None,
        "completed_at": None,
        "parameters": submitted.parameters,
        "webhook": redact_webhook(submitted.webhook),
        "batch_id": submitted.batch_id,
        "progress": {"step": "waiting", "percent": 0.0, "message": "Waiting for a worker"},
        "results": None,
        "error": None,
        "logs": [],
        "worker_id": None,
        "attempt": 0,
        "retries": 0,
        "max_attempts": submitted.max_attempts,
        "timeout_s": submitted.timeout_s,
        "priority": submitted.priority,
        "due_at": submitted.not_before,
        "due_reason": "due_time",
        "pending_since": event.time,
        "user_id": submitted.user_id,
        "access_control": submitted.access_control.model_dump(),
        "teams": submitted.teams,
        "cancel_requested": False,
        "archived": False,
        "steps": [],
        "queued_position": event.position,
        "version": event.version,
        "position": event.position,
    }
    apply_budgets(job, {"parameters": submitted.parameters})
    _set_search_keys(job)
    return job


def _build_changes(job: Document, payload: events.JobEvent, event: RecordedEvent) -> Document | None:
    """Return the fields that an event changes, or None if it deletes the job."""
    match payload:
        case events.JobClaimed():
            return {
                "status": "processing",
                "started_at": job["started_at"] or event.time,
                "worker_id": payload.worker_id,
                "attempt": payload.attempt,
                "due_at": None,
                "progress": {"step": "starting", "percent": 0.0, "message": "Claimed by a worker"},
            }
        case events.JobProgressed():
            return {
                "progress": {
                    "step": truncate_text(payload.step, MAX_PROGRESS_STEP_CHARACTERS),
                    "percent": payload.percent,
                    "message": truncate_text(payload.message, MAX_PROGRESS_MESSAGE_CHARACTERS),
                }
            }
        case events.JobLogged():
            return append_log_entries(job, event)
        case events.StepCompleted():
            steps = [*job.get("steps", ()), _summarize_step(payload, event)]
            return {"steps": steps, **step_files.add_step_digests(job, payload)}
        case events.WorkerFenced() | events.JobSubmitted():
            return {}
        case events.JobCompleted():
            return {
                "status": "completed",
                "completed_at": event.time,
                "results": {
                    **dict.fromkeys(("output", "markdown_file", "markdown_url")),
                    **payload.results.model_dump(),
                },
                "error": None,
                "progress": {"step": "completed", "percent": 100.0, "message": "Done"},
            }
        case events.JobAttemptFailed():
            return {
                **_build_pending("Waiting for the next attempt", event),
                "retries": job["retries"] + 1,
                "due_at": payload.retry_at,
                "due_reason": "retry",
                "error": dump_truncated_error(payload.error),
                **append_log_entries(job, event),
            }
        case events.JobFailed():
            return {
                "status": "failed",
                "completed_at": event.time,
                "error": dump_truncated_error(payload.error),
                "progress": {**job["progress"], "message": "Failed"},
                **append_log_entries(job, event),
            }
        case events.JobLeaseExpired():
            pending = _build_pending("Waiting for another worker", event)
            return {**pending, "retries": job["retries"] + 1, **append_log_entries(job, event)}
        case events.JobReleased():
            return {**_build_pending("Waiting for a worker", event), **append_log_entries(job, event)}
        case events.JobCancelRequested():
            return {"cancel_requested": True}
        case events.JobCancelled():
            return {
                "status": "cancelled",
                "completed_at": event.time,
                "cancel_requested": False,
                "due_at": None,
                "progress": {**job["progress"], "message": "Cancelled"},
            }
        case events.JobRestarted():
            return {
                **_build_pending("Restarted, waiting for a worker", event),
                "completed_at": None,
                "started_at": None,
                "retries": 0,
                "due_at": None,
                "results": None,
                "error": None,
                "cancel_requested": False,
                "queued_position": event.position,
                "steps": _select_reusable_steps(job) if payload.reuse_steps else [],
                "step_files": job.get("step_files", []) if payload.reuse_steps else [],
            }
        case events.JobUpdated():
            due_reason = "due_time" if payload.not_before is not None else None
            is_due_later = job["due_at"] is not None and job["due_at"] > event.time
            updates = {
                "parameters": payload.parameters,
                "priority": payload.priority,
                "due_at": payload.not_before,
                "due_reason": due_reason,
                "pending_since": event.time if payload.not_before is not None and is_due_later else None,
            }
            return {name: value for name, value in updates.items() if value is not None}
        case events.JobAccessChanged():
            return {"access_control": payload.access_control.model_dump()}
        case events.JobArchived() | events.JobUnarchived():
            return {"archived": isinstance(payload, events.JobArchived)}
        case events.JobDeleted():
            return None
        case _:
            assert_never(payload)


def _build_pending(message: str, event: RecordedEvent) -> Document:
    return {
        "status": "pending",
        "pending_since": event.time,
        "worker_id": None,
        "progress": {"step": "waiting", "percent": 0.0, "message": message},
    }


def _summarize_step(step: events.StepCompleted, event: RecordedEvent) -> Document:
    """Return a completed step without its output, which may be large and stays in the log for the next attempt."""
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
        "repeat_on_restart": step.repeat_on_restart,
        "version": event.version,
    }


def _select_reusable_steps(job: Document) -> list[Document]:
    """Return the steps that a restart does not repeat."""
    return [step for step in job.get("steps", ()) if not step["repeat_on_restart"]]


def get_status_facet(job: Document) -> str:
    """Return the value of a job's facet `status`: that of a pending job with a start time says why it has one."""
    status, due_reason = job["status"], job["due_reason"]
    return str(due_reason if status == "pending" and job["due_at"] is not None else status)


def build_facets(job: Document) -> list[Facet]:
    """Return the facets by which a job is listed, the status first."""
    parameters, error = job["parameters"], job["error"]
    values = [
        ("status", get_status_facet(job)),
        ("batch", job["batch_id"]),
        ("user", job["user_id"]),
        ("type", job["job_type"]),
        ("error", error["code"] if error else None),
        *((facet, parameters.get(name)) for facet, name in _SESSION_FACETS),
    ]
    return [*((name, value) for name, value in values if isinstance(value, str)), list_index.NO_FACET]


def _set_search_keys(job: Document) -> None:
    parameters = job["parameters"]
    speakers = parameters.get("speakers")
    texts = [job["job_id"], job["job_name"], *(parameters.get(name) for name in _SEARCHED_PARAMETERS)]
    list_index.set_search_keys(
        job, partial(build_facets, job), texts + (speakers if isinstance(speakers, list) else [])
    )


# Isolation of events and documents (projection_errors.py) -----------------------------------------------------------

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


def apply_to_isolated(job: Document, event: RecordedEvent) -> Document | None:
    """Apply an event to an isolated job. Only the event's type is used, because it is always readable."""
    if event.type == events.JobDeleted.__name__:
        return None
    status = _STATUS_AFTER.get(event.type, job["status"])
    changes: Document = {"status": status}
    if status in TERMINAL_STATUSES and job["status"] not in TERMINAL_STATUSES:
        changes["completed_at"] = event.time
    if status == "processing":
        changes |= {"started_at": job["started_at"] or event.time, "due_at": None}
    elif status == "pending" and job["status"] != "pending":
        changes |= {"worker_id": None, "pending_since": event.time}
    else:
        changes["worker_id"] = None
    return apply_changes(job, changes, event)


def build_placeholder(event: RecordedEvent) -> Document:
    """Return a document for a job whose first event is unreadable. It has the readable fields of the event."""
    submitted = events.JobSubmitted(
        job_type=projection_errors.read_text(event, "job_type") or "",
        job_name=projection_errors.read_text(event, "job_name"),
        batch_id=projection_errors.read_text(event, "batch_id"),
        user_id=projection_errors.read_text(event, "user_id") or "",
        parameters={},
    )
    return _build_document(submitted, event)


def reduce_to_storable(job: Document) -> Document:
    """Return a document that can be stored, without the fields that may be large."""
    small = {name: value if name in _ALWAYS_SMALL or _is_small(value) else None for name, value in job.items()}
    document: Document = {
        **small,
        **_EMPTY_VALUES,
        **projection_errors.PRIVATE_ACCESS,
        **{name: job[name] for name in projection_errors.PRIVATE_ACCESS if fits_in_document(job[name], _ACCESS_BYTES)},
        "truncated": sorted(name for name in _EMPTY_VALUES if job[name]),
    }
    _set_search_keys(document)
    return document


_EMPTY_VALUES: Final[Document] = {
    "parameters": {},
    "webhook": None,
    "progress": {"step": "", "percent": 0.0, "message": ""},
    "results": None,
    "error": None,
    "logs": [],
    "steps": [],
}
_ALWAYS_SMALL: Final = frozenset({"_id", "job_id", "status", "due_reason", "version", "position"})
_ACCESS_BYTES: Final = 512 * 1024
_SMALL_BYTES: Final = 4096


def _is_small(value: Any) -> bool:
    return projection_errors.find_unstorable_reason({"": value}) is None and fits_in_document(value, _SMALL_BYTES)


# Queries ------------------------------------------------------------------------------------------------------------


async def get(views: Views, event_store: EventStore, job_id: str) -> Document | None:
    """Return a job's document, or None if the job does not exist."""
    return await load_or_fold(views, event_store, NAME, job_id, fold)


async def find_pending_jobs(views: Views, job_ids: Sequence[str]) -> list[Document]:
    """Return the pending jobs among these, without large fields that do not affect their rows in the queue."""
    with translate_errors("finding pending jobs"):
        excluded = dict.fromkeys(("parameters", "logs", "steps", "error", "search_keys"), 0)
        return await views[NAME].find({"_id": {"$in": list(job_ids)}, "status": "pending"}, excluded).to_list()
