"""api: bound the memory that all requests in progress use for their bodies together."""

from __future__ import annotations

from starlette.types import ASGIApp, Receive, Scope, Send

from api.errors import ApiError


class MemoryBudget:
    """The memory that all requests in progress may use for their bodies, in bytes. An estimate for each is reserved."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self.reserved = 0

    def reserve(self, size: int) -> None:
        """Reserve memory.

        Raises:
            ApiError: 503, when the requests in progress leave less.
        """
        if self.reserved + size > self._limit:
            message = "The server processes as many large requests as its memory allows. Send the request again later."
            raise ApiError(503, "server_busy", message, retry_after_seconds=2)
        self.reserved += size

    def release(self, size: int) -> None:
        """Give back what was reserved."""
        self.reserved -= size


class Reservation:
    """What one request has reserved of the budget."""

    def __init__(self, budget: MemoryBudget) -> None:
        self._budget = budget
        self._size = 0

    def add(self, size: int) -> None:
        """Reserve more.

        Raises:
            ApiError: 503, as `MemoryBudget.reserve`.
        """
        self._budget.reserve(size)
        self._size += size

    def release(self) -> None:
        """Give everything back."""
        self._budget.release(self._size)
        self._size = 0


class MemoryLimited:
    """Middleware: releases the memory that a request has reserved when its response has been sent."""

    def __init__(self, app: ASGIApp, budget: MemoryBudget) -> None:
        self._app = app
        self._budget = budget

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        reservation = scope["memory"] = Reservation(self._budget)
        try:
            await self._app(scope, receive, send)
        finally:
            reservation.release()
