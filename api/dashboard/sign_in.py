"""Sign in to the dashboard with an API key or token, and sign out."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl

from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response

from jobledger.api.auth.api_keys import ApiKeyToken
from jobledger.api.context import get_api_context
from jobledger.api.dashboard.errors import render_errors
from jobledger.api.dashboard.rendering import DASHBOARD_PATH, render_page
from jobledger.api.http.bodies import read_body_bytes
from jobledger.api.http.errors import ApiError
from jobledger.ledger.domain.access import Principal

_MAX_FORM_BYTES: Final = 20_000


async def show_sign_in(request: Request) -> Response:
    """GET /monitoring/events/sign-in"""
    next_path = _sanitize_next_path(request.query_params.get("next", ""))
    return render_page(request, "sign_in.html.j2", is_rejected=False, next_path=next_path)


@render_errors
async def sign_in(request: Request) -> Response:
    """POST /monitoring/events/sign-in: start a browser session. A session that the browser already has ends."""
    form = await _read_form(request)
    credential, next_path = form.get("credential", "").strip(), _sanitize_next_path(form.get("next", ""))
    principal = await _authenticate(request, credential)
    if principal is None:
        return render_page(request, "sign_in.html.j2", status=401, is_rejected=True, next_path=next_path)
    response = RedirectResponse(f"../../{next_path}", 303)
    ctx = get_api_context(request)
    if ctx.browser_sessions is not None:  # some authentication modes have none
        await _end_browser_session(request)
        key = ApiKeyToken.parse(credential)
        session_id = await ctx.browser_sessions.create(principal, None if key is None else key.key_id)
        # Without an expiry, the browser deletes the cookie when it is closed.
        name, is_https = ctx.settings.session_cookie_name, ctx.settings.is_https
        response.set_cookie(name, session_id, httponly=True, samesite="strict", secure=is_https)
    return response


async def sign_out(request: Request) -> Response:
    """POST /monitoring/events/sign-out"""
    await _end_browser_session(request)
    response = RedirectResponse("sign-in", 303)
    settings = get_api_context(request).settings
    response.delete_cookie(settings.session_cookie_name, httponly=True, samesite="strict", secure=settings.is_https)
    return response


async def _authenticate(request: Request, credential: str) -> Principal | None:
    """Return the principal of an API key or token; None if it is not valid.

    Raises:
        ApiError: 503, the credential cannot be checked at the moment.
    """
    if not credential or not credential.isascii() or not credential.isprintable():
        return None
    headers = [header for header in request.scope["headers"] if header[0] not in (b"cookie", b"authorization")]
    headers.append((b"authorization", b"Bearer " + credential.encode()))
    try:
        principal = await get_api_context(request).auth_backend(HTTPConnection({**request.scope, "headers": headers}))
    except ApiError as error:
        if error.status != 401:
            raise
        return None
    return None if principal.user_id is None else principal


async def _end_browser_session(request: Request) -> None:
    """End the browser session of a request, if it has one.

    Raises:
        LedgerUnavailable: The database failed or does not respond.
    """
    ctx = get_api_context(request)
    session_id = request.cookies.get(ctx.settings.session_cookie_name)
    if ctx.browser_sessions is not None and session_id:
        await ctx.browser_sessions.end(session_id)


def _sanitize_next_path(next_path: str) -> str:
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
