"""projections: the projector. Folds the log into the live views, in order, exactly once.

Any number of processes may run one; they elect a leader by a lease, the rest stand by. What a leader writes is fenced
(projections/engine/writer.py) by its fencing token and by the sides that were live when it began: a deposed leader, or
one whose views have been replaced, writes nothing more. After any failure the checkpoint says where to go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, Final

import structlog

from jobledger.ledger.domain.errors import (
    CommandRejected,
    JobledgerError,
    LedgerBusy,
    LedgerUnavailable,
    LogTruncated,
    UnreadableEvent,
)
from jobledger.ledger.domain.events import EventMetadata, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database, Document, translate_errors
from jobledger.ledger.mongo.leader_election import LeaderElection, LeadershipLost
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.event_store import EventStore, ReadPosition
from jobledger.ledger.store.subscription import Subscription
from jobledger.projections.engine import health
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID, Checkpoint
from jobledger.projections.engine.rebuild import REBUILD_CHECKPOINT_ID, Rebuild
from jobledger.projections.engine.writer import ALL_VIEWS, PROJECTION_VERSION, ProjectionWriter
from jobledger.projections.slots import Views
from jobledger.projections.views import batches

_log = structlog.get_logger()
CHUNK_EVENTS: Final = 1000
STALL_RETRY_SECONDS: Final = 10.0
"""For so long a projector that cannot read an event leaves the lead to others, before it looks again."""
SHADOW_RETENTION_SECONDS: Final = 60.0
"""For so long what was read before a rebuild is left alone: a request may still be at it."""


class ViewVersionMismatch(Exception):
    """The live views were made by another version of this program."""


async def _no_leader_task() -> None:
    """Do nothing beside the projector."""


class Projector:
    """Keeps the views up to date while it is the leader, and stands by while another is."""

    def __init__(
        self,
        db: Database,
        log: EventStore,
        connection: Connection,
        checkpoint: Checkpoint,
        *,
        holder: str,
        lease_seconds: float = 10.0,
        leader_task: Callable[[], Coroutine[Any, Any, None]] = _no_leader_task,
    ) -> None:
        self._leader_task = leader_task
        """Runs while this process leads: what only one process should do, and needs no lease of its own."""
        self._db = db
        self._log = log
        self._checkpoint = checkpoint
        self._leadership = LeaderElection(connection, "projector", holder=holder, lease_seconds=lease_seconds)
        self._rebuild = Rebuild(db, log, connection, holder=holder, lease_seconds=lease_seconds)

    def register_listeners(self, change_stream: ChangeStream) -> None:
        """Hear of what concerns the projector. Call before the change stream runs, if `run` is to be called."""
        change_stream.add_listener(self._leadership)
        change_stream.add_listener(self._rebuild.leader_election)

    async def prepare(self) -> None:
        """Create the live views' indexes and the checkpoint. Harmless when they exist."""
        with translate_errors("preparing the views"):
            made: Document = {"position": 0, "fencing_token": 0, "version": PROJECTION_VERSION, "slots": {}}
            await self._db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$setOnInsert": made}, upsert=True)
            found = await self._db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID})
            views = Views(self._db, (found or made).get("slots"))
            for view in ALL_VIEWS:
                if view.INDEXES:
                    await views[view.NAME].create_indexes(list(view.INDEXES))

    async def run(self) -> None:
        """Stand by, lead, stand by …, until cancelled. Views of an older version are made anew behind the live ones."""
        while True:
            version = await self._checkpoint.wait_for_version()
            if version > PROJECTION_VERSION:
                _log.error(
                    "views were written by a newer version, waiting",
                    views_version=version,
                    supported_version=PROJECTION_VERSION,
                )
                await self._checkpoint.wait_for_version_change(version)
            elif version < PROJECTION_VERSION:
                _log.warning(
                    "views were written by an older version, rebuilding",
                    views_version=version,
                    supported_version=PROJECTION_VERSION,
                )
                await self._rebuild.run(only_if_outdated=True)
                await self._checkpoint.wait_for_version_change(version)
            else:
                try:
                    await self._leadership.run(self._run_as_leader)
                except ViewVersionMismatch:
                    await self._checkpoint.wait_for_version_change(version)
                except (UnreadableEvent, LogTruncated) as error:
                    await self._wait_after_stall(error)

    async def _run_as_leader(self) -> None:
        folder = await self._take_over()
        self._log.may_have_lost_events = False
        await self._log.check_not_truncated(folder.last_applied, "the views")
        _log.info("projector elected leader", position=folder.position, fencing_token=self._leadership.fencing_token)
        tidying = asyncio.create_task(self._clear_shadow_after_switch(), name="tidy")
        beside = asyncio.create_task(self._leader_task(), name="beside-projector")
        try:
            async with self._log.subscribe(after=folder.position) as events:
                due: dict[str, Document] = {}
                head = await self._log.head_position()
                while folder.position < head:
                    await folder.apply(await self._read_chunk(events, folder))
                await self._append_follow_ups(await batches.find_unsettled(folder.views))
                while True:
                    chunk = await self._read_chunk(events, folder)
                    due |= {batch["_id"]: batch for batch in await folder.apply(chunk)}
                    # While there is more, what the views say need not be so any more.
                    if len(chunk) < CHUNK_EVENTS or await self._log.head_position() <= folder.position:
                        await self._append_follow_ups(due.values())
                        due.clear()
        finally:
            for task in (tidying, beside):
                task.cancel()
            await asyncio.gather(tidying, beside, return_exceptions=True)

    async def _read_chunk(self, events: Subscription, folder: ProjectionWriter) -> list[RecordedEvent]:
        """Return the next events.

        Raises:
            LogTruncated: Events that the views contain were removed meanwhile.
        """
        while True:
            chunk = await events.next_chunk(CHUNK_EVENTS)
            if not self._log.may_have_lost_events:
                return chunk
            self._log.may_have_lost_events = False
            await self._log.check_not_truncated(folder.last_applied, "the views")
            events.rewind(folder.position)  # the chunk may have been read before its events were removed

    async def _wait_after_stall(self, error: UnreadableEvent | LogTruncated) -> None:
        """Leave the lead to a projector of a later version, if there is one, and say why this one does not go on.

        An event of a later version must not be guessed at, nor be isolated: the next version folds it. Views that are
        ahead of a log whose end was removed wait for `jobledger views rebuild`.
        """
        _log.error("projector stalled", reason=str(error))
        with suppress(LedgerUnavailable):
            await health.record_stall(self._db, str(error))
        await asyncio.sleep(STALL_RETRY_SECONDS)

    async def _take_over(self) -> ProjectionWriter:
        """Put this leader's fencing token on the checkpoint and return the writer that continues from there.

        Raises:
            Deposed: somebody else leads by now.
            OtherVersion: these views are not ours to fold.
        """
        fencing_token = self._leadership.fencing_token
        with translate_errors("taking over the views"):
            found = await self._db.checkpoints.find_one_and_update(
                {"_id": VIEWS_CHECKPOINT_ID, "fencing_token": {"$lt": fencing_token}},
                {"$set": {"fencing_token": fencing_token}},
            )
        if found is None:
            raise LeadershipLost
        if found.get("version") != PROJECTION_VERSION:
            raise ViewVersionMismatch
        sides = found.get("slots")
        fence = {"fencing_token": fencing_token, "slots": sides}
        return ProjectionWriter(
            self._db,
            Views(self._db, sides),
            checkpoint=VIEWS_CHECKPOINT_ID,
            fence=fence,
            read=ReadPosition.from_document(found),
        )

    async def _clear_shadow_after_switch(self) -> None:
        """Empty what was read before a rebuild, when nobody reads it any more; after the next one, again."""
        while True:
            sides = self._checkpoint.views.slots
            try:
                with translate_errors("looking for what a rebuild has left"):
                    note = await self._db.checkpoints.find_one({"_id": REBUILD_CHECKPOINT_ID}) or {}
                if (switched_at := note.get("switched_at")) is not None:
                    waited = (self._log.clock.estimate() - switched_at).total_seconds()
                    await asyncio.sleep(max(0.0, SHADOW_RETENTION_SECONDS - waited))
                    await self._rebuild.clear_shadow(switched_at)
            except LedgerUnavailable as error:
                _log.warning("shadow views not cleared, retrying", error=str(error))
                await asyncio.sleep(SHADOW_RETENTION_SECONDS)
                continue
            await self._checkpoint.wait_for_slot_change(sides)

    async def _append_follow_ups(self, changed: Iterable[Document]) -> None:
        """Record what the counts say about batches: that one has ended, or goes on again."""
        for batch in changed:
            batch_id = batch["batch_id"]
            try:
                if (command := batches.follow_up_command(batch)) is None:
                    continue
                await handle_command(self._log, batch_id, command, meta=EventMetadata("system", batch_id))
            except CommandRejected as refused:
                _log.info("batch not finished: command rejected", batch_id=batch_id, reason=str(refused))
            except (LedgerUnavailable, LedgerBusy):
                raise
            except (JobledgerError, LookupError, TypeError, ValueError) as error:
                # One batch must not stop the projector; when the program has been mended, the next leader tries again.
                _log.error("batch finish not recorded", batch_id=batch_id, error=repr(error))
