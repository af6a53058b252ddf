"""The two job types of the comparison kit, inline as those of its other systems."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

from mark import hold, mark  # a module of the kit, on PYTHONPATH
from pydantic import BaseModel, ConfigDict

from jobledger.workers.processor import Isolation, JobContext, Results


class Parameters(BaseModel):
    """The number of the job."""

    model_config = ConfigDict(extra="allow")
    number: int


class Settings(BaseModel):
    """There are none."""


class NoopProcessor:
    """Records its start and ends."""

    job_type: ClassVar[str] = "noop"
    isolation: ClassVar[Isolation] = "inline"
    preload: ClassVar[Sequence[str]] = ()
    Parameters: ClassVar[type[BaseModel]] = Parameters
    Settings: ClassVar[type[BaseModel]] = Settings

    def __init__(self, settings: Any) -> None:
        """Ignore the settings: there are none."""

    async def run(self, job: JobContext) -> Results:
        mark(job.parameters.number)
        return Results()


class HoldProcessor(NoopProcessor):
    """Records its start, and never ends in its first attempt."""

    job_type: ClassVar[str] = "hold"

    async def run(self, job: JobContext) -> Results:
        if hold(job.parameters.number):
            await asyncio.Event().wait()
        return Results()
