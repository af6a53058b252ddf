"""api: signing in to the dashboard. The browser keeps the API key or token in a cookie that no script can read.

There is no session of ours to lose, to share between processes or to forget to end: what is in the cookie is checked
with every request like a header, so a key that is revoked opens nothing from that moment. Other sites cannot use it:
the cookie is not sent along with their requests (SameSite), and changes are refused to their pages (`KnownHosts`).
"""

from __future__ import annotations

from typing import Final

from starlette.datastructures import Headers
from starlette.requests import HTTPConnection, Request
from starlette.responses import RedirectResponse, Response

from api.access import SignIn
from api.errors import ApiError
from ledger.access import Principal

COOKIE: Final = "jobledger"
_LONGEST: Final = 3500
"""Of what fits into a cookie with its attributes in every browser."""


class CookieSignIn:
    """Takes what is in the cookie for what would be in the header, where that is missing."""

    def __init__(self, sign_in: SignIn) -> None:
        self._sign_in = sign_in

    async def __call__(self, connection: HTTPConnection) -> Principal:
        kept = connection.cookies.get(COOKIE)
        if not kept or "authorization" in connection.headers:
            return await self._sign_in(connection)
        return await self._sign_in(_with_bearer(connection, kept))


def _with_bearer(connection: HTTPConnection, credential: str) -> HTTPConnection:
    headers = [*connection.scope["headers"], (b"authorization", b"Bearer " + credential.encode("latin-1", "replace"))]
    return HTTPConnection({**connection.scope, "headers": headers})


async def opens(sign_in: SignIn, request: Request, credential: str) -> bool:
    """Whether somebody signs in with this API key or token."""
    if not credential or len(credential) > _LONGEST or not credential.isascii() or not credential.isprintable():
        return False
    bare = {
        **request.scope,
        "headers": [it for it in request.scope["headers"] if it[0] not in (b"cookie", b"authorization")],
    }
    try:
        principal = await sign_in(_with_bearer(HTTPConnection(bare), credential))
    except ApiError:
        return False
    return principal.user_id is not None


def keep(answer: Response, credential: str, *, https: bool) -> Response:
    """Have the browser keep it until it is closed."""
    answer.set_cookie(COOKIE, credential, path="/", httponly=True, samesite="strict", secure=https)
    return answer


def forget(answer: RedirectResponse) -> Response:
    """Have the browser forget it."""
    answer.delete_cookie(COOKIE, path="/")
    return answer


def is_kept(headers: Headers) -> bool:
    """Return whether a browser sends along what it keeps."""
    return f"{COOKIE}=" in headers.get("cookie", "")
