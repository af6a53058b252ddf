"""Sizes of values in documents, which the domain computes without the driver."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import bson
from hypothesis import given
from hypothesis import strategies as st

from jobledger.ledger.domain.limits import compute_bson_size

_NAMES = st.text(st.characters(exclude_characters="\0", codec="utf-8"), max_size=12)
_LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats()
    | st.text(st.characters(codec="utf-8"), max_size=20)
    | st.binary(max_size=20)
    | st.datetimes().map(lambda time: time.replace(tzinfo=UTC))
)
_VALUES = st.recursive(_LEAVES, lambda inner: st.lists(inner, max_size=12) | st.dictionaries(_NAMES, inner, max_size=5))


def encode_size(value: Any) -> int:
    return len(bson.encode({"": value})) - len(bson.encode({"": None}))


@given(_VALUES)
def test_bson_size_matches_the_driver(value: Any) -> None:
    assert compute_bson_size(value) == encode_size(value)


def test_bson_size_of_long_list_matches_the_driver() -> None:
    for count in (0, 1, 9, 10, 11, 99, 100, 101, 12_345):
        assert compute_bson_size([0] * count) == encode_size([0] * count)


def test_bson_size_of_other_types_is_estimated() -> None:
    assert compute_bson_size({"x": datetime}) > 0
    assert compute_bson_size("\ud800") == 5 + 3
