"""api: the pages of the dashboard. Each asks the routes of the interface, as whoever looks at it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime
from functools import wraps
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode

import orjson
import structlog
from markupsafe import Markup, escape
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Scope

from jobledger.api.auth.permissions import get_principal, require_user_id
from jobledger.api.context import get_api_context
from jobledger.api.dashboard import charts, session_cookie
from jobledger.api.dashboard.attempt_timeline import build_attempt_timeline
from jobledger.api.dashboard.markdown_preview import MAX_MARKDOWN_BYTES
from jobledger.api.dashboard.rendering import DASHBOARD_PATH, has_monitor_access, render_page, static_file_response
from jobledger.api.dashboard.view_updates import watch_views
from jobledger.api.http.bodies import read_body_bytes, read_json_body
from jobledger.api.http.errors import ApiError, error_response, json_response
from jobledger.api.http.sse import EventStreamResponse
from jobledger.api.routes import batches, history, jobs, monitoring, webhooks
from jobledger.api.routes import log as log_pages
from jobledger.api.schemas.batches import BatchBody
from jobledger.api.submission.batches import build_batch_jobs
from jobledger.ledger.domain.access import AccessLevel, get_access_level
from jobledger.ledger.domain.errors import FileLost, FileStoreUnavailable, JobledgerError

_log = structlog.get_logger()
_PAGE_SIZE: Final = 50
_MAX_EVENTS: Final = 1000
_MAX_FORM_BYTES: Final = 20_000
_JOB_FILTERS: Final = (
    "status",
    "q",
    "batch_id",
    "track",
    "event",
    "day",
    "language",
    "user_id",
    "error_code",
    "archived",
)
_BATCH_FILTERS: Final = ("status", "q", "user_id", "archived")
RouteHandler = Callable[[Request], Awaitable[Response]]


async def call_route(
    request: Request,
    handler: RouteHandler,
    query: Mapping[str, Any] | None = None,
    path_params: Mapping[str, str] | None = None,
) -> Any:
    """Return what a route of the interface answers to whoever looks.

    Raises:
        ApiError: as the route does.
    """
    known = {name: value for name, value in (query or {}).items() if value not in (None, "")}
    scope = {
        **request.scope,
        # What a browser says of the page (If-None-Match, Prefer) is not said of what the page asks for.
        "headers": [header for header in request.scope["headers"] if header[0] == b"ledger-position"],
        "query_string": urlencode(known).encode(),
        "path_params": dict(path_params or {}),
    }
    answer = await handler(Request(scope, request.receive))
    return orjson.loads(answer.body)


def render_errors(handler: RouteHandler) -> RouteHandler:
    """What goes wrong is a page, too; who has not signed in is asked to."""

    @wraps(handler)
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            if error.status == 401:
                return redirect_to_sign_in(request)
            return render_page(request, "problem.html.j2", status=error.status, message=error.message)
        except JobledgerError as error:
            _log.warning("a page could not be shown", why=str(error))
            return render_page(request, "problem.html.j2", status=503, message=str(error))

    return guarded


def auth_error_response(scope: Scope, error: ApiError) -> ASGIApp:
    """Return the answer for who cannot be let in: at a page the way to the sign-in, elsewhere the error."""
    looks = (scope["method"] in ("GET", "HEAD") and scope["path"] in _PAGE_PATHS) or scope["path"].startswith(
        _PAGE_PATH_PREFIXES
    )
    return redirect_to_sign_in(Request(scope)) if looks else error_response(error)


def redirect_to_sign_in(request: Request) -> Response:
    """Return the way to the sign-in, and from there back."""
    up = "../" * (request.url.path.count("/") - 1) or "./"
    wanted = request.url.path.removeprefix("/") + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"{up}{DASHBOARD_PATH[1:]}/sign-in?next={quote(wanted, safe='')}", 303)


# Pages --------------------------------------------------------------------------------------------------------------


@render_errors
async def show_overview(request: Request) -> Response:
    """GET /monitoring/events"""
    if not has_monitor_access(request):
        require_user_id(request)
        return render_page(request, "forbidden.html.j2")
    stats = (await call_route(request, monitoring.get_statistics))["stats"]
    active = (await call_route(request, batches.list_batches, {"status": "processing", "limit": 10}))["batches"]
    running = (await call_route(request, jobs.list_jobs, {"status": "processing", "limit": 100}))["jobs"]
    oldest = (await call_route(request, jobs.list_jobs, {"status": "pending", "limit": 1, "sort": "created_at"}))[
        "jobs"
    ]
    by_worker: dict[str, list[Any]] = {}
    for job in running:
        by_worker.setdefault(job["worker_id"], []).append(job)
    minutes = stats["minutes"]
    ended = charts.stack_bars([[(kind, it[kind]) for kind in ("completed", "failed", "cancelled")] for it in minutes])
    took = charts.stack_bars([[("took", it["average_seconds"] or 0)] for it in minutes])
    return render_page(
        request,
        "overview.html.j2",
        live="pulse",
        position=stats["log"]["projection_position"],
        stats=stats,
        active=[{**batch, "eta": _eta_minutes(batch)} for batch in active],
        by_worker=by_worker,
        oldest=oldest[0] if oldest else None,
        ended=ended,
        took=took,
    )


def _eta_minutes(batch: Mapping[str, Any]) -> int | None:
    """Return about how many minutes a batch will take, if it goes on as it did until now."""
    done = batch["completed_jobs"] + batch["failed_jobs"] + batch["cancelled_jobs"]
    left: int = batch["total_jobs"] - done
    if not done or batch["paused"]:
        return None
    passed = (datetime.now(UTC) - datetime.fromisoformat(batch["created_at"])).total_seconds()
    minutes: float = passed / done * left / 60
    return round(minutes)


@render_errors
async def show_jobs(request: Request) -> Response:
    """GET /monitoring/events/jobs"""
    return await _show_list(request, "jobs.html.j2", jobs.list_jobs, _JOB_FILTERS)


@render_errors
async def show_batches(request: Request) -> Response:
    """GET /monitoring/events/batches"""
    return await _show_list(request, "batches.html.j2", batches.list_batches, _BATCH_FILTERS)


async def _show_list(request: Request, template: str, handler: RouteHandler, filters: Sequence[str]) -> Response:
    asked = {name: request.query_params.get(name, "") for name in (*filters, "cursor", "sort")}
    position = get_api_context(request).checkpoint.position
    found = await call_route(request, handler, {**asked, "limit": _PAGE_SIZE})
    following = _next_page_query(request, found)
    return render_page(request, template, live="jobs", position=position, asked=asked, found=found, following=following)


def _next_page_query(request: Request, found: Mapping[str, Any]) -> Markup | None:
    if "next_cursor" not in found:
        return None
    kept = {name: value for name, value in request.query_params.items() if value and name != "cursor"}
    return escape(urlencode({**kept, "cursor": found["next_cursor"]}))  # a link must not be cut


@render_errors
async def show_job(request: Request) -> Response:
    """GET /monitoring/events/jobs/{job_id}"""
    path = {"job_id": request.path_params["job_id"]}
    position = get_api_context(request).checkpoint.position
    it = (await call_route(request, jobs.get_job, path_params=path))["job"]
    told = await call_route(request, history.get_job_history, {"limit": _MAX_EVENTS}, path)
    events = told.get("events", [])
    sent = (await call_route(request, webhooks.list_deliveries, {"job_id": it["job_id"], "limit": 20}))["deliveries"]
    return render_page(
        request,
        "job.html.j2",
        live="job",
        full=f"api/events/jobs/{it['job_id']}",
        position=position,
        job=it,
        events=events,
        cut="next_after_version" in told,
        attempts=_attempt_timeline(events),
        deliveries=sent,
        text=await _render_preview(request, it),
        may=_permissions(request, it),
        gallery=[asset for asset in (it["results"] or {}).get("assets", ()) if asset["path"].endswith("-thumb.jpg")],
    )


def _attempt_timeline(events: list[dict[str, Any]]) -> Any:
    """Return the attempts that events tell of; none, if an event is damaged."""
    try:
        return build_attempt_timeline(events, datetime.now(UTC))
    except (LookupError, TypeError, ValueError):
        return []


def _permissions(request: Request, it: Mapping[str, Any]) -> dict[str, bool]:
    """Return what who asks may do with a job or batch."""
    right = get_access_level(
        get_principal(request), owner=it["user_id"], access=it["access_control"], teams=it["teams"]
    )
    return {"write": right >= AccessLevel.WRITE, "admin": right >= AccessLevel.ADMIN}


async def _render_preview(request: Request, it: Mapping[str, Any]) -> str | None:
    """Return the result as HTML; its beginning as text, if it is too large for that or takes too long; None without."""
    results = it["results"] or {}
    path = (results.get("markdown_file") or "").removeprefix("/events/")
    found = next((file for file in results.get("files", ()) if file["path"] == path), None)
    if found is None:
        return None
    try:
        content = await _read_prefix(request, found, MAX_MARKDOWN_BYTES + 1)
    except (FileLost, FileStoreUnavailable):
        return None  # the page of the file itself says what is wrong with it
    text = content.decode("utf-8", "replace")
    if len(content) > MAX_MARKDOWN_BYTES:
        return text
    up = "../" * (request.url.path.count("/") - 1)
    folder = quote(path.rpartition("/")[0], safe="/&,+;=@!$~")
    files_at = f"{up}api/events/files/{folder}/"
    return await get_api_context(request).previews.render(found["sha256"], text, files_url=files_at) or text


async def _read_prefix(request: Request, found: Mapping[str, Any], limit: int) -> bytes:
    """Return the first `limit` bytes of a result file.

    Raises:
        FileLost: it is not there, or not as it was.
        StoreUnavailable: the store is away.
    """
    file = await get_api_context(request).file_store.open(found["sha256"], found["size"])
    try:
        return b"".join([part async for part in file.read(0, min(file.size, limit))])
    finally:
        await file.close()


@render_errors
async def show_batch(request: Request) -> Response:
    """GET /monitoring/events/batches/{batch_id}"""
    path = {"batch_id": request.path_params["batch_id"]}
    position = get_api_context(request).checkpoint.position
    it = (await call_route(request, batches.get_batch, path_params=path))["batch"]
    status, cursor = request.query_params.get("status", ""), request.query_params.get("cursor", "")
    found = await call_route(
        request, batches.list_batch_jobs, {"status": status, "cursor": cursor, "limit": _PAGE_SIZE}, path
    )
    told = await call_route(request, history.get_batch_history, {"limit": 100}, path)
    return render_page(
        request,
        "batch.html.j2",
        live="batch",
        full=f"api/events/batches/{it['batch_id']}",
        position=position,
        batch={**it, "eta": _eta_minutes(it)},
        asked={"status": status},
        found=found,
        following=_next_page_query(request, found),
        events=told.get("events", []),
        may=_permissions(request, it),
    )


@render_errors
async def show_submit_form(request: Request) -> Response:
    """GET /monitoring/events/submit"""
    require_user_id(request)
    return render_page(request, "submit.html.j2", job_types=sorted(get_api_context(request).job_types))


@render_errors
async def show_log(request: Request) -> Response:
    """GET /monitoring/events/log"""
    asked = {name: request.query_params.get(name, "") for name in ("types", "stream")}
    head = await get_api_context(request).event_store.head_position()
    # The newest that there are: a page of the log is read forwards, so it begins a page before its end.
    found = await call_route(request, log_pages.list_events, {**asked, "after": max(0, head - 200), "limit": 200})
    return render_page(
        request,
        "log.html.j2",
        live="log",
        full="api/ledger/events",
        position=found["last_position"],
        asked=asked,
        events=found.get("events", [])[::-1],
    )


# What pages need ----------------------------------------------------------------------------------------------------


async def validate_batch(request: Request) -> Response:
    """POST /monitoring/events/check: say what is wrong with a batch, and submit nothing."""
    require_user_id(request)
    body, _ = await read_json_body(request, BatchBody)
    await build_batch_jobs(request, body, "batch-", "user")
    return json_response({"status": "success", "jobs": len(body.jobs)})


async def stream_view_updates(request: Request) -> EventStreamResponse:
    """GET /monitoring/events/pulse: that the views have moved, at most once a second."""
    require_user_id(request)
    known = get_api_context(request)
    return EventStreamResponse(watch_views(known.checkpoint), known.live_streams)


async def show_sign_in(request: Request) -> Response:
    """GET /monitoring/events/sign-in"""
    return render_page(
        request, "sign_in.html.j2", wrong=False, onwards=_safe_next_path(request.query_params.get("next", ""))
    )


@render_errors
async def sign_in(request: Request) -> Response:
    """POST /monitoring/events/sign-in"""
    form = await _read_form(request)
    credential, onwards = form.get("credential", "").strip(), _safe_next_path(form.get("next", ""))
    known = get_api_context(request)
    principal = await session_cookie.authenticate_credential(known.auth_backend, request, credential)
    if principal is None:
        return render_page(request, "sign_in.html.j2", status=401, wrong=True, onwards=onwards)
    answer = RedirectResponse(f"../../{onwards}", 303)
    if known.browser_sessions is None:  # the mode needs none
        return answer
    return await session_cookie.start_browser_session(
        answer, request, known.browser_sessions, principal, credential, https=known.http_options.is_https
    )


async def _read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form.

    Raises:
        ApiError: 413, when it is larger than any credential; 400, when it is no form.
    """
    body = await read_body_bytes(request, _MAX_FORM_BYTES)
    try:
        fields = parse_qsl(body.decode("ascii", "replace"), max_num_fields=10)
    except ValueError as error:
        raise ApiError(400, "malformed_form", "This is not the form of the sign-in.") from error
    if len(dict(fields)) < len(fields):
        raise ApiError(400, "malformed_form", "The form has a field more than once: send each field once.")
    return dict(fields)


