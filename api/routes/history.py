"""Histories of jobs and batches, and log entries of jobs, page by page."""

from __future__ import annotations

from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any, Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_viewer
from jobledger.api.context import get_api_context
from jobledger.api.event_json import EPOCH, encode_event
from jobledger.api.http.errors import build_json_response
from jobledger.api.http.validation import parse_query
from jobledger.api.openapi.operation import Operation
from jobledger.api.pagination import JsonPage
from jobledger.api.resources import BATCH, JOB, ResourceKind, load_or_404
from jobledger.api.schemas.log import HistoryQuery, HistoryResponse, LogEntriesResponse
from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import Event, LogEntry, RecordedEvent
from jobledger.projections.views.job_log import LOG_EVENT_TYPES, build_log_entries

_READ_BATCH_EVENTS: Final = 100


@Operation("GET", "/api/events/jobs/{job_id}/history", response=HistoryResponse, query=HistoryQuery)
async def get_job_history(request: Request) -> Response:
    """List the events of a job."""
    return await _get_history(request, JOB)


@Operation("GET", "/api/events/batches/{batch_id}/history", response=HistoryResponse, query=HistoryQuery)
async def get_batch_history(request: Request) -> Response:
    """List the events of a batch."""
    return await _get_history(request, BATCH)


async def _get_history(request: Request, resource: ResourceKind) -> Response:
    document = await load_or_404(request, resource)
    viewer = get_viewer(request, document)
    return await _build_page_response(
        request, resource.get_id_from_path(request), "events", lambda event: [encode_event(event, viewer)]
    )


@Operation("GET", "/api/events/jobs/{job_id}/logs", response=LogEntriesResponse, query=HistoryQuery)
async def get_job_logs(request: Request) -> Response:
    """List the log entries of a job."""
    job = await load_or_404(request, JOB)
    return await _build_page_response(request, job["job_id"], "logs", _encode_log_entries, types=LOG_EVENT_TYPES)


def _encode_log_entries(event: RecordedEvent) -> list[bytes]:
    attempt = None
    try:
        attempt, lines = event.payload_fields.get("attempt"), build_log_entries(event)
    except (UnreadableEvent, AttributeError):
        time = event.document.get("time")
        lines = [
            LogEntry(
                timestamp=time if isinstance(time, datetime) else EPOCH,
                level="error",
                message=f"Event {event.type} (version {event.version} of the job) cannot be read.",
            )
        ]
    attempt = attempt if isinstance(attempt, int) else None
    return [
        orjson.dumps({**line.model_dump(), "attempt": attempt, "version": event.version}, option=orjson.OPT_UTC_Z)
        for line in lines
    ]


async def _build_page_response(
    request: Request,
    stream: str,
    name: str,
    encode: Callable[[RecordedEvent], list[bytes]],
    *,
    types: Collection[type[Event]] | None = None,
) -> Response:
    """Return a page of what `encode` makes of the events of a stream.

    The items of one event stay together, so a page may exceed its limit by some of them.
    """
    event_store, query = get_api_context(request).event_store, parse_query(request, HistoryQuery)
    page, version = JsonPage(query.limit), query.after_version
    content: dict[str, Any] = {"status": "success", name: page.items}
    while events := await event_store.read_stream(
        stream, after_version=version, limit=_READ_BATCH_EVENTS, types=types, single_batch=True
    ):
        for event in events:
            if page.is_full:
                return build_json_response({**content, "next_after_version": version})
            for text in encode(event):
                page.add(text)
            version = event.version
    return build_json_response(content)
