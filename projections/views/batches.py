"""View `batches`: the batch document of konzept.md, section "Event-Batch Collection".

The counts follow the changes of the batch's job documents. The status follows the batch's own events.

Fields in addition to konzept.md:
    paused: Whether the batch is paused.
    resumed_at: When the batch was last resumed.
    needs_reopen: Whether a job became active after the batch was finished. The projector must then append
        BatchReopened, even if the job has finished again.
    version, position: Version of the last event of the batch's own stream; position of the last applied event.
    truncated, projection_error: As in the view `jobs`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Any, Final, assert_never

from pymongo import ASCENDING, IndexModel

from jobledger.ledger.domain import events
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.canonical_json import MAX_SAFE_INTEGER
from jobledger.ledger.domain.commands import BatchCommand, FinishBatch, ReopenBatch
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.slots import Views
from jobledger.projections.views import list_index, paging, projection_errors
from jobledger.projections.views.documents import apply_changes, load_or_fold, redact_webhook
from jobledger.projections.views.list_index import ListQuery
from jobledger.projections.views.paging import OMITTED, PageCursor, PageRequest

NAME: Final = "batches"
MAX_LISTED_JOB_IDS: Final = 100
INDEXES: Final = [
    list_index.LIST_INDEX,
    list_index.SEARCH_INDEX,
    IndexModel([("status", ASCENDING)], partialFilterExpression={"status": "processing"}),
    IndexModel([("paused", ASCENDING)], partialFilterExpression={"paused": True}),
]


# Fold ---------------------------------------------------------------------------------------------------------------


def fold(batch: Document | None, event: RecordedEvent) -> Document | None:
    """Apply one event of a batch's own stream; see `documents.Fold`."""
    payload: Any = event.event
    if isinstance(payload, events.BatchSubmitted):
        return _build_document(payload, event)
    if batch is None:
        return None
    changes = _build_changes(payload, event)
    if changes is None:
        return None
    after = apply_changes(batch, changes, event)
    if isinstance(payload, events.BatchFinished):
        after["needs_reopen"] = _get_counts(batch) != payload.counts
    if "access_control" in changes or "status" in changes:
        _set_list_index(after)
    return after


def _build_document(submitted: events.BatchSubmitted, event: RecordedEvent) -> Document:
    batch: Document = {
        "_id": event.stream,
        "batch_id": event.stream,
        "batch_name": submitted.batch_name,
        "status": "processing",
        "created_at": event.time,
        "updated_at": event.time,
        "completed_at": None,
        "job_ids": submitted.job_ids,
        "total_jobs": submitted.total_jobs,
        "pending_jobs": 0,
        "processing_jobs": 0,
        "completed_jobs": 0,
        "failed_jobs": 0,
        "cancelled_jobs": 0,
        "webhook": redact_webhook(submitted.webhook),
        "parameters": submitted.parameters,
        "summary": {"duration": 0.0, "tokens_used": 0},
        "user_id": submitted.user_id,
        "access_control": submitted.access_control.model_dump(),
        "teams": submitted.teams,
        "paused": False,
        "resumed_at": None,
        "archived": False,
        "needs_reopen": False,
        "version": event.version,
        "position": event.position,
    }
    _set_list_index(batch)
    return batch


def _build_changes(payload: events.BatchEvent, event: RecordedEvent) -> Document | None:
    """Return the fields that an event changes, or None if it deletes the batch."""
    match payload:
        case events.BatchSubmitted():
            return {}
        case events.BatchPaused():
            return {"paused": True}
        case events.BatchResumed():
            return {"paused": False, "resumed_at": event.time}
        case events.BatchFinished():
            return {"status": payload.status, "completed_at": event.time}
        case events.BatchReopened():
            return {"status": "processing", "completed_at": None, "needs_reopen": False}
        case events.BatchAccessChanged():
            return {"access_control": payload.access_control.model_dump()}
        case events.BatchArchived() | events.BatchUnarchived():
            return {"archived": isinstance(payload, events.BatchArchived)}
        case events.BatchDeleted():
            return None
        case _:
            assert_never(payload)


def _set_list_index(batch: Document) -> None:
    facets: list[list_index.Facet] = [("status", batch["status"]), list_index.NO_FACET, ("user", batch["user_id"])]
    list_index.set_list_index(batch, facets, [batch["batch_id"], batch["batch_name"]])


