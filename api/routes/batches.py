"""api: batches. Submit many jobs at once, all or none, and see how they are getting on."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing, suppress
from datetime import datetime
from operator import attrgetter
from typing import Any, Final

from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api import bulk_commands
from jobledger.api.auth.permissions import (
    can_read,
    get_actor,
    get_principal,
    resolve_owner,
    resolve_teams,
    timeout_while_authenticated,
    viewer_for,
)
from jobledger.api.auth.redaction import BATCH_RULES, redact_document
from jobledger.api.context import (
    check_disk_space,
    get_api_context,
    parse_query,
    wait_for_requested_position,
    wait_for_views,
)
from jobledger.api.http.bodies import MAX_VALUES, estimate_value_count, mark_large_body, read_json_body, run_off_loop
from jobledger.api.http.conditional import build_conditional_response
from jobledger.api.http.errors import ApiError, format_location, json_response, translate_damaged_events
from jobledger.api.http.idempotency import IdempotencyKey, get_request_marker
from jobledger.api.http.preferences import preferred_wait, prefers_wait
from jobledger.api.http.validation import validate_content
from jobledger.api.routes.jobs import build_job_list_response, encode_next_cursor
from jobledger.api.schemas.requests import AsOfQuery, BatchBody, BatchListQuery, JobBody, JobListQuery, PageQuery
from jobledger.api.submission.builder import (
    WebhookSecrets,
    build_job_submitted,
    check_no_userinfo,
    check_parameters,
    collect_signing_endpoints,
    extract_webhook_secrets,
    format_new_secrets,
    store_webhook_secrets,
)
from jobledger.api.submission.parameters import ParameterCheck
from jobledger.ledger.domain import limits
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.commands import SubmitBatch, SubmitJob
from jobledger.ledger.domain.errors import InvalidEvent, VersionConflict
from jobledger.ledger.domain.events import (
    AccessControl,
    BatchSubmitted,
    EventMetadata,
    JobLogged,
    JobProgressed,
    JobSubmitted,
    RecordedEvent,
    StepCompleted,
)
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import Command, create_streams, load_stream_state, new_batch_id, new_job_id
from jobledger.ledger.store.endpoint_secrets import RevealedSecret, reveal_new_secrets
from jobledger.ledger.store.event_store import EventStore, override_payload_fields
from jobledger.ledger.store.hash_chain import canonical_json
from jobledger.projections.engine.stream_fold import as_of_filter
from jobledger.projections.engine.writer import FOLDED_VIEWS, Chunk
from jobledger.projections.views import batches as view
from jobledger.projections.views import list_index, statistics
from jobledger.projections.views.paging import MAX_COUNT

_RUNNING_JOB_EVENTS: Final = frozenset(kind.__name__ for kind in (JobProgressed, JobLogged, StepCompleted))
"""What a running job says concerns no batch."""
_COSTS: Final = {
    "metadata": {name: f"$data.results.metadata.{name}" for name in ("processed_at", "duration", "tokens_used")}
}
_OF_BATCH: Final = override_payload_fields(
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
"""Payloads of jobs' events with what their batch shows of them."""
_EVENTS_PER_YIELD: Final = 100


async def submit_batch(request: Request) -> Response:
    """POST /api/events/batches"""
    known = get_api_context(request)
    submitted, position, shown_secrets = await _submit(request)
    batch_id = submitted.stream
    if prefers_wait(request):
        del submitted  # it may be large, and the wait is long
        await _wait_for_end(request, batch_id)
        batch = await view.get(known.views, known.event_store, batch_id)
        batch = batch or _as_submitted((await known.event_store.read_stream(batch_id, limit=1))[0])  # deleted meanwhile
    else:
        batch = _as_submitted(submitted)
    return json_response(
        {
            "status": "success",
            "batch_id": batch_id,
            "job_ids": batch["job_ids"],
            "batch": redact_document(batch, BATCH_RULES, viewer_for(request, batch)),
            **format_new_secrets(shown_secrets),
        },
        202,
        {
            "Location": f"{known.signed_links.path_prefix}/api/events/batches/{batch_id}",
            "Ledger-Position": str(max(position, batch["position"])),
        },
    )


