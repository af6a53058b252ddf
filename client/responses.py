"""Read responses of the API: their content as models, and failures as errors of the client."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar

import httpx
import orjson
from pydantic import BaseModel, ValidationError

from jobledger.client.errors import (
    ApiUnavailableError,
    AuthenticationError,
    ClientError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    RateLimitError,
    ServerError,
    UnexpectedResponseError,
)
from jobledger.client.urls import remove_user_info

_MAX_TEXT_CHARACTERS: Final = 1000
_MAX_PROBLEMS: Final = 3
Model = TypeVar("Model", bound=BaseModel)
_ERRORS_BY_STATUS: Final[Mapping[int, type[ClientError]]] = {
    401: AuthenticationError,
    403: ForbiddenError,
    404: NotFoundError,
    409: ConflictError,
    410: NotFoundError,
    412: ConflictError,
    429: RateLimitError,
    502: ApiUnavailableError,
    503: ApiUnavailableError,
    504: ApiUnavailableError,
}


def build_response_error(response: httpx.Response, body: bytes) -> ClientError:
    """Return the error for a response that has no success status."""
    status, content = response.status_code, _parse_error(body)
    retry_after = parse_retry_after(response.headers)
    if content is None:
        return _build_unexpected_error(response, retry_after)
    kind = _ERRORS_BY_STATUS.get(status) or (InvalidRequestError if status < 500 else ServerError)
    message, details = str(content["message"]), content.get("details")
    if status == 401:
        message = _explain_failed_authentication(response)
    return kind(
        message[:_MAX_TEXT_CHARACTERS],
        status=status,
        code=str(content["code"]),
        details=details if isinstance(details, dict) else None,
        request_id=response.headers.get("x-request-id"),
        retry_after=retry_after,
        # Without Retry-After, the API says that a retry does not help (such as `job_type_unavailable`).
        is_transient=status in (408, 429) or (status in (502, 503, 504) and retry_after is not None),
    )


def _parse_error(body: bytes) -> dict[str, Any] | None:
    """Return the content of an error of the API, None if it is not one."""
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    is_error = isinstance(content, dict) and content.get("status") == "error" and content.keys() >= {"code", "message"}
    return content if is_error else None


def _build_unexpected_error(response: httpx.Response, retry_after: float | None) -> ClientError:
    status, url = response.status_code, remove_user_info(response.url)
    media_type = response.headers.get("content-type", "").partition(";")[0][:100] or "no media type"
    found = f"{url} responded with {status} {response.reason_phrase} ({media_type})"[:_MAX_TEXT_CHARACTERS]
    common: dict[str, Any] = {"status": status, "retry_after": retry_after}
    if status in (502, 503, 504):
        message = f"{found}: a proxy cannot reach the Jobledger API."
        return ApiUnavailableError(message, **common, is_transient=True)
    if status == 429:
        return RateLimitError(f"{found}: a proxy accepts no more requests now.", **common, is_transient=True)
    if 300 <= status < 400:
        target = response.headers.get("location", "")[:500]
        return UnexpectedResponseError(f"{found}: it redirects to {target!r}. Use the URL of the API itself.", **common)
    message = (
        f"{found}, which is no error of a Jobledger API. Check the URL (JOBLEDGER_URL), and proxies before the API."
    )
    if status == 413:
        message = f"{found}: a proxy before the API limits the size of requests. Raise its limit, or send smaller ones."
    return UnexpectedResponseError(message, **common)


def build_unexpected_content_error(url: httpx.URL | str, problem: str) -> UnexpectedResponseError:
    """Return the error for a response with a success status that does not come from this API."""
    message = f"{remove_user_info(httpx.URL(url))} is not a Jobledger API of this version: {problem}. Check the URL."
    return UnexpectedResponseError(message[:_MAX_TEXT_CHARACTERS])


def _explain_failed_authentication(response: httpx.Response) -> str:
    origin = remove_user_info(response.request.url).copy_with(path="/", query=None)
    if "authorization" in response.request.headers:
        return (
            f"{origin} does not accept the key: it is invalid, expired or revoked. "
            "Create one with `jobledger keys create`, and pass it as `key` or in JOBLEDGER_KEY."
        )
    return f"{origin} requires a key from `jobledger keys create`: pass it as `key`, or set JOBLEDGER_KEY."


def parse_retry_after(headers: httpx.Headers) -> float | None:
    """Return the seconds of a `Retry-After` header (RFC 9110, section 10.2.3); None if it is missing or invalid.

    A date is converted to seconds with the `Date` header, so the clock of the server counts.
    """
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:9])
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError, TypeError):
        return None
    return max(0.0, wait.total_seconds())


@contextmanager
def translate_transport_errors(url: httpx.URL) -> Iterator[None]:
    """Raise errors of httpx as errors of the client.

    Raises:
        ApiUnavailableError: No connection, no response in time, or the connection was lost.
        UnexpectedResponseError: The response cannot be decoded.
    """
    try:
        yield
    except httpx.TimeoutException as error:
        message = f"{remove_user_info(url)} did not respond in time ({type(error).__name__})."
        raise ApiUnavailableError(message, is_transient=True) from error
    except httpx.DecodingError as error:
        raise build_unexpected_content_error(url, f"its response cannot be decoded ({error})") from error
    except httpx.HTTPError as error:
        # A wrong certificate and a request that HTTP does not allow stay wrong.
        is_permanent = "CERTIFICATE_VERIFY_FAILED" in str(error) or isinstance(error, httpx.LocalProtocolError)
        raise ApiUnavailableError(
            f"Cannot reach Jobledger at {remove_user_info(url)}: {str(error) or type(error).__name__}. "
            "Check the URL (JOBLEDGER_URL), and that `jobledger up` or `jobledger api` is running.",
            is_transient=not is_permanent,
        ) from error


def parse_content(url: httpx.URL, body: bytes) -> dict[str, Any]:
    """Return the content of a response with a success status.

    Raises:
        UnexpectedResponseError: It is not JSON of the API.
    """
    try:
        content = orjson.loads(body)
    except orjson.JSONDecodeError:
        raise build_unexpected_content_error(url, "its response is not JSON") from None
    if not isinstance(content, dict) or content.get("status") != "success":
        raise build_unexpected_content_error(url, "its response has not the status `success`")
    return content


def read_model(model: type[Model], content: Mapping[str, Any], name: str, url: str) -> Model:
    """Return the field `name` of a response as a model.

    Raises:
        UnexpectedResponseError: The field is missing, or is not as expected.
    """
    try:
        return model.model_validate(content.get(name))
    except ValidationError as error:
        problems = error.errors(include_url=False, include_input=False)[:_MAX_PROBLEMS]
        text = "; ".join(f"{'.'.join(map(str, (name, *it['loc'])))}: {it['msg']}" for it in problems)
        raise build_unexpected_content_error(url, text) from None


def read_models(model: type[Model], content: Mapping[str, Any], name: str, url: str) -> list[Model]:
    """Return a list in a response as models.

    Raises:
        UnexpectedResponseError: The list is missing, or is not as expected.
    """
    return [read_model(model, {name: item}, name, url) for item in get_list(content, name, url)]


def get_list(content: Mapping[str, Any], name: str, url: str) -> list[Any]:
    """Return a list in a response.

    Raises:
        UnexpectedResponseError: It is missing.
    """
    items = content.get(name)
    if not isinstance(items, list):
        raise build_unexpected_content_error(url, f"{name}: not a list")
    return items


def read_position(content: Mapping[str, Any], name: str, url: str) -> int:
    """Return a position of the log in a response.

    Raises:
        UnexpectedResponseError: It is missing.
    """
    position = content.get(name)
    if not isinstance(position, int):
        raise build_unexpected_content_error(url, f"{name}: not a position")
    return position
