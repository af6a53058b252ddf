"""Change, cancel, restart, archive and delete jobs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_actor, require_access, timeout_while_authenticated
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_json_body, read_optional_json_body, run_off_loop
from jobledger.api.http.conditional import compute_etag, require_if_match
from jobledger.api.http.errors import ApiError, encode_json, json_response
from jobledger.api.http.idempotency import RequestFingerprint, build_metadata
from jobledger.api.http.limits import track_waiting_request
from jobledger.api.job_documents import render_jobs
from jobledger.api.openapi.operation import Operation
from jobledger.api.resources import JOB, load_events, load_or_404
from jobledger.api.schemas.jobs import JobActionResponse, JobRestartBody, JobUpdateBody
from jobledger.api.schemas.request_models import ReasonBody
from jobledger.api.submission.builder import check_no_userinfo, check_parameters
from jobledger.api.submission.parameters import ParameterCheck
from jobledger.ledger.domain.access import AccessLevel
from jobledger.ledger.domain.commands import Archive, CancelJob, Delete, JobCommand, RestartJob, Unarchive, UpdateJob
from jobledger.ledger.domain.errors import CommandRejected, InvalidState
from jobledger.ledger.domain.events import AccessControl, EventMetadata, RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.store.command_handler import StreamState, handle_command, load_stream_state
from jobledger.projections.engine.as_of import events_up_to
from jobledger.projections.views import jobs as view
from jobledger.projections.views.documents import fold_events

_STOP_TIMEOUT_SECONDS: Final = 30.0


@Operation(
    "PUT",
    "/api/events/jobs/{job_id}",
    response=JobActionResponse,
    body=JobUpdateBody,
    error_codes=("validation_timeout",),
    response_headers=("ETag",),
)
async def update_job(request: Request) -> Response:
    """Change a pending job, or its access control."""
    body, content = await read_json_body(request, JobUpdateBody)
    if body.parameters is not None:
        job_type = (await load_or_404(request, JOB))["job_type"]
        if (model := get_api_context(request).job_types.get(job_type)) is not None:
            await check_parameters(request, [ParameterCheck(job_type, model, body.parameters, ("parameters",))])
        else:
            await run_off_loop(request, check_no_userinfo, body.parameters, ("parameters",))
    access = AccessControl(**body.access_control.model_dump()) if body.access_control else None
    command = UpdateJob(get_actor(request), body.parameters, body.priority, body.not_before, access)
    return await _execute(request, content, command, AccessLevel.WRITE if access is None else AccessLevel.ADMIN)


@Operation(
    "POST",
    "/api/events/jobs/{job_id}/cancel",
    response=JobActionResponse,
    body=ReasonBody,
    is_body_optional=True,
    response_headers=("ETag",),
)
async def cancel_job(request: Request) -> Response:
    """Cancel a job."""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _execute(request, content, CancelJob(get_actor(request), body.reason))


@Operation(
    "POST",
    "/api/events/jobs/{job_id}/restart",
    response=JobActionResponse,
    body=JobRestartBody,
    is_body_optional=True,
    response_headers=("ETag",),
)
async def restart_job(request: Request) -> Response:
    """Restart a finished job."""
    body, content = await read_optional_json_body(request, JobRestartBody)
    return await _execute(request, content, RestartJob(get_actor(request), body.reason, body.reuse_steps))


@Operation(
    "POST",
    "/api/events/jobs/{job_id}/archive",
    response=JobActionResponse,
    body=ReasonBody,
    is_body_optional=True,
    response_headers=("ETag",),
)
async def archive_job(request: Request) -> Response:
    """Archive a job."""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _execute(request, content, Archive(get_actor(request), body.reason))


@Operation(
    "POST",
    "/api/events/jobs/{job_id}/unarchive",
    response=JobActionResponse,
    body=ReasonBody,
    is_body_optional=True,
    response_headers=("ETag",),
)
async def unarchive_job(request: Request) -> Response:
    """Unarchive a job."""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _execute(request, content, Unarchive(get_actor(request), body.reason))


@Operation("DELETE", "/api/events/jobs/{job_id}", response=JobActionResponse, error_codes=("still_running",))
async def delete_job(request: Request) -> Response:
    """Delete a job; cancel it first if it runs.

    A running job is cancelled first. It is deleted when its worker has stopped it, or when the worker's lease expired.
    """
    job_id = JOB.id_in_path(request)
    check_access = require_access(request, AccessLevel.ADMIN, not_found_error=JOB.not_found_error(job_id))
    await _stop(request, job_id, require_if_match(request, check_access))
    # The cancellation may have changed the version, so If-Match is not checked again.
    return await _execute(request, None, Delete(get_actor(request)), AccessLevel.ADMIN, check_if_match=False)


async def _stop(request: Request, job_id: str, check: Callable[[StreamState], None]) -> None:
    """Cancel a job if it is running, and wait until it has stopped.

    This takes seconds, or the time of a lease if the worker has died.

    Raises:
        ApiError: What `check` raises; 503, the job is still running after the timeout. The cancellation stands.
    """
    event_store = get_api_context(request).event_store
    current = StreamState().apply(await load_events(request, JOB, job_id))
    check(current)
    if not _is_running(current):
        return
    with suppress(InvalidState):  # the job has finished meanwhile
        await handle_command(
            event_store,
            job_id,
            CancelJob(get_actor(request), "to be deleted"),
            meta=EventMetadata(get_actor(request)),
            stream_state=current,
            check=check,
        )
    try:
        with track_waiting_request(request.scope) as allowed:
            seconds = _STOP_TIMEOUT_SECONDS if allowed else 0
            async with (
                timeout_while_authenticated(request, seconds),
                get_api_context(request).completion_waiter.watch(job_id) as completed,
            ):
                while _is_running(await load_stream_state(event_store, job_id)):
                    await completed.wait()
                    completed.clear()
    except TimeoutError:
        message = "The job is being cancelled but is still running. Delete it again in a moment."
        raise ApiError(503, "still_running", message, retry_after_seconds=5) from None


def _is_running(current: StreamState) -> bool:
    return isinstance(current.aggregate, Job) and current.aggregate.status == "processing"


async def _execute(
    request: Request,
    content: Any,
    command: JobCommand,
    access_level: AccessLevel = AccessLevel.WRITE,
    *,
    check_if_match: bool = True,
) -> Response:
    """Execute a command on the job in the path, unless the same request has done it before.

    Args:
        request: The request.
        content: Its body, which identifies a repeated request.
        command: The command.
        access_level: The access that it requires.
        check_if_match: Reject the command if `If-Match` names another version.

    Returns:
        The job as it was directly after the command.
    """
    job_id = JOB.id_in_path(request)
    fingerprint = await run_off_loop(request, RequestFingerprint.from_request, request, content)
    events = await load_events(request, JOB, job_id)
    if not events:
        raise JOB.not_found_error(job_id)
    check = require_access(request, access_level, not_found_error=JOB.not_found_error(job_id))
    last_event = fingerprint.find_in(events) if fingerprint else None
    if last_event is not None:
        check(StreamState().apply(events))
    else:
        check = require_if_match(request, check) if check_if_match else check
        last_event, events = await _append(request, events, command, check, fingerprint)
    job = fold_events(view.fold, events_up_to(events, last_event))
    headers = {"Ledger-Position": str(last_event.position)}
    if job is None:
        return json_response({"status": "success", "job_id": job_id, "job": None}, headers=headers)
    [rendered] = await render_jobs(request, [job])
    headers["ETag"] = compute_etag(encode_json(rendered), version=rendered["version"])
    return json_response({"status": "success", "job_id": job_id, "job": rendered}, headers=headers)


async def _append(
    request: Request,
    events: list[RecordedEvent],
    command: JobCommand,
    check: Callable[[StreamState], None],
    fingerprint: RequestFingerprint | None,
) -> tuple[RecordedEvent, list[RecordedEvent]]:
    """Handle a command. Return the last event of the state to respond with, and the events of the stream."""
    event_store, job_id = get_api_context(request).event_store, JOB.id_in_path(request)
    meta = build_metadata(request, fingerprint)
    try:
        result = await handle_command(
            event_store, job_id, command, meta=meta, stream_state=StreamState().apply(events), check=check
        )
    except (CommandRejected, ApiError):
        if fingerprint is None:
            raise
        current = await event_store.read_stream(job_id)
        if (earlier := fingerprint.find_in(current)) is None:
            raise
        return earlier, current  # a concurrent request with the same key was faster
    version = result.stream_state.head.version
    events = [*events, *result.events]
    if events[-1].version != version or len(events) != version:  # another process has appended events, too
        events = await event_store.read_stream(job_id)
    return next(event for event in events if event.version == version), events
