"""Sign in to the dashboard with a session cookie that scripts cannot read.

Browsers send a cookie to every port of its host, so the cookie must not contain the credential. It contains a random
session ID that is valid only for this dashboard. The session ends at sign-out, after 12 hours, and when its API key or
token becomes invalid.

With https the cookie name starts with `__Host-`. Browsers then accept the cookie only from this host, over https and
for all paths (RFC 6265bis, 4.1.3.2), and the server reads no other name. Plain http is for use on the same machine.
There the name has no prefix, because browsers differ: Chromium accepts a `Secure` cookie from http://localhost, Safari
does not.

Other sites cannot use the cookie: browsers do not send it with their requests (SameSite=Strict). `SameSite` ignores
port and scheme, so the API accepts changes only from its own origin (`KnownHosts`).
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
_SCOPE_KEY: Final = "uses_session_cookie"


def get_cookie_name(*, https: bool) -> str:
    """Return the name of the session cookie."""
    return SECURE_COOKIE_NAME if https else COOKIE_NAME


class SessionCookieBackend:
    """Authenticate a request by its session cookie, unless it has an `Authorization` header.

    The cookie works only on the dashboard's own pages. A page of another origin (`api.cors_origins`) must send a
    credential.
    """

    def __init__(self, auth_backend: AuthBackend, sessions: BrowserSessions | None, *, https: bool) -> None:
        """Create the backend.

        Args:
            auth_backend: Authenticates requests without a usable session cookie.
            sessions: The session store, or None in authentication modes without sessions.
            https: Whether browsers reach the API over https.
        """
        self._auth_backend = auth_backend
        self._sessions = sessions
        self._cookie_name = get_cookie_name(https=https)

    async def __call__(self, connection: HTTPConnection) -> Principal:
        session_id = connection.cookies.get(self._cookie_name)
        is_foreign = connection.scope.get("is_foreign_origin", False)
        if self._sessions is None or not session_id or is_foreign or "authorization" in connection.headers:
            return await self._auth_backend(connection)
        try:
            principal = await self._sessions.load_principal(session_id)
        except LedgerUnavailable as error:
            message = "Cannot check the session: the database does not respond. Try again later."
            raise ApiError(503, "database_unavailable", message, retry_after_seconds=2) from error
        if principal is None:
            raise ApiError(401, "invalid_credentials", "The session has ended. Sign in again.")
        connection.scope[_SCOPE_KEY] = True
        return principal


async def authenticate_credential(auth_backend: AuthBackend, request: Request, credential: str) -> Principal | None:
    """Return the principal of an API key or token, or None if it is not valid.

    Raises:
        ApiError: 503, the credential cannot be checked at the moment.
    """
    if not credential or len(credential) > _MAX_CREDENTIAL_CHARACTERS or not credential.isascii():
        return None
    if not credential.isprintable():
        return None
    headers = [header for header in request.scope["headers"] if header[0] not in (b"cookie", b"authorization")]
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
    """Start a session and set its cookie. A session that the browser already has ends.

    The cookie has no expiry, so the browser deletes it when it is closed.

    Raises:
        LedgerUnavailable: The database failed or does not respond.
    """
    await end_browser_session(response, request, sessions, https=https)
    key = ApiKeyToken.parse(credential)
    session_id = await sessions.create(principal, None if key is None else key.key_id)
    del response.headers["set-cookie"]
    response.set_cookie(
        get_cookie_name(https=https), session_id, path="/", httponly=True, samesite="strict", secure=https
    )
    return response


async def end_browser_session(
    response: Response, request: Request, sessions: BrowserSessions | None, *, https: bool
) -> Response:
    """End the session of the request, if any, and delete its cookie.

    Raises:
        LedgerUnavailable: The database failed or does not respond.
    """
    name = get_cookie_name(https=https)
    if sessions is not None and (session_id := request.cookies.get(name)):
        await sessions.end(session_id)
    response.delete_cookie(name, path="/", httponly=True, samesite="strict", secure=https)
    return response


def uses_session_cookie(request: Request) -> bool:
    """Return whether the request was authenticated by its session cookie."""
    return request.scope.get(_SCOPE_KEY, False) is True
