"""projections: how far the views have got, known without asking: the checkpoint's changes come by the change stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, Final

from pymongo.asynchronous.client_session import AsyncClientSession

from ledger.mongo import MAJORITY, Database

VIEWS: Final = "views"


class Checkpoint:
    """The position that the views have reached. A listener of the process's change stream."""

    collection = "checkpoints"

    def __init__(self, db: Database) -> None:
        self._checkpoints = db.get_collection("checkpoints", read_concern=MAJORITY)
        self._moved = asyncio.Event()
        self._watchers: list[Callable[[], None]] = []
        self.position = 0

    def on_move(self, watcher: Callable[[], None]) -> None:
        """Have `watcher` called whenever the views have got further. It must not block."""
        self._watchers.append(watcher)

    async def reached(self, position: int) -> None:
        """Return once the views contain every event up to `position`. Give up with `asyncio.timeout`."""
        while self.position < position:
            await self._moved.wait()

    async def resync(self, session: AsyncClientSession) -> None:
        document = await self._checkpoints.find_one({"_id": VIEWS}, session=session)
        self._move(document["position"] if document else 0)

    def changed(self, change: Mapping[str, Any]) -> None:
        if change["documentKey"]["_id"] != VIEWS:
            return
        document = change.get("fullDocument") or change.get("updateDescription", {}).get("updatedFields", {})
        if "position" in document:
            self._move(document["position"])

    def _move(self, position: int) -> None:
        self.position = position
        self._moved.set()
        self._moved = asyncio.Event()
        for watcher in self._watchers:
            watcher()
