"""The GridFS store: each content is stored once, completely or not at all, even if a writer dies."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from bson import ObjectId
from gridfs import AsyncGridFSBucket
from pymongo.errors import AutoReconnect

from jobledger.ledger.domain.errors import FileLost, LedgerUnavailable
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.mongo.connection import Connection, Database

CHUNK_BYTES = 255 * 1024
CONTENT = bytes(range(256)) * 10_000  # ten chunks, the last one not full


@pytest.fixture
async def db(connection: Connection) -> AsyncIterator[Database]:
    async with connection.create_client() as client:
        yield client[connection.db_name]


@pytest.fixture
async def store(db: Database) -> GridFSStore:
    store = GridFSStore(db)
    await store.prepare()
    return store


@pytest.fixture
def inbox(store: GridFSStore, tmp_path: Path) -> Path:
    return tmp_path / "inbox"


async def save_to_inbox(inbox: Path, content: bytes = CONTENT) -> str:
    """Save content to an inbox, as a job process does."""
    return (await asyncio.to_thread(DirectoryStore(inbox).put_bytes, content)).sha256


async def read(
    store: FileStore, sha256: str, start: int = 0, end: int | None = None, *, size: int = len(CONTENT)
) -> bytes:
    file = await store.open(sha256, size)
    try:
        return b"".join([chunk async for chunk in file.read(start, file.size if end is None else end)])
    finally:
        await file.close()


@pytest.mark.parametrize("size", [0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1, 5 * CHUNK_BYTES, len(CONTENT)])
async def test_ingest_moves_file_from_inbox_to_store(store: GridFSStore, inbox: Path, size: int) -> None:
    sha256 = await save_to_inbox(inbox, CONTENT[:size])
    await store.ingest(inbox, sha256)

    assert await read(store, sha256, size=size) == CONTENT[:size]
    assert (await store.open(sha256, size)).size == size
    assert not DirectoryStore(inbox).get_path(sha256).exists()


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 1),
        (0, CHUNK_BYTES),
        (CHUNK_BYTES - 1, CHUNK_BYTES + 1),
        (CHUNK_BYTES, 2 * CHUNK_BYTES),
        (3, 6 * CHUNK_BYTES + 7),
        (len(CONTENT) - 5, len(CONTENT)),
        (7, 7),
    ],
)
async def test_read_returns_requested_range(store: GridFSStore, inbox: Path, start: int, end: int) -> None:
    sha256 = await save_to_inbox(inbox)
    await store.ingest(inbox, sha256)
    assert await read(store, sha256, start, end) == CONTENT[start:end]


async def test_concurrent_ingests_store_content_once(store: GridFSStore, db: Database, tmp_path: Path) -> None:
    inboxes = [tmp_path / f"inbox-{number}" for number in range(6)]
    [sha256] = {await save_to_inbox(inbox) for inbox in inboxes}
    await asyncio.gather(*(store.ingest(inbox, sha256) for inbox in inboxes))

    assert await read(store, sha256) == CONTENT
    assert await db.fs.files.count_documents({}) == 1
    assert await db.fs.chunks.count_documents({}) == 10
    await save_to_inbox(inboxes[0])
    await store.ingest(inboxes[0], sha256)
    assert await db.fs.chunks.count_documents({}) == 10


async def test_ingest_that_ends_second_removes_its_chunks(
    store: GridFSStore, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both writers have found no file before either has finished."""
    first, second = tmp_path / "1", tmp_path / "2"
    sha256 = await save_to_inbox(first)
    await save_to_inbox(second)
    real = GridFSStore._add_entry

    async def ingest_second_first(*arguments: Any) -> None:
        monkeypatch.setattr(GridFSStore, "_add_entry", real)
        await store.ingest(second, sha256)
        await real(*arguments)

    monkeypatch.setattr(GridFSStore, "_add_entry", ingest_second_first)
    await store.ingest(first, sha256)
    assert await read(store, sha256) == CONTENT
    assert await db.fs.files.count_documents({}) == 1
    assert await db.fs.chunks.count_documents({}) == 10


