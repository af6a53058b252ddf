"""Send HTTP requests to untrusted URLs. A connection goes to exactly the address that was checked."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, NamedTuple

import httpcore
import httpx

from jobledger.ledger.net.url_policy import AllowedHosts

Resolver = Callable[[str, int], Awaitable[list[str]]]
"""Returns the IP addresses of a host, best first. Raises `OSError` if there are none."""


class AddressRejected(Exception):
    """The address of a host is not allowed. The text is a clause: `host (address) is a private address`."""

    def __init__(self, host: str, address: str, reason: str) -> None:
        label = host if host == address else f"{host} ({address})"
        super().__init__(f"{label} is {reason}")
        self.host, self.address, self.reason = host, address, reason


class Endpoint(NamedTuple):
    """A host and a port, and the address at which they were reached."""

    host: str
    port: int
    address: str


async def resolve_host(host: str, port: int) -> list[str]:
    """Return the distinct addresses of a host, in the order in which to try them.

    Raises:
        OSError: The host has no address.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


class CheckedNetworkBackend(httpcore.AsyncNetworkBackend):
    """Connects to exactly the address that was checked. TLS still verifies the host name.

    `exempt` is permitted too, whatever its address.
    """

    def __init__(self, allowed: AllowedHosts, resolver: Resolver, exempt: Endpoint | None = None) -> None:
        self._allowed = allowed
        self._resolve = resolver
        self._exempt = exempt
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the interface of httpcore
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        try:
            async with asyncio.timeout(timeout):
                addresses = await self._resolve(host, port)
        except TimeoutError as error:
            raise httpcore.ConnectTimeout from error
        except (OSError, UnicodeError) as error:  # UnicodeError: an invalid host name, such as an overlong label
            raise httpcore.ConnectError(str(error)) from error
        failure: Exception | None = None
        for address in self._select_permitted(host, port, addresses):
            try:
                return await self._network.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore.ConnectError("no address")

    def _select_permitted(self, host: str, port: int, addresses: list[str]) -> list[str]:
        rejections = {
            address: self._allowed.find_address_rejection(host, address)
            for address in addresses
            if Endpoint(host, port, address) != self._exempt
        }
        permitted = [address for address in addresses if rejections.get(address) is None]
        if rejections and not permitted:
            address, rejection = next(iter(rejections.items()))
            raise AddressRejected(host, address, rejection or "")
        return permitted


@cache
def get_ssl_context(*, trust_env: bool = True) -> ssl.SSLContext:
    """Return a context for TLS connections of workers.

    It is created once, because that blocks the event loop for 20 ms.

    Args:
        trust_env: Whether `SSL_CERT_FILE` and `SSL_CERT_DIR` replace the certificates of certifi.

    Raises:
        OSError: With `trust_env`, the file cannot be read.
    """
    return httpx.create_ssl_context(trust_env=trust_env)


class CheckedTransport(httpx.AsyncBaseTransport):
    """An httpx transport with our network backend, which the default transport does not accept."""

    def __init__(self, network: CheckedNetworkBackend, ssl_context: ssl.SSLContext | None = None) -> None:
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context or get_ssl_context(),
            network_backend=network,
            max_connections=None,
            max_keepalive_connections=0,
        )

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        url = request.url
        target = httpcore.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path)
        response = await self._pool.handle_async_request(
            httpcore.Request(
                request.method,
                target,
                headers=request.headers.raw,
                content=request.stream,
                extensions=request.extensions,
            )
        )
        extensions = {"network_stream": response.extensions["network_stream"]}
        return httpx.Response(
            response.status, headers=response.headers, stream=_Stream(response), extensions=extensions
        )

    async def aclose(self) -> None:
        await self._pool.aclose()


class _Stream(httpx.AsyncByteStream):
    def __init__(self, response: httpcore.Response) -> None:
        self._response = response

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._response.aiter_stream()

    async def aclose(self) -> None:
        await self._response.aclose()


def get_endpoint(response: httpx.Response) -> Endpoint | None:
    """Return from where a response of `CheckedTransport` comes, or None if its connection is closed already."""
    url = response.request.url
    peer = response.extensions["network_stream"].get_extra_info("server_addr")
    if peer is None:
        return None
    return Endpoint(url.raw_host.decode(), url.port or (443 if url.scheme == "https" else 80), str(peer[0]))


def parse_retry_after(headers: httpx.Headers) -> int | None:
    """Return the seconds of a `Retry-After` header (RFC 9110, section 10.2.3); None if it is missing or invalid.

    A date is converted to seconds with the `Date` header, so the clock of the server counts.
    """
    value = headers.get("retry-after", "").strip()
    if value.isascii() and value.isdigit():
        return int(value[:9])
    try:
        wait = parsedate_to_datetime(value) - parsedate_to_datetime(headers["date"])
    except (KeyError, ValueError, TypeError):
        return None
    return max(0, round(wait.total_seconds()))


def describe_connection_error(error: BaseException) -> tuple[str, str, bool]:
    """Return a code, a message with the placeholder `{host}`, and whether the error is transient."""
    for cause in _iterate_causes(error):
        match cause:
            case ssl.SSLCertVerificationError():
                return "certificate", "the certificate of {host} is not valid", False
            case ssl.SSLError():
                return "tls", "the TLS connection to {host} failed", True
            case socket.gaierror() | UnicodeError():
                return "dns", "the host name {host} could not be found", True
            case ConnectionRefusedError():
                return "refused", "{host} refused the connection", True
            case ConnectionResetError() | BrokenPipeError():
                return "reset", "{host} closed the connection", True
            case OSError(errno=errno.EHOSTUNREACH | errno.ENETUNREACH):
                return "unreachable", "{host} cannot be reached from this network", True
            case _:
                continue
    if isinstance(error, httpcore.ProtocolError):
        return "protocol", "{host} did not respond with complete and valid HTTP", True
    if isinstance(error, httpcore.ReadError):
        return "reset", "{host} closed the connection", True
    return "connection", "the connection to {host} failed", True


def _iterate_causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error and all its causes, including those in exception groups."""
    seen: set[int] = set()
    pending = [error]
    while pending:
        current = pending.pop()
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        if isinstance(current, BaseExceptionGroup):
            pending.extend(current.exceptions)
        pending.extend(cause for cause in (current.__context__, current.__cause__) if cause is not None)
