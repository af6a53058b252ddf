"""Download URLs from untrusted input. All HTTP requests of the session processor use this module.

This module translates errors of httpx, httpcore, the resolver and the operating system to a `ProcessorError`:
    BAD_URL             not an http or https URL with a host
    ADDRESS_REJECTED    the host has a private, loopback, link-local or otherwise non-public address
    NETWORK_ERROR       unknown host, connection refused, reset or closed, TLS failure; see `details.reason`
    FETCH_TIMEOUT       the server was too slow
    HTTP_ERROR          status 4xx or 5xx; `details.status_code`, and `details.retry_after` in seconds if sent
    TOO_MANY_REDIRECTS  more redirects than allowed
    TOO_LARGE           the body, or the decompressed body, is larger than allowed
    BAD_RESPONSE        the response cannot be decoded
"""

from __future__ import annotations

import asyncio
import http
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpcore
import httpx

from jobledger.ledger.net.url_policy import AllowedHosts, strip_userinfo
from jobledger.workers.processor import ProcessorError
from jobledger.workers.processors.session.host_limits import acquire_host_slot, host_lock_directory
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.safe_http import (
    AddressRejected,
    CheckedNetworkBackend,
    CheckedTransport,
    Resolver,
    describe_connection_error,
    parse_retry_after,
    resolve_host,
)

ProgressCallback = Callable[[int, int | None], Awaitable[None]]
"""Called with the number of bytes received, and the total if the server sent it."""

PROGRESS_INTERVAL_SECONDS = 1.0
_CHUNK = 64 * 1024
_ENCODINGS = {"", "identity", "gzip", "x-gzip", "deflate"}


@dataclass(frozen=True, slots=True)
class FetchResult:
    """A downloaded response. `url` is the URL after redirects. `body` is empty if a file was written."""

    url: str
    content_type: str
    size: int
    seconds: float
    body: bytes = b""

    @property
    def media_type(self) -> str:
        return self.content_type.partition(";")[0].strip().lower()


