"""Settings of the Python process: garbage collector and open files."""

from __future__ import annotations

import asyncio
import gc
import resource
import time
from pathlib import Path
from typing import Final

_MAX_OPEN_FILES: Final = 65_536
_THRESHOLDS: Final = (300_000, 20, 50)
_CHECK_SECONDS: Final = 1.0
_COLLECT_SECONDS: Final = 10.0
_FULL_COLLECT_SECONDS: Final = 60.0
_GROWTH_BYTES: Final = 32 * 1024 * 1024


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

    Young objects are collected within a second when the used memory has grown by 32 MB. Python counts allocations and
    not their bytes: a few thousand unreachable objects may hold gigabytes.
    """
    collected_at = fully_collected_at = time.monotonic()
    collected_bytes = _read_used_bytes()
    while True:
        await asyncio.sleep(_CHECK_SECONDS)
        now, used_bytes = time.monotonic(), _read_used_bytes()
        collected_bytes = min(collected_bytes, used_bytes)
        if now - collected_at < _COLLECT_SECONDS and used_bytes - collected_bytes < _GROWTH_BYTES:
            continue
        is_full = now - fully_collected_at >= _FULL_COLLECT_SECONDS
        gc.collect(2 if is_full else 1)
        collected_at, collected_bytes = now, _read_used_bytes()
        if is_full:
            fully_collected_at = now


def _read_used_bytes() -> int:
    """Return the resident memory of this process; 0 if it cannot be read, for example without a free descriptor."""
    try:
        pages = Path("/proc/self/statm").read_text().split()[1]  # man 5 proc
    except OSError:
        return 0
    return int(pages) * resource.getpagesize()


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files as far as allowed. The default is 1024, and each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
