"""Responses with Server-Sent Events, and the registry of open streams of this process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Final

from starlette.types import Message, Receive, Scope, Send

from jobledger.api.http.credential_expiry import wait_until_signed_out
from jobledger.api.http.streaming import run_until_first, wait_for_disconnect

SEND_TIMEOUT_SECONDS: Final = 10.0
"""How long a client may read nothing before the stream is aborted."""
HIDDEN_EVENTS_PER_SECOND: Final = 20_000
"""Rate of past events that all streams together may skip because the clients may not read or did not request them."""
MAX_PAUSE_SECONDS: Final = 10.0
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),
]
_END: Final[Message] = {"type": "http.response.body", "body": b"", "more_body": False}


class Throttle:
    """Limits the work of all streams together to `per_second`. Calls wait in their order."""

    def __init__(self, per_second: float) -> None:
        self._per_second = per_second
        self._free_at = 0.0

    async def wait(self, amount: int) -> None:
        """Wait until the work so far plus this amount is within the rate."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(self._free_at, now) + amount / self._per_second
        await asyncio.sleep(min(self._free_at - now, MAX_PAUSE_SECONDS))


class LiveStreams:
    """The open streams of this process."""

    def __init__(self) -> None:
        self.history_throttle = Throttle(HIDDEN_EVENTS_PER_SECOND)
        self._open: set[asyncio.Task[None]] = set()
        self._closed = False

    def __len__(self) -> int:
        return len(self._open)

    def add(self, writer: asyncio.Task[None]) -> None:
        """Register a stream. If close() was called already, end it immediately."""
        self._open.add(writer)
        writer.add_done_callback(self._open.discard)
        if self._closed:
            writer.cancel()

    def close(self) -> None:
        """End all streams, because the process is shutting down."""
        self._closed = True
        for writer in self._open:
            writer.cancel()


class EventStreamResponse:
    """A response that continues until the client disconnects, or its credential is revoked or expires.

    If the client does not read, the connection is aborted.
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
        writer = asyncio.create_task(self._write(send, scope["state"]["abort"]), name="live")
        self._streams.add(writer)
        await run_until_first(writer, wait_for_disconnect(receive), wait_until_signed_out(scope))
        if not writer.cancelled():
            writer.result()
        await send(_END)

    async def _write(self, send: Send, abort: Callable[[], None]) -> None:
        async with aclosing(self._blocks) as blocks:
            async for block in blocks:
                try:
                    async with asyncio.timeout(SEND_TIMEOUT_SECONDS):
                        await send({"type": "http.response.body", "body": block, "more_body": True})
                except TimeoutError:
                    abort()  # an ordinary close would wait for the client to read the pending data
                    await asyncio.Event().wait()  # until the disconnect cancels this task
