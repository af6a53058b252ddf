"""Validate the headers of a webhook: only headers that HTTP transmits unchanged are allowed. Pure.

If a header were changed or dropped, the endpoint would reject the message. This would look like the endpoint's error.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

from jobledger.ledger.domain.limits import MAX_WEBHOOK_HEADER_BYTES

MAX_HEADER_VALUE_CHARACTERS: Final = 8000
_NAME: Final = re.compile(r"[A-Za-z0-9!#%&'*+.^_`|~-][A-Za-z0-9!#$%&'*+.^_`|~-]{0,99}")
_VALUE: Final = re.compile(r"[\t\x20-\x7e\xa0-\xff]*")
_NAME_EXPECTED: Final = "expected a name of 1 to 100 letters, digits and !#%&'*+.^_`|~- (RFC 9110, 5.6.2)"
_CONNECTION_HEADERS: Final = frozenset(
    {"connection", "expect", "host", "http2-settings", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)
_BODY_HEADERS: Final = frozenset({"content-encoding", "content-length", "content-range", "content-type"})
_SIGNATURE_PREFIX: Final = "webhook-"
_PROXY_PREFIX: Final = "proxy-"


def find_unsendable_header(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the name of the first header that HTTP cannot transmit unchanged, and the reason. None if there is
    none.
    """
    for name, value in headers.items():
        problem = None if _NAME.fullmatch(name) else _NAME_EXPECTED
        if (problem := problem or _find_value_problem(value)) is not None:
            return name, problem
    return None


def find_header_problem(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the name of the first header that a webhook must not have, and the reason. None if all are allowed."""
    seen: set[str] = set()
    for name, value in headers.items():
        lower = name.lower()
        problem = _find_name_problem(name, lower) or _find_value_problem(value)
        if problem is None and lower in seen:
            problem = "it occurs twice: header names are case-insensitive"
        if problem is not None:
            return name, problem
        seen.add(lower)
    total = sum(len(name) + len(value) for name, value in headers.items())
    if total > MAX_WEBHOOK_HEADER_BYTES:
        return next(iter(headers)), f"all headers together have {total} bytes; the limit is {MAX_WEBHOOK_HEADER_BYTES}"
    return None


def _find_name_problem(name: str, lower: str) -> str | None:
    if not _NAME.fullmatch(name):
        return _NAME_EXPECTED
    if lower in _CONNECTION_HEADERS or lower.startswith(_PROXY_PREFIX):
        return "this header belongs to the connection, not to the message: remove it"
    if lower in _BODY_HEADERS:
        return "this header describes the body, which Jobledger writes: remove it"
    if lower.startswith(_SIGNATURE_PREFIX):
        return "names that begin with webhook- are reserved for the signature: choose another name"
    return None


def _find_value_problem(value: str) -> str | None:
    if len(value) > MAX_HEADER_VALUE_CHARACTERS:
        return f"its value has {len(value)} characters; the limit is {MAX_HEADER_VALUE_CHARACTERS}"
    if not _VALUE.fullmatch(value):
        return "its value must contain only printable Latin-1 characters and no line breaks"
    if value != value.strip(" \t"):
        return "its value must not begin or end with a space or tab, which HTTP does not transmit"
    return None
