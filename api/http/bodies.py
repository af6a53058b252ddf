"""api: read and validate request bodies with bounded time and memory.

The size of a body is bounded while it is received, the number of its values before it is parsed. Large bodies are
parsed and validated in a thread, so that other requests are answered meanwhile. pydantic and the JSON parser hold the
interpreter lock, so the bounds also limit how long a single call of theirs takes.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final, ParamSpec, TypeVar

import orjson
from pydantic import BaseModel
from pydantic_core import from_json
from starlette.requests import ClientDisconnect, Request

from jobledger.api.context import get_api_context
from jobledger.api.http.errors import ApiError
from jobledger.api.http.memory_budget import MemoryReservation
from jobledger.api.http.validation import validate_content

MAX_VALUES: Final = 1_000_000
"""Values in a body: a batch of 10,000 sessions has about 200,000."""
MAX_CONTAINERS: Final = 250_000
"""Objects and arrays in a body: a batch of 10,000 sessions has about 40,000. They take most of the parser's time."""
_LARGE_BYTES: Final = 64 * 1024
_MANY_VALUES: Final = 2_000
_BYTES_PER_VALUE: Final = 100
_BYTES_PER_CONTAINER: Final = 300
_LARGEST_CHARACTER_BYTES: Final = 4

Model = TypeVar("Model", bound=BaseModel)
Params = ParamSpec("Params")
Result = TypeVar("Result")


async def read_body_bytes(request: Request, limit: int, setting: str = "") -> bytearray:
    """Return the request's body as it is.

    Raises:
        ApiError: 413, when it has more bytes than `limit`; 415, when it is compressed; 400, when it is incomplete; 503.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"Content-Encoding {encoding[:40]!r} is not supported: send the body without compression."
        raise ApiError(415, "unsupported_content_encoding", message, headers={"Accept-Encoding": "identity"})
    memory: MemoryReservation = request.scope["memory_reservation"]
    body = bytearray()
    try:
        async for part in request.stream():
            if len(body) + len(part) > limit:
                raise ApiError(413, "content_too_large", f"The body is larger than {limit} bytes{setting}.")
            memory.add(2 * len(part))  # as received, and as parsed
            body += part
    except ClientDisconnect as gone:
        raise ApiError(400, "incomplete_body", "The connection ended before the body did.") from gone
    return body


async def read_json_body(request: Request, model: type[Model]) -> tuple[Model, Any]:
    """Return the request's JSON body as a model, and as it was parsed.

    Raises:
        ApiError: 415, 413 or 400, when it is not JSON, too large, or broken; 422, naming each wrong field; 503.
    """
    # Also what keeps other sites' pages from posting here: a browser sends this type across origins only when asked.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise ApiError(415, "unsupported_media_type", "Send JSON, with the header Content-Type: application/json.")
    body = await read_body_bytes(request, get_api_context(request).max_body_bytes, " (api.max_body_bytes)")
    mark_large_body(request, len(body), body.count(b","))
    return await run_off_loop(request, _parsed, request, model, body)


async def read_optional_json_body(request: Request, model: type[Model]) -> tuple[Model, Any]:
    """Return the request's JSON body as `read_body`. Without a content type there is none, which is the same as `{}`.

    Raises:
        ApiError: as `read_body`.
    """
    return (
        await read_json_body(request, model) if "content-type" in request.headers else (validate_content(model, {}), {})
    )


def mark_large_body(request: Request, size: int, values: int) -> None:
    """Note how much there is to do for a request: `off_loop` uses a thread where that is much."""
    if size > _LARGE_BYTES or values > _MANY_VALUES:
        request.scope["large_body"] = True


async def run_off_loop(
    request: Request, function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Call a function that takes long when the request's body is large: then in a thread."""
    if request.scope.get("large_body"):
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)


def _parsed(request: Request, model: type[Model], body: bytearray) -> tuple[Model, Any]:
    memory: MemoryReservation = request.scope["memory_reservation"]
    if request.scope.get("large_body"):
        values, containers = estimate_value_count(body)
        if values > MAX_VALUES or containers > MAX_CONTAINERS:
            message = (
                f"The body has about {values} values, {containers} of them objects or arrays; at most {MAX_VALUES} "
                f"and {MAX_CONTAINERS} are read. Send several smaller requests."
            )
            raise ApiError(413, "too_many_values", message)
        memory.add(values * _BYTES_PER_VALUE + containers * _BYTES_PER_CONTAINER)
    try:
        content = from_json(body, allow_inf_nan=False)  # keeps large integers, which orjson makes floats of
    except ValueError as error:
        message = f"The body is not JSON, or nested more than 100 levels deep: {error}"
        raise ApiError(400, "malformed_json", message) from error
    _refuse_repeated_names(body, content, memory)
    return validate_content(model, content), content


def _refuse_repeated_names(body: bytearray, content: Any, memory: MemoryReservation) -> None:
    """Refuse a name that an object has twice: of two values, two readers could take different ones (RFC 8259, 4).

    The parser keeps the last value, so quotation marks are missing when the content is written as JSON again. Only
    then the body is parsed a second time.

    Raises:
        ApiError: 400, naming it; 503.
    """
    with suppress(orjson.JSONEncodeError):  # an integer beyond 64 bits
        if orjson.dumps(content).count(b'"') == _quotation_marks(body):
            return
    memory.add(_LARGEST_CHARACTER_BYTES * len(body))
    json.loads(body, object_pairs_hook=_object, parse_int=str)


def _quotation_marks(body: bytearray) -> int:
    """Return how many quotation marks a JSON text has, those that are spelled as a number included."""
    found = body.count(b'"')
    if b"\\u0022" in body:
        found += body.replace(b"\\\\", b"").count(b"\\u0022")
    return found


def _object(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        counted = Counter(name for name, _ in pairs)
        name = next(name for name, number in counted.items() if number > 1)
        message = f"An object has the name {name[:100]!r} {counted[name]} times: send each name once."
        raise ApiError(400, "malformed_json", message)


def estimate_value_count(body: bytearray, repetitions: int = 1) -> tuple[int, int]:
    """Return at least how many values a JSON text has, and how many of them are objects or arrays, without parsing it.

    Each value but the first stands behind a comma or an opening bracket. Those within strings are counted only where
    there are few: if all of them exceed a bound, strings are left out, between every second pair of quotation marks.
    The bound is that of a body in which the text stands `times` over.
    """
    values, containers = body.count(b",") + 1, body.count(b"[") + body.count(b"{")
    if (values + containers) * repetitions <= MAX_VALUES and containers * repetitions <= MAX_CONTAINERS:
        return values + containers, containers
    unescaped = bytes(body).replace(b"\\\\", b"").replace(b'\\"', b"")
    strings = unescaped.count(b'"') // 2
    if strings > 2 * MAX_VALUES:  # a name and a text for each value
        return strings // 2, containers
    values, containers = 1, 0
    for outside in unescaped.split(b'"')[::2]:
        found = outside.count(b"[") + outside.count(b"{")
        values += outside.count(b",") + found
        containers += found
    return values, containers
