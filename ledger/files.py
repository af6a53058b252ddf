"""ledger: result files, stored under the SHA-256 of their content. Written once, never changed, safe to write twice.

What every store promises (`FileStore`), and the store that is a directory. The other one is in `gridfs.py`.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, Protocol

from ledger.errors import FileLost, os_failure

PIECE_BYTES = 256 * 1024
"""How much of a file is in memory at a time while it is read."""
_CHECK_BYTES = 64 * 1024
ORPHAN_SECONDS = 86_400.0
"""Nobody writes one file for so long."""
_TEMPORARY = re.compile(r"tmp[a-z0-9_]{8}")
"""Names that `tempfile` chooses."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Stored(NamedTuple):
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

    Job processes run foreign code on foreign input, so they get no access to the database: they put files into an inbox
    on their own machine, and the worker sees to the rest.
    """

    def check(self) -> None:
        """Write and remove something the way a job's process does. Blocks.

        Raises:
            OSError: that failed.
        """

    def inbox(self, directory: Path) -> Path:
        """Return where a job's process puts files, as into a `DirectoryStore`.

        `directory` is a place for this alone, which is not there yet and is removed after the attempt.
        """

    async def take_over(self, inbox: Path, sha256: str) -> None:
        """Make durable what a job's process has put into the inbox. Only then an event may name it.

        Raises:
            FileLost: there is no such file, or it has another digest.
            LedgerUnavailable: the store cannot be reached.
        """

    async def open(self, sha256: str) -> OpenFile:
        """Open a file for reading.

        Raises:
            FileLost: there is no such file in this store.
            LedgerUnavailable: the store cannot be reached.
        """

    async def remove_orphans(self) -> int:
        """Remove what writers that were killed left unfinished a day ago or earlier; return how many files.

        Raises:
            LedgerUnavailable: the store cannot be reached.
        """

    async def set_aside(self, sha256: str, token: str) -> datetime | None:
        """Take a file's name away, so that whoever saves its content writes it again. `token` is the caller's own.

        Returns when the content was saved last, by the store's clock; None if there is no such file. A file that
        another caller has set aside, and that has no name, is this caller's then.
        """

    async def put_back(self, sha256: str, token: str) -> None:
        """Give a file that was set aside its name again."""

    async def remove(self, sha256: str, token: str) -> None:
        """Remove a file that was set aside, for good. Harmless if another caller has it by now."""


class DirectoryStore:
    """A directory of files by digest, on a disk that all processes share.

    A file is complete and on disk before it gets its name, so what a name leads to is whole, whoever dies when. What is
    not `async` here blocks: call it from a thread when an event loop is waiting.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Create the directory.

        Raises:
            ConfigurationError: it cannot be created or written to.
            ResourceUnavailable: not now: its disk is full, read-only or away.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise os_failure(error, f"results.store: cannot write to {self.root}: {error.strerror}") from error

    def check(self) -> None:
        """Write and remove a file.

        Raises:
            OSError: that failed.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=self.root) as file:
            file.write(bytes(_CHECK_BYTES))
            file.flush()
            os.fsync(file.fileno())

    def inbox(self, directory: Path) -> Path:
        """Job processes write into the store itself."""
        return self.root

    async def take_over(self, inbox: Path, sha256: str) -> None:
        """Nothing is left to do: what has a name in the inbox, which is the store, is on disk."""

    async def remove_orphans(self) -> int:
        """Remove temporary files a day old. All are in the root directory, which has few other entries."""
        return await asyncio.to_thread(self._remove_orphans)

    def _remove_orphans(self) -> int:
        removed = 0
        with suppress(OSError):  # next time
            for entry in os.scandir(self.root):
                if not _TEMPORARY.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                    continue
                with suppress(OSError):  # another worker was faster
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > ORPHAN_SECONDS:
                        os.unlink(entry.path)  # noqa: PTH108 - scandir's own paths
                        removed += 1
        return removed

    def put_bytes(self, content: bytes) -> Stored:
        """Store bytes."""
        with (
            tempfile.NamedTemporaryFile(dir=self.root, delete=False) as file,
            _removed_in_the_end(Path(file.name)) as path,
        ):
            file.write(content)
            file.flush()
            return self.put_file(path)

    def put_file(self, path: Path) -> Stored:
        """Take a file over: it is moved into the store, or copied when it lies on another file system."""
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.seek(0, os.SEEK_END)
            os.fsync(file.fileno())
        target = self.path(sha256)
        if not _is_kept(target):
            if not target.parent.exists():
                target.parent.mkdir(exist_ok=True)
                _sync_directory(self.root)
            _move(path, target)
            _sync_directory(target.parent)
        if path.resolve() != target.resolve():
            path.unlink(missing_ok=True)
        return Stored(sha256, size)

    def path(self, sha256: str) -> Path:
        """Return where a file lies or would lie."""
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256 in lower-case hex")
        return self.root / sha256[:2] / sha256

    async def open(self, sha256: str) -> OpenFile:
        """Open a file for reading. A link, where a file should be, is followed nowhere.

        Raises:
            FileLost: there is no such file in this store.
        """
        return await asyncio.to_thread(self._open, sha256)

    async def set_aside(self, sha256: str, token: str) -> datetime | None:
        """Rename a file: see `FileStore.set_aside`."""
        return await asyncio.to_thread(self._set_aside, sha256, token)

    def _set_aside(self, sha256: str, token: str) -> datetime | None:
        target, aside = self.path(sha256), self._aside(sha256, token)
        for path in (target, *target.parent.glob(f"{sha256}.removed-*")):
            with suppress(FileNotFoundError):
                path.replace(aside)
                return datetime.fromtimestamp(aside.stat().st_mtime, UTC)
        return None

    async def put_back(self, sha256: str, token: str) -> None:
        """Rename a file back. Should its content have been saved again, either is as good as the other."""
        with suppress(FileNotFoundError):
            await asyncio.to_thread(self._aside(sha256, token).replace, self.path(sha256))

    async def remove(self, sha256: str, token: str) -> None:
        """Remove a file that was set aside."""
        await asyncio.to_thread(self._aside(sha256, token).unlink, missing_ok=True)

    def _aside(self, sha256: str, token: str) -> Path:
        return self.path(sha256).with_suffix(f".removed-{token}")

    def _open(self, sha256: str) -> OpenFile:
        path = self.path(sha256)
        try:
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                # Should it be a pipe, O_NONBLOCK keeps us from waiting for somebody to write into it.
                flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
                descriptor = os.open(path.name, flags, dir_fd=directory)
            finally:
                os.close(directory)
        except OSError as error:
            raise FileLost(f"{path} cannot be opened: {error.strerror}") from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise FileLost(f"{path} is no file")
        return _OpenFile(path, descriptor, found.st_size)


class _OpenFile:
    """A file of the directory, being read by position: a read that was given up disturbs no other."""

    def __init__(self, path: Path, descriptor: int, size: int) -> None:
        self._path = path
        self._descriptor = descriptor
        self._size = size

    @property
    def size(self) -> int:
        return self._size

    async def read(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        while start < end:
            try:
                piece = await asyncio.to_thread(os.pread, self._descriptor, min(PIECE_BYTES, end - start), start)
            except OSError as error:
                raise FileLost(f"{self._path} cannot be read: {error.strerror}") from error
            if not piece:
                raise FileLost(f"{self._path} has become shorter while it was read")
            start += len(piece)
            yield piece

    async def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _is_kept(target: Path) -> bool:
    """Return whether a file is there, and renew its time, by which `set_aside` sees that somebody needs it now.

    If it is set aside meanwhile, either the time was renewed before, and it is put back, or renewing it fails.
    """
    if not target.is_file() or target.is_symlink():
        return False
    try:
        os.utime(target)
    except FileNotFoundError:
        return False
    except PermissionError:  # another user's file: only its owner may set it to the present time
        return True
    return True


def _move(path: Path, target: Path) -> None:
    """Give a file its name in the store. Permissions first: with a name it is there for good, as it is."""
    if not path.is_symlink():  # of a link, what it leads to is wanted, as it is now
        with suppress(OSError):  # another file system, or another's file
            os.utime(path)  # when it was saved, not when its content was made: see `set_aside`
            path.chmod(0o644)
            path.replace(target)
            return
    with (
        tempfile.NamedTemporaryFile(dir=target.parent.parent, delete=False) as copy,  # the root: see remove_orphans
        _removed_in_the_end(Path(copy.name)) as copied,
        path.open("rb") as file,
    ):
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
        copied.chmod(0o644)
        copied.replace(target)


@contextmanager
def _removed_in_the_end(path: Path) -> Iterator[Path]:
    """Leave nothing behind under a temporary name, whatever fails."""
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
