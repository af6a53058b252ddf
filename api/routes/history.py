"""api: what happened to one job or batch, and what its attempts had to say, page by page."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import can_read, viewer_for
from jobledger.api.context import get_api_context, parse_query
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.event_json import EPOCH, encode_event
from jobledger.api.routes.jobs import load_job_or_404
from jobledger.api.schemas.requests import HistoryQuery
from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import Event, LogEntry, RecordedEvent
from jobledger.projections.views import batches
from jobledger.projections.views.job_log import LOG_EVENT_TYPES, log_lines_of_event

_READ_AT_ONCE: Final = 100
_LARGEST_ANSWER_BYTES: Final = 4 * 1024 * 1024


async def get_job_history(request: Request) -> Response:
    """GET /api/events/jobs/{job_id}/history"""
    job = await load_job_or_404(request)
    viewer = viewer_for(request, job)
    return await _page(request, job["job_id"], "events", lambda event: [encode_event(event, viewer)])


async def get_batch_history(request: Request) -> Response:
    """GET /api/events/batches/{batch_id}/history"""
    known, batch_id = get_api_context(request), request.path_params["batch_id"]
    batch = await batches.get(known.views, known.event_store, batch_id) if batch_id.startswith("batch-") else None
    if batch is None or not can_read(request, batch):
        raise ApiError(404, "batch_not_found", f"There is no batch {batch_id}.")
    viewer = viewer_for(request, batch)
    return await _page(request, batch_id, "events", lambda event: [encode_event(event, viewer)])


async def get_job_logs(request: Request) -> Response:
    """GET /api/events/jobs/{job_id}/logs"""
    job = await load_job_or_404(request)
    return await _page(request, job["job_id"], "logs", _lines, types=LOG_EVENT_TYPES)


def _time_of(event: RecordedEvent) -> datetime:
    time = event.document.get("time")
    return time if isinstance(time, datetime) else EPOCH


def _lines(event: RecordedEvent) -> list[bytes]:
    attempt = None
    try:
        attempt, lines = event.payload.get("attempt"), log_lines_of_event(event)
    except (UnreadableEvent, AttributeError):
        damaged = f"{event.type}, version {event.version} of the job's history, cannot be read."
        lines = [LogEntry(timestamp=_time_of(event), level="error", message=damaged)]
    attempt = attempt if isinstance(attempt, int) else None
    return [
        orjson.dumps({**line.model_dump(), "attempt": attempt, "version": event.version}, option=orjson.OPT_UTC_Z)
        for line in lines
    ]


async def _page(
    request: Request,
    stream: str,
    name: str,
    items_of: Callable[[RecordedEvent], list[bytes]],
    *,
    types: Collection[type[Event]] | None = None,
) -> Response:
    """Answer with what the events of a stream yield, under `name`; `next_after_version` is there if there is more.

    What one event yields stays together: a page ends behind the event with which it is full.
    """
    log, asked = get_api_context(request).event_store, parse_query(request, HistoryQuery)
    found: list[orjson.Fragment] = []
    size, version = 0, asked.after_version
    content: dict[str, Any] = {"status": "success", name: found}
    while events := await log.read_stream(
        stream, after_version=version, limit=_READ_AT_ONCE, types=types, single_batch=True
    ):
        for event in events:
            if len(found) >= asked.limit or size >= _LARGEST_ANSWER_BYTES:
                content["next_after_version"] = version
                return json_response(content)
            for text in items_of(event):
                found.append(orjson.Fragment(text))
                size += len(text)
            version = event.version
    return json_response(content)
