"""The checkpoint: waiting until the views have got somewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from jobledger.ledger.mongo.connection import Connection
from jobledger.projections.engine.checkpoint import VIEWS
from tests.support.running import process, until


async def test_it_waits_until_the_views_have_got_there(connection: Connection, store: Path) -> None:
    async with process(connection, store) as here:
        await here.submit()
        waiting = asyncio.create_task(here.checkpoint.reached(1))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):  # nobody folds
                await here.checkpoint.reached(1)
        assert not waiting.done()
        async with process(connection, store, projector=True):
            async with asyncio.timeout(10):
                await waiting
            assert await here.db.jobs.count_documents({}) == 1
            async with asyncio.timeout(0.1):
                await here.checkpoint.reached(1)


async def test_a_process_that_starts_later_knows_how_far_the_views_are(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True) as first:
        await first.submit()
        await first.views_reach(1)
    async with process(connection, store) as second:
        assert second.checkpoint.position == 1
        await second.views_reach(1, seconds=0.1)


async def test_many_wait_for_different_positions_and_all_are_woken(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True) as here:
        waiting = [asyncio.create_task(here.checkpoint.reached(position)) for position in range(1, 21)]
        for _ in range(20):
            await here.submit()
        async with asyncio.timeout(10):
            await asyncio.gather(*waiting)


async def test_it_goes_back_when_the_views_are_begun_anew(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True) as here:
        await here.submit()
        await here.views_reach(1)
        assert here.projecting is not None
        here.projecting.cancel()
        await asyncio.gather(here.projecting, return_exceptions=True)
        async with process(connection, store) as observer:
            assert observer.checkpoint.position == 1
            await here.db.checkpoints.update_one({"_id": VIEWS}, {"$set": {"position": 0}})
            await until(lambda: observer.checkpoint.position == 0, "it has gone back")
            await here.db.jobs.delete_many({})
            await here.db.queue.delete_many({})
            async with process(connection, store, projector=True):
                await observer.views_reach(1)
