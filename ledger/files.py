"""ledger: result files, stored under the SHA-256 of their content. Written once, never changed, safe to write twice."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ledger.errors import ConfigurationError

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Stored(NamedTuple):
    """A file in the store; `size` in bytes."""

    sha256: str
    size: int


class FileStore:
    """A directory of files by digest. Blocking: call it from a thread when an event loop is waiting.

    A file is complete and on disk before it gets its name, so what a name leads to is whole, whoever dies when.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def prepare(self) -> None:
        """Create the directory.

        Raises:
            ConfigurationError: it cannot be created or written to.
        """
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.root):
                pass
        except OSError as error:
            raise ConfigurationError(f"results.store: cannot write to {self.root}: {error.strerror}") from error

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
        if not target.exists():
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


def _move(path: Path, target: Path) -> None:
    """Give a file its name in the store. Permissions first: with a name it is there for good, as it is."""
    if not path.is_symlink():  # of a link, what it leads to is wanted, as it is now
        with suppress(OSError):  # another file system, or another's file
            path.chmod(0o644)
            path.replace(target)
            return
    with (
        tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as copy,
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
