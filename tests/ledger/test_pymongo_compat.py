"""Cancellation of driver operations at any point, and sessions on connections to a server that was recovering."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pymongo.lock
import pymongo.network_layer
import pymongo.pool_shared
import pytest
from pymongo.errors import PyMongoError

from jobledger.ledger.mongo import _pymongo_compat
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.mongo.embedded import EmbeddedServer
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS, poll_until


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


@needs_local_mongod
async def test_connection_opened_during_recovery_supports_sessions_afterwards(tmp_path: Path) -> None:
    """Maintenance mode reproduces the RECOVERING state of a restarted server."""
    with EmbeddedServer.start(tmp_path, oplog_mb=64) as server:
        connection = Connection(server.uri, "test")
        async with connection.create_client() as observer, connection.create_client() as client:
            admin = observer.admin
            await admin.command("replSetStepDown", 60, secondaryCatchUpPeriodSecs=0, force=True)
            await admin.command("replSetMaintenance", 1)
            with pytest.raises(PyMongoError):
                await use_session(client["test"])
            with connection.create_blocking_client() as blocking_client:
                assert blocking_client.admin.command("ping")["ok"]

                await admin.command("replSetMaintenance", 0)
                await admin.command("replSetFreeze", 0)
                await poll_until(lambda: is_primary(observer["test"]), "the server is primary")

                await use_session(client["test"])
                with blocking_client.start_session() as session:
                    blocking_client["test"]["documents"].insert_one({}, session=session)


async def is_primary(db: Database) -> bool:
    return bool((await db.command("hello"))["isWritablePrimary"])


async def use_session(db: Database) -> None:
    """Write and read in a session, with as many connections as a pool opens for parallel operations."""

    async def write_and_read() -> None:
        async with db.client.start_session() as session:
            await db["documents"].insert_one({}, session=session)
            await db["documents"].find_one({}, session=session)

    await asyncio.gather(*(write_and_read() for _ in range(3)))
