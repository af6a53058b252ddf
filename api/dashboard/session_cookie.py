"""api: signing in to the dashboard. The browser holds a session ID in a cookie that no script can read.

A cookie is sent to every port of its host, so it must not be the credential itself: the ID is random, opens nothing
but this dashboard, and is void after sign-out, after 12 hours, and as soon as its API key or token is.

Over https the name begins with `__Host-`: browsers then accept it only from this host itself, over https, for all
paths (RFC 6265bis, 4.1.3.2), and no other name is read. Over plain http, which is for this machine, browsers differ:
Chromium takes a `Secure` cookie from http://localhost, Safari does not. There the name has no prefix.

Other sites cannot use the cookie: it is not sent along with their requests (SameSite=Strict). `SameSite` ignores port
and scheme, so changes are accepted from our own origin only (`KnownHosts`).
"""

from __future__ import annotations

from typing import Final

from starlette.requests import HTTPConnection, Request
from starlette.responses import Response

from jobledger.api.auth.api_keys import ApiKeyToken
from jobledger.api.auth.browser_sessions import BrowserSessions
from jobledger.api.auth.permissions import AuthBackend
from jobledger.api.http.errors import ApiError
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.errors import LedgerUnavailable

COOKIE_NAME: Final = "jobledger"
SECURE_COOKIE_NAME: Final = "__Host-jobledger"
_MAX_CREDENTIAL_CHARACTERS: Final = 16_384


def cookie_name(*, https: bool) -> str:
    """Return the name of the session cookie."""
    return SECURE_COOKIE_NAME if https else COOKIE_NAME


class SessionCookieBackend:
    """Signs in by the session that the cookie names, where there is no `Authorization` header.

    `sessions` is None in modes without sessions. A page of another origin (`api.cors_origins`) has to send a
    credential of its own: the cookie is for our own pages.
    """

    def __init__(self, auth_backend: AuthBackend, sessions: BrowserSessions | None, *, https: bool) -> None:
        self._sign_in = auth_backend
        self._sessions = sessions
        self._cookie = cookie_name(https=https)

    async def __call__(self, connection: HTTPConnection) -> Principal:
        session_id = connection.cookies.get(self._cookie)
        foreign = connection.scope.get("is_foreign_origin", False)
        if self._sessions is None or not session_id or foreign or "authorization" in connection.headers:
            return await self._sign_in(connection)
        try:
            principal = await self._sessions.load_principal(session_id)
        except LedgerUnavailable as error:
            message = "The session cannot be checked: the database does not answer. Try again in a moment."
            raise ApiError(503, "database_unavailable", message, retry_after_seconds=2) from error
        if principal is None:
            raise ApiError(401, "invalid_credentials", "The session has ended. Sign in again.")
        connection.scope["session_cookie"] = True
        return principal


async def authenticate_credential(auth_backend: AuthBackend, request: Request, credential: str) -> Principal | None:
    """Return who signs in with this API key or token; None if it opens nothing.

    Raises:
        ApiError: 503, it cannot be checked now.
    """
    if not credential or len(credential) > _MAX_CREDENTIAL_CHARACTERS or not credential.isascii():
        return None
    if not credential.isprintable():
        return None
    headers = [it for it in request.scope["headers"] if it[0] not in (b"cookie", b"authorization")]
    headers.append((b"authorization", b"Bearer " + credential.encode()))
    try:
        principal = await auth_backend(HTTPConnection({**request.scope, "headers": headers}))
    except ApiError as error:
        if error.status != 401:
            raise
        return None
    return None if principal.user_id is None else principal


async def start_browser_session(
    response: Response,
    request: Request,
    sessions: BrowserSessions,
    principal: Principal,
    credential: str,
    *,
    https: bool,
) -> Response:
    """Begin a session and have the browser hold its ID until it is closed. One that it held before ends.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    await end_browser_session(response, request, sessions, https=https)
    key = ApiKeyToken.parse(credential)
    session_id = await sessions.create(principal, None if key is None else key.key_id)
    del response.headers["set-cookie"]
    response.set_cookie(cookie_name(https=https), session_id, path="/", httponly=True, samesite="strict", secure=https)
    return response


async def end_browser_session(
    response: Response, request: Request, sessions: BrowserSessions | None, *, https: bool
) -> Response:
    """End the session that the browser holds, if there is one, and have the browser forget it.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    name = cookie_name(https=https)
    if sessions is not None and (session_id := request.cookies.get(name)):
        await sessions.end(session_id)
    response.delete_cookie(name, path="/", httponly=True, samesite="strict", secure=https)
    return response


def uses_session_cookie(request: Request) -> bool:
    """Return whether the request was signed in by its cookie."""
    return request.scope.get("session_cookie", False) is True
