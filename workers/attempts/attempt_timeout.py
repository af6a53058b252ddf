"""The timeout of an attempt. It covers the processor's work, and not waits for the database or the result store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

PAUSE_AFTER_SECONDS: Final = 1.0
"""A wait for the database or the store pauses the timeout after this time, until the response arrives.

Shorter waits count as work, so that a processor that only sends requests reaches its timeout as well.
"""


class AttemptTimeout:
    """A timeout that can be started once and paused. Use it on one event loop only.

    Args:
        seconds: The time limit.
        on_expired: Called once when the time is used up.
    """

    def __init__(self, seconds: float, on_expired: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._remaining = seconds
        self.on_expired = on_expired
        self._pauses = 1
        self._resumed_at = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Start, because the work starts."""
        self._resume()

    def stop(self) -> None:
        """Stop permanently, because the work has ended."""
        self._pause()  # no call of _resume() follows, so the number of pauses never returns to 0

    @asynccontextmanager
    async def pause_while_waiting(self) -> AsyncIterator[None]:
        """Wait for the database or the store in the block. If that takes long, the timeout is paused."""
        paused = False

        def pause() -> None:
            nonlocal paused
            paused = True
            self._pause()

        timer = self._loop.call_later(PAUSE_AFTER_SECONDS, pause)
        try:
            yield
        finally:
            timer.cancel()
            if paused:
                self._resume()

    def _pause(self) -> None:
        self._pauses += 1
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            self._remaining -= self._loop.time() - self._resumed_at

    def _resume(self) -> None:
        self._pauses -= 1
        if self._pauses == 0:
            self._resumed_at = self._loop.time()
            self._timer = self._loop.call_later(max(0.0, self._remaining), self.on_expired)
