"""Job documents in responses: redacted for the caller, single or as a page of a list."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from datetime import datetime

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import check_filters, get_principal, get_viewer
from jobledger.api.auth.redaction import JOB_FIELD_RULES, Viewer, redact_document
from jobledger.api.context import get_api_context
from jobledger.api.ledger_position import wait_for_requested_position
from jobledger.api.pagination import ListTotal, build_list_response, count_total
from jobledger.api.schemas.jobs import JobListQuery
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import batches, job_list, statistics
from jobledger.projections.views.files import prefix_result_urls
from jobledger.projections.views.list_index import ListQuery
from jobledger.projections.views.waiting import derive_waiting_for, load_waiting_state


async def build_job_list_response(request: Request, query: JobListQuery) -> Response:
    """Return the page of jobs that a query asks for.

    Raises:
        ApiError: As `build_job_query`.
    """
    db_query = await build_job_query(request, query)
    views = get_api_context(request).views
    jobs, next_page = await job_list.find_page(views, db_query, query.page_request, include=query.include or ())
    rendered, total = await render_jobs(request, jobs), await _count_jobs(request, query, db_query)
    return build_list_response("jobs", rendered, next_page, total)


async def build_job_query(request: Request, job_filter: job_list.JobFilter) -> ListQuery:
    """Wait for the position that the request requires, and return the query for the jobs that match its filters.

    Raises:
        ApiError: 403, a filter compares a field that is hidden from the caller.
    """
    principal, views = get_principal(request), get_api_context(request).views
    filters = job_filter.model_dump(include={*job_list.JobFilter.model_fields})
    check_filters(filters, JOB_FIELD_RULES, has_full_access=principal.is_admin, required="the role `admin`")
    await wait_for_requested_position(request)
    waiting = None if job_filter.waiting_for is None else await load_waiting_state(views, get_now(request))
    return job_filter.build_query(principal, waiting=waiting)


async def _count_jobs(request: Request, job_filter: job_list.JobFilter, db_query: ListQuery) -> ListTotal:
    """Return how many jobs match: from a counter of the views if it has this number, otherwise counted."""
    views = get_api_context(request).views
    if get_principal(request).is_admin:
        filters = job_filter.model_dump(include={*job_list.JobFilter.model_fields}, exclude_none=True)
        status, batch_id, track = job_filter.status, job_filter.batch_id, job_filter.track
        if filters.keys() <= {"status", "track"}:
            return ListTotal(await statistics.count_jobs(views, status=status, track=track))
        if batch_id is not None and filters.keys() <= {"status", "batch_id"}:
            return ListTotal(await batches.count_jobs(views, batch_id, status=status))
    return await count_total(views, db_query)


async def render_jobs(request: Request, jobs: Sequence[Document]) -> list[Document]:
    """Return jobs as the caller may see them."""
    paused, now = await find_paused_batches(request, jobs), get_now(request)
    return [render_job(request, job, get_viewer(request, job), paused, now) for job in jobs]


def render_job(
    request: Request, job: Document, viewer: Viewer, paused_batches: Collection[str], now: datetime
) -> Document:
    """Return a job as `viewer` may see it.

    It is `paused` if it is pending and its batch is in `paused_batches`. At `now`, it may wait for its start time.
    """
    document = redact_document(job, JOB_FIELD_RULES, viewer)
    if results := document.get("results"):
        document["results"] = prefix_result_urls(get_api_context(request).signed_links.path_prefix, results)
    waiting_for = derive_waiting_for(job, is_batch_paused=job["batch_id"] in paused_batches, now=now)
    return {**document, "paused": waiting_for == "batch_paused", "waiting_for": waiting_for}


def get_now(request: Request) -> datetime:
    """Return the time by the server's clock."""
    return get_api_context(request).event_store.clock.estimate()


async def find_paused_batches(request: Request, jobs: Sequence[Document]) -> set[str]:
    """Return the paused ones among the batches of pending jobs."""
    batch_ids = {job["batch_id"] for job in jobs if job["status"] == "pending"} - {None}
    return await batches.find_paused(get_api_context(request).views, batch_ids) if batch_ids else set()


async def load_time_as_of(request: Request, as_of: int | datetime) -> datetime:
    """Return the time of a point of the log: for a position, that of its event, and for one in the future, now."""
    now = get_now(request)
    if isinstance(as_of, datetime):
        return min(as_of, now)
    events = await get_api_context(request).event_store.read(after=max(0, as_of - 1), limit=1)
    return events[0].time if events else now
