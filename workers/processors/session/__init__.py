"""The job type `session`: turn the page, recording and slides of a conference talk into one Markdown document.

The API imports this package to validate parameters, so the import must stay cheap. `pipeline` imports the libraries for
fetching, parsing and rendering when a job runs.
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
    """Convert one conference session to Markdown. Everything that is missing is reported as a warning."""

    job_type: ClassVar[str] = "session"
    isolation: ClassVar[Isolation] = "process"
    preload: ClassVar[Sequence[str]] = (
        "jobledger.workers.processors.session.pipeline",
        "jobledger.workers.processors.session.preloaded_data",
    )
    Parameters: ClassVar[type[BaseModel]] = SessionParameters
    Settings: ClassVar[type[BaseModel]] = SessionSettings

    def __init__(self, settings: SessionSettings) -> None:
        self._settings = settings

    @staticmethod
    def shared_directories() -> Sequence[Path]:
        """Return the directory of the locks that limit downloads per host across all workers of this machine."""
        from jobledger.workers.processors.session.host_limits import get_host_lock_directory

        return (get_host_lock_directory(),)

    async def run(self, job: JobContext) -> Results:
        """Run the steps `page`, `transcript`, `slides`, `enrich` and `markdown`.

        Raises:
            ProcessorError: The page cannot be fetched or read. A missing video or missing slides are only a warning.
        """
        from jobledger.workers.processors.session.fetcher import Fetcher
        from jobledger.workers.processors.session.pipeline import run

        return await run(job, self._settings, Fetcher(self._settings))