class PowerCut(BaseException):
    """Stands for the end of the process. The code under test cannot catch it as an `Exception`."""


async def test_chunks_of_crashed_upload_are_not_a_file(
    store: GridFSStore, db: Database, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = await save_to_inbox(inbox)

    async def raise_power_cut(*_: Any) -> None:  # all chunks are written, but no entry
        patched.setattr(store, "_chunks", None)  # a dead writer removes nothing, either
        raise PowerCut

    with monkeypatch.context() as patched:
        patched.setattr(GridFSStore, "_add_entry", raise_power_cut)
        with pytest.raises(PowerCut):
            await store.ingest(inbox, sha256)
    assert await db.fs.chunks.count_documents({}) == 10
    with pytest.raises(FileLost):
        await store.open(sha256, len(CONTENT))
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT


async def test_cancelled_ingest_leaves_nothing(
    store: GridFSStore, db: Database, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = await save_to_inbox(inbox)
    real = GridFSStore._write_chunks

    async def cancel_after_chunks(*arguments: Any) -> int:
        await real(*arguments)
        raise asyncio.CancelledError

    monkeypatch.setattr(GridFSStore, "_write_chunks", cancel_after_chunks)
    with pytest.raises(asyncio.CancelledError):
        await store.ingest(inbox, sha256)
    assert await db.fs.files.count_documents({}) == await db.fs.chunks.count_documents({}) == 0


async def test_ingest_of_content_with_other_digest_is_rejected(store: GridFSStore, db: Database, inbox: Path) -> None:
    sha256 = await save_to_inbox(inbox)
    DirectoryStore(inbox).get_path(sha256).write_bytes(b"something else")
    with pytest.raises(FileLost, match="does not match its digest"):
        await store.ingest(inbox, sha256)
    assert await db.fs.files.count_documents({}) == await db.fs.chunks.count_documents({}) == 0


async def test_ingest_does_not_follow_link(store: GridFSStore, inbox: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    path = DirectoryStore(inbox).get_path(hashlib.sha256(b"secret").hexdigest())
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(FileLost):
        await store.ingest(inbox, path.name)


@pytest.mark.parametrize("name", ["", "abc", "../" * 21 + "x", "A" * 64])
async def test_ingest_of_invalid_digest_raises(store: GridFSStore, inbox: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256"):
        await store.ingest(inbox, name)


@pytest.mark.parametrize("damage", ["a chunk is missing", "a chunk is cut off"])
async def test_read_of_damaged_file_raises_file_lost(
    store: GridFSStore, db: Database, inbox: Path, damage: str
) -> None:
    sha256 = await save_to_inbox(inbox)
    await store.ingest(inbox, sha256)
    if damage == "a chunk is missing":
        await db.fs.chunks.delete_one({"n": 3})
    else:
        await db.fs.chunks.update_one({"n": 3}, {"$set": {"data": b"short"}})
    for start in (0, 9 * CHUNK_BYTES):  # a damaged file is not served at all, not even its intact end
        with pytest.raises(FileLost):
            await read(store, sha256, start)


async def test_foreign_files_in_bucket_are_ignored(store: GridFSStore, db: Database, inbox: Path) -> None:
    foreign, sha256 = AsyncGridFSBucket(db), await save_to_inbox(inbox)
    for _ in range(2):
        await foreign.upload_from_stream(sha256, b"theirs")
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT
    assert await db.fs.files.count_documents({"filename": sha256}) == 3


async def test_lookup_uses_index(store: GridFSStore, db: Database, inbox: Path) -> None:
    sha256 = await save_to_inbox(inbox)
    await store.ingest(inbox, sha256)
    plan = await db.fs.files.find({"metadata.sha256": sha256}).explain()
    assert plan["executionStats"]["totalDocsExamined"] == plan["executionStats"]["totalKeysExamined"] == 1


async def test_unreachable_database_is_not_reported_as_lost_file() -> None:
    unreachable = Connection("mongodb://127.0.0.1:1/?directConnection=true", "test", connect_timeout_ms=100)
    async with unreachable.create_client() as client:
        store = GridFSStore(client["test"])
        with pytest.raises(LedgerUnavailable):
            await store.prepare()
        with pytest.raises(LedgerUnavailable):
            await store.open("0" * 64, 1)


async def test_remove_orphans_removes_old_chunks_without_an_entry_only(
    store: GridFSStore, db: Database, inbox: Path
) -> None:
    sha256 = await save_to_inbox(inbox)
    await store.ingest(inbox, sha256)
    day = timedelta(days=1)
    old, fresh = (ObjectId.from_datetime(datetime.now(UTC) - ago) for ago in (2 * day, day / 2))
    entry = ObjectId.from_datetime(datetime.now(UTC) - 3 * day)
    await db["fs.files"].insert_one({"_id": entry, "length": 1, "chunkSize": 1})
    for files_id in (old, fresh, entry, "a foreign ID"):
        await db["fs.chunks"].insert_many([{"files_id": files_id, "n": n, "data": b"x"} for n in range(2)])
    assert await store.remove_orphans() == 1
    remaining_ids = set(await db["fs.chunks"].distinct("files_id"))
    assert old not in remaining_ids
    assert {fresh, entry, "a foreign ID"} < remaining_ids
    assert await read(store, sha256) == CONTENT


@pytest.mark.parametrize("clock_error", [timedelta(days=-3), timedelta(days=3)], ids=["behind", "ahead"])
async def test_remove_orphans_does_not_depend_on_clocks_of_workers(
    store: GridFSStore, db: Database, inbox: Path, monkeypatch: pytest.MonkeyPatch, clock_error: timedelta
) -> None:
    """A worker whose clock is wrong by days uploads and removes orphans while others upload."""
    sha256 = await save_to_inbox(inbox)
    real_time = time.time
    monkeypatch.setattr("bson.objectid.time.time", lambda: real_time() + clock_error.total_seconds())
    real = GridFSStore._add_entry

    async def remove_orphans_before_entry(*arguments: Any) -> None:
        monkeypatch.setattr("bson.objectid.time.time", real_time)
        assert await store.remove_orphans() == 0
        await real(*arguments)

    monkeypatch.setattr(GridFSStore, "_add_entry", remove_orphans_before_entry)
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT


@pytest.mark.parametrize("interruption", [AutoReconnect("no answer"), asyncio.CancelledError()])
async def test_interrupted_insertion_of_entry_keeps_content(
    store: GridFSStore, inbox: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    sha256 = await save_to_inbox(inbox)
    real = GridFSStore._add_entry

    async def interrupt_after_entry(*arguments: Any) -> None:
        await real(*arguments)
        raise interruption

    with monkeypatch.context() as patched:
        patched.setattr(GridFSStore, "_add_entry", interrupt_after_entry)
        with pytest.raises((LedgerUnavailable, asyncio.CancelledError)):
            await store.ingest(inbox, sha256)
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT


async def test_upload_with_removed_chunks_creates_no_file(
    store: GridFSStore, db: Database, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = await save_to_inbox(inbox)
    real = GridFSStore._check_chunks

    async def remove_chunk_before_check(self: GridFSStore, upload_id: ObjectId, *arguments: Any) -> None:
        await db.fs.chunks.delete_one({"files_id": upload_id, "n": 3})
        await real(self, upload_id, *arguments)

    with monkeypatch.context() as patched:
        patched.setattr(GridFSStore, "_check_chunks", remove_chunk_before_check)
        with pytest.raises(LedgerUnavailable):
            await store.ingest(inbox, sha256)
    assert await db.fs.files.count_documents({}) == await db.fs.chunks.count_documents({}) == 0
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT
