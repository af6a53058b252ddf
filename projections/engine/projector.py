"""projections: the projector. Folds the log into the live views, in order, exactly once.

Any number of processes may run one; they elect a leader by a lease, the rest stand by. What a leader writes is fenced
(projections/engine/writer.py) by its epoch and by the sides that were live when it began: a deposed leader, or one
whose
views have been replaced, writes nothing more. After any failure the checkpoint says where to go on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from contextlib import suppress
from typing import Any, Final

import structlog

from jobledger.ledger.domain.errors import (
    CommandRefused,
    JobledgerError,
    LedgerBusy,
    LedgerUnavailable,
    LogTruncated,
    UnreadableEvent,
)
from jobledger.ledger.domain.events import Meta, Recorded
from jobledger.ledger.mongo.connection import Connection, Database, Document, driver_errors
from jobledger.ledger.mongo.leader_election import Deposed, Leadership
from jobledger.ledger.store.change_stream import Changes
from jobledger.ledger.store.command_handler import handle
from jobledger.ledger.store.event_store import EventLog, Read, Subscription
from jobledger.projections.engine import health
from jobledger.projections.engine.checkpoint import VIEWS, Checkpoint
from jobledger.projections.engine.rebuild import REBUILD, Rebuild
from jobledger.projections.engine.slots import Views
from jobledger.projections.engine.writer import ALL, VERSION, Folder
from jobledger.projections.views import batches

_log = structlog.get_logger()
CHUNK_EVENTS: Final = 1000
STANDS_STILL_SECONDS: Final = 10.0
"""For so long a projector that cannot read an event leaves the lead to others, before it looks again."""
READERS_PATIENCE_SECONDS: Final = 60.0
"""For so long what was read before a rebuild is left alone: a request may still be at it."""


class OtherVersion(Exception):
    """The live views were made by another version of this program."""


async def _nothing() -> None:
    """Do nothing beside the projector."""


class Projector:
    """Keeps the views up to date while it is the leader, and stands by while another is."""

    def __init__(
        self,
        db: Database,
        log: EventLog,
        connection: Connection,
        checkpoint: Checkpoint,
        *,
        holder: str,
        lease_seconds: float = 10.0,
        beside: Callable[[], Coroutine[Any, Any, None]] = _nothing,
    ) -> None:
        self._beside = beside
        """Runs while this process leads: what only one process should do, and needs no lease of its own."""
        self._db = db
        self._log = log
        self._checkpoint = checkpoint
        self._leadership = Leadership(connection, "projector", holder=holder, lease_seconds=lease_seconds)
        self._rebuild = Rebuild(db, log, connection, holder=holder, lease_seconds=lease_seconds)

    def listen(self, changes: Changes) -> None:
        """Hear of what concerns the projector. Call before the change stream runs, if `run` is to be called."""
        changes.listen(self._leadership)
        changes.listen(self._rebuild.leadership)

    async def prepare(self) -> None:
        """Create the live views' indexes and the checkpoint. Harmless when they exist."""
        with driver_errors("preparing the views"):
            made: Document = {"position": 0, "epoch": 0, "version": VERSION, "sides": {}}
            await self._db.checkpoints.update_one({"_id": VIEWS}, {"$setOnInsert": made}, upsert=True)
            found = await self._db.checkpoints.find_one({"_id": VIEWS})
            views = Views(self._db, (found or made).get("sides"))
            for view in ALL:
                if view.INDEXES:
                    await views[view.NAME].create_indexes(list(view.INDEXES))

    async def run(self) -> None:
        """Stand by, lead, stand by …, until cancelled. Views of an older version are made anew behind the live ones."""
        while True:
            version = await self._checkpoint.version_known()
            if version > VERSION:
                _log.error(
                    "the views are of a newer version of this program: this one leaves them alone until they are not",
                    views=version,
                    ours=VERSION,
                )
                await self._checkpoint.version_other_than(version)
            elif version < VERSION:
                _log.warning("the views are of an older version: they are made anew", views=version, ours=VERSION)
                await self._rebuild.run(only_older=True)
                await self._checkpoint.version_other_than(version)
            else:
                try:
                    await self._leadership.run(self._fold_for_ever)
                except OtherVersion:
                    await self._checkpoint.version_other_than(version)
                except (UnreadableEvent, LogTruncated) as error:
                    await self._stand_still(error)

    async def _fold_for_ever(self) -> None:
        folder = await self._take_over()
        self._log.may_lack_events = False
        await self._log.require(folder.read, "the views")
        _log.info("projector leads", position=folder.position, epoch=self._leadership.epoch)
        tidying = asyncio.create_task(self._tidy(), name="tidy")
        beside = asyncio.create_task(self._beside(), name="beside-projector")
        try:
            async with self._log.subscription(after=folder.position) as events:
                due: dict[str, Document] = {}
                head = await self._log.head()
                while folder.position < head:
                    await folder.fold(await self._next(events, folder))
                await self._react(await batches.unsettled(folder.views))
                while True:
                    chunk = await self._next(events, folder)
                    due |= {batch["_id"]: batch for batch in await folder.fold(chunk)}
                    # While there is more, what the views say need not be so any more.
                    if len(chunk) < CHUNK_EVENTS or await self._log.head() <= folder.position:
                        await self._react(due.values())
                        due.clear()
        finally:
            for task in (tidying, beside):
                task.cancel()
            await asyncio.gather(tidying, beside, return_exceptions=True)

    async def _next(self, events: Subscription, folder: Folder) -> list[Recorded]:
        """Return the next events.

        Raises:
            LogTruncated: Events that the views contain were removed meanwhile.
        """
        while True:
            chunk = await events.chunk(CHUNK_EVENTS)
            if not self._log.may_lack_events:
                return chunk
            self._log.may_lack_events = False
            await self._log.require(folder.read, "the views")
            events.go_back(folder.position)  # the chunk may have been read before its events were removed

    async def _stand_still(self, error: UnreadableEvent | LogTruncated) -> None:
        """Leave the lead to a projector of a later version, if there is one, and say why this one does not go on.

        An event of a later version must not be guessed at, nor be isolated: the next version folds it. Views that are
        ahead of a log whose end was removed wait for `jobledger replay`.
        """
        _log.error("the projector stands still", reason=str(error))
        with suppress(LedgerUnavailable):
            await health.note(self._db, str(error))
        await asyncio.sleep(STANDS_STILL_SECONDS)

    async def _take_over(self) -> Folder:
        """Put this leader's epoch on the checkpoint, which fences its predecessors, and return who folds from there.

        Raises:
            Deposed: somebody else leads by now.
            OtherVersion: these views are not ours to fold.
        """
        epoch = self._leadership.epoch
        with driver_errors("taking over the views"):
            found = await self._db.checkpoints.find_one_and_update(
                {"_id": VIEWS, "epoch": {"$lt": epoch}}, {"$set": {"epoch": epoch}}
            )
        if found is None:
            raise Deposed
        if found.get("version") != VERSION:
            raise OtherVersion
        sides = found.get("sides")
        fence = {"epoch": epoch, "sides": sides}
        return Folder(self._db, Views(self._db, sides), checkpoint=VIEWS, fence=fence, read=Read.of(found))

    async def _tidy(self) -> None:
        """Empty what was read before a rebuild, when nobody reads it any more; after the next one, again."""
        while True:
            sides = self._checkpoint.views.sides
            try:
                with driver_errors("looking for what a rebuild has left"):
                    note = await self._db.checkpoints.find_one({"_id": REBUILD}) or {}
                if (done_at := note.get("done_at")) is not None:
                    waited = (self._log.clock.estimate() - done_at).total_seconds()
                    await asyncio.sleep(max(0.0, READERS_PATIENCE_SECONDS - waited))
                    await self._rebuild.tidy(done_at)
            except LedgerUnavailable as error:
                _log.warning("what a rebuild has left stays for now", error=str(error))
                await asyncio.sleep(READERS_PATIENCE_SECONDS)
                continue
            await self._checkpoint.sides_other_than(sides)

    async def _react(self, changed: Iterable[Document]) -> None:
        """Record what the counts say about batches: that one has ended, or goes on again."""
        for batch in changed:
            batch_id = batch["batch_id"]
            try:
                if (command := batches.reaction(batch)) is None:
                    continue
                await handle(self._log, batch_id, command, meta=Meta("system", batch_id))
            except CommandRefused as refused:
                _log.info("batch left as it is", batch_id=batch_id, reason=str(refused))
            except (LedgerUnavailable, LedgerBusy):
                raise
            except (JobledgerError, LookupError, TypeError, ValueError) as error:
                # One batch must not stop the projector; when the program has been mended, the next leader tries again.
                _log.error("the end of a batch cannot be recorded", batch_id=batch_id, error=repr(error))
