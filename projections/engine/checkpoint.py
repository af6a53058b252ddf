"""projections: how far the views have got, and where they are, known without asking: by the change stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.mongo.connection import MAJORITY, Database
from jobledger.projections.slots import Views, ViewSlots

VIEWS_CHECKPOINT_ID: Final = "views"


class Checkpoint:
    """The position that the views have reached. A listener of the process's change stream.

    `views` are those that are live, whenever they are asked: both change in one moment, for a reader too.
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
        """Have `watcher` called whenever the views have got further. It must not block."""
        self._listeners.append(listener)

    async def wait_for_position(self, position: int) -> None:
        """Return once the views contain every event up to `position`. Give up with `asyncio.timeout`."""
        while self.position < position:
            await self._changed.wait()

    async def wait_for_version(self) -> int:
        """Return which version of this program's folds made the live views, 0 if that was long ago."""
        while self.version is None:
            await self._changed.wait()
        return self.version

    async def wait_for_version_change(self, version: int) -> None:
        """Return once the live views are of another version."""
        while self.version in (None, version):
            await self._changed.wait()

    async def wait_for_slot_change(self, sides: ViewSlots) -> None:
        """Return once others are live: somebody has made views anew."""
        while self.views.slots == sides:
            await self._changed.wait()

    async def resync(self, session: AsyncClientSession) -> None:
        document = await self._checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID}, session=session)
        self._update({"position": 0, "version": 0, **(document or {})})

    def on_change(self, change: Mapping[str, Any]) -> None:
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
        for watcher in self._listeners:
            watcher()
