"""Canonical JSON, compared with another implementation of RFC 8785."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from hashlib import sha256
from typing import Any

import bson
import pytest
import rfc8785
from bson.codec_options import CodecOptions
from bson.int64 import Int64
from hypothesis import example, given
from hypothesis import strategies as st

from jobledger.ledger.domain.canonical_json import (
    MAX_DEPTH,
    MAX_SAFE_INTEGER,
    compute_canonical_digest,
    encode_canonical_json,
)
from jobledger.ledger.domain.errors import InvalidEvent
from tests.support.event_examples import NOON
from tests.support.strategies import FLOATS, INTEGERS, JSON

DRIVER_CODEC = CodecOptions[dict[str, Any]](tz_aware=True, tzinfo=UTC)


@given(JSON)
@example({"€": 1, "\r": 2, "דּ": 3, "1": 4, "😀": 5, "\x80": 6, "ö": 7})  # RFC 8785, section 3.2.3
@example({"\ue000": 1, "\U00010000": 2})  # U+10000 sorts first by UTF-16, last by code point
@example(['\u20ac$\x0f\nA\'B"\\\\"/', "\x7f", "\u2028", "\0"])
@example({"": 1, "a.b": 2, "a$": 3})
def test_canonical_json_matches_reference_implementation(value: Any) -> None:
    assert encode_canonical_json(value) == rfc8785.dumps(value)
    assert encode_canonical_json({"in an object": value}) == rfc8785.dumps({"in an object": value})


@given(st.integers(0, 2**64 - 1).map(lambda bits: struct.unpack("<d", struct.pack("<Q", bits))[0]))
@example(1e21)
@example(1e21 - 131072)
@example(1e-6)
@example(9.999999999999997e-7)
@example(-7.5e-7)
@example(333333333.33333329)
@example(5e-324)
@example(-1.7976931348623157e308)
@example(-0.0)
@example(123456789012345680000.0)
@example(0.000001)
@example(1e23)
def test_canonical_json_of_double_matches_reference_implementation(number: float) -> None:
    if number - number != 0:  # NaN or infinite
        with pytest.raises(InvalidEvent):
            encode_canonical_json({"n": number})
    else:
        assert encode_canonical_json({"n": number, "m": [1, number]}) == rfc8785.dumps({"n": number, "m": [1, number]})
        assert float(encode_canonical_json(number)) == number


@given(INTEGERS)
@example(MAX_SAFE_INTEGER)
@example(-MAX_SAFE_INTEGER)
def test_canonical_json_of_integer_and_int64_has_all_digits(number: int) -> None:
    assert (
        encode_canonical_json({"n": [number]})
        == encode_canonical_json({"n": [Int64(number)]})
        == rfc8785.dumps({"n": [number]})
    )


@given(FLOATS)
def test_canonical_json_of_equal_numbers_is_equal(number: float) -> None:
    if number.is_integer() and abs(number) <= MAX_SAFE_INTEGER:
        assert encode_canonical_json({"n": number}) == encode_canonical_json({"n": int(number)})


@given(st.integers(min_value=MAX_SAFE_INTEGER + 1) | st.integers(max_value=-MAX_SAFE_INTEGER - 1))
def test_canonical_json_of_unsafe_integer_is_rejected(number: int) -> None:
    with pytest.raises(InvalidEvent):
        encode_canonical_json({"n": number})
    with pytest.raises(InvalidEvent):
        encode_canonical_json([{"n": [number]}])


def test_unsafe_integer_error_suggests_string() -> None:
    with pytest.raises(InvalidEvent, match="send it as a string"):
        encode_canonical_json({"n": MAX_SAFE_INTEGER + 1})


def nest(levels: int, leaf: Any = 0) -> Any:
    for _ in range(levels):
        leaf = [leaf]
    return leaf


@dataclass
class Point:
    x: int = 1


NOT_JSON: dict[str, Any] = {
    "NaN": float("nan"),
    "infinity": float("inf"),
    "lone surrogate": "\ud800",
    "lone surrogate in a name": {"\udfff": 1},
    "lone surrogate among other names": {"a\udfff": {"b": 1}},
    "name that begins with $": {"$set": 1},
    "inner name that begins with $": {"fine": {"$where": 1}},
    "NUL in a name": {"a\0b": 1},
    "too deep": nest(MAX_DEPTH + 2),
    "much too deep": nest(100_000),
    "number as a name": {1: 2},
    "nothing as a name": {None: 2},
    "set": {1, 2},
    "object": object(),
    "complex": complex(1, 2),
    # Some JSON libraries write these, but the driver cannot store them:
    "date": NOON.date(),
    "time of day": NOON.time(),
    "dataclass": Point(),
    "integer beyond 64 bits": 2**64,
    "decimal": Decimal(1),
}


@pytest.mark.parametrize("value", NOT_JSON.values(), ids=NOT_JSON.keys())
@pytest.mark.parametrize(
    "beside", ["plain text", "$ä€😀", 0.5], ids=["beside plain text", "beside special characters", "beside a fraction"]
)
def test_canonical_json_of_unsupported_value_is_rejected(value: Any, beside: Any) -> None:
    with pytest.raises(InvalidEvent):
        encode_canonical_json({"beside": beside, "data": {"values": [value]}})
    with pytest.raises(InvalidEvent):
        encode_canonical_json(value)


def test_deepest_allowed_value_survives_bson_round_trip() -> None:
    value = {"data": nest(MAX_DEPTH - 1)}
    assert encode_canonical_json(bson.decode(bson.encode(value))) == encode_canonical_json(value)


@pytest.mark.parametrize(
    "moment",
    [
        NOON,
        datetime(2025, 2, 1, 12, 0, 0, 123999, tzinfo=UTC),
        datetime(2025, 2, 1, 12),  # noqa: DTZ001 - a time without a zone is what this is about
        datetime(2025, 2, 1, 23, 59, 59, tzinfo=timezone(timedelta(hours=-7))),
        datetime(987, 6, 5, tzinfo=UTC),
    ],
    ids=str,
)
def test_time_has_same_json_after_bson_round_trip(moment: datetime) -> None:
    decoded = bson.decode(bson.encode({"at": moment}), DRIVER_CODEC)
    assert encode_canonical_json(decoded) == encode_canonical_json({"at": moment})
    assert datetime.fromisoformat(encode_canonical_json(moment).decode().strip('"')) == decoded["at"]


def test_bytes_and_tuples_have_same_json_after_bson_round_trip() -> None:
    value = {"bytes": b"\x00\xff", "tuple": (1, (2,))}
    assert (
        encode_canonical_json(bson.decode(bson.encode(value)))
        == encode_canonical_json(value)
        == b'{"bytes":"00ff","tuple":[1,[2]]}'
    )


@given(st.dictionaries(st.text(max_size=3).filter(lambda name: name.isalnum()), INTEGERS), st.randoms())
def test_canonical_digest_ignores_order_of_names(value: dict[str, int], random: Any) -> None:
    names = list(value)
    random.shuffle(names)
    assert (
        compute_canonical_digest({name: value[name] for name in names})
        == compute_canonical_digest(value)
        == sha256(rfc8785.dumps(value)).hexdigest()
    )
