"""api: jobs. Submit, list, read, follow their history, and act on them."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import (
    can_read,
    get_actor,
    get_principal,
    require_right,
    resolve_owner,
    resolve_teams,
    timeout_while_authenticated,
    viewer_for,
)
from jobledger.api.auth.redaction import JOB_RULES, Viewer, redact_document
from jobledger.api.context import (
    ApiContext,
    check_disk_space,
    get_api_context,
    parse_query,
    wait_for_requested_position,
    wait_for_views,
)
from jobledger.api.http.bodies import read_json_body, read_optional_json_body, run_off_loop
from jobledger.api.http.conditional import build_conditional_response, compute_etag, require_if_match
from jobledger.api.http.errors import ApiError, encode_json, json_response, translate_damaged_events
from jobledger.api.http.idempotency import IdempotencyKey, get_request_marker
from jobledger.api.http.limits import track_waiting_request
from jobledger.api.http.preferences import preferred_wait, prefers_wait
from jobledger.api.schemas.requests import (
    AsOfQuery,
    JobBody,
    JobListQuery,
    JobRestartBody,
    JobUpdateBody,
    PageQuery,
    ReasonBody,
)
from jobledger.api.submission.builder import (
    build_job_submitted,
    check_no_userinfo,
    check_parameters,
    collect_signing_endpoints,
    extract_webhook_secrets,
    format_new_secrets,
    store_webhook_secrets,
)
from jobledger.api.submission.parameters import ParameterCheck
from jobledger.ledger.domain.access import AccessLevel
from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    Delete,
    JobCommand,
    RestartJob,
    SubmitJob,
    Unarchive,
    UpdateJob,
)
from jobledger.ledger.domain.errors import AlreadyExists, CommandRejected, InvalidState
from jobledger.ledger.domain.events import AccessControl, EventMetadata, RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState, handle_command, load_stream_state, new_job_id
from jobledger.ledger.store.endpoint_secrets import RevealedSecret, reveal_new_secrets
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.stream_fold import as_of_filter, events_up_to, fold_events
from jobledger.projections.views import batches, job_list, statistics
from jobledger.projections.views import jobs as view
from jobledger.projections.views.files import prefix_result_urls
from jobledger.projections.views.paging import MAX_COUNT, PageCursor

_STOP_TIMEOUT_SECONDS: Final = 30.0


async def submit_job(request: Request) -> Response:
    """POST /api/events/jobs"""
    known = get_api_context(request)
    submitted, shown_secrets = await _submit(request)
    job_id, position = submitted.stream, submitted.position
    if prefers_wait(request):
        del submitted  # it may be large, and the wait is long
        await _wait_for_end(request, job_id)
        job = await view.get(known.views, known.event_store, job_id)
        job = job or view.fold(None, (await known.event_store.read_stream(job_id, limit=1))[0])  # deleted meanwhile
    else:
        job = view.fold(None, submitted)
    return json_response(
        {
            "status": "success",
            "job_id": job_id,
            "job": await _shown_job(request, job),
            **format_new_secrets(shown_secrets),
        },
        202,
        {
            "Location": f"{known.signed_links.path_prefix}/api/events/jobs/{job_id}",
            "Ledger-Position": str(max(job["position"], position) if job else position),
        },
    )


async def _submit(request: Request) -> tuple[RecordedEvent, Sequence[RevealedSecret]]:
    """Submit the job of the body; return its first event, and secrets that were created for its webhook."""
    known = get_api_context(request)
    body, content = await read_json_body(request, JobBody)
    once = await run_off_loop(request, IdempotencyKey.from_request, request, content)
    webhook, secrets = extract_webhook_secrets(body.webhook, known)
    asked = build_job_submitted(
        body,
        known,
        user_id=(user_id := resolve_owner(request, body.user_id)),
        teams=resolve_teams(request, user_id, known.get_groups),
        webhook=webhook,
    )
    model = known.job_types[body.job_type]
    await check_parameters(request, [ParameterCheck(body.job_type, model, body.parameters, ("parameters",))])
    job_id = f"job-{once.derive_id()}" if once else new_job_id()
    if (before := await _submitted_before(known, job_id, once)) is not None:
        return before, ()
    check_disk_space(known)
    await store_webhook_secrets(known, secrets, endpoints=collect_signing_endpoints(asked))
    meta = EventMetadata(get_actor(request), request_fingerprint=get_request_marker(once))
    try:
        [submitted] = (
            await handle_command(known.event_store, job_id, SubmitJob(asked), meta=meta, stream_state=StreamState())
        ).events
    except AlreadyExists:  # by a request with the same key, in this very moment
        if (before := await _submitted_before(known, job_id, once)) is None:
            raise
        return before, ()
    return submitted, await reveal_new_secrets(known.db, collect_signing_endpoints(asked))


async def _submitted_before(known: ApiContext, job_id: str, once: IdempotencyKey | None) -> RecordedEvent | None:
    """Return the event of the same request made before, if it was.

    Raises:
        ApiError: 422, when that one asked for something else.
    """
    return once.find_in(await known.event_store.read_stream(job_id, limit=1)) if once else None


async def list_jobs(request: Request) -> Response:
    """GET /api/events/jobs"""
    return await build_job_list_response(request, parse_query(request, JobListQuery))


async def build_job_list_response(request: Request, query: JobListQuery) -> Response:
    """Return the page of jobs that is asked for."""
    await wait_for_requested_position(request)
    known = get_api_context(request)
    wanted = job_list.JobFilter(**query.model_dump(exclude={*PageQuery.model_fields, "include"}))
    selection = wanted.build_query(get_principal(request))
    found, following = await job_list.find_page(
        known.views,
        selection,
        limit=query.limit,
        skip=query.skip,
        after=query.cursor,
        newest_first=query.newest_first,
        include=query.include or (),
    )
    total, bounded = await _total(request, wanted, selection)
    content: dict[str, Any] = {"status": "success", "total": total, "jobs": await _shown_jobs(request, found)}
    if bounded:
        content["total_is_lower_bound"] = True
    return json_response(content | encode_next_cursor(following))


def encode_next_cursor(following: PageCursor | None) -> dict[str, str]:
    """Return the cursor of the next page, if there is one."""
    if following is None:
        return {}
    text = f"{round(following.created_at.timestamp() * 1000)} {following.key}"
    return {"next_cursor": urlsafe_b64encode(text.encode()).decode()}


async def _total(request: Request, wanted: job_list.JobFilter, query: Document) -> tuple[int, bool]:
    """Return how many jobs there are and whether there may be more: from counters where they know it."""
    views = get_api_context(request).views
    if get_principal(request).is_admin:
        if wanted == job_list.JobFilter(status=wanted.status, track=wanted.track):
            return await statistics.count_jobs(views, status=wanted.status, track=wanted.track), False
        if wanted.batch_id is not None and wanted == job_list.JobFilter(status=wanted.status, batch_id=wanted.batch_id):
            return await batches.count_jobs(views, wanted.batch_id, status=wanted.status), False
    total = await job_list.count(views, query)
    return total, total >= MAX_COUNT


async def get_job(request: Request) -> Response:
    """GET /api/events/jobs/{job_id}"""
    await wait_for_requested_position(request)
    asked = parse_query(request, AsOfQuery)
    if (
        asked.as_of is None
        and prefers_wait(request)
        and (await load_job_or_404(request))["status"] not in TERMINAL_STATUSES
    ):
        await _wait_for_end(request, request.path_params["job_id"])
    job = await load_job_or_404(request)
    viewer = viewer_for(request, job)  # by the access of today, also of the job as it was
    if asked.as_of is None:
        paused = await _paused(request, [job])
    else:
        job = await _as_of(request, job["job_id"], asked.as_of)
        paused = await _paused_then(request, job, asked.as_of)
    return build_conditional_response(request, "job", _as_shown(request, job, viewer, paused))


async def _as_of(request: Request, job_id: str, then: int | datetime) -> Document:
    """Return the job as it was at a position of the log or at a moment.

    Raises:
        ApiError: 404, when it was not there then; 409, when it cannot be read.
    """
    events = await get_api_context(request).event_store.read_stream(job_id)
    with translate_damaged_events(job_id):
        job = fold_events(view.fold, filter(as_of_filter(then), events))
    if job is None:
        raise ApiError(404, "job_not_found", f"There was no job {job_id} then.")
    return job


async def _wait_for_end(request: Request, job_id: str) -> None:
    """Wait for the job's end if the caller prefers that.

    The views show the end then, unless the time is over: a read of the job, its files or a list agrees with them.
    """
    known = get_api_context(request)
    with preferred_wait(request) as seconds, suppress(TimeoutError):
        if not seconds:
            return
        async with timeout_while_authenticated(request, seconds), known.completion_waiter.watch(job_id) as ended:
            while not (found := await _end_of(known.event_store, job_id))[0]:
                await ended.wait()
                ended.clear()
            await wait_for_views(request, found[1])


async def _end_of(log: EventStore, job_id: str) -> tuple[bool, int]:
    """Return whether a job has ended or was deleted, and the position of its last event."""
    job = fold_events(view.fold, events := await log.read_stream(job_id))
    return job is None or job["status"] in TERMINAL_STATUSES, events[-1].position if events else 0


async def load_job_or_404(request: Request) -> Document:
    """Return the job that the path names.

    Raises:
        ApiError: 404.
    """
    known, job_id = get_api_context(request), request.path_params["job_id"]
    job = await view.get(known.views, known.event_store, job_id) if job_id.startswith("job-") else None
    if job is None or not can_read(request, job):
        raise job_not_found_error(job_id)
    return job


def job_not_found_error(job_id: str) -> ApiError:
    """Return the answer to who asks for a job that is not there, or that they may not see."""
    return ApiError(404, "job_not_found", f"There is no job {job_id}.")


async def update_job(request: Request) -> Response:
    """PUT /api/events/jobs/{job_id}"""
    body, content = await read_json_body(request, JobUpdateBody)
    if body.parameters is not None:
        job_type = (await load_job_or_404(request))["job_type"]
        if (model := get_api_context(request).job_types.get(job_type)) is not None:
            await check_parameters(request, [ParameterCheck(job_type, model, body.parameters, ("parameters",))])
        else:
            await run_off_loop(request, check_no_userinfo, body.parameters, ("parameters",))
    access = AccessControl(**body.access_control.model_dump()) if body.access_control else None
    command = UpdateJob(get_actor(request), body.parameters, body.priority, body.not_before, access)
    return await _act(request, content, command, AccessLevel.WRITE if access is None else AccessLevel.ADMIN)


async def cancel_job(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/cancel"""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _act(request, content, CancelJob(get_actor(request), body.reason))


