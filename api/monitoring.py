"""api: how everything is. Statistics from counters, health, and the log as a live stream."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import orjson
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.requests import Request
from starlette.responses import Response

from api.access import signed_in, who_asks
from api.errors import ApiError, json_response
from api.jobs import shown_event
from api.models import StreamQuery
from api.services import Services, query_of, services, validated, views_reach_wanted_position
from ledger.errors import LedgerUnavailable
from ledger.events import EVENT_TYPES, PositionVoided, Recorded
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


async def stream(request: Request) -> Response:
    """GET /api/ledger/stream: the log live, as Server-Sent Events; `id:` is the position, `Last-Event-ID` resumes."""
    known = services(request)
    resumed = request.headers.get("last-event-id")
    asked = query_of(request, StreamQuery)
    if resumed is not None:
        asked = validated(StreamQuery, {**asked.model_dump(), "after": resumed})
    names = asked.types.split(",") if asked.types else []
    if unknown := [name for name in names if name not in EVENT_TYPES]:
        raise ApiError(422, "unknown_event_type", f"There is no event type {unknown[0]!r}.")
    after = asked.after if asked.after is not None else await known.log.head()
    wanted = _Wanted(frozenset(names), asked.job_id, asked.batch_id)
    return EventSourceResponse(_events(known, after, wanted), ping=_PING_SECONDS)


class _Wanted:
    """Which events a client wants to see."""

    def __init__(self, types: frozenset[str], job_id: str | None, batch_id: str | None) -> None:
        self._types = types
        self._job_id = job_id
        self._batch_id = batch_id

    def __call__(self, event: Recorded) -> bool:
        if event.type not in self._types if self._types else event.type == PositionVoided.__name__:
            return False
        if self._job_id and event.stream != self._job_id:
            return False
        return not self._batch_id or self._batch_id in (event.stream, event.meta.correlation_id)


async def _events(known: Services, after: int, wanted: _Wanted) -> AsyncIterator[ServerSentEvent]:
    async with known.log.subscription(after=after) as events:
        while True:
            try:
                chunk = await events.chunk()
            except LedgerUnavailable:
                return  # the client comes back with Last-Event-ID and misses nothing
            for event in chunk:
                if wanted(event):
                    data = orjson.dumps(shown_event(event), option=orjson.OPT_UTC_Z).decode()
                    yield ServerSentEvent(data, event=event.type, id=str(event.position))
