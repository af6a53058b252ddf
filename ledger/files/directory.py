"""A file store in a directory on a disk that all processes share. The other store is in `gridfs`."""

from __future__ import annotations

import asyncio
import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from jobledger.ledger.domain.errors import (
    FileLost,
    FileStoreUnavailable,
    FileTooLarge,
    ResourceUnavailable,
    classify_os_error,
)
from jobledger.ledger.domain.limits import MAX_FILE_BYTES
from jobledger.ledger.domain.result_files import is_sha256
from jobledger.ledger.files.file_store import ORPHAN_AGE_SECONDS, FileStore, StoredFile, file_store_executor
from jobledger.ledger.files.inbox import HASH_CHUNK_BYTES, InboxFile, classify_open_error
from jobledger.ledger.files.local_files import (
    OPEN_FLAGS,
    LocalFile,
    has_content,
    move_file,
    open_regular_file,
    sync_directory,
    translate_read_errors,
)
from jobledger.ledger.files.store_marker import StoreMarker
from jobledger.ledger.system.cooperative_threads import CooperativeWork, run_cooperatively, run_to_completion
from jobledger.ledger.system.private_files import DIRECTORY_MODE, create_file, make_private_directory, remove_on_exit

_CHECK_BYTES = 64 * 1024
_TEMPORARY_NAME = re.compile(r"tmp[a-z0-9_]{8}")
"""Names that `tempfile` chooses."""


