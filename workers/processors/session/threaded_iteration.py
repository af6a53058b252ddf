"""Run a generator in a thread and yield its items, so that the job can report progress and stop between items."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

Item = TypeVar("Item")
_END: Final = object()


async def run_in_thread(items: Generator[Item, None, None]) -> AsyncGenerator[Item, None]:
    """Yield the items of `items`. One dedicated thread computes them.

    Use with `contextlib.aclosing`. If the caller stops early (timeout, cancellation), the thread finishes the current
    item and then closes `items`. A PDF is therefore never closed while it is rendered.
    """
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="session")
    try:
        while (item := await loop.run_in_executor(thread, next, items, _END)) is not _END:
            yield item  # type: ignore[misc]  # `next` returns an Item or _END
    finally:
        thread.submit(items.close)
        thread.shutdown(wait=False)
