"""Advance the clock of an event loop, so that a test of a timeout neither waits nor depends on the machine's speed."""

from __future__ import annotations

import asyncio


def advance_clock(seconds: float) -> None:
    """Advance the clock of the running event loop. Timers that are due within `seconds` expire at once."""
    loop = asyncio.get_running_loop()
    read_clock = loop.time
    loop.time = lambda: read_clock() + seconds  # type: ignore[method-assign]
