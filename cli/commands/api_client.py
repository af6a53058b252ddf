"""HTTP client of the commands that use the API."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final
from uuid import uuid4

import httpx
import orjson

from jobledger.cli.output.errors import with_hint
from jobledger.client.urls import format_invalid_url, get_http_options, parse_api_url, remove_user_info
from jobledger.ledger.domain.errors import ConfigurationError, JobledgerError, LedgerUnavailable
from jobledger.workers.safe_http import parse_retry_after

_TIMEOUT_SECONDS: Final = 60
_MAX_RETRY_DELAY_SECONDS: Final = 60
_TOO_MANY_REQUESTS: Final = 429
_LOST_STATUSES: Final = (502, 504)
"""Statuses of a proxy that does not know what the API did."""
_UNAVAILABLE_STATUSES: Final = (502, 503, 504)
_RETRY_DELAYS: Final = (0.5, 1.0, 2.0, 4.0)
"""Seconds between tries while the result of a request is unknown."""
_START_HINT: Final = "Start it with `jobledger up`, or set --url (JOBLEDGER_URL)."
_URL_HINT: Final = "Check --url (JOBLEDGER_URL)."
_HINTS: Final = {
    "job_not_found": "List jobs with `jobledger jobs ls`.",
    "batch_not_found": "List batches with `jobledger batches ls`.",
    "not_found": _URL_HINT,
    "unknown_job_type": "List job types with `jobledger types ls`.",
    "forbidden": "Use a key of a user with this access in JOBLEDGER_KEY.",
    "precondition_failed": "Somebody else has changed it. Run the command again.",
    "invalid_content": "`jobledger types get TYPE` shows the parameters of a job type.",
}
"""What users can do, by error code of the API."""


class RequestRejected(JobledgerError):
    """The API rejected a request. The message is the API's."""


@contextmanager
def open_client(url: str) -> Iterator[httpx.Client]:
    """Open a client of the API. It sends the API key in JOBLEDGER_KEY.

    Raises:
        ConfigurationError: `url` is not a URL, or JOBLEDGER_KEY does not contain a key.
        LedgerUnavailable: The API did not respond to a request inside the block.
    """
    options = _build_client_options(url)
    with _translate_errors(options["base_url"]), httpx.Client(**options) as client:
        yield client


@asynccontextmanager
async def open_async_client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """Like `open_client`, for an event loop."""
    options = _build_client_options(url)
    with _translate_errors(options["base_url"]):
        async with httpx.AsyncClient(**options) as client:
            yield client


def _build_client_options(url: str) -> dict[str, Any]:
    base_url = _parse_url(url)
    return {
        "base_url": base_url,
        "headers": _build_auth_headers(os.environ),
        "timeout": _TIMEOUT_SECONDS,
        **get_http_options(base_url),
    }


@contextmanager
def _translate_errors(base_url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.ReadTimeout as error:
        message = f"{remove_user_info(base_url)} did not respond within {_TIMEOUT_SECONDS} s."
        raise LedgerUnavailable(f"{message} The request may have been executed.") from error
    except httpx.HTTPError as error:
        message = f"Cannot connect to Jobledger at {remove_user_info(base_url)}: {str(error) or type(error).__name__}."
        raise with_hint(LedgerUnavailable(message), _START_HINT) from error


def parse_response(response: httpx.Response, *required_fields: str) -> dict[str, Any]:
    """Return the content of a response of the API.

    Raises:
        RequestRejected: The API rejected the request, or the response does not come from Jobledger.
        ConfigurationError: Authentication failed.
        LedgerUnavailable: The API is unavailable.
    """
    try:
        content = orjson.loads(response.content)
    except orjson.JSONDecodeError:
        if response.status_code in _UNAVAILABLE_STATUSES:
            found = f"{remove_user_info(response.url)} responded with {response.status_code}"
            raise LedgerUnavailable(f"{found}: a proxy cannot reach the API.") from None
        raise build_unexpected_response_error(response) from None
    if not isinstance(content, dict) or content.get("status") != ("error" if response.is_error else "success"):
        raise build_unexpected_response_error(response)
    if response.status_code == 503:
        raise LedgerUnavailable(content.get("message", f"{remove_user_info(response.url)} is unavailable."))
    if response.status_code == 401:
        raise _build_authentication_error(response)
    if response.is_error:
        raise _build_rejection(response, content)
    if any(name not in content for name in required_fields):
        raise build_unexpected_response_error(response)
    return content


def _build_rejection(response: httpx.Response, content: Mapping[str, Any]) -> RequestRejected:
    """Return the error for a response of the API, with what users can do about it."""
    error = RequestRejected(content.get("message", f"HTTP status {response.status_code}"))
    hint = _HINTS.get(str(content.get("code")))
    return with_hint(error, *([] if hint is None else [hint]))


class RetrySchedule:
    """Decides about retries of one request. Its tries have the same Idempotency-Key, so it has one effect."""

    def __init__(self, key: str | None = None, *, is_repeatable: bool = True) -> None:
        self.headers: Final = {"Idempotency-Key": key or uuid4().hex}
        self._delays = iter(_RETRY_DELAYS if is_repeatable else ())

    def next_delay(self, outcome: httpx.Response | httpx.HTTPError) -> float | None:
        """Return the seconds to wait before a retry, None to keep the outcome.

        The rate limit is waited for, however often. Without any connection, the API probably does not run.
        """
        if isinstance(outcome, httpx.Response):
            if outcome.status_code == _TOO_MANY_REQUESTS:
                return compute_retry_delay(outcome)
            is_lost = outcome.status_code in _LOST_STATUSES
        else:
            is_lost = isinstance(outcome, httpx.ReadError | httpx.WriteError | httpx.RemoteProtocolError)
        return next(self._delays, None) if is_lost else None


def compute_retry_delay(response: httpx.Response) -> float:
    """Return the seconds to wait before a retry, from the header `Retry-After`: 1 to 60."""
    return min(max(1, parse_retry_after(response.headers) or 0), _MAX_RETRY_DELAY_SECONDS)


def build_unexpected_response_error(response: httpx.Response) -> RequestRejected:
    """Return the error for a response that does not come from Jobledger."""
    url = remove_user_info(response.url)
    error = RequestRejected(f"{url} responded with {response.status_code}, but it is not a Jobledger API.")
    return with_hint(error, _URL_HINT)


def remove_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def _parse_url(text: str) -> httpx.URL:
    if (url := parse_api_url(text)) is None:
        error = ConfigurationError("--url (JOBLEDGER_URL) is not a URL: expected a URL such as http://127.0.0.1:5001.")
        raise with_hint(error, f"Got {format_invalid_url(text)}.")
    return url


def _build_auth_headers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the header that authenticates. The key is in JOBLEDGER_KEY, because other users see command lines."""
    key = environment.get("JOBLEDGER_KEY", "").strip()
    if not key:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        error = ConfigurationError("JOBLEDGER_KEY does not contain an API key.")
        raise with_hint(error, "Expected the output of `jobledger keys create`, or a token.")
    return {"Authorization": f"Bearer {key}"}


def _build_authentication_error(response: httpx.Response) -> ConfigurationError:
    origin = remove_user_info(response.url).copy_with(path="/", query=None)
    if "Authorization" in response.request.headers:
        problem = f"{origin} does not accept the key in JOBLEDGER_KEY: it is invalid, expired or revoked."
    else:
        problem = f"{origin} requires authentication."
    return with_hint(ConfigurationError(problem), "Set JOBLEDGER_KEY to a key from `jobledger keys create`.")
