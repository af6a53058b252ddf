"""The checkpoint: waiting until the views have got somewhere."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from jobledger.ledger.mongo.connection import Connection
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID
from tests.support.role_runner import poll_until, run_roles_in_process


async def test_it_waits_until_the_views_have_got_there(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as here:
        await here.submit()
        waiting = asyncio.create_task(here.checkpoint.wait_for_position(1))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):  # nobody folds
                await here.checkpoint.wait_for_position(1)
        assert not waiting.done()
        async with run_roles_in_process(connection, store, projector=True):
            async with asyncio.timeout(10):
                await waiting
            assert await here.db.jobs.count_documents({}) == 1
            async with asyncio.timeout(0.1):
                await here.checkpoint.wait_for_position(1)


async def test_a_process_that_starts_later_knows_how_far_the_views_are(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as first:
        await first.submit()
        await first.wait_for_views(1)
    async with run_roles_in_process(connection, store) as second:
        assert second.checkpoint.position == 1
        await second.wait_for_views(1, seconds=0.1)


async def test_many_wait_for_different_positions_and_all_are_woken(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        waiting = [asyncio.create_task(here.checkpoint.wait_for_position(position)) for position in range(1, 21)]
        for _ in range(20):
            await here.submit()
        async with asyncio.timeout(10):
            await asyncio.gather(*waiting)


async def test_it_goes_back_when_the_views_are_begun_anew(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.submit()
        await here.wait_for_views(1)
        assert here.projector_task is not None
        here.projector_task.cancel()
        await asyncio.gather(here.projector_task, return_exceptions=True)
        async with run_roles_in_process(connection, store) as observer:
            assert observer.checkpoint.position == 1
            await here.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"position": 0}})
            await poll_until(lambda: observer.checkpoint.position == 0, "it has gone back")
            await here.db.jobs.delete_many({})
            await here.db.queue.delete_many({})
            async with run_roles_in_process(connection, store, projector=True):
                await observer.wait_for_views(1)
