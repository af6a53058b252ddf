"""Settings of a client: URL, key, timeouts and retries."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from typing import Final

import httpx

from jobledger.client.errors import ClientError
from jobledger.client.submission import is_number
from jobledger.client.urls import format_invalid_url, parse_api_url
from jobledger.ledger.domain.errors import ConfigurationError

DEFAULT_URL: Final = "http://127.0.0.1:5001"
DEFAULT_TIMEOUT_SECONDS: Final = 30.0
DEFAULT_MAX_RETRIES: Final = 4
RECONNECT_SECONDS: Final = 300.0
"""A wait or a stream survives an outage of the API of this length."""
_CONNECT_SECONDS: Final = 10.0
_FIRST_DELAY_SECONDS: Final = 0.5
_MAX_DELAY_SECONDS: Final = 8.0
_MAX_RETRY_AFTER_SECONDS: Final = 60.0
_MAX_TIMEOUT_SECONDS: Final = 86_400.0

Key = str | Callable[[], str] | None
"""An API key or token, or a function that returns the current one."""


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Where the API is, how to authenticate, and how long to wait.

    Attributes:
        url: The URL of the API, without a slash at the end.
        key: An API key or token, or a function that returns the current one.
        timeout: Seconds for one request.
        max_retries: How often a request is repeated after a transient error.
    """

    url: httpx.URL
    key: Key = field(repr=False)
    timeout: float
    max_retries: int

    @classmethod
    def create(cls, url: str, key: Key, timeout: float, max_retries: int) -> ClientSettings:
        """Check the settings.

        Raises:
            ConfigurationError: A setting is invalid.
        """
        if not is_number(timeout) or not 0 < timeout <= _MAX_TIMEOUT_SECONDS:
            raise ConfigurationError(f"timeout must be a positive number of seconds, got {timeout!r}.")
        if max_retries < 0:
            raise ConfigurationError(f"max_retries must be a number of retries, or 0, got {max_retries!r}.")
        if key is not None and not callable(key):
            check_key(key)
        parsed = _parse_url(url)
        if parsed.userinfo and key is not None:
            # HTTP has one header for both.
            raise ConfigurationError("url contains a user name, and there is a key: only one of them can be sent.")
        return cls(parsed, key, timeout, max_retries)

    def build_headers(self) -> dict[str, str]:
        """Return the headers of a request.

        Raises:
            ConfigurationError: The function that returns the key returned something else.
        """
        headers = {"User-Agent": get_user_agent(), "Accept-Encoding": "identity"}
        key = self.key() if callable(self.key) else self.key
        if key:
            headers["Authorization"] = f"Bearer {check_key(key)}"
        return headers

    def build_timeout(self, seconds: float) -> httpx.Timeout:
        """Return the timeouts of a request that must read its response within some seconds."""
        return httpx.Timeout(seconds, connect=min(seconds, _CONNECT_SECONDS))


def read_environment(environment: Mapping[str, str]) -> tuple[str, str | None]:
    """Return the URL in JOBLEDGER_URL and the key in JOBLEDGER_KEY, as the commands of `jobledger` use them.

    Raises:
        ConfigurationError: JOBLEDGER_KEY does not contain a key.
    """
    key = environment.get("JOBLEDGER_KEY", "").strip() or None
    if key is not None:
        check_key(key, "JOBLEDGER_KEY")
    return environment.get("JOBLEDGER_URL", "").strip() or DEFAULT_URL, key


def check_key(key: object, name: str = "key") -> str:
    """Return a key or token if it can be sent. The message of the error does not contain it.

    Raises:
        ConfigurationError: It has other characters than a key.
    """
    if not isinstance(key, str) or not key.isascii() or not key.isprintable() or " " in key or not key:
        raise ConfigurationError(
            f"{name} is not an API key: expected the output of `jobledger keys create`, or a token."
        )
    return key


def _parse_url(text: object) -> httpx.URL:
    url = parse_api_url(text)
    if url is None:
        found = format_invalid_url(text)
        raise ConfigurationError(f"url (JOBLEDGER_URL) {found} is not the URL of an API, such as {DEFAULT_URL}.")
    return url


@cache
def get_user_agent() -> str:
    """Return the header `User-Agent`."""
    return f"jobledger-python/{version('jobledger')} httpx/{httpx.__version__}"


class RetrySchedule:
    """Decides about retries of one call: exponential backoff with jitter, or the time that `Retry-After` asks for.

    Args:
        max_retries: The number of retries. None: any number.
        seconds: No retry begins later than this after the first failure. None: no limit.
    """

    def __init__(self, *, max_retries: int | None = None, seconds: float | None = None) -> None:
        self._max_retries = max_retries
        self._seconds = seconds
        self._count = 0
        self._failed_at = 0.0

    def reset(self) -> None:
        """Start over after a success."""
        self._count = 0

    def next_delay(self, error: ClientError, *, min_seconds: float = 0.0) -> float:
        """Return the seconds to wait before the next try.

        Raises:
            ClientError: `error`, because it is not transient or there are no more tries.
        """
        now = time.monotonic()
        if not self._count:
            self._failed_at = now
        self._count += 1
        retry_after = error.retry_after or 0.0
        is_used_up = self._max_retries is not None and self._count > self._max_retries
        if self._seconds is None:
            is_late = retry_after > _MAX_RETRY_AFTER_SECONDS
        else:
            is_late = now + retry_after > self._failed_at + self._seconds
        if not error.is_transient or is_used_up or is_late:
            raise error
        backoff = min(_MAX_DELAY_SECONDS, _FIRST_DELAY_SECONDS * 2 ** min(self._count - 1, 10))
        backoff *= random.uniform(0.5, 1.0)  # noqa: S311 - spreads load, guards no secret
        return float(max(backoff, retry_after, min_seconds))
