"""Background tasks of a process. The failure of any of them is reported."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager


def create_failure_callback(on_failure: Callable[[BaseException], None]) -> Callable[[asyncio.Task[None]], None]:
    """Return a done callback for tasks that calls `on_failure` with the exception of a failed task."""

    def report(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            on_failure(error)

    return report


@asynccontextmanager
async def run_in_background(
    work: Coroutine[None, None, None],
    on_failure: Callable[[BaseException], None],
    *,
    stop: Callable[[], object] | None = None,
) -> AsyncIterator[None]:
    """Run a coroutine inside the block, and wait for its end afterwards.

    Args:
        work: The coroutine.
        on_failure: Called with its exception.
        stop: Called at the end of the block to end the coroutine. None: cancel it.
    """
    task = asyncio.create_task(work)
    task.add_done_callback(create_failure_callback(on_failure))
    try:
        yield
    finally:
        (stop or task.cancel)()
        await asyncio.gather(task, return_exceptions=True)
