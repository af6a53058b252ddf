"""Wait for a condition that has no notification."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

DEADLINE_SECONDS = 60.0
"""For what takes a second at most on an idle machine. A machine with much other work may take many times as long."""


async def poll_until(
    condition: Callable[[], object], description: str = "the condition is true", *, seconds: float = DEADLINE_SECONDS
) -> None:
    """Poll a condition until it is true.

    Args:
        condition: A function, or a coroutine function such as a query. Its result is tested for truth.
        description: What is true afterwards. It is in the message of the AssertionError that a timeout raises.
        seconds: The timeout.
    """
    try:
        async with asyncio.timeout(seconds):
            while True:
                result = condition()
                if await result if isinstance(result, Awaitable) else result:
                    return
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise AssertionError(f"timeout after {seconds} s: {description}") from None
