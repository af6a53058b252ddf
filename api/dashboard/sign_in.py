"""Sign in to the dashboard with an API key or token, and sign out."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from jobledger.api.context import get_api_context
from jobledger.api.dashboard import session_cookie
from jobledger.api.dashboard.errors import render_errors
from jobledger.api.dashboard.rendering import DASHBOARD_PATH, render_page
from jobledger.api.http.bodies import read_body_bytes
from jobledger.api.http.errors import ApiError

_MAX_FORM_BYTES: Final = 20_000


async def show_sign_in(request: Request) -> Response:
    """GET /monitoring/events/sign-in"""
    next_path = _safe_next_path(request.query_params.get("next", ""))
    return render_page(request, "sign_in.html.j2", is_rejected=False, next_path=next_path)


@render_errors
async def sign_in(request: Request) -> Response:
    """POST /monitoring/events/sign-in"""
    form = await _read_form(request)
    credential, next_path = form.get("credential", "").strip(), _safe_next_path(form.get("next", ""))
    ctx = get_api_context(request)
    principal = await session_cookie.authenticate_credential(ctx.auth_backend, request, credential)
    if principal is None:
        return render_page(request, "sign_in.html.j2", status=401, is_rejected=True, next_path=next_path)
    response = RedirectResponse(f"../../{next_path}", 303)
    if ctx.browser_sessions is None:  # the authentication mode has no sessions
        return response
    return await session_cookie.start_browser_session(
        response, request, ctx.browser_sessions, principal, credential, https=ctx.http_options.is_https
    )


async def sign_out(request: Request) -> Response:
    """POST /monitoring/events/sign-out"""
    ctx = get_api_context(request)
    return await session_cookie.end_browser_session(
        RedirectResponse("sign-in", 303), request, ctx.browser_sessions, https=ctx.http_options.is_https
    )


def _safe_next_path(next_path: str) -> str:
    """Return the path to open after the sign-in. Paths outside the dashboard become the overview (open redirects)."""
    dashboard_path = DASHBOARD_PATH[1:]
    is_safe = next_path.startswith(dashboard_path) and "//" not in next_path and "\\" not in next_path
    return next_path if is_safe else dashboard_path


async def _read_form(request: Request) -> dict[str, str]:
    """Return the fields of a form.

    Raises:
        ApiError: 413, the form is larger than any credential; 400, the body is not a form.
    """
    body = await read_body_bytes(request, _MAX_FORM_BYTES)
    try:
        fields = parse_qsl(body.decode("ascii", "replace"), max_num_fields=10)
    except ValueError as error:
        raise ApiError(400, "malformed_form", "The request body is not a sign-in form.") from error
    if len(dict(fields)) < len(fields):
        raise ApiError(400, "malformed_form", "The form contains a field more than once. Send each field once.")
    return dict(fields)
