"""Settings of the Python process: garbage collector and open files."""

from __future__ import annotations

import asyncio
import gc
import resource
from typing import Final

_MAX_OPEN_FILES: Final = 65_536
_THRESHOLDS: Final = (300_000, 20, 50)
_COLLECT_SECONDS: Final = 1.0
_FULL_COLLECTION_EVERY: Final = 60


def tune_garbage_collector() -> None:
    """Exclude everything loaded so far from garbage collection, and collect rarely (docs/decisions/0074).

    By default Python scans young objects after every 700 allocations, and all imported modules each time the heap has
    grown by a quarter. A process that serves others for long also needs `collect_garbage_periodically`.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*_THRESHOLDS)


async def collect_garbage_periodically() -> None:
    """Collect young objects every second, and all objects every minute, until cancelled.

    Python counts allocations and not their bytes. A few thousand unreachable objects may hold gigabytes.
    """
    while True:
        for _ in range(_FULL_COLLECTION_EVERY):
            await asyncio.sleep(_COLLECT_SECONDS)
            gc.collect(1)
        gc.collect()


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files as far as allowed. The default is 1024, and each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
