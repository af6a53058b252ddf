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
import io
import socket
import ssl
import time
import zlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpcore
import httpx

from jobledger.ledger.net.url_policy import AllowedHosts, strip_userinfo
from jobledger.workers import safe_http
from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session.host_limits import acquire_host_slot, get_host_lock_directory
from jobledger.workers.processors.session.settings import SessionSettings

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
        return _get_media_type(self.content_type)


def _get_media_type(content_type: str) -> str:
    return content_type.partition(";")[0].strip().lower()


class Fetcher:
    """Downloads URLs within the limits of the settings. `resolve` resolves host names."""

    def __init__(
        self,
        settings: SessionSettings,
        *,
        resolve: safe_http.Resolver = safe_http.resolve_host,
        lock_directory: Path | None = None,
    ) -> None:
        self._settings = settings
        self._lock_directory = lock_directory or get_host_lock_directory()
        self._network = safe_http.CheckedNetworkBackend(AllowedHosts(settings.allowed_private_hosts), resolve)

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
        start = _parse_url(url)
        try:
            async with (
                asyncio.timeout(timeout_seconds) as deadline,
                self._open_client(accept) as client,
                self._open_response(client, start, deadline) as response,
            ):
                content_type = response.headers.get("content-type", "")
                check_media_type(_get_media_type(content_type))
                with io.BytesIO() if target is None else await asyncio.to_thread(target.open, "wb") as file:
                    size = 0
                    async for part in _read_body(response, max_bytes, on_progress):
                        size += file.write(part)
                    body = file.getvalue() if isinstance(file, io.BytesIO) else b""
        except TimeoutError:
            message = f"was not fetched within {timeout_seconds:g} seconds"
            raise _make_error("FETCH_TIMEOUT", start, message, transient=True, seconds=timeout_seconds) from None
        return FetchResult(str(response.url), content_type, size, time.monotonic() - started, body)

    async def serve_proxy(self, listener: socket.socket) -> None:
        """Run an HTTP `CONNECT` proxy on a listening socket until cancelled.

        Sandboxed programs have no other access to the network. The proxy checks addresses like `fetch`.
        """
        async with await asyncio.start_server(self._handle_proxy_client, sock=listener) as server:
            await server.serve_forever()

    async def _handle_proxy_client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError, httpcore.NetworkError, httpcore.TimeoutException):
            try:
                upstream = await self._connect_upstream(reader)
            except (
                safe_http.AddressRejected,
                ValueError,
                TimeoutError,
                asyncio.IncompleteReadError,
                asyncio.LimitOverrunError,
            ):
                error = b"403 Forbidden"
            except (httpcore.NetworkError, httpcore.TimeoutException):
                error = b"502 Bad Gateway"
            else:
                writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
                await _relay(reader, writer, upstream)
                return
            writer.write(b"HTTP/1.1 %s\r\nContent-Length: 0\r\n\r\n" % error)
            await writer.drain()

    async def _connect_upstream(self, reader: asyncio.StreamReader) -> httpcore.AsyncNetworkStream:
        """Read the request `CONNECT host:port` and connect to the host. Any other request raises ValueError."""
        seconds = self._settings.connect_timeout_seconds
        async with asyncio.timeout(seconds):
            head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.decode("latin-1").partition(" ")
        host, _, port = rest.partition(" ")[0].rpartition(":")
        if method != "CONNECT" or not port.isdigit():
            raise ValueError(method)
        return await self._network.connect_tcp(host.strip("[]"), int(port), seconds)

    def _open_client(self, accept: str) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self._settings.read_timeout_seconds, connect=self._settings.connect_timeout_seconds)
        headers = {"User-Agent": self._settings.user_agent, "Accept": accept, "Accept-Encoding": "gzip, deflate"}
        # trust_env=False: a proxy would bypass the address check, and .netrc would add passwords.
        return httpx.AsyncClient(
            transport=safe_http.CheckedTransport(self._network), timeout=timeout, headers=headers, trust_env=False
        )

    @asynccontextmanager
    async def _open_response(
        self, client: httpx.AsyncClient, start: httpx.URL, deadline: asyncio.Timeout
    ) -> AsyncIterator[httpx.Response]:
        """Follow redirects to the response."""
        target = start
        for _ in range(self._settings.max_redirects + 1):
            with _translate_errors(target):
                async with self._host_slot(target.netloc.decode(), deadline), client.stream("GET", target) as response:
                    if not response.has_redirect_location:
                        _raise_for_status(response)
                        yield response
                        return
                    target = _parse_url(response.headers["location"], base=target)
        message = f"redirects more than {self._settings.max_redirects} times"
        raise _make_error("TOO_MANY_REDIRECTS", start, message, last=str(target))

    @asynccontextmanager
    async def _host_slot(self, host: str, deadline: asyncio.Timeout) -> AsyncIterator[None]:
        """Hold a slot for the host. The deadline moves by the time of waiting."""
        loop = asyncio.get_running_loop()
        remaining = (deadline.when() or loop.time()) - loop.time()
        deadline.reschedule(None)
        async with acquire_host_slot(host, self._settings.max_fetches_per_host, self._lock_directory):
            deadline.reschedule(loop.time() + remaining)
            yield


