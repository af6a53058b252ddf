"""session: the only door to the web. A GET that is safe to point at an address a stranger typed.

Errors of httpx, httpcore, the resolver and the operating system become a `ProcessorError` here and nowhere else:
    BAD_URL             not an http(s) address with a host
    ADDRESS_REJECTED     it leads to a private, loopback, link-local or otherwise not public address
    NETWORK_ERROR       no such name, refused, reset, cut off, TLS failed; `details.reason` says which
    FETCH_TIMEOUT       the server was too slow
    HTTP_ERROR          it answered 4xx or 5xx; `details.status_code`, `details.retry_after` in seconds if it said so
    TOO_MANY_REDIRECTS  it sent us on more often than allowed
    TOO_LARGE           it sent, or unpacked to, more than allowed
    BAD_RESPONSE        it answered in a way that cannot be read
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
"""Hears how many bytes have come, and of how many if the server said so."""

PROGRESS_INTERVAL_SECONDS = 1.0
_CHUNK = 64 * 1024
_ENCODINGS = {"", "identity", "gzip", "x-gzip", "deflate"}


@dataclass(frozen=True, slots=True)
class FetchResult:
    """What came back. `url` is where the redirects ended; `body` is empty when it went into a file."""

    url: str
    content_type: str
    size: int
    seconds: float
    body: bytes = b""

    @property
    def media_type(self) -> str:
        return self.content_type.partition(";")[0].strip().lower()


class Fetcher:
    """Fetches within the limits of the settings. `resolve` is how names become addresses."""

    def __init__(
        self, settings: SessionSettings, *, resolve: Resolver = resolve_host, lock_directory: Path | None = None
    ) -> None:
        self._settings = settings
        self._turns = lock_directory or host_lock_directory()
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
        """GET `url`, following redirects, into memory or into the file `into`, within `total_seconds`.

        Of one host no more is fetched at a time than `max_fetches_per_host`; waiting for that takes none of the time.
        `check_type` is called with the media type before the body is read and may raise to refuse it.

        Raises:
            ProcessorError: with one of the codes above.
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
        """Connect for the clients of a listening socket, by HTTP `CONNECT`, to allowed addresses. Runs until cancelled.

        Helper programs have no other way to the network. Addresses are checked as for all fetches.
        """
        async with await asyncio.start_server(self._proxied, sock=listener) as server:
            await server.serve_forever()

    async def _proxied(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer), suppress(OSError, httpcore.NetworkError, httpcore.TimeoutException, AddressRejected):
            try:
                async with asyncio.timeout(self._settings.connect_timeout_seconds):
                    head = await reader.readuntil(b"\r\n\r\n")
                method, _, rest = head.decode("latin-1").partition(" ")
                host, _, port = rest.partition(" ")[0].rpartition(":")
                if method != "CONNECT" or not port.isdigit():
                    raise ValueError(method)
                there = await self._network.connect_tcp(
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
                    asyncio.create_task(_upload(reader, there)),
                    asyncio.create_task(_download(there, writer)),
                }
                try:
                    await asyncio.wait(directions, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for direction in directions:
                        direction.cancel()
                    await asyncio.gather(*directions, return_exceptions=True)
            finally:
                await there.aclose()

    @asynccontextmanager
    async def _client(self, accept: str) -> AsyncIterator[httpx.AsyncClient]:
        timeout = httpx.Timeout(self._settings.read_timeout_seconds, connect=self._settings.connect_timeout_seconds)
        headers = {"User-Agent": self._settings.user_agent, "Accept": accept, "Accept-Encoding": "gzip, deflate"}
        # trust_env off: no proxy that connects for us, past the address check, and no passwords from a .netrc.
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
                async with self._turn(target.netloc.decode(), clock), client.stream("GET", target) as response:
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
    async def _turn(self, host: str, clock: asyncio.Timeout) -> AsyncIterator[None]:
        """Wait for our turn at a host with the clock stopped."""
        loop = asyncio.get_running_loop()
        left = (clock.when() or loop.time()) - loop.time()
        clock.reschedule(None)
        async with acquire_host_slot(host, self._settings.max_fetches_per_host, self._turns):
            clock.reschedule(loop.time() + left)
            yield


async def _upload(reader: asyncio.StreamReader, there: httpcore.AsyncNetworkStream) -> None:
    while part := await reader.read(_CHUNK):
        await there.write(part)


async def _download(there: httpcore.AsyncNetworkStream, writer: asyncio.StreamWriter) -> None:
    while part := await there.read(_CHUNK):
        writer.write(part)
        await writer.drain()


def _parse_url(url: str, *, base: httpx.URL | None = None) -> httpx.URL:
    try:
        target = base.join(url) if base else httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        shown = strip_userinfo(url)
        raise ProcessorError("BAD_URL", f"{shown!r} is not a web address: {error}.", details={"url": shown}) from error
    if target.scheme not in ("http", "https") or not target.host:
        sent_on = (
            f"{_without_password(base)} redirects to {_without_password(target)}, which"
            if base
            else _without_password(target)
        )
        raise ProcessorError(
            "BAD_URL",
            f"{sent_on} is not an http or https address with a host.",
            details={"url": _without_password(target)},
        )
    # A password of a redirect is not sent either: it would be a password that the page's author publishes.
    return target.copy_with(userinfo=b"") if target.userinfo else target


def _without_password(url: httpx.URL | str) -> str:
    """The address without a password somebody put into it."""
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
    known = {known.value: f" ({known.phrase})" for known in http.HTTPStatus}
    raise ProcessorError(
        "HTTP_ERROR",
        f"{_without_password(response.url)} answered {status}{known.get(status, '')}.",
        transient=status >= 500 or status in (408, 425, 429),
        details=details,
    )


async def _body(response: httpx.Response, max_bytes: int, on_progress: ProgressCallback | None) -> AsyncIterator[bytes]:
    """The body, unpacked in bounded pieces: a decompression bomb is refused before it can fill the memory."""
    announced = response.headers.get("content-length", "")
    total = int(announced) if announced.isascii() and announced.isdigit() and len(announced) < 19 else None
    encoding = response.headers.get("content-encoding", "").strip().lower()
    if encoding not in _ENCODINGS:
        raise ProcessorError(
            "BAD_RESPONSE",
            f"{_without_password(response.url)} answered in the content encoding {encoding!r}, which "
            f"was not asked for.",
            details={"url": _without_password(response.url), "encoding": encoding},
        )
    if total is not None and total > max_bytes:
        raise _too_large(response, max_bytes)
    packed = encoding not in ("", "identity")
    unpack = _Unpacker() if packed else None
    size, received, told_at = 0, 0, time.monotonic()
    async for raw in response.aiter_raw(_CHUNK):
        received += len(raw)
        for part in unpack.feed(raw) if unpack else (raw,):
            size += len(part)
            if size > max_bytes:
                raise _too_large(response, max_bytes)
            yield part
        if on_progress and time.monotonic() - told_at >= PROGRESS_INTERVAL_SECONDS:
            told_at = time.monotonic()
            await on_progress(received, total)
    if unpack and not unpack.complete:
        raise httpcore.RemoteProtocolError("the compressed body ends early")


class _Unpacker:
    """gzip and zlib, also of several members, never more than one chunk at a time."""

    def __init__(self) -> None:
        self._inflate = zlib.decompressobj(wbits=47)
        self._started = False

    def feed(self, packed: bytes) -> Iterator[bytes]:
        while packed:
            if self._inflate.eof:
                self._inflate = zlib.decompressobj(wbits=47)
            self._started = True
            yield self._inflate.decompress(packed, _CHUNK)
            packed = self._inflate.unconsumed_tail or self._inflate.unused_data

    @property
    def complete(self) -> bool:
        return self._inflate.eof or not self._started


def _too_large(response: httpx.Response, max_bytes: int) -> ProcessorError:
    return ProcessorError(
        "TOO_LARGE",
        f"{_without_password(response.url)} is larger than the {format_bytes(max_bytes)} allowed.",
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
    """A number of bytes for people: `1.5 MB`."""
    for unit, scale in (("GB", 1_000_000_000), ("MB", 1_000_000), ("kB", 1_000)):
        if size >= scale:
            return f"{size / scale:.1f} {unit}"
    return f"{size} bytes"


@contextmanager
def _translate_errors(url: httpx.URL) -> Iterator[None]:
    """What went wrong at `url`, as a `ProcessorError`."""
    host = url.host
    details = {"url": _without_password(url), "host": host}
    try:
        yield
    except AddressRejected as refused:
        raise ProcessorError(
            "ADDRESS_REJECTED",
            f"{refused}; only public addresses are fetched, and those that `processors.session.allowed_private_hosts` "
            "names.",
            details={"host": refused.host, "address": refused.address, "reason": refused.reason},
        ) from refused
    except (httpcore.TimeoutException, httpx.TimeoutException) as error:
        doing = "could not be reached" if isinstance(error, httpcore.ConnectTimeout) else "stopped answering"
        raise ProcessorError("FETCH_TIMEOUT", f"{host} {doing} in time.", transient=True, details=details) from error
    except httpx.InvalidURL as error:  # httpx looks at the target of a redirect, even one it is not to follow
        raise ProcessorError(
            "BAD_URL",
            f"{_without_password(url)} redirects to something that is no web address: {error}.",
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
