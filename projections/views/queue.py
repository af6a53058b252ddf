"""projections: the view `queue`, one row for each job that waits to be claimed, and whose batch is not paused.

A hint: the claiming append decides.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Final, NamedTuple

from pymongo import ASCENDING, DESCENDING, IndexModel

from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.engine.slots import Views

NAME: Final = "queue"
INDEXES: Final = [IndexModel([("due_at", ASCENDING), ("priority", DESCENDING), ("queued_position", ASCENDING)])]
_KEPT: Final = ("job_type", "batch_id", "priority", "due_at", "queued_position", "position")
_READ: Final = {"job_type": 1, "batch_id": 1, "priority": 1, "queued_position": 1}


def rows(job: Document, batch: Document | None) -> list[Document]:
    """Return the job's row if it is waiting and its batch, if there is one, is not paused."""
    if job["status"] != "pending" or (batch is not None and batch["paused"]):
        return []
    return [{"_id": job["job_id"], **{name: job[name] for name in _KEPT}}]


class QueueEntry(NamedTuple):
    """A job that may be claimed."""

    job_id: str
    job_type: str
    batch_id: str | None
    priority: int


async def find_candidates(
    views: Views, *, job_types: Collection[str], excluded_job_ids: Collection[str], now: datetime, limit: int
) -> list[QueueEntry]:
    """Return jobs of these types that may be claimed now, by priority, then age, `without` those named.

    Of jobs that had to wait for their time, only the `limit` that have been due the longest are looked at.
    """
    wanted = {"job_type": {"$in": sorted(job_types)}, "_id": {"$nin": sorted(excluded_job_ids)}}
    with translate_errors("looking for waiting jobs"):
        fresh = await _find(views, {"due_at": None, **wanted}, limit)
        due = await _find(views, {"due_at": {"$lte": now}, **wanted}, limit)  # BSON: null is not less than a date
    both = sorted(fresh + due, key=lambda row: (-row["priority"], row["queued_position"]))
    return [QueueEntry(row["_id"], row["job_type"], row["batch_id"], row["priority"]) for row in both[:limit]]


async def _find(views: Views, query: Document, limit: int) -> list[Document]:
    order = [("due_at", ASCENDING), ("priority", DESCENDING), ("queued_position", ASCENDING)]
    return await views[NAME].find(query, _READ, sort=order, limit=limit).to_list()


async def get_next_due_at(views: Views, *, now: datetime) -> datetime | None:
    """Return when the next job that must wait may start."""
    with translate_errors("looking for the next due job"):
        row = await views[NAME].find_one({"due_at": {"$gt": now}}, {"due_at": 1}, sort=[("due_at", ASCENDING)])
    return row["due_at"] if row else None


async def estimate_depth(views: Views) -> int:
    """Return how many jobs wait to be claimed, as the server knows without counting."""
    with translate_errors("asking how many jobs wait"):
        return await views[NAME].estimated_document_count()
