"""Result files in the database: whole or not there, once for each content, whoever stores them and whoever dies."""

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

CHUNK = 255 * 1024
CONTENT = bytes(range(256)) * 10_000  # ten chunks, the last one not full


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Connection:
    return Connection(mongodb_uri, db_name)


@pytest.fixture
async def db(connection: Connection) -> AsyncIterator[Database]:
    async with connection.client() as client:
        yield client[connection.db_name]


@pytest.fixture
async def store(db: Database) -> GridFSStore:
    store = GridFSStore(db)
    await store.prepare()
    return store


@pytest.fixture
def inbox(store: GridFSStore, tmp_path: Path) -> Path:
    return tmp_path / "inbox"


async def saved(inbox: Path, content: bytes = CONTENT) -> str:
    """What a job's process does."""
    return (await asyncio.to_thread(DirectoryStore(inbox).put_bytes, content)).sha256


async def read(
    store: FileStore, sha256: str, start: int = 0, end: int | None = None, *, size: int = len(CONTENT)
) -> bytes:
    file = await store.open(sha256, size)
    try:
        return b"".join([piece async for piece in file.read(start, file.size if end is None else end)])
    finally:
        await file.close()


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 5 * CHUNK, len(CONTENT)])
async def test_what_is_taken_over_is_found_under_its_digest_and_gone_from_the_inbox(
    store: GridFSStore, inbox: Path, size: int
) -> None:
    sha256 = await saved(inbox, CONTENT[:size])
    await store.ingest(inbox, sha256)

    assert await read(store, sha256, size=size) == CONTENT[:size]
    assert (await store.open(sha256, size)).size == size
    assert not DirectoryStore(inbox).path(sha256).exists()


@pytest.mark.parametrize(
    ("start", "end"),
    [
        (0, 1),
        (0, CHUNK),
        (CHUNK - 1, CHUNK + 1),
        (CHUNK, 2 * CHUNK),
        (3, 6 * CHUNK + 7),
        (len(CONTENT) - 5, len(CONTENT)),
        (7, 7),
    ],
)
async def test_a_part_is_just_that_part(store: GridFSStore, inbox: Path, start: int, end: int) -> None:
    sha256 = await saved(inbox)
    await store.ingest(inbox, sha256)
    assert await read(store, sha256, start, end) == CONTENT[start:end]


async def test_the_same_content_is_stored_once_also_by_many_writers_at_once(
    store: GridFSStore, db: Database, tmp_path: Path
) -> None:
    inboxes = [tmp_path / f"inbox-{number}" for number in range(6)]
    [sha256] = {await saved(inbox) for inbox in inboxes}
    await asyncio.gather(*(store.ingest(inbox, sha256) for inbox in inboxes))

    assert await read(store, sha256) == CONTENT
    assert await db.fs.files.count_documents({}) == 1
    assert await db.fs.chunks.count_documents({}) == 10
    await saved(inboxes[0])
    await store.ingest(inboxes[0], sha256)
    assert await db.fs.chunks.count_documents({}) == 10


