"""workers: the time limit of an attempt. It covers the processor's work, not waits for the database or the store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

PAUSE_AFTER_SECONDS: Final = 1.0
"""How long a request to the database or the store may take before the clock stops. It goes on when the answer is there.

Shorter requests count as work, so a processor that does nothing but send requests comes to its time limit, too.
"""


class AttemptTimeout:
    """A clock that can be paused, and calls `expired` once when the time is used up. Use it within one event loop."""

    def __init__(self, seconds: float, on_expired: Callable[[], None]) -> None:
        self._loop = asyncio.get_running_loop()
        self._left = seconds
        self._expired = on_expired
        self._pauses = 0
        self._resumed_at = self._loop.time()
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(seconds, on_expired)

    def stop(self) -> None:
        """Stop for good: the work is done."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pauses += 1

    @asynccontextmanager
    async def pause_while_waiting(self) -> AsyncIterator[None]:
        """Within the block the worker waits for the database or the store. If that takes long, the clock is paused."""
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
            self._left -= self._loop.time() - self._resumed_at

    def _resume(self) -> None:
        self._pauses -= 1
        if self._pauses == 0:
            self._resumed_at = self._loop.time()
            self._timer = self._loop.call_later(max(0.0, self._left), self._expired)
