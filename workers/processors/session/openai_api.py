"""Call an OpenAI-compatible API, hosted or local. Neither errors nor answers contain the API key."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import Mapping
from enum import Enum, auto
from pathlib import Path
from typing import Any, Final, Self

import httpx
import orjson

from jobledger.workers.processors.session.settings import OpenAiSettings
from jobledger.workers.safe_http import get_ssl_context, parse_retry_after
from jobledger.workers.secrets.hidden_secrets import HiddenSecrets

_RETRY_DELAYS_SECONDS: Final = (1.0, 4.0, 16.0, None)
"""Maximum pause after each attempt, or None after the last."""
_MAX_TIMEOUTS: Final = 2
"""A request that timed out this often is not repeated. It is too long for the service."""
_MAX_RETRY_AFTER_SECONDS: Final = 60.0
"""If the API requests a longer pause, the request is not repeated."""
_CHECK_TIMEOUT_SECONDS: Final = 30.0
_MAX_RESPONSE_BYTES: Final = 16 * 1024 * 1024
_MAX_STREAM_EVENTS: Final = 200_000
_MIN_KEY_IN_ERRORS: Final = 4
_MIN_KEY_IN_ANSWERS: Final = 16
"""Shorter keys are not hidden. A service without access control gets any word as a key, which an answer may contain."""
_TRANSIENT_STATUS_CODES: Final = frozenset({408, 409, 425, 429})
_PERMANENT_SERVER_ERRORS: Final = frozenset({501, 505})
_BYTE_ORDER_MARK: Final = b"\xef\xbb\xbf"

# The wording of OpenAI, Azure, Mistral, vLLM, llama.cpp, LM Studio, Ollama and OpenRouter.
_TOO_LONG: Final = re.compile(
    r"context[ _](length|size|window)|maximum context|max(imum)?[ _](input|prompt|model)[ _](tokens|length|len)"
    r"|(prompt|input|request|message)s? (is|are) too (long|large)|too many tokens|too large for model"
    r"|reduce (the|your) (length|prompt|input)|string_above_max_length"
)
_FILTERED: Final = re.compile(r"content[ _]?(filter|policy|management)|responsible ?ai|moderation|flagged")
_FORMAT: Final = re.compile(r"response_format|json_?schema|grammar|structured output|guided")
_OUT_OF_QUOTA: Final = re.compile(
    r"insufficient_quota|billing_(hard_limit|not_active)|insufficient (credit|fund|balance)"
)


class ErrorKind(Enum):
    """What a failure means for further requests."""

    SERVICE = auto()
    """The service does not work, or it rejects all requests."""
    REQUEST = auto()
    """The service rejects this request or one of its options."""
    TOO_LONG = auto()
    """The request has too many tokens or bytes."""
    FILTERED = auto()
    """A content filter rejects this text."""


class OpenAiError(Exception):
    """A request failed. The message is a clause with the reason. `status` is the HTTP status, if any.

    `is_transient` is whether it may help to repeat the request at once.
    """

    def __init__(
        self,
        reason: str,
        status: int | None = None,
        *,
        kind: ErrorKind = ErrorKind.SERVICE,
        is_transient: bool = False,
        is_timeout: bool = False,
    ) -> None:
        super().__init__(reason)
        self.status = status
        self.kind = kind
        self.is_transient = is_transient
        self.is_timeout = is_timeout


class OpenAiClient:
    """A client for one API. It retries transient failures and does not follow redirects."""

    def __init__(self, settings: OpenAiSettings) -> None:
        """Read the API key.

        Raises:
            OpenAiError: The key file cannot be read or has no valid key.
        """
        key = _read_api_key(settings.api_key_file)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._key_in_errors = _hide_key(key, _MIN_KEY_IN_ERRORS)
        self._key_in_answers = _hide_key(key, _MIN_KEY_IN_ANSWERS)
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

    async def check_access(self) -> None:
        """Check that the API can be reached and accepts the key, with a request that costs nothing.

        Raises:
            OpenAiError: The API cannot be reached, or it rejects the key.
        """
        try:
            async with asyncio.timeout(_CHECK_TIMEOUT_SECONDS):
                status, body = await self._request_models()
        except (TimeoutError, httpx.TransportError, httpx.InvalidURL, OpenAiError) as error:
            if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
                raise OpenAiError(f"it cannot be reached ({type(error).__name__})") from error
            return  # the API may be busy, or not have this operation
        if status == httpx.codes.UNAUTHORIZED:
            rejection = _make_error(status, _parse_error_body(body), self._key_in_errors)
            # A key with few rights may transcribe but not list the models.
            if not re.search("scope|permission", str(rejection)):
                raise rejection

    async def _request_models(self) -> tuple[int, bytes]:
        for delay in _RETRY_DELAYS_SECONDS[:2]:
            try:
                status, _, body = await self._send("models", {}, method="GET")
            except httpx.ConnectError:
                await asyncio.sleep(delay or 0)
            else:
                return status, body
        status, _, body = await self._send("models", {}, method="GET")
        return status, body

    async def post(self, path: str, *, accept_text: bool = False, **content: Any) -> Any:
        """Send a request and return the JSON of the response.

        Args:
            path: Path below the base URL.
            accept_text: Whether to return a response that is not JSON as text.
            **content: Arguments of httpx: `json`, or `data` and `files`.

        Raises:
            OpenAiError: The API rejects the request, cannot be reached, or does not respond in time in four attempts.
        """
        timeouts = 0
        for delay in _RETRY_DELAYS_SECONDS:
            retry_after = None
            try:
                async with asyncio.timeout(self._timeout):
                    status, headers, body = await self._send(path, content)
                retry_after = parse_retry_after(headers)
                return self._read_answer(status, body, accept_text=accept_text)
            except TimeoutError:
                failure = OpenAiError(
                    f"it did not respond within {self._timeout:g} seconds", is_transient=True, is_timeout=True
                )
                timeouts += 1
            except (httpx.HTTPError, httpx.InvalidURL) as error:  # the latter from a redirect
                failure = OpenAiError(f"it cannot be reached ({type(error).__name__})", is_transient=True)
            except OpenAiError as error:
                failure = error
            is_delay_too_long = retry_after is not None and retry_after > _MAX_RETRY_AFTER_SECONDS
            if not failure.is_transient or delay is None or is_delay_too_long or timeouts >= _MAX_TIMEOUTS:
                raise failure
            jittered = delay * random.uniform(0.5, 1)  # noqa: S311 - spreads load
            await asyncio.sleep(jittered if retry_after is None else retry_after)
        raise AssertionError("the last attempt returns or raises")

    def _read_answer(self, status: int, body: bytes, *, accept_text: bool) -> Any:
        """Return the JSON of a response, or its text if text is accepted.

        Raises:
            OpenAiError: The response is an error, also with the status 200, or it is not JSON.
        """
        if not 200 <= status < 300:
            raise _make_error(status, _parse_error_body(body), self._key_in_errors)
        if accept_text and not _is_json(body) and not body.lstrip().startswith(b"<"):
            return self._key_in_answers.hide(body.decode("utf-8", "replace"), may_be_cut=False)
        answer = _parse_body(body)
        if (error_status := _find_error_status(answer)) is not None:
            raise _make_error(error_status, answer, self._key_in_errors)
        try:
            return self._key_in_answers.hide_in_json(answer, may_be_cut=False)
        except RecursionError as error:
            raise OpenAiError("its response is nested too deeply") from error

    async def _send(
        self, path: str, content: Mapping[str, Any], *, method: str = "POST"
    ) -> tuple[int, httpx.Headers, bytes]:
        async with self._client.stream(method, f"{self._url}/{path}", **content) as response:
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


def _hide_key(key: str | None, min_characters: int) -> HiddenSecrets:
    """Return what hides the key in documents and outputs of steps. The worker does not change these."""
    return HiddenSecrets([key] if key is not None and len(key) >= min_characters else [], placeholder="[API key]")


def _is_json(body: bytes) -> bool:
    try:
        orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return True


# Answers ----------------------------------------------------------------------------------------------------------


def _parse_body(body: bytes) -> Any:
    text = body.removeprefix(_BYTE_ORDER_MARK).strip()
    if not text:
        raise OpenAiError("its response is empty", is_transient=True)
    if text.startswith((b"data:", b"event:", b"id:", b":")):
        return _merge_stream(text)
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        if text.startswith(b"<"):
            raise OpenAiError("its response is a web page instead of JSON; check `url`") from error
        raise OpenAiError("its response is not JSON") from error


def _merge_stream(body: bytes) -> Any:
    """Return the chat completion that a service has streamed although no stream was requested."""
    merged: dict[str, Any] = {}
    parts: list[str] = []
    finish_reason, is_done = None, False
    for line in body.splitlines()[:_MAX_STREAM_EVENTS]:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            is_done = True
            continue
        try:
            event = orjson.loads(data)
        except orjson.JSONDecodeError as error:
            raise OpenAiError("its response is not JSON") from error
        if _find_error_status(event) is not None:
            return event
        choice = _get_first_choice(event)
        for message in (choice.get("delta"), choice.get("message")):
            if isinstance(message, dict) and isinstance(message.get("content"), str):
                parts.append(message["content"])
        finish_reason = choice.get("finish_reason") or finish_reason
        if isinstance(event, dict) and event.get("usage"):
            merged["usage"] = event["usage"]
    if not is_done and finish_reason is None:
        raise OpenAiError("its response ended early", is_transient=True)
    return merged | {"choices": [{"message": {"content": "".join(parts)}, "finish_reason": finish_reason}]}


def _get_first_choice(answer: Any) -> dict[str, Any]:
    """Return the first choice of a chat completion, or an empty dictionary."""
    choices = answer.get("choices") if isinstance(answer, dict) else None
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else {}


# Errors -----------------------------------------------------------------------------------------------------------


def _find_error_status(answer: Any) -> int | None:
    """Return the HTTP status of an error in the body of a successful response, 500 if it names none, or None."""
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, dict):
        return None
    error = _get_first_choice(answer).get("error") if answer.get("choices") else answer.get("error")
    if not error:
        return None
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, str) and re.fullmatch(r"[45]\d\d", code):
        code = int(code)
    return code if isinstance(code, int) and 400 <= code <= 599 else 500


def _make_error(status: int, answer: Any, key: HiddenSecrets) -> OpenAiError:
    """Return the error that an unsuccessful response means."""
    error = _find_error(answer)
    words = key.hide(" ".join(_find_message(error).split()))
    reason = f": {words[:200]}" if words.isprintable() and words else ""
    message = f"it returned status {status}{reason}"
    if 300 <= status < 400:
        message += "; it redirects to another URL; check `url`"
    kind, is_transient = _classify(status, _list_texts(error).lower())
    return OpenAiError(message, status, kind=kind, is_transient=is_transient)


def _classify(status: int, text: str) -> tuple[ErrorKind, bool]:
    """Return the kind of an error, and whether it may help to repeat the request."""
    if status in (400, 403, 413, 422, 500):
        if status == 413 or _TOO_LONG.search(text):
            return ErrorKind.TOO_LONG, False
        if _FILTERED.search(text):
            return ErrorKind.FILTERED, False
        if status in (400, 422) or (status == 500 and _FORMAT.search(text)):
            return ErrorKind.REQUEST, False
    if _OUT_OF_QUOTA.search(text):
        return ErrorKind.SERVICE, False
    is_server_error = status >= 500 and status not in _PERMANENT_SERVER_ERRORS
    return ErrorKind.SERVICE, is_server_error or status in _TRANSIENT_STATUS_CODES


def _parse_error_body(body: bytes) -> Any:
    try:
        return orjson.loads(body.removeprefix(_BYTE_ORDER_MARK))
    except orjson.JSONDecodeError:
        return None


def _find_error(answer: Any) -> Any:
    """Return the part of a response that describes the error, or an empty string."""
    if isinstance(answer, list) and answer:
        answer = answer[0]  # as in Gemini's API
    if not isinstance(answer, dict):
        return ""
    choice = _get_first_choice(answer)
    return answer.get("error") or choice.get("error") or answer.get("message") or answer.get("detail") or ""


def _find_message(error: Any) -> str:
    if isinstance(error, list) and error:
        error = error[0]  # as in FastAPI
    if isinstance(error, dict):
        error = error.get("message") or error.get("msg")
    return error if isinstance(error, str) else ""


def _list_texts(error: Any) -> str:
    """Return the message, type and code of an error, to recognize it."""
    if not isinstance(error, dict):
        return _find_message(error)
    return " ".join(str(error.get(name, "")) for name in ("message", "type", "code", "param"))
