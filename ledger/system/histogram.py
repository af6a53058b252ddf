"""A histogram of durations, as Prometheus defines it. Pure."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate
from typing import Final

BUCKET_BOUNDS_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class DurationHistogram:
    """Counts durations per bucket. `total_seconds` is their sum."""

    def __init__(self) -> None:
        self._counts = [0] * (len(BUCKET_BOUNDS_SECONDS) + 1)
        self.total_seconds = 0.0

    def observe(self, seconds: float) -> None:
        """Count a duration."""
        self._counts[bisect_left(BUCKET_BOUNDS_SECONDS, seconds)] += 1
        self.total_seconds += seconds

    def get_cumulative_counts(self) -> list[tuple[float, int]]:
        """Return for each bucket bound, and for infinity, how many durations were at most that long."""
        return list(zip((*BUCKET_BOUNDS_SECONDS, float("inf")), accumulate(self._counts), strict=True))
