"""projections: the view `batches`, the concept's batch document (konzept.md, "Event-Batch Collection"), complete.

Counts are kept from the changes of its jobs' documents; the status is what the batch's own events say.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from typing import Final, assert_never

from pymongo import ASCENDING, IndexModel

from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.commands import BatchCommand, FinishBatch, ReopenBatch
from jobledger.ledger.domain.events import (
    BATCH_EVENTS,
    TERMINAL_STATUSES,
    BatchAccessChanged,
    BatchArchived,
    BatchCounts,
    BatchDeleted,
    BatchEvent,
    BatchFinished,
    BatchPaused,
    BatchReopened,
    BatchResumed,
    BatchSubmitted,
    BatchSummary,
    BatchUnarchived,
    RecordedEvent,
)
from jobledger.ledger.domain.limits import truncate_text
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.hash_chain import MAX_SAFE_INTEGER
from jobledger.projections.engine.slots import Views
from jobledger.projections.views import list_index, projection_errors
from jobledger.projections.views.jobs import MAX_LISTED_FIELD_BYTES, mark_truncated, redact_webhook
from jobledger.projections.views.list_index import Facet, PageCursor

NAME: Final = "batches"
MAX_LISTED_JOB_IDS: Final = 100
MAX_COUNT: Final = 10_000
_MOST: Final = MAX_SAFE_INTEGER
INDEXES: Final = [
    *list_index.INDEXES,
    IndexModel([("status", ASCENDING)], partialFilterExpression={"status": "processing"}),
]


def fold(batch: Document | None, event: RecordedEvent) -> Document | None:
    """Return the batch's document as it is after one more event of its own stream; None when it is deleted."""
    if batch is not None and projection_errors.ERROR_FIELD in batch and projection_errors.REDUCED_FIELD not in batch:
        return _followed(batch, event)
    happened = event.event
    if isinstance(happened, BatchSubmitted):
        return _submitted(happened, event)
    if batch is None:
        return None
    assert isinstance(happened, BATCH_EVENTS)  # noqa: S101 - narrows the type; streams hold events of one kind
    changes = _changes(happened, event)  # type: ignore[arg-type]  # isinstance with a tuple is not narrowed to the union
    if changes is None:
        return None
    after = {**batch, **changes, "updated_at": event.time, "version": event.version, "position": event.position}
    if isinstance(happened, BatchFinished):
        after["needs_reopen"] = _counts(batch) != happened.counts
    if "access_control" in changes:
        _list(after)
    return after


def isolate(batch: Document | None, event: RecordedEvent, problem: Document) -> Document | None:
    """Return the document of a batch one of whose events cannot be folded: as it was, with the reason."""
    before = batch if batch is not None else _skeleton(event)
    return _followed({**before, projection_errors.ERROR_FIELD: problem}, event)


def _followed(batch: Document, event: RecordedEvent) -> Document | None:
    """Return an isolated batch's document after one more event of its own; of that, only the type counts."""
    if event.type == BatchDeleted.__name__:
        return None
    changes: Document = {}
    if event.type == BatchFinished.__name__:
        status = event.payload.get("status")
        ended = status if status in ("completed", "partial", "failed") else "partial"
        changes = {"status": ended, "completed_at": event.time, "needs_reopen": False}
    elif event.type == BatchReopened.__name__:
        changes = {"status": "processing", "completed_at": None, "needs_reopen": False}
    return {**batch, **changes, "updated_at": event.time, "version": event.version, "position": event.position}


def _skeleton(event: RecordedEvent) -> Document:
    """Return a document for a batch whose first event cannot be read: what of it is readable, only for admins."""
    found = event.payload.get("job_ids")
    job_ids = [it for it in found if isinstance(it, str)] if isinstance(found, list) else []
    user_id = event.payload.get("user_id")
    owner = truncate_text(user_id, 200) if isinstance(user_id, str) else ""
    return _submitted(BatchSubmitted(total_jobs=len(job_ids), job_ids=job_ids, user_id=owner), event)


def reduce_to_storable(batch: Document, problem: Document) -> Document:
    """Return a document that can be stored, of one that cannot: without what may be large."""
    document: Document = {
        **batch,
        "batch_name": None,
        "job_ids": [],
        "parameters": {},
        "webhook": None,
        "summary": {"duration": 0.0, "tokens_used": 0},
        "access_control": {"visibility": "private", "read_access": [], "write_access": [], "admin_access": []},
        "teams": [],
        "truncated": ["job_ids", "parameters"],
        projection_errors.REDUCED_FIELD: True,
        projection_errors.ERROR_FIELD: problem,
    }
    _list(document)
    return document


