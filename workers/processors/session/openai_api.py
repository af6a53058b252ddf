"""Call an OpenAI-compatible API, hosted or local. Neither errors nor answers contain the API key."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

import httpx
import orjson

from jobledger.workers.processors.session.hidden_key import HiddenKey
from jobledger.workers.processors.session.settings import OpenAiSettings
from jobledger.workers.safe_http import get_ssl_context, parse_retry_after

_RETRY_DELAYS_SECONDS: Final = (1.0, 4.0, 16.0, None)
"""Maximum pause after each attempt, or None after the last."""
_MAX_RETRY_AFTER_SECONDS: Final = 60.0
"""If the API requests a longer pause, the request is not repeated."""
_MAX_RESPONSE_BYTES: Final = 16 * 1024 * 1024
_MIN_KEY_IN_ERRORS: Final = 4
_MIN_KEY_IN_ANSWERS: Final = 16
"""Shorter keys are not hidden. A service without access control gets any word as a key, which an answer may contain."""
_TRANSIENT_STATUS_CODES: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class OpenAiError(Exception):
    """A request failed. The message is a clause with the reason. `status` is the HTTP status, if any."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


class OpenAiClient:
    """A client for one API. It retries transient failures and does not follow redirects."""

    def __init__(self, settings: OpenAiSettings) -> None:
        """Read the API key.

        Raises:
            OpenAiError: The key file cannot be read or has no valid key.
        """
        key = _read_api_key(settings.api_key_file)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key_in_errors = HiddenKey(key, min_characters=_MIN_KEY_IN_ERRORS, may_be_cut=True)
        self._key_in_answers = HiddenKey(key, min_characters=_MIN_KEY_IN_ANSWERS, may_be_cut=False)
        self._url = settings.url
        self._timeout = settings.timeout_seconds
        self._client = httpx.AsyncClient(
            headers=headers,
            timeout=settings.timeout_seconds,
            trust_env=False,
            verify=get_ssl_context(trust_env=False),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exception: object) -> None:
        await self._client.aclose()

    async def post(self, path: str, **content: Any) -> Any:
        """Send a request and return the JSON of the response.

        Args:
            path: Path below the base URL.
            **content: Arguments of httpx: `json`, or `data` and `files`.

        Raises:
            OpenAiError: The API rejects the request, cannot be reached, or does not respond in time in four attempts.
        """
        for delay in _RETRY_DELAYS_SECONDS:
            retry_after = None
            try:
                async with asyncio.timeout(self._timeout):
                    status, headers, body = await self._send(path, content)
                if 200 <= status < 300:
                    return self._read_answer(body)
                failure = OpenAiError(f"it returned status {status}{_format_reason(body, self._key_in_errors)}", status)
                if status not in _TRANSIENT_STATUS_CODES:
                    raise failure
                retry_after = parse_retry_after(headers)
            except TimeoutError:
                failure = OpenAiError(f"it did not respond within {self._timeout:g} seconds")
            except (httpx.HTTPError, httpx.InvalidURL) as error:  # the latter from a redirect
                failure = OpenAiError(f"it cannot be reached ({type(error).__name__})")
            if delay is None or (retry_after is not None and retry_after > _MAX_RETRY_AFTER_SECONDS):
                raise failure
            jittered = delay * random.uniform(0.5, 1)  # noqa: S311 - spreads load
            await asyncio.sleep(jittered if retry_after is None else retry_after)
        raise AssertionError("the last attempt returns or raises")

    def _read_answer(self, body: bytes) -> Any:
        try:
            return self._key_in_answers.hide_in_json(_parse_json(body))
        except RecursionError as error:
            raise OpenAiError("its response is nested too deeply") from error

    async def _send(self, path: str, content: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        async with self._client.stream("POST", f"{self._url}/{path}", **content) as response:
            body = bytearray()
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > _MAX_RESPONSE_BYTES:
                    raise OpenAiError(f"its response is larger than {_MAX_RESPONSE_BYTES} bytes", response.status_code)
            return response.status_code, response.headers, bytes(body)


def _read_api_key(file: Path | None) -> str | None:
    if file is None:
        return None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OpenAiError(f"the API key file {file} cannot be read") from error
    if not re.fullmatch("[!-~]+", key):
        raise OpenAiError(f"the API key file {file} contains no valid key")
    return key


def _parse_json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise OpenAiError("its response is not JSON") from error


def _format_reason(body: bytes, key: HiddenKey) -> str:
    """Return the error message of the response, shortened, or an empty string."""
    try:
        error = orjson.loads(body)["error"]
        text = error["message"] if isinstance(error, dict) else error
        words = key.hide(" ".join(str(text).split()))
    except (orjson.JSONDecodeError, KeyError, TypeError, RecursionError):
        return ""
    return f": {words[:200]}" if words.isprintable() and words else ""
