"""api: bound the memory that all requests in progress use for their bodies together, and so for large answers."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobledger.api.http.errors import ApiError, error_response

_LARGE_BYTES: Final = 64 * 1024
"""As much of an answer as a connection holds before it waits for its client."""


class MemoryBudget:
    """The memory that all requests in progress may use for their bodies, in bytes. An estimate for each is reserved."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.reserved = 0

    def reserve(self, size: int, *, enforce_limit: bool = True) -> None:
        """Reserve memory.

        Raises:
            ApiError: 503, when the requests in progress leave less.
        """
        if enforce_limit and self.reserved + size > self.limit:
            message = "The server processes as many large requests as its memory allows. Send the request again later."
            raise ApiError(503, "server_busy", message, retry_after_seconds=2)
        self.reserved += size

    def release(self, size: int) -> None:
        """Give back what was reserved."""
        self.reserved -= size


class MemoryReservation:
    """What one request has reserved of the budget."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.size = 0

    def add(self, size: int, *, enforce_limit: bool = True) -> None:
        """Reserve more.

        Raises:
            ApiError: 503, as `MemoryBudget.reserve`.
        """
        self._budget.reserve(size, enforce_limit=enforce_limit)
        self.size += size

    def release(self) -> None:
        """Give everything back."""
        self._budget.release(self.size)
        self.size = 0


class MemoryLimitMiddleware:
    """Middleware: releases the memory that a request has reserved when its response has been sent.

    A large answer that is sent in one piece is in memory until its client has read it. All of them together may use as
    much memory as the bodies of requests, but not the same: slow readers keep nobody from sending. An answer that says
    what was done is never refused.
    """

    def __init__(self, app: ASGIApp, budget: MemoryBudget) -> None:
        self._app = app
        self._budget = budget
        self._answers = MemoryBudget(budget.limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reservation = scope["memory_reservation"] = MemoryReservation(self._budget)
        answer = MemoryReservation(self._answers)
        begin: Message | None = None

        async def send_reserved(message: Message) -> None:
            nonlocal begin
            if message["type"] == "http.response.start" and _length(message) > _LARGE_BYTES:
                begin = message  # sent with the body, if there is memory for that
                return
            if begin is not None:
                begun, begin = begin, None
                if not message.get("more_body", False):
                    try:
                        answer.add(len(message.get("body", b"")), enforce_limit=scope["method"] in ("GET", "HEAD"))
                    except ApiError as error:
                        await error_response(error)(scope, receive, send)
                        return
                await send(begun)
            await send(message)

        try:
            await self._app(scope, receive, send_reserved)
            if answer.size:
                reservation.release()
                drained: Callable[[], Awaitable[None]] = scope["state"]["drained"]
                with suppress(CancelledError):  # the process ends, and this request is at its end
                    await drained()
        finally:
            reservation.release()
            answer.release()


def _length(start: Message) -> int:
    """Return what a response says is its length, 0 if nothing."""
    for name, value in start["headers"]:
        if name == b"content-length":
            return int(value)
    return 0
