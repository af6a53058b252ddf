"""Check that a stored file still has the content of its name, a SHA-256."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Protocol
from weakref import WeakValueDictionary

from jobledger.ledger.domain.errors import FileDamaged

_REMEMBERED: Final = 20_000
_AT_A_TIME: Final = 2
"""Chunks of files that are hashed concurrently. More would only wait for the disk and occupy threads."""


class VerifiableFile(Protocol):
    """An open file of a store. `identity` changes whenever the content may have changed."""

    @property
    def size(self) -> int:
        """The size in bytes."""

    @property
    def identity(self) -> Hashable:
        """A value that identifies the content, as far as possible without reading it."""

    async def sha256(self, semaphore: asyncio.Semaphore) -> str:
        """Read the whole content and return its digest. Acquires the semaphore for each chunk of at most a few MB."""


class IntegrityChecker:
    """Checks files when they are first opened, and again when their identity has changed.

    Files that are being hashed take turns chunk by chunk, so a small file never waits for the end of a large one. A
    cancelled check stops hashing.
    """

    def __init__(self) -> None:
        self._checked: OrderedDict[str, Hashable] = OrderedDict()
        self._turns = asyncio.Semaphore(_AT_A_TIME)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.damaged_count = 0
        """Opened files that had another content than their name says, since this process began."""

    async def check(self, file: VerifiableFile, sha256: str, size: int) -> None:
        """Check that a file has the size and the content that it was stored with.

        Raises:
            FileDamaged: It has not.
            FileLost: It cannot be read.
            LedgerUnavailable: The store is unreachable.
        """
        if file.size != size:
            self.damaged_count += 1
            raise FileDamaged(f"The file {sha256} was changed: it has {file.size} bytes, and {size} on record")
        identity = file.identity
        if self._checked.get(sha256) == identity:
            return
        async with self._locks.setdefault(sha256, asyncio.Lock()):
            if self._checked.get(sha256) == identity:  # by another caller meanwhile
                return
            found = await file.sha256(self._turns)
            if found != sha256:
                self.damaged_count += 1
                raise FileDamaged(f"The file {sha256} was changed: its content has the digest {found}")
            self._checked[sha256] = identity
        while len(self._checked) > _REMEMBERED:
            self._checked.popitem(last=False)
