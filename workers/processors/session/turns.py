"""session: how many fetches go to one host at a time, from all workers of this machine together.

A turn is a lock of the kernel on a file, one file for each turn: a process that dies, however it dies, gives its turn
back. Nobody tells who waits that a turn is free, so it asks a few times a second; this costs nobody else anything.
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import random
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import cache
from pathlib import Path

_ASK_EVERY_SECONDS = 0.1


@cache
def turns_directory() -> Path:
    """Return where this machine's workers of this user keep their locks.

    Called first before a job process gets a temporary directory of its own.
    """
    return Path(tempfile.gettempdir(), f"jobledger-turns-{os.getuid()}")


@asynccontextmanager
async def turn(host: str, most: int, directory: Path) -> AsyncIterator[None]:
    """Wait for one of `most` turns at a host, and hold it inside the block."""
    directory.mkdir(mode=0o700, exist_ok=True)  # noqa: ASYNC240 - of a temporary directory; a look costs less than a thread
    name = hashlib.sha256(host.encode()).hexdigest()[:32]
    while True:
        for number in random.sample(range(most), most):
            with _locked(directory / f"{name}-{number}") as ours:
                if ours:
                    yield
                    return
        await asyncio.sleep(random.uniform(0.5, 1.5) * _ASK_EVERY_SECONDS)  # noqa: S311 - spreads load


@contextmanager
def _locked(path: Path) -> Iterator[bool]:
    """Lock a file if nobody holds it, for the block; yield whether we have it."""
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)
