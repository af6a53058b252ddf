"""api: jobs. Submit, list, read, follow their history, and act on them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Final

from bson import ObjectId
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import Response

from api.access import actor, for_user, may_see, requires, who_asks
from api.errors import ApiError, invalid, json_response, path
from api.models import JobBody, JobList, ReasonBody, RestartBody, WebhookBody
from api.services import Services, query_of, read_json, services, validated, views_reach_wanted_position
from ledger.access import Right
from ledger.commands import Archive, CancelJob, Delete, JobCommand, RestartJob, SubmitJob, Unarchive
from ledger.events import AccessControl, JobSubmitted, Meta, Recorded, Webhook
from ledger.handle import Known, handle, load, new_job_id
from ledger.mongo import Document, driver_errors
from projections import batches, statistics
from projections import jobs as view


@dataclass(frozen=True, slots=True)
class Secrets:
    """Header values of webhooks, kept out of the log, in a collection of their own."""

    reference: str
    headers: dict[str, str]


def submission(
    body: JobBody,
    known: Services,
    *,
    user_id: str,
    teams: Collection[str],
    within: tuple[str | int, ...] = (),
    batch_id: str | None = None,
    webhook: Webhook | None = None,
) -> JobSubmitted:
    """Return the event for a valid body; `within` is where the body stands in the request, for messages.

    Raises:
        ApiError: 422, when the job type is unknown or the parameters do not fit it.
    """
    model = known.job_types.get(body.job_type)
    if model is None:
        names = ", ".join(sorted(known.job_types))
        problem = {
            "path": path((*within, "job_type")),
            "message": f"unknown job type {body.job_type!r}; there are: {names}",
        }
        message = f"{problem['path']}: {problem['message']}"
        raise ApiError(422, "unknown_job_type", message, details={"errors": [problem]})
    try:
        model.model_validate(body.parameters)
    except ValidationError as error:
        raise invalid(error, within=(*within, "parameters")) from error
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


def split_webhook(body: WebhookBody | None) -> tuple[Webhook | None, Secrets | None]:
    """Return the webhook as it may stand in the log, and what must not."""
    if body is None:
        return None, None
    secrets = Secrets(f"headers-{ObjectId()}", body.headers) if body.headers else None
    webhook = Webhook(
        url=body.url,
        header_names=sorted(body.headers),
        headers_ref=secrets.reference if secrets else None,
        include_markdown=body.include_markdown,
        include_metadata=body.include_metadata,
    )
    return webhook, secrets


def notices(*webhooks: Webhook | None) -> dict[str, list[str]]:
    """Return what a client should know that is not as it may expect."""
    if any(webhooks):
        return {"warnings": ["The webhook is recorded, but this version does not deliver webhooks yet."]}
    return {}


async def keep(known: Services, *secrets: Secrets | None) -> None:
    """Store header values before the event that refers to them: never the other way round."""
    documents = [{"_id": it.reference, "headers": it.headers} for it in secrets if it is not None]
    if documents:
        with driver_errors("storing webhook headers"):
            await known.db.webhook_headers.insert_many(documents)


async def submit(request: Request) -> Response:
    """POST /api/events/jobs"""
    known = services(request)
    body = validated(JobBody, await read_json(request))
    webhook, secrets = split_webhook(body.webhook)
    asked = submission(
        body, known, user_id=for_user(request, body.user_id), teams=who_asks(request).groups, webhook=webhook
    )
    await keep(known, secrets)
    job_id = new_job_id()
    handled = await handle(known.log, job_id, SubmitJob(asked), meta=Meta(actor(request)), known=Known())
    return json_response(
        {
            "status": "success",
            "job_id": job_id,
            "job": await _shown_job(known, view.fold(None, handled.events[0])),
            **notices(webhook),
        },
        202,
        {"Location": f"/api/events/jobs/{job_id}", "Ledger-Position": str(handled.events[0].position)},
    )


async def listing(request: Request) -> Response:
    """GET /api/events/jobs"""
    await views_reach_wanted_position(request)
    known = services(request)
    asked = query_of(request, JobList)
    wanted = view.Filter(**asked.model_dump(exclude={"limit", "skip", "min_position"}))
    query = wanted.query(who_asks(request))
    found = await view.page(known.db, query, limit=asked.limit, skip=asked.skip)
    total, bounded = await _total(request, wanted, query)
    content: dict[str, Any] = {"status": "success", "total": total, "jobs": await _shown_jobs(known, found)}
    if bounded:
        content["total_is_lower_bound"] = True
    return json_response(content)


async def _total(request: Request, wanted: view.Filter, query: Document) -> tuple[int, bool]:
    """Return how many jobs there are and whether there may be more: from counters where they know it."""
    db = services(request).db
    if who_asks(request).sees_everything and wanted == view.Filter(status=wanted.status):
        return (await statistics.read(db))["jobs"][wanted.status or "total"], False
    total = await view.count(db, query)
    return total, total >= view.COUNTED_UP_TO


async def single(request: Request) -> Response:
    """GET /api/events/jobs/{job_id}"""
    await views_reach_wanted_position(request)
    job = await existing(request)
    content = {"status": "success", "job": await _shown_job(services(request), job)}
    return json_response(content, headers={"ETag": f'"{job["version"]}"'})


async def existing(request: Request) -> Document:
    """Return the job that the path names.

    Raises:
        ApiError: 404.
    """
    known, job_id = services(request), request.path_params["job_id"]
    job = await view.get(known.db, known.log, job_id) if job_id.startswith("job-") else None
    if job is None or not may_see(request, job):
        raise not_found(job_id)
    return job


def not_found(job_id: str) -> ApiError:
    """Return the answer to who asks for a job that is not there, or that they may not see."""
    return ApiError(404, "job_not_found", f"There is no job {job_id}.")


async def cancel(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/cancel"""
    body = validated(ReasonBody, await optional_json(request))
    return await _act(request, CancelJob(actor(request), body.reason))


