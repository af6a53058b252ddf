"""Build the events of submitted jobs and batches, and keep secrets out of the log."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from bson import ObjectId
from starlette.requests import Request

from jobledger.api.context import ApiContext, get_api_context
from jobledger.api.http.bodies import run_off_loop
from jobledger.api.http.errors import ApiError, build_validation_error, format_location
from jobledger.api.http.validation import validate_content
from jobledger.api.schemas.jobs import JobBody
from jobledger.api.schemas.webhooks import WebhookBody
from jobledger.api.submission.parameters import ParameterCheck
from jobledger.ledger.domain.events import AccessControl, JobSubmitted, Webhook
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.net.url_policy import USERINFO_MESSAGE, has_userinfo, rejection_reason

Location = tuple[str | int, ...]
"""Where a value is in the request body, for error messages."""
_CONTAINERS_AND_TEXT: Final = (str, dict, list)
_MAX_ERRORS_LISTED: Final = 100


@dataclass(frozen=True, slots=True)
class WebhookSecrets:
    """The parts of a webhook that are stored outside of the log: header values and the user's signing secrets."""

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
        max_attempts=body.max_attempts,
        timeout_s=body.timeout_s,
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
    locations = islice(_find_userinfo(parameters, within), _MAX_ERRORS_LISTED)
    if errors := [{"loc": location, "msg": USERINFO_MESSAGE} for location in locations]:
        raise build_validation_error(errors, may_be_incomplete=len(errors) == _MAX_ERRORS_LISTED)


def _find_userinfo(root: Any, root_location: Location) -> Iterator[Location]:
    pending: list[tuple[Any, Location]] = [(root, root_location)]
    while pending:
        value, location = pending.pop()
        if isinstance(value, str):
            if has_userinfo(value):
                yield location
            continue
        entries: Iterator[tuple[str | int, Any]] = iter(())
        if isinstance(value, Mapping):
            entries = ((str(name), entry) for name, entry in value.items())
        elif isinstance(value, list):
            entries = enumerate(value)
        pending += [(entry, (*location, key)) for key, entry in entries if isinstance(entry, _CONTAINERS_AND_TEXT)]


def extract_webhook_secrets(
    body: WebhookBody | None, ctx: ApiContext, within: Location = ()
) -> tuple[Webhook | None, WebhookSecrets | None]:
    """Split a webhook into the part for the log and its secrets. `within` is the location of its job or batch.

    Raises:
        ApiError: 422, the URL is not allowed.
    """
    if body is None:
        return None, None
    if (reason := rejection_reason(body.url, ctx.allowed_webhook_hosts)) is not None:
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
