"""Manage the scratch directories of a worker process, and remove those of killed workers.

Layout: `<root>/jobledger-<uid>/<host>-<pid>-<random>/<job>-<attempt>-<random>`. The last directory contains `scratch`,
which belongs to the processor, and `saved`, which holds the files that it saves.

Each process locks its own directory with flock(2). The kernel releases the lock when the process ends. Other workers on
the machine remove the directories that no process locks.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import socket
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Final

import structlog

from jobledger.ledger.system.cooperative_threads import CooperativeWork
from jobledger.workers.machine.directory_removal import remove_tree
from jobledger.workers.machine.health import MachineFailure

_log = structlog.get_logger()
_STALE_PREFIX: Final = "removing-"
"""Prefix of a directory that is being removed. It is not locked, and two processes may remove it at the same time."""
_MODE: Final = 0o700
_CHECK_BYTES: Final = 64 * 1024
_REPAIR_SECONDS: Final = 0.1
_CLOSE_SECONDS: Final = 2.0
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class ScratchDirectory:
    """The scratch space of this process. All methods except `new_attempt_path` block: call them from a thread."""

    def __init__(self, root: Path | None = None, *, min_free_mb: float = 0) -> None:
        """Initialize without creating anything.

        Args:
            root: Created if its parent exists. Default: the system's temporary directory.
            min_free_mb: Required free space in MiB.
        """
        self.root = root
        self._min_free_bytes = int(min_free_mb * 2**20)
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self.path: Path | None = None
        """The directory of this process; None if it could not be created yet."""
        self._lock = -1
        self._repaired_at = float("-inf")
        self._change_lock = threading.RLock()  # checks run in several threads
        self.repair_count = 0
        """How often the mode of a directory was wrong and restored."""

    def new_attempt_path(self, job_id: str, attempt: int) -> Path:
        """Return a path for an attempt. The caller creates it (mode 0700) if needed, and removes it afterwards.

        Raises:
            MachineFailure: There is no scratch directory.
        """
        return self._require_path() / f"{job_id}-{attempt}-{secrets.token_hex(4)}"

    def create_directories(self, *directories: Path) -> None:
        """Create the directories of an attempt, one inside another.

        Raises:
            OSError: A directory could not be created.
        """
        if time.monotonic() - self._repaired_at >= _REPAIR_SECONDS:  # a job that fails in between is released
            self.repair_modes()
        for directory in directories:
            directory.mkdir(mode=_MODE)

    def repair_modes(self) -> None:
        """Restore the modes of our directories. A job without its own mount namespace may have changed them."""
        self._repaired_at = time.monotonic()
        if self.path is None:
            return
        base = self.path.parent
        for path, is_private in ((base.parent, False), (base, True), (self.path, True)):
            with suppress(OSError):  # missing directories are reported by `check`
                mode = stat.S_IMODE(path.lstat().st_mode)
                is_damaged = mode != _MODE if is_private else not mode & stat.S_IXUSR
                if is_damaged and _is_own_directory(path):
                    path.chmod(_MODE if is_private else mode | _MODE)
                    self.repair_count += 1
                    _log.warning(
                        "restored the mode of a scratch directory; a job may have changed it",
                        directory=str(path),
                        mode=f"{mode:o}",
                    )

    def prepare(self) -> None:
        """Create and lock the directory of this process. Idempotent.

        Raises:
            MachineFailure: The directory cannot be created.
        """
        with self._change_lock:
            if self.path is not None and self.path.is_dir():
                return
            self.close()
            try:
                self._create()
            except OSError as error:  # also raised by gettempdir() if no default directory is writable
                location = self.root or os.environ.get("TMPDIR", "the system's temporary directory")
                raise MachineFailure(
                    f"No scratch directory can be created in {location}: {error.strerror}. Make it writable, or set "
                    "event_worker.scratch_dir to another directory"
                ) from error

    def _create(self) -> None:
        if self.root is not None:
            self.root.mkdir(mode=_MODE, exist_ok=True)
        base = ensure_private_directory(self.root or Path(tempfile.gettempdir()), f"jobledger-{os.getuid()}")
        # Creating and locking are two system calls. The lock of `base` hides the state between them from other workers.
        with _locked(base):
            directory = base / self._name
            directory.mkdir(mode=_MODE, exist_ok=True)
            self._lock = _try_lock(directory)
        self.path = directory

    def remove_stale(self) -> CooperativeWork[None]:
        """Remove the directories of processes that have ended. This may take long, so no check waits for it.

        Raises:
            OSError: The directories cannot be listed.
        """
        if self.path is None:
            return
        base = self.path.parent
        with _locked(base):
            stale = list(_mark_stale(base))
        for path in stale:
            yield from remove_tree(path)
        if stale:
            _log.info("removed stale scratch directories", directory=str(base), count=len(stale))

    def check(self) -> None:
        """Create, write and remove a file as a job does.

        Raises:
            MachineFailure: There is less free space than required.
            OSError: A file operation failed.
        """
        self.prepare()
        self.check_quickly()
        with tempfile.TemporaryDirectory(prefix="check-", dir=self._require_path()) as directory:
            file = Path(directory, "file")
            file.write_bytes(bytes(_CHECK_BYTES))

    def check_quickly(self) -> None:
        """Check with a few system calls that the file system is writable and has free space. Takes microseconds.

        Raises:
            MachineFailure: It is not writable or has too little space.
        """
        directory = self._require_path()
        self.repair_modes()
        try:
            status = os.statvfs(directory)
        except OSError as error:
            raise MachineFailure(f"Scratch directory {directory} cannot be read: {error.strerror}") from error
        if status.f_flag & os.ST_RDONLY:
            raise MachineFailure(
                f"Scratch directory {directory} is on a read-only file system. Make it writable, or set "
                "event_worker.scratch_dir to another directory"
            )
        free = status.f_bavail * status.f_frsize
        if free < self._min_free_bytes:
            raise MachineFailure(
                f"Scratch directory {directory} has {free / 2**20:.0f} MiB free, and "
                f"event_worker.scratch_min_free_mb requires {self._min_free_bytes / 2**20:.0f} MiB. Free some space, "
                "or set event_worker.scratch_dir to another directory"
            )

    def _require_path(self) -> Path:
        if self.path is None:
            raise MachineFailure("The scratch directory could not be created")
        return self.path

    def close(self) -> None:
        """Remove the directory of this process and release the lock.

        If the removal takes longer than `_CLOSE_SECONDS`, the next worker on this machine completes it.
        """
        with self._change_lock:
            if self.path is not None:
                deadline = time.monotonic() + _CLOSE_SECONDS
                with closing(remove_tree(self.path)) as removing:
                    for _ in removing:
                        if time.monotonic() > deadline:
                            break
                self.path = None
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1


def ensure_private_directory(root: Path, name: str) -> Path:
    """Return the directory `name` of this user below `root`. Create it if needed.

    All users can write to the system's temporary directory, so another user may have created an object with this name.
    Only a directory that we own is used, never a link. If the name is taken, another one is chosen.
    """
    path = root / name
    with suppress(FileExistsError):
        path.mkdir(mode=_MODE)
    if not _is_own_directory(path):  # search only now, because `root` may contain millions of files
        own = filter(_is_own_directory, sorted(root.glob(f"{name}-*")))
        path = next(own, None) or Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))
    path.chmod(_MODE)
    return path


def _is_own_directory(path: Path) -> bool:
    try:
        status = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid()


def _mark_stale(base: Path) -> Iterator[Path]:
    """Rename the directories of processes that have ended, and yield their new paths. Requires the lock of `base`."""
    for path in list(base.iterdir()):
        if not _is_own_directory(path):
            continue
        if path.name.startswith(_STALE_PREFIX):
            yield path
        elif (lock := _try_lock(path)) >= 0:
            try:
                marked = base / f"{_STALE_PREFIX}{path.name}"
                path.rename(marked)
                yield marked
            except OSError as error:
                _log.warning("cannot remove a stale scratch directory", path=str(path), error=str(error))
            finally:
                os.close(lock)


def _try_lock(directory: Path) -> int:
    """Lock a directory and return the descriptor; -1 if another process holds the lock or the file system has no locks.

    Without locks, no directory is considered stale.
    """
    descriptor = os.open(directory, _DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return -1
    return descriptor


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory. All holders only rename and create directories, so the wait is short."""
    descriptor = os.open(directory, _DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
