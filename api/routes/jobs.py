"""api: jobs. Submit, list, read, follow their history, and act on them."""

from __future__ import annotations

from base64 import urlsafe_b64encode
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.disclosure import JOB, Viewer, shown
from jobledger.api.auth.permissions import (
    actor,
    for_user,
    may_see,
    requires,
    teams_of,
    viewer_of,
    while_signed_in,
    who_asks,
)
from jobledger.api.context import (
    Services,
    query_of,
    refuse_without_space,
    services,
    views_reach_wanted_position,
    views_show,
)
from jobledger.api.http.bodies import off_loop, optional_body, read_body
from jobledger.api.http.conditional import etag_of, unless_known
from jobledger.api.http.errors import ApiError, json_response, json_text
from jobledger.api.http.middleware import held
from jobledger.api.http.preconditions import (
    Once,
    expecting,
    folded,
    happened_by,
    noted,
    preferred_wait,
    prefers_wait,
    readable_past,
    story_until,
)
from jobledger.api.schemas.requests import JobBody, JobList, Page, ReasonBody, RestartBody, Single, UpdateBody
from jobledger.api.submission.build import (
    check_parameters,
    endpoints_of,
    keep,
    refuse_userinfo,
    split_webhook,
    submission,
    webhook_secrets,
)
from jobledger.api.submission.parameters import Check
from jobledger.ledger.domain.access import Right
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
from jobledger.ledger.domain.errors import AlreadyExists, CommandRefused, WrongState
from jobledger.ledger.domain.events import ENDED, AccessControl, Meta, Recorded
from jobledger.ledger.domain.job import Job
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import Known, handle, load, new_job_id
from jobledger.ledger.store.endpoint_secrets import ShownSecret, take_unshown
from jobledger.ledger.store.event_store import EventLog
from jobledger.projections.views import batches, statistics
from jobledger.projections.views import jobs as view
from jobledger.projections.views.files import results_behind
from jobledger.projections.views.list_index import Place

_STOP_SECONDS: Final = 30.0


async def submit(request: Request) -> Response:
    """POST /api/events/jobs"""
    known = services(request)
    submitted, shown_secrets = await _submit(request)
    job_id, position = submitted.stream, submitted.position
    if prefers_wait(request):
        del submitted  # it may be large, and the wait is long
        await _wait_for_end(request, job_id)
        job = await view.get(known.views, known.log, job_id)
        job = job or view.fold(None, (await known.log.read_stream(job_id, limit=1))[0])  # deleted meanwhile
    else:
        job = view.fold(None, submitted)
    return json_response(
        {
            "status": "success",
            "job_id": job_id,
            "job": await _shown_job(request, job),
            **webhook_secrets(shown_secrets),
        },
        202,
        {
            "Location": f"{known.links.prefix}/api/events/jobs/{job_id}",
            "Ledger-Position": str(max(job["position"], position) if job else position),
        },
    )


async def _submit(request: Request) -> tuple[Recorded, Sequence[ShownSecret]]:
    """Submit the job of the body; return its first event, and secrets that were created for its webhook."""
    known = services(request)
    body, content = await read_body(request, JobBody)
    once = await off_loop(request, Once.of, request, content)
    webhook, secrets = split_webhook(body.webhook, known)
    asked = submission(
        body,
        known,
        user_id=(user_id := for_user(request, body.user_id)),
        teams=teams_of(request, user_id, known.groups_of),
        webhook=webhook,
    )
    model = known.job_types[body.job_type]
    await check_parameters(request, [Check(body.job_type, model, body.parameters, ("parameters",))])
    job_id = f"job-{once.name()}" if once else new_job_id()
    if (before := await _submitted_before(known, job_id, once)) is not None:
        return before, ()
    refuse_without_space(known)
    await keep(known, secrets, endpoints=endpoints_of(asked))
    meta = Meta(actor(request), request=noted(once))
    try:
        [submitted] = (await handle(known.log, job_id, SubmitJob(asked), meta=meta, known=Known())).events
    except AlreadyExists:  # by a request with the same key, in this very moment
        if (before := await _submitted_before(known, job_id, once)) is None:
            raise
        return before, ()
    return submitted, await take_unshown(known.db, endpoints_of(asked))


