"""api: how everything is. Statistics from counters, and health."""

from __future__ import annotations

from typing import Final

from pymongo import timeout
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import signed_in, who_asks
from jobledger.api.context import services, views_reach_wanted_position
from jobledger.api.http.errors import ApiError, json_response
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import Database, Document, driver_errors
from jobledger.ledger.mongo.lease import RUN_OUT
from jobledger.projections.engine.health import why_stalled
from jobledger.projections.engine.slots import Views
from jobledger.projections.views import jobs, statistics

_PING_SECONDS: Final = 3.0


async def stats(request: Request) -> Response:
    """GET /api/monitoring/events/stats"""
    for_monitors(request)
    await views_reach_wanted_position(request)
    known = services(request)
    counted = await statistics.read(known.views, known.log.clock.estimate())
    head, views = await known.log.head(), known.checkpoint.position
    counted["workers"] = await workers_alive(known.db, known.views)
    counted["log"] = {"head": head, "views": views, "lag": max(0, head - views)}
    return json_response({"status": "success", "stats": counted})


def for_monitors(request: Request) -> None:
    """Make sure that who asks may see how everything is.

    Raises:
        ApiError: 401, 403.
    """
    if not who_asks(request).roles & {"admin", "monitor"}:
        signed_in(request)
        raise ApiError(403, "forbidden", "Statistics of everything are for the roles `monitor` and `admin`.")


async def workers_alive(db: Database, views: Views) -> list[Document]:
    """Return the workers that hold a lease, how many jobs each may run, and how many it does."""
    with driver_errors("reading the workers"):
        alive = {"released": False, "$nor": [RUN_OUT]}
        fields = {"host": 1, "slots": 1, "lease_until": 1, "problem": 1, "unhealthy_since": 1}
        found = await db.workers.find(alive, fields, sort=[("_id", 1)]).to_list()
    busy = await jobs.running_by_worker(views) if found else {}
    return [
        {
            "worker_id": it["_id"],
            "host": it["host"],
            "slots": it["slots"],
            "busy": busy.get(it["_id"], 0),
            "lease_until": it["lease_until"],
            "problem": it.get("problem"),
            "unhealthy_since": it.get("unhealthy_since"),
        }
        for it in found
    ]


async def alive(_request: Request) -> Response:
    """GET /healthz"""
    return json_response({"status": "success"})


async def ready(request: Request) -> Response:
    """GET /readyz

    Not ready is also who would serve views that have stopped: they say of jobs what was true long ago.
    """
    known = services(request)
    try:
        with driver_errors("answering a ping"), timeout(_PING_SECONDS):
            await known.db.command("ping")
    except LedgerUnavailable as error:
        if known.storage.problem is None:
            raise
        message = f"{error} {known.storage.problem}"
        raise ApiError(503, "database_unavailable", message, retry_after_seconds=10) from error
    if known.stall_watch.stalled():
        position, head = known.checkpoint.position, known.stall_watch.head
        reason = await why_stalled(known.db, position, head)
        message = f"The views have stopped at position {position} of {head}. {reason}"
        raise ApiError(503, "views_stalled", message, details={"views": position, "head": head})
    answer = {"status": "success", "views": known.checkpoint.position}
    return json_response(answer | ({"warning": known.storage.problem} if known.storage.problem else {}))
