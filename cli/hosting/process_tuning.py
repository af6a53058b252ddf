"""Settings of the Python process: garbage collector and open files."""

from __future__ import annotations

import gc
import resource
from typing import Final

_MAX_OPEN_FILES: Final = 65_536


def tune_garbage_collector() -> None:
    """Exclude everything loaded so far from garbage collection, and collect less often.

    By default Python scans young objects after every 700 allocations, and all imported modules each time the heap has
    grown by a quarter. That costs a tenth to a fifth of an append (docs/decisions/0014).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files as far as allowed. The default is 1024, and each connection needs one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