async def _submitted_before(known: Services, job_id: str, once: Once | None) -> Recorded | None:
    """Return the event of the same request made before, if it was.

    Raises:
        ApiError: 422, when that one asked for something else.
    """
    return once.found_in(await known.log.read_stream(job_id, limit=1)) if once else None


async def listing(request: Request) -> Response:
    """GET /api/events/jobs"""
    return await listed(request, query_of(request, JobList))


async def listed(request: Request, asked: JobList) -> Response:
    """Return the page of jobs that is asked for."""
    await views_reach_wanted_position(request)
    known = services(request)
    wanted = view.Filter(**asked.model_dump(exclude={*Page.model_fields, "include"}))
    query = wanted.query(who_asks(request))
    found, following = await view.page(
        known.views,
        query,
        limit=asked.limit,
        skip=asked.skip,
        after=asked.cursor,
        newest_first=asked.newest_first,
        included=asked.include or (),
    )
    total, bounded = await _total(request, wanted, query)
    content: dict[str, Any] = {"status": "success", "total": total, "jobs": await _shown_jobs(request, found)}
    if bounded:
        content["total_is_lower_bound"] = True
    return json_response(content | going_on(following))


def going_on(following: Place | None) -> dict[str, str]:
    """Return the cursor of the next page, if there is one."""
    if following is None:
        return {}
    text = f"{round(following.created_at.timestamp() * 1000)} {following.key}"
    return {"next": urlsafe_b64encode(text.encode()).decode()}


async def _total(request: Request, wanted: view.Filter, query: Document) -> tuple[int, bool]:
    """Return how many jobs there are and whether there may be more: from counters where they know it."""
    views = services(request).views
    if who_asks(request).sees_everything:
        if wanted == view.Filter(status=wanted.status, track=wanted.track):
            return await statistics.jobs_counted(views, status=wanted.status, track=wanted.track), False
        if wanted.batch_id is not None and wanted == view.Filter(status=wanted.status, batch_id=wanted.batch_id):
            return await batches.jobs_counted(views, wanted.batch_id, status=wanted.status), False
    total = await view.count(views, query)
    return total, total >= view.COUNTED_UP_TO


async def single(request: Request) -> Response:
    """GET /api/events/jobs/{job_id}"""
    await views_reach_wanted_position(request)
    asked = query_of(request, Single)
    if asked.as_of is None and prefers_wait(request) and (await existing(request))["status"] not in ENDED:
        await _wait_for_end(request, request.path_params["job_id"])
    job = await existing(request)
    viewer = viewer_of(request, job)  # by the access of today, also of the job as it was
    if asked.as_of is None:
        paused = await _paused(request, [job])
    else:
        job = await _as_of(request, job["job_id"], asked.as_of)
        paused = await _paused_then(request, job, asked.as_of)
    return unless_known(request, "job", _as_shown(request, job, viewer, paused))


async def _as_of(request: Request, job_id: str, then: int | datetime) -> Document:
    """Return the job as it was at a position of the log or at a moment.

    Raises:
        ApiError: 404, when it was not there then; 409, when it cannot be read.
    """
    events = await services(request).log.read_stream(job_id)
    with readable_past(job_id):
        job = folded(view.fold, filter(happened_by(then), events))
    if job is None:
        raise ApiError(404, "job_not_found", f"There was no job {job_id} then.")
    return job


