"""projections: the view `step_files`: which files the finished steps of a job name, by digest.

A job that is tried again, or restarted, uses them again: so they are not removed from the store while the job is there.
So are the files of results that are too large for the job's document.
"""

from __future__ import annotations

from typing import Final

from pymongo import ASCENDING, IndexModel

from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import files
from jobledger.projections.views.jobs import MAX_STEP_FILES

NAME: Final = files.STEP_FILES_VIEW
INDEXES: Final = [IndexModel([("sha256", ASCENDING)])]


def rows(job: Document) -> list[Document]:
    """Return one row for each file that a finished step of the job names."""
    digests = job.get("step_files", ())
    if not digests:
        return []
    kept = [*digests[:MAX_STEP_FILES], files.UNTRACKED_FILES] if len(digests) > MAX_STEP_FILES else digests
    return [{"_id": f"{job['job_id']}:{sha256}", "sha256": sha256, "job_id": job["job_id"]} for sha256 in kept]
