"""workers: finished steps that other jobs share. The same session in another language reuses the fetched video."""

from __future__ import annotations

from datetime import timedelta

from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import JobSubmitted, StepCompleted
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.slots import Views
from jobledger.projections.views import steps
from jobledger.workers.registry import processor_version


class StepCache:
    """Finds steps that a job may reuse: shared on request, by jobs of the same owner, job type and version."""

    def __init__(self, views: Views, log: EventStore) -> None:
        self._views = views
        self._log = log

    async def find_shared_step(
        self, key: str, job_id: str, job: JobSubmitted, *, max_age: timedelta
    ) -> tuple[str, StepCompleted] | None:
        """Return the newest shared step with the digest `key` of its inputs, and the ID of the job that finished it.

        Raises:
            LedgerUnavailable: the database failed.
        """
        row = await steps.find_shared(
            self._views,
            key,
            user_id=job.user_id,
            job_type=job.job_type,
            version=processor_version(job.job_type),
            since=await self._log.server_time() - max_age,
            excluded_job_id=job_id,
        )
        if row is None:
            return None
        found = await self._finished(row["job_id"], row["version"])
        return (row["job_id"], found) if found is not None and found.key == key else None

    async def _finished(self, job_id: str, version: int) -> StepCompleted | None:
        events = await self._log.read_stream(job_id, after_version=version - 1, limit=1)
        try:
            return event if events and isinstance(event := events[0].event, StepCompleted) else None
        except UnreadableEvent:  # written by a later version of the ledger
            return None
