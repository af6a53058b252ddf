"""api: what is done to a whole batch is done to each of its jobs, as far as the rules and the rights let it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, Final, get_args

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import actor, requires
from jobledger.api.context import services
from jobledger.api.http.bodies import optional_body, read_body
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.preconditions import Once, expecting, noted
from jobledger.api.routes import bulk_commands
from jobledger.api.routes.batches import list_index_bytes, not_found, refuse_list_index, refuse_multiplied
from jobledger.api.schemas.requests import BatchRestartBody, BatchUpdateBody, ReasonBody
from jobledger.ledger.domain import batch as rules
from jobledger.ledger.domain.access import Right
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
from jobledger.ledger.domain.events import ENDED, AccessControl, JobStatus, Meta, Recorded
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import Handled, Known, handle

_EVERY: Final[frozenset[JobStatus]] = frozenset(get_args(JobStatus))


async def pause(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/pause"""
    body, content = await optional_body(request, ReasonBody)
    return await _switch(request, content, PauseBatch(actor(request), body.reason))


async def resume(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/resume"""
    body, content = await optional_body(request, ReasonBody)
    return await _switch(request, content, ResumeBatch(actor(request), body.reason))


async def cancel(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/cancel"""
    body, content = await optional_body(request, ReasonBody)
    once = Once.of(request, content)
    found = await _existing(request)
    outcome = await _for_jobs(request, found, CancelJob(actor(request), body.reason), _EVERY - ENDED, once=once)
    return _answer(found.batch_id, found.known, outcome)


async def restart(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/restart"""
    body, content = await optional_body(request, BatchRestartBody)
    once = Once.of(request, content)
    found = await _existing(request)
    command = RestartJob(actor(request), body.reason, body.reuse_steps)
    outcome = await _for_jobs(request, found, command, ENDED if body.only == "all" else {body.only}, once=once)
    return _answer(found.batch_id, found.known, outcome)


async def archive(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/archive"""
    body, content = await optional_body(request, ReasonBody)
    return await _put_away(request, content, Archive(actor(request), body.reason))


async def unarchive(request: Request) -> Response:
    """POST /api/events/batches/{batch_id}/unarchive"""
    body, content = await optional_body(request, ReasonBody)
    return await _put_away(request, content, Unarchive(actor(request), body.reason))


async def update(request: Request) -> Response:
    """PUT /api/events/batches/{batch_id}: who may see or change it and its jobs"""
    body, _ = await read_body(request, BatchUpdateBody)
    access = AccessControl(**body.access_control.model_dump())
    found = await _existing(request, Right.ADMIN)
    asked = found.batch.asked
    refuse_multiplied(request, "access_control", access, len(asked.job_ids))
    refuse_list_index(list_index_bytes(asked.user_id, access, asked.teams) * len(asked.job_ids))
    handled = await _for_batch(request, found, ChangeAccess(actor(request), access))
    outcome = await _for_jobs(request, found, ChangeAccess(actor(request), access), _EVERY, Right.ADMIN)
    return _answer(found.batch_id, handled.known, outcome)


async def delete(request: Request) -> Response:
    """DELETE /api/events/batches/{batch_id}

    Its jobs go first: whoever is interrupted may ask again, and no jobs are left that no batch leads to.
    """
    found, command = await _existing(request, Right.ADMIN), Delete(actor(request))
    rules.decide(command, found.batch)  # a batch at work is refused before any of its jobs is touched
    outcome = await _for_jobs(request, found, command, _EVERY, Right.ADMIN)
    if outcome.refused:
        message = "Not every job could be deleted, so the batch is still there: cancel it, and try again."
        raise ApiError(409, "wrong_state", message, details=outcome.shown())
    handled = await _for_batch(request, found, command)
    return _answer(found.batch_id, handled.known, outcome)


@dataclass(frozen=True, slots=True)
class _Found:
    """A batch as the log has it now."""

    batch_id: str
    known: Known
    batch: Batch
    events: list[Recorded]
    check: Callable[[Known], None]


async def _existing(request: Request, right: Right = Right.WRITE) -> _Found:
    batch_id = request.path_params["batch_id"]
    events = await services(request).log.read_stream(batch_id) if batch_id.startswith("batch-") else []
    known = Known().after(events)
    check = expecting(request, requires(request, right, missing=not_found(batch_id)))
    check(known)
    assert isinstance(known.state, Batch)  # noqa: S101 - narrows the type; a batch's stream has a batch's state
    return _Found(batch_id, known, known.state, events, check)


async def _switch(request: Request, content: Any, command: PauseBatch | ResumeBatch) -> Response:
    found = await _existing(request)
    known = await _once_for_batch(request, found, command, Once.of(request, content))
    return _answer(found.batch_id, known)


async def _put_away(request: Request, content: Any, command: Archive | Unarchive) -> Response:
    found, once = await _existing(request), Once.of(request, content)
    known = await _once_for_batch(request, found, command, once)
    outcome = await _for_jobs(request, found, command, _EVERY, once=once)
    return _answer(found.batch_id, known, outcome)


async def _once_for_batch(request: Request, found: _Found, command: BatchCommand, once: Once | None) -> Known:
    """Have a command decided, unless the same request has done it before; return what is known of the batch."""
    if once is not None and once.found_in(found.events) is not None:
        return found.known
    return (await _for_batch(request, found, command, once)).known


async def _for_batch(request: Request, found: _Found, command: BatchCommand, once: Once | None = None) -> Handled:
    meta = Meta(actor(request), found.batch_id, request=noted(once))
    return await handle(services(request).log, found.batch_id, command, meta=meta, known=found.known, check=found.check)


async def _for_jobs(
    request: Request,
    found: _Found,
    command: JobCommand,
    statuses: Collection[JobStatus],
    right: Right = Right.WRITE,
    once: Once | None = None,
) -> bulk_commands.Outcome:
    meta = Meta(actor(request), found.batch_id, request=noted(once))
    job_ids = found.batch.asked.job_ids
    check = requires(request, right, missing=ApiError(404, "job_not_found", "There is no such job."))
    return await bulk_commands.for_each(
        services(request).log, job_ids, command, meta=meta, statuses=statuses, check=check, once=once
    )


def _answer(batch_id: str, known: Known, outcome: bulk_commands.Outcome | None = None) -> Response:
    """Say what was done, and the position at which the views show all of it."""
    content = {"status": "success", "batch_id": batch_id, "batch": _shown_state(batch_id, known)}
    position = known.head.position
    if outcome is not None:
        content |= outcome.shown()
        position = max(position, outcome.position)
    return json_response(content, headers={"Ledger-Position": str(position)})


def _shown_state(batch_id: str, known: Known) -> Document | None:
    """Return what the batch's own events say. The counts of its jobs are for the views, which come later."""
    batch = known.state
    if not isinstance(batch, Batch) or batch.deleted:
        return None
    return {
        "batch_id": batch_id,
        "batch_name": batch.asked.batch_name,
        "status": batch.status,
        "paused": batch.paused,
        "archived": batch.archived,
        "version": known.head.version,
        "position": known.head.position,
    }
