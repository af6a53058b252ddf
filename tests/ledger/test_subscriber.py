"""The subscriber for other programs: it keeps its position, has one holder per name, and misses no event."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.errors import ConfigurationError, LedgerUnavailable, LogTruncated
from jobledger.ledger.domain.events import JobClaimed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.subscriber import LedgerClient, SubscriptionEvents, SubscriptionTakenOver, ledger_client
from tests.support.event_examples import NOON
from tests.support.event_stores import FAST_GAP_LIMITS, create_append, create_progress, kill_change_stream
from tests.support.ledger_setup import (
    DEADLINE_SECONDS,
    EVENT_METADATA,
    Ledger,
    change_stream_operations,
    create_position_gap,
    event_positions,
    load_event_documents,
    open_ledger,
    poll_until,
)
from tests.support.message_proxy import MessageProxy
from tests.support.tcp_proxy import TcpProxy

NOT_A_URI = "http://127.0.0.1"
PROGRAM = """
import asyncio, sys
from jobledger.ledger.subscriber import ledger_client

async def main(uri, db_name):
    async with ledger_client(uri, db_name=db_name).subscribe("mine") as events:
        async for event in events:
            print(event.position, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""


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
    async with asyncio.timeout(seconds):
        while (await load_saved_position(db) or 0) < position:  # noqa: ASYNC110 - no notification
            await asyncio.sleep(0.02)


async def wait_until_no_change_stream(db: Database) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await change_stream_operations(db):  # noqa: ASYNC110 - no notification
            await asyncio.sleep(0.02)


async def load_collections(db: Database) -> dict[str, list[Document]]:
    return {name: await db[name].find(sort=[("_id", 1)]).to_list() for name in await db.list_collection_names()}


async def count_saves(db: Database) -> int:
    """Return how often a position was saved since profiling began."""
    return await db["system.profile"].count_documents({"ns": f"{db.name}.subscriptions", "op": "update"})


# Without a name ---------------------------------------------------------------------------------------------------


async def test_subscription_beyond_end_of_log_is_rejected(
    connection: Connection, client: LedgerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_ATTEMPTS", 2)
    async with connection.client() as driver:
        await driver[connection.db_name].subscriptions.insert_one({"_id": "mine", "position": 99, "holder": "x"})
    with pytest.raises(LogTruncated, match="ends at position 0, but the subscription 'mine' had reached position 99"):
        async with client.subscribe("mine"):
            pass


async def test_subscription_that_read_replaced_events_is_rejected(
    connection: Connection, client: LedgerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_ATTEMPTS", 2)
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
        async with ledger_client(NOT_A_URI).subscribe("mine", types=types):
            pass


# With a name ------------------------------------------------------------------------------------------------------


async def test_named_subscription_continues_after_last_yielded_event(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 20))
    next_position = 1
    for count in (1, 3, 0, 5):  # further events are in the memory of the subscriber when the block ends
        async with client.subscribe("mine") as events:
            assert event_positions(await take(events, count)) == list(range(next_position, next_position + count))
        next_position += count
        assert await load_saved_position(unstreamed_ledger.db) == next_position - 1
    async with client.subscribe("mine") as events:
        async for event in events:
            if event.position == 15:
                break
    assert await load_saved_position(unstreamed_ledger.db) == 15


async def test_saved_position_advances_past_other_types(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    claimed = [await submit_and_claim_job(unstreamed_ledger) for _ in range(3)]
    async with client.subscribe("mine", types=[JobClaimed]) as events:
        assert await take(events, 1) == claimed[:1]
    assert await load_saved_position(unstreamed_ledger.db) == 3
    async with client.subscribe("mine", types=[JobClaimed]) as events:
        assert await take(events, 2) == claimed[1:]
        pending = asyncio.create_task(take(events, 1))
        await unstreamed_ledger.submit_job()
        await wait_until_saved(unstreamed_ledger.db, 7)
        next_claim = await submit_and_claim_job(unstreamed_ledger)
        assert await pending == [next_claim]


async def test_after_applies_to_first_subscription_only(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 9))
    async with client.subscribe("mine", after=3):
        pass  # the subscription exists now, although no event was requested
    async with client.subscribe("mine", after=7) as events:
        assert event_positions(await take(events, 2)) == [4, 5]
    async with client.subscribe("mine", after=0) as events:
        assert event_positions(await take(events, 1)) == [6]


@pytest.mark.parametrize("ending", [RuntimeError, asyncio.CancelledError])
async def test_event_is_repeated_after_error_in_block(
    unstreamed_ledger: Ledger, client: LedgerClient, ending: type[BaseException]
) -> None:
    async def fail() -> None:
        async with client.subscribe("mine") as events:
            await take(events, 3)
            raise ending

    await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 5))
    with pytest.raises(ending):
        await fail()
    assert await load_saved_position(unstreamed_ledger.db) == 2
    async with client.subscribe("mine") as events:
        assert event_positions(await take(events, 3)) == [3, 4, 5]


