"""workers: the scratch directories of one worker process, and removal of those that killed workers left behind.

Layout: `<root>/jobledger-<uid>/<host>-<pid>-<random>/<job>-<attempt>-<random>`. In the last one, `scratch` belongs to
the processor, and `saved` holds the files that it saves. Each process holds a lock (flock) on its own directory. The
kernel releases the lock when the process dies, however it dies, so other workers of the machine remove exactly the
directories that nobody holds. Names and ages decide nothing.
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
from jobledger.workers.directory_removal import remove_tree
from jobledger.workers.machine_health import MachineFailure

_log = structlog.get_logger()
_DEAD: Final = "removing-"
"""Prefix of a directory that is being removed. Nobody locks it; two processes may remove it at the same time."""
_MODE: Final = 0o700
_CHECK_BYTES: Final = 64 * 1024
_REPAIR_SECONDS: Final = 0.1
_CLOSE_SECONDS: Final = 2.0
_DIRECTORY: Final = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


class ScratchDirectory:
    """Scratch space of this process. All methods except `for_attempt` block: call them from a thread."""

    def __init__(self, root: Path | None = None, *, min_free_mb: float = 0) -> None:
        """`root` is created if its parent exists; None: the system's temporary directory. `min_free_mb` in MiB."""
        self.root = root
        self._min_free_bytes = int(min_free_mb * 2**20)
        self._name = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._directory: Path | None = None
        self._lock = -1
        self._repaired_at = float("-inf")
        self._changing = threading.RLock()  # checks run in several threads
        self.repair_count = 0
        """How often a directory of ours had lost its mode and got it back."""

    @property
    def path(self) -> Path | None:
        """The directory of this process; None if it could not be created yet."""
        return self._directory

    def new_attempt_path(self, job_id: str, attempt: int) -> Path:
        """Return a path for an attempt. The caller creates it (mode 0700) if needed, and removes it afterwards.

        Raises:
            MachineTrouble: there is no scratch directory.
        """
        return self._required() / f"{job_id}-{attempt}-{secrets.token_hex(4)}"

    def create_directories(self, *directories: Path) -> None:
        """Create directories of an attempt, one inside another.

        Raises:
            OSError: that failed.
        """
        if time.monotonic() - self._repaired_at >= _REPAIR_SECONDS:  # a job that comes in between is given back
            self.repair_modes()
        for directory in directories:
            directory.mkdir(mode=_MODE)

    def repair_modes(self) -> None:
        """Give our directories their mode back: a job may have changed it, if it has no mounts of its own."""
        self._repaired_at = time.monotonic()
        if self._directory is None:
            return
        base = self._directory.parent
        for path, is_private in ((base.parent, False), (base, True), (self._directory, True)):
            with suppress(OSError):  # it is not there: `check` says so
                mode = stat.S_IMODE(path.lstat().st_mode)
                is_damaged = mode != _MODE if is_private else not mode & stat.S_IXUSR
                if is_damaged and _is_ours(path):
                    path.chmod(_MODE if is_private else mode | _MODE)
                    self.repair_count += 1
                    _log.warning(
                        "a scratch directory had lost its mode and got it back; a job may have changed it",
                        directory=str(path),
                        mode=f"{mode:o}",
                    )

    def prepare(self) -> None:
        """Create and lock the directory of this process. Safe to repeat.

        Raises:
            MachineTrouble: the directory cannot be created.
        """
        with self._changing:
            if self._directory is not None and self._directory.is_dir():
                return
            self.close()
            try:
                self._create()
            except OSError as error:  # also of `gettempdir`, if none of the usual directories is writable
                place = self.root or os.environ.get("TMPDIR", "the system's temporary directory")
                raise MachineFailure(
                    f"No scratch directory can be created in {place}: {error.strerror}. Make it writable, or set "
                    "event_worker.scratch_dir to another directory"
                ) from error

    def _create(self) -> None:
        if self.root is not None:
            self.root.mkdir(mode=0o700, exist_ok=True)
        base = _base(self.root or Path(tempfile.gettempdir()))
        # Creating and locking are two system calls. Under the lock of `base` no cleaner sees what is between them.
        with _locked(base):
            directory = base / self._name
            directory.mkdir(mode=0o700, exist_ok=True)
            self._lock = _try_lock(directory)
        self._directory = directory

    def remove_stale(self) -> CooperativeWork[None]:
        """Remove the directories of dead processes. That may take long, so no check waits for it.

        Raises:
            OSError: they cannot be listed.
        """
        if self._directory is None:
            return
        base = self._directory.parent
        with _locked(base):
            dead = list(_mark_stale(base))
        for path in dead:
            yield from remove_tree(path)
        if dead:
            _log.info("removed scratch directories of dead workers", directory=str(base), count=len(dead))

    def check(self) -> None:
        """Create, write and remove a file the way a job does.

        Raises:
            MachineTrouble: there is less free space than required.
            OSError: that failed.
        """
        self.prepare()
        self.check_quickly()
        with tempfile.TemporaryDirectory(prefix="check-", dir=self._required()) as directory:
            file = Path(directory, "file")
            file.write_bytes(bytes(_CHECK_BYTES))

    def check_quickly(self) -> None:
        """Check what a few system calls can tell: the file system is writable and has room. Takes microseconds.

        Raises:
            MachineTrouble: it is not, or has not.
        """
        directory = self._required()
        self.repair_modes()
        try:
            found = os.statvfs(directory)
        except OSError as error:
            raise MachineFailure(f"Scratch directory {directory} cannot be read: {error.strerror}") from error
        if found.f_flag & os.ST_RDONLY:
            raise MachineFailure(
                f"Scratch directory {directory} is on a read-only file system. Make it writable, or set "
                "event_worker.scratch_dir to another directory"
            )
        free = found.f_bavail * found.f_frsize
        if free < self._min_free_bytes:
            raise MachineFailure(
                f"Scratch directory {directory} has {free / 2**20:.0f} MiB free, and "
                f"event_worker.scratch_min_free_mb requires {self._min_free_bytes / 2**20:.0f} MiB. Free some space, "
                "or set event_worker.scratch_dir to another directory"
            )

    def _required(self) -> Path:
        if self._directory is None:
            raise MachineFailure("The scratch directory could not be created yet")
        return self._directory

    def close(self) -> None:
        """Remove the directory of this process, and release the lock.

        What cannot be removed within a few seconds is left to the next worker on this machine.
        """
        with self._changing:
            if self._directory is not None:
                deadline = time.monotonic() + _CLOSE_SECONDS
                with closing(remove_tree(self._directory)) as removing:
                    for _ in removing:
                        if time.monotonic() > deadline:
                            break
                self._directory = None
            if self._lock >= 0:
                os.close(self._lock)
                self._lock = -1


