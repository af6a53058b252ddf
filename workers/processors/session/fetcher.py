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

A cut or damaged body is an error, because a part of a recording or of slides can be unusable without a sign of it, and
the next attempt may get all of it. `allow_partial` returns what was received instead, as browsers do for pages.
"""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import httpcore
import httpx

from jobledger.ledger.net.url_policy import AllowedHosts, strip_userinfo
from jobledger.workers import safe_http
from jobledger.workers.processor import JSON, ProcessorError
from jobledger.workers.processors.session.charsets import parse_content_type
from jobledger.workers.processors.session.content_encodings import (
    ACCEPT_ENCODING,
    BodyTooLarge,
    ContentDecoder,
    DamagedBody,
    UnsupportedEncoding,
)
from jobledger.workers.processors.session.host_limits import acquire_host_slot, get_host_lock_directory
from jobledger.workers.processors.session.partial_file import PartialFile
from jobledger.workers.processors.session.settings import SessionSettings

ProgressCallback = Callable[[int, int | None], Awaitable[None]]
"""Called with the number of bytes received, and the total if the server sent it."""

ErrorPageDescriber = Callable[[httpx.Headers, bytes], str | None]

PROGRESS_INTERVAL_SECONDS = 1.0
_CHUNK = 64 * 1024
_MAX_ERROR_PAGE_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class FetchResult:
    """A downloaded response.

    Attributes:
        url: The URL after redirects.
        content_type: The `Content-Type` header.
        size: Size of the decompressed body in bytes.
        seconds: Duration of the download.
        body: The body. Empty if a file was written.
        error: Why the body is not complete, or None if it is.
        redirects: Number of redirects that were followed.
        refresh: The `Refresh` header, with which some servers redirect.
        endpoint: From where the response comes, after redirects.
    """

    url: str
    content_type: str
    size: int
    seconds: float
    body: bytes = b""
    error: ProcessorError | None = None
    redirects: int = 0
    refresh: str = ""
    endpoint: safe_http.Endpoint | None = None

    @property
    def media_type(self) -> str:
        return parse_content_type(self.content_type)[0]

    @property
    def is_complete(self) -> bool:
        return self.error is None


@dataclass(slots=True)
class ByteBudget:
    """Number of bytes that several requests may transfer together."""

    remaining: int

    def take(self, size: int, url: str) -> None:
        """Count bytes of a request to `url`.

        Raises:
            ProcessorError: TOO_LARGE, if fewer bytes remain. Then none remain for other requests.
        """
        self.remaining -= size
        if self.remaining < 0:
            message = f"{url} was not fetched completely. It and other downloads are larger than allowed together."
            raise ProcessorError("TOO_LARGE", message, details={"url": url})


@dataclass(frozen=True, slots=True)
class Request:
    """What to send. A redirect turns it into a GET without a body, as in browsers."""

    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None


class Fetcher:
    """Downloads URLs within the limits of the settings. `resolve` resolves host names."""

    def __init__(
        self,
        settings: SessionSettings,
        *,
        resolve: safe_http.Resolver = safe_http.resolve_host,
        lock_directory: Path | None = None,
        exempt: safe_http.Endpoint | None = None,
    ) -> None:
        self._settings = settings
        self._resolve = resolve
        self._lock_directory = lock_directory or get_host_lock_directory()
        self._network = safe_http.CheckedNetworkBackend(AllowedHosts(settings.allowed_private_hosts), resolve, exempt)

    def restrict_to(self, endpoint: safe_http.Endpoint | None) -> Fetcher:
        """Return a fetcher for requests of untrusted code, such as the scripts of a page.

        Of all non-public addresses, it reaches only `endpoint`. The check applies to the address of each connection, so
        neither redirects nor a host name that changes its address lead to the services in `allowed_private_hosts`.
        """
        settings = self._settings.model_copy(update={"allowed_private_hosts": []})
        return Fetcher(settings, resolve=self._resolve, lock_directory=self._lock_directory, exempt=endpoint)

    async def fetch(
        self,
        url: str,
        *,
        max_bytes: int,
        timeout_seconds: float,
        accept: str = "*/*",
        target: PartialFile | None = None,
        check_media_type: Callable[[str], None] = lambda media_type: None,
        allow_partial: bool = False,
        on_progress: ProgressCallback | None = None,
        max_redirects: int | None = None,
        request: Request = Request(),
        describe_error_page: ErrorPageDescriber | None = None,
        budget: ByteBudget | None = None,
    ) -> FetchResult:
        """Download `url` and follow redirects.

        At most `max_fetches_per_host` downloads from one host run at a time. Waiting for a slot does not count towards
        `timeout_seconds`.

        Args:
            url: An http or https URL.
            max_bytes: Maximum size of the decompressed body.
            timeout_seconds: Timeout for the whole download with redirects.
            accept: The `Accept` header.
            target: File to write the body to, or to continue. Default: keep it in memory.
            check_media_type: Called with the media type before the body is read. May raise to reject it.
            allow_partial: Return what was received of a body that is cut or damaged. See `FetchResult.error`.
            on_progress: Called about once per second.
            max_redirects: Maximum number of redirects. Default: that of the settings.
            request: Method, further headers and body of the request.
            describe_error_page: Called with the headers and the beginning of the body of an error response. Returns
                what the page says more than the status, or None. The error's message contains it.
            budget: Counts the decompressed body, also of a download that fails.

        Raises:
            ProcessorError: With one of the codes in the module's docstring.
        """
        started = time.monotonic()
        start = _parse_url(url)
        try:
            async with (
                asyncio.timeout(timeout_seconds) as deadline,
                self._open_client(accept, target.build_headers() if target else {}) as client,
                self._open_response(client, start, deadline, request, max_redirects) as (response, redirects),
            ):
                endpoint = safe_http.get_endpoint(response)
                if not response.is_success:
                    raise await _make_status_error(response, describe_error_page)
                offset = target.begin(response) if target else 0
                if offset is None:
                    message = "sent another part of the file than requested"
                    raise _make_error("NETWORK_ERROR", start, message, transient=True, reason="protocol")
                content_type = target.content_type if target else response.headers.get("content-type", "")
                check_media_type(parse_content_type(content_type)[0])
                with await _open_file(target, offset) as file:
                    size, partial_error = offset, None
                    try:
                        with _translate_errors(response.url):
                            async for part in _read_body(response, max_bytes, on_progress, offset):
                                size += file.write(part)
                                if budget is not None:
                                    budget.take(len(part), str(response.url))
                    except ProcessorError as error:
                        if not (allow_partial and size and error.code in ("NETWORK_ERROR", "BAD_RESPONSE")):
                            raise
                        partial_error = error
                    body = file.getvalue() if isinstance(file, io.BytesIO) else b""
                if target and target.total is not None and size != target.total and partial_error is None:
                    raise _make_error(
                        "NETWORK_ERROR", start, "sent only a part of the file", transient=True, reason="protocol"
                    )
        except TimeoutError:
            message = f"was not fetched within {timeout_seconds:g} seconds"
            raise _make_error("FETCH_TIMEOUT", start, message, transient=True, seconds=timeout_seconds) from None
        seconds = time.monotonic() - started
        refresh = response.headers.get("refresh", "")
        return FetchResult(
            url=str(response.url),
            content_type=content_type,
            size=size,
            seconds=seconds,
            body=body,
            error=partial_error,
            redirects=redirects,
            refresh=refresh,
            endpoint=endpoint,
        )

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

    def _open_client(self, accept: str, further_headers: Mapping[str, str]) -> httpx.AsyncClient:
        timeout = httpx.Timeout(self._settings.read_timeout_seconds, connect=self._settings.connect_timeout_seconds)
        headers = {"User-Agent": self._settings.user_agent, "Accept": accept, "Accept-Encoding": ACCEPT_ENCODING}
        headers |= further_headers
        # trust_env=False: a proxy would bypass the address check, and .netrc would add passwords.
        return httpx.AsyncClient(
            transport=safe_http.CheckedTransport(self._network), timeout=timeout, headers=headers, trust_env=False
        )

    @asynccontextmanager
    async def _open_response(
        self,
        client: httpx.AsyncClient,
        start: httpx.URL,
        deadline: asyncio.Timeout,
        request: Request,
        max_redirects: int | None,
    ) -> AsyncIterator[tuple[httpx.Response, int]]:
        """Follow redirects to the response. Yield it with the number of redirects."""
        target = start
        for redirects in range((self._settings.max_redirects if max_redirects is None else max_redirects) + 1):
            with _translate_errors(target):
                async with (
                    self._host_slot(target.netloc.decode(), deadline),
                    client.stream(
                        request.method, target, headers=dict(request.headers), content=request.body
                    ) as response,
                ):
                    if not response.has_redirect_location:
                        yield response, redirects
                        return
                    target = _parse_url(response.headers["location"], base=target)
                    request = Request()
        raise make_redirect_error(str(start), str(target), self._settings.max_redirects)

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


def make_redirect_error(start: str, last: str, max_redirects: int) -> ProcessorError:
    """Return the error for a URL that redirects too often."""
    message = f"{start} redirects more than {max_redirects} times."
    return ProcessorError("TOO_MANY_REDIRECTS", message, details={"url": start, "last": last})


async def _make_status_error(
    response: httpx.Response, describe_error_page: ErrorPageDescriber | None
) -> ProcessorError:
    """Return the error for a response with an error status."""
    status = response.status_code
    details: dict[str, JSON] = {"status_code": status}
    if (seconds := safe_http.parse_retry_after(response.headers)) is not None:
        details["retry_after"] = seconds
    phrase = f" ({response.reason_phrase})" if response.reason_phrase else ""
    is_transient = status >= 500 or status in (408, 425, 429)
    message = f"responded with {status}{phrase}"
    if describe_error_page and (text := describe_error_page(response.headers, await _read_beginning(response))):
        message += f". {text}"
    return _make_error("HTTP_ERROR", response.url, message, transient=is_transient, **details)


async def _read_beginning(response: httpx.Response) -> bytes:
    """Return the beginning of a body of which only the status matters. Errors end it."""
    body = bytearray()
    with suppress(ProcessorError, httpx.HTTPError, OSError, httpcore.NetworkError, httpcore.ProtocolError, DamagedBody):
        async for part in _read_body(response, _MAX_ERROR_PAGE_BYTES, None):
            body += part
    return bytes(body)


async def _open_file(target: PartialFile | None, offset: int) -> BinaryIO:
    """Open the file to write, or a buffer in memory. A file keeps its first `offset` bytes."""
    return io.BytesIO() if target is None else await asyncio.to_thread(target.path.open, "ab" if offset else "wb")


async def _read_body(
    response: httpx.Response, max_bytes: int, on_progress: ProgressCallback | None, offset: int = 0
) -> AsyncIterator[bytes]:
    """Yield the decompressed body in bounded chunks, so that a decompression bomb cannot fill the memory.

    `offset` is the number of bytes that an earlier response has delivered. They count towards `max_bytes`.
    """
    length = response.headers.get("content-length", "")
    total = offset + int(length) if length.isascii() and length.isdigit() and len(length) < 19 else None
    try:
        decoder = ContentDecoder(response.headers.get("content-encoding", ""), max_bytes - offset)
    except UnsupportedEncoding as error:
        message = f"sent the content encoding {str(error)!r}. Supported are {ACCEPT_ENCODING}"
        raise _make_error("BAD_RESPONSE", response.url, message, encoding=str(error)) from None
    too_large = _make_error("TOO_LARGE", response.url, f"is larger than {format_bytes(max_bytes)}", max_bytes=max_bytes)
    if total is not None and total > max_bytes:
        raise too_large
    received, reported_at = offset, time.monotonic()
    try:
        # Without a chunk size, because httpx loses an incomplete chunk in front of an error.
        async for raw in response.aiter_raw():
            received += len(raw)
            for part in decoder.feed(raw):
                yield part
            if on_progress and time.monotonic() - reported_at >= PROGRESS_INTERVAL_SECONDS:
                reported_at = time.monotonic()
                await on_progress(received, total)
    except BodyTooLarge:
        raise too_large from None
    except (httpcore.ProtocolError, httpcore.ReadError):
        # Servers send a wrong Content-Length. The compressed data shows that nothing is missing.
        if not (decoder.is_compressed and received and decoder.is_complete):
            raise
    if not decoder.is_complete:
        raise httpcore.RemoteProtocolError("the compressed body ends early")


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
    except DamagedBody as error:
        raise _make_error("BAD_RESPONSE", url, f"could not be decompressed: {error}", host=host) from error
    except (httpx.TransportError, httpcore.NetworkError, httpcore.ProtocolError, ssl.SSLError) as error:
        reason, sentence, transient = safe_http.describe_connection_error(error)
        message = f"could not be fetched: {sentence.format(host=host)}"
        raise _make_error("NETWORK_ERROR", url, message, transient=transient, host=host, reason=reason) from error
