"""Pace repeated work that costs little more for a hundred items than for one, such as reading what has changed."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Final

PACE_SECONDS: Final = 0.02
BURST: Final = 5


class Pacer:
    """Lets up to `BURST` turns start at once, and then one every `PACE_SECONDS` (a token bucket).

    Rare work is not delayed. Frequent work is done in larger portions. `hurry` ends a delay.

    Args:
        get_max_delay: Returns by how many seconds the next turn may be delayed. 0: it starts at once.
    """

    def __init__(self, get_max_delay: Callable[[], float] = lambda: PACE_SECONDS) -> None:
        self._get_max_delay = get_max_delay
        self._hurry = asyncio.Event()
        self._last_at = -math.inf
        """When the last turn started, on the event loop's clock. The earlier it is, the more turns are saved up."""

    async def wait(self) -> None:
        """Wait until the next turn may start."""
        loop, delay = asyncio.get_running_loop(), self._get_max_delay()
        earliest_at = loop.time() - (BURST - 1) * PACE_SECONDS
        start_at = max(self._last_at + delay, earliest_at)
        if delay > 0 and start_at > loop.time():
            await self._sleep(start_at - loop.time())
        self._last_at = min(start_at, loop.time())

    async def _sleep(self, seconds: float) -> None:
        self._hurry.clear()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._hurry.wait()

    def hurry(self) -> None:
        """Let a turn that waits start now."""
        self._hurry.set()
