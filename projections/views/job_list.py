"""View `job_list`: one row for each job, with its list keys. Also the lists of jobs: their filters and pages.

The status of a job changes several times. In the documents of jobs its list keys would be expensive: the server would
compare the keys of all indexes of a large document. A row is small, and only the keys of the status are replaced.

A list reads the rows of a page and then the documents of these jobs. A search reads the documents by their search keys.
A list omits a field that is large unless the caller includes it. The field `omitted` of a job names these fields.

Fields of a row:
    created_at, archived, due_at: Those of the job.
    list_keys: First the keys of the status, then those of the other facets (projections/views/list_index.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Collection, Mapping, Sequence
from dataclasses import replace
from datetime import datetime
from typing import Any, Final

import bson
from pydantic import BaseModel, ConfigDict

from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.statuses import JobStatus, WaitingFor
from jobledger.ledger.mongo.connection import LENIENT_CODEC, Document, translate_errors
from jobledger.projections.slots import Views
from jobledger.projections.views import jobs, list_index, paging, projection_errors
from jobledger.projections.views.list_index import ListQuery
from jobledger.projections.views.paging import MAX_LISTED_FIELD_BYTES, OMITTED, PageCursor, PageRequest
from jobledger.projections.views.waiting import STATUS_FACETS, WaitingState

NAME: Final = "job_list"
INDEXES: Final = [list_index.LIST_INDEX]
OMITTABLE_FIELDS: Final = ("parameters", "results", "error", "logs", "steps")
"""The fields that lists omit if they are large."""
_FIELDS: Final = (
    *("_id", "job_id", "job_type", "job_name", "status", "created_at", "updated_at", "started_at", "completed_at"),
    *("parameters", "webhook", "batch_id", "progress", "results", "error", "logs", "worker_id", "attempt", "retries"),
    *("max_attempts", "timeout_s", "priority", "due_at", "due_reason", "user_id", "access_control", "teams"),
    *("cancel_requested", "archived", "steps", "version", "position", "truncated", projection_errors.ERROR_FIELD),
)
"""The fields of a job in a list: all fields from which the API builds a single job."""
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
_FACET_FIELDS: Final = {
    "batch": "batch_id",
    "error": "error.code",
    "event": "parameters.event",
    "track": "parameters.track",
    "day": "parameters.day",
    "user": "user_id",
    "language": "parameters.target_language",
    "type": "job_type",
}
"""The fields of a job's document that contain the values of its facets, except that of the status."""
_JOBS_PER_QUERY: Final = 100
_LARGE_JOBS_PER_QUERY: Final = 4
"""If a list includes large fields, a job may have 12 MB."""
_RUNNING_JOBS_PER_QUERY: Final = 1000
_UNRESTRICTED: Final = Principal(None, roles=frozenset({"admin"}))


# Rows ---------------------------------------------------------------------------------------------------------------


def build_row(job: Document) -> Document:
    """Return the row of a job."""
    return {
        "_id": job["job_id"],
        "created_at": job["created_at"],
        "archived": job["archived"],
        "due_at": job["due_at"],
        "list_keys": list_index.build_list_keys(list_index.get_document_scopes(job), jobs.build_facets(job)),
    }


def needs_new_row(before: Document | None, after: Document) -> bool:
    """Return whether a change of a job's document changes more of its row than the keys of the status.

    The row of a job with many scopes is replaced in any case: some scopes may have no keys.
    """
    return (
        before is None
        or after["search_keys"] is not before["search_keys"]  # they are built again if a facet or the access changes
        or after["archived"] != before["archived"]
        or (has_new_status(before, after) and not list_index.lists_all_scopes(after))
    )


def has_new_status(before: Document, after: Document) -> bool:
    """Return whether a change of a job's document changes what its row has of the status."""
    return any(after[name] != before[name] for name in ("status", "due_at", "due_reason"))


def build_status_changes(job: Document) -> Document:
    """Return the fields of a job's row to set after a change of its status."""
    scopes = list_index.get_document_scopes(job)
    keys = list_index.build_list_keys(scopes, [("status", jobs.get_status_facet(job))])
    return {"due_at": job["due_at"], **{f"list_keys.{number}": key for number, key in enumerate(keys)}}


# Queries ------------------------------------------------------------------------------------------------------------


