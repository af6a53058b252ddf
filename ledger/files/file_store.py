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
    """A file in the store; `size` in bytes."""

    sha256: str
    size: int


class OpenFile(Protocol):
    """A file of a store, being read. Whoever has opened it closes it."""

    @property
    def size(self) -> int:
        """In bytes."""

    def read(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        """Yield the bytes from `start` up to and without `end`, piece by piece.

        Raises:
            FileLost: they are not all there.
            LedgerUnavailable: the store cannot be reached.
        """

    async def close(self) -> None:
        """Give back what reading it holds."""


class FileStore(Protocol):
    """Where result files are. A file is whole or not there; the same content is there once; nobody changes it.

    Job processes run foreign code on foreign input, so they get no access to the store: they put files into an inbox of
    their attempt, as into a `DirectoryStore` that need not be durable, and the worker moves them into the store.
    """

    def check_writable(self) -> None:
        """Write and remove something the way `take_over` does. Blocks.

        Raises:
            OSError, StoreUnavailable: that failed.
        """

    async def ingest(self, inbox: Path, sha256: str) -> int:
        """Make durable what a job has put into its inbox, and return its size in bytes. Then an event may name it.

        `inbox` lies in a directory that belongs to the job, as all in it does: see `jobledger.ledger.files.inbox`. A
        digest alone is
        no proof that the job knows the content, so the file in the inbox is read even if the store has it already.

        Raises:
            FileLost: there is no such file in the inbox, or it has another digest.
            LedgerUnavailable: the store cannot be reached or written to. May be tried again.
        """

    @property
    def integrity(self) -> IntegrityChecker:
        """What this process knows about the content of its files."""

    async def open(self, sha256: str, size: int) -> OpenFile:
        """Open a file for reading, after a check of its content: see `FileChecks`. `size` is the one on record.

        Raises:
            FileLost: there is no such file in this store.
            FileDamaged: it has another content than it was stored with.
            LedgerUnavailable: the store cannot be reached.
        """

    async def verify(self, sha256: str, size: int) -> None:
        """Read a file and compare its size and content with those on record. Raises as `open`."""

    def list_files(self) -> AsyncIterator[StoredFile]:
        """Yield all files in the store by ascending digest.

        Raises:
            LedgerUnavailable: the store cannot be reached.
        """

    async def remove_orphans(self) -> int:
        """Remove what writers that were killed left unfinished a day ago or earlier; return how many files.

        Raises:
            LedgerUnavailable: the store cannot be reached.
        """

    async def begin_removal(self, sha256: str, removal_id: str) -> datetime | None:
        """Take a file's name away, so that whoever saves its content writes it again. `token` is the caller's own.

        Returns when the content was saved last, by the store's clock; None if there is no such file. A file that
        another caller has set aside, and that has no name, is this caller's then.
        """

    async def cancel_removal(self, sha256: str, token: str) -> None:
        """Give a file that was set aside its name again."""

    async def finish_removal(self, sha256: str, token: str) -> None:
        """Remove a file that was set aside, for good. Harmless if another caller has it by now."""
