"""Routes of the dashboard. Each page calls the public API routes with the principal of its request."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, Final
from urllib.parse import urlencode

import orjson
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from jobledger.api.auth.permissions import get_viewer, has_monitor_role, require_user_id
from jobledger.api.context import get_api_context
from jobledger.api.dashboard import charts
from jobledger.api.dashboard.attempt_timeline import TIMELINE_WIDTH, TimelineAttempt, build_attempt_timeline
from jobledger.api.dashboard.errors import RouteHandler, render_errors
from jobledger.api.dashboard.markdown_preview import render_result_preview
from jobledger.api.dashboard.rendering import (
    DASHBOARD_PATH,
    STATIC_MEDIA_TYPES,
    get_root_path,
    load_static_files,
    render_page,
)
from jobledger.api.dashboard.sign_in import show_sign_in, sign_in, sign_out
from jobledger.api.dashboard.view_updates import watch_views
from jobledger.api.http.bodies import read_json_body
from jobledger.api.http.errors import ApiError, build_json_response
from jobledger.api.http.sse import EventStreamResponse
from jobledger.api.routes import batches, history, jobs, log, monitoring, webhooks
from jobledger.api.schemas.batches import BatchBody
from jobledger.api.submission.builder import build_batch_jobs
from jobledger.ledger.domain.access import AccessLevel

_PAGE_SIZE: Final = 50
_MAX_EVENTS: Final = 1000
_MAX_LOG_EVENTS: Final = 200
_BATCH_FILTERS: Final = ("status", "q", "user_id", "archived")
_JOB_FILTERS: Final = (*_BATCH_FILTERS, "waiting_for", "batch_id", "track", "event", "day", "language", "error_code")


async def call_route(request: Request, handler: RouteHandler, query: Mapping[str, Any] | None = None) -> Any:
    """Call an API route with the principal and the path parameters of a page, and return the parsed response.

    Query parameters that are None or empty are left out.
    """
    present = {name: value for name, value in (query or {}).items() if value not in (None, "")}
    scope = {
        **request.scope,
        # Headers about the page itself, such as If-None-Match and Prefer, do not apply to the API route.
        "headers": [header for header in request.scope["headers"] if header[0] == b"ledger-position"],
        "query_string": urlencode(present).encode(),
    }
    response = await handler(Request(scope, request.receive))
    return orjson.loads(response.body)


# Pages --------------------------------------------------------------------------------------------------------------


@render_errors
async def show_overview(request: Request) -> Response:
    """GET /monitoring/events"""
    if not has_monitor_role(request):
        require_user_id(request)
        return render_page(request, "forbidden.html.j2")
    stats = (await call_route(request, monitoring.get_statistics))["stats"]
    active = await call_route(request, batches.list_batches, {"status": "processing", "limit": 10})
    running = await call_route(request, jobs.list_jobs, {"status": "processing", "limit": 100})
    oldest = await call_route(request, jobs.list_jobs, {"waiting_for": "worker", "limit": 1, "sort": "created_at"})
    jobs_by_worker: dict[str, list[Any]] = {}
    for job in running["jobs"]:
        jobs_by_worker.setdefault(job["worker_id"], []).append(job)
    minutes = stats["minutes"]
    finished = [[(status, minute[status]) for status in ("completed", "failed", "cancelled")] for minute in minutes]
    return render_page(
        request,
        "overview.html.j2",
        live_source="views",
        position=stats["log"]["projection_position"],
        stats=stats,
        active_batches=[{**batch, "eta_minutes": _estimate_minutes_left(batch)} for batch in active["batches"]],
        jobs_by_worker=jobs_by_worker,
        oldest_pending_job=next(iter(oldest["jobs"]), None),
        throughput_chart=charts.stack_bars(finished),
        run_time_chart=charts.stack_bars([[("run-time", minute["average_seconds"] or 0)] for minute in minutes]),
    )


@render_errors
async def show_jobs(request: Request) -> Response:
    """GET /monitoring/events/jobs"""
    return await _show_list(request, "jobs.html.j2", jobs.list_jobs, _JOB_FILTERS)


@render_errors
async def show_batches(request: Request) -> Response:
    """GET /monitoring/events/batches"""
    return await _show_list(request, "batches.html.j2", batches.list_batches, _BATCH_FILTERS)


@render_errors
async def show_job(request: Request) -> Response:
    """GET /monitoring/events/jobs/{job_id}"""
    ctx = get_api_context(request)
    position = ctx.checkpoint.position
    job = (await call_route(request, jobs.get_job))["job"]
    job_history = await call_route(request, history.get_job_history, {"limit": _MAX_EVENTS})
    events = job_history.get("events", [])
    deliveries = await call_route(request, webhooks.list_deliveries, {"job_id": job["job_id"], "limit": 20})
    results = job["results"] or {}
    return render_page(
        request,
        "job.html.j2",
        live_source="job",
        api_path=f"api/events/jobs/{job['job_id']}",
        position=position,
        job=job,
        events=events,
        has_more_events="next_after_version" in job_history,
        attempts=_build_attempts(events),
        timeline_width=TIMELINE_WIDTH,
        deliveries=deliveries["deliveries"],
        preview=await render_result_preview(ctx.markdown_previewer, ctx.file_store, results, get_root_path(request)),
        can_write=_can_write(request, job),
        slides=[asset for asset in results.get("assets", ()) if asset["path"].endswith("-thumb.jpg")],
    )


@render_errors
async def show_batch(request: Request) -> Response:
    """GET /monitoring/events/batches/{batch_id}"""
    position = get_api_context(request).checkpoint.position
    batch = (await call_route(request, batches.get_batch))["batch"]
    query = {name: request.query_params.get(name) for name in ("status", "cursor")}
    result_page = await call_route(request, batches.list_batch_jobs, {**query, "limit": _PAGE_SIZE})
    batch_history = await call_route(request, history.get_batch_history, {"limit": 100})
    return render_page(
        request,
        "batch.html.j2",
        live_source="batch",
        api_path=f"api/events/batches/{batch['batch_id']}",
        position=position,
        batch={**batch, "eta_minutes": _estimate_minutes_left(batch)},
        result_page=result_page,
        next_page_query=_build_next_page_query(request, result_page),
        events=batch_history.get("events", []),
        can_write=_can_write(request, batch),
    )


@render_errors
async def show_submit_form(request: Request) -> Response:
    """GET /monitoring/events/submit"""
    require_user_id(request)
    return render_page(request, "submit.html.j2", job_types=sorted(get_api_context(request).job_types))


@render_errors
async def show_log(request: Request) -> Response:
    """GET /monitoring/events/log"""
    filters = {name: request.query_params.get(name, "") for name in ("types", "stream")}
    head = await get_api_context(request).event_store.read_head_position()
    # The route reads forwards, so the newest events are those after this position.
    query = {**filters, "after": max(0, head - _MAX_LOG_EVENTS), "limit": _MAX_LOG_EVENTS}
    result_page = await call_route(request, log.list_events, query)
    return render_page(
        request,
        "log.html.j2",
        live_source="log",
        api_path="api/ledger/events",
        position=result_page["last_position"],
        filters=filters,
        events=result_page.get("events", [])[::-1],
    )


# Requests of scripts ------------------------------------------------------------------------------------------------


async def validate_batch(request: Request) -> Response:
    """POST /monitoring/events/validate: validate a batch without submitting it."""
    require_user_id(request)
    body, _ = await read_json_body(request, BatchBody)
    await build_batch_jobs(request, body, "batch-", "user")
    return build_json_response({"status": "success", "jobs": len(body.jobs)})


async def stream_view_updates(request: Request) -> EventStreamResponse:
    """GET /monitoring/events/view-updates: report updates of the views, at most once per second."""
    require_user_id(request)
    ctx = get_api_context(request)
    return EventStreamResponse(watch_views(ctx.checkpoint), ctx.live_streams)


async def get_static_file(request: Request) -> Response:
    """GET /monitoring/events/static/{version}/{name}. The URL changes with the files, so caches may keep it."""
    name = request.path_params["name"]
    content = load_static_files().get(name)
    if content is None:
        raise ApiError(404, "not_found", "File not found.")
    headers = {"Cache-Control": "public, max-age=31536000, immutable"}
    return Response(content, headers=headers, media_type=STATIC_MEDIA_TYPES[PurePosixPath(name).suffix])


# Shared by pages ----------------------------------------------------------------------------------------------------


async def _show_list(request: Request, template: str, handler: RouteHandler, filter_names: Sequence[str]) -> Response:
    filters = {name: request.query_params.get(name, "") for name in (*filter_names, "cursor", "sort")}
    position = get_api_context(request).checkpoint.position
    result_page = await call_route(request, handler, {**filters, "limit": _PAGE_SIZE})
    return render_page(
        request,
        template,
        live_source="jobs",
        position=position,
        filters=filters,
        result_page=result_page,
        next_page_query=_build_next_page_query(request, result_page),
    )


def _build_next_page_query(request: Request, result_page: Mapping[str, Any]) -> Markup | None:
    """Return the query of the next page, or None on the last page. As `Markup`, because a URL must not be truncated."""
    if "next_cursor" not in result_page:
        return None
    query = {name: value for name, value in request.query_params.items() if value and name != "cursor"}
    return escape(urlencode({**query, "cursor": result_page["next_cursor"]}))


def _estimate_minutes_left(batch: Mapping[str, Any]) -> int | None:
    """Return the estimated minutes until a batch is finished, at its average speed so far. None if unknown."""
    finished = batch["completed_jobs"] + batch["failed_jobs"] + batch["cancelled_jobs"]
    unfinished: int = batch["total_jobs"] - finished
    if not finished or batch["paused"]:
        return None
    elapsed_seconds = (datetime.now(UTC) - datetime.fromisoformat(batch["created_at"])).total_seconds()
    minutes: float = elapsed_seconds / finished * unfinished / 60
    return round(minutes)


def _build_attempts(events: list[dict[str, Any]]) -> list[TimelineAttempt]:
    """Return the attempts of a job, or none if an event is damaged."""
    try:
        return build_attempt_timeline(events, datetime.now(UTC))
    except (LookupError, TypeError, ValueError):
        return []


def _can_write(request: Request, document: dict[str, Any]) -> bool:
    return get_viewer(request, document).access_level >= AccessLevel.WRITE


ROUTES: Final = [
    Route(DASHBOARD_PATH, show_overview),
    Route(f"{DASHBOARD_PATH}/jobs", show_jobs),
    Route(f"{DASHBOARD_PATH}/jobs/{{job_id}}", show_job),
    Route(f"{DASHBOARD_PATH}/batches", show_batches),
    Route(f"{DASHBOARD_PATH}/batches/{{batch_id}}", show_batch),
    Route(f"{DASHBOARD_PATH}/submit", show_submit_form),
    Route(f"{DASHBOARD_PATH}/log", show_log),
    Route(f"{DASHBOARD_PATH}/validate", validate_batch, methods=["POST"]),
    Route(f"{DASHBOARD_PATH}/view-updates", stream_view_updates),
    Route(f"{DASHBOARD_PATH}/sign-in", show_sign_in),
    Route(f"{DASHBOARD_PATH}/sign-in", sign_in, methods=["POST"]),
    Route(f"{DASHBOARD_PATH}/sign-out", sign_out, methods=["POST"]),
    Route(f"{DASHBOARD_PATH}/static/{{version}}/{{name}}", get_static_file),
]
