"""View `files`: the result files of each job, by path. The result store contains their bytes.

A path belongs to one job (`workers/results/path_reservations.py`). In an older or imported log, several jobs may have
the same path. Then each job has a row, and the path leads to the file of the job that completed first and is not
deleted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Final

from pymongo import ASCENDING, IndexModel

from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.slots import Views
from jobledger.projections.views import jobs, projection_errors, step_files

NAME: Final = "files"
INDEXES: Final = [
    IndexModel([("path", ASCENDING), ("modified_at", ASCENDING), ("job_id", ASCENDING)]),
    IndexModel([("job_id", ASCENDING)]),
    IndexModel([("sha256", ASCENDING)]),
]
_JOBS_PER_QUERY: Final = 100
_ACCESS_FIELDS: Final = {"_id": 0, "user_id": 1, "access_control": 1, "teams": 1}


def build_rows(job: Document) -> list[Document]:
    """Return one row for each result file of a job. The job's document says who may read them."""
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
    """Return a job's results with the path prefix of a proxy in the URLs of its files."""
    assets = [{**asset, "url": f"{prefix}{asset['url']}"} for asset in results["assets"]]
    url = results["markdown_url"] and f"{prefix}{results['markdown_url']}"
    return {**results, "markdown_url": url, "assets": assets}


async def get(views: Views, path: str) -> Document | None:
    """Return the file with a path and its job's `user_id`, `access_control` and `teams`, or None."""
    with translate_errors("finding a file"):
        row = await views[NAME].find_one({"path": path}, sort=[("modified_at", ASCENDING), ("job_id", ASCENDING)])
        if row is None:
            return None
        access = await views[jobs.NAME].find_one({"_id": row["job_id"]}, _ACCESS_FIELDS)
    return None if access is None else {**access, **row}


async def belongs_to_other_job(views: Views, path: str, job_id: str) -> bool:
    """Return whether another job has a file with this path."""
    with translate_errors("finding a file"):
        return await views[NAME].find_one({"path": path, "job_id": {"$ne": job_id}}, {"_id": 1}) is not None


async def is_referenced(views: Views, sha256: str) -> bool:
    """Return whether a job has a file with this digest among its results or the outputs of its completed steps.

    Files of the jobs of `find_jobs_with_unknown_files` may be missing in the views.
    """
    return await _has_digest(views, {"sha256": sha256})


async def has_any_file(views: Views) -> bool:
    """Return whether any job has a file among its results or the outputs of its completed steps."""
    return await _has_digest(views, {})


async def _has_digest(views: Views, query: Document) -> bool:
    with translate_errors("finding references to files"):
        rows = [await views[name].find_one(query, {"_id": 1}) for name in (NAME, step_files.NAME)]
    return any(row is not None for row in rows)


async def find_jobs_with_unknown_files(views: Views, *, limit: int) -> list[str]:
    """Return the IDs of at most `limit` jobs that may have files which the views do not contain.

    These are jobs whose steps name too many files, and jobs that cannot be projected.
    """
    with translate_errors("finding jobs with unknown files"):
        untracked = views[step_files.NAME].find({"sha256": step_files.UNTRACKED_FILES}, {"job_id": 1}, limit=limit)
        job_ids = [row["job_id"] async for row in untracked]
        isolated = views[projection_errors.NAME].find(
            projection_errors.build_rows_query("jobs"), {"key": 1}, limit=limit
        )
        job_ids += [row["key"] async for row in isolated]
    return job_ids[:limit]


async def iter_job_files(views: Views, job_ids: Sequence[str]) -> AsyncIterator[Document]:
    """Yield the files of jobs in the form of `get`. The order depends only on the order of the job IDs.

    Memory holds the files of a hundred jobs at a time.
    """
    for begin in range(0, len(job_ids), _JOBS_PER_QUERY):
        page = list(job_ids[begin : begin + _JOBS_PER_QUERY])
        with translate_errors("finding the files of jobs"):
            order = [("job_id", ASCENDING), ("path", ASCENDING)]
            rows = await views[NAME].find({"job_id": {"$in": page}}, sort=order).to_list()
            access = {
                job.pop("_id"): job
                async for job in views[jobs.NAME].find({"_id": {"$in": page}}, {**_ACCESS_FIELDS, "_id": 1})
            }
        for row in rows:
            if row["job_id"] in access:
                yield {**access[row["job_id"]], **row}