def _list(batch: Document) -> None:
    """Say under which headings the batch is listed, and under which words it is found."""
    scopes, facets = list_index.scopes_for_document(batch), [list_index.NO_FACET, ("user", batch["user_id"])]
    batch["list_keys"] = list_index.build_list_keys(scopes, facets)
    mark_truncated(batch, "list_keys", truncated=list_index.is_truncated(batch["list_keys"], scopes, facets))
    batch["search_keys"] = list_index.build_search_keys(scopes, [batch["batch_id"], batch["batch_name"]])


def _submitted(asked: BatchSubmitted, event: RecordedEvent) -> Document:
    batch: Document = {
        "_id": event.stream,
        "batch_id": event.stream,
        "batch_name": asked.batch_name,
        "status": "processing",
        "created_at": event.time,
        "updated_at": event.time,
        "completed_at": None,
        "job_ids": asked.job_ids,
        "total_jobs": asked.total_jobs,
        "pending_jobs": 0,
        "processing_jobs": 0,
        "completed_jobs": 0,
        "failed_jobs": 0,
        "cancelled_jobs": 0,
        "webhook": redact_webhook(asked.webhook),
        "parameters": asked.parameters,
        "summary": {"duration": 0.0, "tokens_used": 0},
        "user_id": asked.user_id,
        "access_control": asked.access_control.model_dump(),
        "teams": asked.teams,
        "paused": False,
        "archived": False,
        # A job went on after the recorded end of the batch. This must be recorded, even if the job has ended again.
        "needs_reopen": False,
        "version": event.version,
        "position": event.position,
    }
    _list(batch)
    return batch


def _changes(happened: BatchEvent, event: RecordedEvent) -> Document | None:
    match happened:
        case BatchSubmitted():
            return {}
        case BatchPaused():
            return {"paused": True}
        case BatchResumed():
            return {"paused": False}
        case BatchFinished():
            return {"status": happened.status, "completed_at": event.time}
        case BatchReopened():
            return {"status": "processing", "completed_at": None, "needs_reopen": False}
        case BatchAccessChanged():
            return {"access_control": happened.access_control.model_dump()}
        case BatchArchived():
            return {"archived": True}
        case BatchUnarchived():
            return {"archived": False}
        case BatchDeleted():
            return None
        case _:
            assert_never(happened)


def apply_job_change(
    batch: Document, before: Document | None, after: Document | None, event: RecordedEvent
) -> Document:
    """Return the batch's document as it is after one of its jobs has changed."""
    was, now = before and before["status"], after and after["status"]
    changed = dict(batch)
    if was != now:
        if was:
            changed[f"{was}_jobs"] -= 1
        if now:
            changed[f"{now}_jobs"] += 1
    if after is None and before is not None:
        changed["job_ids"] = _without(batch["job_ids"], before["job_id"])
        changed["total_jobs"] -= 1
    if (
        batch["status"] != "processing"
        and was in TERMINAL_STATUSES
        and now is not None
        and now not in TERMINAL_STATUSES
    ):
        changed["needs_reopen"] = True
    if now == "completed" and was != "completed" and after is not None and after["results"] is not None:
        changed["summary"] = _with_cost(batch["summary"], after)
    return {**changed, "updated_at": event.time, "position": event.position}


def _with_cost(summary: Document, job: Document) -> Document:
    """Return what the batch's jobs cost when one more is completed; at most what the log and the database can hold."""
    spent = job["results"]["metadata"]
    duration, tokens = summary["duration"] + spent["duration"], summary["tokens_used"] + spent["tokens_used"]
    return {
        "duration": round(max(-_MOST, min(_MOST, duration)), 3),
        "tokens_used": max(-_MOST, min(_MOST, tokens)),
    }


def _without(job_ids: list[str], job_id: str) -> list[str]:
    """All jobs of a batch are often deleted in their order; then this is a copy, and no ten thousand comparisons."""
    remaining = job_ids.copy()
    with suppress(ValueError):
        remaining.remove(job_id)
    return remaining


