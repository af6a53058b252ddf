"""session: the main job type. A talk's page, recording and slides become one Markdown document with its images.

Importing this package is cheap, because the API does it to check parameters; the libraries that fetch, read and draw
are imported by `pipeline`, when a job runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from pydantic import BaseModel

from jobledger.workers.processor import Isolation, JobContext, Results
from jobledger.workers.processors.session.parameters import SessionParameters
from jobledger.workers.processors.session.settings import SessionSettings

__all__ = ["SessionParameters", "SessionProcessor", "SessionSettings"]


class SessionProcessor:
    """Makes Markdown of one conference session, and says honestly what of it was not possible."""

    job_type: ClassVar[str] = "session"
    isolation: ClassVar[Isolation] = "process"
    preload: ClassVar[Sequence[str]] = ("jobledger.workers.processors.session.pipeline",)
    Parameters: ClassVar[type[BaseModel]] = SessionParameters
    Settings: ClassVar[type[BaseModel]] = SessionSettings

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings

    @staticmethod
    def shared_directories() -> Sequence[Path]:
        """Return where jobs of all workers of this machine agree on how many fetch from one host."""
        from jobledger.workers.processors.session.host_limits import host_lock_directory

        return (host_lock_directory(),)

    async def run(self, job: JobContext) -> Results:
        """Run the steps `page`, `transcript`, `slides`, `enrich` and `markdown`.

        Raises:
            ProcessorError: the page cannot be had or read. Without video or slides the job ends well, with a warning.
        """
        from jobledger.workers.processors.session.fetcher import Fetcher
        from jobledger.workers.processors.session.pipeline import run

        return await run(job, self._settings, Fetcher(self._settings))
