"""Rank workers for each job, and measure how long the others wait for the first one.

Every worker computes the same ranks from a hash of the names of the worker and the job, without communication.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Final
from zlib import crc32

_RANK_SECONDS: Final = 0.01
_MAX_RANK_SECONDS: Final = 0.25
"""Bounds of the delay per rank. It is longer than observing a claim takes, which each worker measures."""
_MAX_TIMINGS: Final = 500


def list_higher_ranked(worker_id: str, workers: Collection[str], job_id: str) -> list[str]:
    """Return the workers that rank before this one for a job, unordered. All workers compute the same ranks."""
    seed = crc32(job_id.encode())
    own_hash = crc32(worker_id.encode(), seed)
    return [other for other in workers if crc32(other.encode(), seed) > own_hash]


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
