"""Convert what a processor returns to JSON that the event store accepts. All rules for this are in this module.

Inline jobs and job processes use the same functions, so both accept and reject the same values.

`to_json` converts data: results, inputs and outputs of steps, metadata, and details of errors. It rejects a value that
cannot be stored as it is, and names its path. `to_text` converts text for people: log entries, progress, warnings and
error messages. It never fails: it replaces invalid characters and truncates.
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

from jobledger.ledger.domain.canonical_json import MAX_SAFE_INTEGER
from jobledger.workers.processor import JSON, ProcessorError

MAX_DEPTH: Final = 95
"""Maximum depth of a value. The event store accepts 100 levels, and the event itself needs some."""
MAX_VALUE_BYTES: Final = 7 * 1024 * 1024
"""Maximum size of a value. The limit of an event is 8 MiB."""
MAX_TEXT_LENGTH: Final = 10_000
"""Maximum length of a text in characters."""
_VALUE_BYTES: Final = 6
"""Size that is counted for each scalar and key, in addition to its text."""
_CONTAINER_BYTES: Final = 16
"""Size that is counted for each object and list. It also bounds the duration of the conversion."""


ValuePath = tuple[Any, str | int]
"""The path of a value: the path of its container, and its key or index there. Formatted only for error messages."""


class InvalidResult(ProcessorError):
    """A value returned by a processor cannot be stored. The message contains the path, the problem and the fix."""

    def __init__(self, path: str, problem: str, fix: str) -> None:
        super().__init__("INVALID_RESULT", f"{path} cannot be stored: {problem}. {fix}", details={"path": path})


def to_json(value: Any, path: str) -> JSON:
    """Convert a value to JSON: objects, lists, strings, numbers, booleans and null.

    Mappings with string keys, pydantic models and dataclasses become objects. Lists and tuples become lists.
    `datetime`, `date` and `time` become ISO 8601 text. `UUID` and `Path` become text. An `Enum` becomes its value.
    NumPy integers and floats become numbers.

    Args:
        value: A value returned by a processor.
        path: Name of the value in error messages, for example `step "page" output`.

    Raises:
        InvalidResult: The type is not supported, or JSON or the event store cannot represent the value.
    """
    if value is None:
        return None
    if not value and type(value) in (dict, list):  # fast path for most results
        return type(value)()
    return _Conversion().convert(value, (None, path), 0)


def to_text(value: object, limit: int = MAX_TEXT_LENGTH) -> str:
    """Convert a value to text that can be stored: at most `limit` characters, and valid Unicode. Never fails."""
    if type(value) is not str:
        value = to_safe_str(value)
    if not value.isascii():
        value = value.encode("utf-8", "replace").decode()  # replaces lone surrogates with question marks
    if len(value) > limit:
        value = f"{value[:limit]} … ({len(value) - limit:,} more characters were cut)"
    return value


def to_safe_str(value: object) -> str:
    """Return `str(value)`, or a placeholder if that raises. A third-party class may raise anything."""
    try:
        return value[:] if type(value) is str else str.__str__(str(value))
    except BaseException as error:  # noqa: BLE001 - __str__ of a third-party class may raise anything
        return f"<{get_type_name(value)} whose text cannot be read: {get_type_name(error)}>"


def get_type_name(value: object) -> str:
    """Return the name of a value's type."""
    return str(type.__dict__["__name__"].__get__(type(value)))


def format_validation_error(error: ValidationError, root: str) -> str:
    """Format a pydantic error: each problem with its path below `root`."""
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    lines = [f"{'.'.join([root, *map(str, problem['loc'])])}: {problem['msg']}" for problem in problems[:5]]
    return "; ".join(lines) + (f"; and {len(problems) - 5} more" if len(problems) > 5 else "")


