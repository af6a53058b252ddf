"""session: calling an OpenAI-compatible API, hosted or local. What goes wrong ends in one sentence, without the key."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import orjson

_MAX_ATTEMPTS: Final = 4
_FIRST_PAUSE_SECONDS: Final = 1.0
_LONGEST_PAUSE_SECONDS: Final = 60.0
_LARGEST_ANSWER_BYTES: Final = 16 * 1024 * 1024
_TRANSIENT_STATUS_CODES: Final = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})


class OpenAiError(Exception):
    """It did not do what it was asked for: why, as half a sentence. `status` is that of its answer, if it answered."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        super().__init__(reason)
        self.status = status


def read_api_key(file: Path | None) -> str | None:
    """Return the key that a file holds.

    Raises:
        ApiFailed: it cannot be read, or holds none.
    """
    if file is None:
        return None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise OpenAiError(f"the key file {file} cannot be read") from error
    if not key.isascii() or not key.isprintable() or not key or " " in key:
        raise OpenAiError(f"the key file {file} holds no key")
    return key


class OpenAiClient:
    """An endpoint and its key. Waits and tries again when it is busy; redirects are not followed."""

    def __init__(self, url: str, *, key: str | None, timeout_seconds: float) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._url = url
        self._timeout = timeout_seconds
        self._client = httpx.AsyncClient(headers=headers, timeout=timeout_seconds, trust_env=False)

    async def aclose(self) -> None:
        await self._client.aclose()

    async def post(self, path: str, **content: Any) -> Any:
        """Return the JSON that it answers; `content` is what httpx takes: `json`, or `data` and `files`.

        Raises:
            ApiFailed: it refuses, cannot be reached, or does not answer in time, also not at the fourth try.
        """
        pause = _FIRST_PAUSE_SECONDS
        for last in (False,) * (_MAX_ATTEMPTS - 1) + (True,):
            wanted = None
            try:
                async with asyncio.timeout(self._timeout):
                    status, headers, body = await self._answer(path, content)
                if 200 <= status < 300:
                    return _json(body)
                failure = OpenAiError(f"it answered {status}{_reason(body)}", status)
                if status not in _TRANSIENT_STATUS_CODES:
                    raise failure
                wanted = _seconds(headers)
            except TimeoutError:
                failure = OpenAiError(f"it did not answer within {self._timeout:g} seconds")
            except httpx.HTTPError as error:
                failure = OpenAiError(f"it cannot be reached ({type(error).__name__})")
            if last or (wanted is not None and wanted > _LONGEST_PAUSE_SECONDS):
                raise failure
            await asyncio.sleep(pause * random.uniform(0.5, 1) if wanted is None else wanted)  # noqa: S311 - spreads load
            pause = min(4 * pause, _LONGEST_PAUSE_SECONDS)
        raise AssertionError("the last try returns or raises")

    async def _answer(self, path: str, content: Mapping[str, Any]) -> tuple[int, httpx.Headers, bytes]:
        async with self._client.stream("POST", f"{self._url}/{path}", **content) as answer:
            body = bytearray()
            async for part in answer.aiter_bytes():
                body += part
                if len(body) > _LARGEST_ANSWER_BYTES:
                    raise OpenAiError(f"its answer is larger than {_LARGEST_ANSWER_BYTES} bytes", answer.status_code)
            return answer.status_code, answer.headers, bytes(body)


def _json(body: bytes) -> Any:
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise OpenAiError("its answer is not JSON") from error


def _reason(body: bytes) -> str:
    """What it says about a refusal, in so far as that is short and of the usual form."""
    try:
        said = orjson.loads(body)["error"]
        text = said["message"] if isinstance(said, dict) else said
    except (orjson.JSONDecodeError, KeyError, TypeError):
        return ""
    words = " ".join(str(text).split())
    return f": {words[:200]}" if words.isprintable() and words else ""


def _seconds(headers: httpx.Headers) -> float | None:
    try:
        return max(0.0, float(headers["retry-after"]))
    except (KeyError, ValueError):
        return None
