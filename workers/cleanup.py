"""workers: removes what a deleted job or batch leaves behind and no event needs.

That is: the secrets of its webhook, deliveries that are still to be made, and its files, unless another job has the
same content. The log keeps everything else. Why nothing is forgotten: a cursor says how far the log was read, and moves
only when the files are noted in `file_removals`. A note goes only when its file is removed, or is needed.

Why no file is removed that somebody needs: its name is taken away first. Whoever saves the same content from then on
finds no such file, and writes a new one. Whoever saved it before is either still running or has ended. If it is still
running, the file's time is not before the attempt's start, because saving a file that is there already renews its time:
so the file is put back. If it has ended, its steps and results are in the views, once these have reached the head that
was read after the name was taken away. Who copies a finished step of another job records that before its lease ends, or
is fenced: so a removal waits longer than a lease.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Final

import orjson
import structlog

from ledger.commands import AbandonDelivery
from ledger.delivery import Delivery, name_of
from ledger.errors import (
    CommandRefused,
    FileLost,
    LedgerBusy,
    LedgerUnavailable,
    StoreUnavailable,
    UnreadableEvent,
)
from ledger.events import (
    BatchDeleted,
    BatchFinished,
    BatchSubmitted,
    JobCancelled,
    JobCompleted,
    JobDeleted,
    JobFailed,
    JobSubmitted,
    Meta,
    Recorded,
    StepCompleted,
)
from ledger.files import FileStore
from ledger.handle import handle, load
from ledger.log import EventLog
from ledger.mongo import Database, Document, driver_errors
from projections import files, jobs
from projections.checkpoint import Checkpoint

_log = structlog.get_logger()
CURSOR: Final = "cleanup"
"""The document of `checkpoints` that says how far the log was read."""
REMOVALS: Final = "file_removals"
SECRETS: Final = "webhook_headers"
GRACE_SECONDS: Final = 15.0
"""Longer than the lease of a worker."""
RETRY_SECONDS: Final = 60.0
_PAUSE_SECONDS: Final = 2.0
_CLOCKS_APART: Final = timedelta(minutes=2)
"""Between the clock of a worker and that of the file store."""
_SAVE_CURSOR_SECONDS: Final = 60.0
_VIEWS_SECONDS: Final = 30.0
_WITH_FILES: Final = (JobCompleted.__name__, StepCompleted.__name__)
_ENDS: Final = tuple(event.__name__ for event in (JobCompleted, JobFailed, JobCancelled, BatchFinished))
_BEGINNINGS: Final = (JobSubmitted.__name__, BatchSubmitted.__name__)


class Cleanup:
    """Removes what deleted jobs and batches leave behind. The leading projector runs it (`Projector.beside`).

    Should two run for a moment, because one was frozen, each has a token of its own: see `FileStore.set_aside`.
    """

    def __init__(
        self,
        db: Database,
        log: EventLog,
        store: FileStore,
        checkpoint: Checkpoint,
        *,
        holder: str,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._db = db
        self._log = log
        self._store = store
        self._checkpoint = checkpoint
        self._grace = timedelta(seconds=grace_seconds)
        self._meta = Meta(f"cleanup:{holder}")
        self._noted = asyncio.Event()

    async def run(self) -> None:
        """Clean up until cancelled. After a failure it goes on where the cursor is."""
        while True:
            try:
                await self._clean_up()
            except (LedgerUnavailable, LedgerBusy) as error:
                _log.warning("cleaning up behind deleted jobs is interrupted", error=str(error))
                await asyncio.sleep(_PAUSE_SECONDS)
            except Exception:  # noqa: BLE001 - the projector beside it goes on, whatever it is
                _log.exception("cleaning up behind deleted jobs has failed")
                await asyncio.sleep(RETRY_SECONDS)

    async def _clean_up(self) -> None:
        removing = asyncio.create_task(self._remove_files(), name="remove-files")
        following = asyncio.create_task(self._follow(), name="follow-deletions")
        try:
            await asyncio.wait({removing, following}, return_when=asyncio.FIRST_COMPLETED)
            for task in (removing, following):
                if task.done():
                    task.result()
        finally:
            for task in (removing, following):
                task.cancel()
            await asyncio.gather(removing, following, return_exceptions=True)

    # Following the log --------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        with driver_errors("reading how far deletions were cleaned up"):
            found = await self._db.checkpoints.find_one({"_id": CURSOR}) or {}
        saved = int(found.get("position", 0))
        async with self._log.subscription(after=saved, types=(JobDeleted, BatchDeleted)) as events:
            while True:
                found_now: list[Recorded] = []
                with suppress(TimeoutError):
                    async with asyncio.timeout(_SAVE_CURSOR_SECONDS):
                        found_now = await events.chunk()
                for event in found_now:
                    await self._deleted(event.stream)
                if events.position > saved:
                    saved = events.position
                    with driver_errors("noting how far deletions were cleaned up"):
                        position = {"$set": {"position": saved}}
                        await self._db.checkpoints.update_one({"_id": CURSOR}, position, upsert=True)

    async def _deleted(self, stream: str) -> None:
        """Clean up behind one job or batch. Harmless when it is done again."""
        events = await self._log.read_stream(stream)
        await self._abandon_deliveries(stream, [event.version for event in events if event.type in _ENDS])
        references = [it for event in events if (it := _secrets_of(event)) is not None]
        digests = sorted({digest for event in events for digest in _digests_in(event)})
        due_at = self._log.clock.estimate() + self._grace
        with driver_errors(f"cleaning up behind {stream}"):
            if references:
                await self._db[SECRETS].delete_many({"_id": {"$in": references}})
            for digest in digests:
                due = {"$set": {"due_at": due_at}}
                await self._db[REMOVALS].update_one({"_id": digest}, due, upsert=True)
        if digests:
            self._noted.set()

    async def _abandon_deliveries(self, stream: str, versions: Collection[int]) -> None:
        for version in versions:
            delivery_id = name_of(stream, version)
            try:
                known = await load(self._log, delivery_id)
                if isinstance(known.state, Delivery) and known.state.status == "pending":
                    command = AbandonDelivery(f"{stream} was deleted.")
                    await handle(self._log, delivery_id, command, meta=self._meta, known=known)
            except (CommandRefused, UnreadableEvent) as error:
                _log.info("a webhook of a deleted job is left as it is", delivery_id=delivery_id, reason=str(error))

    # Removing files -----------------------------------------------------------------------------------------------

    async def _remove_files(self) -> None:
        while True:
            self._noted.clear()
            with driver_errors("looking for files to be removed"):
                row = await self._db[REMOVALS].find_one({}, sort=[("due_at", 1)])
            wait = None if row is None else (row["due_at"] - self._log.clock.estimate()).total_seconds()
            if row is not None and wait is not None and wait <= 0:
                await self._remove(row["_id"])
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._noted.wait()

    async def _remove(self, digest: str) -> None:
        """Remove a file that no job needs; try again later if that is not certain yet."""
        try:
            done = await self._removed(digest)
        except (FileLost, StoreUnavailable, OSError) as error:
            _log.warning("a file cannot be removed yet", sha256=digest, error=str(error))
            done = False
        with driver_errors("noting what has become of a file"):
            if done:
                await self._db[REMOVALS].delete_one({"_id": digest})
            else:
                due_at = self._log.clock.estimate() + timedelta(seconds=RETRY_SECONDS)
                await self._db[REMOVALS].update_one({"_id": digest}, {"$set": {"due_at": due_at}})

    async def _removed(self, digest: str) -> bool:
        """Remove a file, or put it back; return whether nothing is left to do about it."""
        if not await self._views_reach_head():
            return False
        needed = await self._is_needed(digest)
        token = secrets.token_hex(8)
        # Also one that is needed: a process that was killed may have left it set aside. It is put back at once.
        saved_at = await self._store.set_aside(digest, token)
        if saved_at is None:
            return True
        remove, done = False, needed
        try:
            if not needed:
                remove, done = await self._decide(digest, saved_at)
        finally:
            # Also when this process is stopped. If it is killed, the file is found again by its note.
            finish = self._store.remove(digest, token) if remove else self._store.put_back(digest, token)
            await asyncio.shield(finish)
        return done

    async def _decide(self, digest: str, saved_at: datetime) -> tuple[bool, bool]:
        """Return whether a file that was set aside is to be removed, and whether nothing is left to do about it."""
        if not await self._views_reach_head():
            return False, False
        oldest = await jobs.oldest_running(self._checkpoint.views)
        if await self._is_needed(digest):  # asked after what runs: what has ended meanwhile is in the views
            return False, True
        if oldest is not None and saved_at >= oldest - _CLOCKS_APART:
            return False, False
        return True, True

    async def _views_reach_head(self) -> bool:
        head = await self._log.head()
        with suppress(TimeoutError):
            async with asyncio.timeout(_VIEWS_SECONDS):
                await self._checkpoint.reached(head)
        return self._checkpoint.position >= head

    async def _is_needed(self, digest: str) -> bool:
        return await files.is_needed(self._checkpoint.views, digest)


def _secrets_of(event: Recorded) -> str | None:
    """Return where the secrets of a job's or batch's webhook are."""
    if event.type not in _BEGINNINGS:
        return None
    webhook: Document = event.data.get("webhook") or {}
    reference: Any = webhook.get("headers_ref")
    return reference if isinstance(reference, str) else None


def _digests_in(event: Recorded) -> list[str]:
    """Return the digests of the files that results or the output of a step name."""
    if event.type not in _WITH_FILES:
        return []
    text = orjson.dumps(event.data, default=str, option=orjson.OPT_NON_STR_KEYS)
    return [digest.decode() for digest in jobs.DIGESTS.findall(text)]
