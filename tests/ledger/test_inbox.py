"""What a job can do to its inbox. It cannot reach another job's file, and each fault is the job's own error."""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jobledger.ledger.domain.errors import FileLost, FileStoreUnavailable, FileTooLarge
from jobledger.ledger.domain.limits import MAX_FILE_BYTES
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import FileStore, file_store_executor
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.files.inbox import HASH_CHUNK_BYTES, InboxFile
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.system.cooperative_threads import CooperativeWork, run_cooperatively
from tests.support.polling import DEADLINE_SECONDS

FOREIGN = b"the result of another job"
DIGEST = hashlib.sha256(FOREIGN).hexdigest()


@pytest.fixture(params=["directory", "gridfs"])
async def store(
    request: pytest.FixtureRequest, mongodb_uri: str, db_name: str, tmp_path: Path
) -> AsyncIterator[FileStore]:
    """A store with a file of another job."""
    foreign_inbox = tmp_path / "other" / "saved"
    foreign_inbox.parent.mkdir()
    DirectoryStore(foreign_inbox).put_bytes(FOREIGN)
    if request.param == "directory":
        directory_store = DirectoryStore(tmp_path / "results")
        directory_store.prepare()
        await directory_store.ingest(foreign_inbox, DIGEST)
        yield directory_store
        return
    connection = Connection(mongodb_uri, db_name)
    async with connection.create_client() as client:
        gridfs = GridFSStore(client[connection.db_name])
        await gridfs.prepare()
        await gridfs.ingest(foreign_inbox, DIGEST)
        yield gridfs


@pytest.fixture
def saved_path(tmp_path: Path) -> Path:
    """The path at which the job's file of this digest belongs."""
    inbox = tmp_path / "attempt" / "saved"
    inbox.parent.mkdir()
    return DirectoryStore(inbox).get_path(DIGEST)


# Manipulations ----------------------------------------------------------------------------------------------------


def get_foreign_file(saved_path: Path) -> Path:
    """Return the path of the foreign file in a directory store, which a job can only guess. Create it for GridFS."""
    place = DirectoryStore(saved_path.parents[3] / "results").get_path(DIGEST)
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        place.write_bytes(FOREIGN)
    return place


def create_nothing(saved_path: Path) -> None:
    """Name the digest of a foreign file, without a file."""


def link_attempt_directory(saved_path: Path) -> None:
    saved_path.parents[2].rmdir()
    (saved_path.parents[3] / "planted").mkdir()
    (saved_path.parents[3] / "planted" / "saved").symlink_to(get_foreign_file(saved_path).parents[1])
    saved_path.parents[2].symlink_to(saved_path.parents[3] / "planted")


def link_inbox(saved_path: Path) -> None:
    saved_path.parents[1].symlink_to(get_foreign_file(saved_path).parents[1])


def link_digest_directory(saved_path: Path) -> None:
    saved_path.parents[1].mkdir()
    saved_path.parent.symlink_to(get_foreign_file(saved_path).parent)


def link_file(saved_path: Path) -> None:
    saved_path.parent.mkdir(parents=True)
    saved_path.symlink_to(get_foreign_file(saved_path))


def link_file_to_itself(saved_path: Path) -> None:
    saved_path.parent.mkdir(parents=True)
    saved_path.symlink_to(saved_path)


def create_file_as_inbox(saved_path: Path) -> None:
    saved_path.parents[1].write_bytes(FOREIGN)


def create_file_as_digest_directory(saved_path: Path) -> None:
    saved_path.parents[1].mkdir()
    saved_path.parent.write_bytes(FOREIGN)


def create_fifo_as_digest_directory(saved_path: Path) -> None:
    saved_path.parents[1].mkdir()
    os.mkfifo(saved_path.parent)


def create_directory(saved_path: Path) -> None:
    saved_path.mkdir(parents=True)


def create_fifo(saved_path: Path) -> None:
    saved_path.parent.mkdir(parents=True)
    os.mkfifo(saved_path)


