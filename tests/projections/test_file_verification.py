"""Files that were changed in the store are detected. They cannot be opened under the recorded digest."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from jobledger.ledger.domain.errors import FileDamaged, FileLost
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.files.gridfs import GridFSStore
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.projections.engine.file_verification import verify_files
from jobledger.projections.slots import Views
from tests.support.polling import DEADLINE_SECONDS

Damage = Callable[[FileStore, Database, str], Awaitable[Any]]
CONTENT = bytes(range(256)) * 3000


@pytest.fixture
async def db(mongodb_uri: str, db_name: str) -> AsyncIterator[Database]:
    async with Connection(mongodb_uri, db_name).create_client() as client:
        yield client[db_name]


@pytest.fixture(params=["directory", "gridfs"])
async def store(request: pytest.FixtureRequest, db: Database, tmp_path: Path) -> FileStore:
    if request.param == "directory":
        directory = DirectoryStore(tmp_path / "store")
        directory.prepare()
        return directory
    grid = GridFSStore(db)
    await grid.prepare()
    return grid


async def put_file(store: FileStore, tmp_path: Path, content: bytes) -> str:
    inbox = tmp_path / f"inbox-{uuid4()}"
    directory = DirectoryStore(inbox)
    sha256 = (await asyncio.to_thread(directory.put_bytes, content)).sha256
    await store.ingest(directory.root, sha256)
    return sha256


def make_damage(edit: Callable[[bytes], bytes]) -> Damage:
    """Return a function that changes the content of a file without the store."""

    async def damage(store: FileStore, db: Database, sha256: str) -> None:
        if isinstance(store, DirectoryStore):
            path = store.get_path(sha256)
            path.write_bytes(edit(path.read_bytes()))
            return
        entry = await db["fs.files"].find_one({"filename": sha256})
        assert entry is not None
        chunks = await db["fs.chunks"].find({"files_id": entry["_id"]}, sort=[("n", 1)]).to_list()
        content = edit(b"".join(chunk["data"] for chunk in chunks))
        size = entry["chunkSize"]
        for chunk in chunks:
            part = content[chunk["n"] * size : (chunk["n"] + 1) * size]
            await db["fs.chunks"].update_one({"_id": chunk["_id"]}, {"$set": {"data": part}})

    return damage


DAMAGES = {
    "first byte": lambda content: b"\xff" + content[1:],
    "last byte": lambda content: content[:-1] + b"\x00",
    "shorter": lambda content: content[:-1000],
    "empty": lambda _content: b"",
    "longer": lambda content: content + b"x",
    "swapped": lambda content: content[-400_000:] + content[:-400_000],
}


@pytest.mark.parametrize("damage", DAMAGES)
async def test_open_changed_file_raises(damage: str, store: FileStore, db: Database, tmp_path: Path) -> None:
    sha256 = await put_file(store, tmp_path, CONTENT)
    await make_damage(DAMAGES[damage])(store, db, sha256)
    with pytest.raises(FileLost) as lost:
        await store.open(sha256, len(CONTENT))
    if isinstance(store, DirectoryStore) or damage not in ("shorter", "empty", "longer"):
        assert isinstance(lost.value, FileDamaged)  # an incomplete GridFS file cannot be read at all
    assert not isinstance(store, DirectoryStore) or store.integrity.damaged_count == 1


async def test_open_file_changed_after_first_open_raises_until_it_is_stored_again(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    sha256 = (await asyncio.to_thread(store.put_bytes, CONTENT)).sha256
    file = await store.open(sha256, len(CONTENT))
    with store.get_path(sha256).open("r+b") as stored_file:
        stored_file.write(b"\xff")
    with pytest.raises(FileDamaged):
        [piece async for piece in file.read(0, file.size)]
    await file.close()
    with pytest.raises(FileDamaged):
        await store.open(sha256, len(CONTENT))
    await asyncio.to_thread(store.put_bytes, CONTENT)  # a restarted job repairs it
    await (await store.open(sha256, len(CONTENT))).close()


async def test_open_unchanged_file_again_does_not_hash_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = DirectoryStore(tmp_path)
    sha256 = (await asyncio.to_thread(store.put_bytes, CONTENT)).sha256
    await (await store.open(sha256, len(CONTENT))).close()
    monkeypatch.setattr("jobledger.ledger.files.local_files.LocalFile.sha256", None)
    for _ in range(3):
        await (await store.open(sha256, len(CONTENT))).close()


async def test_verify_files_reports_changed_missing_and_orphaned_files(
    store: FileStore, db: Database, tmp_path: Path
) -> None:
    whole, changed, orphan = [
        await put_file(store, tmp_path, text * 1000) for text in (b"whole", b"changed", b"orphan")
    ]
    missing = "ab" * 32
    rows = {"w": (whole, 5000), "again": (whole, 5000), "c": (changed, 7000), "m": (missing, 1)}
    documents = [{"path": path, "sha256": sha256, "size": size} for path, (sha256, size) in rows.items()]
    await Views(db)["files"].insert_many(documents)
    await make_damage(DAMAGES["first byte"])(store, db, changed)

    report = await verify_files(Views(db), store)

    assert (report.files, report.missing, report.changed, report.orphans) == (3, 1, 1, 1)
    assert report.orphan_bytes == len(b"orphan") * 1000
    assert {(problem.path, problem.sha256) for problem in report.problems} == {("c", changed), ("m", missing)}
    assert not report.is_ok
    assert orphan not in {problem.sha256 for problem in report.problems}


TERABYTE = 2**40


async def grow_file(store: FileStore, db: Database, sha256: str) -> None:
    """Set the size of a file to a terabyte, without using disk space."""
    if isinstance(store, DirectoryStore):
        await asyncio.to_thread(os.truncate, store.get_path(sha256), TERABYTE)
    else:
        await db["fs.files"].update_one({"filename": sha256}, {"$set": {"length": TERABYTE}})


async def test_file_of_another_size_is_damaged_without_hashing(
    store: FileStore, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    grown = [await put_file(store, tmp_path, text * 1000) for text in (b"one", b"two")]
    whole = await put_file(store, tmp_path, CONTENT)
    for sha256 in grown:
        await grow_file(store, db, sha256)
    monkeypatch.setattr(type(await store.open(whole, len(CONTENT))), "sha256", None)
    for sha256 in grown:
        for operation in (store.open, store.verify):
            with pytest.raises(FileDamaged, match=f"{TERABYTE} bytes instead of 3000"):
                await operation(sha256, 3000)
    await (await store.open(whole, len(CONTENT))).close()


@pytest.mark.parametrize("entry", [{"length": "x"}, {"chunkSize": 0}, {"chunkSize": "x"}, {"chunkSize": None}], ids=str)
async def test_open_with_changed_gridfs_entry_raises(db: Database, tmp_path: Path, entry: Document) -> None:
    store = GridFSStore(db)
    await store.prepare()
    sha256 = await put_file(store, tmp_path, CONTENT)
    await db["fs.files"].update_one({"filename": sha256}, {"$set": entry})
    with pytest.raises(FileDamaged):
        await store.open(sha256, len(CONTENT))


class EndlessFile:
    """A file that can be hashed forever."""

    def __init__(self, name: str) -> None:
        self.identity = name
        self.size = 1
        self.pieces = 0
        self.started = asyncio.Event()

    async def sha256(self, turns: asyncio.Semaphore) -> str:
        while True:
            async with turns:
                self.pieces += 1
                self.started.set()
                await asyncio.sleep(0)

    def read(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


async def test_small_file_is_opened_while_large_files_are_hashed(store: FileStore, tmp_path: Path) -> None:
    sha256 = await put_file(store, tmp_path, CONTENT)
    large = [EndlessFile(str(number)) for number in range(10)]
    hashing = [asyncio.create_task(store.integrity.check(file, file.identity, 1)) for file in large]
    async with asyncio.timeout(DEADLINE_SECONDS):
        for file in large:
            await file.started.wait()
        await (await store.open(sha256, len(CONTENT))).close()
        for task in hashing:
            task.cancel()
        await asyncio.gather(*hashing, return_exceptions=True)
    pieces = [file.pieces for file in large]
    await asyncio.sleep(0)
    assert [file.pieces for file in large] == pieces, "hashing went on although no caller waited"


async def test_file_is_hashed_again_after_the_first_caller_was_cancelled(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path)
    stored = await asyncio.to_thread(store.put_bytes, CONTENT)
    endless_file = EndlessFile("x")
    first = asyncio.create_task(store.integrity.check(endless_file, stored.sha256, 1))
    await endless_file.started.wait()
    second = asyncio.create_task(store.open(*stored))
    await asyncio.sleep(0)
    first.cancel()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await (await second).close()


async def test_verify_files_has_no_open_cursor_while_it_hashes(
    store: FileStore, db: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pages are small, so that they end between files and between rows of one file."""
    monkeypatch.setattr("jobledger.projections.engine.file_verification._ROWS_PER_PAGE", 2)
    monkeypatch.setattr("jobledger.ledger.files.gridfs._LISTED_PER_READ", 2)
    digests = [await put_file(store, tmp_path, b"%d" % number) for number in range(5)]
    rows = [
        {"_id": f"{digest}{copy}", "path": f"p{digest}{copy}", "sha256": digest, "size": 1}
        for digest in digests
        for copy in range(3)
    ]
    await db.files.insert_many(rows)
    await put_file(store, tmp_path, b"orphan")
    original_verify, open_cursors = store.verify, set()

    async def verify(sha256: str, size: int) -> None:
        status = await db.client.admin.command("serverStatus")
        open_cursors.add(status["metrics"]["cursor"]["open"]["total"] - before)
        await original_verify(sha256, size)

    before = (await db.client.admin.command("serverStatus"))["metrics"]["cursor"]["open"]["total"]
    monkeypatch.setattr(store, "verify", verify)
    report = await verify_files(Views(db), store)
    assert (report.files, report.missing, report.changed, report.orphans) == (5, 0, 0, 1)
    assert open_cursors == {0}
