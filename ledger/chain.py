"""ledger: canonical JSON (RFC 8785) and the hash chain over a stream. Pure."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import orjson

from ledger.errors import InvalidEvent

GENESIS = bytes(32)
"""`prev` of a stream's first event."""
LARGEST_INTEGER = 2**53 - 1  # beyond it, JSON readers disagree (RFC 8785, section 3.2.2.3, by way of I-JSON)
DEEPEST = 100  # the database takes about 200
_CHAINED = ("event_id", "stream", "version", "type", "schema", "time", "data", "meta", "prev")


def canonical(value: Any) -> bytes:
    """Return the one JSON text of a value made of objects, lists, strings, numbers, booleans and null.

    Times become ISO 8601 in UTC with milliseconds, bytes become lower-case hex: JSON knows neither.

    Raises:
        InvalidEvent: NaN, infinity, an integer beyond ±(2^53 - 1), broken Unicode, or a type that JSON has no word for.
    """
    try:
        return orjson.dumps(_plain(value, 0))
    except (orjson.JSONEncodeError, RecursionError, UnicodeEncodeError, TypeError) as error:
        raise InvalidEvent(f"this cannot be written as JSON: {error}") from error


def chained_text(document: Mapping[str, Any]) -> bytes:
    """Return what an event's hash is the SHA-256 of: the canonical JSON of all its fields but `_id` and `hash`."""
    return canonical({name: document[name] for name in _CHAINED})


def digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON as hex: the same for equal values, on every machine."""
    return hashlib.sha256(canonical(value)).hexdigest()


def _plain(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if depth > DEEPEST:
        raise InvalidEvent(f"this is nested more than {DEEPEST} levels deep")
    if kind is dict:
        joined = "".join(value)
        if "$" in joined or "\0" in joined:
            _refuse_names(value)
        # RFC 8785 sorts by UTF-16 code units; for ASCII that is what Python's sort does.
        names = sorted(value) if joined.isascii() else sorted(value, key=_utf16)
        return {name: _plain(value[name], depth + 1) for name in names}
    if isinstance(value, int):  # also BSON's Int64
        if -LARGEST_INTEGER <= value <= LARGEST_INTEGER:
            return int(value)
        raise InvalidEvent(f"the integer {value} is beyond ±(2^53 - 1); send it as a string")
    if kind is list or kind is tuple:
        return [_plain(item, depth + 1) for item in value]
    if kind is float:
        return orjson.Fragment(_number(value))
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%dT%H:%M:%S.") + f"{value.microsecond // 1000:03d}Z"
    if isinstance(value, bytes):
        return value.hex()
    raise InvalidEvent(f"JSON has no word for {kind.__name__}")


def _refuse_names(names: Iterable[str]) -> None:
    """The database reads `$` at the beginning of a name as an operator or a reference, and cannot store NUL in one."""
    for name in names:
        if name.startswith("$") or "\0" in name:
            raise InvalidEvent(f"the field name {name!r} cannot be stored: it begins with $ or contains NUL")


def _utf16(name: str) -> bytes:
    return name.encode("utf-16-be")


def _number(value: float) -> bytes:
    """Write a float as ECMAScript does (RFC 8785, section 3.2.2.3): the shortest digits that read back the same."""
    if not math.isfinite(value):
        raise InvalidEvent(f"{value} is not a JSON number")
    if value == 0:
        return b"0"
    sign, (digits, exponent) = "-" if value < 0 else "", _digits(abs(value))
    if 0 < exponent <= 21:
        text = digits.ljust(exponent, "0") if len(digits) <= exponent else f"{digits[:exponent]}.{digits[exponent:]}"
    elif -6 < exponent <= 0:
        text = f"0.{'0' * -exponent}{digits}"
    else:
        mantissa = digits[0] + (f".{digits[1:]}" if len(digits) > 1 else "")
        text = f"{mantissa}e{exponent - 1:+d}"
    return (sign + text).encode()


def _digits(value: float) -> tuple[str, int]:
    """Return the shortest digits d and the exponent n with value = 0.d × 10^n."""
    mantissa, _, power = f"{value!r}".partition("e")
    whole, _, fraction = mantissa.partition(".")
    digits = (whole + fraction).lstrip("0")
    leading = len(whole) if whole != "0" else len(fraction.lstrip("0")) - len(fraction)
    return digits.rstrip("0"), leading + int(power or 0)
