"""ASGI middleware around the application: request IDs, common headers, response counts, access log, path prefix."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final
from urllib.parse import quote
from uuid import uuid4

import structlog
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobledger.api.http.errors import build_error_response
from jobledger.api.http.request_checks import find_malformed_request
from jobledger.ledger.domain.access import Principal

_log = structlog.get_logger("api.access")
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,100}")
_TRACEPARENT: Final = re.compile(r"[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(?:-.*)?")
_MAX_LOGGED_PATH_BYTES: Final = 300


class RequestContextMiddleware:
    """Assigns an ID to each request, adds the common response headers, counts responses and writes the access log.

    It wraps the whole application, so that Starlette's own error responses have the headers and are counted, too.
    """

    def __init__(self, app: ASGIApp, *, is_https: bool, has_access_log: bool) -> None:
        self._app = app
        self._has_access_log = has_access_log
        self.response_counts: Counter[int] = Counter()
        """How many responses of this process had which HTTP status."""
        self._headers = {
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",  # a page must not leak the signed link it was opened with
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Security-Policy": "default-src 'none'",
        }
        if is_https:
            self._headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started_at = time.perf_counter()
        request_headers = Headers(scope=scope)
        request_id = request_headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = uuid4().hex
        status: int | None = None
        size = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = message["status"]
                self.response_counts[status] += 1
                headers = MutableHeaders(scope=message)
                self._add_common_headers(headers, request_id)
                if status < 400:
                    _add_scope_headers(scope, headers)
            elif message["type"] == "http.response.body":
                size += len(message.get("body", b""))
            await send(message)

        context = {"request_id": request_id}
        if trace := _TRACEPARENT.fullmatch(request_headers.get("traceparent", "")):
            context["trace_id"] = trace[1]
        with structlog.contextvars.bound_contextvars(**context):
            try:
                if (error := find_malformed_request(scope)) is not None:
                    await build_error_response(error)(scope, receive, send_with_headers)
                else:
                    await self._app(scope, receive, send_with_headers)
            finally:
                if self._has_access_log:
                    duration_ms = round((time.perf_counter() - started_at) * 1000, 1)
                    _log_request(scope, context, status=status, duration_ms=duration_ms, response_bytes=size)
        return None

    def _add_common_headers(self, headers: MutableHeaders, request_id: str) -> None:
        headers["X-Request-ID"] = request_id
        for name, value in self._headers.items():
            headers.setdefault(name, value)
        policy = headers["Content-Security-Policy"]
        if "frame-ancestors" not in policy:
            headers["Content-Security-Policy"] = f"{policy}; frame-ancestors 'none'"


def _log_request(scope: Scope, context: Mapping[str, str], **measurements: Any) -> None:
    """Write one line, without headers and query: they hold keys and signatures."""
    principal: Principal | None = scope.get("principal")
    path = scope.get("raw_path") or scope["path"].encode()
    _log.info(
        "request",
        method=scope["method"],
        path=path[:_MAX_LOGGED_PATH_BYTES].decode("ascii", "backslashreplace"),
        user_id=principal.user_id if principal else None,
        **measurements,
        **context,
    )


def _add_scope_headers(scope: Scope, headers: MutableHeaders) -> None:
    """Add the headers that a route has requested in the scope.

    `ledger_position` is a position that the views had reached when they were read. `preference_applied` is the
    preference that the route applied (RFC 7240).
    """
    if (position := scope.get("ledger_position")) is not None:
        headers.setdefault("Ledger-Position", str(position))
    if (preference := scope.get("preference_applied")) is not None:
        headers["Preference-Applied"] = preference


class PathPrefixMiddleware:
    """Removes the path of `api.public_url` from request paths, for proxies that forward it."""

    def __init__(self, app: ASGIApp, prefix: str) -> None:
        self._app = app
        self._prefix = prefix

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self._prefix and scope["type"] == "http" and scope["path"].startswith(f"{self._prefix}/"):
            raw = (scope.get("raw_path") or b"").removeprefix(quote(self._prefix).encode())
            # The scope changes in place: the middleware around this one reads keys that inner code adds to the scope.
            scope.update(path=scope["path"].removeprefix(self._prefix), raw_path=raw)
        await self._app(scope, receive, send)
