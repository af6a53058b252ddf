"""A client of the event store for other programs, and helpers that append events and read saved positions."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.subscriber import LedgerClient, SubscriptionEvents, ledger_client
from tests.support.event_examples import NOON
from tests.support.ledger_setup import EVENT_METADATA, Ledger, change_stream_operations
from tests.support.polling import DEADLINE_SECONDS, poll_until

NOT_A_MONGODB_URI = "http://127.0.0.1"


@pytest.fixture
def client(connection: Connection) -> LedgerClient:
    return ledger_client(connection.uri, db_name=connection.db_name)


@pytest.fixture(autouse=True)
async def no_tasks_or_errors_left() -> AsyncIterator[None]:
    """Check that no task and no unretrieved error is left, however a subscription ends."""
    reported_errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: reported_errors.append(context))
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}
    gc.collect()  # a task reports an exception that was never retrieved when it is collected
    assert reported_errors == []


async def take(events: SubscriptionEvents, count: int) -> list[RecordedEvent]:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return [await anext(events) for _ in range(count)]


async def submit_and_claim_job(ledger: Ledger) -> RecordedEvent:
    """Append the submission and claim of a job. Return the claim."""
    submitted = await ledger.submit_job()
    stream = submitted.events[0].stream
    [claimed] = (
        await handle_command(
            ledger.event_store, stream, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=submitted.stream_state
        )
    ).events
    return claimed


@asynccontextmanager
async def background_appends(ledger: Ledger) -> AsyncIterator[None]:
    """Append events in the background during the block. Afterwards all appends have ended."""

    async def write() -> None:
        while True:
            await ledger.submit_job()
            await asyncio.sleep(0.005)

    task = asyncio.create_task(write())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})
        await ledger.event_store.aclose()


async def load_saved_position(db: Database, name: str = "mine") -> int | None:
    saved_position = await db.subscriptions.find_one({"_id": name})
    return int(saved_position["position"]) if saved_position else None


async def wait_until_saved(db: Database, position: int, seconds: float = DEADLINE_SECONDS) -> None:
    """Wait until this position or a later one is saved."""

    async def is_saved() -> bool:
        return (await load_saved_position(db) or 0) >= position

    await poll_until(is_saved, f"position {position} is saved", seconds=seconds)


async def wait_until_no_change_stream(db: Database) -> None:
    async def is_closed() -> bool:
        return not await change_stream_operations(db)

    await poll_until(is_closed, "the change stream is closed")


async def load_collections(db: Database) -> dict[str, list[Document]]:
    return {name: await db[name].find(sort=[("_id", 1)]).to_list() for name in await db.list_collection_names()}


async def count_saves(db: Database) -> int:
    """Return how often a position was saved since profiling began."""
    return await db["system.profile"].count_documents({"ns": f"{db.name}.subscriptions", "op": "update"})