def bind_socket(saved_path: Path) -> None:
    saved_path.parent.mkdir(parents=True)
    directory_fd = os.open(saved_path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{directory_fd}/{saved_path.name}")  # the path itself is too long for a socket
    os.close(directory_fd)


def write_empty_file(saved_path: Path) -> None:
    saved_path.parent.mkdir(parents=True)
    saved_path.write_bytes(b"")


def write_other_content(saved_path: Path) -> None:
    saved_path.parent.mkdir(parents=True)
    saved_path.write_bytes(FOREIGN.upper())


def write_longer_content(saved_path: Path) -> None:
    saved_path.parent.mkdir(parents=True)
    saved_path.write_bytes(FOREIGN + b"\0")


def write_sparse_file(saved_path: Path) -> None:
    write_other_content(saved_path)
    os.truncate(saved_path, MAX_FILE_BYTES + 1)


def lease_file(saved_path: Path) -> None:
    saved_path.parent.mkdir(parents=True)
    saved_path.write_bytes(FOREIGN)
    leased_file = os.open(saved_path, os.O_RDWR)  # stays open: a process that opens a leased file has to wait
    fcntl.fcntl(leased_file, fcntl.F_SETSIG, signal.SIGURG)  # this signal is ignored
    fcntl.fcntl(leased_file, fcntl.F_SETLEASE, fcntl.F_WRLCK)


MANIPULATIONS: list[Callable[[Path], None]] = [
    *(create_nothing, link_attempt_directory, link_inbox, link_digest_directory, link_file, link_file_to_itself),
    *(
        create_file_as_inbox,
        create_file_as_digest_directory,
        create_fifo_as_digest_directory,
        create_directory,
        create_fifo,
        bind_socket,
    ),
    *(write_empty_file, write_other_content, write_longer_content, write_sparse_file, lease_file),
]


@pytest.mark.parametrize("manipulate", MANIPULATIONS)
async def test_ingest_of_manipulated_inbox_fails_and_keeps_foreign_file(
    store: FileStore, saved_path: Path, manipulate: Callable[[Path], None]
) -> None:
    try:
        manipulate(saved_path)
    except OSError as error:
        pytest.skip(f"this file system does not support it ({error}): TMPDIR=/var/tmp make test")
    async with asyncio.timeout(DEADLINE_SECONDS):
        with pytest.raises(FileLost):
            await store.ingest(saved_path.parents[1], DIGEST)
        await store.verify(DIGEST, len(FOREIGN))


UNPRIVILEGED_PROGRAM = """
import asyncio, os, sys
from pathlib import Path
from jobledger.ledger.domain.errors import FileLost
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.system.process_attributes import drop_capabilities

drop_capabilities()  # so that modes apply to root, too
root = Path(sys.argv[1])
results = DirectoryStore(root / "results")
results.prepare()
for number, (level, mode) in enumerate((level, mode) for level in range(4) for mode in (0o000, 0o400, 0o100, 0o500)):
    inbox = root / f"attempt-{number}" / "saved"
    inbox.parent.mkdir()
    digest = DirectoryStore(inbox).put_bytes(str(number).encode()).sha256
    path = DirectoryStore(inbox).get_path(digest)
    [path, *path.parents][level].chmod(mode)
    try:
        asyncio.run(results.ingest(inbox, digest))
    except FileLost:
        print(level, oct(mode), "lost")
    else:
        print(level, oct(mode), "stored")
"""


async def test_file_modes_in_inbox_cause_only_file_lost(tmp_path: Path) -> None:
    process = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", UNPRIVILEGED_PROGRAM, str(tmp_path)], capture_output=True, text=True
    )
    lines = process.stdout.split("\n")[:-1]
    assert (process.returncode, len(lines)) == (0, 16), process.stderr
    stored = {line.removesuffix(" stored") for line in lines if line.endswith("stored")}
    readable = {"0 0o400", "0 0o500"}
    searchable = {f"{level} {mode}" for level in (1, 2, 3) for mode in ("0o100", "0o500")}
    assert stored == readable | searchable


async def test_unsearchable_scratch_directory_raises_unavailable(
    saved_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The worker repairs its mode: see `Scratch.repair`."""
    real = os.open

    def failing(path: object, *arguments: object, **named: object) -> int:
        if path == saved_path.parents[2]:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(FileStoreUnavailable):
        InboxFile(saved_path)


async def test_put_file_above_size_limit_is_rejected(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, MAX_FILE_BYTES + 1)
    with pytest.raises(FileTooLarge, match="At most"):
        DirectoryStore(tmp_path / "saved").put_file(large)


# Cooperative threads ----------------------------------------------------------------------------------------------


async def test_large_files_do_not_delay_small_file_or_cancellation(
    store: FileStore, saved_path: Path, tmp_path: Path
) -> None:
    """A small file is stored before large files that were started earlier. A cancelled call stops."""
    large = []
    for number in range(12):
        inbox = tmp_path / f"attempt-{number}" / "saved"
        path = DirectoryStore(inbox).get_path(hashlib.sha256(str(number).encode()).hexdigest())
        path.parent.mkdir(parents=True)
        path.touch()
        os.truncate(path, MAX_FILE_BYTES)
        large.append(asyncio.create_task(store.ingest(inbox, path.name)))
    await asyncio.sleep(0.1)
    small = DirectoryStore(saved_path.parents[1]).put_bytes(b"small")
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert await store.ingest(saved_path.parents[1], small.sha256) == small.size
        for task in large:
            task.cancel()
        await asyncio.gather(*large, return_exceptions=True)
        assert all(task.cancelled() for task in large)
        await asyncio.gather(
            *(run_cooperatively(work_once(), file_store_executor) for _ in range(8))
        )  # all threads are free again


def work_once() -> CooperativeWork[None]:
    threading.Event().wait(0.01)
    yield from ()


async def test_cancelled_caller_closes_cooperative_work(tmp_path: Path) -> None:
    started, closed = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> CooperativeWork[None]:
        try:
            while True:
                loop.call_soon_threadsafe(started.set)
                yield
        finally:
            closed.set()

    with ThreadPoolExecutor(1) as threads:
        task = asyncio.create_task(run_cooperatively(work(), threads))
        await started.wait()
        task.cancel()
        await asyncio.wait({task})
        assert await asyncio.to_thread(closed.wait, DEADLINE_SECONDS)


async def test_large_file_is_stored_completely(store: FileStore, saved_path: Path) -> None:
    content = os.urandom(2 * HASH_CHUNK_BYTES + 5)
    stored = DirectoryStore(saved_path.parents[1]).put_bytes(content)
    for _ in range(2):  # first new, then already stored
        assert await store.ingest(saved_path.parents[1], stored.sha256) == len(content)
        await store.verify(stored.sha256, len(content))
        assert not DirectoryStore(saved_path.parents[1]).get_path(stored.sha256).exists()
        await asyncio.to_thread(DirectoryStore(saved_path.parents[1]).put_bytes, content)
