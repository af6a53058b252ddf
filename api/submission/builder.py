"""Build the events of submitted jobs and batches, keep secrets out of the log, and limit what one request writes."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import Any, Final

from bson import ObjectId
from pydantic_core import to_json
from starlette.requests import Request

from jobledger.api.auth.permissions import resolve_owner, resolve_teams
from jobledger.api.context import ApiContext, SubmissionDefaults, get_api_context
from jobledger.api.http.bodies import MAX_VALUES, estimate_value_count, mark_large_body, run_off_loop
from jobledger.api.http.errors import ApiError, build_validation_error, format_location
from jobledger.api.http.validation import validate_content
from jobledger.api.processes.parameter_validator import ParameterCheck
from jobledger.api.schemas.batches import BatchBody
from jobledger.api.schemas.jobs import JobBody
from jobledger.api.schemas.webhooks import WebhookBody
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.canonical_json import encode_canonical_json
from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.domain.events import AccessControl, JobSubmitted, Webhook
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.net.url_policy import USERINFO_MESSAGE, find_rejection_reason, find_userinfo
from jobledger.projections.views import list_index

Location = tuple[str | int, ...]
"""Where a value is in the request body, for error messages."""
_MAX_ERRORS_LISTED: Final = 100
_DEFAULTS: Final = SubmissionDefaults()


@dataclass(frozen=True, slots=True)
class WebhookSecrets:
    """The parts of a webhook that are stored outside the log: header values and the user's signing secrets."""

    secrets_ref: str
    headers: dict[str, str]
    signing: list[str]

    def to_document(self) -> Document:
        """Return the document of the collection `webhook_secrets`."""
        return {"_id": self.secrets_ref, "headers": self.headers, "secrets": self.signing}


def build_job_submitted(
    body: JobBody,
    ctx: ApiContext,
    *,
    user_id: str,
    teams: Collection[str],
    within: Location = (),
    batch_id: str | None = None,
) -> tuple[JobSubmitted, WebhookSecrets | None]:
    """Return the event for a valid body, and the secrets of its webhook.

    `check_parameters` must check the parameters separately.

    Args:
        user_id: The owner.
        teams: The owner's groups.
        within: The location of the body in the request.

    Raises:
        ApiError: 422, the job type is unknown, or the webhook's URL is not allowed; 503, the processor is installed but
            cannot be used.
    """
    path = format_location((*within, "job_type"))
    if (reason := ctx.unavailable_job_types.get(body.job_type)) is not None:
        message = f"{path}: job type {body.job_type!r} cannot be used on this server: {reason}"
        raise ApiError(503, "job_type_unavailable", message)
    if body.job_type not in ctx.job_types:
        message = f"unknown job type {body.job_type!r}, expected one of: {', '.join(sorted(ctx.job_types))}"
        details = {"errors": [{"path": path, "message": message}]}
        raise ApiError(422, "unknown_job_type", f"{path}: {message}", details=details)
    defaults = ctx.submission_defaults.get(body.job_type, _DEFAULTS)
    if not defaults.is_retried and (body.max_attempts or 1) > 1:
        message = f"must be 1, because jobs of type {body.job_type!r} are never retried, got {body.max_attempts}"
        raise build_validation_error([{"loc": ("max_attempts",), "msg": message}], within)
    webhook, secrets = extract_webhook_secrets(body.webhook, ctx, within)
    job = JobSubmitted(
        job_type=body.job_type,
        parameters=body.parameters,
        batch_id=batch_id,
        job_name=body.job_name,
        user_id=user_id,
        access_control=AccessControl(**body.access_control.model_dump()),
        teams=sorted(teams),
        webhook=webhook,
        priority=body.priority,
        not_before=body.not_before,
        max_attempts=defaults.max_attempts if body.max_attempts is None else body.max_attempts,
        timeout_s=defaults.timeout_s if body.timeout_s is None else body.timeout_s,
    )
    return job, secrets


async def check_parameters(request: Request, checks: Sequence[ParameterCheck]) -> None:
    """Validate parameters with the models of their job types.

    Raises:
        ApiError: 422, naming each invalid field of the first job with any; 503, a plug-in's validator takes too long.
    """
    await run_off_loop(request, _check_in_process, checks)
    await get_api_context(request).parameter_validator.check(check for check in checks if not check.is_trusted)


def _check_in_process(checks: Sequence[ParameterCheck]) -> None:
    for check in checks:
        check_no_userinfo(check.parameters, check.within)
    for check in checks:
        if check.is_trusted:
            validate_content(check.model, check.parameters, within=check.within)


def check_no_userinfo(parameters: Mapping[str, Any], within: Location) -> None:
    """Reject URLs with a user name or password anywhere in parameters, because results publish the parameters.

    Every text that is such a URL is rejected, because plug-ins also declare URLs as plain text.

    Raises:
        ApiError: 422.
    """
    locations = islice(find_userinfo(parameters, within), _MAX_ERRORS_LISTED)
    if errors := [{"loc": location, "msg": USERINFO_MESSAGE} for location in locations]:
        raise build_validation_error(errors, may_be_incomplete=len(errors) == _MAX_ERRORS_LISTED)


def extract_webhook_secrets(
    body: WebhookBody | None, ctx: ApiContext, within: Location = ()
) -> tuple[Webhook | None, WebhookSecrets | None]:
    """Split a webhook into the part for the log and its secrets. `within` is the location of its job or batch.

    Raises:
        ApiError: 422, the URL is not allowed.
    """
    if body is None:
        return None, None
    if (reason := find_rejection_reason(body.url, ctx.allowed_webhook_hosts)) is not None:
        raise build_validation_error([{"loc": ("webhook", "url"), "msg": reason.message}], within)
    secrets = None
    if body.headers or body.secrets:
        secrets = WebhookSecrets(f"secrets-{ObjectId()}", body.headers, body.secrets)
    webhook = Webhook(
        url=body.url,
        header_names=sorted(body.headers),
        secrets_ref=secrets.secrets_ref if secrets else None,
        include_markdown=body.include_markdown,
        include_metadata=body.include_metadata,
        has_own_secrets=bool(body.secrets),
    )
    return webhook, secrets


# Batches ----------------------------------------------------------------------------------------------------------


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
    size, limit = len(text) * repetitions, get_api_context(request).settings.max_body_bytes
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
    """Return an estimate of the size of the list index of one job, in bytes."""
    return list_index.estimate_list_index_bytes(
        {"user_id": user_id, "access_control": access.model_dump(), "teams": teams}
    )


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
            size = len(encode_canonical_json(job.parameters))
            location = ("jobs", index)
            limits.check_event(job, size)
        except InvalidEvent as error:
            raise build_validation_error([{"loc": location, "msg": str(error)}]) from error
