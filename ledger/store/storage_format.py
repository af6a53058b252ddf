"""Check that a stored event has exactly the format in which this program writes events. Pure.

A hash covers the canonical JSON of an event. JSON has fewer types than BSON: the text "dead", the bytes de ad and
JavaScript code `dead` have the same JSON, and so have 1 and 1.0. So this module also compares the BSON types of all
fields: with the envelope, with the models of the events, and in values of any JSON type with the types that JSON has.

It ignores two differences, because the program writes both forms and they mean the same in JSON: 1 and 1.0 in a value
of any JSON type, and the order of the names in an object.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache
from types import UnionType
from typing import Annotated, Any, Final, Literal, Union, get_args, get_origin

import bson
from bson.code import Code
from bson.errors import BSONError
from bson.int64 import Int64
from pydantic import BaseModel

from jobledger.ledger.domain.events import EVENT_TYPES

ENVELOPE_FIELDS: Final[Mapping[str, type]] = {
    "_id": int,
    "event_id": str,
    "stream": str,
    "version": int,
    "type": str,
    "schema": int,
    "time": datetime,
    "data": dict,
    "meta": dict,
    "prev": bytes,
    "hash": bytes,
}
"""The fields of the envelope, in the order in which they are written."""
_NAMES: Final = tuple(ENVELOPE_FIELDS)
_KINDS: Final = tuple(ENVELOPE_FIELDS.values())
_WHOLE: Final = "whole float"
_TYPES: Final[Mapping[str, type]] = {"str": str, "bool": bool, "int": int, "NoneType": type(None), "datetime": datetime}
"""Types of which every value has the kind. `float` is not among them, because whole numbers are a kind of their own."""


def are_canonical(page: Iterable[tuple[Mapping[str, Any], bytes]]) -> bool:
    """Return whether all documents encode to the bytes from which they were decoded. Faster for all than for each."""
    page = list(page)
    encoded = _try_encode({"": [document for document, _ in page]})
    elements = b"".join(b"\x03%d\0%b" % (number, raw) for number, (_, raw) in enumerate(page))
    return encoded is not None and encoded[10:-2] == elements  # without the lengths and ends of the list around them


def find_deviation(document: Mapping[str, Any], raw: bytes | None, data: bytes | None) -> str | None:
    """Return the first field of a stored event that deviates from the format, and how.

    Args:
        document: The decoded event.
        raw: The bytes from which it was decoded. They show what decoding hides, such as a duplicate name. None if
            `are_canonical` has compared them.
        data: The result of `try_encode_canonical_json` for its `data`. If there is one, the hash covers all of `data`.
    """
    what = find_envelope_deviation(document)
    if what is None and data is None:
        what = find_data_deviation(document)
    if what is None and not set(map(type, document["meta"].values())) <= {str}:
        what = _describe_misfit("meta", document["meta"], _JSON)
    if what is None and raw is not None and _try_encode(document) != raw:
        what = f"its {_locate_difference(document, raw)} is encoded in a way that Jobledger does not write"
    return what


def find_envelope_deviation(document: Mapping[str, Any]) -> str | None:
    """Return which field of an envelope is missing, has another type, is unknown or out of order."""
    if tuple(document) == _NAMES and tuple(map(type, document.values())) == _KINDS:
        return None
    if more := document.keys() - ENVELOPE_FIELDS.keys():
        return f"has unknown fields: {', '.join(sorted(more))}"
    for name, kind in ENVELOPE_FIELDS.items():
        if name not in document:
            return f"lacks the field {name}"
        value = document[name]
        if type(value) is not kind and not (kind is int and _get_kind(value) == "int"):
            return f"its {name} is a {type(value).__name__}"
    return None if tuple(document) == _NAMES else "its fields are in the wrong order"


def find_data_deviation(document: Mapping[str, Any]) -> str | None:
    """Return which value in an event's `data` has a type that the program does not write there."""
    return _describe_misfit("data", document["data"], _get_format(document["type"], document["schema"]))


def _describe_misfit(name: str, value: Any, form: _Format) -> str | None:
    """Return which value in a field has a type that the program does not write there."""
    found = _find_misfit(value, form, name)
    return None if found is None else f"its {found[0]} is a {found[1]}"


