"""Cancellation of driver operations, at any point."""

from __future__ import annotations

import asyncio
import sys

import pymongo.lock
import pymongo.network_layer
import pymongo.pool_shared
import pytest

from jobledger.ledger.mongo import _pymongo_compat
from jobledger.ledger.mongo.connection import Connection
from tests.support.polling import DEADLINE_SECONDS


async def cancel_when_future_is_done(wait_for: object) -> bool:
    """Cancel a waiter in the event-loop iteration in which its future is done. Return whether it is cancelled."""
    loop = asyncio.get_running_loop()
    awaited: asyncio.Future[None] = loop.create_future()
    waiting = asyncio.create_task(wait_for(awaited, 10))  # type: ignore[operator]  # either implementation
    await asyncio.sleep(0)
    awaited.set_result(None)
    waiting.cancel()
    await asyncio.wait({waiting})
    return waiting.cancelled()


async def test_wait_for_with_done_future_still_obeys_cancellation() -> None:
    assert await cancel_when_future_is_done(_pymongo_compat.wait_for)
    if sys.version_info < (3, 12):
        assert not await cancel_when_future_is_done(asyncio.wait_for), "asyncio is fixed, so _pymongo_compat can go"
        for used in (
            pymongo.network_layer.asyncio.wait_for,  # type: ignore[attr-defined]  # not exported
            pymongo.pool_shared.asyncio.wait_for,  # type: ignore[attr-defined]  # as above
            pymongo.lock.wait_for,  # type: ignore[attr-defined]  # as above
        ):
            assert used is _pymongo_compat.wait_for


async def test_wait_for_after_timeout_cancels_future() -> None:
    awaited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with pytest.raises(TimeoutError):
        await _pymongo_compat.wait_for(awaited, 0.01)
    assert awaited.cancelled()


async def test_client_cancelled_while_connecting_stops_at_any_point(connection: Connection) -> None:
    """Each attempt is cancelled two event-loop iterations later than the one before."""
    for iterations in range(0, 120, 2):
        async with connection.create_client() as client:
            done = asyncio.Event()

            async def ping_and_wait(client: object = client, done: asyncio.Event = done) -> None:
                await client.admin.command("ping")  # type: ignore[attr-defined]  # a client
                done.set()
                await asyncio.Future()

            pinging = asyncio.create_task(ping_and_wait())
            for _ in range(iterations):
                await asyncio.sleep(0)
            pinging.cancel()
            done_tasks, _ = await asyncio.wait({pinging}, timeout=DEADLINE_SECONDS)
            assert done_tasks, f"the client ignored a cancellation after {iterations} iterations"
