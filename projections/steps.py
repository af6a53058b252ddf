"""projections: the view `steps`: which finished steps other jobs may use, found by the digest of their inputs.

What a step has yielded stays in the log; a row says where. A step that could not do all that it was asked to (it has
warnings) is not for others: what was in its way may be gone.
"""

from __future__ import annotations

from datetime import datetime
from typing import Final

from pymongo import ASCENDING, DESCENDING, IndexModel

from ledger.mongo import Document, driver_errors
from projections.views import Views

NAME: Final = "steps"
INDEXES: Final = [
    IndexModel([("key", ASCENDING), ("finished_at", DESCENDING)]),
    IndexModel([("job_id", ASCENDING)]),
]
_MOST: Final = 20


def rows(job: Document) -> list[Document]:
    """Return one row for each of the job's own finished steps; those that it has from others are theirs."""
    return [
        {
            "_id": f"{job['job_id']}:{step['key']}",
            "key": step["key"],
            "job_id": job["job_id"],
            "version": step["version"],
            "finished_at": step["finished_at"],
            "user_id": job["user_id"],
            "access_control": job["access_control"],
            "teams": job["teams"],
        }
        for step in job.get("steps", ())
        if step["reused_from"] is None and not step["warnings"]
    ]


async def find(views: Views, key: str, *, since: datetime, other_than: str) -> list[Document]:
    """Return the newest steps of other jobs that had the inputs of this digest and were finished after a moment."""
    wanted = {"key": key, "finished_at": {"$gte": since}, "job_id": {"$ne": other_than}}
    with driver_errors("looking for a finished step"):
        return await views[NAME].find(wanted, sort=[("finished_at", DESCENDING)], limit=_MOST).to_list()
