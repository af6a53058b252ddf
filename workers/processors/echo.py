"""workers: the job type `echo`. Gives its parameters back as a small Markdown file, and misbehaves on request.

For smoke tests and benchmarks, and as the example of how to write a processor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from jobledger.workers.processor import Isolation, JobContext, ProcessorError, Results


class EchoParameters(BaseModel):
    """Anything goes; these fields mean something."""

    model_config = ConfigDict(extra="allow")

    fail: str | None = Field(None, max_length=1000, description="Fail with this message.")
    transient: bool = Field(default=False, description="With `fail`: the error may pass, so the job is tried again.")
    seconds: float = Field(0.0, ge=0, le=86_400, description="Take this long.")
    file: bool = Field(default=True, description="Give the parameters back as a file; else do nothing at all.")


class EchoSettings(BaseModel):
    """There is nothing to set."""

    model_config = ConfigDict(extra="forbid")


class EchoProcessor:
    """Takes as long as it is told to, then fails or succeeds as it is told to."""

    job_type: ClassVar[str] = "echo"
    isolation: ClassVar[Isolation] = "inline"
    preload: ClassVar[Sequence[str]] = ()
    Parameters: ClassVar[type[BaseModel]] = EchoParameters
    Settings: ClassVar[type[BaseModel]] = EchoSettings

    def __init__(self, settings: Any) -> None:
        self._settings = settings

    async def run(self, job: JobContext) -> Results:
        wanted: EchoParameters = job.parameters
        passed = 0.0
        while passed < wanted.seconds:
            await job.report_progress(
                100 * passed / wanted.seconds, f"{passed:.0f} of {wanted.seconds:g} seconds have passed"
            )
            pause = min(1.0, wanted.seconds - passed)
            await asyncio.sleep(pause)
            passed += pause
        if wanted.fail is not None:
            raise ProcessorError("ECHO_FAILED", wanted.fail, transient=wanted.transient)
        if not wanted.file:
            return Results()
        given = wanted.model_dump_json(exclude_defaults=True)  # escapes line breaks, so no text can close the fence
        text = f"# Echo\n\n```json\n{given}\n```\n"
        return Results(markdown=await job.save(f"echo/{job.job_id}/echo.md", text.encode(), "text/markdown"))