def apply_job_change(
    batch: Document, before: Document | None, after: Document | None, event: RecordedEvent
) -> Document:
    """Return the batch's document after a change of one of its jobs.

    `before` and `after` are the job's documents before and after `event`, None if it did not exist.
    """
    old_status, new_status = before and before["status"], after and after["status"]
    changed = dict(batch)
    if old_status != new_status:
        if old_status:
            changed[f"{old_status}_jobs"] -= 1
        if new_status:
            changed[f"{new_status}_jobs"] += 1
    if after is None and before is not None:
        changed["job_ids"] = _remove_job_id(batch["job_ids"], before["job_id"])
        changed["total_jobs"] -= 1
    if (
        batch["status"] != "processing"
        and old_status in TERMINAL_STATUSES
        and new_status is not None
        and new_status not in TERMINAL_STATUSES
    ):
        changed["needs_reopen"] = True
    if new_status == "completed" and old_status != "completed" and after is not None and after["results"] is not None:
        changed["summary"] = _add_cost(batch["summary"], after)
    return {**changed, "updated_at": event.time, "position": event.position}


def _add_cost(summary: Document, job: Document) -> Document:
    """Return the batch summary with the cost of one more completed job.

    The numbers are limited to what the log and the database can hold exactly.
    """
    cost = job["results"]["metadata"]
    duration, tokens = summary["duration"] + cost["duration"], summary["tokens_used"] + cost["tokens_used"]
    return {
        "duration": round(max(-MAX_SAFE_INTEGER, min(MAX_SAFE_INTEGER, duration)), 3),
        "tokens_used": max(-MAX_SAFE_INTEGER, min(MAX_SAFE_INTEGER, tokens)),
    }


def _remove_job_id(job_ids: list[str], job_id: str) -> list[str]:
    """Return the job IDs without one of them.

    The jobs of a batch are often deleted in order. `remove` finds the first ID immediately. A filter would compare up
    to ten thousand IDs.
    """
    remaining = job_ids.copy()
    with suppress(ValueError):
        remaining.remove(job_id)
    return remaining


def fold_own_events(batch: Document | None, event: RecordedEvent) -> Document | None:
    """Apply one event of the batch's own stream as `fold` does. All jobs count as pending, as at the submission."""
    after = fold(batch, event)
    return {**after, "pending_jobs": after["total_jobs"]} if after else None


# Isolation of events and documents (projection_errors.py) -----------------------------------------------------------


def apply_to_isolated(batch: Document, event: RecordedEvent) -> Document | None:
    """Apply an event to an isolated batch. Of the event, only the type and a readable status are used."""
    if event.type == events.BatchDeleted.__name__:
        return None
    changes: Document = {}
    if event.type == events.BatchFinished.__name__:
        status = event.payload_fields.get("status")
        terminal_status = status if status in ("completed", "partial", "failed") else "partial"
        changes = {"status": terminal_status, "completed_at": event.time, "needs_reopen": False}
    elif event.type == events.BatchReopened.__name__:
        changes = {"status": "processing", "completed_at": None, "needs_reopen": False}
    after = apply_changes(batch, changes, event)
    if changes:
        _set_list_index(after)
    return after


def build_placeholder(event: RecordedEvent) -> Document:
    """Return a document for a batch whose first event is unreadable. It has the readable fields of the event."""
    values = event.payload_fields.get("job_ids")
    job_ids = [value for value in values if isinstance(value, str)] if isinstance(values, list) else []
    owner = projection_errors.read_text(event, "user_id") or ""
    return _build_document(events.BatchSubmitted(total_jobs=len(job_ids), job_ids=job_ids, user_id=owner), event)


def reduce_to_storable(batch: Document) -> Document:
    """Return a document that can be stored, without the fields that may be large."""
    document: Document = {
        **batch,
        "batch_name": None,
        "job_ids": [],
        "parameters": {},
        "webhook": None,
        "summary": {"duration": 0.0, "tokens_used": 0},
        **projection_errors.PRIVATE_ACCESS,
        "truncated": ["job_ids", "parameters"],
    }
    _set_list_index(document)
    return document


# Follow-up commands -------------------------------------------------------------------------------------------------


