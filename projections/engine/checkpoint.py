"""The checkpoint of the active views: read it, take it over, and follow it by the change stream.

The checkpoint document `views` contains the position, the version and the active slots of the views.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.mongo.connection import MAJORITY, Database, Document, translate_errors
from jobledger.ledger.mongo.leader_election import LeadershipLost
from jobledger.projections.engine.view_registry import PROJECTION_VERSION
from jobledger.projections.slots import Views, ViewSlots

VIEWS_CHECKPOINT_ID: Final = "views"


async def load_checkpoint(db: Database, session: AsyncClientSession | None = None) -> Document:
    """Read the checkpoint of the active views: `position`, `hash`, `slots` and `version`."""
    with translate_errors("reading the checkpoint of the views"):
        document = await db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID}, session=session)
    return document or {"position": 0, "version": PROJECTION_VERSION}


async def take_over(db: Database, checkpoint_id: str, fencing_token: int) -> Document:
    """Store a leader's fencing token in its checkpoint, which fences earlier leaders, and return the checkpoint.

    Raises:
        LeadershipLost: Another process leads by now.
    """
    own = {"_id": checkpoint_id, "fencing_token": {"$lt": fencing_token}}
    checkpoint = await db.checkpoints.find_one_and_update(own, {"$set": {"fencing_token": fencing_token}})
    if checkpoint is None:
        raise LeadershipLost
    return checkpoint


class CheckpointFollower:
    """Follows the checkpoint and selects the active views. Add it as a listener to the process's change stream.

    Attributes:
        position: The last position that the active views contain.
        version: The version of the active views, 0 if they have none, or None before it is known.
        views: The active views. A switch changes all their slots at the same time.
    """

    collection = "checkpoints"

    def __init__(self, db: Database) -> None:
        self._checkpoints = db.get_collection("checkpoints", read_concern=MAJORITY)
        self._changed = asyncio.Event()
        self._listeners: list[Callable[[], None]] = []
        self.position = 0
        self.version: int | None = None
        self.views = Views(db)

    def add_listener(self, listener: Callable[[], None]) -> None:
        """Call `listener` after each change of the checkpoint. It must not block."""
        self._listeners.append(listener)

    def covers(self, position: int) -> bool:
        """Return whether the views have this program's version and contain all events up to a position.

        Views of another version may lack rows that this program looks for, until a rebuild has replaced them.
        """
        return self.version == PROJECTION_VERSION and self.position >= position

    async def wait_for_position(self, position: int) -> None:
        """Wait until the views cover a position (`covers`). Use `asyncio.timeout` for a limit."""
        while not self.covers(position):
            await self._changed.wait()

    async def wait_for_version(self, *, other_than: int | None = None) -> int:
        """Wait until the version of the active views is known and not `other_than`, and return it."""
        while self.version is None or self.version == other_than:
            await self._changed.wait()
        return self.version

    async def wait_for_slot_change(self, slots: ViewSlots) -> None:
        """Wait until other slots are active, that is, until a rebuild has switched."""
        while self.views.slots == slots:
            await self._changed.wait()

    async def resync(self, session: AsyncClientSession) -> None:
        """Read the checkpoint when the change stream starts."""
        document = await self._checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID}, session=session)
        self._update({"position": 0, "version": 0, **(document or {})})

    async def refresh(self) -> None:
        """Read the checkpoint while the change stream is paused.

        Raises:
            LedgerUnavailable: The database failed.
        """
        with translate_errors("reading the checkpoint of the views"):
            document = await self._checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID})
        self._update(document or {})

    def on_change(self, change: Mapping[str, Any]) -> None:
        """Process a change of the collection."""
        if change["documentKey"]["_id"] != VIEWS_CHECKPOINT_ID:
            return
        document = change.get("fullDocument") or change.get("updateDescription", {}).get("updatedFields", {})
        self._update(document)

    def _update(self, document: Mapping[str, Any]) -> None:
        if "slots" in document:
            self.views.slots = document["slots"]
        if "version" in document:
            self.version = document["version"]
        self.position = document.get("position", self.position)
        self._changed.set()
        self._changed = asyncio.Event()
        for listener in self._listeners:
            listener()
