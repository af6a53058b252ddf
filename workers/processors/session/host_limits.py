"""Limit concurrent downloads from one host across all workers of this machine.

A host slot is a kernel lock on one byte of a file. There is one file for all hosts. The kernel releases the lock when
the process exits. A waiting process polls for a free slot because the kernel does not notify it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import random
import struct
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path
from typing import Final

import structlog

from jobledger.workers.machine.scratch import ensure_private_directory

_log = structlog.get_logger()
_POLL_SECONDS: Final = 0.1
_MAX_SLOTS: Final = 2**20
"""Bytes of the lock file that are reserved for each host."""
_FILE_NAME: Final = "host-slots.lock"


@cache
def get_host_lock_directory() -> Path:
    """Return the lock directory of this user's workers on this machine, and create it if needed.

    The first call must come before a job process gets its own temporary directory.
    """
    return ensure_private_directory(Path(tempfile.gettempdir()), f"jobledger-host-locks-{os.getuid()}")


@asynccontextmanager
async def acquire_host_slot(host: str, limit: int, directory: Path) -> AsyncIterator[None]:
    """Wait for one of the `limit` host slots and hold it inside the block.

    If the lock file cannot be opened, the download runs without a limit. Another job may have replaced the file.
    """
    directory.mkdir(mode=0o700, exist_ok=True)  # noqa: ASYNC240 - cheaper than a thread
    first = int.from_bytes(hashlib.sha256(host.encode()).digest()[:5], "big") * _MAX_SLOTS
    while True:
        for number in random.sample(range(limit), limit):
            with _locked(directory / _FILE_NAME, first + number) as is_locked:
                if is_locked:
                    yield
                    return
        await asyncio.sleep(random.uniform(0.5, 1.5) * _POLL_SECONDS)  # noqa: S311 - spreads load


@contextmanager
def _locked(path: Path, byte: int) -> Iterator[bool]:
    """Try to lock a byte of a file for the block. Yield whether it is locked."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _log.warning(
            "concurrent downloads per host are not limited: the lock file cannot be opened; check its permissions",
            path=str(path),
            error=error.strerror,
        )
        yield True
        return
    try:
        yield _try_lock(descriptor, byte)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, byte: int) -> bool:
    """Try to lock a byte until the descriptor is closed. F_OFD_SETLK also excludes other threads."""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except OSError as error:  # without file locks downloads are not limited
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True
