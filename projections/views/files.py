"""projections: the view `files`: the result files of each job, by path. The file store has the bytes.

A path belongs to one job (workers/path_reservations.py). In an older or imported log several jobs may have the same
path: each keeps its row, and the path leads to the file of the job that completed first and is not deleted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from pymongo import ASCENDING, IndexModel

from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.engine.slots import Views
from jobledger.projections.views import jobs, projection_errors

NAME: Final = "files"
_JOBS_PER_QUERY: Final = 100
INDEXES: Final = [
    IndexModel([("path", ASCENDING), ("modified_at", ASCENDING), ("job_id", ASCENDING)]),
    IndexModel([("job_id", ASCENDING)]),
    IndexModel([("sha256", ASCENDING)]),
]
_ACCESS: Final = {"_id": 0, "user_id": 1, "access_control": 1, "teams": 1}
STEP_FILES_VIEW: Final = "step_files"
"""The view of the files that finished steps name (projections/views/step_files.py)."""
UNTRACKED_FILES: Final = "*"
"""Stands for more files than are kept track of."""


def rows(job: Document) -> list[Document]:
    """Return one row for each of the job's result files. Who may read them, its document says."""
    if job["results"] is None:
        return []
    return [
        {
            "_id": f"{job['job_id']}:{file['path']}",
            "path": file["path"],
            "sha256": file["sha256"],
            "size": file["size"],
            "media_type": file["media_type"],
            "job_id": job["job_id"],
            "modified_at": job["completed_at"],
            "position": job["position"],
        }
        for file in job["results"]["files"]
    ]


def prefix_result_urls(prefix: str, results: Document) -> Document:
    """Return a job's results with the addresses of its files as they are behind a proxy with a path."""
    assets = [{**asset, "url": f"{prefix}{asset['url']}"} for asset in results["assets"]]
    url = results["markdown_url"] and f"{prefix}{results['markdown_url']}"
    return {**results, "markdown_url": url, "assets": assets}


async def get(views: Views, path: str) -> Document | None:
    """Return the file under a path with `user_id`, `access_control` and `teams` of its job, or None."""
    with translate_errors("looking for a file"):
        row = await views[NAME].find_one({"path": path}, sort=[("modified_at", ASCENDING), ("job_id", ASCENDING)])
        if row is None:
            return None
        access = await views[jobs.NAME].find_one({"_id": row["job_id"]}, _ACCESS)
    return None if access is None else {**access, **row}


async def has_other_owner(views: Views, path: str, job_id: str) -> bool:
    """Return whether another job has a file under a path."""
    with translate_errors("looking for a file"):
        return await views[NAME].find_one({"path": path, "job_id": {"$ne": job_id}}, {"_id": 1}) is not None


async def is_referenced(views: Views, sha256: str) -> bool:
    """Return whether a job has a file with this content, as a result or in what its finished steps have yielded.

    What the jobs of `jobs_with_unknown_files` have is not counted.
    """
    with translate_errors("looking for who needs a file"):
        found = [await views[name].find_one({"sha256": sha256}, {"_id": 1}) for name in (NAME, STEP_FILES_VIEW)]
    return any(it is not None for it in found)


async def find_jobs_with_unknown_files(views: Views, *, limit: int) -> list[str]:
    """Return jobs that may have more files than the views name, at most `limit` of them.

    These are jobs whose steps name too many files, and jobs that cannot be projected as the log has them.
    """
    with translate_errors("looking for jobs whose files are not known"):
        many = views[STEP_FILES_VIEW].find({"sha256": UNTRACKED_FILES}, {"job_id": 1}, limit=limit)
        found = [row["job_id"] async for row in many]
        isolated = views[projection_errors.NAME].find(projection_errors.rows_query("jobs"), {"key": 1}, limit=limit)
        found += [row["key"] async for row in isolated]
    return found[:limit]


async def has_any_file(views: Views) -> bool:
    """Return whether there is a file that a job has as a result, or that a finished step names."""
    with translate_errors("looking for files on record"):
        found = [await views[name].find_one({}, {"_id": 1}) for name in (NAME, STEP_FILES_VIEW)]
    return any(it is not None for it in found)


async def iter_job_files(views: Views, job_ids: Sequence[str]) -> AsyncIterator[Document]:
    """Yield the files of jobs as `get` returns them; the same jobs in the same order make the same list.

    The files of a hundred jobs at a time are in memory.
    """
    for begin in range(0, len(job_ids), _JOBS_PER_QUERY):
        some = list(job_ids[begin : begin + _JOBS_PER_QUERY])
        with translate_errors("looking for the files of jobs"):
            order = [("job_id", ASCENDING), ("path", ASCENDING)]
            found = await views[NAME].find({"job_id": {"$in": some}}, sort=order).to_list()
            access = {
                job.pop("_id"): job
                async for job in views[jobs.NAME].find({"_id": {"$in": some}}, {**_ACCESS, "_id": 1})
            }
        for row in found:
            if row["job_id"] in access:
                yield {**access[row["job_id"]], **row}
