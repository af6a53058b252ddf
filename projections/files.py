"""projections: the view `files`, which job's result lies under which path. The file store has the bytes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from pymongo import ASCENDING, IndexModel

from ledger.mongo import Document, driver_errors
from projections.views import Views

NAME: Final = "files"
_JOBS_AT_A_TIME: Final = 100
INDEXES: Final = [IndexModel([("job_id", ASCENDING)])]


def rows(job: Document) -> list[Document]:
    """Return one row for each of the job's result files."""
    if job["results"] is None:
        return []
    return [
        {
            "_id": file["path"],
            "sha256": file["sha256"],
            "size": file["size"],
            "media_type": file["media_type"],
            "job_id": job["job_id"],
            "user_id": job["user_id"],
            "access_control": job["access_control"],
            "teams": job["teams"],
            "modified_at": job["completed_at"],
            "position": job["position"],
        }
        for file in job["results"]["files"]
    ]


async def get(views: Views, path: str) -> Document | None:
    """Return what lies under a path, or None."""
    with driver_errors("looking for a file"):
        return await views[NAME].find_one({"_id": path})


async def of_jobs(views: Views, job_ids: Sequence[str]) -> AsyncIterator[Document]:
    """Yield the files of jobs, a hundred jobs at a time; the same jobs in the same order make the same list."""
    for begin in range(0, len(job_ids), _JOBS_AT_A_TIME):
        wanted = {"job_id": {"$in": list(job_ids[begin : begin + _JOBS_AT_A_TIME])}}
        with driver_errors("looking for the files of jobs"):
            found = await views[NAME].find(wanted, sort=[("job_id", ASCENDING), ("_id", ASCENDING)]).to_list()
        for row in found:
            yield row
