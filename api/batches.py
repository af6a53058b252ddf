"""api: batches. Submit many jobs at once, all or none, and see how they are getting on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from api.errors import ApiError, json_response, path
from api.jobs import keep, notices, shown, split_webhook, submission
from api.models import BatchBody, BatchList, JobBody
from api.services import query_of, read_json, services, validated, views_reach_wanted_position
from ledger.chain import canonical
from ledger.commands import SubmitBatch, SubmitJob
from ledger.errors import InvalidEvent
from ledger.events import AccessControl, BatchSubmitted, JobSubmitted, Meta
from ledger.handle import Command, handle_new, new_batch_id, new_job_id
from projections import batches as view
from projections import statistics


async def submit(request: Request) -> Response:
    """POST /api/events/batches"""
    known = services(request)
    body = validated(BatchBody, await read_json(request))
    _refuse_multiplied(body, known.largest_body_bytes)
    batch_id = new_batch_id()
    webhook, secrets = split_webhook(body.webhook)
    user_id = body.user_id or known.default_user
    kept, jobs = [secrets], []
    for index, content in enumerate(body.jobs):
        job_body = validated(JobBody, content, within=("jobs", index))
        job_webhook, job_secrets = split_webhook(job_body.webhook)
        kept.append(job_secrets)
        given: dict[str, Any] = {"parameters": {**body.parameters, **job_body.parameters}}
        if job_body.user_id is None:
            given["user_id"] = user_id
        if "access_control" not in job_body.model_fields_set:
            given["access_control"] = body.access_control
        jobs.append(
            submission(
                job_body.model_copy(update=given),
                known,
                within=("jobs", index),
                batch_id=batch_id,
                webhook=job_webhook,
            )
        )
    job_ids = [new_job_id() for _ in jobs]
    batch = BatchSubmitted(
        batch_name=body.batch_name,
        total_jobs=len(jobs),
        job_ids=job_ids,
        parameters=body.parameters,
        webhook=webhook,
        user_id=user_id,
        access_control=AccessControl(**body.access_control.model_dump()),
    )
    await keep(known, *kept)
    commands: list[tuple[str, Command]] = [(batch_id, SubmitBatch(batch))]
    commands += [(job_id, SubmitJob(job)) for job_id, job in zip(job_ids, jobs, strict=True)]
    try:
        recorded = await handle_new(known.log, commands, meta=Meta(f"user:{user_id}", batch_id))
    except InvalidEvent:
        _refuse_what_cannot_be_stored(jobs)
        raise
    return json_response(
        {
            "status": "success",
            "batch_id": batch_id,
            "job_ids": job_ids,
            "batch": shown(view.as_submitted(view.fold(None, recorded[0]))),
            **notices(webhook, *(job.webhook for job in jobs)),
        },
        202,
        {"Location": f"/api/events/batches/{batch_id}", "Ledger-Position": str(recorded[-1].position)},
    )


def _refuse_multiplied(body: BatchBody, limit: int) -> None:
    """Every job carries the defaults: a small body can ask for gigabytes, which no transaction takes."""
    size = len(to_json(body.parameters)) * len(body.jobs)
    if size > limit:
        message = (
            f"The batch's `parameters` in each of its jobs make {size} bytes, more than {limit} (api.max_body_bytes)."
        )
        raise ApiError(413, "too_large", message)


def _refuse_what_cannot_be_stored(jobs: Sequence[JobSubmitted]) -> None:
    """Find the first job with content that the log refuses: the log itself does not know its index."""
    for index, job in enumerate(jobs):
        try:
            canonical(job.parameters)
        except InvalidEvent as error:
            where = path(("jobs", index, "parameters"))
            problem = {"path": where, "message": str(error)}
            raise ApiError(422, "invalid_content", f"{where}: {error}", details={"errors": [problem]}) from error


async def listing(request: Request) -> Response:
    """GET /api/events/batches"""
    await views_reach_wanted_position(request)
    known = services(request)
    asked = query_of(request, BatchList)
    wanted = view.query(status=asked.status, user_id=asked.user_id, archived=asked.archived)
    found = await view.page(known.db, wanted, limit=asked.limit, skip=asked.skip)
    total = await view.count(known.db, wanted) if wanted else (await statistics.read(known.db))["batches"]["total"]
    return json_response({"status": "success", "total": total, "batches": [shown(batch) for batch in found]})


async def single(request: Request) -> Response:
    """GET /api/events/batches/{batch_id}"""
    await views_reach_wanted_position(request)
    known, batch_id = services(request), request.path_params["batch_id"]
    batch = await view.get(known.db, known.log, batch_id) if batch_id.startswith("batch-") else None
    if batch is None:
        raise ApiError(404, "batch_not_found", f"There is no batch {batch_id}.")
    return json_response({"status": "success", "batch": shown(batch)}, headers={"ETag": f'"{batch["position"]}"'})
