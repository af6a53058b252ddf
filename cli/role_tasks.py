"""cli: tasks that run beside each other for as long as a process does; none of them may end unnoticed."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager


def failure_callback(on_failure: Callable[[BaseException], None]) -> Callable[[asyncio.Task[None]], None]:
    """Return what to call at the end of a task, so that `failed` is told if it was a failure."""

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_failure(error)

    return ended


@asynccontextmanager
async def run_in_background(
    work: Coroutine[None, None, None], on_failure: Callable[[BaseException], None]
) -> AsyncIterator[None]:
    """Run something inside the block; `failed` is told if it fails. Behind the block it is cancelled."""
    task = asyncio.create_task(work)
    task.add_done_callback(failure_callback(on_failure))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
