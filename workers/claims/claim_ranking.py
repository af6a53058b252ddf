"""Rank workers for each job, and measure how long the others wait for the first one.

Every worker computes the same ranks from a hash of the names of the worker and the job, without communication.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from jobledger.projections.views import queue

_RANK_SECONDS: Final = 0.01
_MAX_RANK_SECONDS: Final = 0.25
"""Bounds of the delay per rank. It is longer than observing a claim takes, which each worker measures."""
_MAX_TIMINGS: Final = 500


def list_higher_ranked(worker_id: str, workers: Sequence[str], job_id: str) -> Sequence[str]:
    """Return the workers that rank before this one for a job, the first one first.

    All workers compute the same ranks, and each ranks first for the same share of the jobs. The hash of the job selects
    the first worker, its quotient the second one from the rest, and so on.

    Args:
        workers: All workers, sorted.
    """
    number = queue.compute_hash(job_id)
    number, index = divmod(number, len(workers) or 1)
    if not workers or workers[index] == worker_id:
        return ()
    remaining, higher_ranked = list(workers), []
    while remaining and (worker := remaining.pop(index)) != worker_id:
        higher_ranked.append(worker)
        number, index = divmod(number, len(remaining) or 1)
    return higher_ranked


class ClaimDelay:
    """The delay per rank for new jobs: 1.5 times the duration of recent claims by higher-ranked workers."""

    def __init__(self) -> None:
        self.seconds = _RANK_SECONDS
        self._since: dict[str, tuple[float, str]] = {}

    def start_timing(self, job_id: str, first: str) -> None:
        """Start to measure how long `first` takes to claim a job."""
        if len(self._since) >= _MAX_TIMINGS:  # jobs that were never claimed, or by others
            self._since.clear()
        self._since[job_id] = time.monotonic(), first

    def record_claim(self, job_id: str, worker_id: str) -> None:
        """Record a claim. If `first` made it, its duration changes the delay."""
        since, first = self._since.pop(job_id, (0.0, ""))
        if worker_id == first:
            delay = 1.5 * (time.monotonic() - since)
            # A longer duration counts immediately and decays slowly: a conflict costs more than a short delay.
            self.seconds = min(max(delay, 0.95 * self.seconds, _RANK_SECONDS), _MAX_RANK_SECONDS)
