"""api: an answer of Server-Sent Events that does not end by itself, and all of them that are open in this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from jobledger.api.auth.permissions import wait_until_signed_out

SEND_TIMEOUT_SECONDS: Final = 10.0
"""How long a client may take none of what it is sent."""
HIDDEN_EVENTS_PER_SECOND: Final = 20_000
"""Events of the past that all streams together may pass over because their clients may not see or did not want them."""
MAX_PAUSE_SECONDS: Final = 10.0
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_END: Final[Message] = {"type": "http.response.body", "body": b"", "more_body": False}


class Throttle:
    """Spreads work of many streams over time: all together do at most `per_second`, in the order in which they ask."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._free_at = 0.0

    async def wait(self, amount: int) -> None:
        """Wait until what was done before, and this, is within the rate."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + amount / self._per_second
        await asyncio.sleep(min(self._free_at - now, MAX_PAUSE_SECONDS))


class LiveStreams:
    """The streams of this process that are open."""

    def __init__(self) -> None:
        self.history_throttle = Throttle(HIDDEN_EVENTS_PER_SECOND)
        self._open: set[asyncio.Task[None]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    def add(self, writing: asyncio.Task[None]) -> None:
        """Have a stream ended with the others, or at once if that is over."""
        self._open.add(writing)
        writing.add_done_callback(self._open.discard)
        if self._closed:
            writing.cancel()

    def close(self) -> None:
        """End them all, because the process ends: they never would by themselves."""
        self._closed = True
        for writing in self._open:
            writing.cancel()


class _ClientNotReading(Exception):
    """The client takes nothing of what it is sent."""


class EventStreamResponse:
    """An answer that does not end. A client that goes away ends it, and one that does not read is cut.

    It also ends when the client's credential is revoked or expires.
    """

    def __init__(self, blocks: AsyncGenerator[bytes, None], streams: LiveStreams) -> None:
        self._blocks = blocks
        self._streams = streams

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        if scope["method"] == "HEAD":
            await self._blocks.aclose()
            await send(_END)
            return
        writing = asyncio.create_task(self._write(send), name="live")
        self._streams.add(writing)
        gone = asyncio.create_task(_gone(receive), name="live-gone")
        signed_out = asyncio.create_task(wait_until_signed_out(scope), name="live-signed-out")
        try:
            await asyncio.wait({writing, gone, signed_out}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done() and not writing.cancelled() and isinstance(writing.exception(), _ClientNotReading):
                # An ordinary close would wait for the client to take what it does not read.
                abort: Callable[[], None] = scope["state"]["abort"]
                abort()
                await gone
                return
        finally:
            writing.cancel()
            gone.cancel()
            signed_out.cancel()
            await asyncio.gather(writing, gone, signed_out, return_exceptions=True)
        if not writing.cancelled():
            writing.result()
        await send(_END)

    async def _write(self, send: Send) -> None:
        async with aclosing(self._blocks) as blocks:
            async for block in blocks:
                try:
                    async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                        await send({"type": "http.response.body", "body": block, "more_body": True})
                except TimeoutError:
                    raise _ClientNotReading from None


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