async def _submit(request: Request) -> tuple[RecordedEvent, int, Sequence[RevealedSecret]]:
    """Submit the batch of the body; return its first event, its last position, and secrets that were created for it."""
    known = get_api_context(request)
    body, content = await read_json_body(request, BatchBody)
    once = await run_off_loop(request, IdempotencyKey.from_request, request, content)
    batch_id = f"batch-{once.derive_id()}" if once else new_batch_id()
    if (before := await _submitted_before(request, batch_id, once)) is not None:
        return before
    check_disk_space(get_api_context(request))
    webhook, secrets = extract_webhook_secrets(body.webhook, known)
    user_id = resolve_owner(request, body.user_id)
    teams = resolve_teams(request, user_id, known.get_groups)
    jobs, kept = await build_batch_jobs(request, body, batch_id, user_id)
    job_ids = [f"job-{once.derive_id(number)}" if once else new_job_id() for number in range(1, len(jobs) + 1)]
    batch = BatchSubmitted(
        batch_name=body.batch_name,
        total_jobs=len(jobs),
        job_ids=job_ids,
        parameters=body.parameters,
        webhook=webhook,
        user_id=user_id,
        access_control=AccessControl(**body.access_control.model_dump()),
        teams=sorted(teams),
    )
    endpoints = collect_signing_endpoints(batch, *jobs)
    await store_webhook_secrets(known, secrets, *kept, endpoints=endpoints)
    commands: list[tuple[str, Command]] = [(batch_id, SubmitBatch(batch))]
    commands += [(job_id, SubmitJob(job)) for job_id, job in zip(job_ids, jobs, strict=True)]
    try:
        recorded = await create_streams(
            known.event_store,
            commands,
            meta=EventMetadata(get_actor(request), batch_id, request_fingerprint=get_request_marker(once)),
        )
    except VersionConflict:  # a request with the same key was quicker
        if (before := await _submitted_before(request, batch_id, once)) is None:
            raise
        return before
    except InvalidEvent:
        await run_off_loop(request, _refuse_what_cannot_be_stored, jobs)
        raise
    return recorded[0], recorded[-1].position, await reveal_new_secrets(known.db, endpoints)


async def build_batch_jobs(
    request: Request, body: BatchBody, batch_id: str, user_id: str
) -> tuple[list[JobSubmitted], list[WebhookSecrets | None]]:
    """Return the events for a batch's jobs, and the secrets of their webhooks.

    Raises:
        ApiError: 422, naming each wrong field of the first job that has any; 413, when its defaults or lists of names
            are too large.
    """
    _refuse_defaults_multiplied(request, body)
    jobs, kept = await run_off_loop(request, _jobs_in, request, body, batch_id, user_id)
    await run_off_loop(request, _refuse_large_list_index, jobs)
    types = get_api_context(request).job_types
    checks = [
        ParameterCheck(job.job_type, types[job.job_type], job.parameters, ("jobs", index, "parameters"))
        for index, job in enumerate(jobs)
    ]
    await check_parameters(request, checks)
    # Also defaults that each job replaces: the batch itself is stored and shown with them.
    await run_off_loop(request, check_no_userinfo, body.parameters, ("parameters",))
    return jobs, kept


def _jobs_in(
    request: Request, body: BatchBody, batch_id: str, user_id: str
) -> tuple[list[JobSubmitted], list[WebhookSecrets | None]]:
    known = get_api_context(request)
    teams = resolve_teams(request, user_id, known.get_groups)
    kept, jobs = [], []
    for index, content in enumerate(body.jobs):
        job_body = validate_content(JobBody, content, within=("jobs", index))
        webhook, secrets = extract_webhook_secrets(job_body.webhook, known, ("jobs", index))
        kept.append(secrets)
        owner = user_id if job_body.user_id is None else resolve_owner(request, job_body.user_id)
        given: dict[str, Any] = {"parameters": {**body.parameters, **job_body.parameters}}
        if "access_control" not in job_body.model_fields_set:
            given["access_control"] = body.access_control
        jobs.append(
            build_job_submitted(
                job_body.model_copy(update=given),
                known,
                user_id=owner,
                teams=teams if owner == user_id else resolve_teams(request, owner, known.get_groups),
                within=("jobs", index),
                batch_id=batch_id,
                webhook=webhook,
            )
        )
    return jobs, kept


