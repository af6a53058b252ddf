"""ledger: result files, stored under the SHA-256 of their content. Written once, never changed, safe to write twice.

What every store promises (`FileStore`), and the store that is a directory. The other one is in `gridfs.py`.
"""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import re
import shutil
import stat
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple, Protocol

from jobledger.ledger.domain.errors import (
    FileDamaged,
    FileLost,
    FileStoreUnavailable,
    FileTooLarge,
    NotARegularFile,
    ResourceUnavailable,
    classify_os_error,
)
from jobledger.ledger.domain.limits import MAX_FILE_BYTES
from jobledger.ledger.files.inbox import HASH_CHUNK_BYTES as TURN_BYTES
from jobledger.ledger.files.inbox import MISSING_FILE_ERRNOS, InboxFile
from jobledger.ledger.files.integrity import IntegrityChecker
from jobledger.ledger.files.store_marker import StoreMarker
from jobledger.ledger.system.cooperative_threads import CooperativeWork, run_cooperatively, run_to_completion
from jobledger.ledger.system.private_files import DIRECTORY_MODE, FILE_MODE, make_private_directory

READ_CHUNK_BYTES = 256 * 1024
"""How much of a file is in memory at a time while it is read."""
_CHECK_BYTES = 64 * 1024
ORPHAN_AGE_SECONDS = 86_400.0
"""Nobody writes one file for so long."""
_TEMPORARY = re.compile(r"tmp[a-z0-9_]{8}")
"""Names that `tempfile` chooses."""
# Not the event loop's own threads: jobs that run inline may occupy all of those.
file_store_executor = ThreadPoolExecutor(8, thread_name_prefix="store")
_hashing_threads = ThreadPoolExecutor(2, thread_name_prefix="hash")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
"""Should it be a pipe, O_NONBLOCK keeps us from waiting for a writer."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


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


class DirectoryStore:
    """A directory of files by digest, on a disk that all processes share.

    A file is complete and on disk before it gets its name, so what a name leads to is whole, whoever dies when. What is
    not `async` here blocks: call it from a thread when an event loop is waiting.
    """

    def __init__(self, root: Path, *, durable: bool = True, marker: StoreMarker | None = None) -> None:
        """Use a directory, which need not be there yet.

        Args:
            root: the directory.
            durable: whether a file survives a power cut once it has its name. An inbox needs no such promise.
            marker: by which the directory is recognized. None: any directory will do, as for an inbox.
        """
        self.root = root
        self.integrity = IntegrityChecker()
        self._durable = durable
        self._marker = marker

    def prepare(self) -> None:
        """See whether the directory can be written to, by this user alone. Create it if it is to be a new store.

        Raises:
            ConfigurationError: it cannot be created or written to.
            ResourceUnavailable: not now: it is missing, or its disk is full, read-only or away.
        """
        try:
            self._create_if_new()
            make_private_directory(self.root)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except FileStoreUnavailable as error:
            raise ResourceUnavailable(str(error)) from error
        except OSError as error:
            raise classify_os_error(error, f"results.store: cannot write to {self.root}: {error.strerror}") from error

    def _create_if_new(self) -> None:
        if self._marker is not None and self._marker.is_new:
            self._marker.write(self.root)
            self._marker = StoreMarker(self._marker.store_id)
        self.check_marker()

    def check_marker(self) -> None:
        """Check that the directory is the store: see `StoreMarker`. Takes microseconds. Blocks.

        Raises:
            StoreUnavailable: it is missing, or another directory is in its place.
            OSError: it cannot be read.
        """
        if self._marker is not None:
            self._marker.check_directory(self.root)

    def check_writable(self) -> None:
        """Write and remove a file.

        Raises:
            OSError, StoreUnavailable: that failed.
        """
        self._create_if_new()
        with tempfile.TemporaryFile(dir=self.root) as file:
            file.write(bytes(_CHECK_BYTES))
            file.flush()
            os.fsync(file.fileno())

    async def ingest(self, inbox: Path, sha256: str) -> int:
        """Copy a file from an inbox into the store, remove it there, and return its size in bytes.

        It is copied even within one file system: the job that wrote it may still have it open, and could change the
        content after its digest was checked.

        Raises:
            FileLost: there is no such file in the inbox, or it has another digest.
            StoreUnavailable: the store cannot be written to.
        """
        return await run_cooperatively(self._take_over(inbox, sha256), file_store_executor)

    def _take_over(self, inbox: Path, sha256: str) -> CooperativeWork[int]:
        target = self.path(sha256)
        with InboxFile(DirectoryStore(inbox).path(sha256)) as source:
            yield from source.verify()
            try:
                self.check_marker()
                yield from self._adopt(source, target)
                self.check_marker()  # the disk may have gone away meanwhile, and the file be on another one
            except OSError as error:
                where = error.filename or self.root
                raise FileStoreUnavailable(f"results.store: cannot write to {where}: {error.strerror}") from error
            source.remove()
            return source.size

    def _adopt(self, source: InboxFile, target: Path) -> CooperativeWork[None]:
        if (yield from _holds(target, target.name, source.size)):
            _sync_directory(target.parent)  # its writer may not have come so far yet
            return
        self._make_directory(target.parent)
        with (
            tempfile.NamedTemporaryFile(dir=self.root, delete=False) as copy,  # the root: see remove_orphans
            _remove_on_exit(Path(copy.name)) as copied,
        ):
            for piece in source.iterate_chunks():  # its digest is checked again: the job may have changed it
                copy.write(piece)
                if source.size > TURN_BYTES:
                    copy.flush()
                    os.fdatasync(copy.fileno())  # now, so that no turn takes much longer than the others
                    yield
            copy.flush()
            os.fsync(copy.fileno())
            copied.chmod(FILE_MODE)
            copied.replace(target)
        _sync_directory(target.parent)

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
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > ORPHAN_AGE_SECONDS:
                        os.unlink(entry.path)  # noqa: PTH108 - scandir's own paths
                        removed += 1
        return removed

    def put_bytes(self, content: bytes) -> StoredFile:
        """Store bytes."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with (
            tempfile.NamedTemporaryFile(dir=self.root, delete=False) as file,
            _remove_on_exit(Path(file.name)) as path,
        ):
            file.write(content)
            file.flush()
            return self.put_file(path)

    def put_file(self, path: Path) -> StoredFile:
        """Take a file over: it is moved into the store, or copied when it lies on another file system.

        Raises:
            NoRegularFile: it is a directory, a pipe, a socket or a device.
            FileTooLarge: it is larger than `FILE_BYTES`.
            OSError: it cannot be read, or the store cannot be written to.
        """
        path = Path(os.fspath(path))  # a class of its own might do anything
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _open_to_be_stored(path) as file:
            _check_size(path, os.fstat(file.fileno()).st_size)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.seek(0, os.SEEK_END)
            if self._durable:
                os.fsync(file.fileno())
            target = self.path(sha256)
            if not run_to_completion(_holds(target, sha256, size)):
                self._make_directory(target.parent)
                _move(path, file, target)
                if self._durable:
                    _sync_directory(target.parent)
        if path.resolve() != target.resolve():
            path.unlink(missing_ok=True)
        return StoredFile(sha256, size)

    def _make_directory(self, directory: Path) -> None:
        if not directory.exists():
            directory.mkdir(
                mode=DIRECTORY_MODE, exist_ok=True
            )  # not its parents: a store that has gone is waited for, not made anew
            if self._durable:
                _sync_directory(directory.parent)

    def path(self, sha256: str) -> Path:
        """Return where a file lies or would lie."""
        if not _SHA256.fullmatch(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256 in lower-case hex")
        return self.root / sha256[:2] / sha256

    async def open(self, sha256: str, size: int) -> OpenFile:
        """Open a file for reading. A link, where a file should be, is followed nowhere.

        Raises:
            FileLost: there is no such file in this store.
            FileDamaged: it has another content than it was stored with.
            StoreUnavailable: the store cannot be read.
        """
        return await self._checked(await asyncio.to_thread(self._open, sha256), sha256, size, self.integrity)

    async def verify(self, sha256: str, size: int) -> None:
        """Read a file and compare its size and content with those on record.

        Raises:
            FileLost: there is no such file in this store.
            FileDamaged: it has another content than it was stored with.
            StoreUnavailable: the store cannot be read.
        """
        file = await asyncio.to_thread(self._open, sha256)
        await (await self._checked(file, sha256, size, IntegrityChecker())).close()

    @staticmethod
    async def _checked(file: _OpenFile, sha256: str, size: int, checks: IntegrityChecker) -> _OpenFile:
        try:
            await checks.check(file, sha256, size)
        except BaseException:
            await file.close()
            raise
        return file

    async def list_files(self) -> AsyncIterator[StoredFile]:
        """Yield all files in the store by ascending digest; a directory at a time is in memory.

        Raises:
            StoreUnavailable: the directory is not the store.
        """
        await asyncio.to_thread(self.check_marker)
        for number in range(256):
            for found in await asyncio.to_thread(self._stored_in, self.root / f"{number:02x}"):
                yield found

    @staticmethod
    def _stored_in(directory: Path) -> list[StoredFile]:
        try:
            with os.scandir(directory) as entries:
                return sorted(
                    StoredFile(entry.name, entry.stat(follow_symlinks=False).st_size)
                    for entry in entries
                    if _SHA256.fullmatch(entry.name)
                )
        except FileNotFoundError:
            return []

    async def begin_removal(self, sha256: str, removal_id: str) -> datetime | None:
        """Rename a file: see `FileStore.set_aside`."""
        return await asyncio.to_thread(self._set_aside, sha256, removal_id)

    def _set_aside(self, sha256: str, token: str) -> datetime | None:
        self.check_marker()
        target, aside = self.path(sha256), self._aside(sha256, token)
        for path in (target, *target.parent.glob(f"{sha256}.removed-*")):
            with suppress(FileNotFoundError):
                path.replace(aside)
                return datetime.fromtimestamp(aside.stat().st_mtime, UTC)
        return None

    async def cancel_removal(self, sha256: str, token: str) -> None:
        """Rename a file back. Should its content have been saved again, either is as good as the other."""
        await asyncio.to_thread(self._put_back, sha256, token)

    def _put_back(self, sha256: str, token: str) -> None:
        self.check_marker()
        with suppress(FileNotFoundError):
            self._aside(sha256, token).replace(self.path(sha256))

    async def finish_removal(self, sha256: str, token: str) -> None:
        """Remove a file that was set aside."""
        await asyncio.to_thread(self._remove, sha256, token)

    def _remove(self, sha256: str, token: str) -> None:
        self.check_marker()
        self._aside(sha256, token).unlink(missing_ok=True)

    def _aside(self, sha256: str, token: str) -> Path:
        return self.path(sha256).with_suffix(f".removed-{token}")

    def _open(self, sha256: str) -> _OpenFile:
        path = self.path(sha256)
        try:
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                descriptor = os.open(path.name, _OPEN_FLAGS | os.O_NOFOLLOW, dir_fd=directory)
            finally:
                os.close(directory)
        except OSError as error:
            with _reading(path):
                self.check_marker()
            raise classify_open_error(path, error) from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise FileLost(f"{path} is no file")
        return _OpenFile(path, descriptor, found)


class _OpenFile:
    """A file of the directory, being read by position: a read that was given up disturbs no other."""

    def __init__(self, path: Path, descriptor: int, found: os.stat_result) -> None:
        self._path = path
        self._descriptor = descriptor
        self._found = found

    @property
    def size(self) -> int:
        return self._found.st_size

    @property
    def identity(self) -> Hashable:
        """Nobody can change a file and keep all of these."""
        found = self._found
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    async def sha256(self, turns: asyncio.Semaphore) -> str:
        digest, loop = hashlib.sha256(), asyncio.get_running_loop()
        with _reading(self._path):
            for position in range(0, self.size, TURN_BYTES):
                async with turns:
                    await loop.run_in_executor(_hashing_threads, self._hash, digest, position)
        return digest.hexdigest()

    def _hash(self, digest: hashlib._Hash, position: int) -> None:
        digest.update(os.pread(self._descriptor, min(TURN_BYTES, self.size - position), position))

    def _is_changed(self) -> bool:
        now = os.fstat(self._descriptor)
        return (now.st_size, now.st_mtime_ns) != (self._found.st_size, self._found.st_mtime_ns)

    async def read(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        while start < end:
            with _reading(self._path):
                piece = await asyncio.to_thread(os.pread, self._descriptor, min(READ_CHUNK_BYTES, end - start), start)
            if not piece:
                raise FileLost(f"{self._path} has become shorter while it was read")
            start += len(piece)
            if start >= end and self._is_changed():
                raise FileDamaged(f"{self._path} was changed while it was read")
            yield piece

    async def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _holds(target: Path, sha256: str, size: int) -> CooperativeWork[bool]:
    """Return whether a file is in the store already. One whose content was changed there is replaced.

    Its time is renewed: by that, `set_aside` sees that somebody needs it now. If it is set aside meanwhile, either its
    time was renewed before, and it is put back, or renewing it fails, and it is written anew.
    """
    if target.is_symlink() or not target.is_file():
        return False
    digest = hashlib.sha256()
    try:
        with target.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return False
            while piece := file.read(TURN_BYTES):
                digest.update(piece)
                if size > TURN_BYTES:
                    yield
        if digest.hexdigest() != sha256:
            return False
        with suppress(PermissionError):  # another user's file: only its owner may set it to the present time
            os.utime(target)
    except FileNotFoundError:
        return False
    return True


def _check_size(path: Path, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise FileTooLarge(f"'{path}' has {size} bytes. At most {MAX_FILE_BYTES} are allowed")


def classify_open_error(path: Path, error: OSError) -> FileLost | FileStoreUnavailable:
    """Return what an error of `open` means: there is no such file, or this machine cannot open it now."""
    kind = FileLost if error.errno in MISSING_FILE_ERRNOS else FileStoreUnavailable
    return kind(f"{path} cannot be opened: {error.strerror}")


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert errors of reading: a file that the disk cannot read is lost, all others are trouble of the machine."""
    try:
        yield
    except OSError as error:
        kind = FileLost if error.errno == errno.EIO else FileStoreUnavailable
        raise kind(f"{path} cannot be read: {error.strerror}") from error


def _open_to_be_stored(path: Path) -> BufferedReader:
    """Open a file of a job. Waits for nothing, whatever it is.

    Raises:
        NoRegularFile: it is a directory, a pipe, a socket or a device.
        OSError: it cannot be opened.
    """
    try:
        descriptor = os.open(path, _OPEN_FLAGS)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise NotARegularFile(f"'{path}' is {_KINDS.get(_format_of(path.stat()), 'a device')}") from error
    if (kind := _format_of(os.fstat(descriptor))) != stat.S_IFREG:
        os.close(descriptor)
        raise NotARegularFile(f"'{path}' is {_KINDS.get(kind, 'no regular file')}")
    return os.fdopen(descriptor, "rb")


def _format_of(found: os.stat_result) -> int:
    return stat.S_IFMT(found.st_mode)


def _move(path: Path, file: BufferedReader, target: Path) -> None:
    """Give a file its name in the store. Permissions first: with a name it is there for good, as it is.

    `file` is the same file, opened: whatever has the path by now is not waited for.
    """
    if not path.is_symlink():  # of a link, what it leads to is wanted, as it is now
        with suppress(OSError):  # another file system, or another's file
            os.utime(path)  # when it was saved, not when its content was made: see `set_aside`
            path.chmod(FILE_MODE)
            path.replace(target)
            return
    with (
        tempfile.NamedTemporaryFile(dir=target.parent.parent, delete=False) as copy,  # the root: see remove_orphans
        _remove_on_exit(Path(copy.name)) as copied,
    ):
        file.seek(0)
        shutil.copyfileobj(file, copy, 1 << 20)
        copy.flush()
        os.fsync(copy.fileno())
        copied.chmod(FILE_MODE)
        copied.replace(target)


@contextmanager
def _remove_on_exit(path: Path) -> Iterator[Path]:
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