async def _relay(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, upstream: httpcore.AsyncNetworkStream
) -> None:
    """Copy both directions until one of them ends, and close `upstream`."""

    async def upload() -> None:
        while chunk := await reader.read(_CHUNK):
            await upstream.write(chunk)

    async def download() -> None:
        while chunk := await upstream.read(_CHUNK):
            writer.write(chunk)
            await writer.drain()

    directions = [asyncio.create_task(upload()), asyncio.create_task(download())]
    try:
        await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for direction in directions:
            direction.cancel()
        await asyncio.gather(*directions, return_exceptions=True)
        await upstream.aclose()


def _make_error(code: str, url: httpx.URL, message: str, *, transient: bool = False, **details: JSON) -> ProcessorError:
    """Return an error whose message starts with the URL."""
    return ProcessorError(code, f"{url} {message}.", transient=transient, details={"url": str(url), **details})


def _parse_url(url: str, *, base: httpx.URL | None = None) -> httpx.URL:
    """Return a URL without user name and password, which are neither sent nor shown."""
    try:
        target = base.join(url) if base else httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        shown = strip_userinfo(url)
        raise ProcessorError("BAD_URL", f"{shown!r} is not a valid URL: {error}.", details={"url": shown}) from error
    if target.userinfo:
        target = target.copy_with(userinfo=b"")
    if target.scheme not in ("http", "https") or not target.host:
        subject = f"{base} redirects to {target}, which" if base else str(target)
        message = f"{subject} is not an http or https URL with a host."
        raise ProcessorError("BAD_URL", message, details={"url": str(target)})
    return target


def _raise_for_status(response: httpx.Response) -> None:
    status = response.status_code
    if response.is_success:
        return
    details: dict[str, JSON] = {"status_code": status}
    if (seconds := safe_http.parse_retry_after(response.headers)) is not None:
        details["retry_after"] = seconds
    phrase = f" ({response.reason_phrase})" if response.reason_phrase else ""
    is_transient = status >= 500 or status in (408, 425, 429)
    message = f"responded with {status}{phrase}"
    raise _make_error("HTTP_ERROR", response.url, message, transient=is_transient, **details)


async def _read_body(
    response: httpx.Response, max_bytes: int, on_progress: ProgressCallback | None
) -> AsyncIterator[bytes]:
    """Yield the decompressed body in bounded chunks, so that a decompression bomb cannot fill the memory."""
    length = response.headers.get("content-length", "")
    total = int(length) if length.isascii() and length.isdigit() and len(length) < 19 else None
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in _ENCODINGS:
        message = f"sent the unsupported content encoding {encoding!r}"
        raise _make_error("BAD_RESPONSE", response.url, message, encoding=encoding)
    too_large = _make_error("TOO_LARGE", response.url, f"is larger than {format_bytes(max_bytes)}", max_bytes=max_bytes)
    if total is not None and total > max_bytes:
        raise too_large
    decompressor = _Decompressor() if encoding not in ("", "identity") else None
    size, received, reported_at = 0, 0, time.monotonic()
    async for raw in response.aiter_raw(_CHUNK):
        received += len(raw)
        for part in decompressor.feed(raw) if decompressor else (raw,):
            size += len(part)
            if size > max_bytes:
                raise too_large
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
        self._has_started = False

    def feed(self, data: bytes) -> Iterator[bytes]:
        while data:
            if self._inflate.eof:
                self._inflate = zlib.decompressobj(wbits=47)
            self._has_started = True
            yield self._inflate.decompress(data, _CHUNK)
            data = self._inflate.unconsumed_tail or self._inflate.unused_data

    @property
    def is_complete(self) -> bool:
        return self._inflate.eof or not self._has_started


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
    try:
        yield
    except safe_http.AddressRejected as rejected:
        raise ProcessorError(
            "ADDRESS_REJECTED",
            f"{rejected}. Allow the host in `processors.session.allowed_private_hosts` if it is trusted.",
            details={"host": rejected.host, "address": rejected.address, "reason": rejected.reason},
        ) from rejected
    except (httpcore.TimeoutException, httpx.TimeoutException) as error:
        problem = "did not accept a connection" if isinstance(error, httpcore.ConnectTimeout) else "stopped responding"
        details = {"url": str(url), "host": host}
        raise ProcessorError("FETCH_TIMEOUT", f"{host} {problem} in time.", transient=True, details=details) from error
    except httpx.InvalidURL as error:  # httpx parses the target of a redirect even if it does not follow it
        raise _make_error("BAD_URL", url, f"redirects to an invalid URL: {error}", host=host) from error
    except zlib.error as error:
        raise _make_error("BAD_RESPONSE", url, f"could not be decompressed: {error}", host=host) from error
    except (httpx.TransportError, httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError) as error:
        reason, sentence, transient = safe_http.describe_connection_error(error)
        message = f"could not be fetched: {sentence.format(host=host)}"
        raise _make_error("NETWORK_ERROR", url, message, transient=transient, host=host, reason=reason) from error
