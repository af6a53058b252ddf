"""api: what is done to every request before it gets to a route, and to every answer on its way out. Pure ASGI.

From the outside in: `Observed`, `KnownHosts`, CORS (Starlette's), `SignedIn` (in api/auth/permissions.py), `Limited`.
"""

from __future__ import annotations

import re
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import blake2b
from math import ceil
from secrets import token_bytes
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlsplit
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobledger.api.http.client_address import Network, client_address, get_rate_limit_key
from jobledger.api.http.errors import ApiError, build_validation_error, error_response
from jobledger.ledger.domain.access import Principal

_log = structlog.get_logger("api.access")
STREAM_PATHS: Final = frozenset({"/api/ledger/stream", "/monitoring/events/view-updates"})
"""Addresses whose answers go on until the client leaves."""
SIGN_IN_PATH: Final = "/monitoring/events/sign-in"
MAX_URI_LENGTH: Final = 16_384
MAX_HEADER_BYTES: Final = 32_768
MAX_HEADERS: Final = 100
_BUCKETS_KEPT: Final = 10_000
_ACCEPTED_KEPT: Final = 10_000
_SINGLE_VALUE_HEADERS: Final = (
    b"content-encoding",
    b"content-type",
    b"host",
    b"idempotency-key",
    b"if-modified-since",
    b"if-range",
    b"if-unmodified-since",
    b"last-event-id",
    b"ledger-position",
    b"origin",
    b"range",
)
"""Headers that have one value; of several, two readers could take different ones."""
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_TRACE: Final = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")


@dataclass(frozen=True, slots=True)
class HttpOptions:
    """How the API meets the world. Rates are requests a second of one user (or address), 0 for no limit."""

    cors_origins: tuple[str, ...] = ()
    requests_per_second: float = 0
    burst: int = 50
    max_streams_per_user: int = 0
    max_streams: int = 0
    auth_failures_per_minute: int = 0
    trusted_proxies: tuple[Network, ...] = ()
    is_https: bool = False
    access_log: bool = False


class RequestContextMiddleware:
    """Gives each request an id and each answer the headers that every answer has; writes the access log.

    It wraps the whole application, Starlette's own answer to a fault included.
    """

    def __init__(self, app: ASGIApp, options: HttpOptions) -> None:
        self._app = app
        self._logs = options.access_log
        self._headers = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",  # a signed link is not told to whom it links to
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "default-src 'none'",
        }
        if options.is_https:
            self._headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        began = time.perf_counter()
        given = Headers(scope=scope)
        request_id = given.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid4().hex
        status: int | None = None
        size = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                self._complete(headers, request_id)
                if status < 400:
                    _say_position(scope, headers)
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        about = {"request_id": request_id}
        if traced := _TRACE.fullmatch(given.get("traceparent", "")):
            about["trace_id"] = traced[1]
        with structlog.contextvars.bound_contextvars(**about):
            try:
                if (refused := _malformed(scope)) is not None:
                    await error_response(refused)(scope, receive, send_with_headers)
                else:
                    await self._app(scope, receive, send_with_headers)
            finally:
                if self._logs:
                    took = round((time.perf_counter() - began) * 1000, 1)
                    self._write(scope, about, status=status, ms=took, bytes=size)
        return None

    def _complete(self, headers: MutableHeaders, request_id: str) -> None:
        headers["X-Request-ID"] = request_id
        for name, value in self._headers.items():
            headers.setdefault(name, value)
        policy = headers["Content-Security-Policy"]
        if "frame-ancestors" not in policy:
            headers["Content-Security-Policy"] = f"{policy}; frame-ancestors 'none'"

    @staticmethod
    def _write(scope: Scope, about: Mapping[str, str], **measured: Any) -> None:
        """Write one line: no headers and no query, where keys and signatures are."""
        principal: Principal | None = scope.get("principal")
        path = scope.get("raw_path") or scope["path"].encode()
        _log.info(
            "request",
            method=scope["method"],
            path=path[:300].decode("ascii", "backslashreplace"),
            user=principal.user_id if principal else None,
            **measured,
            **about,
        )


def _say_position(scope: Scope, headers: MutableHeaders) -> None:
    """Add the position that the views had at least reached when they were read, and the preference that was heeded."""
    if (position := scope.get("ledger_position")) is not None:
        headers.setdefault("Ledger-Position", str(position))
    if (preference := scope.get("preference_applied")) is not None:
        headers["Preference-Applied"] = preference


