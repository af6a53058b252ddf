"""Waiting until the views reach a position."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.mongo.connection import Connection
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID
from jobledger.projections.engine.view_registry import PROJECTION_VERSION
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import run_roles_in_process


def assert_returns_at_once(coroutine: Coroutine[Any, Any, None]) -> None:
    """Check that a coroutine returns without suspending."""
    with pytest.raises(StopIteration):
        coroutine.send(None)


async def test_wait_for_position_returns_when_the_views_reach_it(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        await roles.submit()
        waiting = asyncio.create_task(roles.checkpoint.wait_for_position(1))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):  # no projector runs
                await roles.checkpoint.wait_for_position(1)
        assert not waiting.done()
        async with run_roles_in_process(connection, store, projector=True):
            await asyncio.wait_for(waiting, DEADLINE_SECONDS)
            assert await roles.db.jobs.count_documents({}) == 1
            assert_returns_at_once(roles.checkpoint.wait_for_position(1))


async def test_checkpoint_of_a_later_process_has_the_position_at_start(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as first:
        await first.submit()
        await first.wait_for_views(1)
    async with run_roles_in_process(connection, store) as second:
        assert second.checkpoint.position == 1
        assert_returns_at_once(second.checkpoint.wait_for_position(1))


async def test_wait_for_position_with_many_waiters_wakes_each(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        waiting = [asyncio.create_task(roles.checkpoint.wait_for_position(position)) for position in range(1, 21)]
        for _ in range(20):
            await roles.submit()
        async with asyncio.timeout(DEADLINE_SECONDS):
            await asyncio.gather(*waiting)


async def test_checkpoint_set_back_lowers_the_position_until_views_are_rebuilt(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit()
        await roles.wait_for_views(1)
        assert roles.projector_task is not None
        roles.projector_task.cancel()
        await asyncio.gather(roles.projector_task, return_exceptions=True)
        async with run_roles_in_process(connection, store) as observer:
            assert observer.checkpoint.position == 1
            await roles.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"position": 0}})
            await poll_until(lambda: observer.checkpoint.position == 0, "the position is 0")
            await roles.db.jobs.delete_many({})
            await roles.db.queue.delete_many({})
            async with run_roles_in_process(connection, store, projector=True):
                await observer.wait_for_views(1)


async def test_wait_for_position_does_not_accept_views_of_another_version(connection: Connection, store: Path) -> None:
    """They may lack the rows that the caller looks for, such as the running jobs of a dead worker."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit()
        await roles.wait_for_views()
    async with run_roles_in_process(connection, store) as roles:
        outdated = {"$set": {"version": PROJECTION_VERSION - 1}}
        await roles.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, outdated)
        await poll_until(lambda: roles.checkpoint.version == PROJECTION_VERSION - 1)
        assert not roles.checkpoint.covers(1)
        waiting = asyncio.create_task(roles.checkpoint.wait_for_position(1))
        async with run_roles_in_process(connection, store, projector=True):
            async with asyncio.timeout(DEADLINE_SECONDS):
                await waiting
            assert roles.checkpoint.version == PROJECTION_VERSION
