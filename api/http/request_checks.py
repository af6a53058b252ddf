"""Reject requests that are too long, or that two readers could understand differently."""

from __future__ import annotations

from collections import Counter
from typing import Final
from urllib.parse import parse_qsl

from starlette.types import Scope

from jobledger.api.http.errors import ApiError, build_validation_error

MAX_URI_LENGTH: Final = 16_384
MAX_HEADER_BYTES: Final = 32_768
MAX_HEADERS: Final = 100
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
"""Headers that have one value. If a request sends several, two readers could use different ones."""


def find_malformed_request(scope: Scope) -> ApiError | None:
    """Return the error for a request that is ambiguous or too long; None if there is none.

    Uvicorn itself rejects requests whose head does not end within 64 KB.
    """
    names = [name for name, _ in scope["headers"]]
    if b"transfer-encoding" in names and b"content-length" in names:
        # A proxy that uses the length would take a part of the body for the next request (RFC 9112, 6.3).
        message = "Content-Length and Transfer-Encoding were both sent. Send one of them."
        return ApiError(400, "ambiguous_length", message, headers={"Connection": "close"})
    if len(set(names)) < len(names):
        duplicates = [name for name in _SINGLE_VALUE_HEADERS if names.count(name) > 1]
        if duplicates:
            name, count = duplicates[0].decode().title(), names.count(duplicates[0])
            return ApiError(400, "duplicate_header", f"The header {name} was sent {count} times. Send it once.")
    length = len(scope.get("raw_path") or scope["path"]) + len(scope["query_string"])
    if length > MAX_URI_LENGTH:
        return ApiError(414, "uri_too_long", f"The URI has {length} characters. The maximum is {MAX_URI_LENGTH}.")
    headers = scope["headers"]
    size = sum(len(name) + len(value) for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEADER_BYTES:
        message = (
            f"The request has {len(headers)} headers with {size} bytes. The maximum is {MAX_HEADERS} headers with "
            f"{MAX_HEADER_BYTES} bytes."
        )
        return ApiError(431, "headers_too_large", message)
    return _find_duplicate_parameters(scope["query_string"])


def _find_duplicate_parameters(query: bytes) -> ApiError | None:
    if b"&" not in query:
        return None
    counts = Counter(name for name, _ in parse_qsl(query.decode("latin-1"), keep_blank_values=True))
    duplicates = [name for name, count in counts.items() if count > 1]
    if not duplicates:
        return None
    return build_validation_error(
        [{"loc": (name,), "msg": "was given several times: send one value"} for name in duplicates]
    )
