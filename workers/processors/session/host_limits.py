"""session: how many fetches go to one host at a time, from all workers of this machine together.

A turn is a lock of the kernel on one byte of a file, which all hosts share: a process that dies, however it dies, gives
its turn back. Nobody tells who waits that a turn is free, so it asks a few times a second; this costs nobody else
anything.
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

from jobledger.workers.scratch import ensure_private_directory

_log = structlog.get_logger()
_ASK_EVERY_SECONDS: Final = 0.1
_MOST: Final = 2**20
"""Turns that a host may have."""
_FILE: Final = "host-slots.lock"


@cache
def host_lock_directory() -> Path:
    """Return where this machine's workers of this user keep their locks, and create it if needed.

    Called first before a job process gets a temporary directory of its own.
    """
    return ensure_private_directory(Path(tempfile.gettempdir()), f"jobledger-host-locks-{os.getuid()}")


@asynccontextmanager
async def acquire_host_slot(host: str, limit: int, directory: Path) -> AsyncIterator[None]:
    """Wait for one of `most` turns at a host, and hold it inside the block.

    A lock file that cannot be opened limits nobody: another job may have put something else in its place.
    """
    directory.mkdir(mode=0o700, exist_ok=True)  # noqa: ASYNC240 - of a temporary directory; a look costs less than a thread
    first = int.from_bytes(hashlib.sha256(host.encode()).digest()[:5], "big") * _MOST
    while True:
        for number in random.sample(range(limit), limit):
            with _locked(directory / _FILE, first + number) as ours:
                if ours:
                    yield
                    return
        await asyncio.sleep(random.uniform(0.5, 1.5) * _ASK_EVERY_SECONDS)  # noqa: S311 - spreads load


@contextmanager
def _locked(path: Path, byte: int) -> Iterator[bool]:
    """Lock a byte of a file if nobody holds it, for the block; yield whether we have it."""
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
    except OSError as error:
        _log.warning("fetches are not limited", path=str(path), error=error.strerror)
        yield True
        return
    try:
        yield _try_lock(descriptor, byte)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, byte: int) -> bool:
    """Lock a byte for as long as the descriptor is open (F_OFD_SETLK: also against other threads)."""
    request = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, request)
    except OSError as error:  # a file system without locks limits nobody
        return error.errno not in (errno.EAGAIN, errno.EACCES)
    return True