class DirectoryStore(FileStore):
    """A directory of files named by digest, on a disk that all processes share.

    A file is complete and on disk before it gets its name. So a named file is complete, whichever process crashes.
    Methods without `async` block: call them from a thread.
    """

    def __init__(self, root: Path, *, is_durable: bool = True, marker: StoreMarker | None = None) -> None:
        """Use a directory, which need not exist yet.

        Args:
            root: The directory.
            is_durable: Whether a file must survive a power failure once it has its name. An inbox does not need this.
            marker: Identifies the directory. None: any directory is accepted, as for an inbox.
        """
        super().__init__()
        self.root = root
        self._durable = is_durable
        self._marker = marker

    def prepare(self) -> None:
        """Check that this user can write to the directory. Create it if it is a new store.

        Raises:
            ConfigurationError: It cannot be created or written to.
            ResourceUnavailable: It is missing, or its disk is full, read-only or not mounted. Transient.
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
            FileStoreUnavailable: It is missing, or another directory is in its place.
            OSError: It cannot be read.
        """
        if self._marker is not None:
            self._marker.check_directory(self.root)

    def check_writable(self) -> None:
        self._create_if_new()
        with tempfile.TemporaryFile(dir=self.root) as file:
            file.write(bytes(_CHECK_BYTES))
            file.flush()
            os.fsync(file.fileno())

    async def ingest(self, inbox: Path, sha256: str) -> int:
        return await run_cooperatively(self._copy_from_inbox(inbox, sha256), file_store_executor)

    def _copy_from_inbox(self, inbox: Path, sha256: str) -> CooperativeWork[int]:
        """Copy a file, even within one file system.

        The job may still have it open, and could change the content after its digest was checked.
        """
        target = self.get_path(sha256)
        with InboxFile(DirectoryStore(inbox).get_path(sha256)) as source:
            yield from source.verify()
            try:
                self.check_marker()
                yield from self._write(source, target)
                self.check_marker()  # the disk may have been unmounted meanwhile, so the file is on another one
            except OSError as error:
                where = error.filename or self.root
                raise FileStoreUnavailable(f"results.store: cannot write to {where}: {error.strerror}") from error
            source.remove()
            return source.size

    def _write(self, source: InboxFile, target: Path) -> CooperativeWork[None]:
        if (yield from has_content(target, target.name, source.size)):
            sync_directory(target.parent)  # the process that wrote it may not have done so yet
            return
        self._make_directory(target.parent)
        with create_file(target, self.root) as copy:
            for piece in source.iterate_chunks():  # its digest is checked again: the job may have changed it
                copy.write(piece)
                if source.size > HASH_CHUNK_BYTES:
                    copy.flush()
                    os.fdatasync(copy.fileno())  # after each chunk, so that no chunk takes much longer than the others
                    yield
        sync_directory(target.parent)

    async def remove_orphans(self) -> int:
        # All temporary files are in the root directory, which has few other entries.
        return await asyncio.to_thread(self._remove_orphans)

    def _remove_orphans(self) -> int:
        removed = 0
        with suppress(OSError):  # next time
            for entry in os.scandir(self.root):
                if not _TEMPORARY_NAME.fullmatch(entry.name) or not entry.is_file(follow_symlinks=False):
                    continue
                with suppress(OSError):  # another worker was faster
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > ORPHAN_AGE_SECONDS:
                        os.unlink(entry.path)  # noqa: PTH108 - scandir's own paths
                        removed += 1
        return removed

    def put_bytes(self, content: bytes) -> StoredFile:
        """Store bytes."""
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=self.root, delete=False) as file, remove_on_exit(Path(file.name)) as path:
            file.write(content)
            file.flush()
            return self.put_file(path)

    def put_file(self, path: Path) -> StoredFile:
        """Move a file into the store, or copy it if it is on another file system.

        Raises:
            NotARegularFile: It is a directory, a pipe, a socket or a device.
            FileTooLarge: It is larger than `limits.MAX_FILE_BYTES`.
            OSError: It cannot be read, or the store cannot be written to.
        """
        path = Path(os.fspath(path))  # a subclass might do anything
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        with open_regular_file(path) as file:
            if (size := os.fstat(file.fileno()).st_size) > MAX_FILE_BYTES:
                raise FileTooLarge(f"'{path}' has {size} bytes. At most {MAX_FILE_BYTES} are allowed")
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            size = file.seek(0, os.SEEK_END)
            if self._durable:
                os.fsync(file.fileno())
            target = self.get_path(sha256)
            if not run_to_completion(has_content(target, sha256, size)):
                self._make_directory(target.parent)
                move_file(path, file, target)
                if self._durable:
                    sync_directory(target.parent)
        if path.resolve() != target.resolve():
            path.unlink(missing_ok=True)
        return StoredFile(sha256, size)

    def _make_directory(self, directory: Path) -> None:
        if not directory.exists():
            # Do not create its parents: if the store is not mounted, its directory must not appear.
            directory.mkdir(mode=DIRECTORY_MODE, exist_ok=True)
            if self._durable:
                sync_directory(directory.parent)

    def get_path(self, sha256: str) -> Path:
        """Return the path of a file, whether or not it exists."""
        if not is_sha256(sha256):
            raise ValueError(f"{sha256!r} is not a SHA-256 in lower-case hex")
        return self.root / sha256[:2] / sha256

    async def list_files(self) -> AsyncIterator[StoredFile]:
        await asyncio.to_thread(self.check_marker)
        for number in range(256):
            for found in await asyncio.to_thread(self._list_directory, self.root / f"{number:02x}"):
                yield found

    @staticmethod
    def _list_directory(directory: Path) -> list[StoredFile]:
        try:
            with os.scandir(directory) as entries:
                return sorted(
                    StoredFile(entry.name, entry.stat(follow_symlinks=False).st_size)
                    for entry in entries
                    if is_sha256(entry.name)
                )
        except FileNotFoundError:
            return []

    async def begin_removal(self, sha256: str, removal_id: str) -> datetime | None:
        return await asyncio.to_thread(self._begin_removal, sha256, removal_id)

    def _begin_removal(self, sha256: str, removal_id: str) -> datetime | None:
        self.check_marker()
        target, renamed = self.get_path(sha256), self._get_removal_path(sha256, removal_id)
        for path in (target, *target.parent.glob(f"{sha256}.removed-*")):
            with suppress(FileNotFoundError):
                path.replace(renamed)
                return datetime.fromtimestamp(renamed.stat().st_mtime, UTC)
        return None

    async def cancel_removal(self, sha256: str, removal_id: str) -> None:
        await asyncio.to_thread(self._end_removal, sha256, removal_id, is_cancelled=True)

    async def finish_removal(self, sha256: str, removal_id: str) -> None:
        await asyncio.to_thread(self._end_removal, sha256, removal_id, is_cancelled=False)

    def _end_removal(self, sha256: str, removal_id: str, *, is_cancelled: bool) -> None:
        self.check_marker()
        renamed = self._get_removal_path(sha256, removal_id)
        with suppress(FileNotFoundError):
            if is_cancelled:  # the content may have been saved again meanwhile: either copy is valid
                renamed.replace(self.get_path(sha256))
            else:
                renamed.unlink()

    def _get_removal_path(self, sha256: str, removal_id: str) -> Path:
        return self.get_path(sha256).with_suffix(f".removed-{removal_id}")

    async def _open_unchecked(self, sha256: str) -> LocalFile:
        return await asyncio.to_thread(self._open, sha256)

    def _open(self, sha256: str) -> LocalFile:
        path = self.get_path(sha256)
        try:
            directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                descriptor = os.open(path.name, OPEN_FLAGS | os.O_NOFOLLOW, dir_fd=directory)
            finally:
                os.close(directory)
        except OSError as error:
            with translate_read_errors(path):
                self.check_marker()
            raise classify_open_error(path, error) from error
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            os.close(descriptor)
            raise FileLost(f"{path} is not a regular file")
        return LocalFile(path, descriptor, found)
