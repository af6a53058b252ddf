"""The context of one step: parameters, settings, fetcher, progress and warnings."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar

from jobledger.workers.processor import JSON, JobContext, ProcessorError
from jobledger.workers.processors.session.fetcher import Fetcher, FetchResult, ProgressCallback, format_bytes
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.result_layout import ResultLayout
from jobledger.workers.processors.session.settings import SessionSettings
from jobledger.workers.processors.session.threaded_iteration import run_in_thread

# The rest of a step's timeout is for the work after the download. A slow server is then reported as FETCH_TIMEOUT.
FETCH_TIMEOUT_FRACTION = 0.9

Item = TypeVar("Item")


def json_digest(value: JSON) -> str:
    """Return the SHA-256 of the canonical JSON of `value`."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Cancelled(ProcessorError):
    """The job was cancelled by request."""

    def __init__(self) -> None:
        super().__init__("CANCELLED", "The job was cancelled while it ran.")


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step of one attempt. `warnings` collects the warnings of this step."""

    job: JobContext
    session: SessionParameters
    settings: SessionSettings
    result_layout: ResultLayout
    fetcher: Fetcher
    warnings: list[str] = field(default_factory=list)

    async def warn(self, message: str) -> None:
        self.warnings.append(message)
        await self.job.warn(message)

    def raise_if_cancelled(self) -> None:
        if self.job.is_cancelled:
            raise Cancelled

    def report_download_progress(self, message: str, start: float, end: float) -> ProgressCallback:
        """Return a callback that reports a download as progress from `start` to `end` percent."""

        async def report(received: int, total: int | None) -> None:
            self.raise_if_cancelled()
            fraction = min(1.0, received / total) if total else 0.5
            of_total = f" of {format_bytes(total)}" if total else ""
            await self.job.report_progress(
                start + fraction * (end - start), f"{message}: {format_bytes(received)}{of_total}"
            )

        return report

    async def log_fetch(self, fetched: FetchResult) -> None:
        media_type = fetched.media_type or "no content type"
        await self.job.log(
            "info", f"Fetched {fetched.url} ({media_type}): {format_bytes(fetched.size)} in {fetched.seconds:.1f} s"
        )

    @asynccontextmanager
    async def iterate_in_thread(self, items: Generator[Item, None, None]) -> AsyncIterator[AsyncGenerator[Item, None]]:
        """Yield the items of a generator that runs in a thread. Check for cancellation after each item."""

        async def check_each() -> AsyncGenerator[Item, None]:
            async with aclosing(run_in_thread(items)) as computed:
                async for item in computed:
                    self.raise_if_cancelled()
                    yield item

        async with aclosing(check_each()) as checked:
            yield checked
