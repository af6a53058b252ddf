"""Limit the memory for the bodies of all requests in progress, and for large responses."""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobledger.api.http.errors import ApiError, build_error_response

_LARGE_BYTES: Final = 64 * 1024
"""How much of a response a connection buffers before it waits for the client."""


@dataclass(slots=True)
class MemoryBudget:
    """The memory in bytes that the bodies of all requests in progress may use. Each request reserves an estimate."""

    limit: int
    reserved: int = 0


class MemoryReservation:
    """The reserved memory of one request."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self.size = 0

    def add(self, size: int, *, enforce_limit: bool = True) -> None:
        """Reserve more memory.

        Raises:
            ApiError: 503, too little memory is left.
        """
        if enforce_limit and self._budget.reserved + size > self._budget.limit:
            message = "The requests in progress use all memory allowed (api.request_memory_mb). Retry in a moment."
            raise ApiError(503, "server_busy", message, retry_after_seconds=2)
        self._budget.reserved += size
        self.size += size

    def release(self) -> None:
        """Release all reserved memory."""
        self._budget.reserved -= self.size
        self.size = 0


class MemoryLimitMiddleware:
    """Releases the memory that a request has reserved when its response has been sent.

    A large response that is sent in one piece stays in memory until the client has read it. Large responses have a
    budget of their own with the same limit, so that slow readers do not block submissions. The response to a change is
    never rejected, because it reports what was done (decision 69).
    """

    def __init__(self, app: ASGIApp, budget: MemoryBudget) -> None:
        self._app = app
        self._budget = budget
        self._response_budget = MemoryBudget(budget.limit)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reservation = scope["memory_reservation"] = MemoryReservation(self._budget)
        response_reservation = MemoryReservation(self._response_budget)
        held_start: Message | None = None

        async def send_reserved(message: Message) -> None:
            nonlocal held_start
            if message["type"] == "http.response.start" and _get_content_length(message) > _LARGE_BYTES:
                held_start = message  # sent with the body, if memory is left
                return
            if held_start is not None:
                start, held_start = held_start, None
                if not message.get("more_body", False):
                    try:
                        response_reservation.add(
                            len(message.get("body", b"")), enforce_limit=scope["method"] in ("GET", "HEAD")
                        )
                    except ApiError as error:
                        await build_error_response(error)(scope, receive, send)
                        return
                await send(start)
            await send(message)

        try:
            await self._app(scope, receive, send_reserved)
            if response_reservation.size:
                reservation.release()
                drained: Callable[[], Awaitable[None]] = scope["state"]["drained"]
                with suppress(CancelledError):  # the process is shutting down, and the response is complete
                    await drained()
        finally:
            reservation.release()
            response_reservation.release()


def _get_content_length(start: Message) -> int:
    """Return the Content-Length of a response, 0 without the header."""
    return int(dict(start["headers"]).get(b"content-length", 0))
