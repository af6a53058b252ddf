"""workers: steps that other jobs have finished: the same session in another language need not fetch its video again."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from ledger.access import Principal, Right, right_to
from ledger.errors import UnreadableEvent
from ledger.events import StepCompleted
from ledger.log import EventLog
from projections import steps
from projections.views import Views


class SharedSteps:
    """Looks for finished steps that are not older than `seconds`; with 0 nothing is shared."""

    def __init__(self, views: Views, log: EventLog, *, seconds: float) -> None:
        self._views = views
        self._log = log
        self._seconds = seconds

    @property
    def shared(self) -> bool:
        return self._seconds > 0

    async def find(
        self, key: str, job_id: str, user_id: str, groups: Collection[str] = ()
    ) -> tuple[str, StepCompleted] | None:
        """Return the newest step with this digest of its inputs, of another job that the user may read, and which job.

        `groups` are those that the user is in.

        Raises:
            LedgerUnavailable: the database failed.
        """
        reader = Principal(user_id, frozenset(groups))
        since = datetime.now(UTC) - timedelta(seconds=self._seconds)
        for row in await steps.find(self._views, key, since=since, other_than=job_id):
            right = right_to(reader, owner=row["user_id"], access=row["access_control"], teams=row["teams"])
            if right >= Right.READ:
                found = await self._finished(row["job_id"], row["version"])
                if found is not None and found.key == key:
                    return row["job_id"], found
        return None

    async def _finished(self, job_id: str, version: int) -> StepCompleted | None:
        events = await self._log.read_stream(job_id, after_version=version - 1, limit=1)
        try:
            return event if events and isinstance(event := events[0].event, StepCompleted) else None
        except UnreadableEvent:  # of a later version
            return None
