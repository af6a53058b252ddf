"""Install a job type `test` that runs a function of the test in the worker's process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, ClassVar

import pytest
from pydantic import BaseModel, ConfigDict

from jobledger.workers.processor import Isolation, JobContext, Processor, Results
from jobledger.workers.registry import load_processors


class ConcurrencyProbe:
    """Runs jobs that take a time, and records how many run at once."""

    def __init__(self, seconds: float) -> None:
        self.maximum = 0
        self._seconds = seconds
        self._running = 0

    async def run(self, job: JobContext) -> Results:
        self._running += 1
        self.maximum = max(self.maximum, self._running)
        await asyncio.sleep(self._seconds)
        self._running -= 1
        return Results()


class AnyParameters(BaseModel):
    model_config = ConfigDict(extra="allow")


def install_processor(
    monkeypatch: pytest.MonkeyPatch, run_job: Callable[[JobContext], Awaitable[Results]], *job_types: str
) -> None:
    """Add the job type `test`, or `job_types`, whose processor calls `run_job`."""

    class TestProcessor:
        job_type: ClassVar[str] = "test"
        isolation: ClassVar[Isolation] = "inline"
        preload: ClassVar[Sequence[str]] = ()
        Parameters: ClassVar[type[BaseModel]] = AnyParameters
        Settings: ClassVar[type[BaseModel]] = AnyParameters

        def __init__(self, settings: Any) -> None:
            pass

        async def run(self, job: JobContext) -> Results:
            return await run_job(job)

    processors: dict[str, type[Processor]] = {
        **load_processors(),
        **dict.fromkeys(job_types or ("test",), TestProcessor),
    }
    monkeypatch.setattr("jobledger.workers.registry.load_processors", lambda: processors)
    monkeypatch.setattr("jobledger.workers.worker.load_processors", lambda: processors)
    for module in ("executor", "message_handler", "shared_step_finder"):
        monkeypatch.setattr(f"jobledger.workers.attempts.{module}.get_processor_version", lambda _: "tests 1")
