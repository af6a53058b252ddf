"""api: sending what is too large to hold in memory, and the headers that say what it is and what it is called."""

from __future__ import annotations

import asyncio
import re
import unicodedata
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Final
from urllib.parse import quote

import structlog
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jobledger.api.auth.permissions import wait_until_signed_out
from jobledger.ledger.domain.errors import FileLost, LedgerUnavailable

_log = structlog.get_logger()
_MEDIA_TYPE: Final = re.compile(r"""[\w!#$&^.+-]+/[\w!#$&^.+-]+(\s*;\s*[\w.-]+=([\w.+-]+|"[\w .+/-]*"))*""", re.ASCII)
_NOT_PLAIN: Final = re.compile(r"[^A-Za-z0-9 ._()+,=@-]")


async def _nothing() -> None:
    """Nothing has to be given back."""


class CloseableStreamingResponse(StreamingResponse):
    """Content that is made while it is sent, no faster than the client takes it.

    When the client goes away no more of it is made. When it cannot be made to its end, the connection is closed before
    the end, so that the client knows. So it is when the client's credential is revoked or expires. `close` is called in
    every case.
    """

    def __init__(
        self,
        content: AsyncGenerator[bytes, None],
        status: int,
        headers: Mapping[str, str],
        *,
        on_close: Callable[[], Awaitable[None]] = _nothing,
    ) -> None:
        super().__init__(content, status, headers)
        self._content = content
        self._close = on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._send_while_signed_in(scope, receive, send)
        except* (FileLost, LedgerUnavailable) as errors:
            # The answer has begun and an envelope is of no use; the server cuts off what was not brought to its end.
            _log.error("response aborted", path=scope["path"], error=str(errors.exceptions[0]))
        finally:
            await self._content.aclose()
            await self._close()

    async def _send_while_signed_in(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(super().__call__(scope, receive, send), name="download")
        signed_out = asyncio.create_task(wait_until_signed_out(scope, allow_renewal=True), name="download-signed-out")
        try:
            await asyncio.wait({sending, signed_out}, return_when=asyncio.FIRST_COMPLETED)
            if sending.done():
                return sending.result()
            abort: Callable[[], None] = scope["state"]["abort"]
            abort()  # an ordinary close would wait for the client to take what it was sent
        finally:
            sending.cancel()
            signed_out.cancel()
            await asyncio.gather(sending, signed_out, return_exceptions=True)


def content_type(media_type: str) -> str:
    """Return a media type as a header: text with its charset, and what is no media type as mere bytes."""
    if not _MEDIA_TYPE.fullmatch(media_type):
        return "application/octet-stream"
    if media_type.lower().startswith("text/") and "charset=" not in media_type.lower():
        return f"{media_type}; charset=utf-8"
    return media_type


def content_disposition(name: str, *, attachment: bool) -> str:
    """Return the header for a file of this name, whatever is in it (RFC 6266).

    Clients that know no `filename*` get a name in plain letters.
    """
    kind = "attachment" if attachment else "inline"
    letters = "".join(letter for letter in unicodedata.normalize("NFKD", name) if not unicodedata.combining(letter))
    plain = _NOT_PLAIN.sub("_", letters)
    if plain == name:
        return f'{kind}; filename="{plain}"'
    return f"{kind}; filename=\"{plain}\"; filename*=UTF-8''{quote(name, safe='')}"