async def sign_out(request: Request) -> Response:
    """POST /monitoring/events/sign-out"""
    known = get_api_context(request)
    return await session_cookie.end_browser_session(
        RedirectResponse("sign-in", 303), request, known.browser_sessions, https=known.http_options.is_https
    )


def _safe_next_path(next_path: str) -> str:
    """Return where to go after the sign-in: a page of ours, whatever somebody put into the address."""
    return (
        next_path
        if next_path.startswith(f"{DASHBOARD_PATH[1:]}") and "//" not in next_path and "\\" not in next_path
        else DASHBOARD_PATH[1:]
    )


async def get_static_file(request: Request) -> Response:
    """GET /monitoring/events/static/{version}/{name}"""
    found = static_file_response(request.path_params["name"])
    if found is None:
        raise ApiError(404, "not_found", "There is no such file.")
    return found


_PAGE_PATHS: Final = frozenset(
    {DASHBOARD_PATH, *(f"{DASHBOARD_PATH}/{name}" for name in ("jobs", "batches", "submit", "log"))}
)
_PAGE_PATH_PREFIXES: Final = (f"{DASHBOARD_PATH}/jobs/", f"{DASHBOARD_PATH}/batches/")
ROUTES: Final = [
    Route(DASHBOARD_PATH, show_overview),
    Route(f"{DASHBOARD_PATH}/jobs", show_jobs),
    Route(f"{DASHBOARD_PATH}/jobs/{{job_id}}", show_job),
    Route(f"{DASHBOARD_PATH}/batches", show_batches),
    Route(f"{DASHBOARD_PATH}/batches/{{batch_id}}", show_batch),
    Route(f"{DASHBOARD_PATH}/submit", show_submit_form),
    Route(f"{DASHBOARD_PATH}/log", show_log),
    Route(f"{DASHBOARD_PATH}/check", validate_batch, methods=["POST"]),
    Route(f"{DASHBOARD_PATH}/pulse", stream_view_updates),
    Route(f"{DASHBOARD_PATH}/sign-in", show_sign_in),
    Route(f"{DASHBOARD_PATH}/sign-in", sign_in, methods=["POST"]),
    Route(f"{DASHBOARD_PATH}/sign-out", sign_out, methods=["POST"]),
    Route(f"{DASHBOARD_PATH}/static/{{version}}/{{name}}", get_static_file),
]
