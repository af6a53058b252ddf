"""Remove directories that jobs have filled. Jobs choose the number of entries, the depth, and the modes.

The work is done in chunks (`jobledger.ledger.system.cooperative_threads`), so that a small directory never waits for
the removal of a large one.
"""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final

from jobledger.ledger.system.cooperative_threads import CooperativeWork

removal_executor = ThreadPoolExecutor(2, thread_name_prefix="removal")
ENTRIES_PER_CHUNK: Final = 500
"""Number of entries that are removed before work on another directory may continue."""
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_tree(path: Path) -> CooperativeWork[None]:
    """Remove a directory with its content, as far as possible. Do not follow links.

    Nested directories are moved up to the first level and emptied there. Therefore, a tree of any depth and width needs
    few descriptors, and no memory for names.
    """
    with suppress(OSError):
        _make_accessible(path)
        top = os.open(path, _DIRECTORY)
        try:
            progress, entries = True, 0
            while progress:  # directories may have moved up while the entries were read
                progress = False
                for removed in _remove_entries(top):
                    progress = progress or removed
                    entries += 1
                    if entries % ENTRIES_PER_CHUNK == 0:
                        yield
        finally:
            os.close(top)
        path.rmdir()


def _remove_entries(top: int) -> Iterator[bool]:
    """Remove the entries of a directory and of its subdirectories. Yield for each entry whether that succeeded."""
    with os.scandir(top) as entries:
        for entry in entries:
            if _unlink(entry.name, top):
                yield True
            else:
                yield from _remove_directory(entry.name, top)


def _remove_directory(name: str, top: int) -> Iterator[bool]:
    removed = False
    with suppress(OSError):
        _make_accessible(name, top)
        directory = os.open(name, _DIRECTORY, dir_fd=top)
        try:
            with os.scandir(directory) as entries:
                for entry in entries:
                    yield _unlink(entry.name, directory) or _move_up(entry.name, directory, top)
        finally:
            os.close(directory)
        os.rmdir(name, dir_fd=top)
        removed = True
    yield removed


def _unlink(name: str, directory: int) -> bool:
    try:
        os.unlink(name, dir_fd=directory)
    except OSError:  # usually because it is a directory
        return False
    return True


def _move_up(name: str, directory: int, top: int) -> bool:
    try:
        _make_accessible(name, directory)  # moving a directory requires that it is writable
        os.rename(name, secrets.token_hex(8), src_dir_fd=directory, dst_dir_fd=top)
    except OSError:
        return False
    return True


def _make_accessible(path: str | Path, parent: int | None = None) -> None:
    if stat.S_ISDIR(os.stat(path, dir_fd=parent, follow_symlinks=False).st_mode):
        os.chmod(path, 0o700, dir_fd=parent)
