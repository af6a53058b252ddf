"""The shadow views of a rebuild, and the checkpoint that fences their writes.

The checkpoint document `rebuild` contains the fencing token of the process that rebuilds, the slots, version and
position of the shadow views, whether they were emptied (`shadow_empty`), and when they last became active
(`switched_at`). Every write to a shadow view is in a transaction that requires this document as its process left it.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from functools import partial
from typing import Any, Final

from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.asynchronous.collection import AsyncCollection

from jobledger.ledger.mongo.connection import Database, Document, translate_errors
from jobledger.ledger.mongo.leader_election import LeaderElection, LeadershipLost
from jobledger.ledger.mongo.transactions import run_transaction
from jobledger.ledger.store.event_store import ReadPosition
from jobledger.projections.engine.checkpoint import load_checkpoint, take_over
from jobledger.projections.engine.view_registry import PROJECTION_VERSION, VIEW_NAMES
from jobledger.projections.engine.writer import ProjectionWriter
from jobledger.projections.slots import Views, ViewSlots, get_other_slot

REBUILD_CHECKPOINT_ID: Final = "rebuild"
_DELETE_CHUNK_SIZE: Final = 5000


class ShadowViews:
    """The shadow views, for the process that leads the rebuild.

    All methods raise LeadershipLost if another process leads by now, and LedgerUnavailable if the database fails.
    """

    def __init__(self, db: Database, leader_election: LeaderElection) -> None:
        self._db = db
        self._leader_election = leader_election

    async def open(self, *, max_position: int | None = None) -> tuple[ProjectionWriter, ViewSlots]:
        """Continue an interrupted rebuild, or begin a new one, and return the writer and the slots of the shadow views.

        An interrupted rebuild beyond `max_position` is not continued.
        """
        with translate_errors("beginning a rebuild of the views"):
            checkpoint = await self._take_over()
            slots = await self._load_slots()
            can_continue = (
                checkpoint.get("shadow_empty")
                and checkpoint.get("version") == PROJECTION_VERSION
                and checkpoint.get("slots") == slots
                and not checkpoint.get("switched_at")
                and (max_position is None or checkpoint["position"] <= max_position)
            )
            if not can_continue:
                await self.reset()
                checkpoint = {"position": 0}
        writer = ProjectionWriter(
            self._db,
            Views(self._db, slots),
            checkpoint_id=REBUILD_CHECKPOINT_ID,
            checkpoint_filter={"fencing_token": self._leader_election.fencing_token, "shadow_empty": True},
            last_applied=ReadPosition.from_document(checkpoint),
        )
        return writer, slots

    async def update(self, update: Document, session: AsyncClientSession | None = None, **required: Any) -> None:
        """Update the checkpoint of this rebuild, if its fields have the required values.

        Raises:
            LeadershipLost: Another process has taken over, or the checkpoint has other values.
        """
        own = {"_id": REBUILD_CHECKPOINT_ID, "fencing_token": self._leader_election.fencing_token, **required}
        if not (await self._db.checkpoints.update_one(own, update, session=session)).matched_count:
            raise LeadershipLost

    async def clear_after_switch(self, switched_at: datetime | None = None) -> None:
        """Empty the views that the last switch replaced, unless they are empty.

        With `switched_at`, only if the switch was at this time."""
        with translate_errors("emptying the views of before the last rebuild"):
            last_switched_at = (await self._take_over()).get("switched_at")
            if last_switched_at is not None and switched_at in (None, last_switched_at):
                await self.reset()

    async def reset(self) -> None:
        """Empty the shadow views, whatever they contain, and record that they are empty."""
        slots = await self._load_slots()
        await self.delete_documents(Views(self._db, slots))
        empty = {"shadow_empty": True, "version": PROJECTION_VERSION, "slots": slots}
        await self.update({"$set": {**empty, "position": 0, "hash": None, "switched_at": None}})

    async def delete_documents(self, views: Views) -> None:
        """Delete all documents of shadow views. The collections are not dropped, because a drop cannot be fenced."""
        await self.update({"$set": {"shadow_empty": False}})
        for name in VIEW_NAMES:
            while page := await views[name].find({}, {"_id": 1}, sort=[("_id", 1)], limit=_DELETE_CHUNK_SIZE).to_list():
                await run_transaction(self._db, partial(self._delete, views[name], page))

    async def _delete(
        self, collection: AsyncCollection[Document], documents: Sequence[Document], session: AsyncClientSession
    ) -> None:
        await self.update({"$inc": {"deleted": len(documents)}}, session)
        await collection.delete_many({"_id": {"$lte": documents[-1]["_id"]}}, session=session)

    async def _take_over(self) -> Document:
        """Take over the checkpoint of the rebuild, and create it before the first rebuild."""
        await self._db.checkpoints.update_one(
            {"_id": REBUILD_CHECKPOINT_ID}, {"$setOnInsert": {"fencing_token": 0}}, upsert=True
        )
        return await take_over(self._db, REBUILD_CHECKPOINT_ID, self._leader_election.fencing_token)

    async def _load_slots(self) -> ViewSlots:
        """Return the slots that are not active."""
        active = (await load_checkpoint(self._db)).get("slots", {})
        return {name: get_other_slot(active.get(name, "a")) for name in VIEW_NAMES}