def find_follow_up_command(batch: Document) -> BatchCommand | None:
    """Return the command that the counts of a batch require: finish it, reopen it, or None.

    A new leader of the projector first catches up with the log and checks all batches of `find_batches_to_check`. After
    that, it checks each batch that it has changed. Therefore, even after a crash, a batch is finished once all its jobs
    are, and it is reopened after a job was restarted, even if the job has finished again.
    """
    counts = _get_counts(batch)
    finished = counts.completed + counts.failed + counts.cancelled
    if batch["status"] == "processing" and finished == batch["total_jobs"]:
        return FinishBatch(counts, events.BatchSummary(**batch["summary"]))
    if batch["status"] != "processing" and (batch["needs_reopen"] or finished < batch["total_jobs"]):
        return ReopenBatch()  # this event changes the batch; if all jobs have finished again, FinishBatch follows
    return None


def _get_counts(batch: Document) -> events.BatchJobCounts:
    return events.BatchJobCounts(
        completed=batch["completed_jobs"], failed=batch["failed_jobs"], cancelled=batch["cancelled_jobs"]
    )


# Queries ------------------------------------------------------------------------------------------------------------

_LIST_PROJECTION: Final[Document] = {
    **dict.fromkeys(
        (
            *("_id", "batch_id", "batch_name", "status", "created_at", "updated_at", "completed_at", "total_jobs"),
            *("pending_jobs", "processing_jobs", "completed_jobs", "failed_jobs", "cancelled_jobs", "webhook"),
            *("summary", "user_id", "access_control", "teams", "paused", "archived", "version", "position"),
            *("truncated", projection_errors.ERROR_FIELD),
        ),
        1,
    ),
    "job_ids": {"$slice": ["$job_ids", MAX_LISTED_JOB_IDS]},
    "parameters": paging.omit_if_large("parameters", max_bytes=paging.MAX_LISTED_FIELD_BYTES),
}
"""The fields of a batch in a list: those of a single batch, with the first job IDs and without large parameters."""


async def get(views: Views, event_store: EventStore, batch_id: str) -> Document | None:
    """Return a batch's document, or None if the batch does not exist."""
    return await load_or_fold(views, event_store, NAME, batch_id, fold_own_events)


def build_query(
    principal: Principal,
    *,
    status: str | None = None,
    user_id: str | None = None,
    archived: bool | None = None,
    q: str | None = None,
    id_prefix: str | None = None,
) -> ListQuery:
    """Return the query for the matching batches that a principal may see; None matches any value."""
    if words := list_index.split_words(q or ""):
        conditions = {"status": status, "user_id": user_id, "archived": archived}
        return list_index.build_search(NAME, principal, words, conditions=conditions).with_id_prefix(id_prefix)
    facets = {"status": status, "user": user_id}
    query = list_index.build_query(NAME, principal, facets, conditions={"archived": archived})
    return query.with_id_prefix(id_prefix)


async def find_page(views: Views, query: ListQuery, request: PageRequest) -> tuple[list[Document], PageCursor | None]:
    """Return a page of batches and the cursor of the next one; see `paging.find_page`.

    Each batch has only the first of its `job_ids`. Otherwise a page of large batches would have many megabytes.
    """
    page, next_cursor = await paging.find_page(views, query, request, projection=_LIST_PROJECTION)
    for batch in page:
        if batch["parameters"] == OMITTED:
            batch |= {"parameters": {}, "omitted": ["parameters"]}
    return page, next_cursor


async def count_jobs(views: Views, batch_id: str, *, status: str | None) -> int:
    """Return the number of a batch's jobs, or of those with a status."""
    field = "total_jobs" if status is None else f"{status}_jobs"
    with translate_errors("reading the counts of a batch"):
        batch = await views[NAME].find_one({"_id": batch_id}, {field: 1})
    return int((batch or {}).get(field, 0))


async def find_paused(views: Views, batch_ids: Collection[str] | None = None) -> set[str]:
    """Return which of these batches, by default of all, are paused according to the view."""
    with translate_errors("finding paused batches"):
        query = {"paused": True} if batch_ids is None else {"_id": {"$in": sorted(batch_ids)}, "paused": True}
        return {batch["_id"] async for batch in views[NAME].find(query, {"_id": 1})}


async def find_batches_to_check(views: Views) -> Sequence[Document]:
    """Return the batches for which `find_follow_up_command` may return a command."""
    conditions = [
        {"status": "processing"},
        {"needs_reopen": True},
        {"pending_jobs": {"$gt": 0}},
        {"processing_jobs": {"$gt": 0}},
    ]
    with translate_errors("finding unfinished batches"):
        return await views[NAME].find({"$or": conditions}, {"job_ids": 0, "parameters": 0}).to_list()
