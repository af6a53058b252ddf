"""HTTP client of the commands that use the API."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Final

import httpx
import orjson

from jobledger.ledger.domain.errors import ConfigurationError, JobledgerError, LedgerUnavailable
from jobledger.workers.safe_http import parse_retry_after

_TIMEOUT_SECONDS: Final = 60
_MAX_RETRY_DELAY_SECONDS: Final = 60


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
    return {
        "base_url": _parse_url(url),
        "headers": _build_auth_headers(os.environ),
        "timeout": _TIMEOUT_SECONDS,
        "trust_env": False,
    }


@contextmanager
def _translate_errors(base_url: httpx.URL) -> Iterator[None]:
    try:
        yield
    except httpx.ReadTimeout as error:
        raise LedgerUnavailable(
            f"{_remove_password(base_url)} did not respond within {_TIMEOUT_SECONDS} s. "
            "The request may have been executed."
        ) from error
    except httpx.HTTPError as error:
        raise LedgerUnavailable(
            f"Cannot connect to Jobledger at {_remove_password(base_url)}: {str(error) or type(error).__name__}. "
            "Start it with `jobledger up`, or check --url."
        ) from error


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
        raise build_unexpected_response_error(response) from None
    if not isinstance(content, dict) or content.get("status") != ("error" if response.is_error else "success"):
        raise build_unexpected_response_error(response)
    if response.status_code == 503:
        raise LedgerUnavailable(content.get("message", f"{_remove_password(response.url)} is unavailable."))
    if response.status_code == 401:
        raise ConfigurationError(_explain_failed_authentication(response))
    if response.is_error:
        raise RequestRejected(content.get("message", f"HTTP status {response.status_code}"))
    if any(name not in content for name in required_fields):
        raise build_unexpected_response_error(response)
    return content


def compute_retry_delay(response: httpx.Response) -> float:
    """Return the seconds to wait before a retry, from the header `Retry-After`: 1 to 60."""
    return min(max(1, parse_retry_after(response.headers) or 0), _MAX_RETRY_DELAY_SECONDS)


def build_unexpected_response_error(response: httpx.Response) -> RequestRejected:
    """Return the error for a response that does not come from Jobledger."""
    return RequestRejected(
        f"{_remove_password(response.url)} responded with {response.status_code}, but it is not a Jobledger API. "
        "Check --url (JOBLEDGER_URL)."
    )


def _remove_password(url: httpx.URL) -> httpx.URL:
    return url.copy_with(userinfo=b"")


def remove_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that have a value."""
    return {name: value for name, value in options.items() if value is not None}


def _parse_url(text: str) -> httpx.URL:
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"--url {text} is not a URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise ConfigurationError(f"--url {text} is not a URL: expected a URL such as http://127.0.0.1:5001.")
    return url


def _build_auth_headers(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the header that authenticates. The key is in JOBLEDGER_KEY, because other users see command lines."""
    key = environment.get("JOBLEDGER_KEY", "").strip()
    if not key:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "JOBLEDGER_KEY does not contain an API key: expected the output of `jobledger keys create`, or a token."
        )
    return {"Authorization": f"Bearer {key}"}


def _explain_failed_authentication(response: httpx.Response) -> str:
    origin = _remove_password(response.url).copy_with(path="/", query=None)
    if "Authorization" in response.request.headers:
        return f"{origin} does not accept the key in JOBLEDGER_KEY: it is invalid, expired or revoked."
    return f"{origin} requires authentication: set JOBLEDGER_KEY to a key from `jobledger keys create`."
