"""Job types that run the action named in the parameters of a job."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict

from jobledger.workers.processor import Isolation, JobContext, Results

ACTIONS: dict[str, Callable[[JobContext], Awaitable[Any]]] = {}


def action(function: Callable[[JobContext], Awaitable[Any]]) -> Callable[[JobContext], Awaitable[Any]]:
    ACTIONS[function.__name__.strip("_").replace("_", " ")] = function
    return function


class Parameters(BaseModel):
    model_config = ConfigDict(extra="allow")

    action: str = "nothing"
    file: Path | None = None


class Settings(BaseModel):
    model_config = ConfigDict(extra="allow")


class MisbehavingProcessor:
    job_type: ClassVar[str] = "misbehaving"
    isolation: ClassVar[Isolation] = "process"
    preload: ClassVar[Sequence[str]] = ()
    Parameters: ClassVar[type[BaseModel]] = Parameters
    Settings: ClassVar[type[BaseModel]] = Settings

    def __init__(self, settings: Any) -> None:
        pass

    async def run(self, job: JobContext) -> Results:
        result: Results = await ACTIONS[job.parameters.action](job)
        return result


class InlineMisbehavingProcessor(MisbehavingProcessor):
    job_type: ClassVar[str] = "misbehaving-inline"
    isolation: ClassVar[Isolation] = "inline"


def write_marker_file(job: JobContext, text: object) -> None:
    """Atomically write the file that the job's parameters name."""
    new = job.parameters.file.with_suffix(".new")
    new.write_text(str(text))
    new.rename(job.parameters.file)