class JobFilter(BaseModel):
    """Filters of a list of jobs; None matches any value.

    Attributes:
        waiting_for: What the pending job waits for.
        q: All words of this text must be in the name, ID, session, event, track, file name or speakers of the job.
        id_prefix: The beginning of the ID. It must be long enough that few IDs begin with it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    status: JobStatus | None = None
    waiting_for: WaitingFor | None = None
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
    id_prefix: str | None = None

    def build_query(self, principal: Principal, *, waiting: WaitingState | None = None) -> ListQuery:
        """Return the query for the matching jobs that a principal may see.

        Args:
            principal: Who lists the jobs.
            waiting: From `load_waiting_state`. The filter `waiting_for` requires it.
        """
        facets: dict[str, str | Sequence[str] | None] = {
            "batch": self.batch_id,
            "error": self.error_code,
            "event": self.event,
            "track": self.track,
            "day": self.day,
            "user": self.user_id,
            "language": self.language,
            "type": self.job_type,
        }
        conditions: Document = {"archived": self.archived}
        fields: Document = {_FACET_FIELDS[facet]: value for facet, value in facets.items()}
        fields |= {**conditions, "status": self.status}
        facets["status"] = STATUS_FACETS["worker"] if self.status == "pending" else self.status
        if self.waiting_for is not None:
            if waiting is None:
                raise ValueError("the filter `waiting_for` requires the state of `load_waiting_state`")
            is_possible = self.status in (None, "pending")
            facets["status"] = STATUS_FACETS[self.waiting_for] if is_possible else ()
            conditions |= waiting.build_row_conditions(self.waiting_for)
            fields |= waiting.build_job_conditions(self.waiting_for)
            fields["status"] = "pending" if is_possible else {"$in": []}
        period = {"created_after": self.created_after, "created_before": self.created_before}
        if words := list_index.split_words(self.q or ""):
            found = list_index.build_search(jobs.NAME, principal, words, conditions=fields, **period)
        else:
            found = list_index.build_query(
                NAME,
                principal,
                facets,
                owner=self.user_id,
                conditions=conditions,
                document_conditions=fields,
                **period,
            )
        return found.with_id_prefix(self.id_prefix)


async def find_page(
    views: Views, query: ListQuery, request: PageRequest, *, include: Collection[str] = ()
) -> tuple[list[Document], PageCursor | None]:
    """Return a page of jobs and the cursor of the next one; see `paging.find_page`.

    The fields of `OMITTABLE_FIELDS` that are in `include` are returned however large they are.
    """
    projection = _build_projection(include)
    if query.is_search:
        page, next_cursor = await paging.find_page(views, query, request, projection=projection)
    else:
        page, next_cursor = await _find_page_by_rows(views, query, request, projection, has_large_fields=bool(include))
    return [_mark_omitted(job) for job in page], next_cursor


async def find_ids(views: Views, query: ListQuery, request: PageRequest) -> tuple[list[str], PageCursor | None]:
    """Return the IDs of a page of jobs, and the cursor of the next one. The jobs may have changed since."""
    page, next_cursor = await paging.find_page(views, query, request, projection={"created_at": 1})
    return [row["_id"] for row in page], next_cursor


async def _find_page_by_rows(
    views: Views, query: ListQuery, request: PageRequest, projection: Document, *, has_large_fields: bool
) -> tuple[list[Document], PageCursor | None]:
    """Read the rows of a page, then their jobs, until the page has a job or the list ends."""
    while True:
        rows, next_cursor = await paging.find_page(views, query, request, projection={"created_at": 1})
        page: list[Document] = []
        used_bytes = 0
        job_ids = [row["_id"] for row in rows]
        async for job, size in _iter_jobs(views, query, job_ids, projection, has_large_fields=has_large_fields):
            used_bytes += size
            if page and used_bytes > request.max_bytes:
                return page, PageCursor(page[-1]["created_at"], page[-1]["_id"])
            page.append(job)
        if page or next_cursor is None:
            return page, next_cursor
        request = replace(request, after=next_cursor, skip=0)


async def _iter_jobs(
    views: Views, query: ListQuery, job_ids: Sequence[str], projection: Mapping[str, Any], *, has_large_fields: bool
) -> AsyncIterator[tuple[Document, int]]:
    """Yield the documents of jobs and their sizes in bytes of BSON, in the order of the IDs.

    A job may have changed after its row was read. It is left out if its status, access or another facet no longer
    matches.
    """
    collection = views[jobs.NAME].with_options(codec_options=paging.RAW)
    jobs_per_query = _LARGE_JOBS_PER_QUERY if has_large_fields else _JOBS_PER_QUERY
    for begin in range(0, len(job_ids), jobs_per_query):
        ids = job_ids[begin : begin + jobs_per_query]
        with translate_errors("listing jobs"):
            found = collection.find({"_id": {"$in": ids}, **query.document_filter}, projection)
            encoded = {document["_id"]: document.raw async for document in found}
        for raw in (encoded[job_id] for job_id in ids if job_id in encoded):
            job = bson.decode(raw, codec_options=LENIENT_CODEC)
            if not query.scopes.isdisjoint(list_index.get_document_scopes(job)):
                yield job, len(raw)


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


# Running jobs -------------------------------------------------------------------------------------------------------


async def find_jobs_of_worker(views: Views, worker_id: str) -> Sequence[Document]:
    """Return `_id` and `attempt` of the jobs that a worker is running according to the views."""
    with translate_errors("finding a worker's jobs"):
        running = [job async for job in _iter_running(views, ("attempt", "worker_id"))]
    return [job for job in running if job.pop("worker_id") == worker_id]


async def find_running_jobs(views: Views) -> Sequence[Document]:
    """Return `_id`, `worker_id` and `job_type` of the running jobs according to the views."""
    with translate_errors("finding running jobs"):
        return [job async for job in _iter_running(views, ("worker_id", "job_type"))]


async def find_oldest_running_started_at(views: Views) -> datetime | None:
    """Return the earliest start time of the running jobs in the views, or None."""
    with translate_errors("finding the oldest running job"):
        started = [job["started_at"] async for job in _iter_running(views, ("started_at",))]
    return min((time for time in started if time is not None), default=None)


async def count_running_by_worker(views: Views) -> Counter[str]:
    """Return the number of running jobs of each worker that runs any, according to the views."""
    return Counter(job["worker_id"] for job in await find_running_jobs(views))


def _build_status_query(status: JobStatus) -> ListQuery:
    return JobFilter(status=status).build_query(_UNRESTRICTED)


async def _iter_running(views: Views, fields: Sequence[str]) -> AsyncIterator[Document]:
    """Yield `_id` and some fields of the running jobs. There are few: at most as many as slots."""
    query = _build_status_query("processing")
    rows = await views[NAME].find(query.filter, {"_id": 1}, hint=query.hint).to_list()
    for begin in range(0, len(rows), _RUNNING_JOBS_PER_QUERY):
        ids = [row["_id"] for row in rows[begin : begin + _RUNNING_JOBS_PER_QUERY]]
        async for job in views[jobs.NAME].find({"_id": {"$in": ids}, "status": "processing"}, dict.fromkeys(fields, 1)):
            yield job