async def _submitted_before(
    request: Request, batch_id: str, once: IdempotencyKey | None
) -> tuple[RecordedEvent, int, Sequence[RevealedSecret]] | None:
    """Return what `_submit` returned for the same request made before, if it was.

    Raises:
        ApiError: 422, when that one asked for something else.
    """
    events = await get_api_context(request).event_store.read_stream(batch_id, limit=1) if once else []
    if once is None or (submitted := once.find_in(events)) is None:
        return None
    assert isinstance(submitted.event, BatchSubmitted)  # noqa: S101 - narrows the type; every batch begins with it
    # Its jobs were written with it, in the positions behind it.
    return submitted, submitted.position + submitted.event.total_jobs, ()


def _as_submitted(event: RecordedEvent) -> Document:
    batch = view.with_submitted_counts(view.fold(None, event))
    assert batch is not None  # noqa: S101 - narrows the type; a submission makes a document
    return batch


def _refuse_defaults_multiplied(request: Request, body: BatchBody) -> None:
    """Refuse defaults that make gigabytes of events, because every job carries them.

    Raises:
        ApiError: 413.
    """
    inheriting = sum(1 for job in body.jobs if not (isinstance(job, dict) and "access_control" in job))
    check_expanded_size(request, "parameters", body.parameters, len(body.jobs))
    check_expanded_size(request, "access_control", body.access_control, inheriting)


def _refuse_large_list_index(jobs: Sequence[JobSubmitted]) -> None:
    """Refuse names that make gigabytes of list index, because each of them adds rows for each job.

    Raises:
        ApiError: 413.
    """
    size = 0
    for job in jobs:
        size += estimate_list_index_bytes(job.user_id, job.access_control, job.teams)
        if size > limits.MAX_BATCH_LIST_INDEX_BYTES:  # not all of them need to be counted
            check_list_index_size(size)


def estimate_list_index_bytes(user_id: str, access: AccessControl, teams: Sequence[str]) -> int:
    """Return the most that the list index of a job may take."""
    return list_index.max_list_index_bytes({"user_id": user_id, "access_control": access.model_dump(), "teams": teams})


def check_list_index_size(size: int) -> None:
    """Make sure that the list index of a batch's jobs together is not too large.

    Raises:
        ApiError: 413.
    """
    if size > limits.MAX_BATCH_LIST_INDEX_BYTES:
        message = (
            f"`access_control` and teams of the batch's jobs: the list index takes {size} bytes or more, and at most "
            f"{limits.MAX_BATCH_LIST_INDEX_BYTES} are allowed. Use fewer names, groups, or smaller batches."
        )
        raise ApiError(413, "content_too_large", message)


def check_expanded_size(request: Request, field: str, value: Any, times: int) -> None:
    """Make sure that a field of a batch's body, which is written for each job, is no more than a body may be.

    Raises:
        ApiError: 413.
    """
    text = bytearray(to_json(value))
    size, limit = len(text) * times, get_api_context(request).max_body_bytes
    if size > limit:
        message = f"The batch's `{field}` in each of its jobs: {size} bytes, more than {limit} (api.max_body_bytes)."
        raise ApiError(413, "content_too_large", message)
    values = estimate_value_count(text, times)[0] * times
    if values > MAX_VALUES:
        message = f"The batch's `{field}` in each of its jobs: about {values} values, more than {MAX_VALUES}."
        raise ApiError(413, "too_many_values", message)
    mark_large_body(request, size, values)


def _refuse_what_cannot_be_stored(jobs: Sequence[JobSubmitted]) -> None:
    """Find the first job with content that the log refuses: the log itself does not know its index."""
    for index, job in enumerate(jobs):
        place: tuple[str | int, ...] = ("jobs", index, "parameters")
        try:
            size = len(canonical_json(job.parameters))
            place = ("jobs", index)
            limits.check_event(job, size)
        except InvalidEvent as error:
            where = format_location(place)
            problem = {"path": where, "message": str(error)}
            raise ApiError(422, "invalid_content", f"{where}: {error}", details={"errors": [problem]}) from error


async def list_batches(request: Request) -> Response:
    """GET /api/events/batches"""
    await wait_for_requested_position(request)
    known = get_api_context(request)
    asked = parse_query(request, BatchListQuery)
    principal = get_principal(request)
    wanted = view.build_query(principal, status=asked.status, user_id=asked.user_id, archived=asked.archived, q=asked.q)
    found, following = await view.find_page(
        known.views, wanted, limit=asked.limit, skip=asked.skip, after=asked.cursor, newest_first=asked.newest_first
    )
    seen = [redact_document(batch, BATCH_RULES, viewer_for(request, batch)) for batch in found]
    content: dict[str, Any] = {"status": "success", "batches": seen}
    if principal.is_admin and asked.model_dump(exclude=set(PageQuery.model_fields), exclude_none=True) == {}:
        content["total"] = await statistics.count_batches(known.views)
    else:
        content["total"] = await view.count(known.views, wanted)
        if content["total"] >= MAX_COUNT:
            content["total_is_lower_bound"] = True
    return json_response(content | encode_next_cursor(following))