async def _wait_for_end(request: Request, job_id: str) -> None:
    """Wait for the job's end if the caller prefers that.

    The views show the end then, unless the time is over: a read of the job, its files or a list agrees with them.
    """
    known = services(request)
    with preferred_wait(request) as seconds, suppress(TimeoutError):
        if not seconds:
            return
        async with while_signed_in(request, seconds), known.endings.watching(job_id) as ended:
            while not (found := await _end_of(known.log, job_id))[0]:
                await ended.wait()
                ended.clear()
            await views_show(request, found[1])


async def _end_of(log: EventLog, job_id: str) -> tuple[bool, int]:
    """Return whether a job has ended or was deleted, and the position of its last event."""
    job = folded(view.fold, events := await log.read_stream(job_id))
    return job is None or job["status"] in ENDED, events[-1].position if events else 0


async def existing(request: Request) -> Document:
    """Return the job that the path names.

    Raises:
        ApiError: 404.
    """
    known, job_id = services(request), request.path_params["job_id"]
    job = await view.get(known.views, known.log, job_id) if job_id.startswith("job-") else None
    if job is None or not may_see(request, job):
        raise not_found(job_id)
    return job


def not_found(job_id: str) -> ApiError:
    """Return the answer to who asks for a job that is not there, or that they may not see."""
    return ApiError(404, "job_not_found", f"There is no job {job_id}.")


async def update(request: Request) -> Response:
    """PUT /api/events/jobs/{job_id}"""
    body, content = await read_body(request, UpdateBody)
    if body.parameters is not None:
        job_type = (await existing(request))["job_type"]
        if (model := services(request).job_types.get(job_type)) is not None:
            await check_parameters(request, [Check(job_type, model, body.parameters, ("parameters",))])
        else:
            await off_loop(request, refuse_userinfo, body.parameters, ("parameters",))
    access = AccessControl(**body.access_control.model_dump()) if body.access_control else None
    command = UpdateJob(actor(request), body.parameters, body.priority, body.not_before, access)
    return await _act(request, content, command, Right.WRITE if access is None else Right.ADMIN)


