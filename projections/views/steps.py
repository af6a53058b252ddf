"""projections: the view `steps`: finished steps that other jobs of the same owner and job type may reuse.

The output of a step stays in the log; a row says where. A step with warnings has no row: it could not do all of its
work, and what prevented that may be gone.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from pymongo import ASCENDING, DESCENDING, IndexModel

from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.engine.slots import Views

NAME: Final = "steps"
INDEXES: Final = [
    IndexModel([("key", ASCENDING), ("user_id", ASCENDING), ("finished_at", DESCENDING)]),
    IndexModel([("job_id", ASCENDING)]),
]


def rows(job: Document) -> list[Document]:
    """Return one row for each shared step of the job. Steps reused from another job have their row there."""
    return [
        {
            "_id": f"{job['job_id']}:{step['key']}",
            "key": step["key"],
            "job_id": job["job_id"],
            "user_id": job["user_id"],
            "job_type": job["job_type"],
            "cache_version": step["cache_version"],
            "version": step["version"],
            "finished_at": step["finished_at"],
        }
        for step in job.get("steps", ())
        if step["cache_version"] is not None and step["reused_from"] is None and not step["warnings"]
    ]


async def find_shared(
    views: Views, key: str, *, user_id: str, job_type: str, version: str, since: datetime, excluded_job_id: str
) -> Document | None:
    """Return the newest step of another job with this owner, job type, processor version and digest of its inputs."""
    wanted = {
        "key": key,
        "user_id": user_id,
        "job_type": job_type,
        "cache_version": version,
        "finished_at": {"$gte": since},
        "job_id": {"$ne": excluded_job_id},
    }
    with translate_errors("looking for a shared step"):
        return await views[NAME].find_one(wanted, sort=[("finished_at", DESCENDING)])
