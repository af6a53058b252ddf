"""Server-sent events that report updated views, for pages that show the whole system."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Final

from jobledger.projections.engine.checkpoint import CheckpointFollower

MIN_INTERVAL_SECONDS: Final = 1.0
IDLE_INTERVAL_SECONDS: Final = 5.0
MAX_STREAM_SECONDS: Final = 900.0


async def watch_views(checkpoint: CheckpointFollower) -> AsyncGenerator[bytes, None]:
    """Yield a `views_updated` event when the views have been updated, at most once per second.

    An idle system yields an event every `MIN_INTERVAL_SECONDS + IDLE_INTERVAL_SECONDS`, because an expired lease
    updates no view. The event ID is the position of the views.
    """
    clock = asyncio.get_running_loop().time
    deadline = clock() + MAX_STREAM_SECONDS
    while clock() < deadline:
        position = checkpoint.position
        yield b"id: %d\nevent: views_updated\ndata: %d\n\n" % (position, position)
        await asyncio.sleep(MIN_INTERVAL_SECONDS)
        with suppress(TimeoutError):
            async with asyncio.timeout(IDLE_INTERVAL_SECONDS):
                await checkpoint.wait_for_position(position + 1)
