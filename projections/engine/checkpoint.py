"""projections: how far the views have got, and where they are, known without asking: by the change stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.mongo.connection import MAJORITY, Database
from jobledger.projections.engine.slots import Sides, Views

VIEWS: Final = "views"


class Checkpoint:
    """The position that the views have reached. A listener of the process's change stream.

    `views` are those that are live, whenever they are asked: both change in one moment, for a reader too.
    """

    collection = "checkpoints"

    def __init__(self, db: Database) -> None:
        self._checkpoints = db.get_collection("checkpoints", read_concern=MAJORITY)
        self._moved = asyncio.Event()
        self._watchers: list[Callable[[], None]] = []
        self.position = 0
        self.version: int | None = None
        self.views = Views(db)

    def on_move(self, watcher: Callable[[], None]) -> None:
        """Have `watcher` called whenever the views have got further. It must not block."""
        self._watchers.append(watcher)

    async def reached(self, position: int) -> None:
        """Return once the views contain every event up to `position`. Give up with `asyncio.timeout`."""
        while self.position < position:
            await self._moved.wait()

    async def version_known(self) -> int:
        """Return which version of this program's folds made the live views, 0 if that was long ago."""
        while self.version is None:
            await self._moved.wait()
        return self.version

    async def version_other_than(self, version: int) -> None:
        """Return once the live views are of another version."""
        while self.version in (None, version):
            await self._moved.wait()

    async def sides_other_than(self, sides: Sides) -> None:
        """Return once others are live: somebody has made views anew."""
        while self.views.sides == sides:
            await self._moved.wait()

    async def resync(self, session: AsyncClientSession) -> None:
        document = await self._checkpoints.find_one({"_id": VIEWS}, session=session)
        self._take({"position": 0, "version": 0, **(document or {})})

    def changed(self, change: Mapping[str, Any]) -> None:
        if change["documentKey"]["_id"] != VIEWS:
            return
        document = change.get("fullDocument") or change.get("updateDescription", {}).get("updatedFields", {})
        self._take(document)

    def _take(self, document: Mapping[str, Any]) -> None:
        if "sides" in document:
            self.views.sides = document["sides"]
        if "version" in document:
            self.version = document["version"]
        self.position = document.get("position", self.position)
        self._moved.set()
        self._moved = asyncio.Event()
        for watcher in self._watchers:
            watcher()
