"""ledger: whether a stored file still has the content that its name, a SHA-256, stands for."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Hashable
from typing import Final, Protocol

from ledger.errors import FileDamaged

_REMEMBERED: Final = 20_000
_AT_A_TIME: Final = 2
"""Files that are hashed at the same time: more would only wait for the disk, and take threads from other work."""


class Checkable(Protocol):
    """An open file of a store. `identity` changes whenever the content may have changed."""

    @property
    def identity(self) -> Hashable:
        """Of the content, as far as that can be told without reading it."""

    async def sha256(self) -> str:
        """Read the whole content and return its digest."""


class FileChecks:
    """Checks files when they are opened for the first time, and again when their identity has changed."""

    def __init__(self) -> None:
        self._checked: OrderedDict[str, Hashable] = OrderedDict()
        self._hashing = asyncio.Semaphore(_AT_A_TIME)
        self.damaged = 0
        """Opened files that had another content than their name says, since this process began."""

    async def check(self, file: Checkable, sha256: str) -> None:
        """Make sure that a file has the content that it was stored with.

        Raises:
            FileDamaged: it has another one.
            FileLost: it cannot be read.
            LedgerUnavailable: the store cannot be reached.
        """
        identity = file.identity
        if self._checked.get(sha256) == identity:
            return
        async with self._hashing:
            if self._checked.get(sha256) == identity:  # by somebody else meanwhile
                return
            found = await file.sha256()
        if found != sha256:
            self.damaged += 1
            raise FileDamaged(f"The file {sha256} was changed: its content has the digest {found}")
        self._checked[sha256] = identity
        while len(self._checked) > _REMEMBERED:
            self._checked.popitem(last=False)
