"""api: that something has happened, for pages that show everything: one word a second at most, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Final

from jobledger.projections.engine.checkpoint import Checkpoint

MIN_INTERVAL_SECONDS: Final = 1.0
IDLE_INTERVAL_SECONDS: Final = 5.0
MAX_STREAM_SECONDS: Final = 900.0


async def watch_views(checkpoint: Checkpoint) -> AsyncGenerator[bytes, None]:
    """Yield a server-sent event when the views have moved, and after some silence another: leases run out silently."""
    clock = asyncio.get_running_loop().time
    until = clock() + MAX_STREAM_SECONDS
    while clock() < until:
        position = checkpoint.position
        yield b"id: %d\nevent: moved\ndata: %d\n\n" % (position, position)
        await asyncio.sleep(MIN_INTERVAL_SECONDS)
        try:
            async with asyncio.timeout(IDLE_INTERVAL_SECONDS):
                await checkpoint.wait_for_position(position + 1)
        except TimeoutError:
            continue
