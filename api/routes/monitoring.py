"""api: how everything is. Statistics from counters, and health."""

from __future__ import annotations

from typing import Final

from pymongo import timeout
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_principal, require_user_id
from jobledger.api.context import get_api_context, wait_for_requested_position
from jobledger.api.http.errors import ApiError, json_response
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import Database, Document, translate_errors
from jobledger.ledger.mongo.lease import EXPIRED_LEASE_FILTER
from jobledger.projections.engine.health import stall_reason
from jobledger.projections.slots import Views
from jobledger.projections.views import jobs, statistics

_PING_SECONDS: Final = 3.0


async def get_statistics(request: Request) -> Response:
    """GET /api/monitoring/events/stats"""
    require_monitor_role(request)
    await wait_for_requested_position(request)
    known = get_api_context(request)
    counted = await statistics.load_statistics(known.views, known.event_store.clock.estimate())
    head, views = await known.event_store.head_position(), known.checkpoint.position
    counted["workers"] = await list_live_workers(known.db, known.views)
    counted["log"] = {"head": head, "projection_position": views, "lag": max(0, head - views)}
    return json_response({"status": "success", "stats": counted})


def require_monitor_role(request: Request) -> None:
    """Make sure that who asks may see how everything is.

    Raises:
        ApiError: 401, 403.
    """
    if not get_principal(request).roles & {"admin", "monitor"}:
        require_user_id(request)
        raise ApiError(403, "forbidden", "Statistics of everything are for the roles `monitor` and `admin`.")


async def list_live_workers(db: Database, views: Views) -> list[Document]:
    """Return the workers that hold a lease, how many jobs each may run, and how many it does."""
    with translate_errors("reading the workers"):
        alive = {"released": False, "$nor": [EXPIRED_LEASE_FILTER]}
        fields = {"host": 1, "slots": 1, "lease_until": 1, "problem": 1, "unhealthy_since": 1}
        found = await db.workers.find(alive, fields, sort=[("_id", 1)]).to_list()
    busy = await jobs.count_running_by_worker(views) if found else {}
    return [
        {
            "worker_id": it["_id"],
            "host": it["host"],
            "slots": it["slots"],
            "busy_slots": busy.get(it["_id"], 0),
            "lease_until": it["lease_until"],
            "problem": it.get("problem"),
            "unhealthy_since": it.get("unhealthy_since"),
        }
        for it in found
    ]


async def check_liveness(_request: Request) -> Response:
    """GET /healthz"""
    return json_response({"status": "success"})


async def check_readiness(request: Request) -> Response:
    """GET /readyz

    Not ready is also who would serve views that have stopped: they say of jobs what was true long ago.
    """
    known = get_api_context(request)
    try:
        with translate_errors("answering a ping"), timeout(_PING_SECONDS):
            await known.db.command("ping")
    except LedgerUnavailable as error:
        if known.disk_monitor.problem is None:
            raise
        message = f"{error} {known.disk_monitor.problem}"
        raise ApiError(503, "database_unavailable", message, retry_after_seconds=10) from error
    if known.stall_detector.is_stalled():
        position, head = known.checkpoint.position, known.stall_detector.head
        reason = await stall_reason(known.db, position, head)
        message = f"The views have stopped at position {position} of {head}. {reason}"
        raise ApiError(503, "projection_stalled", message, details={"projection_position": position, "head": head})
    answer = {"status": "success", "projection_position": known.checkpoint.position}
    return json_response(answer | ({"warning": known.disk_monitor.problem} if known.disk_monitor.problem else {}))
