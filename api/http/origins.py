"""Restrict hosts and origins: no DNS rebinding, no changes by pages of other origins (CSRF), CORS."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Final
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Receive, Scope, Send

from jobledger.api.http.errors import ApiError, build_error_response

SIGN_IN_PATHS: Final = ("/monitoring/events/sign-in", "/monitoring/events/sign-out")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}
_CORS_METHODS: Final = ("GET", "POST", "PUT", "DELETE")
_CORS_REQUEST_HEADERS: Final = (
    "Authorization",
    "Cache-Control",  # EventSource polyfills send it
    "Idempotency-Key",
    "If-Match",
    "If-Modified-Since",
    "If-None-Match",
    "If-Range",
    "If-Unmodified-Since",
    "Last-Event-ID",
    "Ledger-Position",
    "Pragma",
    "Prefer",
    "Range",
    "traceparent",
    "tracestate",
    "X-Request-ID",
    "X-Requested-With",
)
_CORS_RESPONSE_HEADERS: Final = (
    "Accept-Ranges",
    "Content-Disposition",
    "Content-Range",
    "ETag",
    "Ledger-Position",
    "Location",
    "Preference-Applied",
    "Retry-After",
    "X-Request-ID",
)


def build_cors_middleware(origins: Sequence[str]) -> list[Middleware]:
    """Return the CORS middleware for `api.cors_origins`; none without origins."""
    if not origins:
        return []
    return [
        Middleware(
            CORSMiddleware,
            allow_origins=origins,
            allow_methods=_CORS_METHODS,
            allow_headers=_CORS_REQUEST_HEADERS,
            expose_headers=_CORS_RESPONSE_HEADERS,
        )
    ]


class HostOriginMiddleware:
    """Rejects requests with unknown host names (DNS rebinding) and changes by pages of other origins (CSRF).

    An origin is scheme, host and port. A page on another port or scheme of the same host has another origin, although
    browsers send `SameSite` cookies with its requests. The API's own origin is that of `api.public_url`. Without
    `api.public_url` it is `http://` plus the `Host` header, which browsers set themselves and which must be an allowed
    host. Pages of `cors_origins` may make changes, but not with the session cookie.

    Current browsers send `Origin` with each request that may change something. A request without `Origin` is accepted
    from programs, which send no cookie. With the cookie, and for sign-in, `Sec-Fetch-Site` must show that the request
    comes from the API's own pages.

    Starlette's TrustedHostMiddleware is not used because its error response is not in the API's format.
    """

    def __init__(
        self,
        app: ASGIApp,
        allowed_hosts: Collection[str],
        *,
        public_origin: str | None = None,
        cors_origins: Collection[str] = (),
        session_cookie_name: str = "",
    ) -> None:
        self._app = app
        self._allowed_hosts = frozenset(name.strip("[]").lower() for name in allowed_hosts)
        self._public_origin = None if public_origin is None else parse_origin(public_origin)
        self._cors_origins = frozenset(cors_origins) | frozenset(filter(None, map(parse_origin, cors_origins)))
        self._cookie = f"{session_cookie_name}="

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _parse_host_name(host) not in self._allowed_hosts:
            message = f"Unknown host {host[:100]!r}. Set api.public_url to the address that clients use."
            await build_error_response(ApiError(400, "unknown_host", message))(scope, receive, send)
        elif (reason := self._find_rejection_reason(scope, headers, host)) is not None:
            await build_error_response(ApiError(403, "origin_not_allowed", reason))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _find_rejection_reason(self, scope: Scope, headers: Headers, host: str) -> str | None:
        """Return why a request may not make changes; None if it may, or if it only reads."""
        own_origin = self._public_origin or parse_origin(f"http://{host}")
        sent = headers.getlist("origin")
        scope["is_foreign_origin"] = any(parse_origin(value) != own_origin for value in sent)
        if scope["method"] in ("GET", "HEAD"):
            return None
        is_sign_in = scope["path"] in SIGN_IN_PATHS
        accepted = {own_origin} if is_sign_in else {own_origin, *self._cors_origins}
        if sent:
            # A header without a valid port has the origin None, and so has a malformed host: these are not equal.
            foreign = [value for value in sent if (origin := parse_origin(value)) is None or origin not in accepted]
            if len(sent) == 1 and not foreign:
                return None
            return (
                f"Pages of {', '.join(sent)[:200]!r} may not make changes here; the API's own origin is {own_origin}. "
                "Set api.public_url to the address in your browser, or add the page's origin to api.cors_origins."
            )
        site = headers.get("sec-fetch-site")
        if site in ("same-origin", "none"):
            return None
        if site is not None:
            return "Pages of other origins may not make changes here. Add the page's origin to api.cors_origins."
        if is_sign_in or self._cookie in headers.get("cookie", ""):
            return "Requests with a session cookie need the header Origin. Programs: send Authorization and no cookie."
        return None


@lru_cache(256)  # requests repeat the same few values
def parse_origin(url: str) -> str | None:
    """Return the origin of a URL (RFC 6454), always with a port; None if it has none, such as `null`."""
    try:
        parts = urlsplit(url)
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return None
    if not parts.hostname or port is None or "@" in parts.netloc:
        return None
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{port}"


@lru_cache(256)
def _parse_host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None
