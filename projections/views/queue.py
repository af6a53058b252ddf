"""View `queue`: one row for each pending job whose batch is not paused.

The view is only a hint. The append of JobClaimed decides whether a worker gets the job.

Fields of a row in addition to those of the job:
    claimable_at: Since or from when a worker may claim the job: it became pending, is due, or its batch was resumed.
    hash: See `compute_hash`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from datetime import UTC, datetime
from typing import Final, NamedTuple
from zlib import crc32

from pymongo import ASCENDING, DESCENDING, IndexModel

from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.slots import Views

NAME: Final = "queue"
_ORDER: Final = [("due_at", ASCENDING), ("priority", DESCENDING), ("queued_position", ASCENDING)]
_BY_SCHEDULED_BATCH: Final = [("batch_id", ASCENDING), ("due_at", ASCENDING), ("due_reason", ASCENDING)]
INDEXES: Final = [
    IndexModel([*_ORDER, ("hash", ASCENDING)]),  # with the hash, the server needs to read only the rows of a share
    IndexModel([("claimable_at", ASCENDING)]),
    IndexModel(_BY_SCHEDULED_BATCH, partialFilterExpression={"due_at": {"$gt": datetime(1970, 1, 1, tzinfo=UTC)}}),
]
"""The last index has only the rows with a start time, which usually are few, and counts them."""
_ROW_FIELDS: Final = ("job_type", "batch_id", "priority", "due_at", "due_reason", "queued_position", "position")
_QUEUE_ROW_FIELDS: Final = {"job_type": 1, "batch_id": 1, "priority": 1, "queued_position": 1}


def build_rows(job: Document, batch: Document | None) -> list[Document]:
    """Return the row of a job if it is pending and its batch, if any, is not paused."""
    if job["status"] != "pending" or (batch is not None and batch["paused"]):
        return []
    times = (job["pending_since"], job["due_at"], batch["resumed_at"] if batch is not None else None)
    row = {"_id": job["job_id"], **{name: job[name] for name in _ROW_FIELDS}, "hash": compute_hash(job["job_id"])}
    return [{**row, "claimable_at": max((time for time in times if time is not None), default=None)}]


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


async def find_oldest_claimable_at(views: Views, *, now: datetime) -> datetime | None:
    """Return since when the longest-waiting of the jobs that may be claimed now waits, or None if there is none."""
    with translate_errors("finding the oldest claimable job"):
        query = {"claimable_at": {"$lte": now}}
        row = await views[NAME].find_one(query, {"claimable_at": 1}, sort=[("claimable_at", ASCENDING)])
    return row["claimable_at"] if row else None


async def find_oldest_claimable_by_type(views: Views, *, now: datetime) -> dict[str, datetime]:
    """Return since when the longest-waiting job that may be claimed now waits, by job type."""
    group = {"_id": "$job_type", "since": {"$min": "$claimable_at"}}
    with translate_errors("finding the oldest claimable jobs"):
        stages: list[Document] = [{"$match": {"claimable_at": {"$lte": now}}}, {"$group": group}]
        async with await views[NAME].aggregate(stages) as groups:
            return {row["_id"]: row["since"] async for row in groups}


async def count_scheduled(views: Views, *, now: datetime) -> Counter[str]:
    """Return how many jobs of batches that are not paused, and of no batch, are due later, by `due_reason`."""
    counts: Counter[str] = Counter()
    for (_, reason), count in (await _count_scheduled(views, {"due_at": {"$gt": now}}, batch_id=None)).items():
        counts[reason] += count
    return counts


async def count_scheduled_by_batch(
    views: Views, batch_ids: Collection[str], *, now: datetime
) -> Counter[tuple[str | None, str]]:
    """Return how many jobs of these batches are due later, by batch and `due_reason`."""
    query = {"batch_id": {"$in": sorted(batch_ids)}, "due_at": {"$gt": now}}
    return await _count_scheduled(views, query, batch_id="$batch_id")


async def _count_scheduled(views: Views, query: Document, *, batch_id: str | None) -> Counter[tuple[str | None, str]]:
    group = {"_id": {"batch_id": batch_id, "due_reason": "$due_reason"}, "count": {"$sum": 1}}
    with translate_errors("counting jobs that are due later"):
        stages = [{"$match": query}, {"$group": group}]
        async with await views[NAME].aggregate(stages, hint=dict(_BY_SCHEDULED_BATCH)) as groups:
            return Counter({(row["_id"]["batch_id"], row["_id"]["due_reason"]): row["count"] async for row in groups})


async def estimate_depth(views: Views) -> int:
    """Return the number of rows, from the metadata of the collection."""
    with translate_errors("counting pending jobs"):
        return await views[NAME].estimated_document_count()