def _base(root: Path) -> Path:
    """Return this user's directory below `root`, and create it if needed."""
    return ensure_private_directory(root, f"jobledger-{os.getuid()}")


def ensure_private_directory(root: Path, name: str) -> Path:
    """Return the directory `name` of this user below `root`, and create it if needed.

    The system's temporary directory is open to all users, and another one may have created an object of this name. Only
    a directory of our own is used, never a link; next to a foreign object another name is chosen.
    """
    with suppress(FileExistsError):
        (root / name).mkdir(mode=0o700)
    for path in (root / name, *sorted(root.glob(f"{name}-*"))):
        if _is_ours(path):
            path.chmod(0o700)
            return path
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=root))


def _is_ours(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid()


def _mark_stale(base: Path) -> Iterator[Path]:
    """Rename the directories whose process is dead, and yield their new paths. Call with the lock of `base`."""
    for path in list(base.iterdir()):
        if not _is_ours(path):
            continue
        if path.name.startswith(_DEAD):
            yield path
        elif (lock := _try_lock(path)) >= 0:
            try:
                marked = base / f"{_DEAD}{path.name}"
                path.rename(marked)
                yield marked
            except OSError as error:
                _log.warning("a dead worker's scratch directory stays", path=str(path), error=str(error))
            finally:
                os.close(lock)


def _try_lock(directory: Path) -> int:
    """Lock a directory; return the descriptor, or -1 if another process holds it or the file system has no locks.

    Without locks no directory is ever taken for a dead one.
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
    """Hold the lock of a directory inside the block. Its holders only rename and create, so nobody waits for long."""
    descriptor = os.open(directory, _DIRECTORY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
