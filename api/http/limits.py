"""ASGI middleware that limits request rates, failed authentication attempts and open live streams, per process."""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from hashlib import blake2b
from math import ceil
from secrets import token_bytes
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobledger.api.http.client_address import Network, get_client_address, get_rate_limit_key
from jobledger.api.http.errors import ApiError, build_error_response
from jobledger.api.settings import ApiSettings
from jobledger.ledger.domain.access import Principal

STREAM_PATHS: Final = frozenset({"/api/ledger/stream", "/monitoring/events/view-updates"})
"""Paths of responses that continue until the client disconnects."""
SIGN_IN_PATH: Final = "/monitoring/events/sign-in"
_MAX_BUCKETS: Final = 10_000
_MAX_ACCEPTED: Final = 10_000


class TokenBuckets:
    """A token bucket for each client. Counts in this process only.

    Args:
        per_second: Tokens that are added each second: the sustained rate.
        burst: Size of a bucket: the number of requests that a client may send without a pause.
        clock: Returns monotonic time in seconds.
    """

    def __init__(self, per_second: float, burst: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_second = per_second
        self._burst = burst
        self._clock = clock
        self._levels: dict[str, tuple[float, float]] = {}

    def take(self, client_key: str) -> float:
        """Take a token. Return 0, or, if there is none, the seconds until there will be one."""
        now = self._clock()
        level = self._compute_level(client_key, now)
        if level < 1:
            return (1 - level) / self._per_second
        if len(self._levels) >= _MAX_BUCKETS:
            # A full bucket needs no entry: a missing one counts as full.
            self._levels = {
                key: entry for key, entry in self._levels.items() if self._compute_level(key, now) < self._burst
            }
        self._levels[client_key] = (level - 1, now)
        return 0

    def refund(self, client_key: str) -> None:
        """Return a token that was taken."""
        now = self._clock()
        self._levels[client_key] = (min(float(self._burst), self._compute_level(client_key, now) + 1), now)

    def __len__(self) -> int:
        return len(self._levels)

    def _compute_level(self, client_key: str, now: float) -> float:
        level, since = self._levels.get(client_key, (float(self._burst), now))
        return min(float(self._burst), level + (now - since) * self._per_second)


class AuthFailureLimitMiddleware:
    """Limits the number of failed authentication attempts of an address.

    An address over the limit gets 429 before its credentials are checked. Credentials that were accepted from that
    address recently still work: a wrong key in one program must not lock out other programs behind the same address.

    The middleware takes a token before the credentials are checked, because parallel requests would otherwise pass the
    limit together. It refunds the token unless the credentials are wrong: the response has status 401, or
    AuthenticationMiddleware has set `are_credentials_rejected` in the scope. Parallel requests with the same
    credentials need one token together while these are being checked.
    """

    def __init__(self, app: ASGIApp, settings: ApiSettings, trusted_proxies: Collection[Network]) -> None:
        per_minute = settings.auth_failures_per_minute
        self._app = app
        self._buckets = TokenBuckets(per_minute / 60, per_minute) if per_minute else None
        self._trusted_proxies = trusted_proxies
        self._salt = token_bytes(16)
        self._accepted: OrderedDict[bytes, None] = OrderedDict()
        self._being_checked: set[bytes] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        credentials = _read_credentials(scope)
        if self._buckets is None or credentials is None:
            return await self._app(scope, receive, send)
        buckets = self._buckets
        address = get_rate_limit_key(get_client_address(scope, self._trusted_proxies))
        digest = blake2b(address.encode() + b"\0" + credentials, key=self._salt, digest_size=16).digest()
        holds_token = digest not in self._accepted and digest not in self._being_checked
        if holds_token and (wait_seconds := buckets.take(address)) > 0:
            message = "Too many failed authentication attempts from your address (api.auth_failures_per_minute)."
            error = ApiError(429, "too_many_auth_failures", message, retry_after_seconds=ceil(wait_seconds))
            return await build_error_response(error)(scope, receive, send)
        if holds_token and credentials:  # those of the sign-in form are in its body: they may differ
            self._being_checked.add(digest)

        def refund() -> None:
            nonlocal holds_token
            if holds_token:
                holds_token = False
                self._being_checked.discard(digest)
                buckets.refund(address)

        def on_accepted() -> None:
            refund()
            self._remember_accepted(digest)

        def on_rejected() -> None:
            nonlocal holds_token
            self._accepted.pop(digest, None)
            if not holds_token:
                buckets.take(address)
            holds_token = False
            self._being_checked.discard(digest)

        async def send_counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                is_rejected = message["status"] == 401 or scope.get("are_credentials_rejected", False)
                on_rejected() if is_rejected else refund()
            await send(message)

        scope["on_credentials_accepted"] = on_accepted
        try:
            return await self._app(scope, receive, send_counted)
        finally:
            refund()

    def _remember_accepted(self, digest: bytes) -> None:
        self._accepted[digest] = None
        self._accepted.move_to_end(digest)
        if len(self._accepted) > _MAX_ACCEPTED:
            self._accepted.popitem(last=False)


def _read_credentials(scope: Scope) -> bytes | None:
    """Return the credentials in the headers of a request; None without any; b"" for the sign-in form.

    The credential of the form is in its body. Its headers do not count: they are the same for each guess, and a valid
    session cookie would let guesses pass.
    """
    if scope["method"] == "POST" and scope["path"] == SIGN_IN_PATH:
        return b""
    values = [
        value
        for name, value in scope["headers"]
        if name == b"authorization" or (name == b"cookie" and b"jobledger=" in value)
    ]
    return b"\0".join(values) if values else None


class OpenRequestLimiter:
    """Counts the long-running requests of each client in this process."""

    def __init__(self, settings: ApiSettings) -> None:
        self._max_per_client = settings.max_streams_per_user
        self._max_total = settings.max_streams
        self._open: Counter[str] = Counter()

    def _find_rejection(self, client_key: str) -> ApiError | None:
        """Return why the client may not open another request; None if it may."""
        count = self._open[client_key]
        if 0 < self._max_per_client <= count:
            message = f"You have {count} open live streams, which is the maximum (api.max_streams_per_user)."
            return ApiError(429, "too_many_streams", message, retry_after_seconds=5)
        if 0 < self._max_total <= self._open.total():
            message = "This process has the maximum number of open live streams (api.max_streams)."
            return ApiError(503, "stream_capacity_exceeded", message, retry_after_seconds=5)
        return None

    @contextmanager
    def track(self, client_key: str) -> Iterator[ApiError | None]:
        """Count one more open request while the block runs. If the client may not open it, yield why."""
        if (rejection := self._find_rejection(client_key)) is not None:
            yield rejection
            return
        self._open[client_key] += 1
        try:
            yield None
        finally:
            self._open[client_key] -= 1
            if not self._open[client_key]:
                del self._open[client_key]


@contextmanager
def track_waiting_request(scope: Scope) -> Iterator[bool]:
    """Count a request that waits for an event while the block runs. Yield whether it may wait.

    The limits of live streams apply. Waiting requests are counted separately from live streams, so that open streams do
    not keep a user from reading their own writes.
    """
    with scope["track_waiting_request"]() as rejection:
        yield rejection is None


class RateLimitMiddleware:
    """Limits requests per second and open live streams. Requests for public paths are not counted."""

    def __init__(self, app: ASGIApp, settings: ApiSettings, trusted_proxies: Collection[Network]) -> None:
        self._app = app
        self._buckets = (
            TokenBuckets(settings.requests_per_second, settings.burst) if settings.requests_per_second else None
        )
        self._trusted_proxies = trusted_proxies
        self._streams = OpenRequestLimiter(settings)
        self._waiting = OpenRequestLimiter(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        client_key = _get_client_key(scope, self._trusted_proxies)
        if client_key is None:
            return await self._app(scope, receive, send)
        if self._buckets is not None and (wait_seconds := self._buckets.take(client_key)) > 0:
            message = "Too many requests (api.requests_per_second)."
            error = ApiError(429, "too_many_requests", message, retry_after_seconds=ceil(wait_seconds))
            return await build_error_response(error)(scope, receive, send)
        scope["track_waiting_request"] = partial(self._waiting.track, client_key)
        if scope["path"] not in STREAM_PATHS:
            return await self._app(scope, receive, send)
        with self._streams.track(client_key) as rejection:
            app = self._app if rejection is None else build_error_response(rejection)
            return await app(scope, receive, send)


def _get_client_key(scope: Scope, trusted_proxies: Collection[Network]) -> str | None:
    """Return what a request is counted by: its user, or its address without a user; None for public paths."""
    principal: Principal | None = scope.get("principal")
    if principal is None:
        return None
    if principal.user_id is not None:
        return f"user:{principal.user_id}"
    return f"address:{get_rate_limit_key(get_client_address(scope, trusted_proxies))}"
