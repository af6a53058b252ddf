"""Find shared steps: completed steps of other jobs that a job may reuse.

For example, the same session in another language reuses the fetched video.
"""

from __future__ import annotations

from datetime import timedelta

from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import JobSubmitted, StepCompleted
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.slots import Views
from jobledger.projections.views import steps
from jobledger.workers.registry import get_processor_version


class SharedStepFinder:
    """Finds shared steps of jobs with the same owner, job type and processor version. Stores nothing itself."""

    def __init__(self, views: Views, event_store: EventStore) -> None:
        self._views = views
        self._event_store = event_store

    async def find_shared_step(
        self, key: str, job_id: str, job: JobSubmitted, *, max_age: timedelta
    ) -> tuple[str, StepCompleted] | None:
        """Find the newest shared step with these inputs.

        Args:
            key: Digest of the step's name and inputs.
            job_id: The job that needs the step. Its own steps are excluded.
            job: The submission of that job.
            max_age: Maximum age of the step.

        Returns:
            The ID of the job that completed the step, and the step; None if there is none.

        Raises:
            LedgerUnavailable: The database failed.
        """
        row = await steps.find_shared(
            self._views,
            key,
            user_id=job.user_id,
            job_type=job.job_type,
            version=get_processor_version(job.job_type),
            since=await self._event_store.read_server_time() - max_age,
            excluded_job_id=job_id,
        )
        if row is None:
            return None
        step = await self._load_step(row["job_id"], row["version"])
        return (row["job_id"], step) if step is not None and step.key == key else None

    async def _load_step(self, job_id: str, version: int) -> StepCompleted | None:
        events = await self._event_store.read_stream(job_id, after_version=version - 1, limit=1)
        try:
            return event if events and isinstance(event := events[0].event, StepCompleted) else None
        except UnreadableEvent:  # it is damaged, or a newer version of Jobledger wrote it
            return None
