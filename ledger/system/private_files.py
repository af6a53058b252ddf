"""Create directories and files that only the user of this process may read.

Directories get mode 0700 and files 0600. A wider mode, set by an earlier version or an administrator, is narrowed when
the file is opened.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import structlog

DIRECTORY_MODE = 0o700
FILE_MODE = 0o600
_log = structlog.get_logger(__name__)


def make_private_directory(path: Path) -> None:
    """Create a directory with mode 0700, or narrow the mode of an existing one.

    A directory with the sticky bit (such as /tmp) is shared and keeps its mode. So does a directory of another owner.
    The files inside are private in both cases.

    Raises:
        OSError: The directory cannot be created.
    """
    path.mkdir(mode=DIRECTORY_MODE, parents=True, exist_ok=True)
    mode = stat.S_IMODE(path.stat().st_mode)
    if not mode & 0o077:
        return
    if not mode & stat.S_ISVTX:
        try:
            path.chmod(DIRECTORY_MODE)
        except OSError:
            pass
        else:
            return
    _log.warning("directory is readable by other users", directory=str(path), mode=f"{mode:o}")


def open_private(path: Path, mode: str) -> IO[Any]:
    """Open a file with mode 0600, whatever its mode was. Like `open`, but does not follow a symbolic link.

    Raises:
        OSError: The file cannot be opened.
    """
    flags = os.O_NOFOLLOW | os.O_CLOEXEC
    file = open(path, mode, opener=lambda name, base: os.open(name, base | flags, FILE_MODE))  # noqa: SIM115 - the caller closes it
    if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
        os.fchmod(file.fileno(), FILE_MODE)
    return file


@contextmanager
def create_file(target: Path, directory: Path) -> Iterator[IO[bytes]]:
    """Write a temporary file in `directory`, and move it to `target` when it is complete and on disk.

    In a file store, `directory` is the root, where `remove_orphans` looks for files of killed processes.
    """
    with tempfile.NamedTemporaryFile(dir=directory, delete=False) as file, _move_when_complete(file, target):
        yield file


@contextmanager
def replace_file(target: Path) -> Iterator[IO[bytes]]:
    """Write `target` as `create_file` does, with the temporary file `<target>.new`. There must be no other writer.

    The next write replaces the temporary file of a killed process, so that none remains, for example with a secret.
    """
    path = target.with_name(f"{target.name}.new")
    path.unlink(missing_ok=True)
    with open_private(path, "xb") as file, _move_when_complete(file, target):
        yield file


@contextmanager
def _move_when_complete(file: IO[bytes], target: Path) -> Iterator[None]:
    """Move the temporary file to `target` after the block, or remove it if the block fails."""
    with remove_on_exit(Path(file.name)) as path:
        yield
        file.flush()
        os.fsync(file.fileno())
        path.chmod(FILE_MODE)
        path.replace(target)


@contextmanager
def remove_on_exit(path: Path) -> Iterator[Path]:
    """Remove a temporary file on exit, whatever fails."""
    try:
        yield path
    finally:
        path.unlink(missing_ok=True)
