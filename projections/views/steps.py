"""View `steps`: completed steps that other jobs of the same owner and job type may reuse.

The output of a step stays in the log; a row names the event. A step with warnings has no row: it could not do all of
its work, and the cause may be gone.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from pymongo import ASCENDING, DESCENDING, IndexModel

from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.slots import Views

NAME: Final = "steps"
INDEXES: Final = [
    IndexModel([("key", ASCENDING), ("user_id", ASCENDING), ("finished_at", DESCENDING)]),
    IndexModel([("job_id", ASCENDING)]),
]


def build_rows(job: Document) -> list[Document]:
    """Return one row for each shared step of a job. A step that was reused has its row with the original job."""
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
    """Return the newest step of another job that may be reused, or None.

    Args:
        key: Digest of the step's inputs.
        user_id, job_type: Owner and type of the other job.
        version: Cache version of the step: the version of its processor.
        since: Earliest time at which the step was completed.
        excluded_job_id: The job that would reuse the step.
    """
    query = {
        "key": key,
        "user_id": user_id,
        "job_type": job_type,
        "cache_version": version,
        "finished_at": {"$gte": since},
        "job_id": {"$ne": excluded_job_id},
    }
    with translate_errors("finding a shared step"):
        return await views[NAME].find_one(query, sort=[("finished_at", DESCENDING)])