async def get_batch(request: Request) -> Response:
    """GET /api/events/batches/{batch_id}"""
    await wait_for_requested_position(request)
    asked = parse_query(request, AsOfQuery)
    if asked.as_of is None and prefers_wait(request) and (await load_batch_or_404(request))["status"] == "processing":
        await _wait_for_end(request, request.path_params["batch_id"])
    batch = await load_batch_or_404(request)
    viewer = viewer_for(request, batch)  # by the access of today, also of the batch as it was
    if asked.as_of is not None:
        batch = await _as_of(request, batch["batch_id"], asked.as_of)
    return build_conditional_response(request, "batch", redact_document(batch, BATCH_RULES, viewer))


async def _as_of(request: Request, batch_id: str, then: int | datetime) -> Document:
    """Return the batch as the views had it at a position of the log or at a moment: folded as they are.

    Raises:
        ApiError: 404, when it was not there then; 409, when it cannot be read.
    """
    log = get_api_context(request).event_store
    with translate_damaged_events(batch_id):
        events = await log.read_stream(batch_id)
        job_ids = events[0].data["job_ids"]
        for begin in range(0, len(job_ids), bulk_commands.JOBS_PER_CHUNK):
            some = job_ids[begin : begin + bulk_commands.JOBS_PER_CHUNK]
            async with aclosing(
                log.iterate_stream_batches(some, exclude_types=_RUNNING_JOB_EVENTS, data_expression=_OF_BATCH)
            ) as parts:
                async for of_jobs in parts:
                    events += of_jobs
        chunk = Chunk({name: {} for name in FOLDED_VIEWS})
        for number, event in enumerate(sorted(filter(as_of_filter(then), events), key=attrgetter("position"))):
            chunk.apply(event)
            if number % _EVENTS_PER_YIELD == 0:  # other requests are served meanwhile
                await asyncio.sleep(0)
        batch = chunk.get("batches", batch_id)
    if batch is None:
        raise ApiError(404, "batch_not_found", f"There was no batch {batch_id} then.")
    return batch


async def list_batch_jobs(request: Request) -> Response:
    """GET /api/events/batches/{batch_id}/jobs"""
    asked = parse_query(request, JobListQuery)
    batch = await load_batch_or_404(request)
    return await build_job_list_response(request, asked.model_copy(update={"batch_id": batch["batch_id"]}))


async def load_batch_or_404(request: Request) -> Document:
    """Return the batch that the path names, as the views have it.

    Raises:
        ApiError: 404.
    """
    known, batch_id = get_api_context(request), request.path_params["batch_id"]
    batch = await view.get(known.views, known.event_store, batch_id) if batch_id.startswith("batch-") else None
    if batch is None or not can_read(request, batch):
        raise batch_not_found_error(batch_id)
    return batch


async def _wait_for_end(request: Request, batch_id: str) -> None:
    """Wait for the batch's end if the caller prefers that, as for a job's."""
    known = get_api_context(request)
    with preferred_wait(request) as seconds, suppress(TimeoutError):
        if not seconds:
            return
        async with timeout_while_authenticated(request, seconds), known.completion_waiter.watch(batch_id) as ended:
            while not (found := await _end_of(known.event_store, batch_id))[0]:
                await ended.wait()
                ended.clear()
            await wait_for_views(request, found[1])


async def _end_of(log: EventStore, batch_id: str) -> tuple[bool, int]:
    """Return whether a batch has ended or was deleted, and the position of its last event."""
    now = await load_stream_state(log, batch_id)
    has_ended = not isinstance(now.state, Batch) or now.state.status != "processing" or now.state.deleted
    return has_ended, now.head.position


def batch_not_found_error(batch_id: str) -> ApiError:
    """Return the answer to who asks for a batch that is not there, or that they may not see."""
    return ApiError(404, "batch_not_found", f"There is no batch {batch_id}.")
