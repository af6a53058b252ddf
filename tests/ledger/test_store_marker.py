"""A directory is the result store of a ledger only if its marker says so; all else is neither used nor created."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.errors import FileLost, FileStoreUnavailable, ResourceUnavailable
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.files.store_marker import (
    MARKER_FILE_NAME,
    StoreMarker,
    accept_directory,
    find_marker,
    record_marker,
)
from jobledger.ledger.mongo.connection import Connection, Database

OURS, OTHERS = StoreMarker("1" * 32), StoreMarker("2" * 32)
CONTENT = b"# A talk\n"


@pytest.fixture
async def db(connection: Connection) -> AsyncIterator[Database]:
    async with connection.client() as client:
        yield client[connection.db_name]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data" / "results"


async def has_files() -> bool:
    return True


async def has_none() -> bool:
    return False


async def start(db: Database, root: Path, files: Callable[[], Awaitable[bool]] = has_none) -> DirectoryStore:
    """What a role does with its store when it starts."""
    marker = await find_marker(db, root, has_files=files)
    if marker.store_id:
        marker = await record_marker(db, marker, created=False)
    store = DirectoryStore(root, marker=marker)
    store.prepare()
    await record_marker(db, marker, created=True)
    return store


def put(directory: Path, content: bytes = CONTENT) -> str:
    return DirectoryStore(directory).put_bytes(content).sha256


# What is not the store --------------------------------------------------------------------------------------------


def missing(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)


def missing_with_its_parents(root: Path) -> None:
    """Leave nothing."""


def empty_mount_point(root: Path) -> None:
    root.mkdir(parents=True)


def files_without_a_marker(root: Path) -> None:
    put(root, b"written under a mount point")


def file_in_its_place(root: Path) -> None:
    root.parent.mkdir(parents=True)
    root.write_text("a file")


def broken_link(root: Path) -> None:
    root.parent.mkdir(parents=True)
    root.symlink_to(root.parent / "nowhere")


def store_of_another_ledger(root: Path) -> None:
    OTHERS.write(root)
    put(root)


def damaged_marker(root: Path) -> None:
    root.mkdir(parents=True)
    (root / MARKER_FILE_NAME).write_bytes(b"\xff\0 not an ID")


PLACES = [
    missing,
    missing_with_its_parents,
    empty_mount_point,
    files_without_a_marker,
    file_in_its_place,
    broken_link,
    store_of_another_ledger,
    damaged_marker,
]


async def all_of(store: DirectoryStore) -> list[Any]:
    return [it async for it in store.list_files()]


async def in_thread(function: Callable[[], Any]) -> None:
    await asyncio.to_thread(function)


OPERATIONS: dict[str, Callable[[DirectoryStore, Path, str], Awaitable[Any]]] = {
    "prepare": lambda store, _inbox, _digest: in_thread(store.prepare),
    "check": lambda store, _inbox, _digest: in_thread(store.check_writable),
    "take_over": lambda store, inbox, digest: store.ingest(inbox, digest),
    "open": lambda store, _inbox, _digest: store.open("0" * 64, 1),
    "verify": lambda store, _inbox, _digest: store.verify("0" * 64, 1),
    "stored": lambda store, _inbox, _digest: all_of(store),
    "begin_removal": lambda store, _inbox, digest: store.begin_removal(digest, "token"),
    "cancel_removal": lambda store, _inbox, digest: store.cancel_removal(digest, "token"),
    "finish_removal": lambda store, _inbox, digest: store.finish_removal(digest, "token"),
}


def tree(directory: Path) -> dict[str, bytes | None]:
    return {str(it): it.read_bytes() if it.is_file() else None for it in sorted(directory.rglob("*"))}


def replace(root: Path, away: Path, place: Callable[[Path], None]) -> None:
    """Move the store away, and put something else in its place."""
    root.rename(away)
    root.parent.rmdir()
    place(root)


def put_back(away: Path, root: Path) -> None:
    if os.path.lexists(root):
        root.rename(away.with_suffix(".instead"))
    root.parent.mkdir(parents=True, exist_ok=True)
    away.rename(root)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("place", PLACES)
async def test_store_operation_on_another_directory_raises_and_changes_nothing(
    root: Path, tmp_path: Path, place: Callable[[Path], None], operation: str
) -> None:
    digest = put(tmp_path / "inbox")
    place(root)
    before = tree(tmp_path)
    with pytest.raises((FileStoreUnavailable, ResourceUnavailable), match=r"^results\.store: .*--accept-result-store"):
        await OPERATIONS[operation](DirectoryStore(root, marker=OURS), tmp_path / "inbox", digest)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("place", PLACES)
async def test_store_that_comes_back_is_used_again(root: Path, tmp_path: Path, place: Callable[[Path], None]) -> None:
    away = tmp_path / "away"
    OURS.write(away)
    digest = put(tmp_path / "inbox")
    store = DirectoryStore(root, marker=OURS)
    place(root)
    with pytest.raises(FileStoreUnavailable):
        await store.ingest(tmp_path / "inbox", digest)
    put_back(away, root)
    await store.ingest(tmp_path / "inbox", digest)
    assert store.path(digest).read_bytes() == CONTENT


async def test_disk_that_goes_away_while_a_file_is_stored_is_noticed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OURS.write(root)
    digest = put(tmp_path / "inbox")
    real = DirectoryStore._adopt

    def interrupted(self: DirectoryStore, *arguments: Any) -> Any:
        root.rename(tmp_path / "away")
        root.mkdir()
        return real(self, *arguments)

    monkeypatch.setattr(DirectoryStore, "_adopt", interrupted)
    with pytest.raises(FileStoreUnavailable, match="is not the result store"):
        await DirectoryStore(root, marker=OURS).ingest(tmp_path / "inbox", digest)
    assert DirectoryStore(tmp_path / "inbox").path(digest).exists(), "the file is stored when the disk is back"


# Starting ---------------------------------------------------------------------------------------------------------


async def test_first_start_creates_a_store_and_later_ones_use_it(db: Database, root: Path) -> None:
    first = await start(db, root)
    written = (root / MARKER_FILE_NAME).read_text()
    digest = put(root)
    for _ in range(2):
        store = await start(db, root, has_files)
        await store.verify(digest, len(CONTENT))
    assert (root / MARKER_FILE_NAME).read_text() == written
    first.check_writable()


@pytest.mark.parametrize("files", [has_files, has_none])
@pytest.mark.parametrize("place", PLACES)
async def test_later_start_with_another_directory_creates_nothing(
    db: Database, root: Path, tmp_path: Path, place: Callable[[Path], None], files: Callable[[], Awaitable[bool]]
) -> None:
    await start(db, root)
    replace(root, tmp_path / "away", place)
    before = tree(tmp_path)
    with pytest.raises(ResourceUnavailable, match="--accept-result-store"):
        await start(db, root, files)
    assert tree(tmp_path) == before


async def test_many_first_starts_at_once_agree_on_one_store(connection: Connection, root: Path) -> None:
    async def one() -> DirectoryStore:
        async with connection.client() as client:
            return await start(client[connection.db_name], root)

    for store in await asyncio.gather(*(one() for _ in range(8))):
        store.check_writable()
    assert list(tree(root)) == [str(root / MARKER_FILE_NAME)]


async def test_second_machine_with_a_directory_of_its_own_is_refused(db: Database, root: Path, tmp_path: Path) -> None:
    await start(db, root)
    with pytest.raises(ResourceUnavailable, match="is missing"):
        await start(db, tmp_path / "of another machine")


async def test_first_start_on_a_full_disk_creates_the_store_when_there_is_space(
    db: Database, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    marker = await record_marker(db, await find_marker(db, root, has_files=has_none), created=False)
    store = DirectoryStore(root, marker=marker)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(ResourceUnavailable, match="No space"):
            store.prepare()
    await start(db, root)  # another process
    store.check_writable()
    StoreMarker(marker.store_id).check_directory(root)


async def test_store_of_before_markers_is_adopted(db: Database, root: Path) -> None:
    digest = put(root)
    store = await start(db, root, has_files)
    await store.verify(digest, len(CONTENT))
    assert (root / MARKER_FILE_NAME).exists()


async def test_ledger_with_files_and_no_store_waits_until_it_is_restored(
    db: Database, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ResourceUnavailable, match="is missing"):
        await start(db, root, has_files)
    assert tree(tmp_path) == {}
    empty_mount_point(root)
    with pytest.raises(ResourceUnavailable, match="it has no file 'store-id'"):
        await start(db, root, has_files)
    put(root)
    (await start(db, root, has_files)).check_writable()


async def test_restored_ledger_takes_the_store_that_is_copied_with_it(db: Database, root: Path) -> None:
    OTHERS.write(root)
    await start(db, root, has_files)
    assert (await find_marker(db, root, has_files=has_files)).store_id == OTHERS.store_id


@pytest.mark.parametrize("place", [it for it in PLACES if it not in (file_in_its_place, broken_link)])
async def test_accepted_directory_is_the_store(
    db: Database, root: Path, tmp_path: Path, place: Callable[[Path], None]
) -> None:
    await start(db, root)
    replace(root, tmp_path / "away", place)
    store_id = await accept_directory(db, root)
    (await start(db, root, has_files)).check_writable()
    assert (await find_marker(db, root, has_files=has_files)).store_id == store_id


# Errors of `open` -------------------------------------------------------------------------------------------------

ERRORS = sorted(errno.errorcode)
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}
BY_THE_JOB = {errno.EACCES, errno.EPERM, errno.ENODEV, errno.EAGAIN}
"""What a job can cause in its inbox, by modes, devices and leases."""


@pytest.mark.parametrize("operation", ["take_over", "take_over into GridFS", "open", "verify"])
async def test_open_error_is_a_lost_file_only_if_there_is_no_such_file_for_the_store(
    root: Path, tmp_path: Path, db: Database, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    inbox = tmp_path / "inbox"
    digest = put(inbox)
    OURS.write(root)
    put(root)
    store: DirectoryStore | GridFSStore = DirectoryStore(root, marker=OURS)
    if operation == "take_over into GridFS":
        store = GridFSStore(db)
    real = os.open
    number = 0

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).endswith(digest):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", failing)
    found = {}
    for number in ERRORS:
        try:
            if operation in ("open", "verify"):
                await getattr(store, operation)(digest, len(CONTENT))
            else:
                await store.ingest(inbox, digest)
        except (FileLost, FileStoreUnavailable) as error:
            found[number] = type(error)
    lost = NO_FILE if operation in ("open", "verify") else NO_FILE | BY_THE_JOB
    assert found == {number: FileLost if number in lost else FileStoreUnavailable for number in ERRORS}
