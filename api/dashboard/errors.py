"""Errors of the dashboard: an error page, or a redirect to the sign-in page."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import wraps
from typing import Final
from urllib.parse import quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp, Scope

from jobledger.api.dashboard.rendering import DASHBOARD_PATH, get_root_path, render_page
from jobledger.api.http.errors import ApiError, build_error_response, translate_error
from jobledger.ledger.domain.errors import JobledgerError

RouteHandler = Callable[[Request], Awaitable[Response]]
_PAGE_PATHS: Final = frozenset(
    {DASHBOARD_PATH, *(f"{DASHBOARD_PATH}/{name}" for name in ("jobs", "batches", "submit", "log"))}
)
_PAGE_PATH_PREFIXES: Final = (f"{DASHBOARD_PATH}/jobs/", f"{DASHBOARD_PATH}/batches/")


def render_errors(handler: RouteHandler) -> RouteHandler:
    """Decorate the handler of a page: render errors as a page, and redirect to the sign-in page on status 401."""

    @wraps(handler)
    async def handle(request: Request) -> Response:
        try:
            return await handler(request)
        except (ApiError, JobledgerError) as error:
            problem = translate_error(error)
            if problem.status == 401:
                return redirect_to_sign_in(request)
            return render_page(request, "error.html.j2", status=problem.status, message=problem.message)

    return handle


def build_auth_error_response(scope: Scope, error: ApiError) -> ASGIApp:
    """Return the response to an unauthenticated request: a redirect for pages, otherwise the error as JSON."""
    path = scope["path"]
    is_page = (scope["method"] in ("GET", "HEAD") and path in _PAGE_PATHS) or path.startswith(_PAGE_PATH_PREFIXES)
    return redirect_to_sign_in(Request(scope)) if is_page else build_error_response(error)


def redirect_to_sign_in(request: Request) -> Response:
    """Redirect to the sign-in page, which returns to the requested page afterwards."""
    next_path = request.url.path.removeprefix("/") + (f"?{request.url.query}" if request.url.query else "")
    url = f"{get_root_path(request)}{DASHBOARD_PATH[1:]}/sign-in?next={quote(next_path, safe='')}"
    return RedirectResponse(url, 303)
