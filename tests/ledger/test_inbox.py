"""What a job can do to its inbox. Nothing of it reaches another job's file, and all of it is the job's own error."""

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

FOREIGN = b"the result of another job"
DIGEST = hashlib.sha256(FOREIGN).hexdigest()


@pytest.fixture(params=["directory", "gridfs"])
async def store(
    request: pytest.FixtureRequest, mongodb_uri: str, db_name: str, tmp_path: Path
) -> AsyncIterator[FileStore]:
    """A store that has a file of another job."""
    own = tmp_path / "other" / "saved"
    own.parent.mkdir()
    DirectoryStore(own).put_bytes(FOREIGN)
    if request.param == "directory":
        directory = DirectoryStore(tmp_path / "results")
        directory.prepare()
        await directory.ingest(own, DIGEST)
        yield directory
        return
    connection = Connection(mongodb_uri, db_name)
    async with connection.client() as client:
        gridfs = GridFSStore(client[connection.db_name])
        await gridfs.prepare()
        await gridfs.ingest(own, DIGEST)
        yield gridfs


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Where the job's file of this digest should be."""
    inbox = tmp_path / "attempt" / "saved"
    inbox.parent.mkdir()
    return DirectoryStore(inbox).path(DIGEST)


# What a job does --------------------------------------------------------------------------------------------------


def stores(saved: Path) -> Path:
    """Where a directory store has the foreign file, which the job only guesses; else a place like that."""
    place = DirectoryStore(saved.parents[3] / "results").path(DIGEST)
    place.parent.mkdir(parents=True, exist_ok=True)
    if not place.exists():
        place.write_bytes(FOREIGN)
    return place


def nothing(saved: Path) -> None:
    """The digest of a foreign file, and no file."""


def link_for_the_attempt(saved: Path) -> None:
    saved.parents[2].rmdir()
    (saved.parents[3] / "planted").mkdir()
    (saved.parents[3] / "planted" / "saved").symlink_to(stores(saved).parents[1])
    saved.parents[2].symlink_to(saved.parents[3] / "planted")


def link_for_the_inbox(saved: Path) -> None:
    saved.parents[1].symlink_to(stores(saved).parents[1])


def link_for_the_directory(saved: Path) -> None:
    saved.parents[1].mkdir()
    saved.parent.symlink_to(stores(saved).parent)


def link_for_the_file(saved: Path) -> None:
    saved.parent.mkdir(parents=True)
    saved.symlink_to(stores(saved))


def link_to_itself(saved: Path) -> None:
    saved.parent.mkdir(parents=True)
    saved.symlink_to(saved)


def file_for_the_inbox(saved: Path) -> None:
    saved.parents[1].write_bytes(FOREIGN)


def file_for_the_directory(saved: Path) -> None:
    saved.parents[1].mkdir()
    saved.parent.write_bytes(FOREIGN)


def fifo_for_the_directory(saved: Path) -> None:
    saved.parents[1].mkdir()
    os.mkfifo(saved.parent)


def directory(saved: Path) -> None:
    saved.mkdir(parents=True)


def fifo(saved: Path) -> None:
    saved.parent.mkdir(parents=True)
    os.mkfifo(saved)


def bound_socket(saved: Path) -> None:
    saved.parent.mkdir(parents=True)
    here = os.open(saved.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(f"/proc/self/fd/{here}/{saved.name}")  # the path itself is too long
    os.close(here)


def empty(saved: Path) -> None:
    saved.parent.mkdir(parents=True)
    saved.write_bytes(b"")


def other_content(saved: Path) -> None:
    saved.parent.mkdir(parents=True)
    saved.write_bytes(FOREIGN.upper())


def longer(saved: Path) -> None:
    saved.parent.mkdir(parents=True)
    saved.write_bytes(FOREIGN + b"\0")


def sparse(saved: Path) -> None:
    other_content(saved)
    os.truncate(saved, MAX_FILE_BYTES + 1)


def leased(saved: Path) -> None:
    saved.parent.mkdir(parents=True)
    saved.write_bytes(FOREIGN)
    held = os.open(saved, os.O_RDWR)  # for as long as this process lives: a lease makes who opens the file wait
    fcntl.fcntl(held, fcntl.F_SETSIG, signal.SIGURG)  # which is ignored
    fcntl.fcntl(held, fcntl.F_SETLEASE, fcntl.F_WRLCK)


DEEDS: list[Callable[[Path], None]] = [
    *(nothing, link_for_the_attempt, link_for_the_inbox, link_for_the_directory, link_for_the_file, link_to_itself),
    *(file_for_the_inbox, file_for_the_directory, fifo_for_the_directory, directory, fifo, bound_socket),
    *(empty, other_content, longer, sparse, leased),
]


@pytest.mark.parametrize("deed", DEEDS)
async def test_job_that_names_a_foreign_file_gets_an_error_and_the_file_stays(
    store: FileStore, saved: Path, deed: Callable[[Path], None]
) -> None:
    try:
        deed(saved)
    except OSError as error:
        pytest.skip(f"this file system cannot do that: {error}")
    async with asyncio.timeout(10):
        with pytest.raises(FileLost):
            await store.ingest(saved.parents[1], DIGEST)
        await store.verify(DIGEST, len(FOREIGN))


WITHOUT_RIGHTS = """
import asyncio, os, sys
from pathlib import Path
from jobledger.ledger.domain.errors import FileLost
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.workers.sandbox.restrictions import drop_capabilities

drop_capabilities()  # so that modes count for root, too
root = Path(sys.argv[1])
results = DirectoryStore(root / "results")
results.prepare()
for number, (level, mode) in enumerate((level, mode) for level in range(4) for mode in (0o000, 0o400, 0o100, 0o500)):
    inbox = root / f"attempt-{number}" / "saved"
    inbox.parent.mkdir()
    digest = DirectoryStore(inbox).put_bytes(str(number).encode()).sha256
    path = DirectoryStore(inbox).path(digest)
    [path, *path.parents][level].chmod(mode)
    try:
        asyncio.run(results.ingest(inbox, digest))
    except FileLost:
        print(level, oct(mode), "lost")
    else:
        print(level, oct(mode), "stored")
"""


async def test_modes_in_an_inbox_are_no_trouble_of_the_machine(tmp_path: Path) -> None:
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", WITHOUT_RIGHTS, str(tmp_path)], capture_output=True, text=True
    )
    lines = done.stdout.split("\n")[:-1]
    assert (done.returncode, len(lines)) == (0, 16), done.stderr
    stored = {line.removesuffix(" stored") for line in lines if line.endswith("stored")}
    readable = {"0 0o400", "0 0o500"}
    searchable = {f"{level} {mode}" for level in (1, 2, 3) for mode in ("0o100", "0o500")}
    assert stored == readable | searchable


