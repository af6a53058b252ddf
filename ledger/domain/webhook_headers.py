"""ledger: which headers a webhook may carry: those that can be sent exactly as they were given. Pure.

A header that is changed on its way, or not sent, would make a receiver refuse what it asked for, and look like the
receiver's fault.
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
_OF_CONNECTION: Final = frozenset(
    {"connection", "expect", "host", "http2-settings", "keep-alive", "te", "trailer", "transfer-encoding", "upgrade"}
)
_OF_BODY: Final = frozenset({"content-encoding", "content-length", "content-range", "content-type"})
_OF_SIGNATURE: Final = "webhook-"
_OF_PROXIES: Final = "proxy-"


def find_unsendable_header(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the name of the first header that HTTP cannot transmit as it is, and why, whoever has set it."""
    for name, value in headers.items():
        problem = None if _NAME.fullmatch(name) else _NAME_EXPECTED
        if (problem := problem or _problem_of_value(value)) is not None:
            return name, problem
    return None


def find_header_problem(headers: Mapping[str, str]) -> tuple[str, str] | None:
    """Return the name of the first header that cannot be sent as given, and why; None if all can."""
    seen: set[str] = set()
    for name, value in headers.items():
        lower = name.lower()
        problem = _problem_of_name(name, lower) or _problem_of_value(value)
        if problem is None and lower in seen:
            problem = "it is given twice: names of headers do not distinguish upper and lower case"
        if problem is not None:
            return name, problem
        seen.add(lower)
    total = sum(len(name) + len(value) for name, value in headers.items())
    if total > MAX_WEBHOOK_HEADER_BYTES:
        return next(
            iter(headers)
        ), f"all headers together have {total} bytes; at most {MAX_WEBHOOK_HEADER_BYTES} are sent"
    return None


def _problem_of_name(name: str, lower: str) -> str | None:
    if not _NAME.fullmatch(name):
        return _NAME_EXPECTED
    if lower in _OF_CONNECTION or lower.startswith(_OF_PROXIES):
        return "this header belongs to the connection, not to the message: leave it out"
    if lower in _OF_BODY:
        return "this header describes the body, which Jobledger writes: leave it out"
    if lower.startswith(_OF_SIGNATURE):
        return "names that begin with webhook- are for the signature: choose another one"
    return None


def _problem_of_value(value: str) -> str | None:
    if len(value) > MAX_HEADER_VALUE_CHARACTERS:
        return f"its value has {len(value)} characters; at most {MAX_HEADER_VALUE_CHARACTERS} are sent"
    if not _VALUE.fullmatch(value):
        return "its value must have printable Latin-1 characters only, without line breaks"
    if value != value.strip(" \t"):
        return "its value must not begin or end with a space or tab, which HTTP does not transmit"
    return None
