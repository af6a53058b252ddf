"""Rebuild views and compare them with the log, as another process does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager

from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.comparison import Difference
from jobledger.projections.engine.rebuild import Rebuild
from jobledger.projections.engine.view_registry import VIEW_NAMES

DEADLINE_SECONDS = 120.0


@asynccontextmanager
async def open_rebuild(connection: Connection, *, holder: str = "rebuilder") -> AsyncIterator[Rebuild]:
    """Open a rebuild with its own client and change stream."""
    async with connection.create_client() as client:
        db = client[connection.db_name]
        log, changes = EventStore(db), ChangeStream(db)
        rebuild = Rebuild(db, log, connection, holder=holder, lease_seconds=10.0)
        changes.add_listener(log)
        changes.add_listener(rebuild.leader_election)
        async with changes.keep_open(), asyncio.timeout(DEADLINE_SECONDS):
            yield rebuild


async def rebuild_views(connection: Connection, names: Collection[str] = VIEW_NAMES) -> int:
    """Rebuild views, switch to them, and return the position that they contain."""
    async with open_rebuild(connection) as rebuild:
        return await rebuild.run(names)


async def compare_views(connection: Connection, names: Collection[str] = VIEW_NAMES) -> list[Difference]:
    """Return the differences between the active views and the log."""
    differences: list[Difference] = []
    async with open_rebuild(connection) as rebuild:
        await rebuild.compare(names, on_difference=differences.append)
    return differences