@dataclass(slots=True)
class _Format:
    """The values allowed: one of `kinds`, an object with these `fields` (others: `rest`), or a list of `item`."""

    kinds: frozenset[str] = frozenset()
    fields: Mapping[Any, _Format] | None = None
    rest: _Format | None = None
    item: _Format | None = None
    types: frozenset[type] = field(init=False)
    """Values of exactly these types have the format. Most values need no closer check."""

    def __post_init__(self) -> None:
        floats = {float} if {"float", _WHOLE} <= self.kinds else set()
        self.types = frozenset(floats | {_TYPES[kind] for kind in self.kinds if kind in _TYPES})

    def __or__(self, other: _Format) -> _Format:
        return _Format(
            self.kinds | other.kinds,
            other.fields if self.fields is None else self.fields,
            self.rest or other.rest,
            self.item or other.item,
        )


def _build_format(*kinds: str) -> _Format:
    form = _Format(frozenset(kinds), fields={})
    form.rest = form.item = form
    return form


_JSON: Final = _build_format("str", "bool", "int", "float", _WHOLE, "NoneType")
_LENIENT: Final = _build_format("str", "bool", "int", "float", _WHOLE, "NoneType", "datetime")
"""For fields and events of later versions, whose models are unknown."""
_LEAVES: Final[Mapping[Any, _Format]] = {
    **{kind: _Format(frozenset({name})) for name, kind in _TYPES.items()},
    float: _Format(frozenset({"int", "float"})),  # whole numbers are written as integers: see `events.CompactFloat`
    Any: _JSON,
}


@cache
def _get_format(event_type: str, schema: int) -> _Format:
    event = EVENT_TYPES.get(event_type)
    return _LENIENT if event is None or schema != event.schema_version else _build_model_format(event)


def _build_model_format(model: type[BaseModel]) -> _Format:
    fields = {name: _build_annotation_format(info.annotation) for name, info in model.model_fields.items()}
    return _Format(fields=fields, rest=_JSON if model.model_config.get("extra") == "allow" else _LENIENT)


def _build_annotation_format(annotation: Any) -> _Format:
    if annotation in _LEAVES:
        return _LEAVES[annotation]
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return _build_model_format(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return _LEAVES[str]
    if origin is Annotated:
        return _build_annotation_format(arguments[0])
    if origin is list:
        return _Format(item=_build_annotation_format(arguments[0]))
    if origin is dict:
        return _Format(fields={}, rest=_build_annotation_format(arguments[1]))
    if origin in (Union, UnionType):
        form = _Format()
        for argument in arguments:
            form |= _build_annotation_format(argument)
        return form
    raise TypeError(f"an event has a field of the type {annotation}, whose stored format is not defined")


def _find_misfit(value: Any, form: _Format, path: str) -> tuple[str, str] | None:
    """Return the path and the type of the first value that deviates from the format."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(value, dict) and form.fields is not None:
        items, fields, rest = value.items(), form.fields, form.rest
    elif isinstance(value, list | tuple) and form.item is not None:
        items, fields, rest = enumerate(value), {}, form.item
    else:
        return None if _get_kind(value) in form.kinds else (path, type(value).__name__)
    for name, it in items:
        inner = fields.get(name, rest)
        if inner is None or type(it) in inner.types:
            continue
        if (found := _find_misfit(it, inner, f"{path}.{name}")) is not None:
            return found
    return None


def _get_kind(value: Any) -> str:
    """Return the name of a value's type as the program writes it. Subclasses of JSON types count as those."""
    if isinstance(value, bool) or value is None:
        return type(value).__name__
    if isinstance(value, str) and not isinstance(value, Code):
        return "str"
    if isinstance(value, int) and not (isinstance(value, Int64) and -(2**31) <= value < 2**31):
        return "int"
    if isinstance(value, float):
        return _WHOLE if value.is_integer() and abs(value) < 2**53 else "float"
    return "datetime" if isinstance(value, datetime) else type(value).__name__


def _locate_difference(value: Any, raw: bytes, path: str = "") -> str:
    """Return the path of the innermost value whose encoding is not in `raw`."""
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    for name, inner in items:
        element = _try_encode({str(name): inner})
        if element is None or element[4:-1] not in raw:
            return _locate_difference(inner, raw, f"{path}.{name}" if path else str(name))
    return path or "document"


def _try_encode(document: Mapping[str, Any]) -> bytes | None:
    try:
        return bson.encode(document)
    except (BSONError, ValueError, OverflowError):
        return None