async def test_position_is_saved_once_a_second_without_requests_when_idle(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    clock = asyncio.get_running_loop().time
    async with client.subscribe("mine") as events:
        reading = asyncio.create_task(take(events, 1_000_000))
        await unstreamed_ledger.db.command("profile", 2)
        started = clock()
        async with background_appends(unstreamed_ledger):
            await unstreamed_ledger.submit_job()
            await wait_until_saved(
                unstreamed_ledger.db, 1, seconds=DEADLINE_SECONDS
            )  # while events arrive without a pause
        head = await unstreamed_ledger.event_store.head_position()
        assert head > 20
        await wait_until_saved(unstreamed_ledger.db, head)
        assert await count_saves(unstreamed_ledger.db) <= clock() - started + 1
        idle_since = datetime.now(UTC) + timedelta(milliseconds=100)  # the requests of this test have ended by then
        await asyncio.sleep(1.2)
        idle = {"ts": {"$gt": idle_since, "$lt": datetime.now(UTC)}, "op": {"$ne": "getmore"}}
        assert await unstreamed_ledger.db["system.profile"].find(idle).to_list() == []
        await unstreamed_ledger.db.command("profile", 0)
        reading.cancel()


async def test_killed_subscriber_repeats_only_unsaved_events(
    unstreamed_ledger: Ledger, client: LedgerClient, connection: Connection
) -> None:
    saved_position = 0
    async with background_appends(unstreamed_ledger):
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM, connection.uri, connection.db_name),
                cwd=Path(__file__).parents[2],
                stdout=asyncio.subprocess.PIPE,
            )
            await wait_until_saved(unstreamed_ledger.db, saved_position + 50)
            process.kill()
            printed, _ = await process.communicate()
            received = [int(line) for line in printed.split()]
            assert received == list(range(saved_position + 1, saved_position + len(received) + 1))
            saved_position = await load_saved_position(unstreamed_ledger.db) or 0
            assert received[0] <= saved_position <= received[-1]
    head = await unstreamed_ledger.event_store.head_position()
    async with client.subscribe("mine") as events:
        assert event_positions(await take(events, head - saved_position)) == list(range(saved_position + 1, head + 1))


