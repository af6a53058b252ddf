"""Remove the data of deleted jobs and batches that is not in the log.

These are the secrets of its webhook, its pending deliveries, and its files, unless another job has the same content.
The log keeps everything else. After a restart, the files of earlier results are removed if no step needs them.

Nothing is missed: a cursor stores how far the log was read, and it moves only when the files are recorded in
`file_removals`. A record is deleted only when its file is removed or needed.

No needed file is removed. First, the file is set aside, so its name no longer exists. A process that saves the same
content later finds no such file and writes a new one. A job that saved it before either still runs or has ended:

- If the job still runs, the file's time is not before the start of the attempt, because saving an existing file renews
  its time. The file is put back.
- If the job has ended, its steps and results are in the views as soon as these reach the head of the log. The head is
  read after the file was set aside.

A removal waits longer than a lease. A job that reuses a step of another job records that before its lease ends, or is
fenced. While the views do not contain all files of some job, nothing is removed.
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
from jobledger.ledger.domain.delivery import Delivery, build_delivery_id
from jobledger.ledger.domain.errors import CommandRejected, LedgerBusy, LedgerUnavailable, UnreadableEvent
from jobledger.ledger.domain.events import BatchDeleted, EventMetadata, JobDeleted, JobRestarted, RecordedEvent
from jobledger.ledger.domain.result_files import find_result_files, is_sha256
from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.mongo.connection import Database, translate_errors
from jobledger.ledger.store.command_handler import handle_command, load_stream_state
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower
from jobledger.projections.views import files, job_list

_log = structlog.get_logger()
CURSOR: Final = "cleanup"
"""Document of `checkpoints` that stores how far the log was read."""
SKIPPED: Final = "skipped"
"""Field of that document with the most recent deleted jobs and batches that cannot be cleaned up."""
FILE_REMOVALS: Final = "file_removals"
GRACE_SECONDS: Final = 15.0
"""Longer than the lease of a worker."""
RETRY_SECONDS: Final = 60.0
_UNKNOWN_FILES_SECONDS: Final = 600.0
"""Delay until the next check of a file while the views do not contain all files of some job."""
_MAX_SKIPPED: Final = 100
_PAUSE_SECONDS: Final = 2.0
_MAX_CLOCK_SKEW: Final = timedelta(minutes=2)
"""Maximum difference between the clocks of a worker and the result store."""
_SAVE_CURSOR_SECONDS: Final = 60.0
_VIEWS_TIMEOUT_SECONDS: Final = 30.0
_EVENT_TYPES_WITH_FILES: Final = ("JobCompleted", "StepCompleted")
_FINISHING_EVENT_TYPES: Final = ("JobCompleted", "JobFailed", "JobCancelled", "BatchFinished")
_SUBMITTED_EVENT_TYPES: Final = ("JobSubmitted", "BatchSubmitted")
_EVENTS: Final = (JobDeleted, BatchDeleted, JobRestarted)
"""After these events, data may be left that nothing needs."""


class Cleanup:
    """Removes the data of deleted jobs and batches. Runs in the process of the leading projector, as its `leader_task`.

    Two may run for a moment if one was suspended. Each has its own removal ID: see `FileStore.begin_removal`.
    """

    def __init__(
        self,
        db: Database,
        event_store: EventStore,
        file_store: FileStore,
        checkpoint: CheckpointFollower,
        *,
        holder: str,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._db = db
        self._event_store = event_store
        self._file_store = file_store
        self._checkpoint = checkpoint
        self._grace = timedelta(seconds=grace_seconds)
        self._metadata = EventMetadata(f"cleanup:{holder}")
        self._removal_added = asyncio.Event()

    async def run(self) -> None:
        """Clean up until cancelled. After an error, continue at the cursor."""
        while True:
            try:
                await self._clean_up()
            except (LedgerUnavailable, LedgerBusy) as error:
                _log.warning("cleanup after deleted jobs interrupted", error=str(error))
                await asyncio.sleep(_PAUSE_SECONDS)
            except Exception:  # noqa: BLE001 - the projector beside it must continue
                _log.exception("cleanup after deleted jobs failed")
                await asyncio.sleep(RETRY_SECONDS)

    async def _clean_up(self) -> None:
        """Follow deletions and remove files, until either fails."""
        tasks = [asyncio.create_task(self._remove_files()), asyncio.create_task(self._follow())]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    # Following the log --------------------------------------------------------------------------------------------

    async def _follow(self) -> None:
        with translate_errors("reading the cleanup cursor"):
            found = await self._db.checkpoints.find_one({"_id": CURSOR}) or {}
        saved = int(found.get("position", 0))
        async with self._event_store.subscribe(after=saved, types=_EVENTS) as events:
            while True:
                causes: list[RecordedEvent] = []
                with suppress(TimeoutError):
                    async with asyncio.timeout(_SAVE_CURSOR_SECONDS):
                        causes = await events.read_chunk()
                for event in causes:
                    await self._clean_up_or_skip(event.stream, is_deleted=event.type != JobRestarted.__name__)
                if events.position > saved:
                    saved = events.position
                    with translate_errors("saving the cleanup cursor"):
                        position = {"$set": {"position": saved}}
                        await self._db.checkpoints.update_one({"_id": CURSOR}, position, upsert=True)

    async def _clean_up_or_skip(self, stream: str, *, is_deleted: bool) -> None:
        """Clean up after one job or batch. If it cannot be read, record that and continue with the others."""
        try:
            await self._clean_up_stream(stream, is_deleted=is_deleted)
        except (LedgerUnavailable, LedgerBusy):
            raise
        except Exception:  # noqa: BLE001 - the next stream must be cleaned up
            _log.exception("cannot clean up after a job or batch: its files and secrets remain", stream=stream)
            update = {"$push": {SKIPPED: {"$each": [stream], "$slice": -_MAX_SKIPPED}}}
            with translate_errors("recording a skipped cleanup"):
                await self._db.checkpoints.update_one({"_id": CURSOR}, update, upsert=True)

    async def _clean_up_stream(self, stream: str, *, is_deleted: bool) -> None:
        """Clean up after one job or batch that was deleted, or restarted. Idempotent."""
        final_versions: list[int] = []
        references: set[str] = set()
        digests: set[str] = set()
        async with aclosing(self._event_store.iterate_stream(stream)) as events:
            async for event in events:
                if event.type in _FINISHING_EVENT_TYPES:
                    final_versions.append(event.version)
                webhook = event.payload_fields.get("webhook") if event.type in _SUBMITTED_EVENT_TYPES else None
                if webhook and webhook.get("secrets_ref"):
                    references.add(webhook["secrets_ref"])
                if event.type in _EVENT_TYPES_WITH_FILES:
                    digests |= {file.sha256 for file in find_result_files(event.data) if is_sha256(file.sha256)}
        if is_deleted:
            await self._abandon_deliveries(stream, final_versions)
        else:
            references.clear()
        due_at = self._event_store.clock.estimate() + self._grace
        with translate_errors(f"cleaning up after {stream}"):
            if references:
                await self._db.webhook_secrets.delete_many({"_id": {"$in": list(references)}})
            for digest in sorted(digests):
                due = {"$set": {"due_at": due_at}}
                await self._db[FILE_REMOVALS].update_one({"_id": digest}, due, upsert=True)
        if digests:
            self._removal_added.set()

    async def _abandon_deliveries(self, stream: str, versions: Collection[int]) -> None:
        for version in versions:
            delivery_id = build_delivery_id(stream, version)
            try:
                state = await load_stream_state(self._event_store, delivery_id)
                if isinstance(state.aggregate, Delivery) and state.aggregate.status == "pending":
                    command = AbandonDelivery(f"{stream} was deleted.")
                    await handle_command(
                        self._event_store, delivery_id, command, meta=self._metadata, stream_state=state
                    )
            except (CommandRejected, UnreadableEvent) as error:
                _log.info("cannot abandon a webhook of a deleted job", delivery_id=delivery_id, reason=str(error))

    # Removing files -----------------------------------------------------------------------------------------------

    async def _remove_files(self) -> None:
        while True:
            self._removal_added.clear()
            with translate_errors("finding files to remove"):
                row = await self._db[FILE_REMOVALS].find_one({}, sort=[("due_at", 1)])
            wait = None if row is None else (row["due_at"] - self._event_store.clock.estimate()).total_seconds()
            if row is not None and wait is not None and wait <= 0:
                await self._remove(row["_id"])
                continue
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._removal_added.wait()

    async def _remove(self, digest: str) -> None:
        """Remove a file that no job needs. If that is not certain yet, schedule another check."""
        try:
            again_after = await self._remove_or_put_back(digest)
        except (LedgerUnavailable, LedgerBusy):
            raise
        except Exception as error:  # noqa: BLE001 - the other files must be removed
            _log.warning("cannot remove a file yet", sha256=digest, error=repr(error))
            again_after = RETRY_SECONDS
        with translate_errors("updating a file removal"):
            if again_after is None:
                await self._db[FILE_REMOVALS].delete_one({"_id": digest})
            else:
                due_at = self._event_store.clock.estimate() + timedelta(seconds=again_after)
                await self._db[FILE_REMOVALS].update_one({"_id": digest}, {"$set": {"due_at": due_at}})

    async def _remove_or_put_back(self, digest: str) -> float | None:
        """Remove a file or put it back. Return the seconds until the next check; None if none is needed."""
        if not await self._wait_until_views_reach_head():
            return RETRY_SECONDS
        is_needed = await files.is_referenced(self._checkpoint.views, digest)
        token = secrets.token_hex(8)
        # Call this even if the file is needed: a killed process may have left it set aside, and it is put back below.
        saved_at = await self._file_store.begin_removal(digest, token)
        if saved_at is None:
            return None
        remove, again_after = False, None
        try:
            if not is_needed:
                remove, again_after = await self._decide_removal(digest, saved_at)
        finally:
            # End the removal even if this process is stopped. If it is killed, the next check of the file ends it.
            end_removal = self._file_store.finish_removal if remove else self._file_store.cancel_removal
            await asyncio.shield(end_removal(digest, token))
        return again_after

    async def _decide_removal(self, digest: str, saved_at: datetime) -> tuple[bool, float | None]:
        """Return whether to remove a file that was set aside, and the seconds until the next check if it stays."""
        if not await self._wait_until_views_reach_head():
            return False, RETRY_SECONDS
        oldest = await job_list.find_oldest_running_started_at(self._checkpoint.views)
        if await files.is_referenced(self._checkpoint.views, digest):  # after `oldest`: ended jobs are in the views
            return False, None
        if await files.find_jobs_with_unknown_files(self._checkpoint.views, limit=1):
            return False, _UNKNOWN_FILES_SECONDS
        if oldest is not None and saved_at >= oldest - _MAX_CLOCK_SKEW:
            return False, RETRY_SECONDS
        return True, None

    async def _wait_until_views_reach_head(self) -> bool:
        head = await self._event_store.read_head_position()
        with suppress(TimeoutError):
            async with asyncio.timeout(_VIEWS_TIMEOUT_SECONDS):
                await self._checkpoint.wait_for_position(head)
        return self._checkpoint.covers(head)
