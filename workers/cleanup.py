"""workers: removes what a deleted job or batch leaves behind and no event needs.

That is: the secrets of its webhook, deliveries that are still to be made, and its files, unless another job has the
same content. The log keeps everything else. Why nothing is forgotten: a cursor says how far the log was read, and moves
only when the files are noted in `file_removals`. A note goes only when its file is removed, or is needed.

Why no file is removed that somebody needs: its name is taken away first. Whoever saves the same content from then on
finds no such file, and writes a new one. Whoever saved it before is either still running or has ended. If it is still
running, the file's time is not before the attempt's start, because saving a file that is there already renews its time:
so the file is put back. If it has ended, its steps and results are in the views, once these have reached the head that
was read after the name was taken away. Who copies a finished step of another job records that before its lease ends, or
is fenced: so a removal waits longer than a lease. While the views do not know all files of a job, nothing is removed.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Collection
from contextlib import aclosing, suppress
from datetime import datetime, timedelta
from typing import Final

import structlog

from jobledger.ledger.domain.commands import AbandonDelivery
from jobledger.ledger.domain.delivery import Delivery, delivery_id_for
from jobledger.ledger.domain.errors import CommandRejected, LedgerBusy, LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import (
    BatchDeleted,
    BatchFinished,
    BatchSubmitted,
    EventMetadata,
    JobCancelled,
    JobCompleted,
    JobDeleted,
    JobFailed,
    JobSubmitted,
    RecordedEvent,
    StepCompleted,
)
from jobledger.ledger.domain.saved_files import find_saved_files, is_sha256
from jobledger.ledger.files.directory import FileStore
from jobledger.ledger.mongo.connection import Database, translate_errors
from jobledger.ledger.store.command_handler import handle_command, load_stream_state
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import Checkpoint
from jobledger.projections.views import files, jobs

_log = structlog.get_logger()
CURSOR: Final = "cleanup"
"""The document of `checkpoints` that says how far the log was read."""
SKIPPED: Final = "skipped"
"""Its field with the deleted jobs and batches that cannot be cleaned up, the newest of them."""
FILE_REMOVALS: Final = "file_removals"
WEBHOOK_SECRETS: Final = "webhook_secrets"
GRACE_SECONDS: Final = 15.0
"""Longer than the lease of a worker."""
RETRY_SECONDS: Final = 60.0
_UNKNOWN_SECONDS: Final = 600.0
"""Until a file is looked at again that a job may have of which the views do not know all files."""
_SKIPPED_KEPT: Final = 100
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
        log: EventStore,
        file_store: FileStore,
        checkpoint: Checkpoint,
        *,
        holder: str,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._db = db
        self._log = log
        self._store = file_store
        self._checkpoint = checkpoint
        self._grace = timedelta(seconds=grace_seconds)
        self._meta = EventMetadata(f"cleanup:{holder}")
        self._removal_added = asyncio.Event()

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
        with translate_errors("reading how far deletions were cleaned up"):
            found = await self._db.checkpoints.find_one({"_id": CURSOR}) or {}
        saved = int(found.get("position", 0))
        async with self._log.subscribe(after=saved, types=(JobDeleted, BatchDeleted)) as events:
            while True:
                found_now: list[RecordedEvent] = []
                with suppress(TimeoutError):
                    async with asyncio.timeout(_SAVE_CURSOR_SECONDS):
                        found_now = await events.next_chunk()
                for event in found_now:
                    await self._clean_up_or_skip(event.stream)
                if events.position > saved:
                    saved = events.position
                    with translate_errors("noting how far deletions were cleaned up"):
                        position = {"$set": {"position": saved}}
                        await self._db.checkpoints.update_one({"_id": CURSOR}, position, upsert=True)

    async def _clean_up_or_skip(self, stream: str) -> None:
        """Clean up behind one job or batch. One that cannot be read is noted, and does not stop the others."""
        try:
            await self._clean_up_stream(stream)
        except (LedgerUnavailable, LedgerBusy):
            raise
        except Exception:  # noqa: BLE001 - whatever is stored there, the next stream is cleaned up
            _log.exception("a deleted job or batch is not cleaned up: its files and secrets stay", stream=stream)
            noted = {"$push": {SKIPPED: {"$each": [stream], "$slice": -_SKIPPED_KEPT}}}
            with translate_errors("noting what was not cleaned up"):
                await self._db.checkpoints.update_one({"_id": CURSOR}, noted, upsert=True)

    async def _clean_up_stream(self, stream: str) -> None:
        """Clean up behind one job or batch. Harmless when it is done again."""
        ends: list[int] = []
        references: set[str] = set()
        digests: set[str] = set()
        async with aclosing(self._log.iterate_stream(stream)) as events:
            async for event in events:
                if event.type in _ENDS:
                    ends.append(event.version)
                references |= _secrets_of(event)
                digests |= _digests_in(event)
        await self._abandon_deliveries(stream, ends)
        due_at = self._log.clock.estimate() + self._grace
        with translate_errors(f"cleaning up behind {stream}"):
            if references:
                await self._db[WEBHOOK_SECRETS].delete_many({"_id": {"$in": list(references)}})
            for digest in sorted(digests):
                due = {"$set": {"due_at": due_at}}
                await self._db[FILE_REMOVALS].update_one({"_id": digest}, due, upsert=True)
        if digests:
            self._removal_added.set()

    async def _abandon_deliveries(self, stream: str, versions: Collection[int]) -> None:
        for version in versions:
            delivery_id = delivery_id_for(stream, version)
            try:
                known = await load_stream_state(self._log, delivery_id)
                if isinstance(known.state, Delivery) and known.state.status == "pending":
                    command = AbandonDelivery(f"{stream} was deleted.")
                    await handle_command(self._log, delivery_id, command, meta=self._meta, stream_state=known)
            except (CommandRejected, UnreadableEvent) as error:
                _log.info("a webhook of a deleted job is left as it is", delivery_id=delivery_id, reason=str(error))

    # Removing files -----------------------------------------------------------------------------------------------

    async def _remove_files(self) -> None:
        while True:
            self._removal_added.clear()
            with translate_errors("looking for files to be removed"):
                row = await self._db[FILE_REMOVALS].find_one({}, sort=[("due_at", 1)])
            wait = None if row is None else (row["due_at"] - self._log.clock.estimate()).total_seconds()
            if row is not None and wait is not None and wait <= 0:
                await self._remove(row["_id"])
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._removal_added.wait()

    async def _remove(self, digest: str) -> None:
        """Remove a file that no job needs; try again later if that is not certain yet."""
        try:
            again_after = await self._remove_or_put_back(digest)
        except (LedgerUnavailable, LedgerBusy):
            raise
        except Exception as error:  # noqa: BLE001 - one file must not keep the others from being removed
            _log.warning("a file cannot be removed yet", sha256=digest, error=repr(error))
            again_after = RETRY_SECONDS
        with translate_errors("noting what has become of a file"):
            if again_after is None:
                await self._db[FILE_REMOVALS].delete_one({"_id": digest})
            else:
                due_at = self._log.clock.estimate() + timedelta(seconds=again_after)
                await self._db[FILE_REMOVALS].update_one({"_id": digest}, {"$set": {"due_at": due_at}})

    async def _remove_or_put_back(self, digest: str) -> float | None:
        """Remove a file, or put it back; return after how many seconds to try again, None if nothing is left to do."""
        if not await self._views_reach_head():
            return RETRY_SECONDS
        needed = await self._is_needed(digest)
        token = secrets.token_hex(8)
        # Also one that is needed: a process that was killed may have left it set aside. It is put back at once.
        saved_at = await self._store.begin_removal(digest, token)
        if saved_at is None:
            return None
        remove, again_after = False, None
        try:
            if not needed:
                remove, again_after = await self._decide_removal(digest, saved_at)
        finally:
            # Also when this process is stopped. If it is killed, the file is found again by its note.
            finish = self._store.finish_removal(digest, token) if remove else self._store.cancel_removal(digest, token)
            await asyncio.shield(finish)
        return again_after

    async def _decide_removal(self, digest: str, saved_at: datetime) -> tuple[bool, float | None]:
        """Return whether a file that was set aside is to be removed, and after how many seconds to ask again."""
        if not await self._views_reach_head():
            return False, RETRY_SECONDS
        oldest = await jobs.oldest_running_started_at(self._checkpoint.views)
        if await self._is_needed(digest):  # asked after what runs: what has ended meanwhile is in the views
            return False, None
        if await files.find_jobs_with_unknown_files(self._checkpoint.views, limit=1):
            return False, _UNKNOWN_SECONDS
        if oldest is not None and saved_at >= oldest - _CLOCKS_APART:
            return False, RETRY_SECONDS
        return True, None

    async def _views_reach_head(self) -> bool:
        head = await self._log.head_position()
        with suppress(TimeoutError):
            async with asyncio.timeout(_VIEWS_SECONDS):
                await self._checkpoint.wait_for_position(head)
        return self._checkpoint.position >= head

    async def _is_needed(self, digest: str) -> bool:
        return await files.is_referenced(self._checkpoint.views, digest)


def _secrets_of(event: RecordedEvent) -> set[str]:
    """Return where the secrets of a job's or batch's webhook are."""
    webhook = event.payload.get("webhook") if event.type in _BEGINNINGS else None
    reference = webhook.get("secrets_ref") if isinstance(webhook, dict) else None
    return {reference} if isinstance(reference, str) else set()


def _digests_in(event: RecordedEvent) -> set[str]:
    """Return the digests of the files that results or the output of a step name."""
    if event.type not in _WITH_FILES:
        return set()
    return {file.sha256 for file in find_saved_files(event.data) if is_sha256(file.sha256)}
