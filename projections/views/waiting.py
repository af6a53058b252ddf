"""What pending jobs wait for. It is derived when a job is read, so no write is needed when a job becomes due.

The start time and the pause of the batch come from the views, the current time from the server's clock.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final, get_args

from jobledger.ledger.domain.statuses import WaitingFor
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.slots import Views
from jobledger.projections.views import batches, list_index, queue, statistics

KINDS: Final[tuple[WaitingFor, ...]] = get_args(WaitingFor)
STATUS_FACETS: Final[Mapping[str, Sequence[str]]] = {
    "worker": ("pending", "due_time", "retry"),
    "due_time": ("due_time",),
    "retry": ("retry",),
    "batch_paused": ("pending", "due_time", "retry"),
}
"""The values of the facet `status` that a job may have. A job that has become due keeps its value."""


def derive_waiting_for(job: Document, *, is_batch_paused: bool, now: datetime) -> WaitingFor | None:
    """Return what a job waits for, or None if it is not pending."""
    if job["status"] != "pending":
        return None
    if is_batch_paused:
        return "batch_paused"
    if job["due_at"] is not None and job["due_at"] > now:
        return "retry" if job["due_reason"] == "retry" else "due_time"
    return "worker"


@dataclass(frozen=True, slots=True)
class WaitingState:
    """What decides for what a pending job waits, in addition to its document.

    Attributes:
        now: The time by the server's clock.
        paused_batches: The IDs of all paused batches.
    """

    now: datetime
    paused_batches: frozenset[str]

    def build_row_conditions(self, waiting_for: WaitingFor) -> Document:
        """Return the conditions on rows of `job_list` that have one of `STATUS_FACETS`."""
        keys = [list_index.build_unrestricted_list_key(("batch", batch_id)) for batch_id in sorted(self.paused_batches)]
        is_paused = waiting_for == "batch_paused"
        return {"list_keys": {"$in" if is_paused else "$nin": keys}, "due_at": self._build_due_condition(waiting_for)}

    def build_job_conditions(self, waiting_for: WaitingFor) -> Document:
        """Return the conditions on documents of pending jobs."""
        in_paused_batch = [{"batch_id": {"$in": sorted(self.paused_batches)}}]
        return {
            "$or" if waiting_for == "batch_paused" else "$nor": in_paused_batch,
            "due_at": self._build_due_condition(waiting_for),
            "due_reason": waiting_for if waiting_for in ("due_time", "retry") else None,
        }

    def _build_due_condition(self, waiting_for: WaitingFor) -> Document | None:
        is_later = {"$gt": self.now}
        return None if waiting_for == "batch_paused" else {"$not": is_later} if waiting_for == "worker" else is_later


async def load_waiting_state(views: Views, now: datetime) -> WaitingState:
    """Return the state that the filter `waiting_for` requires."""
    return WaitingState(now, frozenset(await batches.find_paused(views)))


# Counts -------------------------------------------------------------------------------------------------------------


def count_jobs(jobs: Iterable[Document], *, is_batch_paused: bool, now: datetime) -> dict[WaitingFor, int]:
    """Return how many of the jobs of one batch wait for what."""
    counts = Counter(derive_waiting_for(job, is_batch_paused=is_batch_paused, now=now) for job in jobs)
    return {kind: counts[kind] for kind in KINDS}


async def count_all_jobs(views: Views, now: datetime) -> dict[WaitingFor, int]:
    """Return how many jobs wait for what. The views may change between the reads, so no count is negative."""
    pending = await statistics.count_jobs(views, status="pending", track=None)
    queued, scheduled = await queue.estimate_depth(views), await queue.count_scheduled(views, now=now)
    return _build_counts(queued, scheduled["due_time"], scheduled["retry"], paused=pending - queued)


async def count_jobs_of_batches(
    views: Views, listed: Sequence[Document], now: datetime
) -> dict[str, dict[WaitingFor, int]]:
    """Return how many of the jobs of each batch wait for what, by the batches' documents."""
    running = [batch["_id"] for batch in listed if batch["pending_jobs"] and not batch["paused"]]
    scheduled = await queue.count_scheduled_by_batch(views, running, now=now) if running else Counter()
    return {
        batch["_id"]: _build_counts(0, 0, 0, paused=batch["pending_jobs"])
        if batch["paused"]
        else _build_counts(
            batch["pending_jobs"], scheduled[batch["_id"], "due_time"], scheduled[batch["_id"], "retry"], paused=0
        )
        for batch in listed
    }


def _build_counts(queued: int, due_time: int, retry: int, *, paused: int) -> dict[WaitingFor, int]:
    worker = max(0, queued - due_time - retry)
    return {"worker": worker, "due_time": due_time, "retry": retry, "batch_paused": max(0, paused)}
