"""api: what is asked for, from a valid body to the event; and what of it must not stand in the log."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from bson import ObjectId
from starlette.requests import Request

from jobledger.api.context import ApiContext, get_api_context
from jobledger.api.http.bodies import run_off_loop
from jobledger.api.http.errors import ApiError, format_location
from jobledger.api.http.validation import validate_content
from jobledger.api.schemas.jobs import JobBody
from jobledger.api.schemas.webhooks import WebhookBody
from jobledger.api.submission.parameters import ParameterCheck
from jobledger.ledger.domain.events import AccessControl, BatchSubmitted, JobSubmitted, Webhook
from jobledger.ledger.mongo.connection import translate_errors
from jobledger.ledger.net.url_policy import USERINFO_MESSAGE, AllowedHosts, has_userinfo, rejection_reason
from jobledger.ledger.store.endpoint_secrets import Endpoint, RevealedSecret, ensure_secrets


@dataclass(frozen=True, slots=True)
class WebhookSecrets:
    """What of a webhook is kept out of the log, in a collection of its own: values of headers, and signing secrets."""

    secrets_ref: str
    headers: dict[str, str]
    signing: list[str]


def build_job_submitted(
    body: JobBody,
    ctx: ApiContext,
    *,
    user_id: str,
    teams: Collection[str],
    within: tuple[str | int, ...] = (),
    batch_id: str | None = None,
    webhook: Webhook | None = None,
) -> JobSubmitted:
    """Return the event for a valid body; `within` is where the body stands in the request, for messages.

    The parameters are not looked at: see `check_parameters`.

    Raises:
        ApiError: 422, when the job type is unknown; 503, when its processor is installed but cannot be used.
    """
    if (why := ctx.unavailable_job_types.get(body.job_type)) is not None:
        place = format_location((*within, "job_type"))
        message = f"{place}: job type {body.job_type!r} cannot be used on this server now: {why}"
        raise ApiError(503, "job_type_unavailable", message)
    if body.job_type not in ctx.job_types:
        names = ", ".join(sorted(ctx.job_types))
        problem = {
            "path": format_location((*within, "job_type")),
            "message": f"unknown job type {body.job_type!r}; there are: {names}",
        }
        message = f"{problem['path']}: {problem['message']}"
        raise ApiError(422, "unknown_job_type", message, details={"errors": [problem]})
    return JobSubmitted(
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


async def check_parameters(request: Request, checks: Sequence[ParameterCheck]) -> None:
    """Make sure that parameters fit their job types.

    Raises:
        ApiError: 422, naming each wrong field of the first job that has any; 503, when a plug-in's validator takes too
            long.
    """
    await run_off_loop(request, _refuse_userinfo_in, checks)
    await run_off_loop(request, _check_trusted, [it for it in checks if it.is_trusted])
    await get_api_context(request).parameter_validator.check(it for it in checks if not it.is_trusted)


def check_no_userinfo(parameters: Mapping[str, Any], within: tuple[str | int, ...]) -> None:
    """Refuse URLs with a user name or password, wherever they are: parameters are published with the results.

    Any text that is such a URL is refused, because plug-ins also take URLs as plain text.

    Raises:
        ApiError: 422.
    """
    problems = [
        {"path": format_location(place), "message": USERINFO_MESSAGE}
        for place in islice(_places_with_userinfo(parameters, within), _PROBLEMS_NAMED)
    ]
    if problems:
        message = f"{problems[0]['path']}: {USERINFO_MESSAGE}"
        raise ApiError(422, "invalid_content", message, details={"errors": problems})


def _refuse_userinfo_in(checks: Sequence[ParameterCheck]) -> None:
    for it in checks:
        check_no_userinfo(it.parameters, it.within)


def _places_with_userinfo(value: Any, place: tuple[str | int, ...]) -> Iterator[tuple[str | int, ...]]:
    waiting: list[tuple[Any, tuple[str | int, ...]]] = [(value, place)]
    while waiting:
        current, at = waiting.pop()
        if isinstance(current, str):
            if has_userinfo(current):
                yield at
        elif isinstance(current, Mapping):
            waiting += [(it, (*at, str(name))) for name, it in current.items() if isinstance(it, _NESTED)]
        elif isinstance(current, list):
            waiting += [(it, (*at, index)) for index, it in enumerate(current) if isinstance(it, _NESTED)]


_NESTED: Final = (str, dict, list)
_PROBLEMS_NAMED: Final = 100


def _check_trusted(checks: Sequence[ParameterCheck]) -> None:
    for it in checks:
        validate_content(it.model, it.parameters, within=it.within)


def extract_webhook_secrets(
    body: WebhookBody | None, ctx: ApiContext, within: tuple[str | int, ...] = ()
) -> tuple[Webhook | None, WebhookSecrets | None]:
    """Return the webhook as it may stand in the log, and what must not; `within` is where the body stands.

    Raises:
        ApiError: 422, when it goes to where nothing can be delivered.
    """
    if body is None:
        return None, None
    if (why := rejection_reason(body.url, AllowedHosts(ctx.webhook_options.allowed_private_hosts))) is not None:
        place = format_location((*within, "webhook", "url"))
        problem = {"path": place, "message": why}
        raise ApiError(422, "invalid_content", f"{place}: {why}", details={"errors": [problem]})
    secret = body.headers or body.secrets
    secrets = WebhookSecrets(f"secrets-{ObjectId()}", body.headers, body.secrets) if secret else None
    webhook = Webhook(
        url=body.url,
        header_names=sorted(body.headers),
        secrets_ref=secrets.secrets_ref if secrets else None,
        include_markdown=body.include_markdown,
        include_metadata=body.include_metadata,
        has_own_secrets=bool(body.secrets),
    )
    return webhook, secrets


def collect_signing_endpoints(*submitted: JobSubmitted | BatchSubmitted) -> set[Endpoint]:
    """Return the endpoints whose own secrets sign: those of webhooks that bring none."""
    return {
        Endpoint(it.user_id, it.webhook.url)
        for it in submitted
        if it.webhook is not None and not it.webhook.has_own_secrets
    }


def format_new_secrets(shown: Collection[RevealedSecret]) -> dict[str, list[dict[str, str]]]:
    """Return the part of an answer that shows new secrets; nothing if there are none."""
    return {"webhook_secrets": [it.to_response() for it in shown]} if shown else {}


async def store_webhook_secrets(
    ctx: ApiContext, *secrets: WebhookSecrets | None, endpoints: Collection[Endpoint] = ()
) -> None:
    """Store secrets of webhooks before the event that refers to them: never the other way round."""
    await ensure_secrets(ctx.db, endpoints)
    documents = [
        {"_id": it.secrets_ref, "headers": it.headers, "secrets": it.signing} for it in secrets if it is not None
    ]
    if documents:
        with translate_errors("storing the secrets of webhooks"):
            await ctx.db.webhook_secrets.insert_many(documents)
