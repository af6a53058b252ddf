"""Send one webhook message. Errors of any kind become a `WebhookResponse` with an error code.

Error codes:
    BAD_URL: The URL is not an http(s) URL with a host.
    REQUEST_INVALID: The request cannot be represented in HTTP, for example because of a header. Nothing was sent.
    PORT_REJECTED: Webhooks may not use this port.
    ADDRESS_REJECTED: The address is not public, and `webhooks.allowed_private_hosts` does not allow it.
    CONNECTION_FAILED: The name was not found, or the connection was refused, reset, or failed in TLS.
    TIMEOUT: The endpoint did not respond in time.
    BAD_RESPONSE: The response is not valid HTTP.
    REDIRECT: The endpoint redirected. Redirects are not followed.
    GONE: Status 410. The endpoint no longer accepts messages.
    HTTP_ERROR: Any other status except 2xx.
"""

from __future__ import annotations

import asyncio
import http
import ssl
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import httpcore
import httpx

from jobledger.ledger.domain.webhook_headers import find_unsendable_header
from jobledger.ledger.net.url_policy import PUBLIC_ONLY_MESSAGE, AllowedHosts, find_rejection_reason
from jobledger.workers.safe_http import (
    AddressRejected,
    CheckedNetworkBackend,
    CheckedTransport,
    Resolver,
    describe_connection_error,
    parse_retry_after,
    resolve_host,
)

MAX_RESPONSE_BYTES: Final = 4096
"""The part of a response body that is read and kept."""
_USER_AGENT: Final = "jobledger (webhooks)"
_CONNECTION_HEADERS: Final = frozenset(
    {"host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect", "keep-alive"}
)
"""Headers of the connection itself, which users cannot set."""
_NOT_CALLED_CODES: Final = frozenset({"BAD_URL", "REQUEST_INVALID", "PORT_REJECTED", "ADDRESS_REJECTED"})
_CONNECTION_ERRORS: Final = (httpcore.NetworkError, ssl.SSLError, OSError, UnicodeError)
_PERMANENT_CODES: Final = frozenset({"BAD_URL", "REQUEST_INVALID", "GONE"})


@dataclass(frozen=True, slots=True)
class WebhookRequest:
    """A message to send. `headers` are complete, including the signature, except for those of the connection."""

    url: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class WebhookResponse:
    """The result of an attempt.

    `error_code` and `message` are None for a 2xx. `body` is the beginning of the response body.
    """

    status_code: int | None
    error_code: str | None
    message: str | None
    body: str
    retry_after_s: float | None
    duration_s: float

    @property
    def is_host_responsive(self) -> bool:
        """Whether the host responded, or was not called."""
        return self.status_code is not None or self.error_code in _NOT_CALLED_CODES

    @property
    def is_permanent(self) -> bool:
        """Whether a retry is useless. A rejected address may change or be allowed later, so it is not permanent."""
        return self.error_code in _PERMANENT_CODES


class WebhookClient:
    """The HTTP client of the webhook sender. Sends messages to endpoints.

    Connections are not reused: if the host had closed one, that would cost an attempt.
    """

    def __init__(
        self,
        *,
        allowed_private_hosts: Sequence[str] = (),
        timeout_seconds: float = 10.0,
        resolver: Resolver = resolve_host,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        self._allowed = AllowedHosts(allowed_private_hosts)
        self._timeout = timeout_seconds
        self._transport = CheckedTransport(CheckedNetworkBackend(self._allowed, resolver), ssl_context)

    async def aclose(self) -> None:
        """Close all connections."""
        await self._transport.aclose()

    async def send(self, webhook: WebhookRequest) -> WebhookResponse:
        """Send a message within the timeout. Never raises, except when cancelled."""
        started_at = time.monotonic()
        status, headers, body = None, httpx.Headers(), bytearray()
        code: str | None = None
        message: str | None = None
        host = "the endpoint"
        try:
            url = _parse_target(webhook.url, self._allowed)
            host = url.host
            async with asyncio.timeout(self._timeout):
                response = await self._transport.handle_async_request(_build_request(url, webhook))
                try:
                    status, headers = response.status_code, response.headers
                    async for chunk in response.aiter_raw():
                        body += chunk
                        if len(body) >= MAX_RESPONSE_BYTES:
                            break
                finally:
                    await response.aclose()
        except _NotSendable as error:
            code, message = error.code, str(error)
        except httpcore.LocalProtocolError as error:
            code, message = "REQUEST_INVALID", f"The webhook cannot be sent: {error}."
        except AddressRejected as error:
            code, message = "ADDRESS_REJECTED", f"{error}; {PUBLIC_ONLY_MESSAGE}."
        except (TimeoutError, httpcore.TimeoutException):
            code, message = "TIMEOUT", f"{host} did not respond within {self._timeout:g} seconds."
        except (*_CONNECTION_ERRORS, httpcore.ProtocolError, httpcore.UnsupportedProtocol, ValueError) as error:
            code = "CONNECTION_FAILED" if isinstance(error, _CONNECTION_ERRORS) else "BAD_RESPONSE"
            message = _to_sentence(describe_connection_error(error)[1].format(host=host))
        if status is not None:  # a status counts, even if the rest of the response did not arrive
            code, message = _find_status_error(status, host)
        return WebhookResponse(
            status, code, message, _decode_body(body), parse_retry_after(headers), time.monotonic() - started_at
        )


class _NotSendable(Exception):
    """A message cannot be sent, with the error code of the attempt. The text contains no header values."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _parse_target(text: str, allowed: AllowedHosts) -> httpx.URL:
    if (reason := find_rejection_reason(text, allowed)) is not None:
        raise _NotSendable(reason.code, _to_sentence(reason.message))
    try:
        return httpx.URL(text)
    except httpx.InvalidURL as error:
        raise _NotSendable("BAD_URL", f"This is not a valid URL: {error}.") from error


def _build_request(url: httpx.URL, webhook: WebhookRequest) -> httpx.Request:
    allowed_headers = {
        name: value for name, value in webhook.headers.items() if name.lower() not in _CONNECTION_HEADERS
    }
    if (problem := find_unsendable_header(allowed_headers)) is not None:
        text = f"The webhook cannot be sent: header {problem[0][:100]!r}: {problem[1]}."
        raise _NotSendable("REQUEST_INVALID", text)
    headers = {
        "user-agent": _USER_AGENT,
        "accept": "*/*",
        "accept-encoding": "identity",
        **{name.lower(): value for name, value in allowed_headers.items()},
        "host": url.netloc.decode(),
        "connection": "close",
        "content-length": str(len(webhook.body)),
    }
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return httpx.Request("POST", url, headers=raw, content=webhook.body)


def _to_sentence(clause: str) -> str:
    return f"{clause[0].upper()}{clause[1:]}."


def _find_status_error(status: int, host: str) -> tuple[str | None, str | None]:
    if 200 <= status < 300:
        return None, None
    phrase = {item.value: f" ({item.phrase})" for item in http.HTTPStatus}.get(status, "")
    if status == http.HTTPStatus.GONE:
        return "GONE", f"{host} responded with 410{phrase}: it no longer accepts messages."
    if 300 <= status < 400:
        return "REDIRECT", f"{host} responded with {status}{phrase}. Redirects are not followed."
    return "HTTP_ERROR", f"{host} responded with {status}{phrase}."


def _decode_body(body: bytearray) -> str:
    text = bytes(body[:MAX_RESPONSE_BYTES]).decode(errors="replace")
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)
