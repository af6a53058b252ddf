"""api: how everything is. Statistics from counters, and health."""

from __future__ import annotations

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from api.access import signed_in, who_asks
from api.errors import ApiError, json_response
from api.services import services, views_reach_wanted_position
from ledger.mongo import driver_errors
from projections import statistics

_PING_SECONDS: Final = 15


async def stats(request: Request) -> Response:
    """GET /api/monitoring/events/stats"""
    if not who_asks(request).roles & {"admin", "monitor"}:
        signed_in(request)
        raise ApiError(403, "forbidden", "Statistics of everything are for the roles `monitor` and `admin`.")
    await views_reach_wanted_position(request)
    known = services(request)
    counted = await statistics.read(known.db)
    with driver_errors("reading the workers"):
        workers = await known.db.workers.find({"released": False}, {"slots": 1, "host": 1}).to_list()
    head = await known.log.head()
    counted["workers"] = [{"worker_id": it["_id"], "host": it["host"], "slots": it["slots"]} for it in workers]
    counted["log"] = {"head": head, "views": known.checkpoint.position, "lag": max(0, head - known.checkpoint.position)}
    return json_response({"status": "success", "stats": counted})


async def alive(_request: Request) -> Response:
    """GET /healthz"""
    return json_response({"status": "success"})


async def ready(request: Request) -> Response:
    """GET /readyz"""
    known = services(request)
    with driver_errors("answering a ping"):
        await known.db.command("ping")
    return json_response({"status": "success", "views": known.checkpoint.position})