class Fetcher:
    """Downloads URLs within the limits of the settings. `resolve` resolves host names."""

    def __init__(
        self, settings: SessionSettings, *, resolve: Resolver = resolve_host, lock_directory: Path | None = None
    ) -> None:
        self._settings = settings
        self._lock_directory = lock_directory or host_lock_directory()
        self._network = CheckedNetworkBackend(AllowedHosts(settings.allowed_private_hosts), resolve)

    async def fetch(
        self,
        url: str,
        *,
        max_bytes: int,
        timeout_seconds: float,
        accept: str = "*/*",
        target: Path | None = None,
        check_media_type: Callable[[str], None] = lambda media_type: None,
        on_progress: ProgressCallback | None = None,
    ) -> FetchResult:
        """Download `url` and follow redirects.

        At most `max_fetches_per_host` downloads from one host run at a time. Waiting for a slot does not count towards
        `timeout_seconds`.

        Args:
            url: An http or https URL.
            max_bytes: Maximum size of the decompressed body.
            timeout_seconds: Timeout for the whole download with redirects.
            accept: The `Accept` header.
            target: File to write the body to. Default: keep it in memory.
            check_media_type: Called with the media type before the body is read. May raise to reject it.
            on_progress: Called about once per second.

        Raises:
            ProcessorError: With one of the codes in the module's docstring.
        """
        started = time.monotonic()
        try:
            async with (
                asyncio.timeout(timeout_seconds) as clock,
                self._client(accept) as client,
                self._follow(client, url, clock) as response,
            ):
                content_type = response.headers.get("content-type", "")
                check_media_type(content_type.partition(";")[0].strip().lower())
                arriving = _body(response, max_bytes, on_progress)
                if target is None:
                    body = b"".join([part async for part in arriving])
                    size = len(body)
                else:
                    body, size = b"", await _write(target, arriving)
                final = _without_password(response.url)
        except TimeoutError:
            raise ProcessorError(
                "FETCH_TIMEOUT",
                f"{_without_password(url)} was not fetched within {timeout_seconds:g} seconds.",
                transient=True,
                details={"url": _without_password(url), "seconds": timeout_seconds},
            ) from None
        return FetchResult(
            url=final, content_type=content_type, size=size, seconds=time.monotonic() - started, body=body
        )

    async def serve_proxy(self, listener: socket.socket) -> None:
        """Run an HTTP `CONNECT` proxy on a listening socket until cancelled.

        Sandboxed programs have no other access to the network. The proxy checks addresses like `fetch`.
        """
        async with await asyncio.start_server(self._handle_proxy_client, sock=listener) as server:
            await server.serve_forever()

    async def _handle_proxy_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError, httpcore.NetworkError, httpcore.TimeoutException, AddressRejected):
            try:
                async with asyncio.timeout(self._settings.connect_timeout_seconds):
                    head = await reader.readuntil(b"\r\n\r\n")
                method, _, rest = head.decode("latin-1").partition(" ")
                host, _, port = rest.partition(" ")[0].rpartition(":")
                if method != "CONNECT" or not port.isdigit():
                    raise ValueError(method)
                upstream = await self._network.connect_tcp(
                    host.strip("[]"), int(port), self._settings.connect_timeout_seconds
                )
            except (AddressRejected, ValueError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
                writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
                return
            except (httpcore.NetworkError, httpcore.TimeoutException):
                writer.write(b"HTTP/1.1 502 Bad Gateway\r\nContent-Length: 0\r\n\r\n")
                await writer.drain()
                return
            try:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                directions = {
                    asyncio.create_task(_upload(reader, upstream)),
                    asyncio.create_task(_download(upstream, writer)),
                }
                try:
                    await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for direction in directions:
                        direction.cancel()
                    await asyncio.gather(*directions, return_exceptions=True)
            finally:
                await upstream.aclose()

    @asynccontextmanager
    async def _client(self, accept: str) -> AsyncIterator[httpx.AsyncClient]:
        timeout = httpx.Timeout(self._settings.read_timeout_seconds, connect=self._settings.connect_timeout_seconds)
        headers = {"User-Agent": self._settings.user_agent, "Accept": accept, "Accept-Encoding": "gzip, deflate"}
        # trust_env=False: a proxy would bypass the address check, and .netrc would add passwords.
        async with httpx.AsyncClient(
            transport=CheckedTransport(self._network), timeout=timeout, headers=headers, trust_env=False
        ) as client:
            yield client

    @asynccontextmanager
    async def _follow(
        self, client: httpx.AsyncClient, url: str, clock: asyncio.Timeout
    ) -> AsyncIterator[httpx.Response]:
        target = _parse_url(url)
        for _ in range(self._settings.max_redirects + 1):
            with _translate_errors(target):
                async with self._host_slot(target.netloc.decode(), clock), client.stream("GET", target) as response:
                    if not response.has_redirect_location:
                        _raise_for_status(response)
                        yield response
                        return
                    target = _parse_url(response.headers["location"], base=target)
        raise ProcessorError(
            "TOO_MANY_REDIRECTS",
            f"{_without_password(url)} redirects more than {self._settings.max_redirects} times.",
            details={"url": _without_password(url), "last": _without_password(target)},
        )

    @asynccontextmanager
    async def _host_slot(self, host: str, clock: asyncio.Timeout) -> AsyncIterator[None]:
        """Hold a slot for the host. The timeout is paused while waiting."""
        loop = asyncio.get_running_loop()
        remaining = (clock.when() or loop.time()) - loop.time()
        clock.reschedule(None)
        async with acquire_host_slot(host, self._settings.max_fetches_per_host, self._lock_directory):
            clock.reschedule(loop.time() + remaining)
            yield


async def _upload(reader: asyncio.StreamReader, upstream: httpcore.AsyncNetworkStream) -> None:
    while chunk := await reader.read(_CHUNK):
        await upstream.write(chunk)


async def _download(upstream: httpcore.AsyncNetworkStream, writer: asyncio.StreamWriter) -> None:
    while chunk := await upstream.read(_CHUNK):
        writer.write(chunk)
        await writer.drain()


def _parse_url(url: str, *, base: httpx.URL | None = None) -> httpx.URL:
    try:
        target = base.join(url) if base else httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        shown = strip_userinfo(url)
        raise ProcessorError("BAD_URL", f"{shown!r} is not a valid URL: {error}.", details={"url": shown}) from error
    if target.scheme not in ("http", "https") or not target.host:
        subject = (
            f"{_without_password(base)} redirects to {_without_password(target)}, which"
            if base
            else _without_password(target)
        )
        raise ProcessorError(
            "BAD_URL",
            f"{subject} is not an http or https URL with a host.",
            details={"url": _without_password(target)},
        )
    # A password in a redirect is not sent either.
    return target.copy_with(userinfo=b"") if target.userinfo else target


def _without_password(url: httpx.URL | str) -> str:
    """Return the URL without user name and password."""
    try:
        url = httpx.URL(url)
    except httpx.InvalidURL:
        return strip_userinfo(str(url))
    return str(url.copy_with(userinfo=b"") if url.userinfo else url)


def _raise_for_status(response: httpx.Response) -> None:
    status = response.status_code
    if response.is_success:
        return
    details: dict[str, Any] = {"url": _without_password(response.url), "status_code": status}
    if (seconds := parse_retry_after(response.headers)) is not None:
        details["retry_after"] = seconds
    phrases = {item.value: f" ({item.phrase})" for item in http.HTTPStatus}
    raise ProcessorError(
        "HTTP_ERROR",
        f"{_without_password(response.url)} answered {status}{phrases.get(status, '')}.",
        transient=status >= 500 or status in (408, 425, 429),
        details=details,
    )


async def _body(response: httpx.Response, max_bytes: int, on_progress: ProgressCallback | None) -> AsyncIterator[bytes]:
    """Yield the decompressed body in bounded chunks, so that a decompression bomb cannot fill the memory."""
    length = response.headers.get("content-length", "")
    total = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else None
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in _ENCODINGS:
        raise ProcessorError(
            "BAD_RESPONSE",
            f"{_without_password(response.url)} sent the unsupported content encoding {encoding!r}.",
            details={"url": _without_password(response.url), "encoding": encoding},
        )
    if total is not None and total > max_bytes:
        raise _too_large(response, max_bytes)
    decompressor = _Decompressor() if encoding not in ("", "identity") else None
    size, received, reported_at = 0, 0, time.monotonic()
    async for raw in response.aiter_raw(_CHUNK):
        received += len(raw)
        for part in decompressor.feed(raw) if decompressor else (raw,):
            size += len(part)
            if size > max_bytes:
                raise _too_large(response, max_bytes)
            yield part
        if on_progress and time.monotonic() - reported_at >= PROGRESS_INTERVAL_SECONDS:
            reported_at = time.monotonic()
            await on_progress(received, total)
    if decompressor and not decompressor.is_complete:
        raise httpcore.RemoteProtocolError("the compressed body ends early")


class _Decompressor:
    """Decompresses gzip and zlib, including multi-member gzip, one bounded chunk at a time."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=47)
        self._started = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._inflate.eof:
                self._inflate = zlib.decompressobj(wbits=47)
            self._started = True
            yield self._inflate.decompress(data, _CHUNK)
            data = self._inflate.unconsumed_tail or self._inflate.unused_data

    @property
    def is_complete(self) -> bool:
        return self._inflate.eof or not self._started


def _too_large(response: httpx.Response, max_bytes: int) -> ProcessorError:
    return ProcessorError(
        "TOO_LARGE",
        f"{_without_password(response.url)} is larger than {format_bytes(max_bytes)}.",
        details={"url": _without_password(response.url), "max_bytes": max_bytes},
    )


async def _write(path: Path, parts: AsyncIterator[bytes]) -> int:
    file: IO[bytes] = await asyncio.to_thread(path.open, "wb")
    with file:
        size = 0
        async for part in parts:
            size += file.write(part)
        return size


def format_bytes(size: int) -> str:
    """Return a size such as `1.5 MB`."""
    for unit, scale in (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


@contextmanager
def _translate_errors(url: httpx.URL) -> Iterator[None]:
    """Translate an error of a request to `url` to a `ProcessorError`."""
    host = url.host
    details = {"url": _without_password(url), "host": host}
    try:
        yield
    except AddressRejected as rejected:
        raise ProcessorError(
            "ADDRESS_REJECTED",
            f"{rejected}. Allow the host in `processors.session.allowed_private_hosts` if it is trusted.",
            details={"host": rejected.host, "address": rejected.address, "reason": rejected.reason},
        ) from rejected
    except (httpcore.TimeoutException, httpx.TimeoutException) as error:
        problem = "did not accept a connection" if isinstance(error, httpcore.ConnectTimeout) else "stopped responding"
        raise ProcessorError("FETCH_TIMEOUT", f"{host} {problem} in time.", transient=True, details=details) from error
    except httpx.InvalidURL as error:  # httpx parses the target of a redirect even if it does not follow it
        raise ProcessorError(
            "BAD_URL",
            f"{_without_password(url)} redirects to an invalid URL: {error}.",
            details=details,
        ) from error
    except zlib.error as error:
        raise ProcessorError(
            "BAD_RESPONSE", f"{_without_password(url)} could not be decompressed: {error}.", details=details
        ) from error
    except (httpx.TransportError, httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError) as error:
        reason, sentence, transient = describe_connection_error(error)
        raise ProcessorError(
            "NETWORK_ERROR",
            f"{_without_password(url)} could not be fetched: {sentence.format(host=host)}.",
            transient=transient,
            details=details | {"reason": reason},
        ) from error
