"""workers: convert what a processor returns to JSON that the event log can store. The only place with these rules.

Inline jobs and job processes use the same functions, so a value is accepted or refused in both in the same way.

Data (results, step inputs and outputs, metadata, details of errors) is converted by `to_json`, which refuses a value
that cannot be stored as it is, and names its place. Text for people (log lines, progress, warnings, error messages) is
converted by `to_text`, which never fails: it replaces and clips.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from datetime import date, datetime, time
from enum import Enum
from numbers import Integral, Rational, Real
from pathlib import PurePath
from typing import Any, Final
from uuid import UUID

import orjson
from pydantic import BaseModel, ValidationError

from jobledger.ledger.store.hash_chain import MAX_SAFE_INTEGER
from jobledger.workers.processor import JSON, ProcessorError

MAX_DEPTH: Final = 95  # the event log takes 100 levels, some of which the event itself needs
MAX_VALUE_BYTES: Final = 7 * 1024 * 1024  # of one value; an event may have 8 MiB
MAX_TEXT_LENGTH: Final = 10_000  # characters of a text for people
_VALUE_BYTES: Final = 6  # what a number, a boolean or a key is counted as, besides its text
_CONTAINER_BYTES: Final = 16  # bounds also how long the conversion takes


ValuePath = tuple[Any, str | int]
"""Where a value is: the place of what contains it, and its key or index there. As text only for an error message."""


class InvalidResult(ProcessorError):
    """A value that a processor returned cannot be stored. The message names the place, the problem and the fix."""

    def __init__(self, path: str, problem: str, fix: str) -> None:
        super().__init__("INVALID_RESULT", f"{path} cannot be stored: {problem}. {fix}", details={"path": path})


def to_json(value: Any, path: str) -> JSON:
    """Return a value as JSON: objects, lists, strings, numbers, booleans and null.

    Mappings with string keys, pydantic models and dataclasses become objects; lists and tuples become lists;
    `datetime`, `date` and `time` become ISO 8601 text, `UUID` and `Path` text, and an `Enum` its value. NumPy's
    integers and floats become numbers.

    Args:
        value: What a processor returned.
        place: How error messages name the value, for example `step "page" output`.

    Raises:
        InvalidResult: the value has another type, or JSON or the event log cannot hold it.
    """
    if value is None:
        return None
    if not value and type(value) in (dict, list):  # most results: a look instead of a conversion
        return type(value)()
    return _Conversion().convert(value, (None, path), 0)


def to_text(value: object, limit: int = MAX_TEXT_LENGTH) -> str:
    """Return a text for people as it can be stored: at most `limit` characters, and without broken Unicode."""
    if type(value) is not str:
        value = safe_str(value)
    if not value.isascii():
        value = value.encode("utf-8", "replace").decode()  # a lone surrogate becomes a question mark
    if len(value) > limit:
        value = f"{value[:limit]} … ({len(value) - limit:,} more characters were cut)"
    return value


def safe_str(value: object) -> str:
    """Return `str(value)`, or a description if that fails: foreign classes may raise anything."""
    try:
        return value[:] if type(value) is str else str.__str__(str(value))
    except BaseException as error:  # noqa: BLE001 - whatever __str__ raises, a text is needed
        return f"<{type_name(value)} whose text cannot be read: {type_name(error)}>"


def type_name(value: object) -> str:
    """Return the name of a value's type."""
    return str(type.__dict__["__name__"].__get__(type(value)))