class _Conversion:
    """One conversion. Tracks the size of the result, and the containers around the current value."""

    def __init__(self) -> None:
        self._bytes = 0
        self._containers: set[int] = set()

    def convert(self, value: Any, path: ValuePath, depth: int) -> JSON:
        kind = type(value)
        if value is None or kind is bool:
            self._count(_VALUE_BYTES, path)
            return value
        if kind is str:
            return self._check_text(value, path)
        if kind is int:
            return self._check_integer(value, path)
        if kind is float:
            return self._check_number(value, path)
        if depth > MAX_DEPTH:
            raise _build_error(path, f"it is nested more than {MAX_DEPTH} levels deep", "Return a flatter value.")
        if kind is dict or kind is list or kind is tuple:
            return self._convert_container(value, value, path, depth)
        try:
            return self._convert_other(value, path, depth)
        except ProcessorError:
            raise
        except Exception as error:  # any error - a third-party class may raise anything
            raise _build_error(
                path,
                f"reading the {get_type_name(value)} raised {get_type_name(error)}: {to_text(error, 500)}",
                "Return plain JSON values.",
            ) from error

    def _convert_container(self, value: Any, content: Any, path: ValuePath, depth: int) -> JSON:
        """Convert the content of a container: a mapping, list or tuple."""
        if id(value) in self._containers:
            raise _build_error(path, "it contains itself", "Return a value without cycles.")
        self._containers.add(id(value))
        self._count(_CONTAINER_BYTES, path)
        try:
            if isinstance(content, Mapping):
                return self._convert_object(content.items(), path, depth)
            return [self.convert(item, (path, index), depth + 1) for index, item in enumerate(content)]
        finally:
            self._containers.discard(id(value))

    def _convert_object(self, items: Iterable[tuple[Any, Any]], path: ValuePath, depth: int) -> JSON:
        converted: dict[str, JSON] = {}
        for key, value in items:
            name = self._convert_key(key, path)
            converted[name] = self.convert(value, (path, name), depth + 1)
        return converted

    def _convert_key(self, key: Any, path: ValuePath) -> str:
        if not isinstance(key, str):
            problem = f"it has the key {to_text(key, 100)} of type {get_type_name(key)}"
            raise _build_error(path, problem, "Use strings as keys.")
        name = self._check_text(key.value if isinstance(key, Enum) else key, (path, "<key>"))
        if name.startswith("$") or "\0" in name:
            raise _build_error(
                path, f"the database does not accept the key {name!r}", "Use keys without a leading $ and without NUL."
            )
        return name

    def _convert_other(self, value: Any, path: ValuePath, depth: int) -> JSON:
        """Convert a value that is not a plain JSON type or tuple."""
        if isinstance(value, Enum):
            return self.convert(value.value, path, depth + 1)
        if isinstance(value, str):
            return self._check_text(str.__str__(value), path)
        if isinstance(value, datetime | date | time):
            return self._check_text(value.isoformat(), path)
        if isinstance(value, UUID | PurePath):
            return self._check_text(str(value), path)
        if isinstance(value, BaseModel):
            self._check_model_size(value, path)
            return self._convert_object(value.model_dump(warnings=False).items(), path, depth)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
            return self._convert_container(value, fields, path, depth)
        if isinstance(value, Mapping | list | tuple):
            return self._convert_container(value, value, path, depth)
        if isinstance(value, Integral):
            return self._check_integer(int(value), path)
        if isinstance(value, Real) and not isinstance(value, Rational):
            return self._check_number(float(value), path)
        raise _build_error(path, f"JSON has no type for {get_type_name(value)}", _suggest_fix(value))

    def _check_text(self, value: str, path: ValuePath) -> str:
        self._count(len(value) + _VALUE_BYTES, path)
        if value.isascii() and value.isprintable() and '"' not in value and "\\" not in value:
            return value  # nothing to escape
        try:  # escaping takes up to six times the space in a message and in the event store
            self._count(len(orjson.dumps(value)) - len(value), path)
        except orjson.JSONEncodeError:
            index = next(index for index, character in enumerate(value) if "\ud800" <= character <= "\udfff")
            raise _build_error(
                path,
                f"the character U+{ord(value[index]):04X} at index {index} is half of a surrogate pair",
                "Decode text with errors='replace'.",
            ) from None
        return value

    def _check_integer(self, value: int, path: ValuePath) -> int:
        self._count(_VALUE_BYTES, path)
        if not -MAX_SAFE_INTEGER <= value <= MAX_SAFE_INTEGER:
            raise _build_error(path, "the integer is outside ±(2^53 - 1)", "Return it as a string.")
        return value

    def _check_number(self, value: float, path: ValuePath) -> float:
        self._count(_VALUE_BYTES, path)
        if not math.isfinite(value):
            raise _build_error(path, f"{value} is not a JSON number", "Return None or omit it.")
        return value

    def _check_model_size(self, model: BaseModel, path: ValuePath) -> None:
        """Reject a model that is too large before pydantic dumps it. The dump would copy shared values."""
        remaining, pending = MAX_VALUE_BYTES // _CONTAINER_BYTES, list[Any]([model])
        while pending:
            value = pending.pop()
            if isinstance(value, BaseModel):
                pending += vars(value).values()
            elif isinstance(value, dict):
                pending += value.values()
            elif isinstance(value, list | tuple):
                pending += value
            remaining -= 1
            if remaining < len(pending):
                self._count(MAX_VALUE_BYTES + 1, path)

    def _count(self, size: int, path: ValuePath) -> None:
        """Count a value's size, and raise as soon as the total is too large. This also ends endless values."""
        self._bytes += size
        if self._bytes > MAX_VALUE_BYTES:
            while path[0] is not None:
                path = path[0]
            raise _build_error(
                path,
                f"it is larger than {MAX_VALUE_BYTES // 2**20} MiB, or contains itself",
                "Save large content as a file with job.save().",
            )


def _build_error(path: ValuePath, problem: str, fix: str) -> InvalidResult:
    """Return the error for a path, formatted as `results.metadata.when` or `step "x" output[3].y`."""
    parts: list[str] = []
    while path[0] is not None:
        parts.append(f"[{path[1]}]" if isinstance(path[1], int) else f".{to_text(path[1], 60)}")
        path = path[0]
    location = "".join(reversed(parts))
    if len(location) > 160:
        location = f"{location[:80]}…{location[-80:]}"
    return InvalidResult(to_text(path[1], 200) + location, problem, fix)


def _suggest_fix(value: object) -> str:
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
