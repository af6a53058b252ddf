"""The marker of the result store: a directory without the right marker is neither used nor created."""

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
    determine_marker,
    record_marker,
)
from jobledger.ledger.mongo.connection import Connection, Database

OURS, OTHERS = StoreMarker("1" * 32), StoreMarker("2" * 32)
CONTENT = b"# A talk\n"


@pytest.fixture
async def db(connection: Connection) -> AsyncIterator[Database]:
    async with connection.create_client() as client:
        yield client[connection.db_name]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data" / "results"


async def has_files() -> bool:
    return True


async def has_no_files() -> bool:
    return False


async def start(db: Database, root: Path, files: Callable[[], Awaitable[bool]] = has_no_files) -> DirectoryStore:
    """Open the store as a role does when it starts."""
    marker = await determine_marker(db, root, has_files=files)
    if marker.store_id:
        marker = await record_marker(db, marker, is_created=False)
    store = DirectoryStore(root, marker=marker)
    store.prepare()
    await record_marker(db, marker, is_created=True)
    return store


def put_content(directory: Path, content: bytes = CONTENT) -> str:
    return DirectoryStore(directory).put_bytes(content).sha256


# Wrong directories ------------------------------------------------------------------------------------------------


def leave_only_parent(root: Path) -> None:
    root.parent.mkdir(parents=True, exist_ok=True)


def leave_no_parent(root: Path) -> None:
    """Leave out the parent directories, too."""


def create_empty_directory(root: Path) -> None:
    root.mkdir(parents=True)


def write_files_without_marker(root: Path) -> None:
    put_content(root, b"written under a mount point")


def create_file(root: Path) -> None:
    root.parent.mkdir(parents=True)
    root.write_text("a file")


def create_broken_link(root: Path) -> None:
    root.parent.mkdir(parents=True)
    root.symlink_to(root.parent / "nowhere")


def create_store_of_other_ledger(root: Path) -> None:
    OTHERS.write(root)
    put_content(root)


def write_damaged_marker(root: Path) -> None:
    root.mkdir(parents=True)
    (root / MARKER_FILE_NAME).write_bytes(b"\xff\0 not an ID")


REPLACEMENTS = [
    leave_only_parent,
    leave_no_parent,
    create_empty_directory,
    write_files_without_marker,
    create_file,
    create_broken_link,
    create_store_of_other_ledger,
    write_damaged_marker,
]


async def list_stored_files(store: DirectoryStore) -> list[Any]:
    return [stored_file async for stored_file in store.list_files()]


async def in_thread(function: Callable[[], Any]) -> None:
    await asyncio.to_thread(function)


OPERATIONS: dict[str, Callable[[DirectoryStore, Path, str], Awaitable[Any]]] = {
    "prepare": lambda store, _inbox, _digest: in_thread(store.prepare),
    "check_writable": lambda store, _inbox, _digest: in_thread(store.check_writable),
    "ingest": lambda store, inbox, digest: store.ingest(inbox, digest),
    "open": lambda store, _inbox, _digest: store.open("0" * 64, 1),
    "verify": lambda store, _inbox, _digest: store.verify("0" * 64, 1),
    "list_files": lambda store, _inbox, _digest: list_stored_files(store),
    "begin_removal": lambda store, _inbox, digest: store.begin_removal(digest, "token"),
    "cancel_removal": lambda store, _inbox, digest: store.cancel_removal(digest, "token"),
    "finish_removal": lambda store, _inbox, digest: store.finish_removal(digest, "token"),
}


def read_tree(directory: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(directory.rglob("*"))}


def replace_store(root: Path, moved_store: Path, replacement: Callable[[Path], None]) -> None:
    """Move the store away and create something else in its place."""
    root.rename(moved_store)
    root.parent.rmdir()
    replacement(root)


def restore_store(moved_store: Path, root: Path) -> None:
    if os.path.lexists(root):
        root.rename(moved_store.with_suffix(".instead"))
    root.parent.mkdir(parents=True, exist_ok=True)
    moved_store.rename(root)


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("replacement", REPLACEMENTS)
async def test_operation_on_wrong_directory_raises_and_changes_nothing(
    root: Path, tmp_path: Path, replacement: Callable[[Path], None], operation: str
) -> None:
    digest = put_content(tmp_path / "inbox")
    replacement(root)
    before = read_tree(tmp_path)
    with pytest.raises((FileStoreUnavailable, ResourceUnavailable), match=r"^results\.store: .*--accept-result-store"):
        await OPERATIONS[operation](DirectoryStore(root, marker=OURS), tmp_path / "inbox", digest)
    assert read_tree(tmp_path) == before


@pytest.mark.parametrize("replacement", REPLACEMENTS)
async def test_store_is_used_again_after_it_returns(
    root: Path, tmp_path: Path, replacement: Callable[[Path], None]
) -> None:
    moved_store = tmp_path / "moved"
    OURS.write(moved_store)
    digest = put_content(tmp_path / "inbox")
    store = DirectoryStore(root, marker=OURS)
    replacement(root)
    with pytest.raises(FileStoreUnavailable):
        await store.ingest(tmp_path / "inbox", digest)
    restore_store(moved_store, root)
    await store.ingest(tmp_path / "inbox", digest)
    assert store.get_path(digest).read_bytes() == CONTENT


