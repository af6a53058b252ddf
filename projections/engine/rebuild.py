"""Rebuild views from the log in their shadow slots, and switch to them with one write or compare the active views.

Every chunk and the switch are transactions that require the checkpoint of this rebuild with the fencing token of its
process (projections/engine/shadow.py). A process that was replaced finds another token and writes nothing. The switch
also requires that the active views are not ahead, and changes their slots. A projector that writes at the same time
conflicts with the switch. A projector that writes later finds other slots than it began with, and starts again on the
new views.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Final

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.errors import (
    DatabaseUnsuitable,
    JobledgerError,
    LedgerUnavailable,
    LogTruncated,
    UnsupportedEvent,
)
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import (
    SNAPSHOT_TOO_OLD,
    Connection,
    Database,
    Document,
    get_server_error_code,
    translate_errors,
)
from jobledger.ledger.mongo.leader_election import LeaderElection
from jobledger.ledger.mongo.transactions import run_transaction
from jobledger.ledger.store.event_store import EventStore, ReadPosition
from jobledger.ledger.store.subscription import Subscription
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID, load_checkpoint
from jobledger.projections.engine.comparison import Difference, find_differences
from jobledger.projections.engine.shadow import REBUILD_CHECKPOINT_ID, ShadowViews
from jobledger.projections.engine.view_changes import ChunkTooLarge
from jobledger.projections.engine.view_registry import PROJECTION_VERSION, VIEW_NAMES, create_indexes
from jobledger.projections.engine.writer import ProjectionWriter
from jobledger.projections.slots import Views, ViewSlots

_log = structlog.get_logger()
CHUNK_EVENTS: Final = 5000
_CHUNK_SECONDS: Final = 30.0
"""Existing events arrive sooner. After this time, the comparison checks whether they still exist."""
ProgressCallback = Callable[[int, int], None]
"""Called with the position of the shadow views and the position that they have to reach."""
OnDifference = Callable[[Difference], None]
SwitchFunction = Callable[[AsyncClientSession, int], Awaitable[bool]]
"""Switches to the shadow views at a position; returns False if the active views are ahead."""


class NotComparable(JobledgerError):
    """The active views cannot be compared with the log now. The message contains the reason and the remedy."""


class Rebuild:
    """Rebuilds views, to replace the active ones (`run`) or to compare them (`compare`). One process at a time leads.

    Another process continues an interrupted rebuild.
    """

    def __init__(
        self, db: Database, event_store: EventStore, connection: Connection, *, holder: str, lease_seconds: float = 10.0
    ) -> None:
        self._db = db
        self._event_store = event_store
        self.leader_election = LeaderElection(
            connection, REBUILD_CHECKPOINT_ID, holder=holder, lease_seconds=lease_seconds
        )
        """Elects the process that rebuilds. Add it as a listener to the change stream."""
        self._shadow = ShadowViews(db, self.leader_election)

    async def run(
        self,
        names: Collection[str] = VIEW_NAMES,
        *,
        on_progress: ProgressCallback = lambda position, total: None,
        only_if_outdated: bool = False,
    ) -> int:
        """Rebuild all views, switch to the named ones, and return the position of the switch.

        All views are rebuilt because they depend on each other. To switch to only some of them, the active views must
        have reached the same position, so the switch waits until they are idle. With `only_if_outdated`, do nothing and
        return 0 if the active views have the current version by now.

        Raises:
            DatabaseUnsuitable: The active views have another version or are ahead of the log, so all of them must be
                replaced.
            LedgerUnavailable: The database failed.
        """

        async def lead() -> int:
            if only_if_outdated and (await load_checkpoint(self._db)).get("version", 0) >= PROJECTION_VERSION:
                return 0
            ahead_position = await self._find_position_ahead_of_log()
            writer, slots = await self._shadow.open(max_position=None if ahead_position is None else 0)
            _log.info("view rebuild started", after=writer.position)
            switch = self._build_switch_function(slots, names, ahead_position=ahead_position)
            await self._apply_history(writer, await self._event_store.read_head_position(), on_progress)
            # This is much faster than maintaining the indexes with each document of the history.
            with translate_errors("creating the indexes of the views"):
                await create_indexes(writer.views)
            async with self._event_store.subscribe(after=writer.position) as events:
                is_switched = False
                while not is_switched:
                    head = await self._event_store.read_head_position()
                    on_progress(writer.position, head)
                    if writer.position == head:
                        is_switched = await self._switch_when_idle(head, switch)
                    else:
                        chunk = await events.read_chunk(CHUNK_EVENTS)
                        is_last = chunk[-1].position >= head
                        is_switched = await self._apply(writer, chunk, switch if is_last else None)
            on_progress(writer.position, writer.position)
            _log.info("view rebuild finished, switched over", position=writer.position, views=sorted(names))
            return writer.position

        return await self.leader_election.run_once(lead)

    async def compare(
        self,
        names: Collection[str] = VIEW_NAMES,
        *,
        on_progress: ProgressCallback = lambda position, total: None,
        on_difference: OnDifference,
    ) -> int:
        """Rebuild the views in their shadow slots, compare the named active views with them, and empty them again.

        The active views are not changed. Returns the position at which the views were compared.

        Raises:
            NotComparable: The views have another version, the log lacks events, or the comparison took longer than the
                database keeps its history.
            LedgerUnavailable: The database failed.
        """

        async def lead() -> int:
            checkpoint = await load_checkpoint(self._db)
            await self._require_events(ReadPosition.from_document(checkpoint))
            writer, _ = await self._shadow.open(max_position=checkpoint["position"])
            await self._apply_history(writer, (await load_checkpoint(self._db))["position"], on_progress)
            async with self._event_store.subscribe(after=writer.position) as events:
                compared_position = await self._compare_in_snapshot(writer, events, names, on_difference)
            with translate_errors("emptying the shadow views"):
                await self._shadow.reset()
            return compared_position

        return await self.leader_election.run_once(lead)

    async def clear_shadow(self, switched_at: datetime | None = None) -> None:
        """Empty the views that the last switch replaced; with `switched_at`, only if it was at this time."""
        await self.leader_election.run_once(partial(self._shadow.clear_after_switch, switched_at))

    # Applying events ------------------------------------------------------------------------------------------------

    async def _apply_history(self, writer: ProjectionWriter, end: int, on_progress: ProgressCallback) -> None:
        """Apply events until less than a chunk is left before `end`, and never beyond it.

        While a chunk is applied in memory, the previous one is written and the next one is read.
        """

        def start_reading(after: int) -> asyncio.Task[list[RecordedEvent]]:
            return asyncio.create_task(
                self._event_store.read(after=after, limit=CHUNK_EVENTS, without_metadata=True), name="read-ahead"
            )

        reading: asyncio.Task[list[RecordedEvent]] | None = None
        writing: asyncio.Task[None] | None = None
        position = writer.position
        try:
            while position + CHUNK_EVENTS <= end:
                chunk = await (reading or start_reading(position))
                if not chunk:
                    break
                position = chunk[-1].position
                reading = start_reading(position)
                try:
                    prepared = await writer.prepare(chunk)
                    if writing is not None:
                        await writing
                        on_progress(writer.position, end)
                except (ChunkTooLarge, UnsupportedEvent):
                    await self._apply_rest(writer, writing, position)
                    writing = None
                    continue
                writing = asyncio.create_task(writer.write(prepared), name="write-views")
                await asyncio.sleep(0)
            await self._apply_rest(writer, writing, position)
        finally:
            for task in (reading, writing):
                if task is not None:
                    task.cancel()
            await asyncio.gather(*filter(None, (reading, writing)), return_exceptions=True)

    async def _apply_rest(self, writer: ProjectionWriter, writing: asyncio.Task[None] | None, end: int) -> None:
        """Apply the remaining events up to a position in smaller parts.

        Events are read with their metadata, so the checkpoint contains the hash of the last one.

        Raises:
            UnsupportedEvent: A later version of the program wrote one of the events.
        """
        if writing is not None:
            with suppress(ChunkTooLarge):
                await writing
        if writer.position < end:
            writer.discard_unwritten()
        while writer.position < end:
            limit = min(CHUNK_EVENTS, end - writer.position)
            await writer.apply(await self._event_store.read(after=writer.position, limit=limit))

    async def _apply(
        self, writer: ProjectionWriter, events: Sequence[RecordedEvent], switch: SwitchFunction | None
    ) -> bool:
        """Apply a chunk, try to switch in the same transaction, and return whether it switched.

        In a later transaction, the active views would already be ahead again.
        """
        is_switched = False

        async def before_write(session: AsyncClientSession) -> None:
            nonlocal is_switched
            is_switched = switch is not None and await switch(session, events[-1].position)

        await writer.apply(events, before_write=before_write)
        return is_switched

    # Switching ------------------------------------------------------------------------------------------------------

    async def _switch_when_idle(self, position: int, switch: SwitchFunction) -> bool:
        """Switch while there are no events to apply, and return whether it switched."""

        async def try_switch(session: AsyncClientSession) -> bool:
            await self._shadow.update({"$set": {"position": position}}, session, position=position)
            return await switch(session, position)

        with translate_errors("switching to the rebuilt views"):
            return await run_transaction(self._db, try_switch)

    async def _find_position_ahead_of_log(self) -> int | None:
        """Return the position of the active views if they contain events that the log lacks, else None."""
        last_applied = ReadPosition.from_document(await load_checkpoint(self._db))
        try:
            await self._event_store.check_not_truncated(last_applied, "the views")
        except LogTruncated as truncated:
            _log.warning("log truncated, rebuilding views from remaining events", error=str(truncated))
            return last_applied.position
        return None

    def _build_switch_function(
        self, slots: ViewSlots, names: Collection[str], ahead_position: int | None = None
    ) -> SwitchFunction:
        """Return the function that switches to views in the shadow slots.

        Args:
            slots: The shadow slots.
            names: Views to switch to.
            ahead_position: Position of active views that are ahead of the log. All of them must be replaced, because
                the log never reaches their position.

        Raises:
            DatabaseUnsuitable: Only some views are named, and the active views are ahead of the log.
        """
        all_views = set(names) == set(VIEW_NAMES)
        if ahead_position is not None and not all_views:
            raise DatabaseUnsuitable("The views are ahead of the log. Rebuild all of them together, without --view.")

        async def switch(session: AsyncClientSession, position: int) -> bool:
            # The first operation is a write, so a projector that writes at the same time waits for this transaction.
            now = self._event_store.clock.estimate()
            required: Document = {"_id": VIEWS_CHECKPOINT_ID, "position": {"$lte": position} if all_views else position}
            if ahead_position is not None:
                required = {"_id": VIEWS_CHECKPOINT_ID, "position": {"$in": [ahead_position, position]}}
            update = {"position": position, "hash": await self._event_store.read_hash_at(position), "switched_at": now}
            active = await self._db.checkpoints.find_one_and_update(required, {"$set": update}, session=session)
            if active is None:
                return False
            if not all_views and active.get("version") != PROJECTION_VERSION:
                raise DatabaseUnsuitable(
                    "The views have another version. Rebuild all of them together, without --view."
                )
            new_slots = {**active.get("slots", {}), **{name: slots[name] for name in names}}
            await self._db.checkpoints.update_one(
                {"_id": VIEWS_CHECKPOINT_ID},
                {"$set": {"slots": new_slots, "version": PROJECTION_VERSION}},
                session=session,
            )
            await self._shadow.update({"$set": {"switched_at": now}}, session)
            return True

        return switch

    # Comparing ------------------------------------------------------------------------------------------------------

    async def _compare_in_snapshot(
        self, writer: ProjectionWriter, events: Subscription, names: Collection[str], on_difference: OnDifference
    ) -> int:
        """Compare with a snapshot of the active views, which the database keeps for some minutes."""
        try:
            with translate_errors("comparing the views"):
                async with self._db.client.start_session(snapshot=True) as session:
                    active = await load_checkpoint(self._db, session)
                    if active.get("version") != PROJECTION_VERSION:
                        raise NotComparable(
                            "The views were built by another version of this program, so they differ. Rebuild them: "
                            "`jobledger views rebuild`."
                        )
                    while writer.position < active["position"]:
                        await writer.apply(await self._read_chunk(events, active["position"] - writer.position))
                    active_views = Views(self._db, active.get("slots"))
                    for name in names:
                        async for difference in find_differences(name, active_views[name], writer.views[name], session):
                            on_difference(difference)
        except LedgerUnavailable as error:
            if get_server_error_code(error) == SNAPSHOT_TOO_OLD:
                raise NotComparable(
                    "The comparison took longer than the database keeps its history. An administrator can extend it: "
                    "db.adminCommand({setParameter: 1, minSnapshotHistoryWindowInSeconds: 3600})"
                ) from error
            raise
        return int(active["position"])

    async def _require_events(self, last_applied: ReadPosition) -> None:
        """Check that the log contains the events of the active views.

        Raises:
            NotComparable: Events are missing.
        """
        try:
            await self._event_store.check_not_truncated(last_applied, "the views")
        except LogTruncated as truncated:
            raise NotComparable(
                f"{truncated} To rebuild the views from the remaining events: `jobledger views rebuild`."
            ) from truncated

    async def _read_chunk(self, events: Subscription, missing: int) -> Sequence[RecordedEvent]:
        """Return the next events. The active views contain at least `missing` more events of the log.

        Raises:
            NotComparable: These events no longer exist.
        """
        while True:
            try:
                async with asyncio.timeout(_CHUNK_SECONDS):
                    return await events.read_chunk(min(CHUNK_EVENTS, missing))
            except TimeoutError:
                await self._require_events(ReadPosition(events.position + missing))
