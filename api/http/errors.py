"""api: from an error to an answer. One envelope, one table; never a traceback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from jobledger.ledger.domain.errors import (
    AlreadyExists,
    FileStoreUnavailable,
    InvalidEvent,
    InvalidState,
    JobledgerError,
    LedgerBusy,
    LedgerUnavailable,
    NotFound,
    UnreadableEvent,
    VersionConflict,
)

_log = structlog.get_logger()
_PROBLEMS_NAMED: Final = 100
_LONGEST_NAME: Final = 100
_LONGEST_MESSAGE: Final = 1000


class ApiError(Exception):
    """An answer that is no success. `code` is for programs, the message for people."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        details: Mapping[str, Any] | None = None,
        retry_after_seconds: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.details = dict(details or {})
        self.retry_after_seconds = retry_after_seconds
        self.headers = dict(headers or {})


ERROR_RESPONSES: Final[Sequence[tuple[type[JobledgerError], int, str, int | None]]] = (
    (NotFound, 404, "not_found", None),
    (AlreadyExists, 409, "already_exists", None),
    (InvalidState, 409, "invalid_state", None),
    (VersionConflict, 409, "version_conflict", None),
    (InvalidEvent, 422, "invalid_content", None),
    (LedgerBusy, 429, "write_contention", 1),
    (FileStoreUnavailable, 503, "file_store_unavailable", 10),
    (LedgerUnavailable, 503, "database_unavailable", 2),
    (UnreadableEvent, 500, "unreadable_event", None),
)
"""What the ledger raises, the HTTP status, the code, and after how many seconds it is worth trying again."""


def _unreadable(value: Any) -> str:
    """Stand for a value that no event has: somebody has changed it in the database."""
    return f"(unreadable: {type(value).__name__})"


def json_response(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return JSON; times in UTC with a Z."""
    return Response(encode_json(content), status, dict(headers or {}), "application/json")


def encode_json(content: Mapping[str, Any]) -> bytes:
    """Return content as JSON; times in UTC with a Z."""
    return orjson.dumps(content, default=_unreadable, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS)


def error_response(error: ApiError) -> Response:
    """Return the envelope of a failure."""
    headers = {**error.headers}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110, 11.6.1: a 401 says how one may sign in
    content = {"status": "error", "code": error.code, "message": error.message, "details": error.details}
    return json_response(content, error.status, headers)


def build_validation_error(
    errors: Sequence[Mapping[str, Any]], within: tuple[str | int, ...] = (), *, may_be_incomplete: bool = False
) -> ApiError:
    """Return the answer to content that does not fit its model, naming each field by its path.

    Args:
        found: the errors as pydantic describes them, at least one.
        within: where the content stands in the body.
        perhaps_more: whether there may be errors beside those found.
    """
    problems = [
        {
            "path": format_location((*within, *problem["loc"])),
            "message": _clipped(_sentence(problem["msg"]), _LONGEST_MESSAGE),
        }
        for problem in errors[:_PROBLEMS_NAMED]
    ]
    first = problems[0]
    number = f"at least {len(errors) - 1}" if may_be_incomplete else str(len(errors) - 1)
    more = f" (and {number} more)" if len(errors) > 1 else ""
    where = f"{first['path']}: " if first["path"] else ""
    return ApiError(422, "invalid_content", f"{where}{first['message']}{more}", details={"errors": problems})


def format_location(location: Sequence[str | int]) -> str:
    """Return where something stands in a body, as `jobs[3].parameters.url`."""
    text = ""
    for part in location:
        name = part if isinstance(part, int) else _clipped(part, _LONGEST_NAME)
        text += f"[{name}]" if isinstance(part, int) else f".{name}" if text else str(name)
    return text


def _clipped(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]}…"


def _sentence(message: str) -> str:
    return message.removeprefix("Value error, ")


async def on_api_error(_request: Request, error: Exception) -> Response:
    """An answer that a route has chosen."""
    assert isinstance(error, ApiError)  # noqa: S101 - registered for this type
    return error_response(error)


async def on_ledger_error(_request: Request, error: Exception) -> Response:
    """What the rooms below raise, by the table."""
    if isinstance(error, FileStoreUnavailable):
        _log.warning("the result store is away", error=str(error))  # it names directories, which are not for clients
        error = FileStoreUnavailable("This server cannot use its result store now. The files stay; try again later.")
    elif isinstance(error, LedgerUnavailable):
        _log.warning("the database is away", error=str(error))  # it may name hosts, which are not for clients
        error = LedgerUnavailable("The database does not answer. What is on record stays; try again in a moment.")
    for kind, status, code, retry_after in ERROR_RESPONSES:
        if isinstance(error, kind):
            message = _clipped(str(error), _LONGEST_MESSAGE)
            return error_response(ApiError(status, code, message, retry_after_seconds=retry_after))
    _log.error("error without an answer of its own", error=repr(error))
    return error_response(ApiError(500, "internal_error", "Something went wrong here; it is in the log."))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """What Starlette refuses by itself: no such address, no such method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this type
    if error.status_code == 404 and (onwards := _without_slash(request)) is not None:
        return onwards
    codes = {404: "not_found", 405: "method_not_allowed", 413: "content_too_large", 416: "range_not_satisfiable"}
    messages = {404: "There is nothing at this address.", 405: "This address does not know this method."}
    answer = error_response(
        ApiError(
            error.status_code,
            codes.get(error.status_code, "bad_request"),
            messages.get(error.status_code, error.detail),
        )
    )
    answer.headers.update(error.headers or {})
    if error.status_code == 405:
        # Starlette names only the methods of the first route that has this path.
        here = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
        answer.headers["Allow"] = ", ".join(sorted({method for route in here for method in route.methods}))
    return answer


def _without_slash(request: Request) -> Response | None:
    """Return the way to the same address without its last slash, if there is something.

    The address is a relative one: it stays behind the proxy that the client came through, with its scheme and path.
    307 keeps the method and the body.
    """
    path: str = request.scope["path"]
    shorter = {**request.scope, "path": path.removesuffix("/")}
    if not path.endswith("/") or all(route.matches(shorter)[0] is Match.NONE for route in request.app.routes):
        return None
    raw: bytes = request.scope.get("raw_path") or path.encode()
    last = raw.removesuffix(b"/").rpartition(b"/")[2].decode("ascii", "replace")
    query = f"?{request.url.query}" if request.url.query else ""
    return Response(status_code=307, headers={"Location": f"../{last}{query}"})


async def on_unexpected_error(_request: Request, error: Exception) -> Response:
    """A fault of ours: the details are for the log, not for the client."""
    _log.error("fault while answering", exc_info=error)
    known = structlog.contextvars.get_contextvars()
    details = {"request_id": known["request_id"]} if "request_id" in known else {}
    message = "Something went wrong here; it is in the log, under the id of this request."
    return error_response(ApiError(500, "internal_error", message, details=details))