def _malformed(scope: Scope) -> ApiError | None:
    """Return the answer to a request that others could understand differently, or that is too long.

    Uvicorn itself refuses 64 KB that end no head of a request.
    """
    names = [name for name, _ in scope["headers"]]
    if b"transfer-encoding" in names and b"content-length" in names:
        # A proxy that believes the length takes a part of the body for the next request (RFC 9112, 6.3).
        message = "Send Content-Length or Transfer-Encoding, not both."
        return ApiError(400, "ambiguous_length", message, headers={"Connection": "close"})
    if len(set(names)) < len(names) and (repeated := [name for name in _SINGLE_VALUE_HEADERS if names.count(name) > 1]):
        message = f"The header {repeated[0].decode().title()} is there {names.count(repeated[0])} times; send it once."
        return ApiError(400, "duplicate_header", message)
    address = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    if address > MAX_URI_LENGTH:
        message = f"The address has {address} characters; at most {MAX_URI_LENGTH} are read."
        return ApiError(414, "uri_too_long", message)
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        message = f"{len(headers)} headers of {size} bytes; at most {MAX_HEADERS} of {MAX_HEADER_BYTES} bytes are read."
        return ApiError(431, "headers_too_large", message)
    return _repeated_parameters(scope["query_string"])


def _repeated_parameters(query: bytes) -> ApiError | None:
    """Return the refusal of query parameters that have several values: two readers could take different ones."""
    if b"&" not in query:
        return None
    counted = Counter(name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    repeated = [name for name, number in counted.items() if number > 1]
    if not repeated:
        return None
    return build_validation_error(
        [{"loc": (name,), "msg": "is there more than once: give one value"} for name in repeated]
    )


class PathPrefixMiddleware:
    """Removes the path of `api.public_url` from the address of requests that a proxy has passed on with it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._prefix and scope["type"] == "http" and scope["path"].startswith(f"{self._prefix}/"):
            raw = (scope.get("raw_path") or b"").removeprefix(quote(self._prefix).encode())
            # Changed and not copied: what is noted in the scope is read by the middleware around this one.
            scope.update(path=scope["path"].removeprefix(self._prefix), raw_path=raw)
        await self._app(scope, receive, send)


class HostOriginMiddleware:
    """Refuses requests under unknown host names (DNS rebinding) and changes by pages of other origins (CSRF).

    An origin is scheme, host and port together: a page on another port or scheme of our own host is another site to
    us, although `SameSite` cookies are sent with its requests. Our own origin is that of `api.public_url` and no other
    if it is set. Otherwise it is `http://` and the `Host` header, which a browser sets itself and which is one of the
    known names. Pages of `origins` (`api.cors_origins`) may change things, but not with the cookie.

    Current browsers send `Origin` with every request that may change something. One without it is accepted from
    programs, which send no cookie; with the cookie, and for signing in, `Sec-Fetch-Site` has to prove our own page.

    Starlette's own TrustedHostMiddleware does not answer in our envelope.
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
        self._names = frozenset(name.strip("[]").lower() for name in allowed_hosts)
        self._public_origin = None if public_origin is None else parse_origin(public_origin)
        self._origins = frozenset(cors_origins) | frozenset(filter(None, map(parse_origin, cors_origins)))
        self._cookie = f"{session_cookie_name}="

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if _host_name(host) not in self._names:
            message = (
                f"Nothing here is called {host[:100]!r}; the name that others know us by is set by api.public_url."
            )
            await error_response(ApiError(400, "unknown_host", message))(scope, receive, send)
        elif (refused := self._refused(scope, headers, host)) is not None:
            await error_response(ApiError(403, "origin_not_allowed", refused))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _refused(self, scope: Scope, headers: Headers, host: str) -> str | None:
        """Return why a request may not change anything here; None if it may, or only reads."""
        ours = self._public_origin or parse_origin(f"http://{host}")
        sent = headers.getlist("origin")
        scope["is_foreign_origin"] = any(parse_origin(it) != ours for it in sent)
        if scope["method"] in ("GET", "HEAD"):
            return None
        signs_in = scope["path"] in _SIGN_IN_PATHS
        accepted = {ours} if signs_in else {ours, *self._origins}
        if sent:
            # Without a port that is a number, neither has an origin: that does not make them the same.
            foreign = [it for it in sent if (origin := parse_origin(it)) is None or origin not in accepted]
            if len(sent) == 1 and not foreign:
                return None
            return (
                f"A page of {', '.join(sent)[:200]!r} may not change anything here: our pages are those of {ours}. Set "
                "api.public_url to the address in your browser, or name the other page's origin in api.cors_origins."
            )
        site = headers.get("sec-fetch-site")
        if site in ("same-origin", "none"):
            return None
        if site is not None:
            return "A page of another origin may not change anything here; api.cors_origins says whose pages may."
        if signs_in or self._cookie in headers.get("cookie", ""):
            return "With a session cookie, send the header Origin. Programs send Authorization and no cookie."
        return None


_SIGN_IN_PATHS: Final = ("/monitoring/events/sign-in", "/monitoring/events/sign-out")
_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@lru_cache(256)  # the same few at each request
def parse_origin(url: str) -> str | None:
    """Return the origin of a URL (RFC 6454), with its port; None if it has none, such as `null`."""
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
def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


class TokenBuckets:
    """A token bucket for each who asks: `per_second` requests in the long run, `burst` at once. For one process."""

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, client_key: str) -> float:
        """Take a token; return 0, or, if there is none, in how many seconds there will be one."""
        now = self._clock()
        level = self._level(client_key, now)
        if level < 1:
            return (1 - level) / self._per_second
        if len(self._levels) >= _BUCKETS_KEPT:
            # A full bucket is as good as none.
            self._levels = {key: kept for key, kept in self._levels.items() if self._level(key, now) < self._burst}
        self._levels[client_key] = (level - 1, now)
        return 0

    def refund(self, who: str) -> None:
        """Give back a token that was taken."""
        now = self._clock()
        self._levels[who] = (min(float(self._burst), self._level(who, now) + 1), now)

    def __len__(self) -> int:
        return len(self._levels)

    def _level(self, who: str, now: float) -> float:
        level, since = self._levels.get(who, (float(self._burst), now))
        return min(float(self._burst), level + (now - since) * self._per_second)


