"""Lists of jobs: filters, pages, and the fields that lists leave out.

A list omits a field that is large unless the caller includes it. The field `omitted` of a job names these fields.
"""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime
from typing import Final

from pydantic import BaseModel, ConfigDict

from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.statuses import JobStatus
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.slots import Views
from jobledger.projections.views import jobs, list_index, paging, projection_errors
from jobledger.projections.views.paging import MAX_LISTED_FIELD_BYTES, OMITTED, PageCursor, PageRequest

OMITTABLE_FIELDS: Final = ("parameters", "results", "error", "logs", "steps")
"""The fields that lists omit if they are large."""
_FIELDS: Final = (
    *("_id", "job_id", "job_type", "job_name", "status", "created_at", "updated_at", "started_at", "completed_at"),
    *("parameters", "webhook", "batch_id", "progress", "results", "error", "logs", "worker_id", "attempt", "retries"),
    *("max_attempts", "timeout_s", "priority", "due_at", "user_id", "access_control", "teams", "cancel_requested"),
    *("archived", "steps", "version", "position", "truncated", projection_errors.ERROR_FIELD),
)
"""The fields of a job in a list: all fields that the API shows of a single job."""
_ESSENTIAL_RESULTS: Final = {
    "markdown_file": "$results.markdown_file",
    "markdown_url": "$results.markdown_url",
    "assets": [],
    "files": [],
    "metadata": {
        **{name: f"$results.metadata.{name}" for name in ("processed_at", "duration", "tokens_used")},
        "warnings": [],
        OMITTED: True,
    },
}
_EMPTY_VALUES: Final[Document] = {"parameters": {}, "error": None, "logs": [], "steps": []}


class JobFilter(BaseModel):
    """Filters of a list of jobs; None matches any value.

    Attributes:
        q: All words of this text must be in the name, ID, session, event, track, file name or speakers of the job.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: JobStatus | None = None
    batch_id: str | None = None
    user_id: str | None = None
    track: str | None = None
    event: str | None = None
    day: str | None = None
    language: str | None = None
    error_code: str | None = None
    job_type: str | None = None
    archived: bool | None = None
    created_after: datetime | None = None
    created_before: datetime | None = None
    q: str | None = None

    def build_query(self, principal: Principal) -> Document:
        """Return the database query for the matching jobs that a principal may see."""
        return list_index.build_query(
            principal,
            [
                ("batch", "batch_id", self.batch_id),
                ("error", "error.code", self.error_code),
                ("event", "parameters.event", self.event),
                ("track", "parameters.track", self.track),
                ("day", "parameters.day", self.day),
                ("user", "user_id", self.user_id),
                ("language", "parameters.target_language", self.language),
                ("type", "job_type", self.job_type),
            ],
            equal={"status": self.status, "archived": self.archived},
            search=self.q,
            created_after=self.created_after,
            created_before=self.created_before,
        )


async def find_page(
    views: Views, query: Document, request: PageRequest, *, include: Collection[str] = ()
) -> tuple[list[Document], PageCursor | None]:
    """Return a page of jobs and the cursor of the next one; see `paging.find_page`.

    The fields of `OMITTABLE_FIELDS` that are in `include` are returned however large they are.
    """
    projection = _build_projection(include)
    page, next_cursor = await paging.find_page(views, jobs.NAME, query, request, projection=projection)
    return [_mark_omitted(job) for job in page], next_cursor


def _build_projection(included: Collection[str]) -> Document:
    """Return the projection of a list, which replaces large fields."""
    projection: Document = dict.fromkeys(_FIELDS, 1)
    for name in OMITTABLE_FIELDS:
        if name not in included:
            replacement = _ESSENTIAL_RESULTS if name == "results" else OMITTED
            projection[name] = paging.omit_if_large(name, max_bytes=MAX_LISTED_FIELD_BYTES, replacement=replacement)
    return projection


def _mark_omitted(job: Document) -> Document:
    """Replace placeholders by empty values, and name these fields in `omitted`."""
    omitted = [name for name in _EMPTY_VALUES if job[name] == OMITTED]
    for name in omitted:
        job[name] = _EMPTY_VALUES[name]
    if job["results"] is not None and job["results"]["metadata"].pop(OMITTED, False):
        omitted.append("results")
    if omitted:
        job["omitted"] = omitted
    return job
