"""Build the events of a batch's jobs, and limit how much one request makes the server write."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request

from jobledger.api.auth.permissions import resolve_owner, resolve_teams
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import MAX_VALUES, estimate_value_count, mark_large_body, run_off_loop
from jobledger.api.http.errors import ApiError, build_validation_error
from jobledger.api.http.validation import validate_content
from jobledger.api.schemas.batches import BatchBody
from jobledger.api.schemas.jobs import JobBody
from jobledger.api.submission.builder import (
    WebhookSecrets,
    build_job_submitted,
    check_no_userinfo,
    check_parameters,
)
from jobledger.api.submission.parameters import ParameterCheck
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.canonical_json import canonical_json
from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.domain.events import AccessControl, JobSubmitted
from jobledger.projections.views import list_index


async def build_batch_jobs(
    request: Request, body: BatchBody, batch_id: str, user_id: str
) -> tuple[list[JobSubmitted], list[WebhookSecrets]]:
    """Return the events of a batch's jobs, and the secrets of their webhooks.

    Raises:
        ApiError: 422, naming each invalid field of the first job with any; 413, the defaults or the access lists are
            too large for the number of jobs.
    """
    _check_expanded_defaults(request, body)
    jobs, secrets = await run_off_loop(request, _build_jobs, request, body, batch_id, user_id)
    index_sizes = (estimate_list_index_bytes(job.user_id, job.access_control, job.teams) for job in jobs)
    await run_off_loop(request, check_list_index_size, index_sizes)
    job_types = get_api_context(request).job_types
    checks = [
        ParameterCheck(job.job_type, job_types[job.job_type], job.parameters, ("jobs", index, "parameters"))
        for index, job in enumerate(jobs)
    ]
    await check_parameters(request, checks)
    # Check the defaults, too: jobs may override all of them, but the batch is stored and shown with them.
    await run_off_loop(request, check_no_userinfo, body.parameters, ("parameters",))
    return jobs, secrets


def _build_jobs(
    request: Request, body: BatchBody, batch_id: str, user_id: str
) -> tuple[list[JobSubmitted], list[WebhookSecrets]]:
    ctx = get_api_context(request)
    teams = resolve_teams(request, user_id, ctx.get_groups)
    jobs: list[JobSubmitted] = []
    all_secrets: list[WebhookSecrets] = []
    for index, content in enumerate(body.jobs):
        job_body = validate_content(JobBody, content, within=("jobs", index))
        owner = user_id if job_body.user_id is None else resolve_owner(request, job_body.user_id)
        inherited: dict[str, Any] = {"parameters": {**body.parameters, **job_body.parameters}}
        if "access_control" not in job_body.model_fields_set:
            inherited["access_control"] = body.access_control
        job, secrets = build_job_submitted(
            job_body.model_copy(update=inherited),
            ctx,
            user_id=owner,
            teams=teams if owner == user_id else resolve_teams(request, owner, ctx.get_groups),
            within=("jobs", index),
            batch_id=batch_id,
        )
        jobs.append(job)
        all_secrets += [secrets] if secrets is not None else []
    return jobs, all_secrets


def _check_expanded_defaults(request: Request, body: BatchBody) -> None:
    """Reject defaults that would make gigabytes of events, because each job's event repeats them.

    Raises:
        ApiError: 413.
    """
    inheriting = sum(1 for job in body.jobs if not (isinstance(job, dict) and "access_control" in job))
    check_expanded_size(request, "parameters", body.parameters, len(body.jobs))
    check_expanded_size(request, "access_control", body.access_control, inheriting)


def check_expanded_size(request: Request, field: str, value: Any, repetitions: int) -> None:
    """Check that a field that is written once per job stays within the limits of a request body.

    Raises:
        ApiError: 413.
    """
    text = bytearray(to_json(value))
    size, limit = len(text) * repetitions, get_api_context(request).max_body_bytes
    if size > limit:
        message = (
            f"`{field}` is written once for each job: {size} bytes together, at most {limit} are allowed "
            "(api.max_body_bytes). Use a smaller value or smaller batches."
        )
        raise ApiError(413, "content_too_large", message)
    values = estimate_value_count(text, repetitions)[0] * repetitions
    if values > MAX_VALUES:
        message = (
            f"`{field}` is written once for each job: about {values} values together, at most {MAX_VALUES} are "
            "allowed. Use a smaller value or smaller batches."
        )
        raise ApiError(413, "too_many_values", message)
    mark_large_body(request, size, values)


def estimate_list_index_bytes(user_id: str, access: AccessControl, teams: Sequence[str]) -> int:
    """Return the maximum size of the list index of one job."""
    return list_index.max_list_index_bytes({"user_id": user_id, "access_control": access.model_dump(), "teams": teams})


def check_list_index_size(sizes: Iterable[int]) -> None:
    """Reject access lists that would make gigabytes of list index, because each name adds rows for each job.

    `sizes` are the sizes of the jobs' list indexes in bytes.

    Raises:
        ApiError: 413.
    """
    for size in accumulate(sizes):
        if size > limits.MAX_BATCH_LIST_INDEX_BYTES:
            message = (
                f"`access_control` and teams of the batch's jobs: the list index takes {size} bytes or more, at most "
                f"{limits.MAX_BATCH_LIST_INDEX_BYTES} are allowed. Use fewer names, fewer groups, or smaller batches."
            )
            raise ApiError(413, "content_too_large", message)


def check_storable(jobs: Sequence[JobSubmitted]) -> None:
    """Find the first job with content that the event store rejects: its error does not have the job's index.

    Raises:
        ApiError: 422.
    """
    for index, job in enumerate(jobs):
        location: tuple[str | int, ...] = ("jobs", index, "parameters")
        try:
            size = len(canonical_json(job.parameters))
            location = ("jobs", index)
            limits.check_event(job, size)
        except InvalidEvent as error:
            raise build_validation_error([{"loc": location, "msg": str(error)}]) from error
