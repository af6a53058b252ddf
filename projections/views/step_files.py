"""View `step_files`: the result files that a job needs and its document may not name, by digest.

These are the files that the completed steps name: a job that is retried or restarted uses them again. If the results
are too large for the job's document, their files are in this view as well. All of them stay in the result store as long
as the job exists.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import orjson
from pymongo import ASCENDING, IndexModel

from jobledger.ledger.domain.events import StepCompleted
from jobledger.ledger.domain.result_files import find_step_files, is_sha256
from jobledger.ledger.mongo.connection import Document

NAME: Final = "step_files"
INDEXES: Final = [IndexModel([("sha256", ASCENDING)])]
UNTRACKED_FILES: Final = "*"
"""Takes the place of a digest in the row of a job with more than `MAX_STEP_FILES` files."""
MAX_STEP_FILES: Final = 10_000
"""Maximum number of tracked files per job. If a job has more, no file of any job is deleted: see `doctor`."""


def add_step_digests(job: Document, step: StepCompleted) -> Document:
    """Return the field `step_files` of a job with the files of a completed step, or nothing if it names no new file."""
    if not step.files and b'"sha256"' not in orjson.dumps(step.output, default=str, option=orjson.OPT_NON_STR_KEYS):
        return {}
    return add_digests(job, (file.sha256 for file in find_step_files(step)))


def add_digests(job: Document, digests: Iterable[str]) -> Document:
    """Return the field `step_files` of a job with more digests, or nothing if all of them are in it."""
    merged = dict.fromkeys(job.get("step_files", ()))
    before = len(merged)
    for digest in filter(is_sha256, digests):
        merged[digest] = None
        if len(merged) > MAX_STEP_FILES:
            break
    return {"step_files": list(merged)} if len(merged) > before else {}


def build_rows(job: Document) -> list[Document]:
    """Return one row for each file in the field `step_files` of a job."""
    digests = job.get("step_files", ())
    if not digests:
        return []
    tracked = [*digests[:MAX_STEP_FILES], UNTRACKED_FILES] if len(digests) > MAX_STEP_FILES else digests
    return [{"_id": f"{job['job_id']}:{sha256}", "sha256": sha256, "job_id": job["job_id"]} for sha256 in tracked]