def follow_up_command(batch: Document) -> BatchCommand | None:
    """Return what has to be recorded about a batch, seeing its counts: that it has ended, or goes on again.

    The projector asks this of all `unsettled` batches when a new leader has caught up with the log, and from then on
    of every batch it has changed. So whoever crashes when, a batch whose jobs have all ended is finished, and one whose
    job was restarted is open again, however long the job was at it.
    """
    counts = _counts(batch)
    ended = counts.completed + counts.failed + counts.cancelled
    if batch["status"] == "processing" and ended == batch["total_jobs"]:
        return FinishBatch(counts, BatchSummary(**batch["summary"]))
    if batch["status"] != "processing" and (batch["needs_reopen"] or ended < batch["total_jobs"]):
        return ReopenBatch()  # which changes it: if all its jobs have ended again, it is finished next
    return None


def _counts(batch: Document) -> BatchCounts:
    return BatchCounts(
        completed=batch["completed_jobs"], failed=batch["failed_jobs"], cancelled=batch["cancelled_jobs"]
    )


# Questions --------------------------------------------------------------------------------------------------------


async def get(views: Views, log: EventStore, batch_id: str) -> Document | None:
    """Return a batch's document, or None. One that the projector has not reached yet is folded from the log."""
    with translate_errors(f"reading {batch_id}"):
        batch = await views[NAME].find_one({"_id": batch_id})
    if batch is None:
        for event in await log.read_stream(batch_id):
            batch = fold(batch, event)
        batch = with_submitted_counts(batch)
    return batch


def with_submitted_counts(batch: Document | None) -> Document | None:
    """Return a batch that was folded without its jobs as it is at its beginning: all of them wait."""
    return {**batch, "pending_jobs": batch["total_jobs"]} if batch else None


def build_query(
    principal: Principal,
    *,
    status: str | None = None,
    user_id: str | None = None,
    archived: bool | None = None,
    q: str | None = None,
) -> Document:
    """Return the database query for those of the batches asked for that somebody may see; None means any."""
    facet: Facet = list_index.NO_FACET if user_id is None else ("user", user_id)
    rest = {"status": status, "archived": archived}
    wanted = list_index.build_query(principal, facet, q or "")
    return wanted | {name: value for name, value in rest.items() if value is not None}


_IN_LISTS: Final[Document] = {
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
    "parameters": list_index.omit_if_large("parameters", max_bytes=MAX_LISTED_FIELD_BYTES),
}
"""What lists show of a batch: all that is shown of one, but of its jobs the first, and no large parameters."""


async def find_page(
    views: Views,
    wanted: Document,
    *,
    limit: int,
    skip: int = 0,
    after: PageCursor | None = None,
    newest_first: bool = True,
) -> tuple[list[Document], PageCursor | None]:
    """Return a page of batches in the order of creation, and where the next one begins.

    Each with the first of its `job_ids` only: a page of large batches would be many megabytes.
    """
    with translate_errors("listing batches"):
        found, following = await list_index.find_page(
            views[NAME],
            wanted,
            limit=limit,
            skip=skip,
            after=after,
            newest_first=newest_first,
            projection=_IN_LISTS,
        )
    for batch in found:
        if batch["parameters"] == list_index.OMITTED:
            batch |= {"parameters": {}, "omitted": ["parameters"]}
    return found, following


async def count(views: Views, wanted: Document) -> int:
    """Count batches, but never more than `COUNTED_UP_TO`."""
    with translate_errors("counting batches"):
        return await list_index.count(views[NAME], wanted, limit=MAX_COUNT)


async def count_jobs(views: Views, batch_id: str, *, status: str | None) -> int:
    """Return how many jobs a batch has, with this status, if one is named."""
    field = "total_jobs" if status is None else f"{status}_jobs"
    with translate_errors("reading the counts of a batch"):
        found = await views[NAME].find_one({"_id": batch_id}, {field: 1})
    return int((found or {}).get(field, 0))


async def find_paused(views: Views, batch_ids: Collection[str]) -> set[str]:
    """Return which of these batches are paused, as far as the view has got."""
    with translate_errors("looking for paused batches"):
        query = {"_id": {"$in": sorted(batch_ids)}, "paused": True}
        return {batch["_id"] async for batch in views[NAME].find(query, {"_id": 1})}


async def find_unsettled(views: Views) -> Sequence[Document]:
    """Return the batches that are not finished, or have gone on since they were, for `reaction`."""
    unfinished = [
        {"status": "processing"},
        {"needs_reopen": True},
        {"pending_jobs": {"$gt": 0}},
        {"processing_jobs": {"$gt": 0}},
    ]
    with translate_errors("looking for unfinished batches"):
        return await views[NAME].find({"$or": unfinished}, {"job_ids": 0, "parameters": 0}).to_list()
