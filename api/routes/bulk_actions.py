"""One action on all jobs that match filters.

The views list the matching jobs, oldest first. The log decides about each of them, so the response counts what really
happened to jobs that change at the same time.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, get_args

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_actor, require_access
from jobledger.api.bulk_commands import JOBS_PER_CHUNK, BulkResult, apply_to_jobs
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_json_body, run_off_loop
from jobledger.api.http.errors import ApiError, build_json_response
from jobledger.api.idempotency import RequestFingerprint, build_metadata
from jobledger.api.job_documents import build_job_query
from jobledger.api.openapi.operation import Operation
from jobledger.api.pagination import encode_cursor
from jobledger.api.schemas.jobs import BulkJobActionBody, BulkJobActionResponse
from jobledger.ledger.domain import commands
from jobledger.ledger.domain.access import AccessLevel
from jobledger.ledger.domain.errors import NotFound
from jobledger.ledger.domain.job import Job
from jobledger.ledger.domain.statuses import TERMINAL_STATUSES, JobStatus
from jobledger.ledger.store.command_handler import StreamState
from jobledger.projections.views import job_list
from jobledger.projections.views.paging import PageCursor, PageRequest

_MAX_SECONDS: Final = 20.0
"""A request begins no further chunk of jobs after this time. Common proxies wait for 30 or 60 seconds."""
_ALL_STATUSES: Final[frozenset[JobStatus]] = frozenset(get_args(JobStatus))


@Operation(
    "POST",
    "/api/events/jobs/bulk",
    response=BulkJobActionResponse,
    body=BulkJobActionBody,
    is_from_views=True,
    error_codes=("forbidden",),
)
async def change_jobs(request: Request) -> Response:
    """Cancel, restart, archive, unarchive or delete the jobs that match filters."""
    body, content = await read_json_body(request, BulkJobActionBody)
    fingerprint = await run_off_loop(request, RequestFingerprint.from_request, request, content)
    command = _build_command(body, get_actor(request))
    ctx, query = get_api_context(request), await build_job_query(request, body.filters)
    position = ctx.checkpoint.position if body.position is None else body.position
    statuses = _select_statuses(command)
    result, left, cursor = BulkResult(), body.max_jobs, body.cursor
    end_at = time.monotonic() + _MAX_SECONDS
    while True:
        page = PageRequest(min(left, JOBS_PER_CHUNK), after=cursor, newest_first=False)
        job_ids, cursor = await job_list.find_ids(ctx.views, query, page)
        await apply_to_jobs(
            ctx.event_store,
            job_ids,
            command,
            meta=build_metadata(request, fingerprint),
            statuses=statuses,
            check=_build_check(request, body),
            fingerprint=fingerprint,
            submitted_until=position,
            dry_run=body.dry_run,
            result=result,
        )
        left -= len(job_ids)
        if cursor is None or left <= 0 or time.monotonic() > end_at:
            return _build_response(body, result, position, cursor)


def _build_command(body: BulkJobActionBody, actor: str) -> commands.JobCommand:
    match body.action:
        case "cancel":
            return commands.CancelJob(actor, body.reason)
        case "restart":
            return commands.RestartJob(actor, body.reason, body.reuse_steps)
        case "archive":
            return commands.Archive(actor, body.reason)
        case "unarchive":
            return commands.Unarchive(actor, body.reason)
        case "delete":
            return commands.Delete(actor, body.reason)


def _select_statuses(command: commands.JobCommand) -> frozenset[JobStatus]:
    """Return the statuses of the jobs that an action applies to. It leaves the others unchanged."""
    if isinstance(command, commands.CancelJob):
        return _ALL_STATUSES - TERMINAL_STATUSES
    return TERMINAL_STATUSES if isinstance(command, commands.RestartJob) else _ALL_STATUSES


def _build_check(request: Request, body: BulkJobActionBody) -> Callable[[StreamState], None]:
    """Return a check that the caller may change a job, and that it still has the status of the filter.

    The views may be behind the log, and the job may change until the command is appended.
    """
    level = AccessLevel.ADMIN if body.action == "delete" else AccessLevel.WRITE
    not_found_error = ApiError(404, "job_not_found", "Job not found.")
    check_access = require_access(request, level, not_found_error=not_found_error)
    status = body.filters.status or (None if body.filters.waiting_for is None else "pending")

    def check(stream_state: StreamState) -> None:
        job = stream_state.aggregate
        if status is not None and isinstance(job, Job) and job.status != status:
            raise NotFound(f"the job is no longer {status}")
        check_access(stream_state)

    return check


def _build_response(body: BulkJobActionBody, result: BulkResult, position: int, cursor: PageCursor | None) -> Response:
    content = {
        "status": "success",
        "dry_run": body.dry_run,
        "position": position,
        **result.to_response(),
        "job_ids": result.changed_ids,
        "next_cursor": None if cursor is None else encode_cursor(cursor),
    }
    return build_json_response(content, headers={"Ledger-Position": str(result.position)} if result.position else {})