class AuthFailureLimitMiddleware:
    """Middleware: limits how often an address may send wrong credentials.

    An address beyond the limit gets 429 before its credentials are looked at, but for those that were accepted from it
    lately: a mistake in one program must not lock out its neighbours behind the same address.

    The token is taken before the credentials are looked at, or parallel requests would pass the limit together. It is
    given back unless they are wrong: the answer is 401, or `SignedIn` has set `are_credentials_rejected` in the scope.
    Requests with the same credentials need one token while these are looked at.
    """

    def __init__(self, app: ASGIApp, options: HttpOptions) -> None:
        per_minute = options.auth_failures_per_minute
        self._app = app
        self._buckets = TokenBuckets(per_minute / 60, per_minute) if per_minute else None
        self._trusted = options.trusted_proxies
        self._salt = token_bytes(16)
        self._accepted: OrderedDict[bytes, None] = OrderedDict()
        self._looked_at: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sent = _credentials(scope)
        if self._buckets is None or sent is None:
            return await self._app(scope, receive, send)
        address = get_rate_limit_key(client_address(scope, self._trusted))
        digest = blake2b(address.encode() + b"\0" + sent, key=self._salt, digest_size=16).digest()
        holds_token = digest not in self._accepted and digest not in self._looked_at
        if holds_token and (wait := self._buckets.take(address)) > 0:
            message = "Too many wrong credentials came from your address (api.auth_failures_per_minute)."
            refused = ApiError(429, "too_many_auth_failures", message, retry_after_seconds=ceil(wait))
            return await error_response(refused)(scope, receive, send)
        if holds_token and sent:  # those of a form are in its body: they may differ
            self._looked_at.add(digest)
        buckets = self._buckets

        def give_back() -> None:
            nonlocal holds_token
            if holds_token:
                holds_token = False
                self._looked_at.discard(digest)
                buckets.refund(address)

        def accept() -> None:
            give_back()
            self._accept(digest)

        def refuse() -> None:
            nonlocal holds_token
            self._accepted.pop(digest, None)
            if not holds_token:
                buckets.take(address)
            holds_token = False
            self._looked_at.discard(digest)

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                is_refused = message["status"] == 401 or scope.get("are_credentials_rejected", False)
                refuse() if is_refused else give_back()
            await send(message)

        scope["on_credentials_accepted"] = accept
        try:
            return await self._app(scope, receive, send_counted)
        finally:
            give_back()

    def _accept(self, digest: bytes) -> None:
        self._accepted[digest] = None
        self._accepted.move_to_end(digest)
        if len(self._accepted) > _ACCEPTED_KEPT:
            self._accepted.popitem(last=False)