async def test_inbox_of_a_scratch_directory_that_cannot_be_searched_is_waited_for(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mode is repaired by the worker: see `Scratch.repair`."""
    real = os.open

    def failing(path: object, *arguments: object, **named: object) -> int:
        if path == saved.parents[2]:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **named)  # type: ignore[arg-type]  # passed on

    monkeypatch.setattr(os, "open", failing)
    with pytest.raises(FileStoreUnavailable):
        InboxFile(saved)


async def test_file_larger_than_allowed_is_not_saved(tmp_path: Path) -> None:
    large = tmp_path / "large"
    large.touch()
    os.truncate(large, MAX_FILE_BYTES + 1)
    with pytest.raises(FileTooLarge, match="At most"):
        DirectoryStore(tmp_path / "saved").put_file(large)


# Turns ------------------------------------------------------------------------------------------------------------


async def test_large_files_occupy_no_thread_of_the_store_for_long(
    store: FileStore, saved: Path, tmp_path: Path
) -> None:
    """As many large files as you like are taken over; a small one is done before them, and who is cancelled stops."""
    large = []
    for number in range(12):
        inbox = tmp_path / f"attempt-{number}" / "saved"
        path = DirectoryStore(inbox).path(hashlib.sha256(str(number).encode()).hexdigest())
        path.parent.mkdir(parents=True)
        path.touch()
        os.truncate(path, MAX_FILE_BYTES)
        large.append(asyncio.create_task(store.ingest(inbox, path.name)))
    await asyncio.sleep(0.1)
    small = DirectoryStore(saved.parents[1]).put_bytes(b"small")
    async with asyncio.timeout(5):
        assert await store.ingest(saved.parents[1], small.sha256) == small.size
        for task in large:
            task.cancel()
        await asyncio.gather(*large, return_exceptions=True)
        assert all(task.cancelled() for task in large)
        await asyncio.gather(
            *(run_cooperatively(one_piece(), file_store_executor) for _ in range(8))
        )  # all are free again


def one_piece() -> CooperativeWork[None]:
    threading.Event().wait(0.01)
    yield from ()


async def test_work_of_a_cancelled_caller_is_closed(tmp_path: Path) -> None:
    begun, closed = asyncio.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> CooperativeWork[None]:
        try:
            while True:
                loop.call_soon_threadsafe(begun.set)
                yield
        finally:
            closed.set()

    with ThreadPoolExecutor(1) as threads:
        task = asyncio.create_task(run_cooperatively(work(), threads))
        await begun.wait()
        task.cancel()
        await asyncio.wait({task})
        assert await asyncio.to_thread(closed.wait, 5)


async def test_large_file_is_stored_whole(store: FileStore, saved: Path) -> None:
    content = os.urandom(2 * HASH_CHUNK_BYTES + 5)
    own = DirectoryStore(saved.parents[1]).put_bytes(content)
    for _ in range(2):  # new, and there already
        assert await store.ingest(saved.parents[1], own.sha256) == len(content)
        await store.verify(own.sha256, len(content))
        assert not DirectoryStore(saved.parents[1]).path(own.sha256).exists()
        await asyncio.to_thread(DirectoryStore(saved.parents[1]).put_bytes, content)
