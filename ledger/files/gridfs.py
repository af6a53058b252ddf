"""A file store in MongoDB (GridFS), for installations whose machines share no disk.

A process stores a file's chunks under a new ID. Finally, in one write, it inserts the entry in `fs.files` with the
SHA-256, which a unique index allows once. So a file is complete or absent. The second of two processes removes its
chunks. Chunks of a process that crashed are orphans that no reader sees.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Hashable
from contextlib import aclosing, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

from bson import ObjectId
from pymongo import ASCENDING
from pymongo.errors import DuplicateKeyError

from jobledger.ledger.domain.errors import FileDamaged, FileLost, LedgerUnavailable
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.files.file_store import ORPHAN_AGE_SECONDS, FileStore, StoredFile, file_store_executor
from jobledger.ledger.files.inbox import InboxFile, open_verified
from jobledger.ledger.mongo.connection import Database, Document, translate_errors
from jobledger.ledger.mongo.server_clock import get_server_clock
from jobledger.ledger.system.cooperative_threads import run_cooperatively

BUCKET: Final = "fs"
COLLECTIONS: Final = (f"{BUCKET}.chunks", f"{BUCKET}.files")
_DIGEST: Final = "metadata.sha256"
_REMOVED: Final = "metadata.removed"
_REMOVAL_ID: Final = "metadata.removed_by"
_SAVED_AT: Final = "metadata.saved_at"
_CHUNK_BYTES: Final = 255 * 1024
"""As drivers define it: with its other fields, a chunk fits into a page of the database."""
_CHUNKS_PER_WRITE: Final = 16
_CHUNKS_PER_READ: Final = 4
_LISTED_PER_READ: Final = 1000
_RECHECK_SECONDS: Final = 600


class GridFSStore(FileStore):
    """Result files in the ledger's own database. Other files in the same bucket are ignored."""

    def __init__(self, db: Database) -> None:
        super().__init__()
        self._client = db.client
        self._clock = get_server_clock(db.client)
        self._files = db[BUCKET].files
        self._chunks = db[BUCKET].chunks

    async def prepare(self) -> None:
        """Create the indexes, and check that files can be written and removed.

        Raises:
            LedgerUnavailable: The database is unreachable, or this user lacks privileges.
        """
        with translate_errors(
            "preparing results.store: gridfs (`jobledger mongo-roles` prints the privileges it needs)"
        ):
            await self._files.create_index([("filename", ASCENDING), ("uploadDate", ASCENDING)])
            await self._chunks.create_index([("files_id", ASCENDING), ("n", ASCENDING)], unique=True)
            # Only Jobledger's files have this field. Other programs may use the bucket, too.
            ours = {_DIGEST: {"$exists": True}}
            await self._files.create_index(
                [(_DIGEST, ASCENDING)], name="unique_sha256", unique=True, partialFilterExpression=ours
            )
            removed = {_REMOVED: {"$exists": True}}
            await self._files.create_index([(_REMOVED, ASCENDING)], partialFilterExpression=removed)
            trial = ObjectId()
            await self._chunks.insert_one({"files_id": trial, "n": 0, "data": b""})
            await self._chunks.delete_many({"files_id": trial})

    def check_writable(self) -> None:
        """Do nothing: this store uses nothing on this machine but the scratch directory."""

    async def ingest(self, inbox: Path, sha256: str) -> int:
        with await run_cooperatively(
            open_verified(DirectoryStore(inbox).get_path(sha256)), file_store_executor
        ) as file:
            if not await self._is_stored(sha256):
                await self._upload(file, sha256)
            await asyncio.get_running_loop().run_in_executor(file_store_executor, file.remove)
            return file.size

    async def remove_orphans(self) -> int:
        """Remove chunks without an entry that were written between a week and a day ago, by the time in their ID.

        Both that time and the current time are of the server's clock. The bounds keep the cost independent of the size
        of the store, because an index finds both ends.
        """
        day = timedelta(seconds=ORPHAN_AGE_SECONDS)
        with translate_errors("reading the server's clock"):
            now = await self._clock.now(self._client)
        written = {"$gt": ObjectId.from_datetime(now - 7 * day), "$lt": ObjectId.from_datetime(now - day)}
        pipeline: list[Document] = [
            {"$match": {"files_id": written, "n": 0}},
            {"$lookup": {"from": self._files.name, "localField": "files_id", "foreignField": "_id", "as": "entry"}},
            {"$match": {"entry": []}},
            {"$project": {"files_id": 1}},
        ]
        removed = 0
        with translate_errors("removing orphaned chunks"):
            async for chunk in await self._chunks.aggregate(pipeline):
                await self._chunks.delete_many({"files_id": chunk["files_id"]})
                removed += 1
        return removed

    async def _upload(self, file: InboxFile, sha256: str) -> None:
        with translate_errors("storing a file"):
            upload_id = _create_dated_id(await self._clock.now(self._client))
            try:
                size = await self._write_chunks(upload_id, file)
                await self._check_chunks(upload_id, sha256, size)
            except BaseException:
                with suppress(Exception):  # remaining chunks are harmless, and the first error must propagate
                    await asyncio.shield(self._chunks.delete_many({"files_id": upload_id}))
                raise
            # Never delete the chunks after this line: a cancelled or failed insertion may have created the entry.
            # Without an entry, they are orphans.
            try:
                await self._add_entry(upload_id, sha256, size)
            except DuplicateKeyError:
                if await self._files.find_one({"_id": upload_id}, {"_id": 1}) is None:
                    await self._chunks.delete_many({"files_id": upload_id})
                    if not await self._is_stored(sha256):
                        raise

    async def _write_chunks(self, upload_id: ObjectId, file: InboxFile) -> int:
        """Write a file's content and return its size. Hashes it again, because the job may have changed it.

        Raises:
            FileLost: The content does not match the digest.
        """
        loop, written = asyncio.get_running_loop(), 0
        pieces = file.iterate_chunks(_CHUNK_BYTES * _CHUNKS_PER_WRITE)
        while (piece := await loop.run_in_executor(file_store_executor, next, pieces, None)) is not None:
            chunks = [piece[begin : begin + _CHUNK_BYTES] for begin in range(0, len(piece), _CHUNK_BYTES)]
            documents = [{"files_id": upload_id, "n": n, "data": data} for n, data in enumerate(chunks, written)]
            await self._chunks.insert_many(documents)
            written += len(chunks)
        return file.size

    async def _check_chunks(self, upload_id: ObjectId, sha256: str, size: int) -> None:
        """Check that all chunks still exist.

        Raises:
            LedgerUnavailable: Some are missing: the upload took days, so they were removed as orphans.
        """
        there = await self._chunks.count_documents({"files_id": upload_id})
        if there != -(-size // _CHUNK_BYTES):
            raise LedgerUnavailable(f"Chunks of the file {sha256} were removed while it was stored.")

    async def _add_entry(self, upload_id: ObjectId, sha256: str, size: int) -> None:
        """Insert the entry that turns the chunks into a file."""
        await self._files.insert_one(
            {
                "_id": upload_id,
                "filename": sha256,
                "metadata": {"sha256": sha256},
                "chunkSize": _CHUNK_BYTES,
                "length": size,
                "uploadDate": await self._clock.now(self._client),
            }
        )

    async def _is_stored(self, sha256: str) -> bool:
        """Return whether the content is durable, and update its time. `begin_removal` thus sees that it is needed.

        The update is acknowledged when a majority has everything that happened before it. A plain read might see an
        entry that a failover then rolls back.
        """
        with translate_errors("looking for a file"):
            found = await self._files.update_one({_DIGEST: sha256}, {"$currentDate": {_SAVED_AT: True}})
        return found.matched_count == 1

    async def begin_removal(self, sha256: str, removal_id: str) -> datetime | None:
        change = {"$set": {_REMOVED: sha256, _REMOVAL_ID: removal_id}, "$unset": {_DIGEST: ""}}
        with translate_errors("beginning to remove a file"):
            for wanted in ({_DIGEST: sha256}, {_REMOVED: sha256}):
                entry = await self._files.find_one_and_update(wanted, change)
                if entry is not None:
                    saved_at: datetime = entry["metadata"].get("saved_at", entry["uploadDate"])
                    return saved_at
        return None

    async def cancel_removal(self, sha256: str, removal_id: str) -> None:
        change = {"$set": {_DIGEST: sha256}, "$unset": {_REMOVED: "", _REMOVAL_ID: ""}}
        with translate_errors("cancelling the removal of a file"):
            try:
                await self._files.update_one({_REMOVED: sha256, _REMOVAL_ID: removal_id}, change)
            except DuplicateKeyError:  # the content was saved again meanwhile
                await self.finish_removal(sha256, removal_id)

    async def finish_removal(self, sha256: str, removal_id: str) -> None:
        with translate_errors("removing a file"):
            async for entry in self._files.find({_REMOVED: sha256, _REMOVAL_ID: removal_id}, {"_id": 1}):
                await self._chunks.delete_many(
                    {"files_id": entry["_id"]}
                )  # first, so that no chunk remains without an entry
                await self._files.delete_one({"_id": entry["_id"]})

    async def list_files(self) -> AsyncIterator[StoredFile]:
        after = ""
        while True:  # no cursor stays open while the caller reads whole files: the server would end it
            query = {_DIGEST: {"$gt": after}}
            with translate_errors("listing the files"):
                page = self._files.find(
                    query, {_DIGEST: 1, "length": 1}, sort=[(_DIGEST, ASCENDING)], limit=_LISTED_PER_READ
                )
                entries = await page.to_list()
            for entry in entries:
                after = str(entry["metadata"]["sha256"])
                yield StoredFile(after, int(entry["length"]))
            if len(entries) < _LISTED_PER_READ:
                return

    async def _open_unchecked(self, sha256: str) -> _GridFSFile:
        with translate_errors("looking for a file"):
            entry = await self._files.find_one({_DIGEST: sha256})
        if entry is None:
            raise FileLost(f"GridFS has no file with the digest {sha256}")
        try:
            return _GridFSFile(self._chunks, entry)
        except (LookupError, TypeError, ValueError) as error:
            raise FileDamaged(f"The entry of the file {sha256} in GridFS was changed: {error}") from error


def _create_dated_id(moment: datetime) -> ObjectId:
    """Return a new ID that contains a time of the server's clock, not of this machine's."""
    return ObjectId(ObjectId.from_datetime(moment).binary[:4] + ObjectId().binary[4:])


class _GridFSFile:
    """A file in GridFS, read in chunks. The driver's own reader always fetches 16 MB in one query."""

    def __init__(self, chunks: Any, entry: Document) -> None:
        self._uploaded = entry.get("uploadDate")
        self._chunks = chunks
        self._id = entry["_id"]
        self._size = int(entry["length"])
        self._chunk_size = int(entry["chunkSize"])
        if self._chunk_size < 1:
            raise ValueError(f"its chunk size is {self._chunk_size}")

    @property
    def size(self) -> int:
        return self._size

    @property
    def identity(self) -> Hashable:
        """A value that changes at least every ten minutes: the database does not record when a chunk was changed."""
        return str(self._id), self._size, self._uploaded, int(time.monotonic() // _RECHECK_SECONDS)

    async def sha256(self, turns: asyncio.Semaphore) -> str:
        digest = hashlib.sha256()
        async with aclosing(self.read(0, self._size)) as pieces:
            while True:
                async with turns:
                    if (piece := await anext(pieces, None)) is None:
                        return digest.hexdigest()
                    await asyncio.to_thread(digest.update, piece)

    async def read(self, start: int, end: int) -> AsyncGenerator[bytes, None]:
        while start < end:
            first = start // self._chunk_size
            last = min((end - 1) // self._chunk_size, first + _CHUNKS_PER_READ - 1)
            with translate_errors("reading a file"):
                wanted = {"files_id": self._id, "n": {"$gte": first, "$lte": last}}
                found = await self._chunks.find(wanted, sort=[("n", ASCENDING)]).to_list()
            data = b"".join(chunk["data"] for chunk in found)
            begin = first * self._chunk_size
            if len(data) != min((last + 1) * self._chunk_size, self._size) - begin:
                raise FileLost(f"Some of the chunks {first} to {last} of the file {self._id} in GridFS are missing")
            yield data[start - begin : end - begin]
            start = begin + len(data)

    async def close(self) -> None:
        """Do nothing: reading holds no resources."""
