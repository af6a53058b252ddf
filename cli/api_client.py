"""cli: what the commands share that speak to an API over HTTP, from whatever machine."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Annotated, Any, Final

import httpx
import orjson
import typer

from jobledger.ledger.domain.errors import ConfigurationError, JobledgerError, LedgerUnavailable
from jobledger.workers.safe_http import parse_retry_after

UrlOption = Annotated[str, typer.Option(envvar="JOBLEDGER_URL", help="Where the API is.")]
DEFAULT_URL: Final = "http://127.0.0.1:5001"
_PATIENCE_SECONDS: Final = 60
_LONGEST_PAUSE_SECONDS: Final = 60


class RequestRejected(JobledgerError):
    """The API said no; the message is its answer."""


@asynccontextmanager
async def open_client(url: str) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the API at an address, as who JOBLEDGER_KEY says.

    Raises:
        ConfigurationError: it is no address, or what is in JOBLEDGER_KEY no key.
        LedgerUnavailable: nobody answered a request that was made inside the block.
    """
    async with httpx.AsyncClient(
        base_url=_web_address(url), headers=_credentials(os.environ), timeout=_PATIENCE_SECONDS, trust_env=False
    ) as client:
        try:
            yield client
        except httpx.ReadTimeout as error:
            raise LedgerUnavailable(
                f"{_shown(client.base_url)} has not answered for {_PATIENCE_SECONDS} s. "
                "What was asked for may have been done all the same."
            ) from error
        except httpx.HTTPError as error:
            why = str(error) or type(error).__name__
            raise LedgerUnavailable(
                f"No jobledger answers at {_shown(client.base_url)}: {why}. Is it running (`jobledger up`)?"
            ) from error


def parse_response(answer: httpx.Response, *names: str) -> dict[str, Any]:
    """Return what the API answers; `names` have to be in it.

    Raises:
        Refused: it said no, or is something else.
        ConfigurationError: it does not know who we are.
        LedgerUnavailable: it cannot answer now.
    """
    try:
        content = orjson.loads(answer.content)
    except orjson.JSONDecodeError:
        raise unexpected_response(answer) from None
    if not isinstance(content, dict) or content.get("status") != ("error" if answer.is_error else "success"):
        raise unexpected_response(answer)
    if answer.status_code == 503:
        raise LedgerUnavailable(content.get("message", f"{_shown(answer.url)} is not available now"))
    if answer.status_code == 401:
        raise ConfigurationError(_not_signed_in(answer))
    if answer.is_error:
        raise RequestRejected(content.get("message", f"HTTP status {answer.status_code}"))
    if any(name not in content for name in names):
        raise unexpected_response(answer)
    return content


def retry_delay(answer: httpx.Response) -> float:
    """Return after how many seconds to repeat a request, by the answer's `Retry-After`: at least 1, at most 60."""
    return min(max(1, parse_retry_after(answer.headers) or 0), _LONGEST_PAUSE_SECONDS)


def unexpected_response(answer: httpx.Response) -> RequestRejected:
    """Return what to say of an answer that no jobledger gives."""
    return RequestRejected(f"{_shown(answer.url)} answered {answer.status_code}, and not as a jobledger does")


def _shown(url: httpx.URL) -> httpx.URL:
    """Return an address without the password that may be in it."""
    return url.copy_with(userinfo=b"")


def without_none(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that were given."""
    return {name: value for name, value in options.items() if value is not None}


def _web_address(url: str) -> httpx.URL:
    try:
        address = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ConfigurationError(f"--url {url} is not an address: {error}") from error
    if address.scheme not in ("http", "https") or not address.host:
        raise ConfigurationError(f"--url {url} is not an address: expected something like http://127.0.0.1:5001")
    return address


def _credentials(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the header by which we say who we are: the key is in JOBLEDGER_KEY, out of sight of other users."""
    key = environment.get("JOBLEDGER_KEY", "").strip()
    if not key:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigurationError(
            "JOBLEDGER_KEY holds no key: expected what `jobledger keys create` printed, or a token."
        )
    return {"Authorization": f"Bearer {key}"}


def _not_signed_in(answer: httpx.Response) -> str:
    where = _shown(answer.url).copy_with(path="/", query=None)
    if "Authorization" in answer.request.headers:
        return f"{where} does not accept the key in JOBLEDGER_KEY: it is not valid, or not any more."
    return f"{where} asks who you are: set JOBLEDGER_KEY to a key that `jobledger keys create` has made there."