async def test_the_later_of_two_writers_gives_up_what_it_has_written(
    store: GridFSStore, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both have looked and found nothing before either is done."""
    first, second = tmp_path / "1", tmp_path / "2"
    sha256 = await saved(first)
    await saved(second)
    real = GridFSStore._add_entry

    async def overtaken(*given: Any) -> None:
        monkeypatch.setattr(GridFSStore, "_add_entry", real)
        await store.ingest(second, sha256)
        await real(*given)

    monkeypatch.setattr(GridFSStore, "_add_entry", overtaken)
    await store.ingest(first, sha256)
    assert await read(store, sha256) == CONTENT
    assert await db.fs.files.count_documents({}) == 1
    assert await db.fs.chunks.count_documents({}) == 10


class PowerCut(BaseException):
    """Ends the process as far as the code under test is concerned."""


async def test_what_a_dead_writer_has_left_is_no_file_and_in_nobodys_way(
    store: GridFSStore, db: Database, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = await saved(inbox)

    async def cut(*_: Any) -> None:  # all chunks, but no entry
        cutting.setattr(store, "_chunks", None)  # nor does a dead writer remove anything
        raise PowerCut

    with monkeypatch.context() as cutting:
        cutting.setattr(GridFSStore, "_add_entry", cut)
        with pytest.raises(PowerCut):
            await store.ingest(inbox, sha256)
    assert await db.fs.chunks.count_documents({}) == 10
    with pytest.raises(FileLost):
        await store.open(sha256, len(CONTENT))
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT


async def test_a_writer_that_is_stopped_leaves_nothing(
    store: GridFSStore, db: Database, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = await saved(inbox)
    real = GridFSStore._write_chunks

    async def stopped(*given: Any) -> int:
        await real(*given)
        raise asyncio.CancelledError

    monkeypatch.setattr(GridFSStore, "_write_chunks", stopped)
    with pytest.raises(asyncio.CancelledError):
        await store.ingest(inbox, sha256)
    assert await db.fs.files.count_documents({}) == await db.fs.chunks.count_documents({}) == 0


async def test_content_that_is_not_what_its_name_says_is_refused(store: GridFSStore, db: Database, inbox: Path) -> None:
    sha256 = await saved(inbox)
    DirectoryStore(inbox).path(sha256).write_bytes(b"something else")
    with pytest.raises(FileLost, match="another content"):
        await store.ingest(inbox, sha256)
    assert await db.fs.files.count_documents({}) == await db.fs.chunks.count_documents({}) == 0


async def test_a_link_in_the_inbox_leads_nowhere(store: GridFSStore, inbox: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    path = DirectoryStore(inbox).path(hashlib.sha256(b"secret").hexdigest())
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "secret")
    with pytest.raises(FileLost):
        await store.ingest(inbox, path.name)


@pytest.mark.parametrize("name", ["", "abc", "../" * 21 + "x", "A" * 64])
async def test_only_a_digest_is_taken_from_the_inbox(store: GridFSStore, inbox: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a SHA-256"):
        await store.ingest(inbox, name)


@pytest.mark.parametrize("damage", ["a chunk is missing", "a chunk is cut off"])
async def test_damage_is_an_error_and_never_content(store: GridFSStore, db: Database, inbox: Path, damage: str) -> None:
    sha256 = await saved(inbox)
    await store.ingest(inbox, sha256)
    if damage == "a chunk is missing":
        await db.fs.chunks.delete_one({"n": 3})
    else:
        await db.fs.chunks.update_one({"n": 3}, {"$set": {"data": b"short"}})
    for start in (0, 9 * CHUNK):  # a file is served whole or not at all, so its intact end is not served either
        with pytest.raises(FileLost):
            await read(store, sha256, start)


async def test_files_of_others_in_the_same_bucket_are_left_alone(store: GridFSStore, db: Database, inbox: Path) -> None:
    foreign, sha256 = AsyncGridFSBucket(db), await saved(inbox)
    for _ in range(2):
        await foreign.upload_from_stream(sha256, b"theirs")
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT
    assert await db.fs.files.count_documents({"filename": sha256}) == 3


async def test_a_file_is_found_by_an_index(store: GridFSStore, db: Database, inbox: Path) -> None:
    sha256 = await saved(inbox)
    await store.ingest(inbox, sha256)
    plan = await db.fs.files.find({"metadata.sha256": sha256}).explain()
    assert plan["executionStats"]["totalDocsExamined"] == plan["executionStats"]["totalKeysExamined"] == 1


async def test_a_database_that_is_away_is_told_from_a_file_that_is_not_there() -> None:
    nobody = Connection("mongodb://127.0.0.1:1/?directConnection=true", "test", connect_timeout_ms=100)
    async with nobody.client() as client:
        store = GridFSStore(client["test"])
        with pytest.raises(LedgerUnavailable):
            await store.prepare()
        with pytest.raises(LedgerUnavailable):
            await store.open("0" * 64, 1)


async def test_remove_orphans_removes_old_chunks_without_an_entry_only(
    store: GridFSStore, db: Database, inbox: Path
) -> None:
    sha256 = await saved(inbox)
    await store.ingest(inbox, sha256)
    day = timedelta(days=1)
    old, fresh = (ObjectId.from_datetime(datetime.now(UTC) - ago) for ago in (2 * day, day / 2))
    entry = ObjectId.from_datetime(datetime.now(UTC) - 3 * day)
    await db["fs.files"].insert_one({"_id": entry, "length": 1, "chunkSize": 1})
    for files_id in (old, fresh, entry, "a foreign id"):
        await db["fs.chunks"].insert_many([{"files_id": files_id, "n": n, "data": b"x"} for n in range(2)])
    assert await store.remove_orphans() == 1
    left = set(await db["fs.chunks"].distinct("files_id"))
    assert old not in left
    assert {fresh, entry, "a foreign id"} < left
    assert await read(store, sha256) == CONTENT


@pytest.mark.parametrize("wrong_by", [timedelta(days=-3), timedelta(days=3)], ids=["behind", "ahead"])
async def test_remove_orphans_does_not_depend_on_clocks_of_workers(
    store: GridFSStore, db: Database, inbox: Path, monkeypatch: pytest.MonkeyPatch, wrong_by: timedelta
) -> None:
    """A worker whose clock is wrong by days uploads, and removes orphans, while others upload."""
    sha256 = await saved(inbox)
    right = time.time
    monkeypatch.setattr("bson.objectid.time.time", lambda: right() + wrong_by.total_seconds())
    real = GridFSStore._add_entry

    async def meanwhile(*given: Any) -> None:
        monkeypatch.setattr("bson.objectid.time.time", right)
        assert await store.remove_orphans() == 0
        await real(*given)

    monkeypatch.setattr(GridFSStore, "_add_entry", meanwhile)
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT


@pytest.mark.parametrize("interruption", [AutoReconnect("no answer"), asyncio.CancelledError()])
async def test_entry_whose_insertion_was_interrupted_keeps_its_content(
    store: GridFSStore, inbox: Path, monkeypatch: pytest.MonkeyPatch, interruption: BaseException
) -> None:
    sha256 = await saved(inbox)
    real = GridFSStore._add_entry

    async def interrupted(*given: Any) -> None:
        await real(*given)
        raise interruption

    with monkeypatch.context() as patched:
        patched.setattr(GridFSStore, "_add_entry", interrupted)
        with pytest.raises((LedgerUnavailable, asyncio.CancelledError)):
            await store.ingest(inbox, sha256)
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT


async def test_upload_whose_chunks_were_removed_meanwhile_makes_no_file(
    store: GridFSStore, db: Database, inbox: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sha256 = await saved(inbox)
    real = GridFSStore._check_chunks

    async def removed(self: GridFSStore, upload_id: ObjectId, *given: Any) -> None:
        await db.fs.chunks.delete_one({"files_id": upload_id, "n": 3})
        await real(self, upload_id, *given)

    with monkeypatch.context() as patched:
        patched.setattr(GridFSStore, "_check_chunks", removed)
        with pytest.raises(LedgerUnavailable):
            await store.ingest(inbox, sha256)
    assert await db.fs.files.count_documents({}) == await db.fs.chunks.count_documents({}) == 0
    await store.ingest(inbox, sha256)
    assert await read(store, sha256) == CONTENT
