"""Read and validate request bodies with bounded time and memory.

The size of a body is bounded while it is received, the number of its values before it is parsed. Large bodies are
parsed and validated in a thread, so that the event loop can serve other requests. pydantic and the JSON parser hold the
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
    """Return the body of a request, of at most `limit` bytes. The error message names the `setting` with the limit.

    Raises:
        ApiError: 413, the body is larger than `limit`; 415, it is compressed; 400, it is incomplete; 503, the requests
            in progress use all memory allowed.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        message = f"Content-Encoding {encoding[:40]!r} is not supported. Send the body without compression."
        raise ApiError(415, "unsupported_content_encoding", message, headers={"Accept-Encoding": "identity"})
    memory: MemoryReservation = request.scope["memory_reservation"]
    body = bytearray()
    try:
        async for chunk in request.stream():
            if len(body) + len(chunk) > limit:
                raise ApiError(413, "content_too_large", f"The body is larger than {limit} bytes{setting}.")
            memory.add(2 * len(chunk))  # the received and the parsed content
            body += chunk
    except ClientDisconnect as error:
        raise ApiError(400, "incomplete_body", "The connection ended before the body was complete.") from error
    return body


async def read_json_body(request: Request, model: type[Model]) -> tuple[Model, Any]:
    """Return the JSON body of a request, as a model and as parsed.

    Raises:
        ApiError: 415, 413 or 400, the body is not JSON, too large or malformed; 422, validation failed; 503, the
            requests in progress use all memory allowed.
    """
    # The check also protects against other sites: browsers send this type across origins only after a CORS preflight.
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        message = "The body must be JSON. Send it with the header Content-Type: application/json."
        raise ApiError(415, "unsupported_media_type", message)
    body = await read_body_bytes(request, request.app.state.max_body_bytes, " (api.max_body_bytes)")
    mark_large_body(request, len(body), body.count(b","))
    return await run_off_loop(request, _parse_body, request, model, body)


async def read_optional_json_body(request: Request, model: type[Model]) -> tuple[Model, Any]:
    """Return the JSON body like read_json_body(). Without a Content-Type the body is `{}`."""
    if "content-type" in request.headers:
        return await read_json_body(request, model)
    return validate_content(model, {}), {}


def mark_large_body(request: Request, size: int, values: int) -> None:
    """Mark a request as large if it has many bytes or values, so that run_off_loop() uses a thread."""
    if size > _LARGE_BYTES or values > _MANY_VALUES:
        request.scope["large_body"] = True


async def run_off_loop(
    request: Request, function: Callable[Params, Result], *args: Params.args, **kwargs: Params.kwargs
) -> Result:
    """Call a function, in a thread if the body is large and the function therefore slow."""
    if request.scope.get("large_body"):
        return await asyncio.to_thread(function, *args, **kwargs)
    return function(*args, **kwargs)


def _parse_body(request: Request, model: type[Model], body: bytearray) -> tuple[Model, Any]:
    memory: MemoryReservation = request.scope["memory_reservation"]
    if request.scope.get("large_body"):
        values, containers = estimate_value_count(body)
        if values > MAX_VALUES or containers > MAX_CONTAINERS:
            message = (
                f"The body has about {values} values, {containers} of them objects or arrays; the maximum is "
                f"{MAX_VALUES} and {MAX_CONTAINERS}. Send several smaller requests."
            )
            raise ApiError(413, "too_many_values", message)
        memory.add(values * _BYTES_PER_VALUE + containers * _BYTES_PER_CONTAINER)
    try:
        content = from_json(body, allow_inf_nan=False)  # keeps large integers, which orjson converts to floats
    except ValueError as error:
        message = f"The body is not valid JSON, or is nested more than 100 levels deep: {error}"
        raise ApiError(400, "malformed_json", message) from error
    _check_duplicate_names(body, content, memory)
    return validate_content(model, content), content


def _check_duplicate_names(body: bytearray, content: Any, memory: MemoryReservation) -> None:
    """Reject objects with duplicate names: two readers could use different values (RFC 8259, 4).

    The parser keeps only the last value, so the serialized content has fewer quotation marks than the body. The body is
    parsed a second time only in this case.

    Raises:
        ApiError: 400, an object has a duplicate name; 503, not enough memory.
    """
    with suppress(orjson.JSONEncodeError):  # an integer beyond 64 bits
        if orjson.dumps(content).count(b'"') == _count_quotation_marks(body):
            return
    memory.add(_LARGEST_CHARACTER_BYTES * len(body))
    json.loads(body, object_pairs_hook=_reject_duplicate_names, parse_int=str)


def _count_quotation_marks(body: bytearray) -> int:
    """Count the quotation marks of a JSON text, including those written as `\\u0022`."""
    count = body.count(b'"')
    if b"\\u0022" in body:
        count += body.replace(b"\\\\", b"").count(b"\\u0022")
    return count


def _reject_duplicate_names(pairs: list[tuple[str, Any]]) -> None:
    if len(dict(pairs)) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        name = next(name for name, count in counts.items() if count > 1)
        message = f"An object has the name {name[:100]!r} {counts[name]} times. Send each name once."
        raise ApiError(400, "malformed_json", message)


def estimate_value_count(body: bytearray, repetitions: int = 1) -> tuple[int, int]:
    """Estimate the numbers of values and of containers (objects and arrays) of a JSON text without parsing it.

    Each value except the first follows a comma or an opening bracket. The first count includes those inside strings.
    Only if it exceeds a limit, strings are excluded: every second part between quotation marks.

    Args:
        body: The JSON text.
        repetitions: How often the text occurs in the content that the limits apply to.

    Returns:
        The number of values, and how many of them are containers. Both are upper bounds, except for texts with more
        strings than the limit allows.
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
        opened = outside.count(b"[") + outside.count(b"{")
        values += outside.count(b",") + opened
        containers += opened
    return values, containers
