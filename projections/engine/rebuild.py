"""projections: the views made anew from the log, beside those that are read, and put in their place by one write.

Why nothing can go wrong, whoever dies or stands still: every chunk, and the switch, is a transaction that demands the
note of this rebuild as this process left it, with its fencing token. Who has been replaced finds
another, and writes nothing.
The switch also demands that the live views are not ahead, and changes their sides: a projector that folds at the same
moment conflicts with it, and one that comes later finds other sides than it began with, and begins again on the new.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import suppress
from datetime import datetime
from functools import partial
from typing import Any, Final

import structlog
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection

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
    server_error_code,
    translate_errors,
)
from jobledger.ledger.mongo.leader_election import LeaderElection, LeadershipLost
from jobledger.ledger.mongo.transactions import run_transaction
from jobledger.ledger.store.event_store import EventStore, ReadPosition
from jobledger.ledger.store.subscription import Subscription
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID
from jobledger.projections.engine.comparison import Difference, find_differences
from jobledger.projections.engine.writer import ALL_VIEWS, PROJECTION_VERSION, ChunkTooLarge, ProjectionWriter
from jobledger.projections.slots import Views, ViewSlots, other_slot

_log = structlog.get_logger()
REBUILD_CHECKPOINT_ID: Final = "rebuild"
"""The note about the rebuild that is under way, or about what is left of the last: a document of `checkpoints`."""
VIEW_NAMES: Final = tuple(view.NAME for view in ALL_VIEWS)
CHUNK_EVENTS: Final = 5000
_DELETE_CHUNK_SIZE: Final = 5000
_CHUNK_SECONDS: Final = 30.0
"""Events that are there arrive sooner; after so long it is asked whether they are there."""
ProgressCallback = Callable[[int, int], None]
"""Is told how far the new views have got, and how far they have to go: two positions."""
SwitchFunction = Callable[[AsyncClientSession, int], Awaitable[bool]]


class NotComparable(JobledgerError):
    """The live views cannot be held against the log now; the message says why and what to do."""


class Rebuild:
    """Makes views anew, one process at a time; what was interrupted is continued by the next."""

    def __init__(
        self, db: Database, log: EventStore, connection: Connection, *, holder: str, lease_seconds: float = 10.0
    ) -> None:
        self._db = db
        self._log = log
        self._leadership = LeaderElection(connection, REBUILD_CHECKPOINT_ID, holder=holder, lease_seconds=lease_seconds)

    @property
    def leader_election(self) -> LeaderElection:
        """Who rebuilds: has to hear of changes."""
        return self._leadership

    async def run(
        self,
        names: Collection[str] = VIEW_NAMES,
        *,
        on_progress: ProgressCallback = lambda position, upto: None,
        only_if_outdated: bool = False,
    ) -> int:
        """Make the views anew and put those that are named in the place of the live ones; return at which position.

        All are made, for they are folded from each other. If only some are named, these are put in their place when the
        live ones have reached the same position: in a moment's rest. With `only_older`, nothing is done if by now the
        live ones are of this version.

        Raises:
            DatabaseUnsuitable: the live views are of another version, so that all of them have to be replaced.
        """
        reached = 0

        async def lead() -> None:
            nonlocal reached
            if only_if_outdated and (await load_checkpoint(self._db)).get("version", 0) >= PROJECTION_VERSION:
                return
            lost = await self._position_ahead_of_log()
            folder, beside = await self._begin(most=None if lost is None else 0)
            _log.info("view rebuild started", after=folder.position)
            switch = self._switch_function(beside, names, lost=lost)
            await self._apply_history(folder, await self._log.head_position(), on_progress)
            with translate_errors("making the indexes of the views"):  # much faster than with every document
                for view in ALL_VIEWS:
                    if view.INDEXES:
                        await folder.views[view.NAME].create_indexes(list(view.INDEXES))
            async with self._log.subscribe(after=folder.position) as events:
                switched = False
                while not switched:
                    head = await self._log.head_position()
                    on_progress(folder.position, head)
                    if folder.position == head:
                        switched = await self._switch_when_idle(head, switch)
                    else:
                        chunk = await events.next_chunk(CHUNK_EVENTS)
                        switched = await self._apply(folder, chunk, switch if chunk[-1].position >= head else None)
            reached = folder.position
            on_progress(reached, reached)
            _log.info("view rebuild finished, switched over", position=reached, views=sorted(names))

        await self._leadership.run_once(lead)
        return reached

    async def compare(
        self,
        names: Collection[str] = VIEW_NAMES,
        *,
        on_progress: ProgressCallback = lambda position, upto: None,
        on_difference: Callable[[Difference], None],
    ) -> int:
        """Make the views anew and hold the live ones against them; `found` is told every difference.

        Returns the position at which they were compared. Nothing is replaced, and what was made is removed again.

        Raises:
            NotComparable: they are of another version, or it took longer than the database keeps the past.
        """
        reached = 0

        async def lead() -> None:
            nonlocal reached
            await self._require_events(ReadPosition.from_document(await load_checkpoint(self._db)))
            folder, _ = await self._begin(most=(await load_checkpoint(self._db))["position"])
            await self._apply_history(folder, (await load_checkpoint(self._db))["position"], on_progress)
            async with self._log.subscribe(after=folder.position) as events:
                reached = await self._compare_or_explain(folder, events, names, on_difference)
            with translate_errors("removing what was made"):
                await self._reset_shadow()

        await self._leadership.run_once(lead)
        return reached

    async def clear_shadow(self, switched_at: datetime | None = None) -> None:
        """Empty what the last rebuild has left behind; with `switched_at`, if it is the one that was done then."""
        await self._leadership.run_once(partial(self._clear_shadow, switched_at))

    # Beginning and ending -----------------------------------------------------------------------------------------

    async def _begin(self, *, most: int | None = None) -> tuple[ProjectionWriter, ViewSlots]:
        """Continue what was interrupted, unless it is beyond `most`, or begin; return who folds, and into which sides.

        Raises:
            Deposed: somebody else rebuilds by now.
        """
        with translate_errors("beginning to make the views anew"):
            note = await self._take_over()
            beside = _shadow_slots(await load_checkpoint(self._db))
            views = Views(self._db, beside)
            goes_on = (
                note.get("shadow_empty") and note.get("version") == PROJECTION_VERSION and note.get("slots") == beside
            )
            if not goes_on or note.get("switched_at") or (most is not None and note["position"] > most):
                await self._delete_documents(views)
                begun = {
                    "shadow_empty": True,
                    "version": PROJECTION_VERSION,
                    "slots": beside,
                    "position": 0,
                    "switched_at": None,
                }
                await self._update_checkpoint({"$set": begun})
                note = {**note, **begun}
        fence = {"fencing_token": self._leadership.fencing_token, "shadow_empty": True}
        return ProjectionWriter(
            self._db, views, checkpoint=REBUILD_CHECKPOINT_ID, fence=fence, read=ReadPosition.from_document(note)
        ), beside

    async def _take_over(self) -> Document:
        """Put our fencing token on the note, which fences those before us, and return it; make it if there is none."""
        await self._db.checkpoints.update_one(
            {"_id": REBUILD_CHECKPOINT_ID}, {"$setOnInsert": {"fencing_token": 0}}, upsert=True
        )
        note = await self._db.checkpoints.find_one_and_update(
            {"_id": REBUILD_CHECKPOINT_ID, "fencing_token": {"$lt": self._leadership.fencing_token}},
            {"$set": {"fencing_token": self._leadership.fencing_token}},
        )
        if note is None:
            raise LeadershipLost
        return note

    async def _update_checkpoint(
        self, change: Document, session: AsyncClientSession | None = None, **wanted: Any
    ) -> None:
        """Change our note.

        Raises:
            Deposed: it is not ours any more.
        """
        ours = {"_id": REBUILD_CHECKPOINT_ID, "fencing_token": self._leadership.fencing_token, **wanted}
        if not (await self._db.checkpoints.update_one(ours, change, session=session)).matched_count:
            raise LeadershipLost

    async def _delete_documents(self, views: Views) -> None:
        """Delete everything from views that are not live. Not by dropping them: that cannot be fenced."""
        await self._update_checkpoint({"$set": {"shadow_empty": False}})
        for name in VIEW_NAMES:
            while some := await views[name].find({}, {"_id": 1}, sort=[("_id", 1)], limit=_DELETE_CHUNK_SIZE).to_list():
                await run_transaction(self._db, partial(self._delete, views[name], some))

    async def _delete(
        self, view: AsyncCollection[Document], documents: Sequence[Document], session: AsyncClientSession
    ) -> None:
        await self._update_checkpoint({"$inc": {"deleted": len(documents)}}, session)
        await view.delete_many({"_id": {"$lte": documents[-1]["_id"]}}, session=session)

    async def _clear_shadow(self, wanted: datetime | None) -> None:
        with translate_errors("removing what a rebuild has left"):
            switched_at = (await self._take_over()).get("switched_at")
            if switched_at is not None and wanted in (None, switched_at):
                await self._reset_shadow()

    async def _reset_shadow(self) -> None:
        beside = _shadow_slots(await load_checkpoint(self._db))
        await self._delete_documents(Views(self._db, beside))
        await self._update_checkpoint(
            {"$set": {"shadow_empty": True, "slots": beside, "position": 0, "switched_at": None}}
        )

    # Switching ----------------------------------------------------------------------------------------------------

    async def _apply_history(self, folder: ProjectionWriter, upto: int, told: ProgressCallback) -> None:
        """Fold events up to less than a chunk before a position, never beyond it.

        Each chunk is folded while the one before is being written and the one behind it is being read.
        """

        def read(after: int) -> asyncio.Task[list[RecordedEvent]]:
            return asyncio.create_task(
                self._log.read(after=after, limit=CHUNK_EVENTS, without_metadata=True), name="read-ahead"
            )

        reading: asyncio.Task[list[RecordedEvent]] | None = None
        writing: asyncio.Task[None] | None = None
        position = folder.position
        try:
            while position + CHUNK_EVENTS <= upto:
                chunk = await (reading or read(position))
                if not chunk:
                    break
                position = chunk[-1].position
                reading = read(position)
                try:
                    prepared = await folder.prepare(chunk)
                    if writing is not None:
                        await writing
                        told(folder.position, upto)
                except (ChunkTooLarge, UnsupportedEvent):
                    await self._apply_rest(folder, writing, position)
                    writing = None
                    continue
                writing = asyncio.create_task(folder.write(prepared), name="write-views")
                await asyncio.sleep(0)
            await self._apply_rest(folder, writing, position)
        finally:
            for task in (reading, writing):
                if task is not None:
                    task.cancel()
            await asyncio.gather(*filter(None, (reading, writing)), return_exceptions=True)

    async def _apply_rest(self, folder: ProjectionWriter, writing: asyncio.Task[None] | None, upto: int) -> None:
        """Fold what is missing up to a position: in parts, of events with their hashes, and nothing at the same time.

        Raises:
            NewerEvent: a later version of this program has written one of the events.
        """
        if writing is not None:
            with suppress(ChunkTooLarge):
                await writing
        if folder.position < upto:
            folder.discard_unwritten()
        while folder.position < upto:
            await folder.apply(
                await self._log.read(after=folder.position, limit=min(CHUNK_EVENTS, upto - folder.position))
            )

    async def _apply(
        self, folder: ProjectionWriter, events: Sequence[RecordedEvent], switch: SwitchFunction | None
    ) -> bool:
        """Fold a chunk and, in the same transaction, switch if the live views are not ahead; return if that was done.

        In the same: while we tried behind it, the live views would always have got further.
        """
        switched = False

        async def first(session: AsyncClientSession) -> None:
            nonlocal switched
            switched = switch is not None and await switch(session, events[-1].position)

        await folder.apply(events, before_write=first)
        return switched

    async def _switch_when_idle(self, position: int, switch: SwitchFunction) -> bool:
        """Switch, if the live views are not ahead, when there is nothing to be folded."""

        async def demand(session: AsyncClientSession) -> bool:
            await self._update_checkpoint({"$set": {"position": position}}, session, position=position)
            return await switch(session, position)

        with translate_errors("putting the new views in their place"):
            return await run_transaction(self._db, demand)

    async def _position_ahead_of_log(self) -> int | None:
        """Return the position of the live views if the log does not have what they have read, else None."""
        read = ReadPosition.from_document(await load_checkpoint(self._db))
        try:
            await self._log.check_not_truncated(read, "the views")
        except LogTruncated as truncated:
            _log.warning("log truncated, rebuilding views from remaining events", error=str(truncated))
            return read.position
        return None

    def _switch_function(self, beside: ViewSlots, names: Collection[str], lost: int | None = None) -> SwitchFunction:
        """Return what puts the new views in the place of the live ones, in a transaction that demands our note.

        `lost` is the position of live views ahead of the log. They cannot be caught up with: all are replaced.

        Raises:
            DatabaseUnsuitable: only some are to be replaced, and the live ones are ahead of the log.
        """
        whole = set(names) == set(VIEW_NAMES)
        if lost is not None and not whole:
            raise DatabaseUnsuitable("The views are ahead of the log: all of them have to be made anew together.")

        async def switch(session: AsyncClientSession, position: int) -> bool:
            # First of all a write: a projector that folds meanwhile waits for us then, and not we for it.
            now = self._log.clock.estimate()
            wanted: Document = {"_id": VIEWS_CHECKPOINT_ID, "position": {"$lte": position} if whole else position}
            if lost is not None:
                wanted = {"_id": VIEWS_CHECKPOINT_ID, "position": {"$in": [lost, position]}}
            read = {"position": position, "hash": await self._log.hash_at(position)}
            live = await self._db.checkpoints.find_one_and_update(
                wanted, {"$set": {**read, "switched_at": now}}, session=session
            )
            if live is None:
                return False
            if not whole and live.get("version") != PROJECTION_VERSION:
                raise DatabaseUnsuitable("The views are of another version: all of them have to be made anew together.")
            sides = {**live.get("slots", {}), **{name: beside[name] for name in names}}
            new = {"slots": sides, "version": PROJECTION_VERSION}
            await self._db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": new}, session=session)
            await self._update_checkpoint({"$set": {"switched_at": now}}, session)
            return True

        return switch

    # Comparing ----------------------------------------------------------------------------------------------------

    async def _compare_or_explain(
        self,
        folder: ProjectionWriter,
        events: Subscription,
        names: Collection[str],
        found: Callable[[Difference], None],
    ) -> int:
        """Compare with what the live views were at one instant, which the database remembers for some minutes."""
        try:
            with translate_errors("comparing the views"):
                return await self._compare_in_snapshot(folder, events, names, found)
        except LedgerUnavailable as error:
            if server_error_code(error) == SNAPSHOT_TOO_OLD:
                raise NotComparable(
                    "Comparing took longer than the database remembers how the views were. An administrator can make "
                    "it remember more: db.adminCommand({setParameter: 1, minSnapshotHistoryWindowInSeconds: 3600})"
                ) from error
            raise

    async def _require_events(self, read: ReadPosition) -> None:
        """Make sure that the log has what the live views have read.

        Raises:
            NotComparable: It does not.
        """
        try:
            await self._log.check_not_truncated(read, "the views")
        except LogTruncated as truncated:
            raise NotComparable(
                f"{truncated} `jobledger views rebuild` makes the views of what is left."
            ) from truncated

    async def _next(self, events: Subscription, most: int) -> Sequence[RecordedEvent]:
        """Return the next events of the log, of which the live views have read `most` more at least.

        Raises:
            NotComparable: They are not there any more.
        """
        while True:
            try:
                async with asyncio.timeout(_CHUNK_SECONDS):
                    return await events.next_chunk(min(CHUNK_EVENTS, most))
            except TimeoutError:
                await self._require_events(ReadPosition(events.position + most))

    async def _compare_in_snapshot(
        self,
        folder: ProjectionWriter,
        events: Subscription,
        names: Collection[str],
        found: Callable[[Difference], None],
    ) -> int:
        async with self._db.client.start_session(snapshot=True) as session:
            live = await load_checkpoint(self._db, session)
            if live.get("version") != PROJECTION_VERSION:
                raise NotComparable(
                    "The views were made by another version of this program: they differ. `jobledger views rebuild` "
                    "makes them anew."
                )
            while folder.position < live["position"]:
                await folder.apply(await self._next(events, live["position"] - folder.position))
            fresh, old = folder.views, Views(self._db, live.get("slots"))
            for name in names:
                async for difference in find_differences(name, old[name], fresh[name], session):
                    found(difference)
        return int(live["position"])


async def load_checkpoint(db: Database, session: AsyncClientSession | None = None) -> Document:
    """Return what the checkpoint says of the live views: `position`, `sides`, `version`.

    Raises:
        LedgerUnavailable: the database failed.
    """
    with translate_errors("reading how far the views have got"):
        found = await db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID}, session=session)
    return found or {"position": 0, "version": PROJECTION_VERSION}


def _shadow_slots(live: Document) -> ViewSlots:
    return {name: other_slot(live.get("slots", {}).get(name, "a")) for name in VIEW_NAMES}