async def cancel(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/cancel"""
    body, content = await optional_body(request, ReasonBody)
    return await _act(request, content, CancelJob(actor(request), body.reason))


async def restart(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/restart"""
    body, content = await optional_body(request, RestartBody)
    return await _act(request, content, RestartJob(actor(request), body.reason, body.reuse_steps))


async def archive(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/archive"""
    body, content = await optional_body(request, ReasonBody)
    return await _act(request, content, Archive(actor(request), body.reason))


async def unarchive(request: Request) -> Response:
    """POST /api/events/jobs/{job_id}/unarchive"""
    body, content = await optional_body(request, ReasonBody)
    return await _act(request, content, Unarchive(actor(request), body.reason))


async def delete(request: Request) -> Response:
    """DELETE /api/events/jobs/{job_id}

    One that is running is cancelled first; it is removed once its worker has let go of it, or has been given up.
    """
    job_id = request.path_params["job_id"]
    check = expecting(request, requires(request, Right.ADMIN, missing=not_found(job_id)))
    await _stop(request, job_id, check)
    return await _act(request, None, Delete(actor(request)), Right.ADMIN, expected_seen=True)


async def _stop(request: Request, job_id: str, check: Callable[[Known], None]) -> None:
    """Cancel a job if it is running, and wait until it has stopped: seconds, or a lease if its worker has died.

    Raises:
        ApiError: what `check` says; 503, when it has not stopped within half a minute: the cancellation stands.
    """
    log = services(request).log
    known = Known().after(await log.read_stream(job_id) if job_id.startswith("job-") else [])
    check(known)
    if not isinstance(known.state, Job) or known.state.status != "processing":
        return
    with suppress(WrongState):  # it has ended meanwhile
        command = CancelJob(actor(request), "to be deleted")
        await handle(log, job_id, command, meta=Meta(actor(request)), known=known, check=check)
    try:
        with held(request.scope) as allowed:
            seconds = _STOP_SECONDS if allowed else 0
            async with while_signed_in(request, seconds), services(request).endings.watching(job_id) as ended:
                while isinstance(now := (await load(log, job_id)).state, Job) and now.status == "processing":
                    await ended.wait()
                    ended.clear()
    except TimeoutError:
        message = "The job is being cancelled, but still running. Delete it again in a moment."
        raise ApiError(503, "still_running", message, retry_after_seconds=5) from None


async def _act(
    request: Request,
    content: Any,
    command: JobCommand,
    right: Right = Right.WRITE,
    *,
    expected_seen: bool = False,
) -> Response:
    """Have a command decided, and answer with the job as it is then. `expected_seen`: If-Match was looked at before."""
    known, job_id = services(request), request.path_params["job_id"]
    once = await off_loop(request, Once.of, request, content)
    events = await known.log.read_stream(job_id) if job_id.startswith("job-") else []
    if not events:
        raise not_found(job_id)
    allowed = requires(request, right, missing=not_found(job_id))
    if (done := once.found_in(events) if once else None) is not None:
        allowed(Known().after(events))
    else:
        check = allowed if expected_seen else expecting(request, allowed)
        done, events = await _done(request, events, command, check, once)
    job = await _shown_job(request, folded(view.fold, story_until(events, done)))
    answer = {"status": "success", "job_id": job_id, "job": job}
    headers = {"Ledger-Position": str(done.position)}
    if job is not None:
        headers["ETag"] = etag_of(job, json_text(job))
    return json_response(answer, headers=headers)


async def _done(
    request: Request,
    events: list[Recorded],
    command: JobCommand,
    check: Callable[[Known], None],
    once: Once | None,
) -> tuple[Recorded, list[Recorded]]:
    """Have a command decided; return the last event of the stream that it is answered with, and the stream."""
    log, job_id = services(request).log, request.path_params["job_id"]
    meta = Meta(actor(request), request=noted(once))
    try:
        handled = await handle(log, job_id, command, meta=meta, known=Known().after(events), check=check)
    except (CommandRefused, ApiError):
        again = await log.read_stream(job_id) if once else []
        done = once.found_in(again) if once else None
        if done is None:
            raise
        return done, again  # the same request was quicker by another way
    events = [*events, *handled.events]
    if events[-1].version != handled.known.head.version or len(events) != events[-1].version:  # others wrote, too
        events = await log.read_stream(job_id)
    return next(event for event in events if event.version == handled.known.head.version), events


async def _shown_jobs(request: Request, jobs: Sequence[Document]) -> list[Document]:
    """Return jobs as the caller sees them."""
    paused = await _paused(request, jobs)
    return [_as_shown(request, job, viewer_of(request, job), paused) for job in jobs]


async def _shown_job(request: Request, job: Document | None) -> Document | None:
    """Return a job as the caller sees it."""
    return None if job is None else (await _shown_jobs(request, [job]))[0]


def _as_shown(request: Request, job: Document, viewer: Viewer, paused: Collection[str]) -> Document:
    """Return a job as `viewer` sees it. It is `paused` while it waits because its batch is one of those paused."""
    document = shown(job, JOB, viewer)
    if results := document.get("results"):
        document["results"] = results_behind(services(request).links.prefix, results)
    return {**document, "paused": job["status"] == "pending" and job["batch_id"] in paused}


async def _paused(request: Request, jobs: Sequence[Document]) -> set[str]:
    """Return the batches of waiting jobs that are paused."""
    waiting = {job["batch_id"] for job in jobs if job["status"] == "pending"} - {None}
    return await batches.paused_among(services(request).views, waiting) if waiting else set()


async def _paused_then(request: Request, job: Document, then: int | datetime) -> set[str]:
    """Return the batch of a waiting job if it was paused at a position of the log or at a moment."""
    batch_id = job["batch_id"]
    if job["status"] != "pending" or batch_id is None:
        return set()
    events = await services(request).log.read_stream(batch_id)
    batch = folded(batches.fold, filter(happened_by(then), events))
    return {batch_id} if batch is not None and batch["paused"] else set()