async def test_cancelled_subscriber_ends_at_once_and_saves(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    received: list[RecordedEvent] = []

    async def follow() -> None:
        async with client.subscribe("mine") as events:
            async for event in events:
                received.append(event)

    for count in (1, 2, 3):
        following = asyncio.create_task(follow())
        await unstreamed_ledger.submit_job()
        await poll_until(lambda count=count: len(received) == count)  # type: ignore[misc]  # a lambda's default
        following.cancel()
        async with asyncio.timeout(DEADLINE_SECONDS):
            with pytest.raises(asyncio.CancelledError):
                await following
        assert await load_saved_position(unstreamed_ledger.db) == count
    assert event_positions(received) == [1, 2, 3]
    await wait_until_no_change_stream(unstreamed_ledger.db)


# One holder per name ----------------------------------------------------------------------------------------------


async def test_second_subscriber_takes_over_name(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    async def follow() -> None:
        async with client.subscribe("mine") as events:
            async for _ in events:
                pass

    async with background_appends(unstreamed_ledger):
        first_subscriber = asyncio.create_task(follow())
        await wait_until_saved(unstreamed_ledger.db, 1)
        async with client.subscribe("mine") as second_events:
            taken_over_at = second_events.position
            async with asyncio.timeout(DEADLINE_SECONDS):
                with pytest.raises(SubscriptionTakenOver, match="'mine'"):
                    await first_subscriber
            assert await load_saved_position(unstreamed_ledger.db) == taken_over_at
            assert event_positions(await take(second_events, 20)) == list(range(taken_over_at + 1, taken_over_at + 21))
            await second_events.save()
            assert await load_saved_position(unstreamed_ledger.db) == taken_over_at + 19


async def test_replaced_subscriber_does_not_overwrite_position(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 9))
    async with AsyncExitStack() as stack:
        first_events = await stack.enter_async_context(client.subscribe("mine"))
        await take(first_events, 8)
        async with client.subscribe("mine") as second_events:
            with pytest.raises(SubscriptionTakenOver):
                await first_events.save()
            await stack.aclose()  # the first subscriber leaves its block
            assert await load_saved_position(unstreamed_ledger.db) == 0
            assert event_positions(await take(second_events, 4)) == [1, 2, 3, 4]
            await second_events.save()
            assert await load_saved_position(unstreamed_ledger.db) == 3
        assert await load_saved_position(unstreamed_ledger.db) == 4


async def test_two_names_are_independent_and_save_on_request(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 5))
    async with client.subscribe("mine") as mine, client.subscribe("yours", after=1) as yours:
        assert event_positions(await take(mine, 5)) == [1, 2, 3, 4, 5]
        assert event_positions(await take(yours, 1)) == [2]
        await mine.save()
        assert (
            await load_saved_position(unstreamed_ledger.db),
            await load_saved_position(unstreamed_ledger.db, "yours"),
        ) == (4, 1)
        await yours.save()
    assert (
        await load_saved_position(unstreamed_ledger.db),
        await load_saved_position(unstreamed_ledger.db, "yours"),
    ) == (5, 2)


# Faults -----------------------------------------------------------------------------------------------------------


async def test_broken_or_silent_connection_loses_no_event(mongodb_uri: str, unstreamed_ledger: Ledger) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        async with ledger_client(proxy.uri, db_name=unstreamed_ledger.db.name).subscribe("mine") as events:
            await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 2500))
            assert event_positions(await take(events, 700)) == list(range(1, 701))
            for start_position in (700, 1300, 1900):
                proxy.close_connections()
                assert event_positions(await take(events, 600)) == list(range(start_position + 1, start_position + 601))
            proxy.suspend()
            await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 3))
            pending = asyncio.create_task(take(events, 3))
            assert not (await asyncio.wait({pending}, timeout=0.2))[0]
            proxy.resume()
            assert event_positions(await pending) == [2501, 2502, 2503]
            proxy.close_connections()
            await wait_until_saved(unstreamed_ledger.db, 2502)


async def test_lost_messages_are_retried(mongodb_uri: str, unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 5))
    with MessageProxy(mongodb_uri) as proxy:
        async with ledger_client(proxy.uri, db_name=unstreamed_ledger.db.name).subscribe("mine") as events:
            proxy.drop_request("find")
            proxy.drop_request("getMore")
            assert event_positions(await take(events, 4)) == [1, 2, 3, 4]
            proxy.drop_response("update")
            with pytest.raises(LedgerUnavailable, match="saving the position of the subscription mine"):
                await events.save()
            await events.save()
            assert await load_saved_position(unstreamed_ledger.db) == 3
            proxy.drop_request("update")
            pending = asyncio.create_task(take(events, 3))
            await unstreamed_ledger.submit_job()
            await wait_until_saved(unstreamed_ledger.db, 6)
            await unstreamed_ledger.submit_job()
            assert event_positions(await pending) == [5, 6, 7]
        assert proxy.dropped_count == 4


