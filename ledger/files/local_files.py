"""Read, write and rename single files of a directory store. All functions without `async` block."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import shutil
import stat
from collections.abc import AsyncGenerator, Hashable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path

from jobledger.ledger.domain.errors import FileDamaged, FileLost, FileStoreUnavailable, NotARegularFile
from jobledger.ledger.files.inbox import HASH_CHUNK_BYTES
from jobledger.ledger.system.cooperative_threads import CooperativeWork
from jobledger.ledger.system.private_files import FILE_MODE, create_file

READ_CHUNK_BYTES = 256 * 1024
"""How much of a file is in memory at a time while it is read."""
OPEN_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC
"""O_NONBLOCK: opening a pipe must not wait until another process writes to it."""
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a FIFO (named pipe)",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_hashing_threads = ThreadPoolExecutor(2, thread_name_prefix="hash")


class LocalFile:
    """An open file of the directory. It reads by position, so a cancelled read does not disturb others."""

    def __init__(self, path: Path, descriptor: int, found: os.stat_result) -> None:
        self._path = path
        self._descriptor = descriptor
        self._found = found

    @property
    def size(self) -> int:
        return self._found.st_size

    @property
    def identity(self) -> Hashable:
        """A value that changes whenever the content may have changed."""
        found = self._found
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    async def sha256(self, turns: asyncio.Semaphore) -> str:
        digest, loop = hashlib.sha256(), asyncio.get_running_loop()
        with translate_read_errors(self._path):
            for position in range(0, self.size, HASH_CHUNK_BYTES):
                async with turns:
                    await loop.run_in_executor(_hashing_threads, self._hash, digest, position)
        return digest.hexdigest()

    def _hash(self, digest: hashlib._Hash, position: int) -> None:
        digest.update(os.pread(self._descriptor, min(HASH_CHUNK_BYTES, self.size - position), position))

    def _is_changed(self) -> bool:
        now = os.fstat(self._descriptor)
        return (now.st_size, now.st_mtime_ns) != (self._found.st_size, self._found.st_mtime_ns)

    async def read(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        while start < end:
            with translate_read_errors(self._path):
                piece = await asyncio.to_thread(os.pread, self._descriptor, min(READ_CHUNK_BYTES, end - start), start)
            if not piece:
                raise FileLost(f"{self._path} was truncated while it was read")
            start += len(piece)
            if start >= end and self._is_changed():
                raise FileDamaged(f"{self._path} was changed while it was read")
            yield piece

    async def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def has_content(target: Path, sha256: str, size: int) -> CooperativeWork[bool]:
    """Return whether a file is stored with this content. A file with changed content is replaced by the caller.

    Updates the file's modification time, by which `begin_removal` sees that the file is needed now. If the file is
    renamed for removal meanwhile, either its time was updated before, and the removal is cancelled, or the update
    fails, and the file is written again.
    """
    if target.is_symlink() or not target.is_file():
        return False
    digest = hashlib.sha256()
    try:
        with target.open("rb") as file:
            if os.fstat(file.fileno()).st_size != size:
                return False
            while piece := file.read(HASH_CHUNK_BYTES):
                digest.update(piece)
                if size > HASH_CHUNK_BYTES:
                    yield
        if digest.hexdigest() != sha256:
            return False
        with suppress(PermissionError):  # another user's file: only its owner may set it to the present time
            os.utime(target)
    except FileNotFoundError:
        return False
    return True


@contextmanager
def translate_read_errors(path: Path) -> Iterator[None]:
    """Convert errors of reading. A file that the disk cannot read (EIO) is lost; other errors are transient."""
    try:
        yield
    except OSError as error:
        kind = FileLost if error.errno == errno.EIO else FileStoreUnavailable
        raise kind(f"{path} cannot be read: {error.strerror}") from error


def open_regular_file(path: Path) -> BufferedReader:
    """Open a regular file of a job. Never waits, whatever the path names.

    Raises:
        NotARegularFile: It is a directory, a pipe, a socket or a device.
        OSError: It cannot be opened.
    """
    try:
        descriptor = os.open(path, OPEN_FLAGS)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        raise NotARegularFile(f"'{path}' is {_KINDS.get(_get_file_type(path.stat()), 'a device')}") from error
    if (kind := _get_file_type(os.fstat(descriptor))) != stat.S_IFREG:
        os.close(descriptor)
        raise NotARegularFile(f"'{path}' is {_KINDS.get(kind, 'not a regular file')}")
    return os.fdopen(descriptor, "rb")


def _get_file_type(found: os.stat_result) -> int:
    return stat.S_IFMT(found.st_mode)


def move_file(path: Path, file: BufferedReader, target: Path) -> None:
    """Move a file to its name in the store. Sets its mode first: once it has the name, it does not change.

    `file` is the same file, opened: another file may have replaced it at `path` meanwhile.
    """
    if not path.is_symlink():  # of a symbolic link, the current content of its target is stored
        with suppress(OSError):  # another file system, or another user's file
            os.utime(path)  # the time of saving, not that of the content: see `begin_removal`
            path.chmod(FILE_MODE)
            path.replace(target)
            return
    with create_file(target, target.parent.parent) as copy:
        file.seek(0)
        shutil.copyfileobj(file, copy, 1 << 20)


def sync_directory(directory: Path) -> None:
    """Write a directory's entries to disk."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
