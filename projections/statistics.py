"""projections: the view `statistics`, counters that are kept, never counted. Each job and batch adds its share."""

from __future__ import annotations

from collections import Counter
from typing import Any, Final

from pymongo import IndexModel

from ledger.mongo import Database, Document, driver_errors

NAME: Final = "statistics"
INDEXES: Final[list[IndexModel]] = []
_TRACK: Final = "track/"
Contribution = Counter[tuple[str, str]]
"""How much is added to which field of which counter document."""


def of_job(job: Document | None) -> Contribution:
    """Return what one job adds to the counters."""
    if job is None:
        return Counter()
    track = job["parameters"].get("track")
    added = Counter({("jobs", "total"): 1, ("jobs", job["status"]): 1})
    if isinstance(track, str):
        added[_TRACK + track, "count"] += 1
        added[_TRACK + track, job["status"]] += 1
    return added


def of_batch(batch: Document | None) -> Contribution:
    """Return what one batch adds to the counters."""
    if batch is None:
        return Counter()
    return Counter({("batches", "total"): 1, ("batches", "active"): int(batch["status"] == "processing")})


async def jobs_counted(db: Database, *, status: str | None, track: str | None) -> int:
    """Return how many jobs there are, with this status and in this track, if these are named."""
    counter = "jobs" if track is None else _TRACK + track
    field = status or ("total" if track is None else "count")
    with driver_errors("reading the statistics"):
        found = await db[NAME].find_one({"_id": counter}, {field: 1})
    return int((found or {}).get(field, 0))


async def read(db: Database) -> dict[str, Any]:
    """Return the counters in the concept's shape: jobs, batches, tracks (`_id`, count, completed, failed)."""
    with driver_errors("reading the statistics"):
        counters = {document.pop("_id"): document async for document in db[NAME].find(sort=[("_id", 1)])}
    jobs = counters.pop("jobs", {})
    batches = counters.pop("batches", {})
    return {
        "jobs": {
            name: jobs.get(name, 0) for name in ("total", "pending", "processing", "completed", "failed", "cancelled")
        },
        "batches": {name: batches.get(name, 0) for name in ("total", "active")},
        "tracks": [
            {
                "_id": name.removeprefix(_TRACK),
                **{field: track.get(field, 0) for field in ("count", "completed", "failed")},
            }
            for name, track in counters.items()
            if track.get("count")
        ],
    }
