"""The job type `echo`. It returns its parameters as a small Markdown file, and can wait and fail on request.

It is used for smoke tests and benchmarks, and is an example of a processor.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field

from jobledger.workers.processor import Isolation, JobContext, ProcessorError, Results


class EchoParameters(BaseModel):
    """Accepts any field. These fields have a meaning."""

    model_config = ConfigDict(extra="allow")

    fail: str | None = Field(None, max_length=1000, description="Fail with this message.")
    transient: bool = Field(default=False, description="With `fail`: the error is transient, so the job is retried.")
    seconds: float = Field(0.0, ge=0, le=86_400, description="Wait this many seconds.")
    file: bool = Field(default=True, description="Return the parameters as a file. If false, return no results.")


class EchoSettings(BaseModel):
    """There are no settings."""

    model_config = ConfigDict(extra="forbid")


class EchoProcessor:
    """Waits and then fails or succeeds, as its parameters request."""

    job_type: ClassVar[str] = "echo"
    isolation: ClassVar[Isolation] = "inline"
    preload: ClassVar[Sequence[str]] = ()
    Parameters: ClassVar[type[BaseModel]] = EchoParameters
    Settings: ClassVar[type[BaseModel]] = EchoSettings

    def __init__(self, settings: Any) -> None:
        """Ignore the settings: there are none."""

    async def run(self, job: JobContext) -> Results:
        parameters: EchoParameters = job.parameters
        elapsed = 0.0
        while elapsed < parameters.seconds:
            await job.report_progress(
                100 * elapsed / parameters.seconds, f"{elapsed:.0f} of {parameters.seconds:g} seconds elapsed"
            )
            pause = min(1.0, parameters.seconds - elapsed)
            await asyncio.sleep(pause)
            elapsed += pause
        if parameters.fail is not None:
            raise ProcessorError("ECHO_FAILED", parameters.fail, transient=parameters.transient)
        if not parameters.file:
            return Results()
        content = parameters.model_dump_json(exclude_defaults=True)  # escapes line breaks, so the fence stays
        text = f"# Echo\n\n```json\n{content}\n```\n"
        return Results(markdown=await job.save(f"echo/{job.job_id}/echo.md", text.encode(), "text/markdown"))
