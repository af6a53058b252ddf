"""View `queue`: one row for each pending job whose batch is not paused.

The view is only a hint. The append of JobClaimed decides whether a worker gets the job.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Final, NamedTuple
from zlib import crc32

from pymongo import ASCENDING, DESCENDING, IndexModel

from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.slots import Views

NAME: Final = "queue"
_ORDER: Final = [("due_at", ASCENDING), ("priority", DESCENDING), ("queued_position", ASCENDING)]
INDEXES: Final = [IndexModel([*_ORDER, ("hash", ASCENDING)])]
"""With the hash, the server needs to read only the rows of a share."""
_ROW_FIELDS: Final = ("job_type", "batch_id", "priority", "due_at", "queued_position", "position")
_QUEUE_ROW_FIELDS: Final = {"job_type": 1, "batch_id": 1, "priority": 1, "queued_position": 1}


def build_rows(job: Document, batch: Document | None) -> list[Document]:
    """Return the row of a job if it is pending and its batch, if any, is not paused."""
    if job["status"] != "pending" or (batch is not None and batch["paused"]):
        return []
    return [{"_id": job["job_id"], **{name: job[name] for name in _ROW_FIELDS}, "hash": compute_hash(job["job_id"])}]


def compute_hash(job_id: str) -> int:
    """Return the number by which workers share jobs among themselves (workers/claims/claim_ranking.py)."""
    return crc32(job_id.encode())


class QueueRow(NamedTuple):
    """A job that a worker may claim."""

    job_id: str
    job_type: str
    batch_id: str | None
    priority: int
    queued_position: int


class Share(NamedTuple):
    """The jobs whose hash leaves `remainder` when it is divided by `divisor`."""

    divisor: int
    remainder: int


async def find_rows(
    views: Views,
    *,
    job_types: Collection[str],
    excluded_job_ids: Collection[str],
    excluded_batch_ids: Collection[str] = (),
    now: datetime,
    limit: int,
    share: Share | None = None,
) -> list[QueueRow]:
    """Return at most `limit` jobs that may be claimed now, by priority, then by age.

    Among the jobs that had a start time, only the `limit` jobs with the earliest start times are considered. With
    `share`, only its jobs are.
    """
    query: Document = {"job_type": {"$in": sorted(job_types)}, "_id": {"$nin": sorted(excluded_job_ids)}}
    if excluded_batch_ids:
        query["batch_id"] = {"$nin": sorted(excluded_batch_ids)}
    if share is not None:
        query["hash"] = {"$mod": [share.divisor, share.remainder]}
    with translate_errors("finding pending jobs"):
        unscheduled = await _find(views, {"due_at": None, **query}, limit)
        due = await _find(views, {"due_at": {"$lte": now}, **query}, limit)  # in BSON, null is not less than a date
    rows = [
        QueueRow(row["_id"], row["job_type"], row["batch_id"], row["priority"], row["queued_position"])
        for row in unscheduled + due
    ]
    return sorted(rows, key=get_urgency)[:limit]


def get_urgency(row: QueueRow) -> tuple[int, int]:
    """Return the sort key of rows: by priority, then by age."""
    return -row.priority, row.queued_position


async def _find(views: Views, query: Document, limit: int) -> list[Document]:
    return await views[NAME].find(query, _QUEUE_ROW_FIELDS, sort=_ORDER, limit=limit).to_list()


async def get_next_due_at(views: Views, *, now: datetime) -> datetime | None:
    """Return the earliest start time after `now` of a pending job, or None."""
    with translate_errors("finding the next due job"):
        row = await views[NAME].find_one({"due_at": {"$gt": now}}, {"due_at": 1}, sort=[("due_at", ASCENDING)])
    return row["due_at"] if row else None


async def estimate_depth(views: Views) -> int:
    """Return the number of rows, from the metadata of the collection."""
    with translate_errors("counting pending jobs"):
        return await views[NAME].estimated_document_count()
