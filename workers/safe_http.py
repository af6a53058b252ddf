"""workers: calling addresses that strangers have typed: to exactly the address that was checked."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from typing import Any

import httpcore
import httpx

from jobledger.ledger.net.url_policy import AllowedHosts

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Answers the IP addresses of a host, best first; raises `OSError` when there are none."""


class AddressRejected(Exception):
    """A host is not where one may call. Its text is a half sentence: `host (address) is a private address`."""

    def __init__(self, host: str, address: str, reason: str) -> None:
        named = host if host == address else f"{host} ({address})"
        super().__init__(f"{named} is {reason}")
        self.host, self.address, self.reason = host, address, reason


async def resolve_host(host: str, port: int) -> list[str]:
    """Return the addresses of a host, each once, in the order in which they should be tried; OSError if it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class CheckedNetworkBackend(httpcore.AsyncNetworkBackend):
    """Connects to exactly the address that was checked; TLS still verifies the name."""

    def __init__(self, allowed: AllowedHosts, resolver: Resolver) -> None:
        self._allowed = allowed
        self._resolve = resolver
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109  the interface of httpcore
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolve(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout from error
        except (OSError, UnicodeError) as error:  # UnicodeError: a name that cannot be one (a label too long)
            raise httpcore.ConnectError(str(error)) from error
        failure: Exception | None = None
        for address in self._permitted(host, addresses):
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore.ConnectError("no address")

    def _permitted(self, host: str, addresses: list[str]) -> list[str]:
        refusals = {address: self._allowed.address_rejection_reason(host, address) for address in addresses}
        permitted = [address for address, refusal in refusals.items() if refusal is None]
        if refusals and not permitted:
            address, refusal = next(iter(refusals.items()))
            raise AddressRejected(host, address, refusal or "")
        return permitted


class CheckedTransport(httpx.AsyncBaseTransport):
    """httpx over our own network: its own transport cannot be given one."""

    def __init__(self, network: CheckedNetworkBackend) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=httpx.create_ssl_context(), network_backend=network, max_keepalive_connections=0
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = httpcore.URL(
            scheme=request.url.raw_scheme,
            host=request.url.raw_host,
            port=request.url.port,
            target=request.url.raw_path,
        )
        answer = await self._pool.handle_async_request(
            httpcore.Request(request.method, url, headers=request.headers.raw, extensions=request.extensions)
        )
        return httpx.Response(answer.status, headers=answer.headers, stream=_Stream(answer))

    async def aclose(self) -> None:
        await self._pool.aclose()


class _Stream(httpx.AsyncByteStream):
    def __init__(self, answer: httpcore.Response) -> None:
        self._answer = answer

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._answer.aiter_stream()

    async def aclose(self) -> None:
        await self._answer.aclose()


def parse_retry_after(headers: httpx.Headers) -> int | None:
    """RFC 9110, 10.2.3: seconds, or a date, which the server's own clock turns into seconds."""
    said = headers.get("retry-after", "").strip()
    if said.isascii() and said.isdigit():
        return int(said[:9])
    try:
        wait = parsedate_to_datetime(said) - parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError, TypeError):
        return None
    return max(0, round(wait.total_seconds()))


def describe_connection_error(error: BaseException) -> tuple[str, str, bool]:
    """A word for programs, a sentence for people, and whether it may pass."""
    for cause in _causes(error):
        match cause:
            case ssl.SSLCertVerificationError():
                return "certificate", "the certificate of {host} is not valid", False
            case ssl.SSLError():
                return "tls", "no secure connection to {host} could be made", True
            case socket.gaierror() | UnicodeError():
                return "dns", "the host name {host} could not be found", True
            case ConnectionRefusedError():
                return "refused", "{host} refused the connection", True
            case ConnectionResetError() | BrokenPipeError():
                return "reset", "{host} broke off the connection", True
            case OSError(errno=errno.EHOSTUNREACH | errno.ENETUNREACH):
                return "unreachable", "there is no way to {host} from here", True
            case _:
                continue
    if isinstance(error, httpcore.ProtocolError):
        return "protocol", "{host} did not answer in valid HTTP, or only in part", True
    if isinstance(error, httpcore.ReadError):
        return "reset", "{host} broke off the connection", True
    return "connection", "the connection to {host} failed", True


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and everything it came from, groups included."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, BaseExceptionGroup):
            waiting.extend(current.exceptions)
        waiting.extend(cause for cause in (current.__context__, current.__cause__) if cause is not None)
