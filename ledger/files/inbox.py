"""A file in the inbox of an attempt, read by the worker.

The attempt's directory belongs to the job, which may change it at any time. So the worker opens each path component
separately and never follows links. If a file is not a readable regular file with the expected content, it is lost, and
the job is at fault.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from jobledger.ledger.domain.errors import FileLost, FileStoreUnavailable
from jobledger.ledger.domain.limits import MAX_FILE_BYTES
from jobledger.ledger.system.cooperative_threads import CooperativeWork

HASH_CHUNK_BYTES: Final = 4 << 20
"""Bytes of a file that are read before another file gets its turn."""
MISSING_FILE_ERRNOS: Final = frozenset({errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO})
"""Errors of `open` that show that the file does not exist."""
_JOB_FAULT_ERRNOS: Final = MISSING_FILE_ERRNOS | {errno.EACCES, errno.EPERM, errno.ENODEV, errno.EAGAIN}
"""Errors that a job can cause below its directory, also by modes, devices and leases (EAGAIN). Others are transient."""
_DIRECTORY: Final = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE: Final = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC


class InboxFile:
    """An open file of an inbox and its directory. All methods but `close` block."""

    def __init__(self, path: Path) -> None:
        """Open `<directory of the attempt>/<inbox>/<two digits>/<digest>`.

        Raises:
            FileLost: There is no regular file that this process may read, or it is too large.
            FileStoreUnavailable: This machine cannot open it now.
        """
        self._path = path
        self._directory = self._descriptor = -1
        try:
            self._open()
            self.size = os.fstat(self._descriptor).st_size
            if self.size > MAX_FILE_BYTES:
                raise FileLost(f"{path} has {self.size} bytes, and at most {MAX_FILE_BYTES} are allowed")
        except BaseException:
            self.close()
            raise

    def _open(self) -> None:
        path = self._path
        try:
            self._directory = os.open(path.parents[2], _DIRECTORY)
        except OSError as error:
            raise classify_open_error(path, error) from error
        try:
            for name in (path.parents[1].name, path.parent.name):
                inner = os.open(name, _DIRECTORY, dir_fd=self._directory)
                os.close(self._directory)
                self._directory = inner
            # Check this before opening it: opening a device may already have an effect.
            self._require_regular(os.stat(path.name, dir_fd=self._directory, follow_symlinks=False))
            self._descriptor = os.open(path.name, _FILE, dir_fd=self._directory)
        except OSError as error:
            raise classify_open_error(path, error, _JOB_FAULT_ERRNOS) from error
        self._require_regular(os.fstat(self._descriptor))

    def _require_regular(self, found: os.stat_result) -> None:
        if not stat.S_ISREG(found.st_mode):
            raise FileLost(f"{self._path} is not a regular file")

    def __enter__(self) -> InboxFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()  # opened in a thread for a caller that was cancelled meanwhile

    def close(self) -> None:
        """Close the file. May be called again."""
        for descriptor in (self._directory, self._descriptor):
            if descriptor >= 0:
                os.close(descriptor)
        self._directory = self._descriptor = -1

    def iterate_chunks(self, chunk_bytes: int = HASH_CHUNK_BYTES) -> Iterator[bytes]:
        """Yield the content up to the size at opening, even if the file grows.

        Raises:
            FileLost: At the end, if the digest does not match the name.
        """
        digest = hashlib.sha256()
        for start in range(0, self.size, chunk_bytes):
            piece = os.pread(self._descriptor, min(chunk_bytes, self.size - start), start)
            if not piece:
                break
            digest.update(piece)
            yield piece
        if digest.hexdigest() != self._path.name:
            raise FileLost(f"The content of the file {self._path.name} does not match its digest")

    def verify(self) -> CooperativeWork[None]:
        """Read the content and compare its digest with the name.

        Raises:
            FileLost: They differ.
        """
        for _ in self.iterate_chunks():
            if self.size > HASH_CHUNK_BYTES:
                yield

    def remove(self) -> None:
        """Remove the file if possible. Its directory is removed in any case when the attempt has ended."""
        with suppress(OSError):
            os.unlink(self._path.name, dir_fd=self._directory)


def open_verified(path: Path) -> CooperativeWork[InboxFile]:
    """Open a file of an inbox and compare its content with its name. Raises as `InboxFile` and `verify`."""
    file = InboxFile(path)
    yield from file.verify()
    return file


def classify_open_error(
    path: Path, error: OSError, lost: frozenset[int] = MISSING_FILE_ERRNOS
) -> FileLost | FileStoreUnavailable:
    """Return the error for a failed `open`: the file does not exist, or this machine cannot open it now."""
    kind = FileLost if error.errno in lost else FileStoreUnavailable
    return kind(f"{path} cannot be opened: {error.strerror}")
