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

from jobledger.api.auth.permissions import signed_in, who_asks
from jobledger.api.context import services
from jobledger.api.dashboard import charts, login
from jobledger.api.dashboard.attempt_timeline import attempts_of
from jobledger.api.dashboard.previews import LARGEST_MARKDOWN_BYTES
from jobledger.api.dashboard.rendering import PREFIX, is_monitor, page, static
from jobledger.api.dashboard.view_updates import beats
from jobledger.api.http.bodies import read_body, read_bytes
from jobledger.api.http.errors import ApiError, error_response, json_response
from jobledger.api.http.sse import EventStream
from jobledger.api.routes import batches, history, jobs, monitoring, webhooks
from jobledger.api.routes import log as log_pages
from jobledger.api.schemas.requests import BatchBody
from jobledger.ledger.domain.access import Right, right_to
from jobledger.ledger.domain.errors import FileLost, JobledgerError, StoreUnavailable

_log = structlog.get_logger()
_PAGE: Final = 50
_EVENTS_SHOWN: Final = 1000
_LARGEST_FORM_BYTES: Final = 20_000
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
Handler = Callable[[Request], Awaitable[Response]]


async def ask(
    request: Request, route: Handler, query: Mapping[str, Any] | None = None, path: Mapping[str, str] | None = None
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
        "path_params": dict(path or {}),
    }
    answer = await route(Request(scope, request.receive))
    return orjson.loads(answer.body)


def shown(handler: Handler) -> Handler:
    """What goes wrong is a page, too; who has not signed in is asked to."""

    @wraps(handler)
    async def guarded(request: Request) -> Response:
        try:
            return await handler(request)
        except ApiError as error:
            if error.status == 401:
                return to_sign_in(request)
            return page(request, "problem.html.j2", status=error.status, message=error.message)
        except JobledgerError as error:
            _log.warning("a page could not be shown", why=str(error))
            return page(request, "problem.html.j2", status=503, message=str(error))

    return guarded


def refused(scope: Scope, error: ApiError) -> ASGIApp:
    """Return the answer for who cannot be let in: at a page the way to the sign-in, elsewhere the error."""
    looks = (scope["method"] in ("GET", "HEAD") and scope["path"] in _PAGES) or scope["path"].startswith(_PAGE_FOLDERS)
    return to_sign_in(Request(scope)) if looks else error_response(error)


def to_sign_in(request: Request) -> Response:
    """Return the way to the sign-in, and from there back."""
    up = "../" * (request.url.path.count("/") - 1) or "./"
    wanted = request.url.path.removeprefix("/") + (f"?{request.url.query}" if request.url.query else "")
    return RedirectResponse(f"{up}{PREFIX[1:]}/sign-in?next={quote(wanted, safe='')}", 303)


# Pages --------------------------------------------------------------------------------------------------------------


@shown
async def overview(request: Request) -> Response:
    """GET /monitoring/events"""
    if not is_monitor(request):
        signed_in(request)
        return page(request, "forbidden.html.j2")
    stats = (await ask(request, monitoring.stats))["stats"]
    active = (await ask(request, batches.listing, {"status": "processing", "limit": 10}))["batches"]
    running = (await ask(request, jobs.listing, {"status": "processing", "limit": 100}))["jobs"]
    oldest = (await ask(request, jobs.listing, {"status": "pending", "limit": 1, "sort": "created_at"}))["jobs"]
    by_worker: dict[str, list[Any]] = {}
    for job in running:
        by_worker.setdefault(job["worker_id"], []).append(job)
    minutes = stats["minutes"]
    ended = charts.stacked([[(kind, it[kind]) for kind in ("completed", "failed", "cancelled")] for it in minutes])
    took = charts.stacked([[("took", it["average_seconds"] or 0)] for it in minutes])
    return page(
        request,
        "overview.html.j2",
        live="pulse",
        position=stats["log"]["views"],
        stats=stats,
        active=[{**batch, "eta": _minutes_left(batch)} for batch in active],
        by_worker=by_worker,
        oldest=oldest[0] if oldest else None,
        ended=ended,
        took=took,
    )


def _minutes_left(batch: Mapping[str, Any]) -> int | None:
    """Return about how many minutes a batch will take, if it goes on as it did until now."""
    done = batch["completed_jobs"] + batch["failed_jobs"] + batch["cancelled_jobs"]
    left: int = batch["total_jobs"] - done
    if not done or batch["paused"]:
        return None
    passed = (datetime.now(UTC) - datetime.fromisoformat(batch["created_at"])).total_seconds()
    minutes: float = passed / done * left / 60
    return round(minutes)


@shown
async def job_list(request: Request) -> Response:
    """GET /monitoring/events/jobs"""
    return await _list(request, "jobs.html.j2", jobs.listing, _JOB_FILTERS)


