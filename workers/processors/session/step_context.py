"""session: what every step has at hand, and how it tells what it is doing."""

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

# A tenth of a step's time is left for what comes after the download, and a slow server is named as such.
FETCH_TIMEOUT_FRACTION = 0.9

Item = TypeVar("Item")


def json_digest(value: JSON) -> str:
    """Return what tells one value from another."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Cancelled(ProcessorError):
    """Somebody asked for the job to stop, and it did."""

    def __init__(self) -> None:
        super().__init__("CANCELLED", "The job was cancelled while it ran.")


@dataclass(frozen=True, slots=True)
class StepContext:
    """One step of one attempt at one session. `warnings` collects what this step could not do."""

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
        """Tell a download as the part of the job between `start` and `end` percent."""

        async def tell(received: int, total: int | None) -> None:
            self.raise_if_cancelled()
            share = min(1.0, received / total) if total else 0.5
            of_total = f" of {format_bytes(total)}" if total else ""
            await self.job.report_progress(
                start + share * (end - start), f"{message}: {format_bytes(received)}{of_total}"
            )

        return tell

    async def log_fetch(self, fetched: FetchResult) -> None:
        kind = fetched.media_type or "of no stated type"
        await self.job.log(
            "info", f"Fetched {fetched.url} ({kind}): {format_bytes(fetched.size)} in {fetched.seconds:.1f} s"
        )

    @asynccontextmanager
    async def iterate_in_thread(self, items: Generator[Item, None, None]) -> AsyncIterator[AsyncGenerator[Item, None]]:
        """What `items` yields, computed in a thread, with a look between the items whether to stop."""

        async def each() -> AsyncGenerator[Item, None]:
            async with aclosing(run_in_thread(items)) as computed:
                async for item in computed:
                    self.raise_if_cancelled()
                    yield item

        async with aclosing(each()) as stoppable:
            yield stoppable
