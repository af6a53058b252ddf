"""Submit, list and read batches."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextlib import aclosing
from datetime import datetime
from operator import attrgetter
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api import bulk_commands
from jobledger.api.auth.permissions import check_filters, get_principal, get_viewer, resolve_owner, resolve_teams
from jobledger.api.auth.redaction import BATCH_FIELD_RULES, Viewer, redact_document
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_json_body, run_off_loop
from jobledger.api.http.validation import parse_query
from jobledger.api.idempotency import RequestFingerprint
from jobledger.api.job_documents import build_job_list_response, get_now, load_time_as_of
from jobledger.api.ledger_position import wait_for_requested_position
from jobledger.api.openapi.operation import Operation
from jobledger.api.pagination import ListTotal, build_list_response, count_total
from jobledger.api.resources import (
    BATCH,
    build_conditional_response,
    load_for_read,
    load_or_404,
    translate_damaged_events,
)
from jobledger.api.schemas.batches import (
    BatchAcceptedResponse,
    BatchBody,
    BatchListQuery,
    BatchListResponse,
    BatchResponse,
)
from jobledger.api.schemas.jobs import JobListQuery, JobListResponse
from jobledger.api.schemas.request_models import AsOfQuery, PageQuery
from jobledger.api.submission import recording
from jobledger.api.submission.builder import build_batch_jobs, check_storable, extract_webhook_secrets
from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.domain.events import (
    AccessControl,
    BatchSubmitted,
    JobLogged,
    JobProgressed,
    JobSubmitted,
    StepCompleted,
)
from jobledger.ledger.domain.statuses import WaitingFor
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.event_store import override_payload_fields
from jobledger.projections.engine.as_of import build_as_of_filter
from jobledger.projections.engine.view_changes import ViewChanges
from jobledger.projections.views import batches as batches_view
from jobledger.projections.views import statistics
from jobledger.projections.views.waiting import count_jobs, count_jobs_of_batches

_RUNNING_JOB_EVENTS: Final = frozenset(event_type.__name__ for event_type in (JobProgressed, JobLogged, StepCompleted))
"""Events of a running job that do not affect its batch."""
_COSTS: Final = {
    "metadata": {name: f"$data.results.metadata.{name}" for name in ("processed_at", "duration", "tokens_used")}
}
_BATCH_PAYLOAD: Final = override_payload_fields(
    {
        "parameters": {},
        "access_control": {},
        "teams": [],
        "webhook": None,
        "results": {"$cond": [{"$eq": [{"$type": "$data.results"}, "object"]}, _COSTS, "$data.results"]},
        "error": {
            "$cond": [
                {"$eq": [{"$type": "$data.error"}, "object"]},
                {"code": "$data.error.code", "message": ""},
                "$data.error",
            ]
        },
    }
)
"""An aggregation expression that keeps only what the batch shows of a job event's payload."""
_EVENTS_PER_YIELD: Final = 100


@Operation(
    "POST",
    "/api/events/batches",
    response=BatchAcceptedResponse,
    status=202,
    body=BatchBody,
    error_codes=("unknown_job_type", "job_type_unavailable", "validation_timeout", "insufficient_storage"),
    request_headers=("Prefer",),
    response_headers=("Location",),
)
async def submit_batch(request: Request) -> Response:
    """Submit a batch of jobs atomically."""
    submission = await _submit(request)
    batch = await recording.load_submitted(request, BATCH, submission)
    waiting = count_jobs([], is_batch_paused=False, now=get_now(request)) | {"worker": batch["pending_jobs"]}
    rendered = _render(batch, get_viewer(request, batch), waiting)
    content = {"job_ids": batch["job_ids"], "batch": rendered}
    return recording.build_accepted_response(request, BATCH, submission, batch["position"], content)


async def _submit(request: Request) -> recording.Submission:
    """Validate the request body and submit its batch, unless the same request has submitted it before.

    Raises:
        ApiError: 413, 422, the content is invalid; 503, 507, the batch cannot be accepted now.
    """
    ctx = get_api_context(request)
    body, content = await read_json_body(request, BatchBody)
    fingerprint = await run_off_loop(request, RequestFingerprint.from_request, request, content)
    batch_id = recording.create_id("batch", fingerprint)
    if (earlier := await recording.find_earlier_submission(request, BATCH, batch_id, fingerprint)) is not None:
        return earlier
    webhook, batch_secrets = extract_webhook_secrets(body.webhook, ctx)
    user_id = resolve_owner(request, body.user_id)
    jobs, secrets = await build_batch_jobs(request, body, batch_id, user_id)
    secrets += [batch_secrets] if batch_secrets else []
    job_ids = [recording.create_id("job", fingerprint, number) for number in range(1, len(jobs) + 1)]
    batch = BatchSubmitted(
        batch_name=body.batch_name,
        total_jobs=len(jobs),
        job_ids=job_ids,
        parameters=body.parameters,
        webhook=webhook,
        user_id=user_id,
        access_control=AccessControl(**body.access_control.model_dump()),
        teams=sorted(resolve_teams(request, user_id, ctx.get_groups)),
    )
    first_events: dict[str, BatchSubmitted | JobSubmitted] = {batch_id: batch, **dict(zip(job_ids, jobs, strict=True))}
    try:
        return await recording.record_submission(request, BATCH, first_events, secrets, fingerprint)
    except InvalidEvent:
        await run_off_loop(request, check_storable, jobs)
        raise