@shown
async def batch_list(request: Request) -> Response:
    """GET /monitoring/events/batches"""
    return await _list(request, "batches.html.j2", batches.listing, _BATCH_FILTERS)


async def _list(request: Request, template: str, route: Handler, filters: Sequence[str]) -> Response:
    asked = {name: request.query_params.get(name, "") for name in (*filters, "cursor", "sort")}
    position = services(request).checkpoint.position
    found = await ask(request, route, {**asked, "limit": _PAGE})
    following = _following(request, found)
    return page(request, template, live="jobs", position=position, asked=asked, found=found, following=following)


def _following(request: Request, found: Mapping[str, Any]) -> Markup | None:
    if "next" not in found:
        return None
    kept = {name: value for name, value in request.query_params.items() if value and name != "cursor"}
    return escape(urlencode({**kept, "cursor": found["next"]}))  # a link must not be cut


@shown
async def job(request: Request) -> Response:
    """GET /monitoring/events/jobs/{job_id}"""
    path = {"job_id": request.path_params["job_id"]}
    position = services(request).checkpoint.position
    it = (await ask(request, jobs.single, path=path))["job"]
    told = await ask(request, history.of_job, {"limit": _EVENTS_SHOWN}, path)
    events = told.get("events", [])
    sent = (await ask(request, webhooks.listing, {"job_id": it["job_id"], "limit": 20}))["deliveries"]
    return page(
        request,
        "job.html.j2",
        live="job",
        full=f"api/events/jobs/{it['job_id']}",
        position=position,
        job=it,
        events=events,
        cut="next" in told,
        attempts=_attempts(events),
        deliveries=sent,
        text=await _preview(request, it),
        may=_rights(request, it),
        gallery=[asset for asset in (it["results"] or {}).get("assets", ()) if asset["path"].endswith("-thumb.jpg")],
    )


def _attempts(events: list[dict[str, Any]]) -> Any:
    """Return the attempts that events tell of; none, if an event is damaged."""
    try:
        return attempts_of(events, datetime.now(UTC))
    except (LookupError, TypeError, ValueError):
        return []


def _rights(request: Request, it: Mapping[str, Any]) -> dict[str, bool]:
    """Return what who asks may do with a job or batch."""
    right = right_to(who_asks(request), owner=it["user_id"], access=it["access_control"], teams=it["teams"])
    return {"write": right >= Right.WRITE, "admin": right >= Right.ADMIN}


async def _preview(request: Request, it: Mapping[str, Any]) -> str | None:
    """Return the result as HTML; its beginning as text, if it is too large for that or takes too long; None without."""
    results = it["results"] or {}
    path = (results.get("markdown_file") or "").removeprefix("/events/")
    found = next((file for file in results.get("files", ()) if file["path"] == path), None)
    if found is None:
        return None
    try:
        content = await _read(request, found, LARGEST_MARKDOWN_BYTES + 1)
    except (FileLost, StoreUnavailable):
        return None  # the page of the file itself says what is wrong with it
    text = content.decode("utf-8", "replace")
    if len(content) > LARGEST_MARKDOWN_BYTES:
        return text
    up = "../" * (request.url.path.count("/") - 1)
    folder = quote(path.rpartition("/")[0], safe="/&,+;=@!$~")
    files_at = f"{up}api/events/files/{folder}/"
    return await services(request).previews.render(found["sha256"], text, files_at=files_at) or text


async def _read(request: Request, found: Mapping[str, Any], limit: int) -> bytes:
    """Return the first `limit` bytes of a result file.

    Raises:
        FileLost: it is not there, or not as it was.
        StoreUnavailable: the store is away.
    """
    file = await services(request).store.open(found["sha256"], found["size"])
    try:
        return b"".join([part async for part in file.read(0, min(file.size, limit))])
    finally:
        await file.close()


@shown
async def batch(request: Request) -> Response:
    """GET /monitoring/events/batches/{batch_id}"""
    path = {"batch_id": request.path_params["batch_id"]}
    position = services(request).checkpoint.position
    it = (await ask(request, batches.single, path=path))["batch"]
    status, cursor = request.query_params.get("status", ""), request.query_params.get("cursor", "")
    found = await ask(request, batches.jobs_of, {"status": status, "cursor": cursor, "limit": _PAGE}, path)
    told = await ask(request, history.of_batch, {"limit": 100}, path)
    return page(
        request,
        "batch.html.j2",
        live="batch",
        full=f"api/events/batches/{it['batch_id']}",
        position=position,
        batch={**it, "eta": _minutes_left(it)},
        asked={"status": status},
        found=found,
        following=_following(request, found),
        events=told.get("events", []),
        may=_rights(request, it),
    )


