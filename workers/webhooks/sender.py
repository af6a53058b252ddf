"""workers: one call of a webhook's receiver, which may do anything. It always ends in an `Answer`, in time.

Codes of what was no success:
    BAD_URL             not an http(s) address with a host
    REQUEST_INVALID     it cannot be written as HTTP, for example because of a header: nothing was sent
    PORT_REJECTED        a port that webhooks do not go to
    ADDRESS_REJECTED     it leads to an address that is not public, and that `webhooks.allowed_private_hosts` does not
    name
    CONNECTION_FAILED   no such name, refused, reset, TLS failed
    TIMEOUT             it did not answer in time
    BAD_RESPONSE        it did not answer in HTTP
    REDIRECT            it sent us on; redirects are not followed
    GONE                410: it wants no more
    HTTP_ERROR          any other status but 2xx
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
from jobledger.ledger.net.url_policy import PUBLIC_ONLY_MESSAGE, AllowedHosts, rejection_reason
from jobledger.workers.safe_http import (
    AddressRejected,
    CheckedNetworkBackend,
    Resolver,
    describe_connection_error,
    parse_retry_after,
    resolve_host,
)

MAX_RESPONSE_BYTES: Final = 4096
"""So much of an answer is kept; more is not read."""
_USER_AGENT: Final = "jobledger (webhooks)"
_CONNECTION_HEADERS: Final = frozenset(
    {"host", "connection", "content-length", "transfer-encoding", "te", "trailer", "upgrade", "expect", "keep-alive"}
)
"""Headers of the connection itself, which nobody else may set."""
_NOT_CALLED_CODES: Final = frozenset({"BAD_URL", "REQUEST_INVALID", "PORT_REJECTED", "ADDRESS_REJECTED"})
_PERMANENT_CODES: Final = frozenset({"BAD_URL", "REQUEST_INVALID", "GONE"})


@dataclass(frozen=True, slots=True)
class WebhookRequest:
    """What is to be sent. `headers` are complete, signature included, but for those of the connection."""

    url: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True, slots=True)
class WebhookResponse:
    """What came of it. `error` and `message` are None for a 2xx; `body` is the beginning of the answer's."""

    status_code: int | None
    error_code: str | None
    message: str | None
    body: str
    retry_after_s: float | None
    duration_s: float

    @property
    def is_host_responsive(self) -> bool:
        """Whether the receiver has answered at all, or was not called."""
        return self.status_code is not None or self.error_code in _NOT_CALLED_CODES

    @property
    def is_permanent(self) -> bool:
        """Whether it is of no use to try again. A refused address may be another one tomorrow, or be allowed."""
        return self.error_code in _PERMANENT_CODES


class Sender:
    """Calls receivers. Connections are not kept: one that the other side has closed meanwhile would cost an attempt."""

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
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or httpx.create_ssl_context(),
            network_backend=CheckedNetworkBackend(self._allowed, resolver),
            max_connections=None,
            max_keepalive_connections=0,
        )

    async def aclose(self) -> None:
        await self._pool.aclose()

    async def send(self, outgoing: WebhookRequest) -> WebhookResponse:
        """Send it, within the time; whatever the receiver does, there is an answer."""
        begun = time.monotonic()
        status, headers, body = None, httpx.Headers(), bytearray()
        code: str | None = None
        message: str | None = None
        host = "the receiver"
        try:
            url, refusal = _target(outgoing.url, self._allowed)
            if url is None:
                code, message = refusal
            else:
                host = url.host
                async with asyncio.timeout(self._timeout):
                    request = _request(url, outgoing)
                    answer = await self._pool.handle_async_request(request)
                    try:
                        status, headers = answer.status, httpx.Headers(answer.headers)
                        async for part in answer.aiter_stream():
                            body += part
                            if len(body) >= MAX_RESPONSE_BYTES:
                                break
                    finally:
                        await answer.aclose()
        except (_RequestInvalid, httpcore.LocalProtocolError) as invalid:
            code, message = "REQUEST_INVALID", f"The webhook cannot be sent as it was asked for: {invalid}."
        except AddressRejected as refused:
            code, message = "ADDRESS_REJECTED", f"{refused}; {PUBLIC_ONLY_MESSAGE}."
        except (TimeoutError, httpcore.TimeoutException):
            code, message = "TIMEOUT", f"{host} did not answer within {self._timeout:g} seconds."
        except (httpcore.NetworkError, ssl.SSLError, OSError, UnicodeError) as error:
            code, message = (
                "CONNECTION_FAILED",
                f"{describe_connection_error(error)[1].format(host=host).capitalize()}.",
            )
        except (httpcore.ProtocolError, httpcore.UnsupportedProtocol, ValueError) as error:
            code, message = "BAD_RESPONSE", f"{describe_connection_error(error)[1].format(host=host).capitalize()}."
        if status is not None:  # then that is the answer, whatever became of the rest of it
            code, message = _error_from_status(status, host)
        return WebhookResponse(
            status, code, message, _text(body), _retry_after_seconds(headers), time.monotonic() - begun
        )


def _target(text: str, allowed: AllowedHosts) -> tuple[httpx.URL | None, tuple[str, str]]:
    why = rejection_reason(text, allowed)
    if why is not None:
        code = (
            "PORT_REJECTED"
            if why.startswith("port")
            else "ADDRESS_REJECTED"
            if why.endswith(PUBLIC_ONLY_MESSAGE)
            else "BAD_URL"
        )
        return None, (code, f"{why[0].upper()}{why[1:]}.")
    try:
        return httpx.URL(text), ("", "")
    except httpx.InvalidURL as error:
        return None, ("BAD_URL", f"This is no address: {error}.")


class _RequestInvalid(Exception):
    """A request cannot be written as HTTP. The message does not hold values of headers."""


def _request(url: httpx.URL, outgoing: WebhookRequest) -> httpcore.Request:
    """Return the request.

    Raises:
        _RequestInvalid: one of its headers cannot be sent as it is.
    """
    given = {name: value for name, value in outgoing.headers.items() if name.lower() not in _CONNECTION_HEADERS}
    if (problem := find_unsendable_header(given)) is not None:
        raise _RequestInvalid(f"header {problem[0][:100]!r}: {problem[1]}")
    headers = {
        "user-agent": _USER_AGENT,
        "accept": "*/*",
        "accept-encoding": "identity",
        **{name.lower(): value for name, value in given.items()},
        "host": url.netloc.decode(),
        "connection": "close",
        "content-length": str(len(outgoing.body)),
    }
    target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
    raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
    return httpcore.Request("POST", target, headers=raw, content=outgoing.body)


def _error_from_status(status: int, host: str) -> tuple[str | None, str | None]:
    if 200 <= status < 300:
        return None, None
    known = {known.value: f" ({known.phrase})" for known in http.HTTPStatus}.get(status, "")
    if status == http.HTTPStatus.GONE:
        return "GONE", f"{host} answered 410{known}: it wants no more."
    if 300 <= status < 400:
        return "REDIRECT", f"{host} answered {status}{known}; redirects are not followed."
    return "HTTP_ERROR", f"{host} answered {status}{known}."


def _retry_after_seconds(headers: httpx.Headers) -> float | None:
    seconds = parse_retry_after(headers)
    return None if seconds is None else float(max(0, seconds))


def _text(body: bytearray) -> str:
    text = bytes(body[:MAX_RESPONSE_BYTES]).decode(errors="replace")
    return "".join(character if character.isprintable() or character in "\n\t" else "�" for character in text)
