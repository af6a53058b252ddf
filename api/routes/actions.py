"""Change, cancel, restart, pause, archive and delete jobs and batches.

An action on a batch applies to each of its jobs whose state and access control allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any, Final, get_args

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api import bulk_commands
from jobledger.api.auth.permissions import get_actor, require_access
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_json_body, read_optional_json_body, run_off_loop
from jobledger.api.http.conditional import compute_etag
from jobledger.api.http.credential_expiry import limit_while_authenticated
from jobledger.api.http.errors import ApiError, build_json_response, encode_json
from jobledger.api.http.limits import track_waiting_request
from jobledger.api.job_documents import render_jobs
from jobledger.api.openapi.operation import Operation
from jobledger.api.processes.parameter_validator import ParameterCheck
from jobledger.api.resources import BATCH, JOB, ResourceKind, load_or_404
from jobledger.api.schemas.batches import BatchActionResponse, BatchRestartBody, BatchUpdateBody, BulkActionResponse
from jobledger.api.schemas.jobs import JobActionResponse, JobRestartBody, JobUpdateBody
from jobledger.api.schemas.request_models import ReasonBody
from jobledger.api.stream_commands import LoadedStream, handle_once, load_for_change
from jobledger.api.submission.builder import (
    check_expanded_size,
    check_list_index_size,
    check_no_userinfo,
    check_parameters,
    estimate_list_index_bytes,
)
from jobledger.ledger.domain import batch as decider
from jobledger.ledger.domain import commands
from jobledger.ledger.domain.access import AccessLevel
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.errors import InvalidState
from jobledger.ledger.domain.events import AccessControl, EventMetadata, RecordedEvent
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES, JobStatus
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState, handle_command, load_stream_state
from jobledger.projections.views import jobs as jobs_view
from jobledger.projections.views.documents import fold_events

_STOP_TIMEOUT_SECONDS: Final = 30.0
_ALL_STATUSES: Final[frozenset[JobStatus]] = frozenset(get_args(JobStatus))


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
    await _check_new_parameters(request, body.parameters)
    access = AccessControl(**body.access_control.model_dump()) if body.access_control else None
    access_level = AccessLevel.WRITE if access is None else AccessLevel.ADMIN
    loaded = await load_for_change(request, JOB, access_level, content=content)
    command = commands.UpdateJob(get_actor(request), body.parameters, body.priority, body.not_before, access)
    return await _build_job_response(request, await handle_once(request, loaded, command))


async def _check_new_parameters(request: Request, parameters: dict[str, Any] | None) -> None:
    """Validate new parameters of the job in the path as at the submission, if its type is available.

    Raises:
        ApiError: As `check_parameters`; 404.
    """
    if parameters is None:
        return
    job_type = (await load_or_404(request, JOB))["job_type"]
    if (model := get_api_context(request).job_types.get(job_type)) is not None:
        await check_parameters(request, [ParameterCheck(job_type, model, parameters, ("parameters",))])
    else:
        await run_off_loop(request, check_no_userinfo, parameters, ("parameters",))


@Operation("DELETE", "/api/events/jobs/{job_id}", response=JobActionResponse, error_codes=("still_running",))
async def delete_job(request: Request) -> Response:
    """Delete a job; cancel it first if it runs.

    It is deleted when its worker has stopped it, or when the worker's lease has expired.
    """
    await _stop(request, await load_for_change(request, JOB, AccessLevel.ADMIN))
    # The cancellation may have changed the version, so If-Match is not checked again.
    loaded = await load_for_change(request, JOB, AccessLevel.ADMIN, check_if_match=False)
    return await _build_job_response(request, await handle_once(request, loaded, commands.Delete(get_actor(request))))


async def _stop(request: Request, loaded: LoadedStream) -> None:
    """Cancel a job if it is running, and wait until it has stopped.

    This takes seconds, or the time of a lease if the worker has crashed.

    Raises:
        ApiError: As `loaded.check`; 503, the job is still running after the timeout. The cancellation stands.
    """
    ctx, job_id = get_api_context(request), loaded.stream_id
    if not _is_running(loaded.stream_state):
        return
    with suppress(InvalidState):  # the job has finished meanwhile
        await handle_command(
            ctx.event_store,
            job_id,
            commands.CancelJob(get_actor(request), "to be deleted"),
            meta=EventMetadata(get_actor(request)),
            stream_state=loaded.stream_state,
            check=loaded.check,
        )
    try:
        with track_waiting_request(request.scope) as is_allowed:
            seconds = _STOP_TIMEOUT_SECONDS if is_allowed else 0
            async with limit_while_authenticated(request, seconds), ctx.finish_notifier.watch(job_id) as wake_up:
                while _is_running(await load_stream_state(ctx.event_store, job_id)):
                    await wake_up.wait()
                    wake_up.clear()
    except TimeoutError:
        message = "The job is being cancelled but is still running. Delete it again in a moment."
        raise ApiError(503, "still_running", message, retry_after_seconds=5) from None


def _is_running(current: StreamState) -> bool:
    return isinstance(current.aggregate, Job) and current.aggregate.status == "processing"


@Operation("PUT", "/api/events/batches/{batch_id}", response=BulkActionResponse, body=BatchUpdateBody)
async def update_batch(request: Request) -> Response:
    """Change the access control of a batch and its jobs."""
    body, content = await read_json_body(request, BatchUpdateBody)
    access = AccessControl(**body.access_control.model_dump())
    loaded = await load_for_change(request, BATCH, AccessLevel.ADMIN, content=content)
    spec = _get_batch(loaded).spec
    check_expanded_size(request, "access_control", access, len(spec.job_ids))
    index_size = estimate_list_index_bytes(spec.user_id, access, spec.teams)
    check_list_index_size([index_size * len(spec.job_ids)])
    command = commands.ChangeAccess(get_actor(request), access)
    events = await handle_once(request, loaded, command)
    result = await _apply_to_jobs(request, loaded, command, _ALL_STATUSES, AccessLevel.ADMIN)
    return _build_batch_response(loaded, events, result)


@Operation("DELETE", "/api/events/batches/{batch_id}", response=BulkActionResponse)
async def delete_batch(request: Request) -> Response:
    """Delete a finished batch and its jobs.

    Its jobs are deleted first, so an interrupted request can be repeated and leaves no jobs without a batch.
    """
    loaded, command = await load_for_change(request, BATCH, AccessLevel.ADMIN), commands.Delete(get_actor(request))
    decider.decide(command, _get_batch(loaded))  # rejects an unfinished batch before any of its jobs is deleted
    result = await _apply_to_jobs(request, loaded, command, _ALL_STATUSES, AccessLevel.ADMIN)
    if result.rejections:
        message = "Not all jobs could be deleted, so the batch was kept. Cancel it if jobs run, and delete it again."
        raise ApiError(409, "invalid_state", message, details=result.to_response())
    return _build_batch_response(loaded, await handle_once(request, loaded, command), result)


def _add_action(
    resource: ResourceKind,
    name: str,
    summary: str,
    command_type: Callable[..., commands.JobCommand | commands.BatchCommand],
    body_type: type[ReasonBody] = ReasonBody,
    response: type[BaseModel] = JobActionResponse,
) -> None:
    """Define the handler of `POST …/{id}/{name}`. The fields of the body are fields of the command."""

    @Operation(
        "POST",
        f"/api/events/{resource.path_segment}/{{{resource.name}_id}}/{name}",
        response=response,
        body=body_type,
        is_body_optional=True,
        error_codes=("validation_timeout",) if body_type is JobRestartBody else (),
        response_headers=("ETag",) if resource is JOB else (),
    )
    async def handle_action(request: Request) -> Response:
        body, content = await read_optional_json_body(request, body_type)
        if isinstance(body, JobRestartBody):
            await _check_new_parameters(request, body.parameters)
        loaded = await load_for_change(request, resource, content=content)
        command = command_type(get_actor(request), **body.model_dump(exclude={"only"}))
        if resource is JOB:
            return await _build_job_response(request, await handle_once(request, loaded, command))
        events, result = loaded.events, None
        if isinstance(command, commands.BatchCommand) and loaded.find_earlier() is None:
            events = await handle_once(request, loaded, command)
        if isinstance(command, commands.JobCommand):
            result = await _apply_to_jobs(request, loaded, command, _select_statuses(body, command))
        return _build_batch_response(loaded, events, result)

    handle_action.__name__ = f"{name}_{resource.name}"
    handle_action.__doc__ = summary


_add_action(JOB, "cancel", "Cancel a job.", commands.CancelJob)
_add_action(JOB, "restart", "Restart a finished job.", commands.RestartJob, JobRestartBody)
_add_action(JOB, "archive", "Archive a job.", commands.Archive)
_add_action(JOB, "unarchive", "Unarchive a job.", commands.Unarchive)
_add_action(BATCH, "pause", "Pause a batch: start no more jobs.", commands.PauseBatch, response=BatchActionResponse)
_add_action(BATCH, "resume", "Resume a paused batch.", commands.ResumeBatch, response=BatchActionResponse)
_add_action(BATCH, "cancel", "Cancel the unfinished jobs of a batch.", commands.CancelJob, response=BulkActionResponse)
_add_action(
    BATCH, "restart", "Restart finished jobs of a batch.", commands.RestartJob, BatchRestartBody, BulkActionResponse
)
_add_action(BATCH, "archive", "Archive a batch and its jobs.", commands.Archive, response=BulkActionResponse)
_add_action(BATCH, "unarchive", "Unarchive a batch and its jobs.", commands.Unarchive, response=BulkActionResponse)


def _select_statuses(body: ReasonBody, command: commands.JobCommand) -> Collection[JobStatus]:
    """Return the statuses of the jobs that an action on their batch applies to."""
    if isinstance(command, commands.CancelJob):
        return _ALL_STATUSES - TERMINAL_STATUSES
    if isinstance(body, BatchRestartBody):
        return TERMINAL_STATUSES if body.only == "all" else {body.only}
    return _ALL_STATUSES


async def _apply_to_jobs(
    request: Request,
    loaded: LoadedStream,
    command: commands.JobCommand,
    statuses: Collection[JobStatus],
    access_level: AccessLevel = AccessLevel.WRITE,
) -> bulk_commands.BulkResult:
    """Apply a command to the jobs of a batch that have one of the statuses."""
    not_found_error = ApiError(404, "job_not_found", "Job not found.")
    return await bulk_commands.apply_to_jobs(
        get_api_context(request).event_store,
        _get_batch(loaded).spec.job_ids,
        command,
        meta=loaded.meta,
        statuses=statuses,
        check=require_access(request, access_level, not_found_error=not_found_error),
        fingerprint=loaded.fingerprint,
    )


def _get_batch(loaded: LoadedStream) -> Batch:
    batch = loaded.stream_state.aggregate
    assert isinstance(batch, Batch)  # noqa: S101 - narrows the type; a batch's stream has a batch's state
    return batch


async def _build_job_response(request: Request, events: Sequence[RecordedEvent]) -> Response:
    """Return the job as it was directly after the command that caused the last of the events."""
    job_id, headers = JOB.get_id_from_path(request), {"Ledger-Position": str(events[-1].position)}
    job = fold_events(jobs_view.fold, events)
    if job is None:
        return build_json_response({"status": "success", "job_id": job_id, "job": None}, headers=headers)
    [rendered] = await render_jobs(request, [job])
    headers["ETag"] = compute_etag(encode_json(rendered), version=rendered["version"])
    return build_json_response({"status": "success", "job_id": job_id, "job": rendered}, headers=headers)


def _build_batch_response(
    loaded: LoadedStream, events: Sequence[RecordedEvent], result: bulk_commands.BulkResult | None
) -> Response:
    """Return the batch, what was done to its jobs, and the position at which the views show all of it.

    The batch is shown according to its own events. The job counts come from the views, which are behind the log.
    """
    batch_id, batch = loaded.stream_id, StreamState().apply(events).aggregate
    position = events[-1].position
    content: Document = {"status": "success", "batch_id": batch_id, "batch": None}
    if isinstance(batch, Batch) and not batch.is_deleted:
        content["batch"] = {
            "batch_id": batch_id,
            "batch_name": batch.spec.batch_name,
            "status": batch.status,
            "paused": batch.is_paused,
            "archived": batch.is_archived,
            "version": events[-1].version,
            "position": position,
        }
    if result is not None:
        content |= result.to_response()
        position = max(position, result.position)
    return build_json_response(content, headers={"Ledger-Position": str(position)})
