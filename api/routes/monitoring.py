"""Statistics, liveness and readiness."""

from __future__ import annotations

from typing import Final

from pymongo import timeout
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import require_monitor_role
from jobledger.api.context import get_api_context, wait_for_requested_position
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.openapi.operation import Operation
from jobledger.api.schemas.monitoring import ReadinessResponse, StatisticsResponse
from jobledger.api.schemas.response_models import SuccessResponse
from jobledger.api.worker_status import list_live_workers
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import translate_errors
from jobledger.projections.engine.health import stall_reason
from jobledger.projections.views import statistics

_PING_TIMEOUT_SECONDS: Final = 3.0


@Operation(
    "GET", "/api/monitoring/events/stats", response=StatisticsResponse, reads_views=True, error_codes=("forbidden",)
)
async def get_statistics(request: Request) -> Response:
    """Read statistics of jobs, batches and tracks, the live workers, and the projection lag."""
    require_monitor_role(request)
    await wait_for_requested_position(request)
    ctx = get_api_context(request)
    stats = await statistics.load_statistics(ctx.views, ctx.event_store.clock.estimate())
    head, position = await ctx.event_store.head_position(), ctx.checkpoint.position
    stats["workers"] = await list_live_workers(ctx.db, ctx.views)
    stats["log"] = {"head": head, "projection_position": position, "lag": max(0, head - position)}
    return json_response({"status": "success", "stats": stats})


@Operation("GET", "/healthz", response=SuccessResponse)
async def check_liveness(_request: Request) -> Response:
    """Check that the server is alive."""
    return json_response({"status": "success"})


@Operation("GET", "/readyz", response=ReadinessResponse, error_codes=("database_unavailable", "projection_stalled"))
async def check_readiness(request: Request) -> Response:
    """Check that the server can serve requests.

    A server whose projection has stalled is not ready, because its responses are out of date.
    """
    ctx = get_api_context(request)
    try:
        with translate_errors("responding to a ping"), timeout(_PING_TIMEOUT_SECONDS):
            await ctx.db.command("ping")
    except LedgerUnavailable as error:
        if ctx.disk_monitor.problem is None:
            raise
        message = f"{error} {ctx.disk_monitor.problem}"
        raise ApiError(503, "database_unavailable", message, retry_after_seconds=10) from error
    if ctx.stall_detector.is_stalled():
        position, head = ctx.checkpoint.position, ctx.stall_detector.head
        reason = await stall_reason(ctx.db, position, head)
        message = f"The views have stopped at position {position} of {head}. {reason}"
        details = {"projection_position": position, "head": head}
        raise ApiError(503, "projection_stalled", message, details=details)
    content = {"status": "success", "projection_position": ctx.checkpoint.position}
    return json_response(content | ({"warning": ctx.disk_monitor.problem} if ctx.disk_monitor.problem else {}))
