"""session: long work in a thread, item by item, so that the job can tell its progress and stop in between."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

Item = TypeVar("Item")
_END: Final = object()


async def run_in_thread(items: Generator[Item, None, None]) -> AsyncGenerator[Item, None]:
    """Yield what `items` yields, each computed in one thread that belongs to this generator alone.

    Enter it with `contextlib.aclosing`. When the reader stops early (a timeout, a cancellation) the item under way is
    finished and `items` then closed by that same thread: a PDF is never closed while it is being drawn.
    """
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="session")
    try:
        while (item := await loop.run_in_executor(thread, next, items, _END)) is not _END:
            yield item  # type: ignore[misc]  # `next` answers an Item or _END, which mypy cannot tell apart
    finally:
        thread.submit(items.close)
        thread.shutdown(wait=False)
