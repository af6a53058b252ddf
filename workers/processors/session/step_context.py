"""session: what every step has at hand, and how it tells what it is doing."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TypeVar

from jobledger.workers.processor import JSON, Job, ProcessorError
from jobledger.workers.processors.session.fetch import Fetched, Fetcher, OnProgress, in_words
from jobledger.workers.processors.session.item_threads import in_thread
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.result_names import Layout
from jobledger.workers.processors.session.settings import SessionSettings

# A tenth of a step's time is left for what comes after the download, and a slow server is named as such.
FETCH_SHARE = 0.9

Item = TypeVar("Item")


def digest_of(value: JSON) -> str:
    """Return what tells one value from another."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


class Cancelled(ProcessorError):
    """Somebody asked for the job to stop, and it did."""

    def __init__(self) -> None:
        super().__init__("CANCELLED", "The job was cancelled while it ran.")


@dataclass(frozen=True, slots=True)
class Work:
    """One step of one attempt at one session. `warnings` collects what this step could not do."""

    job: Job
    session: SessionParameters
    settings: SessionSettings
    layout: Layout
    fetcher: Fetcher
    warnings: list[str] = field(default_factory=list)

    async def warn(self, sentence: str) -> None:
        self.warnings.append(sentence)
        await self.job.warn(sentence)

    def stop_if_cancelled(self) -> None:
        if self.job.cancelled:
            raise Cancelled

    def downloading(self, message: str, start: float, end: float) -> OnProgress:
        """Tell a download as the part of the job between `start` and `end` percent."""

        async def tell(received: int, total: int | None) -> None:
            self.stop_if_cancelled()
            share = min(1.0, received / total) if total else 0.5
            of_total = f" of {in_words(total)}" if total else ""
            await self.job.progress(start + share * (end - start), f"{message}: {in_words(received)}{of_total}")

        return tell

    async def log_fetched(self, fetched: Fetched) -> None:
        kind = fetched.media_type or "of no stated type"
        await self.job.log(
            "info", f"Fetched {fetched.url} ({kind}): {in_words(fetched.size)} in {fetched.seconds:.1f} s"
        )

    @asynccontextmanager
    async def one_by_one(self, items: Generator[Item, None, None]) -> AsyncIterator[AsyncGenerator[Item, None]]:
        """What `items` yields, computed in a thread, with a look between the items whether to stop."""

        async def each() -> AsyncGenerator[Item, None]:
            async with aclosing(in_thread(items)) as computed:
                async for item in computed:
                    self.stop_if_cancelled()
                    yield item

        async with aclosing(each()) as stoppable:
            yield stoppable
