"""Pace repeated work that costs little more for a hundred items than for one, such as reading what has changed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

PACE_SECONDS: Final = 0.02
BURST: Final = 5


class Pacer:
    """Lets up to `BURST` turns start at once, and then one every `PACE_SECONDS` (a token bucket).

    Rare work is not delayed. Frequent work is done in larger portions, each delayed by at most `PACE_SECONDS`. `hurry`
    ends a delay.

    Args:
        is_urgent: Returns whether the next turn may start at once in any case.
    """

    def __init__(self, is_urgent: Callable[[], bool] = lambda: False) -> None:
        self._is_urgent = is_urgent
        self._hurry = asyncio.Event()
        self._next_at = 0.0
        """When the next turn may start, on the event loop's clock. The earlier it is, the more turns are saved up."""

    async def wait(self) -> None:
        """Wait until the next turn may start."""
        now = asyncio.get_running_loop().time()
        start_at = max(self._next_at, now - (BURST - 1) * PACE_SECONDS)
        if start_at > now:
            if self._is_urgent():
                start_at = now
            else:
                await self._sleep(start_at - now)
        self._next_at = start_at + PACE_SECONDS

    async def _sleep(self, seconds: float) -> None:
        self._hurry.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    def hurry(self) -> None:
        """Let a turn that waits start now."""
        self._hurry.set()
