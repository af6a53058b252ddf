"""The driver obeys when it is cancelled: whenever that is."""

from __future__ import annotations

import asyncio
import sys

import pymongo.lock
import pymongo.network_layer
import pymongo.pool_shared
import pytest

from jobledger.ledger.mongo import _pymongo_compat
from jobledger.ledger.mongo.connection import Connection


async def cancelled_when_it_has_just_ended(wait_for: object) -> bool:
    """Cancel who waits in the very turn in which what it waits for has ended; return whether it obeys."""
    loop = asyncio.get_running_loop()
    awaited: asyncio.Future[None] = loop.create_future()
    waiting = asyncio.create_task(wait_for(awaited, 10))  # type: ignore[operator]  # one of the two
    await asyncio.sleep(0)
    awaited.set_result(None)
    waiting.cancel()
    await asyncio.wait({waiting})
    return waiting.cancelled()


async def test_who_waits_obeys_where_python_does_not() -> None:
    assert await cancelled_when_it_has_just_ended(_pymongo_compat.wait_for)
    if sys.version_info < (3, 12):
        assert not await cancelled_when_it_has_just_ended(asyncio.wait_for), "then all of this is needed no more"
        for used in (
            pymongo.network_layer.asyncio.wait_for,  # type: ignore[attr-defined]  # not said to be exported
            pymongo.pool_shared.asyncio.wait_for,  # type: ignore[attr-defined]  # as above
            pymongo.lock.wait_for,  # type: ignore[attr-defined]  # as above
        ):
            assert used is _pymongo_compat.wait_for


async def test_what_takes_too_long_is_cancelled() -> None:
    awaited: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    with pytest.raises(TimeoutError):
        await _pymongo_compat.wait_for(awaited, 0.01)
    assert awaited.cancelled()


async def test_a_client_that_connects_obeys_at_every_moment(connection: Connection) -> None:
    """Each try is cancelled some turns of the loop later than the one before."""
    for turns in range(0, 120, 2):
        async with connection.client() as client:
            done = asyncio.Event()

            async def ask(client: object = client, done: asyncio.Event = done) -> None:
                await client.admin.command("ping")  # type: ignore[attr-defined]  # a client
                done.set()
                await asyncio.Future()

            asking = asyncio.create_task(ask())
            for _ in range(turns):
                await asyncio.sleep(0)
            asking.cancel()
            ended, _ = await asyncio.wait({asking}, timeout=5)
            assert ended, f"it goes on although it was cancelled after {turns} turns"
