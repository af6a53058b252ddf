"""Submit, list and read jobs."""

from __future__ import annotations

from datetime import datetime

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import resolve_owner, resolve_teams
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_json_body, run_off_loop
from jobledger.api.http.validation import parse_query
from jobledger.api.idempotency import RequestFingerprint
from jobledger.api.job_documents import (
    build_job_list_response,
    find_paused_batches,
    get_now,
    load_time_as_of,
    render_job,
    render_jobs,
)
from jobledger.api.openapi.operation import Operation
from jobledger.api.processes.parameter_validator import ParameterCheck
from jobledger.api.resources import JOB, build_conditional_response, load_for_read, translate_damaged_events
from jobledger.api.schemas.jobs import JobAcceptedResponse, JobBody, JobListQuery, JobListResponse, JobResponse
from jobledger.api.schemas.request_models import AsOfQuery
from jobledger.api.submission import recording
from jobledger.api.submission.builder import build_job_submitted, check_parameters
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.engine.as_of import build_as_of_filter
from jobledger.projections.views import batches
from jobledger.projections.views import jobs as jobs_view
from jobledger.projections.views.documents import fold_events


@Operation(
    "POST",
    "/api/events/jobs",
    response=JobAcceptedResponse,
    status=202,
    body=JobBody,
    error_codes=("unknown_job_type", "job_type_unavailable", "validation_timeout", "insufficient_storage"),
    request_headers=("Prefer",),
    response_headers=("Location",),
)
async def submit_job(request: Request) -> Response:
    """Submit a job."""
    submission = await _submit(request)
    job = await recording.load_submitted(request, JOB, submission)
    [rendered] = await render_jobs(request, [job])
    return recording.build_accepted_response(request, JOB, submission, job["position"], {"job": rendered})


async def _submit(request: Request) -> recording.Submission:
    """Validate the request body and submit its job, unless the same request has submitted it before.

    Raises:
        ApiError: 422, the content is invalid; 503, 507, the job cannot be accepted now.
    """
    ctx = get_api_context(request)
    body, content = await read_json_body(request, JobBody)
    fingerprint = await run_off_loop(request, RequestFingerprint.from_request, request, content)
    job_id = recording.create_id("job", fingerprint)
    if (earlier := await recording.find_earlier_submission(request, JOB, job_id, fingerprint)) is not None:
        return earlier
    user_id = resolve_owner(request, body.user_id)
    teams = resolve_teams(request, user_id, ctx.get_groups)
    job, secrets = build_job_submitted(body, ctx, user_id=user_id, teams=teams)
    model = ctx.job_types[body.job_type]
    await check_parameters(request, [ParameterCheck(body.job_type, model, body.parameters, ("parameters",))])
    return await recording.record_submission(request, JOB, {job_id: job}, [secrets] if secrets else [], fingerprint)


@Operation("GET", "/api/events/jobs", response=JobListResponse, query=JobListQuery, is_from_views=True)
async def list_jobs(request: Request) -> Response:
    """List jobs."""
    return await build_job_list_response(request, parse_query(request, JobListQuery))


@Operation(
    "GET",
    "/api/events/jobs/{job_id}",
    response=JobResponse,
    query=AsOfQuery,
    is_from_views=True,
    request_headers=("Prefer",),
    is_conditional=True,
)
async def get_job(request: Request) -> Response:
    """Read a job."""
    job, viewer, as_of = await load_for_read(request, JOB)
    if as_of is None:
        paused, now = await find_paused_batches(request, [job]), get_now(request)
    else:
        job = await _load_as_of(request, job["job_id"], as_of)
        paused, now = await _find_paused_batch_as_of(request, job, as_of), await load_time_as_of(request, as_of)
    return build_conditional_response(request, "job", render_job(request, job, viewer, paused, now))


async def _load_as_of(request: Request, job_id: str, as_of: int | datetime) -> Document:
    """Return the job at a position of the log or at a time.

    Raises:
        ApiError: 404, it did not exist; 409, its events are damaged.
    """
    events = await get_api_context(request).event_store.read_stream(job_id)
    with translate_damaged_events(job_id):
        job = fold_events(jobs_view.fold, filter(build_as_of_filter(as_of), events))
    if job is None:
        raise JOB.build_not_found_error(job_id, "did not exist at that time")
    return job


async def _find_paused_batch_as_of(request: Request, job: Document, as_of: int | datetime) -> set[str]:
    """Return the batch of a pending job if it was paused at a position of the log or at a time."""
    batch_id = job["batch_id"]
    if job["status"] != "pending" or batch_id is None:
        return set()
    events = await get_api_context(request).event_store.read_stream(batch_id)
    batch = fold_events(batches.fold, filter(build_as_of_filter(as_of), events))
    return {batch_id} if batch is not None and batch["paused"] else set()
