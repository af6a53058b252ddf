"""The interface of the stores for result files, and what they share.

A file is stored under the SHA-256 of its content. It is written once and never changed, and writing it twice is safe.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from jobledger.ledger.files.integrity import IntegrityChecker

ORPHAN_AGE_SECONDS: Final = 86_400.0
"""Unfinished uploads of this age are orphans: no process writes one file for so long."""
# Not the event loop's own threads: jobs that run inline may occupy all of those.
file_store_executor = ThreadPoolExecutor(8, thread_name_prefix="store")


class StoredFile(NamedTuple):
    """A file in the store. `size` is in bytes."""

    sha256: str
    size: int


class OpenFile(Protocol):
    """A file of a store, open for reading. The caller closes it."""

    @property
    def size(self) -> int:
        """The size in bytes."""

    def read(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` to before `end`, in chunks.

        Raises:
            FileLost: Not all of them exist.
            LedgerUnavailable: The store is unreachable.
        """

    async def close(self) -> None:
        """Release the resources of the open file."""


class FileStore(Protocol):
    """A store of result files. A file is complete or absent, each content is stored once, and files never change.

    Job processes run untrusted code, so they have no access to the store. They put files into the inbox of their
    attempt, which is a `DirectoryStore` that need not be durable. The worker moves them into the store.
    """

    def check_writable(self) -> None:
        """Write and remove data in the way `ingest` does. Blocks.

        Raises:
            OSError: That failed.
            FileStoreUnavailable: That failed.
        """

    async def ingest(self, inbox: Path, sha256: str) -> int:
        """Make a file of a job's inbox durable and return its size in bytes. Then an event may refer to it.

        `inbox` is in a directory that belongs to the job: see `jobledger.ledger.files.inbox`. A digest alone does not
        prove that the job knows the content, so the file in the inbox is read even if the store has it already.

        Raises:
            FileLost: The file is missing from the inbox, or has another digest.
            LedgerUnavailable: The store is unreachable or not writable. Transient.
        """

    @property
    def integrity(self) -> IntegrityChecker:
        """Integrity checks of this process."""

    async def open(self, sha256: str, size: int) -> OpenFile:
        """Open a file for reading, after an integrity check (`IntegrityChecker`). `size` is the recorded size.

        Raises:
            FileLost: The file is missing from this store.
            FileDamaged: Its content has changed.
            LedgerUnavailable: The store is unreachable.
        """

    async def verify(self, sha256: str, size: int) -> None:
        """Read a file and compare its size and content with the record. Raises as `open`."""

    def list_files(self) -> AsyncIterator[StoredFile]:
        """Yield all files in the store by ascending digest.

        Raises:
            LedgerUnavailable: The store is unreachable.
        """

    async def remove_orphans(self) -> int:
        """Remove incomplete files that killed writers left at least a day ago. Return how many.

        Raises:
            LedgerUnavailable: The store is unreachable.
        """

    async def begin_removal(self, sha256: str, removal_id: str) -> datetime | None:
        """Take away a file's name, so that a process that saves its content writes it again. `removal_id` is the
        caller's own.

        Returns when the content was last saved, by the store's clock; None if there is no such file. A file without a
        name whose removal another caller has begun passes to this caller.
        """

    async def cancel_removal(self, sha256: str, removal_id: str) -> None:
        """Restore the name of a file whose removal has begun."""

    async def finish_removal(self, sha256: str, removal_id: str) -> None:
        """Delete a file whose removal has begun. Harmless if another caller has taken it over."""
