"""Streaming responses, and the headers Content-Type and Content-Disposition."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from typing import Final
from urllib.parse import quote

import structlog
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jobledger.api.http.credential_expiry import wait_until_signed_out
from jobledger.ledger.domain.errors import FileLost, LedgerUnavailable

_log = structlog.get_logger()
_MEDIA_TYPE: Final = re.compile(r"""[\w!#$&^.+-]+/[\w!#$&^.+-]+(\s*;\s*[\w.-]+=([\w.+-]+|"[\w .+/-]*"))*""", re.ASCII)
_NOT_ASCII_NAME: Final = re.compile(r"[^A-Za-z0-9 ._()+,=@-]")


async def run_until_first(*awaitables: Awaitable[object]) -> Sequence[asyncio.Future[object]]:
    """Run awaitables concurrently until the first has ended, then cancel the others. Return them as ended futures."""
    futures = [asyncio.ensure_future(awaitable) for awaitable in awaitables]
    try:
        await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for future in futures:
            future.cancel()
        await asyncio.gather(*futures, return_exceptions=True)
    return futures


async def wait_for_disconnect(receive: Receive) -> None:
    """Return when the client has disconnected."""
    while (await receive())["type"] != "http.disconnect":
        pass


class CloseableStreamingResponse(StreamingResponse):
    """A response whose content is generated while it is sent, no faster than the client reads.

    Generation stops when the client disconnects. If the content cannot be completed, or the client's credential is
    revoked or expires, the connection is closed before the end, so that the client detects it. `on_close` is called in
    every case.
    """

    def __init__(
        self,
        content: AsyncGenerator[bytes, None],
        status: int,
        headers: Mapping[str, str],
        *,
        on_close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(content, status, headers)
        self._content = content
        self._on_close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send_while_authenticated(scope, receive, send)
        except* (FileLost, LedgerUnavailable) as errors:
            # The headers were sent, so no error response is possible. The server aborts incomplete responses.
            _log.error("response aborted", path=scope["path"], error=str(errors.exceptions[0]))
        finally:
            await self._content.aclose()
            if self._on_close is not None:
                await self._on_close()

    async def _send_while_authenticated(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending, _ = await run_until_first(
            super().__call__(scope, receive, send), wait_until_signed_out(scope, allow_renewal=True)
        )
        if sending.cancelled():
            scope["state"]["abort"]()  # an ordinary close would wait for the client to read the pending data
        else:
            sending.result()


def format_content_type(media_type: str) -> str:
    """Return the Content-Type of a media type: with a charset for text, application/octet-stream if malformed."""
    if not _MEDIA_TYPE.fullmatch(media_type):
        return "application/octet-stream"
    if media_type.lower().startswith("text/") and "charset=" not in media_type.lower():
        return f"{media_type}; charset=utf-8"
    return media_type


def format_content_disposition(name: str, *, attachment: bool) -> str:
    """Return the header for a file name with any characters (RFC 6266).

    Clients without support of `filename*` get an ASCII name.
    """
    disposition = "attachment" if attachment else "inline"
    without_accents = "".join(char for char in unicodedata.normalize("NFKD", name) if not unicodedata.combining(char))
    ascii_name = _NOT_ASCII_NAME.sub("_", without_accents)
    if ascii_name == name:
        return f'{disposition}; filename="{ascii_name}"'
    return f"{disposition}; filename=\"{ascii_name}\"; filename*=UTF-8''{quote(name, safe='')}"