@Operation("GET", "/api/events/batches", response=BatchListResponse, query=BatchListQuery, is_from_views=True)
async def list_batches(request: Request) -> Response:
    """List batches."""
    await wait_for_requested_position(request)
    ctx, principal, query = get_api_context(request), get_principal(request), parse_query(request, BatchListQuery)
    filters = query.model_dump(exclude=set(PageQuery.model_fields), exclude_none=True)
    check_filters(filters, BATCH_FIELD_RULES, has_full_access=principal.is_admin, required="the role `admin`")
    db_query = batches_view.build_query(principal, **filters)
    batches, next_page = await batches_view.find_page(ctx.views, db_query, query.page_request)
    waiting = await count_jobs_of_batches(ctx.views, batches, get_now(request))
    rendered = [_render(batch, get_viewer(request, batch), waiting[batch["_id"]]) for batch in batches]
    if principal.is_admin and not filters:
        total = ListTotal(await statistics.count_batches(ctx.views))
    else:
        total = await count_total(ctx.views, db_query)
    return build_list_response("batches", rendered, next_page, total)


@Operation(
    "GET",
    "/api/events/batches/{batch_id}",
    response=BatchResponse,
    query=AsOfQuery,
    is_from_views=True,
    request_headers=("Prefer",),
    is_conditional=True,
)
async def get_batch(request: Request) -> Response:
    """Read a batch."""
    batch, viewer, as_of = await load_for_read(request, BATCH)
    if as_of is not None:
        batch, waiting = await _load_as_of(request, batch["batch_id"], as_of)
    else:
        waiting = (await count_jobs_of_batches(get_api_context(request).views, [batch], get_now(request)))[batch["_id"]]
    return build_conditional_response(request, "batch", _render(batch, viewer, waiting))


def _render(batch: Document, viewer: Viewer, waiting: Mapping[WaitingFor, int]) -> Document:
    """Return a batch as `viewer` may see it, with the number of its jobs by what they wait for."""
    return {**redact_document(batch, BATCH_FIELD_RULES, viewer), "waiting_for": waiting}


async def _load_as_of(
    request: Request, batch_id: str, as_of: int | datetime
) -> tuple[Document, Mapping[WaitingFor, int]]:
    """Return the batch at a position of the log or at a time, folded as the projector does it, and what its jobs wait
    for.

    Raises:
        ApiError: 404, it did not exist; 409, its events are damaged.
    """
    event_store = get_api_context(request).event_store
    with translate_damaged_events(batch_id):
        events = await event_store.read_stream(batch_id)
        job_ids = events[0].data["job_ids"]
        for start in range(0, len(job_ids), bulk_commands.JOBS_PER_CHUNK):
            async with aclosing(
                event_store.iterate_stream_batches(
                    job_ids[start : start + bulk_commands.JOBS_PER_CHUNK],
                    exclude_types=_RUNNING_JOB_EVENTS,
                    data_expression=_BATCH_PAYLOAD,
                )
            ) as parts:
                async for job_events in parts:
                    events += job_events
        changes = ViewChanges()
        for number, event in enumerate(sorted(filter(build_as_of_filter(as_of), events), key=attrgetter("position"))):
            changes.apply(event)
            if number % _EVENTS_PER_YIELD == 0:  # lets other requests run
                await asyncio.sleep(0)
        batch = changes.get("batches", batch_id)
    if batch is None:
        raise BATCH.build_not_found_error(batch_id, "did not exist at that time")
    jobs = filter(None, changes.current["jobs"].values())
    now = await load_time_as_of(request, as_of)
    return batch, count_jobs(jobs, is_batch_paused=batch["paused"], now=now)


@Operation(
    "GET", "/api/events/batches/{batch_id}/jobs", response=JobListResponse, query=JobListQuery, is_from_views=True
)
async def list_batch_jobs(request: Request) -> Response:
    """List the jobs of a batch."""
    query = parse_query(request, JobListQuery)
    batch = await load_or_404(request, BATCH)
    return await build_job_list_response(request, query.model_copy(update={"batch_id": batch["batch_id"]}))
