"""api: what is done to a whole batch is done to each of its jobs, as far as the rules and the rights let it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, get_args

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api import bulk_commands
from jobledger.api.auth.permissions import get_actor, require_right
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_json_body, read_optional_json_body
from jobledger.api.http.conditional import require_if_match
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.idempotency import IdempotencyKey, get_request_marker
from jobledger.api.routes.batches import (
    batch_not_found_error,
    check_expanded_size,
    check_list_index_size,
    estimate_list_index_bytes,
)
from jobledger.api.schemas.requests import BatchRestartBody, BatchUpdateBody, ReasonBody
from jobledger.ledger.domain import batch as rules
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
from jobledger.ledger.store.command_handler import CommandResult, StreamState, handle_command

_ALL_STATUSES: Final[frozenset[JobStatus]] = frozenset(get_args(JobStatus))


async def pause_batch(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/pause"""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _switch(request, content, PauseBatch(get_actor(request), body.reason))


async def resume_batch(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/resume"""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _switch(request, content, ResumeBatch(get_actor(request), body.reason))


async def cancel_batch(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/cancel"""
    body, content = await read_optional_json_body(request, ReasonBody)
    once = IdempotencyKey.from_request(request, content)
    found = await _load_batch_state(request)
    outcome = await _for_jobs(
        request, found, CancelJob(get_actor(request), body.reason), _ALL_STATUSES - TERMINAL_STATUSES, once=once
    )
    return _answer(found.batch_id, found.known, outcome)


async def restart_batch(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/restart"""
    body, content = await read_optional_json_body(request, BatchRestartBody)
    once = IdempotencyKey.from_request(request, content)
    found = await _load_batch_state(request)
    command = RestartJob(get_actor(request), body.reason, body.reuse_steps)
    outcome = await _for_jobs(
        request, found, command, TERMINAL_STATUSES if body.only == "all" else {body.only}, once=once
    )
    return _answer(found.batch_id, found.known, outcome)


async def archive_batch(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/archive"""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _set_archived(request, content, Archive(get_actor(request), body.reason))


async def unarchive_batch(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/unarchive"""
    body, content = await read_optional_json_body(request, ReasonBody)
    return await _set_archived(request, content, Unarchive(get_actor(request), body.reason))


async def update_batch(request: Request) -> Response:
    """PUT /api/events/batches/{batch_id}: who may see or change it and its jobs"""
    body, _ = await read_json_body(request, BatchUpdateBody)
    access = AccessControl(**body.access_control.model_dump())
    found = await _load_batch_state(request, AccessLevel.ADMIN)
    asked = found.batch.spec
    check_expanded_size(request, "access_control", access, len(asked.job_ids))
    check_list_index_size(estimate_list_index_bytes(asked.user_id, access, asked.teams) * len(asked.job_ids))
    handled = await _for_batch(request, found, ChangeAccess(get_actor(request), access))
    outcome = await _for_jobs(
        request, found, ChangeAccess(get_actor(request), access), _ALL_STATUSES, AccessLevel.ADMIN
    )
    return _answer(found.batch_id, handled.stream_state, outcome)


async def delete_batch(request: Request) -> Response:
    """DELETE /api/events/batches/{batch_id}

    Its jobs go first: whoever is interrupted may ask again, and no jobs are left that no batch leads to.
    """
    found, command = await _load_batch_state(request, AccessLevel.ADMIN), Delete(get_actor(request))
    rules.decide(command, found.batch)  # a batch at work is refused before any of its jobs is touched
    outcome = await _for_jobs(request, found, command, _ALL_STATUSES, AccessLevel.ADMIN)
    if outcome.rejections:
        message = "Not every job could be deleted, so the batch is still there: cancel it, and try again."
        raise ApiError(409, "invalid_state", message, details=outcome.to_response())
    handled = await _for_batch(request, found, command)
    return _answer(found.batch_id, handled.stream_state, outcome)


@dataclass(frozen=True, slots=True)
class _LoadedBatch:
    """A batch as the log has it now."""

    batch_id: str
    known: StreamState
    batch: Batch
    events: list[RecordedEvent]
    check: Callable[[StreamState], None]


async def _load_batch_state(request: Request, right: AccessLevel = AccessLevel.WRITE) -> _LoadedBatch:
    batch_id = request.path_params["batch_id"]
    events = await get_api_context(request).event_store.read_stream(batch_id) if batch_id.startswith("batch-") else []
    known = StreamState().apply(events)
    check = require_if_match(request, require_right(request, right, not_found_error=batch_not_found_error(batch_id)))
    check(known)
    assert isinstance(known.state, Batch)  # noqa: S101 - narrows the type; a batch's stream has a batch's state
    return _LoadedBatch(batch_id, known, known.state, events, check)


async def _switch(request: Request, content: Any, command: PauseBatch | ResumeBatch) -> Response:
    found = await _load_batch_state(request)
    known = await _once_for_batch(request, found, command, IdempotencyKey.from_request(request, content))
    return _answer(found.batch_id, known)


async def _set_archived(request: Request, content: Any, command: Archive | Unarchive) -> Response:
    found, once = await _load_batch_state(request), IdempotencyKey.from_request(request, content)
    known = await _once_for_batch(request, found, command, once)
    outcome = await _for_jobs(request, found, command, _ALL_STATUSES, once=once)
    return _answer(found.batch_id, known, outcome)


async def _once_for_batch(
    request: Request, found: _LoadedBatch, command: BatchCommand, once: IdempotencyKey | None
) -> StreamState:
    """Have a command decided, unless the same request has done it before; return what is known of the batch."""
    if once is not None and once.find_in(found.events) is not None:
        return found.known
    return (await _for_batch(request, found, command, once)).stream_state


async def _for_batch(
    request: Request, found: _LoadedBatch, command: BatchCommand, once: IdempotencyKey | None = None
) -> CommandResult:
    meta = EventMetadata(get_actor(request), found.batch_id, request_fingerprint=get_request_marker(once))
    return await handle_command(
        get_api_context(request).event_store,
        found.batch_id,
        command,
        meta=meta,
        stream_state=found.known,
        check=found.check,
    )


async def _for_jobs(
    request: Request,
    found: _LoadedBatch,
    command: JobCommand,
    statuses: Collection[JobStatus],
    right: AccessLevel = AccessLevel.WRITE,
    once: IdempotencyKey | None = None,
) -> bulk_commands.BulkResult:
    meta = EventMetadata(get_actor(request), found.batch_id, request_fingerprint=get_request_marker(once))
    job_ids = found.batch.spec.job_ids
    check = require_right(request, right, not_found_error=ApiError(404, "job_not_found", "There is no such job."))
    return await bulk_commands.apply_to_jobs(
        get_api_context(request).event_store,
        job_ids,
        command,
        meta=meta,
        statuses=statuses,
        check=check,
        idempotency_key=once,
    )


def _answer(batch_id: str, known: StreamState, outcome: bulk_commands.BulkResult | None = None) -> Response:
    """Say what was done, and the position at which the views show all of it."""
    content = {"status": "success", "batch_id": batch_id, "batch": _shown_state(batch_id, known)}
    position = known.head.position
    if outcome is not None:
        content |= outcome.to_response()
        position = max(position, outcome.position)
    return json_response(content, headers={"Ledger-Position": str(position)})


def _shown_state(batch_id: str, known: StreamState) -> Document | None:
    """Return what the batch's own events say. The counts of its jobs are for the views, which come later."""
    batch = known.state
    if not isinstance(batch, Batch) or batch.deleted:
        return None
    return {
        "batch_id": batch_id,
        "batch_name": batch.spec.batch_name,
        "status": batch.status,
        "paused": batch.paused,
        "archived": batch.archived,
        "version": known.head.version,
        "position": known.head.position,
    }