async def restart_job(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/restart"""
    body, content = await read_optional_json_body(request, JobRestartBody)
    return await _act(request, content, RestartJob(get_actor(request), body.reason, body.reuse_steps))


async def archive_job(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/archive"""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _act(request, content, Archive(get_actor(request), body.reason))


async def unarchive_job(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/unarchive"""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _act(request, content, Unarchive(get_actor(request), body.reason))


async def delete_job(request: Request) -> Response:
    """DELETE /api/events/jobs/{job_id}

    One that is running is cancelled first; it is removed once its worker has let go of it, or has been given up.
    """
    job_id = request.path_params["job_id"]
    check = require_if_match(
        request, require_right(request, AccessLevel.ADMIN, not_found_error=job_not_found_error(job_id))
    )
    await _stop(request, job_id, check)
    return await _act(request, None, Delete(get_actor(request)), AccessLevel.ADMIN, expected_seen=True)


async def _stop(request: Request, job_id: str, check: Callable[[StreamState], None]) -> None:
    """Cancel a job if it is running, and wait until it has stopped: seconds, or a lease if its worker has died.

    Raises:
        ApiError: what `check` says; 503, when it has not stopped within half a minute: the cancellation stands.
    """
    log = get_api_context(request).event_store
    known = StreamState().apply(await log.read_stream(job_id) if job_id.startswith("job-") else [])
    check(known)
    if not isinstance(known.state, Job) or known.state.status != "processing":
        return
    with suppress(InvalidState):  # it has ended meanwhile
        command = CancelJob(get_actor(request), "to be deleted")
        await handle_command(
            log, job_id, command, meta=EventMetadata(get_actor(request)), stream_state=known, check=check
        )
    try:
        with track_waiting_request(request.scope) as allowed:
            seconds = _STOP_TIMEOUT_SECONDS if allowed else 0
            async with (
                timeout_while_authenticated(request, seconds),
                get_api_context(request).completion_waiter.watch(job_id) as ended,
            ):
                while (
                    isinstance(now := (await load_stream_state(log, job_id)).state, Job) and now.status == "processing"
                ):
                    await ended.wait()
                    ended.clear()
    except TimeoutError:
        message = "The job is being cancelled, but still running. Delete it again in a moment."
        raise ApiError(503, "still_running", message, retry_after_seconds=5) from None


async def _act(
    request: Request,
    content: Any,
    command: JobCommand,
    right: AccessLevel = AccessLevel.WRITE,
    *,
    expected_seen: bool = False,
) -> Response:
    """Have a command decided, and answer with the job as it is then. `expected_seen`: If-Match was looked at before."""
    known, job_id = get_api_context(request), request.path_params["job_id"]
    once = await run_off_loop(request, IdempotencyKey.from_request, request, content)
    events = await known.event_store.read_stream(job_id) if job_id.startswith("job-") else []
    if not events:
        raise job_not_found_error(job_id)
    allowed = require_right(request, right, not_found_error=job_not_found_error(job_id))
    if (done := once.find_in(events) if once else None) is not None:
        allowed(StreamState().apply(events))
    else:
        check = allowed if expected_seen else require_if_match(request, allowed)
        done, events = await _done(request, events, command, check, once)
    job = await _shown_job(request, fold_events(view.fold, events_up_to(events, done)))
    answer = {"status": "success", "job_id": job_id, "job": job}
    headers = {"Ledger-Position": str(done.position)}
    if job is not None:
        headers["ETag"] = compute_etag(encode_json(job), version=job["version"])
    return json_response(answer, headers=headers)


async def _done(
    request: Request,
    events: list[RecordedEvent],
    command: JobCommand,
    check: Callable[[StreamState], None],
    once: IdempotencyKey | None,
) -> tuple[RecordedEvent, list[RecordedEvent]]:
    """Have a command decided; return the last event of the stream that it is answered with, and the stream."""
    log, job_id = get_api_context(request).event_store, request.path_params["job_id"]
    meta = EventMetadata(get_actor(request), request_fingerprint=get_request_marker(once))
    try:
        handled = await handle_command(
            log, job_id, command, meta=meta, stream_state=StreamState().apply(events), check=check
        )
    except (CommandRejected, ApiError):
        again = await log.read_stream(job_id) if once else []
        done = once.find_in(again) if once else None
        if done is None:
            raise
        return done, again  # the same request was quicker by another way
    events = [*events, *handled.events]
    if (
        events[-1].version != handled.stream_state.head.version or len(events) != events[-1].version
    ):  # others wrote, too
        events = await log.read_stream(job_id)
    return next(event for event in events if event.version == handled.stream_state.head.version), events


async def _shown_jobs(request: Request, jobs: Sequence[Document]) -> list[Document]:
    """Return jobs as the caller sees them."""
    paused = await _paused(request, jobs)
    return [_as_shown(request, job, viewer_for(request, job), paused) for job in jobs]


async def _shown_job(request: Request, job: Document | None) -> Document | None:
    """Return a job as the caller sees it."""
    return None if job is None else (await _shown_jobs(request, [job]))[0]


def _as_shown(request: Request, job: Document, viewer: Viewer, paused: Collection[str]) -> Document:
    """Return a job as `viewer` sees it. It is `paused` while it waits because its batch is one of those paused."""
    document = redact_document(job, JOB_RULES, viewer)
    if results := document.get("results"):
        document["results"] = prefix_result_urls(get_api_context(request).signed_links.path_prefix, results)
    return {**document, "paused": job["status"] == "pending" and job["batch_id"] in paused}


async def _paused(request: Request, jobs: Sequence[Document]) -> set[str]:
    """Return the batches of waiting jobs that are paused."""
    waiting = {job["batch_id"] for job in jobs if job["status"] == "pending"} - {None}
    return await batches.find_paused(get_api_context(request).views, waiting) if waiting else set()


async def _paused_then(request: Request, job: Document, then: int | datetime) -> set[str]:
    """Return the batch of a waiting job if it was paused at a position of the log or at a moment."""
    batch_id = job["batch_id"]
    if job["status"] != "pending" or batch_id is None:
        return set()
    events = await get_api_context(request).event_store.read_stream(batch_id)
    batch = fold_events(batches.fold, filter(as_of_filter(then), events))
    return {batch_id} if batch is not None and batch["paused"] else set()
