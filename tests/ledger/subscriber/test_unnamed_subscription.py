"""Subscriptions of other programs: history, live events, arguments and edge cases."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, suppress
from typing import Any

import pytest

from jobledger.ledger.domain.errors import ConfigurationError, LogTruncated
from jobledger.ledger.domain.events import JobClaimed
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.subscriber import LedgerClient, ledger_client
from tests.ledger.subscriber.conftest import (
    NOT_A_MONGODB_URI,
    load_collections,
    submit_and_claim_job,
    take,
    wait_until_no_change_stream,
)
from tests.support.event_stores import FAST_GAP_LIMITS, create_append, create_progress
from tests.support.ledger_setup import (
    Ledger,
    change_stream_operations,
    create_position_gap,
    event_positions,
    load_event_documents,
    open_ledger,
)
from tests.support.polling import poll_until

# Without a name ---------------------------------------------------------------------------------------------------


async def test_subscription_beyond_end_of_log_is_rejected(
    connection: Connection, client: LedgerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_TRIES", 2)
    async with connection.create_client() as driver:
        await driver[connection.db_name].subscriptions.insert_one({"_id": "mine", "position": 99, "holder": "x"})
    with pytest.raises(LogTruncated, match="ends at position 0, but the subscription 'mine' had reached position 99"):
        async with client.subscribe("mine"):
            pass


async def test_subscription_that_read_replaced_events_is_rejected(
    connection: Connection, client: LedgerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_TRIES", 2)
    async with open_ledger(connection) as ledger:
        for _ in range(3):
            await ledger.submit_job()
        async with client.subscribe("mine") as events:
            await take(events, 3)
        await ledger.db.events.delete_many({"_id": {"$gte": 2}})
        await ledger.db.counters.update_one({"_id": "events"}, {"$set": {"next": 1}})
        for _ in range(3):
            await ledger.submit_job()
        with pytest.raises(LogTruncated, match="'mine' had reached position 3, and the log has another"):
            async with client.subscribe("mine"):
                pass


async def test_subscribe_switches_from_history_to_live_without_gaps(
    connection: Connection, client: LedgerClient
) -> None:
    async def write(ledger: Ledger) -> None:
        for number in range(60):
            if number == 20:
                await create_position_gap(ledger.db)
            await ledger.event_store.append(create_append(*[create_progress()] * (1 + number % 3)))

    total = 3 * (20 * (1 + 2 + 3) + 1)
    start_positions = (0, 1, 40, total - 1)
    async with AsyncExitStack() as stack:
        writers = [
            await stack.enter_async_context(open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False))
            for _ in range(3)
        ]
        written = asyncio.gather(*(write(ledger) for ledger in writers))
        subscribers = [
            await stack.enter_async_context(client.subscribe(after=start_position))
            for start_position in start_positions
        ]
        reading = [
            take(events, total - start_position)
            for events, start_position in zip(subscribers, start_positions, strict=True)
        ]
        received = asyncio.gather(*reading)
        await written
        await writers[0].submit_job()  # reveals the last gaps
        assert [event_positions(events) for events in await received] == [
            list(range(start_position + 1, total + 1)) for start_position in start_positions
        ]
        assert (await received)[0] == await writers[0].event_store.read(limit=total)


async def test_unnamed_subscription_writes_nothing_and_skips_other_types(
    unstreamed_ledger: Ledger, client: LedgerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.subscriber._SAVE_SECONDS", 0.1)
    await submit_and_claim_job(unstreamed_ledger)
    await unstreamed_ledger.submit_job()
    before = await load_collections(unstreamed_ledger.db)
    async with client.subscribe(types=[JobClaimed]) as events:
        assert event_positions(await take(events, 1)) == [2]
        pending = asyncio.create_task(take(events, 1))
        await poll_until(lambda: events.position == 3)
        await events.save()
        await asyncio.sleep(0.3)  # a named subscription would save its position in this time
        assert await load_collections(unstreamed_ledger.db) == before
        await unstreamed_ledger.submit_job()
        await poll_until(lambda: events.position == 4)
        claimed = await submit_and_claim_job(unstreamed_ledger)
        assert await pending == [claimed]
    after = await load_collections(unstreamed_ledger.db)
    assert after.keys() == before.keys()
    assert after["events"][:3] == before["events"]
    assert len(after["events"]) == 6


async def test_types_accept_classes_and_names(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    await submit_and_claim_job(unstreamed_ledger)
    await unstreamed_ledger.event_store.append(create_append(create_progress()))
    async with client.subscribe(types=[JobClaimed, "JobProgressed"]) as events:
        assert [event.type for event in await take(events, 2)] == ["JobClaimed", "JobProgressed"]


@pytest.mark.parametrize(
    ("types", "hint"),
    [
        (["JobClaimed", "JobCompletd"], r"no event type 'JobCompletd'; did you mean 'JobCompleted'\?"),
        (["xyz"], "there are BatchAccessChanged, .*JobSubmitted"),
        ([Connection], "no event type 'Connection'"),
        ([5], "no event type '5'"),
        ("JobCompleted", "must be a list of event types"),
        ([], "must be a list of event types"),
    ],
)
async def test_unknown_type_is_rejected_before_connecting(types: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        async with ledger_client(NOT_A_MONGODB_URI).subscribe("mine", types=types):
            pass


# Invalid arguments and edge cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "invalid_arguments", [{"after": -1}, {"after": 1.5}, {"after": "1"}, {"name": ""}, {"name": 5}], ids=str
)
async def test_invalid_position_or_name_is_rejected_before_connecting(invalid_arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"name|after"):
        async with ledger_client(NOT_A_MONGODB_URI).subscribe(**invalid_arguments):
            pass


@pytest.mark.parametrize("name", ["", "a.b", "$x", "a b", "x" * 64])
def test_invalid_database_name_is_rejected(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a database name"):
        ledger_client("mongodb://127.0.0.1", db_name=name)


async def test_subscriptions_of_client_share_one_change_stream(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    async with client.subscribe() as first:
        async with client.subscribe("mine") as second, client.subscribe(after=1) as third:
            await submit_and_claim_job(unstreamed_ledger)
            stream_counts = [len(await change_stream_operations(unstreamed_ledger.db)) for _ in range(20)]
            assert max(stream_counts) == 1  # there may be none between two getMore commands
            assert event_positions([*await take(first, 1), *await take(second, 1), *await take(third, 1)]) == [1, 1, 2]
        assert event_positions(await take(first, 1)) == [2], "this subscription continues after the others ended"
    await wait_until_no_change_stream(unstreamed_ledger.db)
    async with client.subscribe("mine") as reopened:
        assert event_positions(await take(reopened, 1)) == [2]


async def test_subscription_is_closed_after_block(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    await unstreamed_ledger.submit_job()
    async with client.subscribe() as events:
        pass
    with pytest.raises(RuntimeError, match="is closed"):
        await anext(events)


async def test_negative_position_leaves_log_unchanged(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    await unstreamed_ledger.event_store.append(create_append(create_progress()))
    before = await load_event_documents(unstreamed_ledger.db)
    with suppress(ValueError):
        async with client.subscribe(after=-3) as events:
            await take(events, 1)
    assert await load_event_documents(unstreamed_ledger.db) == before
