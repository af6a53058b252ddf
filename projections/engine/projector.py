"""Keep the active views up to date: apply the log to them in order, each event exactly once.

Any number of processes may run a projector. They elect a leader by a lease, and the others stand by. The writes of a
leader are fenced (projections/engine/writer.py) by its fencing token and by the slots that were active when it began. A
former leader, or one whose views were replaced by a rebuild, writes nothing more. After any failure, the checkpoint
contains the position where to continue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from contextlib import AbstractContextManager, suppress
from typing import Any, Final

import structlog

from jobledger.ledger.domain.errors import (
    CommandRejected,
    JobledgerError,
    LedgerBusy,
    LedgerUnavailable,
    LogTruncated,
    StreamBusy,
    UnreadableEvent,
)
from jobledger.ledger.domain.events import EventMetadata, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database, Document, translate_errors
from jobledger.ledger.mongo.leader_election import LeaderElection
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.event_store import EventStore, ReadPosition
from jobledger.ledger.store.subscription import Subscription
from jobledger.ledger.system.pacing import Pacer
from jobledger.projections.engine import stalls
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID, CheckpointFollower, load_checkpoint, take_over
from jobledger.projections.engine.rebuild import Rebuild
from jobledger.projections.engine.shadow import REBUILD_CHECKPOINT_ID
from jobledger.projections.engine.view_registry import PROJECTION_VERSION, create_indexes
from jobledger.projections.engine.writer import ProjectionWriter
from jobledger.projections.slots import Views
from jobledger.projections.views import batches

_log = structlog.get_logger()
CHUNK_EVENTS: Final = 5000
_FLOOD_EVENTS: Final = 300
"""A chunk of so many new events is a flood."""
_FLOOD_READ_SECONDS: Final = 0.1
"""Time between two reads of the log in a flood."""
_MAX_FLOOD_SECONDS: Final = 5.0
"""Time after which the change stream is opened again in any case, so that its other listeners resync."""
_MAX_FOLLOW_UP_DELAY_SECONDS: Final = 0.25
STALL_RETRY_SECONDS: Final = 10.0
"""After an event that it cannot read, a projector gives up the lead for this time before it tries again."""
SHADOW_RETENTION_SECONDS: Final = 60.0
"""Replaced views are kept for this time, because a request may still be reading them."""


class ViewVersionMismatch(Exception):
    """Another version of this program built the active views."""


class Projector:
    """Updates the views while it is the leader, and stands by otherwise.

    Args:
        holder: Name of this process in the lease.
        leader_task: Runs while this process leads, for work that only one process should do. Default: nothing.
        pause_stream: `ChangeStream.pause` of this process. None: other roles of this process need the stream.
    """

    def __init__(
        self,
        db: Database,
        event_store: EventStore,
        connection: Connection,
        checkpoint: CheckpointFollower,
        *,
        holder: str,
        lease_seconds: float = 10.0,
        leader_task: Callable[[], Coroutine[Any, Any, None]] = lambda: asyncio.sleep(0),
        pause_stream: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._leader_task = leader_task
        self._pause_stream = pause_stream
        self._db = db
        self._event_store = event_store
        self._checkpoint = checkpoint
        self._leader_election = LeaderElection(connection, "projector", holder=holder, lease_seconds=lease_seconds)
        self._rebuild = Rebuild(db, event_store, connection, holder=holder, lease_seconds=lease_seconds)

    def register_listeners(self, change_stream: ChangeStream) -> None:
        """Add the listeners of the projector. Call this before the change stream runs, and before `run`."""
        change_stream.add_listener(self._leader_election)
        change_stream.add_listener(self._rebuild.leader_election)

    async def prepare(self) -> None:
        """Create the checkpoint and the indexes of the active views, if they do not exist."""
        with translate_errors("preparing the views"):
            initial: Document = {"position": 0, "fencing_token": 0, "version": PROJECTION_VERSION, "slots": {}}
            await self._db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$setOnInsert": initial}, upsert=True)
            await create_indexes(Views(self._db, (await load_checkpoint(self._db)).get("slots")))

    async def run(self) -> None:
        """Stand by and lead until cancelled. Views of an older version are rebuilt in their shadow slots first."""
        while True:
            version = await self._checkpoint.wait_for_version()
            log = _log.bind(views_version=version, supported_version=PROJECTION_VERSION)
            if version > PROJECTION_VERSION:
                log.error("views were written by a newer version, waiting")
                await self._checkpoint.wait_for_version(other_than=version)
            elif version < PROJECTION_VERSION:
                log.warning("views were written by an older version, rebuilding")
                await self._rebuild.run(only_if_outdated=True)
                await self._checkpoint.wait_for_version(other_than=version)
            else:
                try:
                    await self._leader_election.run(self._run_as_leader)
                except ViewVersionMismatch:
                    await self._checkpoint.wait_for_version(other_than=version)
                except (UnreadableEvent, LogTruncated) as error:
                    await self._wait_after_stall(error)

    async def _run_as_leader(self) -> None:
        writer = await self._take_over()
        self._event_store.may_have_lost_events = False
        await self._event_store.check_not_truncated(writer.last_applied, "the views")
        _log.info(
            "projector elected leader", position=writer.position, fencing_token=self._leader_election.fencing_token
        )
        clearing = asyncio.create_task(self._clear_shadow_after_switch(), name="clear-shadow-views")
        leader_task = asyncio.create_task(self._leader_task(), name="projector-leader-task")
        try:
            async with self._event_store.subscribe(after=writer.position) as events:
                pacer = Pacer()
                head = await self._event_store.read_head_position()
                while writer.position < head:
                    await writer.apply(await self._read_chunk(events, writer))
                follow_ups = _FollowUps(self._append_follow_ups)
                await self._append_follow_ups(await batches.find_batches_to_check(writer.views))
                while True:
                    chunk = await self._read_chunk(events, writer)
                    changed = await writer.apply(chunk)
                    is_full = len(chunk) == CHUNK_EVENTS
                    is_behind = is_full and await self._event_store.read_head_position() > writer.position
                    await follow_ups.add(changed, may_be_outdated=is_behind)
                    if len(chunk) >= _FLOOD_EVENTS and self._pause_stream is not None:
                        with self._pause_stream():
                            await self._follow_flood(writer, follow_ups)
                        events.rewind(writer.position)
                    await pacer.wait()
        finally:
            for task in (clearing, leader_task):
                task.cancel()
            await asyncio.gather(clearing, leader_task, return_exceptions=True)

    async def _take_over(self) -> ProjectionWriter:
        """Take over the checkpoint of the views, and return the writer.

        Raises:
            LeadershipLost: Another process leads by now.
            ViewVersionMismatch: Another version of this program built the views.
        """
        token = self._leader_election.fencing_token
        with translate_errors("taking over the views"):
            checkpoint = await take_over(self._db, VIEWS_CHECKPOINT_ID, token)
        if checkpoint.get("version") != PROJECTION_VERSION:
            raise ViewVersionMismatch
        slots = checkpoint.get("slots")
        return ProjectionWriter(
            self._db,
            Views(self._db, slots),
            checkpoint_id=VIEWS_CHECKPOINT_ID,
            checkpoint_filter={"fencing_token": token, "slots": slots},
            last_applied=ReadPosition.from_document(checkpoint),
        )

    async def _read_chunk(self, events: Subscription, writer: ProjectionWriter) -> list[RecordedEvent]:
        """Return the next events.

        Raises:
            LogTruncated: Events that the views contain were removed from the log.
        """
        while True:
            chunk = await events.read_chunk(CHUNK_EVENTS)
            if not self._event_store.may_have_lost_events:
                return chunk
            self._event_store.may_have_lost_events = False
            await self._event_store.check_not_truncated(writer.last_applied, "the views")
            events.rewind(writer.position)  # the chunk may have been read before its events were removed

    async def _follow_flood(self, writer: ProjectionWriter, follow_ups: _FollowUps) -> None:
        """Read the log several times a second, until there are few new events, for a few seconds at most.

        During a flood there are always new events, so nothing needs to signal them. Reading many from the log takes
        less than half of the time that reading each of them from the change stream takes.
        """
        loop = asyncio.get_running_loop()
        end_at = loop.time() + _MAX_FLOOD_SECONDS
        read_at = loop.time()
        while loop.time() < end_at:
            await asyncio.sleep(max(0.0, read_at + _FLOOD_READ_SECONDS - loop.time()))
            read_at = loop.time()
            await self._event_store.check_not_truncated(writer.last_applied, "the views")
            chunk = await self._event_store.read(after=writer.position, limit=CHUNK_EVENTS)
            is_flood = len(chunk) >= _FLOOD_EVENTS // 3
            await follow_ups.add(await writer.apply(chunk), may_be_outdated=is_flood)
            if not is_flood:
                return
        await follow_ups.add((), may_be_outdated=False)

    async def _append_follow_ups(self, changed_batches: Iterable[Document]) -> None:
        """Append the events that the counts of batches require: a batch is finished, or is reopened."""
        for batch in changed_batches:
            batch_id = batch["batch_id"]
            try:
                if (command := batches.find_follow_up_command(batch)) is None:
                    continue
                await handle_command(self._event_store, batch_id, command, meta=EventMetadata("system", batch_id))
            except CommandRejected as rejected:
                _log.info("batch not finished: command rejected", batch_id=batch_id, reason=str(rejected))
            except StreamBusy as error:  # the next event of its stream leads to another try
                _log.warning("batch not finished yet: its stream is busy", batch_id=batch_id, reason=str(error))
            except (LedgerUnavailable, LedgerBusy):
                raise
            except (JobledgerError, LookupError, TypeError, ValueError) as error:
                # One batch must not stop the projector. The next leader tries again, perhaps with a fixed program.
                _log.error("batch finish not recorded", batch_id=batch_id, error=repr(error))

    async def _wait_after_stall(self, error: UnreadableEvent | LogTruncated) -> None:
        """Record why this projector stops, and leave the lead to a projector of a later version, if there is one.

        An event of a later version must not be isolated, because the later version can apply it. Views that are ahead
        of a truncated log wait for `jobledger views rebuild`.
        """
        _log.error("projector stalled", reason=str(error))
        with suppress(LedgerUnavailable):
            await stalls.record_stall(self._db, str(error))
        await asyncio.sleep(STALL_RETRY_SECONDS)

    async def _clear_shadow_after_switch(self) -> None:
        """After each rebuild, empty the replaced views when no request reads them any longer."""
        while True:
            slots = self._checkpoint.views.slots
            try:
                with translate_errors("reading the checkpoint of the rebuild"):
                    checkpoint = await self._db.checkpoints.find_one({"_id": REBUILD_CHECKPOINT_ID}) or {}
                if (switched_at := checkpoint.get("switched_at")) is not None:
                    age_seconds = (self._event_store.clock.estimate() - switched_at).total_seconds()
                    await asyncio.sleep(max(0.0, SHADOW_RETENTION_SECONDS - age_seconds))
                    await self._rebuild.clear_shadow(switched_at)
            except LedgerUnavailable as error:
                _log.warning("shadow views not cleared, retrying", error=str(error))
                await asyncio.sleep(SHADOW_RETENTION_SECONDS)
                continue
            await self._checkpoint.wait_for_slot_change(slots)


class _FollowUps:
    """Batches that may require an event. Their events are appended at once, or a fraction of a second later.

    Args:
        append: Appends the events that the documents of batches require.
    """

    def __init__(self, append: Callable[[Iterable[Document]], Awaitable[None]]) -> None:
        self._append = append
        self._changed_batches: dict[str, Document] = {}
        self._appended_at = 0.0

    async def add(self, changed_batches: Iterable[Document], *, may_be_outdated: bool) -> None:
        """Append the events that batches require.

        Args:
            changed_batches: The documents of batches that have changed.
            may_be_outdated: Whether the log contains later events. The next ones are likely to change them again.
        """
        self._changed_batches |= {batch["_id"]: batch for batch in changed_batches}
        now = asyncio.get_running_loop().time()
        if self._changed_batches and (not may_be_outdated or now - self._appended_at > _MAX_FOLLOW_UP_DELAY_SECONDS):
            self._appended_at = now
            changed, self._changed_batches = self._changed_batches, {}
            await self._append(changed.values())