async def restart(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/restart"""
    body = validated(RestartBody, await optional_json(request))
    return await _act(request, RestartJob(actor(request), body.reason, body.reuse_steps))


async def archive(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/archive"""
    body = validated(ReasonBody, await optional_json(request))
    return await _act(request, Archive(actor(request), body.reason))


async def unarchive(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/unarchive"""
    body = validated(ReasonBody, await optional_json(request))
    return await _act(request, Unarchive(actor(request), body.reason))


async def delete(request: Request) -> Response:
    """DELETE /api/events/jobs/{job_id}"""
    return await _act(request, Delete(actor(request)), Right.ADMIN)


async def _act(request: Request, command: JobCommand, right: Right = Right.WRITE) -> Response:
    known, job_id = services(request), request.path_params["job_id"]
    found = await load(known.log, job_id) if job_id.startswith("job-") else Known()
    check = requires(request, right, missing=not_found(job_id))
    handled = await handle(known.log, job_id, command, meta=Meta(actor(request)), known=found, check=check)
    after: Document | None = None
    for event in await known.log.read_stream(job_id):
        after = view.fold(after, event)
    content = {"status": "success", "job_id": job_id, "job": await _shown_job(known, after)}
    return json_response(content, headers={"Ledger-Position": str(handled.known.head.position)})


async def optional_json(request: Request) -> Any:
    """Return the request's JSON body. An action needs none; without a content type there is none."""
    return await read_json(request) if "content-type" in request.headers else {}


_INTERNAL: Final = frozenset({"_id", "queued_position", "headings", "words"})


def shown(document: Document) -> Document:
    """Return a view document as clients see it."""
    return {name: value for name, value in document.items() if name not in _INTERNAL}


async def _shown_jobs(known: Services, jobs: Sequence[Document]) -> list[Document]:
    """Return jobs as clients see them. `paused` ones wait because their batch is paused."""
    waiting = {job["batch_id"] for job in jobs if job["status"] == "pending"} - {None}
    paused = await batches.paused_among(known.db, waiting) if waiting else set()
    return [{**shown(job), "paused": job["status"] == "pending" and job["batch_id"] in paused} for job in jobs]


async def _shown_job(known: Services, job: Document | None) -> Document | None:
    return (await _shown_jobs(known, [job]))[0] if job else None


def shown_event(event: Recorded) -> Document:
    """Return an event as clients see it."""
    return {
        "position": event.position,
        "event_id": event.event_id,
        "stream": event.stream,
        "version": event.version,
        "type": event.type,
        "time": event.time,
        "schema": event.schema,
        "data": event.data,
        "meta": event.meta.payload(),
        "hash": event.hash.hex(),
    }