@shown
async def submit(request: Request) -> Response:
    """GET /monitoring/events/submit"""
    signed_in(request)
    return page(request, "submit.html.j2", job_types=sorted(services(request).job_types))


@shown
async def log(request: Request) -> Response:
    """GET /monitoring/events/log"""
    asked = {name: request.query_params.get(name, "") for name in ("types", "stream")}
    head = await services(request).log.head()
    # The newest that there are: a page of the log is read forwards, so it begins a page before its end.
    found = await ask(request, log_pages.page, {**asked, "after": max(0, head - 200), "limit": 200})
    return page(
        request,
        "log.html.j2",
        live="log",
        full="api/ledger/events",
        position=found["last_position"],
        asked=asked,
        events=found.get("events", [])[::-1],
    )


# What pages need ----------------------------------------------------------------------------------------------------


async def check(request: Request) -> Response:
    """POST /monitoring/events/check: say what is wrong with a batch, and submit nothing."""
    signed_in(request)
    body, _ = await read_body(request, BatchBody)
    await batches.jobs_in(request, body, "batch-", "user")
    return json_response({"status": "success", "jobs": len(body.jobs)})


async def pulse(request: Request) -> EventStream:
    """GET /monitoring/events/pulse: that the views have moved, at most once a second."""
    signed_in(request)
    known = services(request)
    return EventStream(beats(known.checkpoint), known.streams)


async def sign_in_page(request: Request) -> Response:
    """GET /monitoring/events/sign-in"""
    return page(request, "sign_in.html.j2", wrong=False, onwards=_onwards(request.query_params.get("next", "")))


@shown
async def sign_in(request: Request) -> Response:
    """POST /monitoring/events/sign-in"""
    form = await _form(request)
    credential, onwards = form.get("credential", "").strip(), _onwards(form.get("next", ""))
    known = services(request)
    principal = await login.credential_holder(known.sign_in, request, credential)
    if principal is None:
        return page(request, "sign_in.html.j2", status=401, wrong=True, onwards=onwards)
    answer = RedirectResponse(f"../../{onwards}", 303)
    if known.sessions is None:  # the mode needs none
        return answer
    return await login.begin(answer, request, known.sessions, principal, credential, https=known.edge.https)


async def _form(request: Request) -> dict[str, str]:
    """Return the fields of a form.

    Raises:
        ApiError: 413, when it is larger than any credential; 400, when it is no form.
    """
    body = await read_bytes(request, _LARGEST_FORM_BYTES)
    try:
        fields = parse_qsl(body.decode("ascii", "replace"), max_num_fields=10)
    except ValueError as error:
        raise ApiError(400, "malformed_form", "This is not the form of the sign-in.") from error
    if len(dict(fields)) < len(fields):
        raise ApiError(400, "malformed_form", "The form has a field more than once: send each field once.")
    return dict(fields)


async def sign_out(request: Request) -> Response:
    """POST /monitoring/events/sign-out"""
    known = services(request)
    return await login.end(RedirectResponse("sign-in", 303), request, known.sessions, https=known.edge.https)


def _onwards(wanted: str) -> str:
    """Return where to go after the sign-in: a page of ours, whatever somebody put into the address."""
    return wanted if wanted.startswith(f"{PREFIX[1:]}") and "//" not in wanted and "\\" not in wanted else PREFIX[1:]


async def script_or_style(request: Request) -> Response:
    """GET /monitoring/events/static/{version}/{name}"""
    found = static(request.path_params["name"])
    if found is None:
        raise ApiError(404, "not_found", "There is no such file.")
    return found


_PAGES: Final = frozenset({PREFIX, *(f"{PREFIX}/{name}" for name in ("jobs", "batches", "submit", "log"))})
_PAGE_FOLDERS: Final = (f"{PREFIX}/jobs/", f"{PREFIX}/batches/")
ROUTES: Final = [
    Route(PREFIX, overview),
    Route(f"{PREFIX}/jobs", job_list),
    Route(f"{PREFIX}/jobs/{{job_id}}", job),
    Route(f"{PREFIX}/batches", batch_list),
    Route(f"{PREFIX}/batches/{{batch_id}}", batch),
    Route(f"{PREFIX}/submit", submit),
    Route(f"{PREFIX}/log", log),
    Route(f"{PREFIX}/check", check, methods=["POST"]),
    Route(f"{PREFIX}/pulse", pulse),
    Route(f"{PREFIX}/sign-in", sign_in_page),
    Route(f"{PREFIX}/sign-in", sign_in, methods=["POST"]),
    Route(f"{PREFIX}/sign-out", sign_out, methods=["POST"]),
    Route(f"{PREFIX}/static/{{version}}/{{name}}", script_or_style),
]
