"""The interface of the stores for result files, and what they share.

A file is stored under the SHA-256 of its content. It is written once and never changed, and writing it twice is safe.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Hashable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, Protocol
from weakref import WeakValueDictionary

from jobledger.ledger.domain.errors import FileDamaged

ORPHAN_AGE_SECONDS: Final = 86_400.0
"""Unfinished uploads of this age are orphans: no process writes one file for so long."""
# Threads of the store's own, because jobs that run inline may occupy all threads of the event loop's executor.
file_store_executor = ThreadPoolExecutor(8, thread_name_prefix="store")
_MAX_REMEMBERED_FILES: Final = 20_000
_CONCURRENT_CHUNKS: Final = 2
"""Chunks of files that are hashed concurrently. More would only wait for the disk and occupy threads."""


class StoredFile(NamedTuple):
    """A file in the store. `size` is in bytes."""

    sha256: str
    size: int


class OpenFile(Protocol):
    """A file of a store, open for reading. The caller closes it."""

    @property
    def size(self) -> int:
        """The size in bytes."""

    @property
    def identity(self) -> Hashable:
        """A value that changes whenever the content may have changed, as far as possible without reading it."""

    def read(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` to before `end`, in chunks.

        Raises:
            FileLost: Not all of them exist.
            LedgerUnavailable: The store is unreachable.
        """

    async def sha256(self, turns: asyncio.Semaphore) -> str:
        """Read the whole content and return its digest. Acquires `turns` for each chunk of at most a few MB."""

    async def close(self) -> None:
        """Release the resources of the open file."""


class IntegrityChecker:
    """Checks the content of files when they are first opened, and again when their identity has changed.

    Files that are being hashed take turns chunk by chunk, so a small file never waits for the end of a large one. A
    cancelled check stops hashing.
    """

    def __init__(self) -> None:
        self._checked: OrderedDict[str, Hashable] = OrderedDict()
        self._turns = asyncio.Semaphore(_CONCURRENT_CHUNKS)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self.damaged_count = 0
        """Opened files whose content did not match their digest, since this process began."""

    async def check(self, file: OpenFile, sha256: str, size: int) -> None:
        """Check that a file has the size and the content that it was stored with.

        Raises:
            FileDamaged: Its size or content has changed.
            FileLost: It cannot be read.
            LedgerUnavailable: The store is unreachable.
        """
        if file.size != size:
            self.damaged_count += 1
            raise FileDamaged(f"The file {sha256} was changed: it has {file.size} bytes instead of {size}")
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
        while len(self._checked) > _MAX_REMEMBERED_FILES:
            self._checked.popitem(last=False)


class FileStore(ABC):
    """A store of result files. A file is complete or absent, each content is stored once, and files never change.

    Job processes run untrusted code, so they have no access to the store. They put files into the inbox of their
    attempt, which is a `DirectoryStore` that need not be durable. The worker copies them into the store.

    Every method that is a coroutine raises `LedgerUnavailable` if the store is unreachable.
    """

    def __init__(self) -> None:
        self.integrity = IntegrityChecker()
        """Integrity checks of this process."""

    @abstractmethod
    def check_writable(self) -> None:
        """Write and remove data in the way `ingest` does. Blocks.

        Raises:
            OSError: That failed.
            FileStoreUnavailable: That failed.
        """

    @abstractmethod
    async def ingest(self, inbox: Path, sha256: str) -> int:
        """Copy a file of a job's inbox into the store, remove it there, and return its size in bytes.

        When this returns, the file is durable, and an event may refer to it. `inbox` is in a directory that belongs to
        the job: see `jobledger.ledger.files.inbox`. A digest alone does not prove that the job knows the content, so
        the file in the inbox is read even if the store has it already.

        Raises:
            FileLost: The file is missing from the inbox, or has another digest.
            FileStoreUnavailable: This machine cannot open the file, or write to the store, now.
        """

    async def open(self, sha256: str, size: int) -> OpenFile:
        """Open a file for reading, after an integrity check (`IntegrityChecker`). `size` is the recorded size.

        Raises:
            FileLost: The file is missing from this store.
            FileDamaged: Its content has changed.
        """
        return await self._open_checked(sha256, size, self.integrity)

    async def verify(self, sha256: str, size: int) -> None:
        """Read a file and compare its size and content with the record. Raises as `open`."""
        await (await self._open_checked(sha256, size, IntegrityChecker())).close()

    async def _open_checked(self, sha256: str, size: int, checker: IntegrityChecker) -> OpenFile:
        file = await self._open_unchecked(sha256)
        try:
            await checker.check(file, sha256, size)
        except BaseException:
            await file.close()
            raise
        return file

    @abstractmethod
    async def _open_unchecked(self, sha256: str) -> OpenFile: ...

    @abstractmethod
    def list_files(self) -> AsyncIterator[StoredFile]:
        """Yield all files in the store by ascending digest."""

    @abstractmethod
    async def remove_orphans(self) -> int:
        """Remove incomplete files that killed processes left at least a day ago. Return how many."""

    @abstractmethod
    async def begin_removal(self, sha256: str, removal_id: str) -> datetime | None:
        """Take away a file's name, so that a process that saves its content writes it again.

        Args:
            sha256: The digest.
            removal_id: Identifies the caller. If another caller has begun to remove the file, this caller takes over.

        Returns:
            When the content was last saved, by the store's clock; None if there is no such file.
        """

    @abstractmethod
    async def cancel_removal(self, sha256: str, removal_id: str) -> None:
        """Restore the name of a file. If its content was saved again meanwhile, only one copy remains."""

    @abstractmethod
    async def finish_removal(self, sha256: str, removal_id: str) -> None:
        """Delete a file whose removal has begun. Harmless if another caller has taken over."""