def format_validation_error(error: ValidationError, root: str) -> str:
    """Return what pydantic found wrong with a model, each with its place below `root`."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [f"{'.'.join([root, *map(str, it['loc'])])}: {it['msg']}" for it in found[:5]]
    return "; ".join(lines) + (f"; and {len(found) - 5} more" if len(found) > 5 else "")


class _Conversion:
    """One conversion: counts how large the result is, and what it is inside of."""

    def __init__(self) -> None:
        self._bytes = 0
        self._inside: set[int] = set()

    def convert(self, value: Any, path: ValuePath, depth: int) -> JSON:
        kind = type(value)
        if value is None or kind is bool:
            self._count(_VALUE_BYTES, path)
            return value
        if kind is str:
            return self._text(value, path)
        if kind is int:
            return self._integer(value, path)
        if kind is float:
            return self._number(value, path)
        if depth > MAX_DEPTH:
            raise _invalid(path, f"it is nested more than {MAX_DEPTH} levels deep", "Return a flatter value.")
        if kind is dict or kind is list or kind is tuple:
            return self._container(value, path, depth)
        try:
            return self._other(value, path, depth)
        except ProcessorError:
            raise
        except Exception as error:  # a foreign class - reading it may raise anything
            raise _invalid(
                path,
                f"reading the {type_name(value)} raised {type_name(error)}: {to_text(error, 500)}",
                "Return plain JSON values.",
            ) from error

    def _container(self, value: Any, path: ValuePath, depth: int) -> JSON:
        if id(value) in self._inside:
            raise _invalid(path, "it contains itself", "Return a value without cycles.")
        self._inside.add(id(value))
        self._count(_CONTAINER_BYTES, path)
        try:
            if isinstance(value, Mapping):
                return self._object(value.items(), path, depth)
            return [self.convert(item, (path, index), depth + 1) for index, item in enumerate(value)]
        finally:
            self._inside.discard(id(value))

    def _object(self, items: Iterable[tuple[Any, Any]], path: ValuePath, depth: int) -> JSON:
        converted: dict[str, JSON] = {}
        for key, value in items:
            name = self._key(key, path)
            converted[name] = self.convert(value, (path, name), depth + 1)
        return converted

    def _key(self, key: Any, path: ValuePath) -> str:
        if not isinstance(key, str):
            problem = f"it has the key {to_text(_safe_repr(key), 100)} of type {type_name(key)}"
            raise _invalid(path, problem, "Use strings as keys.")
        name = self._text(key.value if isinstance(key, Enum) else key, (path, "<key>"))
        if name.startswith("$") or "\0" in name:
            raise _invalid(
                path, f"the database does not accept the key {name!r}", "Use keys without a leading $ and without NUL."
            )
        return name

    def _other(self, value: Any, path: ValuePath, depth: int) -> JSON:
        """Convert what is neither plain JSON nor a tuple."""
        if isinstance(value, Enum):
            return self.convert(value.value, path, depth + 1)
        if isinstance(value, str):
            return self._text(str.__str__(value), path)
        if isinstance(value, datetime | date | time):
            return self._text(value.isoformat(), path)
        if isinstance(value, UUID | PurePath):
            return self._text(str(value), path)
        if isinstance(value, BaseModel):
            self._measure(value, path)
            return self._object(value.model_dump(warnings=False).items(), path, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return self._object_of(value, fields, path, depth)
        if isinstance(value, Mapping | list | tuple):
            return self._container(value, path, depth)
        if isinstance(value, Integral):
            return self._integer(int(value), path)
        if isinstance(value, Real) and not isinstance(value, Rational):
            return self._number(float(value), path)
        raise _invalid(path, f"JSON has no {type_name(value)}", _fix(value))

    def _object_of(self, value: Any, fields: dict[str, Any], path: ValuePath, depth: int) -> JSON:
        if id(value) in self._inside:
            raise _invalid(path, "it contains itself", "Return a value without cycles.")
        self._inside.add(id(value))
        try:
            return self._object(fields.items(), path, depth)
        finally:
            self._inside.discard(id(value))

    def _text(self, value: str, path: ValuePath) -> str:
        self._count(len(value) + _VALUE_BYTES, path)
        if value.isascii() and value.isprintable() and '"' not in value and "\\" not in value:
            return value  # nothing is escaped
        try:  # what is escaped takes up to six times as much in a message and in the event log
            self._count(len(orjson.dumps(value)) - len(value), path)
        except orjson.JSONEncodeError:
            index = next(index for index, character in enumerate(value) if "\ud800" <= character <= "\udfff")
            raise _invalid(
                path,
                f"the character U+{ord(value[index]):04X} at index {index} is half of a pair",
                "Decode text with errors='replace'.",
            ) from None
        return value

    def _integer(self, value: int, path: ValuePath) -> int:
        self._count(_VALUE_BYTES, path)
        if not -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
            raise _invalid(path, "the integer is outside ±(2^53 - 1)", "Return it as a string.")
        return value

    def _number(self, value: float, path: ValuePath) -> float:
        self._count(_VALUE_BYTES, path)
        if not math.isfinite(value):
            raise _invalid(path, f"{value} is no JSON number", "Return None or leave it out.")
        return value

    def _measure(self, model: BaseModel, path: ValuePath) -> None:
        """Refuse a model that is too large before pydantic writes it out: it would copy what is shared inside."""
        left, waiting = MAX_VALUE_BYTES // _CONTAINER_BYTES, list[Any]([model])
        while waiting:
            value = waiting.pop()
            if isinstance(value, BaseModel):
                waiting += vars(value).values()
            elif isinstance(value, dict):
                waiting += value.values()
            elif isinstance(value, list | tuple):
                waiting += value
            left -= 1
            if left < len(waiting):
                self._count(MAX_VALUE_BYTES + 1, path)

    def _count(self, size: int, path: ValuePath) -> None:
        """Stop as soon as the value is too large, so that an endless one ends, too."""
        self._bytes += size
        if self._bytes > MAX_VALUE_BYTES:
            while path[0] is not None:
                path = path[0]
            raise _invalid(
                path,
                f"it is larger than {MAX_VALUE_BYTES // 2**20} MiB, or contains itself",
                "Save large content as a file with job.save().",
            )


def _invalid(path: ValuePath, problem: str, fix: str) -> InvalidResult:
    """Return the error for a path, written as `results.metadata.when` or `step "x" output[3].y`."""
    within: list[str] = []
    while path[0] is not None:
        within.append(f"[{path[1]}]" if isinstance(path[1], int) else f".{to_text(path[1], 60)}")
        path = path[0]
    below = "".join(reversed(within))
    if len(below) > 160:
        below = f"{below[:80]}…{below[-80:]}"
    return InvalidResult(to_text(path[1], 200) + below, problem, fix)


def _safe_repr(value: object) -> str:
    try:
        return repr(value)
    except BaseException as error:  # noqa: BLE001 - as in safe_str
        return f"<{type_name(value)} whose text cannot be read: {type_name(error)}>"


def _fix(value: object) -> str:
    if isinstance(value, set | frozenset):
        return "Return a sorted list."
    if isinstance(value, bytes | bytearray | memoryview):
        return "Decode it to text, or save it as a file with job.save()."
    if hasattr(value, "tolist"):
        return "Return its tolist()."
    if hasattr(value, "total_seconds"):
        return "Return its total_seconds()."
    if callable(value) or hasattr(value, "__next__") or hasattr(value, "__await__"):
        return "Return what it yields or returns."
    return "Return a string, number, boolean, list, object, None, or a pydantic model or dataclass of these."