async def test_disk_lost_during_ingest_raises_unavailable(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    OURS.write(root)
    digest = put_content(tmp_path / "inbox")
    real = DirectoryStore._write

    def lose_disk(self: DirectoryStore, *arguments: Any) -> Any:
        root.rename(tmp_path / "moved")
        root.mkdir()
        return real(self, *arguments)

    monkeypatch.setattr(DirectoryStore, "_write", lose_disk)
    with pytest.raises(FileStoreUnavailable, match="is not the result store"):
        await DirectoryStore(root, marker=OURS).ingest(tmp_path / "inbox", digest)
    assert DirectoryStore(tmp_path / "inbox").get_path(digest).exists(), (
        "a retry can store the file when the disk is back"
    )


# Starting ---------------------------------------------------------------------------------------------------------


async def test_first_start_creates_store_and_later_starts_use_it(db: Database, root: Path) -> None:
    first = await start(db, root)
    written = (root / MARKER_FILE_NAME).read_text()
    digest = put_content(root)
    for _ in range(2):
        store = await start(db, root, has_files)
        await store.verify(digest, len(CONTENT))
    assert (root / MARKER_FILE_NAME).read_text() == written
    first.check_writable()


@pytest.mark.parametrize("files", [has_files, has_no_files])
@pytest.mark.parametrize("replacement", REPLACEMENTS)
async def test_later_start_with_wrong_directory_creates_nothing(
    db: Database, root: Path, tmp_path: Path, replacement: Callable[[Path], None], files: Callable[[], Awaitable[bool]]
) -> None:
    await start(db, root)
    replace_store(root, tmp_path / "moved", replacement)
    before = read_tree(tmp_path)
    with pytest.raises(ResourceUnavailable, match="--accept-result-store"):
        await start(db, root, files)
    assert read_tree(tmp_path) == before


async def test_concurrent_first_starts_create_one_store(connection: Connection, root: Path) -> None:
    async def start_once() -> DirectoryStore:
        async with connection.create_client() as client:
            return await start(client[connection.db_name], root)

    for store in await asyncio.gather(*(start_once() for _ in range(8))):
        store.check_writable()
    assert list(read_tree(root)) == [str(root / MARKER_FILE_NAME)]


async def test_second_machine_with_its_own_directory_is_rejected(db: Database, root: Path, tmp_path: Path) -> None:
    await start(db, root)
    with pytest.raises(ResourceUnavailable, match="is missing"):
        await start(db, tmp_path / "of another machine")


async def test_first_start_on_full_disk_creates_store_later(
    db: Database, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raise_disk_full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    marker = await record_marker(db, await determine_marker(db, root, has_files=has_no_files), is_created=False)
    store = DirectoryStore(root, marker=marker)
    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", raise_disk_full)
        with pytest.raises(ResourceUnavailable, match="No space"):
            store.prepare()
    await start(db, root)  # another process
    store.check_writable()
    StoreMarker(marker.store_id).check_directory(root)


async def test_store_without_marker_is_adopted(db: Database, root: Path) -> None:
    digest = put_content(root)
    store = await start(db, root, has_files)
    await store.verify(digest, len(CONTENT))
    assert (root / MARKER_FILE_NAME).exists()


async def test_start_with_files_and_missing_store_fails_until_restored(
    db: Database, root: Path, tmp_path: Path
) -> None:
    with pytest.raises(ResourceUnavailable, match="is missing"):
        await start(db, root, has_files)
    assert read_tree(tmp_path) == {}
    create_empty_directory(root)
    with pytest.raises(ResourceUnavailable, match="it has no file 'store-id'"):
        await start(db, root, has_files)
    put_content(root)
    (await start(db, root, has_files)).check_writable()


async def test_restored_ledger_adopts_store_copied_with_it(db: Database, root: Path) -> None:
    OTHERS.write(root)
    await start(db, root, has_files)
    assert (await determine_marker(db, root, has_files=has_files)).store_id == OTHERS.store_id


@pytest.mark.parametrize(
    "replacement", [step for step in REPLACEMENTS if step not in (create_file, create_broken_link)]
)
async def test_accepted_directory_becomes_store(
    db: Database, root: Path, tmp_path: Path, replacement: Callable[[Path], None]
) -> None:
    await start(db, root)
    replace_store(root, tmp_path / "moved", replacement)
    store_id = await accept_directory(db, root)
    (await start(db, root, has_files)).check_writable()
    assert (await determine_marker(db, root, has_files=has_files)).store_id == store_id


# Errors of `open` -------------------------------------------------------------------------------------------------

ERRORS = sorted(errno.errorcode)
NO_FILE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO}
BY_THE_JOB = {errno.EACCES, errno.EPERM, errno.ENODEV, errno.EAGAIN}
"""Errors that a job can cause in its inbox by modes, devices and leases."""


@pytest.mark.parametrize("operation", ["ingest", "ingest into GridFS", "open", "verify"])
async def test_open_error_is_file_lost_only_if_file_does_not_exist(
    root: Path, tmp_path: Path, db: Database, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    inbox = tmp_path / "inbox"
    digest = put_content(inbox)
    OURS.write(root)
    put_content(root)
    store: DirectoryStore | GridFSStore = DirectoryStore(root, marker=OURS)
    if operation == "ingest into GridFS":
        store = GridFSStore(db)
    real = os.open
    number = 0

    def failing(path: Any, *arguments: Any, **named: Any) -> int:
        if str(path).endswith(digest):
            raise OSError(number, os.strerror(number), str(path))
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, "open", failing)
    errors = {}
    for number in ERRORS:
        try:
            if operation in ("open", "verify"):
                await getattr(store, operation)(digest, len(CONTENT))
            else:
                await store.ingest(inbox, digest)
        except (FileLost, FileStoreUnavailable) as error:
            errors[number] = type(error)
    lost = NO_FILE if operation in ("open", "verify") else NO_FILE | BY_THE_JOB
    assert errors == {number: FileLost if number in lost else FileStoreUnavailable for number in ERRORS}
