"""The context of one step: parameters, settings, fetcher, progress and warnings."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass, field
from datetime import timedelta
from hashlib import sha256
from typing import Any, Final, TypeVar

from jobledger.workers.processor import JSON, JobContext, ProcessorError
from jobledger.workers.processors.session.fetcher import Fetcher, FetchResult, format_bytes
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.result_layout import ResultLayout
from jobledger.workers.processors.session.settings import SessionSettings

# The rest of a step's timeout is for the work after the download. A slow server is then reported as FETCH_TIMEOUT.
FETCH_TIMEOUT_FRACTION = 0.9
CANCELLATION_POLL_SECONDS = 0.5

SHARED_STEP_MAX_AGE: Final = timedelta(days=1)
"""How long jobs share the outputs of steps that do not depend on the target language. Pages and recordings change."""


Item = TypeVar("Item")
_END: Final = object()


def compute_json_digest(value: JSON) -> str:
    """Return the SHA-256 of the canonical JSON of `value`."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def may_succeed_later(error: ProcessorError) -> bool:
    """Return whether the same step may succeed after a restart of the job.

    Servers, networks, programs and `allowed_private_hosts` may change without a change of the step's inputs. The limit
    of size is an input.
    """
    return error.code != "TOO_LARGE"


class Cancelled(ProcessorError):
    """The job was cancelled by request."""

    def __init__(self) -> None:
        super().__init__("CANCELLED", "The job was cancelled while it ran.")


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step of one attempt. `warnings` collects the warnings of this step."""

    job: JobContext
    parameters: SessionParameters
    settings: SessionSettings
    result_layout: ResultLayout
    fetcher: Fetcher
    warnings: list[str] = field(default_factory=list)

    async def warn(self, message: str, *, repeat_on_restart: bool = False) -> None:
        """Add a warning to the document and the job. See `JobContext.warn`."""
        self.warnings.append(message)
        await self.job.warn(message, repeat_on_restart=repeat_on_restart)

    def raise_if_cancelled(self) -> None:
        if self.job.is_cancelled:
            raise Cancelled

    async def sleep(self, seconds: float) -> None:
        """Wait, but end soon after the job is cancelled.

        Raises:
            Cancelled: The job was cancelled.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds
        while (remaining := end - loop.time()) > 0:
            self.raise_if_cancelled()
            await asyncio.sleep(min(remaining, CANCELLATION_POLL_SECONDS))
        self.raise_if_cancelled()

    async def report_part(self, message: str, start: float, end: float, done: float, total: float | None) -> None:
        """Report `done` of `total`, in any unit, as progress from `start` to `end` percent of the job."""
        fraction = min(1.0, done / total) if total else 0.5
        await self.job.report_progress(start + fraction * (end - start), message)

    async def report_download(self, message: str, start: float, end: float, received: int, total: int | None) -> None:
        """Report a download as progress from `start` to `end` percent."""
        self.raise_if_cancelled()
        of_total = f" of {format_bytes(total)}" if total else ""
        await self.report_part(f"{message}: {format_bytes(received)}{of_total}", start, end, received, total)

    async def log_fetch(self, fetched: FetchResult) -> None:
        media_type = fetched.media_type or "no content type"
        await self.job.log(
            "info", f"Fetched {fetched.url} ({media_type}): {format_bytes(fetched.size)} in {fetched.seconds:.1f} s"
        )

    def iterate_in_thread(self, items: Generator[Item, None, None]) -> aclosing[AsyncGenerator[Item, None]]:
        """Yield the items of a generator that runs in a thread. Check for cancellation after each item."""
        return aclosing(run_in_thread(items, check=self.raise_if_cancelled))

    async def run_until_cancelled(self, work: Coroutine[Any, Any, Item]) -> Item:
        """Run a coroutine, and stop it soon after the job is cancelled, also while it waits for a response.

        Raises:
            Cancelled: The job was cancelled.
        """
        task = asyncio.create_task(work)
        try:
            while not (await asyncio.wait({task}, timeout=CANCELLATION_POLL_SECONDS))[0]:
                self.raise_if_cancelled()
            return task.result()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def run_in_thread(
    items: Generator[Item, None, None], *, check: Callable[[], None] = lambda: None
) -> AsyncGenerator[Item, None]:
    """Yield the items of `items`. One dedicated thread computes them. `check` is called before each item is yielded.

    Use with `contextlib.aclosing`. If the caller stops early (timeout, cancellation), the thread finishes the current
    item and then closes `items`. A PDF is therefore never closed while it is rendered.
    """
    loop = asyncio.get_running_loop()
    thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="session")
    try:
        while (item := await loop.run_in_executor(thread, next, items, _END)) is not _END:
            check()
            yield item  # type: ignore[misc]  # `next` returns an Item or _END
    finally:
        thread.submit(items.close)
        thread.shutdown(wait=False)
