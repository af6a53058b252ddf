"""Hypothesis strategies for JSON values and for events built from their models."""

from __future__ import annotations

import types
from datetime import UTC, datetime
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from hypothesis import strategies as st
from pydantic import BaseModel

from jobledger.ledger.domain.canonical_json import MAX_SAFE_INTEGER
from jobledger.ledger.domain.events import Event

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)  # no lone surrogates
NAMES = TEXT.filter(lambda name: not name.startswith("$") and "\0" not in name)
INTEGERS = st.integers(-MAX_SAFE_INTEGER, MAX_SAFE_INTEGER)
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | INTEGERS | FLOATS | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=10,
)
OBJECTS = st.dictionaries(NAMES, JSON, max_size=4)
TIMESTAMPS = st.datetimes(datetime(1970, 1, 1), datetime(2200, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - Hypothesis requires naive bounds


def model_instances(model: type[BaseModel]) -> st.SearchStrategy[Any]:
    """Return instances of a model. Fields with a default are sometimes omitted."""
    required = {name: values_of(info.annotation) for name, info in model.model_fields.items() if info.is_required()}
    optional = {name: values_of(info.annotation) for name, info in model.model_fields.items() if not info.is_required()}
    return st.fixed_dictionaries(required, optional=optional).map(model.model_validate)


def event_instances(event: type[Event]) -> st.SearchStrategy[Any]:
    return model_instances(event)


def values_of(kind: Any) -> st.SearchStrategy[Any]:
    strategies: dict[Any, st.SearchStrategy[Any]] = {
        str: TEXT,
        int: INTEGERS,
        float: FLOATS,
        bool: st.booleans(),
        datetime: TIMESTAMPS,
        Any: JSON,
        types.NoneType: st.none(),
    }
    if kind in strategies:
        return strategies[kind]
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        return model_instances(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return values_of(arguments[0])
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is list:
        return st.lists(values_of(arguments[0]), max_size=3)
    if origin is dict:
        return st.dictionaries(NAMES, values_of(arguments[1]), max_size=3)
    if origin in (Union, types.UnionType):
        return st.one_of([values_of(argument) for argument in arguments])
    raise TypeError(f"no strategy for {kind!r}: add one")
