"""Canonical JSON (RFC 8785): one text for each value, so that equal values have equal hashes on every machine."""

from __future__ import annotations

import hashlib
import math
import re
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import orjson

from jobledger.ledger.domain.errors import InvalidEvent

MAX_SAFE_INTEGER = 2**53 - 1  # above it, JSON readers disagree (RFC 8785, section 3.2.2.3, by way of I-JSON)
MAX_DEPTH = 100  # the database takes about 200
_ODD_NUMBER = re.compile(r"[:,\[]-?[0-9]+(?:\.0(?![0-9])|(?:\.[0-9]+)?[eE]|(?<=[0-9]{16}))")
JSON_OPTIONS = orjson.OPT_SORT_KEYS | orjson.OPT_PASSTHROUGH_DATETIME | orjson.OPT_PASSTHROUGH_DATACLASS
_PLAIN_OPTIONS = JSON_OPTIONS | orjson.OPT_PASSTHROUGH_SUBCLASS
_BEYOND_16_BITS = re.compile("[\U00010000-\U0010ffff]")
_UTC = orjson.OPT_NAIVE_UTC


class TextTooLong(Exception):
    """The text is longer than the caller allows. `size` is its approximate length in bytes, 0 if unknown."""

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self.size = size


def encode_canonical_json(value: Any, max_bytes: int = sys.maxsize) -> bytes:
    """Return the canonical JSON of a value made of objects, lists, strings, numbers, booleans and null.

    Times become ISO 8601 in UTC with milliseconds, bytes become lower-case hex, because JSON has neither.

    Args:
        value: The value.
        max_bytes: The maximum length of the text. A text of 8 MB may take a second.

    Raises:
        InvalidEvent: The value contains NaN, infinity, an integer beyond ±(2^53 - 1), broken Unicode, or a type that
            JSON lacks.
        TextTooLong: The text is longer than `max_bytes`, or may be.
    """
    try:
        text = orjson.dumps(value, default=_encode_scalar, option=JSON_OPTIONS)
    except orjson.JSONEncodeError:
        text = b""  # `_normalize` names the wrong value
    if len(text) > max_bytes or (not text and max_bytes < sys.maxsize):
        raise TextTooLong(len(text))
    try:
        return text if text and not _needs_slow_path(text) else orjson.dumps(_normalize(value, 0))
    except (orjson.JSONEncodeError, RecursionError, UnicodeEncodeError, TypeError) as error:
        raise InvalidEvent(f"this cannot be written as JSON: {error}") from error


def try_encode_canonical_json(value: Any, max_bytes: int = sys.maxsize) -> bytes | None:
    """Return the canonical JSON of a value that has only JSON's own types and no whole floats.

    Return None for other values, and for texts that need the slow path. `encode_canonical_json` encodes those.

    Raises:
        TextTooLong: As `encode_canonical_json`.
    """
    try:
        text = orjson.dumps(value, option=_PLAIN_OPTIONS)
    except orjson.JSONEncodeError:
        return None
    if len(text) > max_bytes:
        raise TextTooLong(len(text))
    return None if _needs_slow_path(text) else text


def compute_canonical_digest(value: Any) -> str:
    """Return the SHA-256 of a value's canonical JSON in hex. It is the same for equal values on every machine."""
    return hashlib.sha256(encode_canonical_json(value)).hexdigest()


def _needs_slow_path(text: bytes) -> bool:
    """Return whether orjson's text may differ from the canonical one or contain what cannot be stored.

    True is rare and the check is cheap: most texts are canonical, and orjson is ten times as fast. The check decodes
    the text because Python searches strings five times as fast as bytes.
    """
    seen = text.decode()
    return (
        not seen.startswith("{")
        or _ODD_NUMBER.search(seen) is not None  # 3600.0, which ECMAScript writes as 3600; 1e-6; integers beyond 2^53
        or "$" in seen  # perhaps in a name, which the database would take for an operator
        or "\\u0000" in seen
        or "null" in seen  # perhaps NaN or infinity, which orjson writes so
        or (len(seen) > 2 * MAX_DEPTH and seen.count("{") + seen.count("[") > MAX_DEPTH)  # perhaps nested that deep
        or (not seen.isascii() and _BEYOND_16_BITS.search(seen) is not None)  # sorts differently in UTF-16
    )


def _normalize(value: Any, depth: int) -> Any:
    kind = type(value)
    if kind is str or kind is bool or value is None:
        return value
    if depth > MAX_DEPTH:
        raise InvalidEvent(f"this is nested more than {MAX_DEPTH} levels deep")
    if kind is dict:
        joined = "".join(value)
        if "$" in joined or "\0" in joined:
            _reject_names(value)
        # RFC 8785 sorts by UTF-16 code units. For ASCII this is the order of Python's sort.
        names = sorted(value) if joined.isascii() else sorted(value, key=lambda name: name.encode("utf-16-be"))
        return {name: _normalize(value[name], depth + 1) for name in names}
    if isinstance(value, int):  # also BSON's Int64
        if -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
            return int(value)
        raise InvalidEvent(f"the integer {value} is beyond ±(2^53 - 1): send it as a string")
    if kind is list or kind is tuple:
        return [_normalize(item, depth + 1) for item in value]
    if kind is float:
        return orjson.Fragment(_encode_float(value))
    return _encode_scalar(value)


def encode_timestamp(value: datetime) -> bytes:
    """Return `_encode_scalar` of a time in quotes, in the fastest way."""
    text = orjson.dumps(value, option=_UTC)
    if not text.endswith(b'+00:00"'):
        return orjson.dumps(_encode_scalar(value))
    return text[:24] + b'Z"' if len(text) > 30 else text[:20] + b'.000Z"'


def _encode_scalar(value: Any) -> str:
    """Return the JSON string for a value of a type that JSON lacks."""
    if isinstance(value, datetime):
        moment = value.astimezone(UTC) if value.utcoffset() else value  # without an offset it is UTC, as in BSON
        return moment.isoformat(timespec="milliseconds")[:23] + "Z"
    if isinstance(value, bytes):
        return value.hex()
    raise InvalidEvent(f"JSON has no {type(value).__name__}: use a string, number, list or object")


def _reject_names(names: Iterable[str]) -> None:
    """Reject names that MongoDB cannot store: it reads a leading `$` as an operator or reference, and NUL ends a
    name.
    """
    for name in names:
        if name.startswith("$") or "\0" in name:
            raise InvalidEvent(f"the field name {name!r} cannot be stored: it begins with $ or contains NUL")


def _encode_float(value: float) -> bytes:
    """Encode a float as ECMAScript does (RFC 8785, section 3.2.2.3): the shortest digits that read back the same."""
    if not math.isfinite(value):
        raise InvalidEvent(f"{value} is not a JSON number")
    shortest = Decimal(repr(value + 0.0)).normalize()  # the addition turns -0.0 into 0.0
    is_plain = not shortest or -7 < shortest.adjusted() < 21
    return f"{shortest:{'f' if is_plain else 'e'}}".encode()