def _credentials(scope: Scope) -> bytes | None:
    """Return the credentials in a request's headers, if there are any; for the form of the sign-in, b"".

    The form's credential is in its body, and its headers do not count: they are the same at each guess, and a valid
    session would let guesses pass.
    """
    if scope["method"] == "POST" and scope["path"] == SIGN_IN_PATH:
        return b""
    sent = [
        value
        for name, value in scope["headers"]
        if name == b"authorization" or (name == b"cookie" and b"jobledger=" in value)
    ]
    return b"\0".join(sent) if sent else None


class OpenRequestLimiter:
    """How many requests of each user (or address) are open for long in this process."""

    def __init__(self, options: HttpOptions) -> None:
        self._most_of_one = options.max_streams_per_user
        self._most = options.max_streams
        self._open: Counter[str] = Counter()

    def get_rejection(self, who: str) -> ApiError | None:
        """Return why one more may not be opened; None if it may."""
        if 0 < self._most_of_one <= self._open[who]:
            message = f"You have {self._open[who]} live streams open, the most allowed (api.max_streams_per_user)."
            return ApiError(429, "too_many_streams", message, retry_after_seconds=5)
        if 0 < self._most <= self._open.total():
            message = "This process has as many live streams open as it may (api.max_streams)."
            return ApiError(503, "stream_capacity_exceeded", message, retry_after_seconds=5)
        return None

    @contextmanager
    def track(self, who: str) -> Iterator[None]:
        """Count one more while the block runs."""
        self._open[who] += 1
        try:
            yield
        finally:
            self._open[who] -= 1
            if not self._open[who]:
                del self._open[who]

    @contextmanager
    def track_if_allowed(self, who: str) -> Iterator[bool]:
        """Count one more while the block runs, if it may be opened; yield whether."""
        if self.get_rejection(who) is not None:
            yield False
            return
        with self.track(who):
            yield True


@contextmanager
def track_waiting_request(scope: Scope) -> Iterator[bool]:
    """Count a request that waits for something while the block runs. Yield whether it may wait.

    As many may wait as may have live streams: they are counted apart, so that open streams keep nobody from reading
    what they have written.
    """
    with scope["track_waiting_request"]() as allowed:
        yield allowed


class RateLimitMiddleware:
    """Refuses who asks too often, or has too many live streams open. What is open to all is not counted."""

    def __init__(self, app: ASGIApp, options: HttpOptions) -> None:
        self._app = app
        self._buckets = (
            TokenBuckets(options.requests_per_second, options.burst) if options.requests_per_second else None
        )
        self._trusted = options.trusted_proxies
        self._streams = OpenRequestLimiter(options)
        self._held = OpenRequestLimiter(options)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        who = _who(scope, self._trusted)
        if who is None:
            return await self._app(scope, receive, send)
        if self._buckets is not None and (wait := self._buckets.take(who)) > 0:
            refused = ApiError(
                429,
                "too_many_requests",
                "You ask more often than is allowed here (api.requests_per_second).",
                retry_after_seconds=ceil(wait),
            )
            return await error_response(refused)(scope, receive, send)
        scope["track_waiting_request"] = partial(self._held.track_if_allowed, who)
        if scope["path"] not in STREAM_PATHS:
            return await self._app(scope, receive, send)
        if (too_many := self._streams.get_rejection(who)) is not None:
            return await error_response(too_many)(scope, receive, send)
        with self._streams.track(who):
            return await self._app(scope, receive, send)


def _who(scope: Scope, trusted: Collection[Network]) -> str | None:
    """Return under which name a request is counted: the user's, or, if they have not said, that of their machine."""
    principal: Principal | None = scope.get("principal")
    if principal is None:
        return None
    if principal.user_id is not None:
        return f"user:{principal.user_id}"
    return f"address:{get_rate_limit_key(client_address(scope, trusted))}"
