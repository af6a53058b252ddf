"""Pause, resume, change, cancel, restart, archive and delete batches.

An action on a batch applies to each of its jobs whose state and access control allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, get_args

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api import bulk_commands
from jobledger.api.auth.permissions import get_actor, require_access
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_json_body, read_optional_json_body
from jobledger.api.http.conditional import require_if_match
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.idempotency import RequestFingerprint, build_metadata
from jobledger.api.openapi.operation import Operation
from jobledger.api.resources import BATCH, load_events
from jobledger.api.schemas.batches import BatchActionResponse, BatchRestartBody, BatchUpdateBody, BulkActionResponse
from jobledger.api.schemas.request_models import ReasonBody
from jobledger.api.submission.batches import check_expanded_size, check_list_index_size, estimate_list_index_bytes
from jobledger.ledger.domain import batch as decider
from jobledger.ledger.domain.access import AccessLevel
from jobledger.ledger.domain.batch import Batch
from jobledger.ledger.domain.commands import (
    Archive,
    BatchCommand,
    CancelJob,
    ChangeAccess,
    Delete,
    JobCommand,
    PauseBatch,
    RestartJob,
    ResumeBatch,
    Unarchive,
)
from jobledger.ledger.domain.events import AccessControl, EventMetadata, RecordedEvent
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES, JobStatus
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState, handle_command

_ALL_STATUSES: Final[frozenset[JobStatus]] = frozenset(get_args(JobStatus))


@Operation(
    "POST", "/api/events/batches/{batch_id}/pause", response=BatchActionResponse, body=ReasonBody, is_body_optional=True
)
async def pause_batch(request: Request) -> Response:
    """Pause a batch: start no more jobs."""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _execute_once(request, content, PauseBatch(get_actor(request), body.reason))


@Operation(
    "POST",
    "/api/events/batches/{batch_id}/resume",
    response=BatchActionResponse,
    body=ReasonBody,
    is_body_optional=True,
)
async def resume_batch(request: Request) -> Response:
    """Resume a paused batch."""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _execute_once(request, content, ResumeBatch(get_actor(request), body.reason))


@Operation(
    "POST", "/api/events/batches/{batch_id}/cancel", response=BulkActionResponse, body=ReasonBody, is_body_optional=True
)
async def cancel_batch(request: Request) -> Response:
    """Cancel the unfinished jobs of a batch."""
    body, content = await read_optional_json_body(request, ReasonBody)
    command = CancelJob(get_actor(request), body.reason)
    return await _execute_for_jobs(request, content, command, _ALL_STATUSES - TERMINAL_STATUSES)


@Operation(
    "POST",
    "/api/events/batches/{batch_id}/restart",
    response=BulkActionResponse,
    body=BatchRestartBody,
    is_body_optional=True,
)
async def restart_batch(request: Request) -> Response:
    """Restart finished jobs of a batch."""
    body, content = await read_optional_json_body(request, BatchRestartBody)
    command = RestartJob(get_actor(request), body.reason, body.reuse_steps)
    statuses: Collection[JobStatus] = TERMINAL_STATUSES if body.only == "all" else {body.only}
    return await _execute_for_jobs(request, content, command, statuses)


@Operation(
    "POST",
    "/api/events/batches/{batch_id}/archive",
    response=BulkActionResponse,
    body=ReasonBody,
    is_body_optional=True,
)
async def archive_batch(request: Request) -> Response:
    """Archive a batch and its jobs."""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _execute_once(request, content, command := Archive(get_actor(request), body.reason), command)


@Operation(
    "POST",
    "/api/events/batches/{batch_id}/unarchive",
    response=BulkActionResponse,
    body=ReasonBody,
    is_body_optional=True,
)
async def unarchive_batch(request: Request) -> Response:
    """Unarchive a batch and its jobs."""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _execute_once(request, content, command := Unarchive(get_actor(request), body.reason), command)


@Operation("PUT", "/api/events/batches/{batch_id}", response=BulkActionResponse, body=BatchUpdateBody)
async def update_batch(request: Request) -> Response:
    """Change the access control of a batch and its jobs."""
    body, _ = await read_json_body(request, BatchUpdateBody)
    access = AccessControl(**body.access_control.model_dump())
    loaded = await _load_batch_state(request, AccessLevel.ADMIN)
    spec = loaded.batch.spec
    check_expanded_size(request, "access_control", access, len(spec.job_ids))
    check_list_index_size(estimate_list_index_bytes(spec.user_id, access, spec.teams) * len(spec.job_ids))
    command = ChangeAccess(get_actor(request), access)
    state = await _handle(request, loaded, command)
    result = await _apply_to_jobs(request, loaded, command, _ALL_STATUSES, AccessLevel.ADMIN)
    return _build_response(loaded.batch_id, state, result)


@Operation("DELETE", "/api/events/batches/{batch_id}", response=BulkActionResponse)
async def delete_batch(request: Request) -> Response:
    """Delete a finished batch and its jobs.

    Its jobs are deleted first, so an interrupted request can be repeated and leaves no jobs without a batch.
    """
    loaded, command = await _load_batch_state(request, AccessLevel.ADMIN), Delete(get_actor(request))
    decider.decide(command, loaded.batch)  # rejects an unfinished batch before any of its jobs is deleted
    result = await _apply_to_jobs(request, loaded, command, _ALL_STATUSES, AccessLevel.ADMIN)
    if result.rejections:
        message = "Not all jobs could be deleted, so the batch was kept. Cancel the batch and delete it again."
        raise ApiError(409, "invalid_state", message, details=result.to_response())
    state = await _handle(request, loaded, command)
    return _build_response(loaded.batch_id, state, result)


@dataclass(frozen=True, slots=True)
class _LoadedBatch:
    """The batch in the path, as the log has it, and the check that each command must pass."""

    batch_id: str
    stream_state: StreamState
    batch: Batch
    events: list[RecordedEvent]
    check: Callable[[StreamState], None]


async def _load_batch_state(request: Request, access_level: AccessLevel = AccessLevel.WRITE) -> _LoadedBatch:
    """Load the batch in the path, and check the caller's access and If-Match.

    Raises:
        ApiError: 401, 403, 404, 412.
    """
    batch_id = BATCH.id_in_path(request)
    events = await load_events(request, BATCH, batch_id)
    state = StreamState().apply(events)
    check = require_if_match(
        request, require_access(request, access_level, not_found_error=BATCH.not_found_error(batch_id))
    )
    check(state)
    assert isinstance(state.aggregate, Batch)  # noqa: S101 - narrows the type; a batch's stream has a batch's state
    return _LoadedBatch(batch_id, state, state.aggregate, events, check)


async def _execute_once(
    request: Request, content: Any, command: BatchCommand, job_command: JobCommand | None = None
) -> Response:
    """Handle a command of the batch, unless the same request has done it before, then `job_command` for each job."""
    loaded, fingerprint = await _load_batch_state(request), RequestFingerprint.from_request(request, content)
    if fingerprint is not None and fingerprint.find_in(loaded.events) is not None:
        state = loaded.stream_state
    else:
        state = await _handle(request, loaded, command, fingerprint)
    if job_command is None:
        return _build_response(loaded.batch_id, state)
    result = await _apply_to_jobs(request, loaded, job_command, _ALL_STATUSES, fingerprint=fingerprint)
    return _build_response(loaded.batch_id, state, result)


async def _execute_for_jobs(
    request: Request, content: Any, command: JobCommand, statuses: Collection[JobStatus]
) -> Response:
    """Handle a command for each job of the batch that has one of the statuses."""
    fingerprint = RequestFingerprint.from_request(request, content)
    loaded = await _load_batch_state(request)
    result = await _apply_to_jobs(request, loaded, command, statuses, fingerprint=fingerprint)
    return _build_response(loaded.batch_id, loaded.stream_state, result)


async def _handle(
    request: Request, loaded: _LoadedBatch, command: BatchCommand, fingerprint: RequestFingerprint | None = None
) -> StreamState:
    """Handle a command of the batch itself. Return the state after it."""
    result = await handle_command(
        get_api_context(request).event_store,
        loaded.batch_id,
        command,
        meta=_build_metadata(request, loaded, fingerprint),
        stream_state=loaded.stream_state,
        check=loaded.check,
    )
    return result.stream_state


async def _apply_to_jobs(
    request: Request,
    loaded: _LoadedBatch,
    command: JobCommand,
    statuses: Collection[JobStatus],
    access_level: AccessLevel = AccessLevel.WRITE,
    fingerprint: RequestFingerprint | None = None,
) -> bulk_commands.BulkResult:
    not_found = ApiError(404, "job_not_found", "Job not found.")
    return await bulk_commands.apply_to_jobs(
        get_api_context(request).event_store,
        loaded.batch.spec.job_ids,
        command,
        meta=_build_metadata(request, loaded, fingerprint),
        statuses=statuses,
        check=require_access(request, access_level, not_found_error=not_found),
        fingerprint=fingerprint,
    )


def _build_metadata(request: Request, loaded: _LoadedBatch, fingerprint: RequestFingerprint | None) -> EventMetadata:
    return build_metadata(request, fingerprint, loaded.batch_id)


def _build_response(batch_id: str, current: StreamState, result: bulk_commands.BulkResult | None = None) -> Response:
    """Return the batch, what was done to its jobs, and the position at which the views show all of it."""
    content = {"status": "success", "batch_id": batch_id, "batch": _render_state(batch_id, current)}
    position = current.head.position
    if result is not None:
        content |= result.to_response()
        position = max(position, result.position)
    return json_response(content, headers={"Ledger-Position": str(position)})


def _render_state(batch_id: str, current: StreamState) -> Document | None:
    """Return the batch according to its own events. The job counts come from the views, which are behind the log."""
    batch = current.aggregate
    if not isinstance(batch, Batch) or batch.is_deleted:
        return None
    return {
        "batch_id": batch_id,
        "batch_name": batch.spec.batch_name,
        "status": batch.status,
        "paused": batch.is_paused,
        "archived": batch.is_archived,
        "version": current.head.version,
        "position": current.head.position,
    }