async def test_killed_change_stream_or_dead_appender_leaves_no_gap(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    async with client.subscribe("mine") as events:
        for position, kill_command in ((1, "killCursors"), (2, "killOp")):
            await kill_change_stream(unstreamed_ledger.db, kill_command)
            await unstreamed_ledger.submit_job()
            assert event_positions(await take(events, 1)) == [position]
        await kill_change_stream(unstreamed_ledger.db, "killCursors")
        await create_position_gap(unstreamed_ledger.db)
        await unstreamed_ledger.submit_job()
        assert [event.type for event in await take(events, 2)] == ["PositionVoided", "JobSubmitted"]


async def test_unreachable_or_invalid_uri_is_rejected_on_entry(mongodb_uri: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        proxy.close()
        async with asyncio.timeout(DEADLINE_SECONDS):
            with pytest.raises(LedgerUnavailable, match="Is it running"):
                async with ledger_client(proxy.uri, connect_timeout_ms=300).subscribe():
                    pass
    for invalid_uri in (NOT_A_URI, "mongodb://", "", "mongodb://127.0.0.1:99999"):
        client_without_connection = ledger_client(invalid_uri)
        with pytest.raises(ConfigurationError):
            async with client_without_connection.subscribe():
                pass


# Invalid arguments and edge cases ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "invalid_arguments", [{"after": -1}, {"after": 1.5}, {"after": "1"}, {"name": ""}, {"name": 5}], ids=str
)
async def test_invalid_position_or_name_is_rejected_before_connecting(invalid_arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"name|after"):
        async with ledger_client(NOT_A_URI).subscribe(**invalid_arguments):
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


async def test_wait_cancelled_during_delivery_loses_no_event(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    async with client.subscribe("mine") as events:
        pending = asyncio.create_task(take(events, 1))
        await poll_until(lambda: any("Subscription.next_chunk" in repr(task) for task in asyncio.all_tasks()))
        [reading] = [task for task in asyncio.all_tasks() if "Subscription.next_chunk" in repr(task)]
        reading.add_done_callback(lambda _: pending.cancel())  # as asyncio.timeout does
        await unstreamed_ledger.submit_job()
        await asyncio.wait({pending})
        await unstreamed_ledger.submit_job()
        assert event_positions(await take(events, 1)) == [1]


async def test_late_save_does_not_move_position_back(mongodb_uri: str, unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 5))
    await unstreamed_ledger.db.command("profile", 2)
    with MessageProxy(mongodb_uri) as proxy:
        async with ledger_client(proxy.uri, db_name=unstreamed_ledger.db.name).subscribe("mine") as events:
            proxy.hold_request("update")
            await take(events, 2)
            await asyncio.to_thread(
                proxy.message_held.wait, DEADLINE_SECONDS
            )  # the first event is processed, and its position is being saved
            await take(events, 3)
            # The next save may or may not wait for the held request.
            asyncio.get_running_loop().call_later(0.3, proxy.release_request)
            await events.save()
            async with asyncio.timeout(DEADLINE_SECONDS):
                while await count_saves(unstreamed_ledger.db) < 2:  # noqa: ASYNC110 - no notification
                    await asyncio.sleep(0.02)
            assert await load_saved_position(unstreamed_ledger.db) == 4


async def test_replaced_subscriber_ends_without_matching_events(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    async with client.subscribe("mine", types=[JobClaimed]) as first_events, client.subscribe("mine"):
        pending = asyncio.create_task(take(first_events, 1))
        await unstreamed_ledger.submit_job()
        await asyncio.wait({pending}, timeout=DEADLINE_SECONDS)
        ended = pending.done()
        pending.cancel()
        assert ended
        with pytest.raises(SubscriptionTakenOver):
            await pending
