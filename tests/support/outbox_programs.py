"""Run the relay of the outbox in a test's process, and processes that are killed while they use the outbox.

python -m tests.support.outbox_programs URI DB_NAME POINT

Points: `after commit` is a program that is killed after its commit. `after append` and `before append` are relays that
are killed there.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from pymongo import AsyncMongoClient

from jobledger import App
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.outbox.relay import OutboxRelay
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from tests.support.ledger_setup import Ledger


@asynccontextmanager
async def run_relay(connection: Connection, store_class: type[EventStore] = EventStore) -> AsyncIterator[Ledger]:
    """Run the relay with its own client and change stream inside the block."""
    async with connection.create_client() as client:
        db = client[connection.db_name]
        event_store, changes = store_class(db), ChangeStream(db)
        relay = OutboxRelay(db, event_store)
        changes.add_listener(relay)
        changes.add_listener(event_store)
        await event_store.prepare()
        async with changes.keep_open():
            running = asyncio.create_task(relay.run())
            try:
                yield Ledger(db, event_store, changes)
            finally:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
                await event_store.aclose()


async def create_ledger(connection: Connection) -> None:
    """Write what a ledger has after its first start."""
    async with connection.create_client() as client:
        db = client[connection.db_name]
        await db.checkpoints.insert_one({"_id": "views", "position": 0})
        await db.create_collection("orders")


async def order_and_submit(
    client: AsyncMongoClient[Document], db_name: str, parameters: dict[str, Any], **options: Any
) -> str:
    """Insert an order and submit a job in one transaction, as a program does. Return the ID of the job."""
    app = App(db_name=db_name)

    async def write(session: Any) -> str:
        await client[db_name].orders.insert_one({"parameters": parameters}, session=session)
        return await app.submit("echo", parameters, session=session, **options)

    async with client.start_session() as session:
        return await session.with_transaction(write)


def run_until_killed(connection: Connection, point: str) -> None:
    """Run a process that is killed at a point."""
    command = [sys.executable, "-m", __name__, connection.uri, connection.db_name, point]
    process = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert process.returncode == -signal.SIGKILL, process.stderr


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class _KilledStore(EventStore):
    """Kills the process before or after it has appended jobs."""

    point = ""

    async def append_each(self, appends: Sequence[Any]) -> Any:
        if self.point == "before append" and appends:
            _kill()
        async for outcomes in super().append_each(appends):
            yield outcomes
        if appends:
            _kill()


async def _main(connection: Connection, point: str) -> None:
    if point == "after commit":
        async with connection.create_client() as client:
            await order_and_submit(client, connection.db_name, {"n": 1})
            _kill()
    _KilledStore.point = point
    async with run_relay(connection, _KilledStore):
        await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(_main(Connection(sys.argv[1], sys.argv[2]), sys.argv[3]))
