"""The primary of three servers is killed or steps down while programs submit jobs in their transactions."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from pymongo import AsyncMongoClient
from pymongo.errors import PyMongoError

from jobledger import App
from jobledger.ledger.mongo.connection import Connection, Document
from tests.support.ledger_setup import Ledger, check_log, load_event_documents
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.outbox_programs import create_ledger, run_relay
from tests.support.polling import poll_until
from tests.support.replica_set import Node, ReplicaSet

pytestmark = [needs_local_mongod, pytest.mark.timeout(180)]
PROGRAMS = 4
JOBS = 40
"""More than are in progress at the fault."""


async def submit_repeatedly(connection: Connection) -> None:
    """Insert orders with the IDs of their jobs until cancelled. After an error, nobody knows if they were committed."""
    app = App(db_name=connection.db_name)

    async def order(client: AsyncMongoClient[Document], session: Any) -> None:
        job_id = await app.submit("echo", {}, session=session)
        await client[connection.db_name].orders.insert_one({"_id": job_id}, session=session)

    async with AsyncMongoClient[Document](connection.uri, w="majority") as client:
        while True:
            with suppress(PyMongoError):
                async with client.start_session() as session:
                    await session.with_transaction(partial(order, client))


def kill(replica_set: ReplicaSet, primary: Node) -> None:
    replica_set.kill(primary)
    replica_set.wait_for_primary(excluding=primary)
    replica_set.restart_node(primary)


def step_down(replica_set: ReplicaSet, primary: Node) -> None:
    replica_set.step_down(primary)


async def count_jobs(ledger: Ledger) -> int:
    with suppress(PyMongoError):
        return await ledger.db.events.count_documents({"type": "JobSubmitted"})
    return 0


async def has_jobs(ledger: Ledger, count: int) -> bool:
    return await count_jobs(ledger) >= count


async def is_outbox_empty(ledger: Ledger) -> bool:
    return await ledger.db.outbox.find_one() is None


@pytest.mark.parametrize("fault", [kill, step_down])
async def test_failover_submits_exactly_the_jobs_of_committed_transactions(
    replica_set: ReplicaSet, fault: Callable[[ReplicaSet, Node], None]
) -> None:
    connection = Connection(replica_set.uri, "test")
    await create_ledger(connection)
    async with run_relay(connection) as ledger, run_relay(connection):
        programs = [asyncio.create_task(submit_repeatedly(connection)) for _ in range(PROGRAMS)]
        try:
            await poll_until(partial(has_jobs, ledger, JOBS))
            await asyncio.to_thread(fault, replica_set, replica_set.wait_for_primary())
            await poll_until(partial(has_jobs, ledger, await count_jobs(ledger) + JOBS))
        finally:
            for program in programs:
                program.cancel()
            await asyncio.gather(*programs, return_exceptions=True)
        await asyncio.to_thread(replica_set.wait_until_in_sync)
        await poll_until(partial(is_outbox_empty, ledger))
        documents = await load_event_documents(ledger.db)
        orders = [order["_id"] async for order in ledger.db.orders.find()]
        assert await ledger.db.outbox_rejected.find_one() is None
    check_log(documents)
    jobs = [document["stream"] for document in documents if document["type"] == "JobSubmitted"]
    assert len(set(jobs)) == len(jobs)
    assert set(jobs) == set(orders)
