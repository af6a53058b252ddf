"""Settings of the Python process: garbage collector and open files."""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from typing import Final

_MAX_OPEN_FILES: Final = 65_536
_THRESHOLDS: Final = (300_000, 20, 50)
_CHECK_SECONDS: Final = 1.0
_COLLECT_SECONDS: Final = 10.0
_FULL_COLLECT_SECONDS: Final = 60.0
_GROWTH_KB: Final = 32 * 1024


def tune_garbage_collector() -> None:
    """Exclude everything loaded so far from garbage collection, and collect rarely (docs/decisions/0074).

    By default Python scans young objects after every 700 allocations, and all imported modules each time the heap has
    grown by a quarter. A process that serves others for long also needs `collect_garbage_periodically`.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


async def collect_garbage_periodically() -> None:
    """Collect young objects every 10 seconds, and all objects every minute, until cancelled.

    Young objects are collected within a second when the peak of the used memory has grown by 32 MB. Python counts
    allocations and not their bytes: a few thousand unreachable objects may hold gigabytes.
    """
    collected_at = fully_collected_at = time.monotonic()
    collected_peak = _read_peak_memory_kb()
    while True:
        await asyncio.sleep(_CHECK_SECONDS)
        now, peak = time.monotonic(), _read_peak_memory_kb()
        if now - collected_at < _COLLECT_SECONDS and peak - collected_peak < _GROWTH_KB:
            continue
        is_full = now - fully_collected_at >= _FULL_COLLECT_SECONDS
        gc.collect(2 if is_full else 1)
        collected_at, collected_peak = now, peak
        if is_full:
            fully_collected_at = now


def _read_peak_memory_kb() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files as far as allowed. The default is 1024, and each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
