"""Convert values to JSON and back by the type that a function declares as its result.

Steps and job functions use it: what pydantic can write as JSON and read again, such as models, dataclasses, decimals,
dates and sets, is restored with its type.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache, partial
from typing import Any, get_type_hints

import orjson
from pydantic import (
    PydanticSchemaGenerationError,
    PydanticUndefinedAnnotation,
    PydanticUserError,
    TypeAdapter,
    ValidationError,
)
from pydantic_core import PydanticSerializationError

from jobledger.workers.processor import JSON
from jobledger.workers.results.conversion import InvalidResult, format_validation_error, to_json, to_text

UNTYPED: TypeAdapter[Any] = TypeAdapter(Any)
"""The type of a function that declares none. Its values are converted by `to_json` and returned as stored."""


class UnsupportedType(TypeError):
    """A type cannot be converted to JSON and back. The text names the type and the reason."""


def get_hints(function: Callable[..., Any], local_names: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the annotations of a function as types.

    Args:
        function: The function.
        local_names: Names that are not in the function's module, such as those of the function around it.

    Raises:
        UnsupportedType: An annotation names something that is not defined.
    """
    try:
        return get_type_hints(function, localns=dict(local_names or {}), include_extras=True)
    except NameError as error:
        raise UnsupportedType(
            f"its annotation {error.name!r} is not defined yet: define the type at the top of the module, before the "
            "function, and not only under TYPE_CHECKING"
        ) from error
    except (TypeError, AttributeError, SyntaxError) as error:
        raise UnsupportedType(f"its annotations cannot be read: {to_text(error, 300)}") from error


def make_adapter(annotation: Any) -> TypeAdapter[Any]:
    """Return the adapter of a type.

    Raises:
        UnsupportedType: pydantic has no schema for it.
    """
    if annotation is Any or annotation is inspect.Signature.empty:
        return UNTYPED
    try:
        adapter = _create_adapter(annotation) if isinstance(annotation, Hashable) else TypeAdapter(annotation)
    except (PydanticSchemaGenerationError, PydanticUndefinedAnnotation) as error:
        name = getattr(annotation, "__qualname__", None) or str(annotation)
        raise UnsupportedType(
            f"the type {name} cannot be converted to JSON: use JSON types, a pydantic model or a dataclass"
        ) from error
    if _has_secret(adapter):
        name = getattr(annotation, "__qualname__", None) or str(annotation)
        raise UnsupportedType(f"the type {name} contains a secret, and results and steps are stored for good")
    return adapter


def _has_secret(adapter: TypeAdapter[Any]) -> bool:
    try:
        return is_write_only(adapter.json_schema(mode="serialization"))
    except PydanticUserError:  # the type has no JSON schema
        return False


@lru_cache(maxsize=256)
def _create_adapter(annotation: Any) -> TypeAdapter[Any]:
    return TypeAdapter(annotation)


def is_write_only(schema: Any) -> bool:
    """Return whether a JSON schema contains a secret, such as `SecretStr`. As JSON, its value is only asterisks."""
    if isinstance(schema, dict):
        return schema.get("writeOnly") is True or any(map(is_write_only, schema.values()))
    return isinstance(schema, list) and any(map(is_write_only, schema))


def get_return_adapter(function: Callable[..., Any]) -> TypeAdapter[Any]:
    """Return the adapter of the type that a function declares as its result.

    Raises:
        UnsupportedType: pydantic has no schema for it, or it is not defined.
    """
    return _get_adapter(function, "return")


def dump_argument(function: Callable[..., Any], name: str, value: Any) -> Any:
    """Return an argument as JSON by the annotation of its parameter. Without a usable one, return it unchanged."""
    try:
        adapter = _get_adapter(function, name)
        if adapter is UNTYPED:
            return value
        # Fields of a subclass count: the output may depend on them.
        return adapter.dump_python(value, mode="json", warnings=False, by_alias=True, serialize_as_any=True)
    except (UnsupportedType, PydanticSerializationError, ValueError, TypeError, AttributeError):
        return value


def _get_adapter(function: Callable[..., Any], name: str) -> TypeAdapter[Any]:
    while isinstance(function, partial):
        function = function.func
    function = inspect.unwrap(getattr(function, "__func__", function))
    if not hasattr(function, "__annotations__"):
        function = getattr(type(function), "__call__", function)  # noqa: B004 - an object with this method
    annotations = getattr(function, "__annotations__", {})
    if name not in annotations:
        return UNTYPED
    annotation = annotations[name]
    if isinstance(annotation, str):
        # Only this one: other annotations may exist only for type checkers.
        names = {**vars(sys.modules.get(function.__module__, inspect)), **_read_closure(function)}
        holder = type("Holder", (), {"__annotations__": {name: annotation}})
        try:
            annotation = get_type_hints(holder, globalns=names, include_extras=True)[name]
        except NameError as error:
            raise UnsupportedType(
                f"the type {annotation!r} is not defined: define the type at the top of the module, and not "
                "only under TYPE_CHECKING"
            ) from error
        except (TypeError, AttributeError, SyntaxError) as error:
            raise UnsupportedType(f"the type {annotation!r} cannot be read: {to_text(error, 300)}") from error
    return make_adapter(annotation)


def _read_closure(function: Callable[..., Any]) -> dict[str, Any]:
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None) or ()
    names: dict[str, Any] = {}
    for name, cell in zip(code.co_freevars if code is not None else (), cells, strict=False):
        try:
            names[name] = cell.cell_contents
        except ValueError:  # it is not assigned yet
            continue
    return names


def dump_value(adapter: TypeAdapter[Any], value: Any, path: str) -> JSON:
    """Return a value as JSON of the type. It is converted to the type as pydantic does by default.

    Args:
        adapter: The type.
        value: The value.
        path: Name of the value in error messages.

    Raises:
        InvalidResult: The value does not have the type, or cannot be stored.
    """
    if adapter is UNTYPED:
        return to_json(value, path)
    try:
        dumped = to_json(_dump(adapter, value), path)
        dumped = to_json(_dump(adapter, load_value(adapter, dumped)), path)  # "5" becomes 5 if the type is int
    except ValidationError as error:
        problem = f"it does not have the declared type: {format_validation_error(error, path)}"
        raise InvalidResult(path, problem, "Return a value of this type, or change the annotation.") from error
    except (PydanticSerializationError, ValueError, TypeError, AttributeError) as error:
        problem = f"it does not have the declared type: {to_text(error, 500)}"
        raise InvalidResult(path, problem, "Return a value of this type, or change the annotation.") from error
    return dumped


def _dump(adapter: TypeAdapter[Any], value: Any) -> Any:
    return adapter.dump_python(value, mode="json", warnings=False, by_alias=True)


def load_value(adapter: TypeAdapter[Any], stored: JSON) -> Any:
    """Return a stored value with its type.

    Raises:
        ValidationError: The stored value is not valid for the type.
    """
    return stored if adapter is UNTYPED else adapter.validate_json(orjson.dumps(stored))
