"""Error responses. All have one format; none has a traceback."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match

from jobledger.ledger.domain import errors

_log = structlog.get_logger()
_MAX_ERRORS: Final = 100
_MAX_NAME_LENGTH: Final = 100
_MAX_MESSAGE_LENGTH: Final = 1000


class ApiError(Exception):
    """An error response.

    Args:
        status: The HTTP status.
        code: The code for programs, one of `ERROR_CODES`.
        message: What is wrong and how to fix it.
        details: More data for programs.
        retry_after_seconds: When a retry may succeed; None if a retry does not help.
        headers: More response headers.
    """

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


ERROR_RESPONSES: Final[Sequence[tuple[type[errors.JobledgerError], int, str, int | None]]] = (
    (errors.NotFound, 404, "not_found", None),
    (errors.AlreadyExists, 409, "already_exists", None),
    (errors.InvalidState, 409, "invalid_state", None),
    (errors.VersionConflict, 409, "version_conflict", None),
    (errors.InvalidEvent, 422, "invalid_content", None),
    (errors.LedgerBusy, 429, "write_contention", 1),
    (errors.FileStoreUnavailable, 503, "result_store_unavailable", 10),
    (errors.LedgerUnavailable, 503, "database_unavailable", 2),
    (errors.UnreadableEvent, 500, "unreadable_event", None),
)
"""Maps errors of the ledger to HTTP status, error code and Retry-After in seconds. The first match wins."""


def _replace_unknown_value(value: Any) -> str:
    """Return a placeholder for a BSON type that no event has: the document was changed in the database."""
    return f"(unreadable: {type(value).__name__})"


def build_json_response(
    content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None
) -> Response:
    """Return a JSON response. Times are in UTC with a Z."""
    return Response(encode_json(content), status, dict(headers or {}), "application/json")


def encode_json(content: Mapping[str, Any]) -> bytes:
    """Encode content as JSON. Times are in UTC with a Z."""
    return orjson.dumps(content, default=_replace_unknown_value, option=orjson.OPT_UTC_Z | orjson.OPT_NON_STR_KEYS)


def build_error_response(error: ApiError) -> Response:
    """Return the response for an error."""
    headers = {**error.headers}
    if error.retry_after_seconds is not None:
        headers["Retry-After"] = str(error.retry_after_seconds)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"  # required by RFC 9110, 11.6.1
    content = {"status": "error", "code": error.code, "message": error.message, "details": error.details}
    return build_json_response(content, error.status, headers)


def build_validation_error(
    problems: Sequence[Mapping[str, Any]], within: tuple[str | int, ...] = (), *, may_be_incomplete: bool = False
) -> ApiError:
    """Return the error for content that fails validation. It lists each wrong field by its path.

    Args:
        problems: The errors in the format of pydantic, at least one.
        within: Location of the validated content in the body.
        may_be_incomplete: Whether there may be more errors.
    """
    field_errors = [
        {
            "path": format_location((*within, *error["loc"])),
            "message": _truncate(error["msg"].removeprefix("Value error, "), _MAX_MESSAGE_LENGTH),
        }
        for error in problems[:_MAX_ERRORS]
    ]
    first = field_errors[0]
    count = f"at least {len(problems) - 1}" if may_be_incomplete else str(len(problems) - 1)
    suffix = f" (and {count} more)" if len(problems) > 1 else ""
    prefix = f"{first['path']}: " if first["path"] else ""
    return ApiError(422, "invalid_content", f"{prefix}{first['message']}{suffix}", details={"errors": field_errors})


def format_location(location: Sequence[str | int]) -> str:
    """Return a location in a body as a path, such as `jobs[3].parameters.url`."""
    text = ""
    for part in location:
        name = part if isinstance(part, int) else _truncate(part, _MAX_NAME_LENGTH)
        text += f"[{name}]" if isinstance(part, int) else f".{name}" if text else str(name)
    return text


def _truncate(text: str, max_length: int) -> str:
    return text if len(text) <= max_length else f"{text[:max_length]}…"


def translate_error(error: ApiError | errors.JobledgerError) -> ApiError:
    """Return an error of the ledger as an error response, as ERROR_RESPONSES maps it. An ApiError is unchanged."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, errors.FileStoreUnavailable):
        _log.warning("result store unavailable", error=str(error))  # names directories, which clients must not see
        message = "The server cannot use its result store (results.store). No files are lost. Retry later."
        error = errors.FileStoreUnavailable(message)
    elif isinstance(error, errors.LedgerUnavailable):
        _log.warning("database unavailable", error=str(error))  # may name hosts, which clients must not see
        error = errors.LedgerUnavailable("The database does not respond. No recorded data is lost. Retry in a moment.")
    for kind, status, code, retry_after in ERROR_RESPONSES:
        if isinstance(error, kind):
            text = _truncate(str(error), _MAX_MESSAGE_LENGTH)
            return ApiError(status, code, text, retry_after_seconds=retry_after)
    _log.error("unmapped error", error=repr(error))
    return ApiError(500, "internal_error", "Internal error. The server's log has the details.")


async def on_known_error(_request: Request, error: Exception) -> Response:
    """Return the response for an ApiError or an error of the ledger."""
    assert isinstance(error, ApiError | errors.JobledgerError)  # noqa: S101 - registered for these types
    return build_error_response(translate_error(error))


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Return the response for an error of Starlette's router: unknown path or method."""
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for this type
    if error.status_code == 404 and (redirect := _redirect_without_slash(request)) is not None:
        return redirect
    known = {
        404: ("not_found", "Not found: this path does not exist."),
        405: ("method_not_allowed", "Method not allowed."),
    }
    code, message = known.get(error.status_code, ("bad_request", error.detail))
    response = build_error_response(ApiError(error.status_code, code, message, headers=error.headers))
    if error.status_code == 405:
        response.headers["Allow"] = ", ".join(sorted(_find_allowed_methods(request)))
    return response


def _find_allowed_methods(request: Request) -> set[str]:
    """Return the methods of all routes with the path. Starlette lists only those of the first one.

    A route for exactly this path takes precedence: `…/jobs/bulk` is no job.
    """
    matching = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    exact = [route for route in matching if route.path == request.scope["path"]]
    return {method for route in exact or matching for method in route.methods}


def _redirect_without_slash(request: Request) -> Response | None:
    """Return a redirect to the path without its last slash, if there is a route for it.

    The location is relative, so it works behind a proxy with another scheme, host or path prefix. Status 307 keeps the
    method and the body.
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
    """Log an unexpected error and return status 500. The details are for the log, not for the client."""
    _log.error("unhandled exception in request", exc_info=error)
    context = structlog.contextvars.get_contextvars()
    details = {"request_id": context["request_id"]} if "request_id" in context else {}
    message = "Internal error. The server's log has the details under the request ID."
    return build_error_response(ApiError(500, "internal_error", message, details=details))
