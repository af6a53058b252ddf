"""The subscriber for other programs: its place is kept, one program holds it, and nothing is left out."""

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
from tests.ledger.conftest import FAST_GAP_LIMITS
from tests.ledger.test_event_store import append_of, kill_change_stream, progress
from tests.support.event_examples import NOON
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
async def nothing_left_behind() -> AsyncIterator[None]:
    """However a subscription ends, no task goes on, and no error of one is lost."""
    complaints: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
    yield
    assert asyncio.all_tasks() == {asyncio.current_task()}
    gc.collect()  # a task says that nobody asked for its exception when it is thrown away
    assert complaints == []


async def some(events: SubscriptionEvents, count: int) -> list[RecordedEvent]:
    async with asyncio.timeout(DEADLINE_SECONDS):
        return [await anext(events) for _ in range(count)]


async def claim(ledger: Ledger) -> RecordedEvent:
    """Submit a job and have it claimed: two events, of which the second is returned."""
    submitted = await ledger.submit_job()
    stream = submitted.events[0].stream
    [claimed] = (
        await handle_command(
            ledger.event_store, stream, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=submitted.stream_state
        )
    ).events
    return claimed


@asynccontextmanager
async def writing(ledger: Ledger) -> AsyncIterator[None]:
    """Somebody writes while the block lasts; when it is left, the log has come to rest."""

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


async def saved(db: Database, name: str = "mine") -> int | None:
    place = await db.subscriptions.find_one({"_id": name})
    return int(place["position"]) if place else None


async def until_saved(db: Database, position: int, seconds: float = DEADLINE_SECONDS) -> None:
    """Until this position, or a later one, is saved."""
    async with asyncio.timeout(seconds):
        while (await saved(db) or 0) < position:  # noqa: ASYNC110 - whoever saves does not tell us
            await asyncio.sleep(0.02)


async def until_no_stream(db: Database) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await change_stream_operations(db):  # noqa: ASYNC110 - the server notices when it next looks
            await asyncio.sleep(0.02)


async def content(db: Database) -> dict[str, list[Document]]:
    return {name: await db[name].find(sort=[("_id", 1)]).to_list() for name in await db.list_collection_names()}


async def saves(db: Database) -> int:
    """How often a position was written since profiling began."""
    return await db["system.profile"].count_documents({"ns": f"{db.name}.subscriptions", "op": "update"})


# Without a name ---------------------------------------------------------------------------------------------------


async def test_a_subscription_beyond_the_end_of_the_log_is_refused(
    connection: Connection, client: LedgerClient
) -> None:
    async with connection.client() as driver:
        await driver[connection.db_name].subscriptions.insert_one({"_id": "mine", "position": 99, "holder": "x"})
    with pytest.raises(LogTruncated, match="ends at position 0, but the subscription 'mine' had reached position 99"):
        async with client.subscribe("mine"):
            pass


async def test_a_subscription_that_has_read_other_events_than_there_are_is_refused(
    connection: Connection, client: LedgerClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_ATTEMPTS", 2)
    async with open_ledger(connection) as ledger:
        for _ in range(3):
            await ledger.submit_job()
        async with client.subscribe("mine") as events:
            await some(events, 3)
        await ledger.db.events.delete_many({"_id": {"$gte": 2}})
        await ledger.db.counters.update_one({"_id": "events"}, {"$set": {"next": 1}})
        for _ in range(3):
            await ledger.submit_job()
        with pytest.raises(LogTruncated, match="'mine' had reached position 3, and the log has another"):
            async with client.subscribe("mine"):
                pass


async def test_history_becomes_live_in_order_none_missing_or_double_while_others_write(
    connection: Connection, client: LedgerClient
) -> None:
    async def write(ledger: Ledger) -> None:
        for number in range(60):
            if number == 20:
                await create_position_gap(ledger.db)
            await ledger.event_store.append(append_of(*[progress()] * (1 + number % 3)))

    total = 3 * (20 * (1 + 2 + 3) + 1)
    begins = (0, 1, 40, total - 1)
    async with AsyncExitStack() as stack:
        writers = [
            await stack.enter_async_context(open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False))
            for _ in range(3)
        ]
        written = asyncio.gather(*(write(ledger) for ledger in writers))
        subscribers = [await stack.enter_async_context(client.subscribe(after=begin)) for begin in begins]
        reading = [some(events, total - begin) for events, begin in zip(subscribers, begins, strict=True)]
        seen = asyncio.gather(*reading)
        await written
        await writers[0].submit_job()  # evidence for the numbers that were lost last
        assert [event_positions(events) for events in await seen] == [
            list(range(begin + 1, total + 1)) for begin in begins
        ]
        assert (await seen)[0] == await writers[0].event_store.read(limit=total)


async def test_without_a_name_nothing_is_written_and_unwanted_types_count(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    await claim(unstreamed_ledger)
    await unstreamed_ledger.submit_job()
    before = await content(unstreamed_ledger.db)
    async with client.subscribe(types=[JobClaimed]) as events:
        assert event_positions(await some(events, 1)) == [2]
        waiting = asyncio.create_task(some(events, 1))
        await poll_until(lambda: events.position == 3)
        await events.save()
        await asyncio.sleep(1.2)  # longer than one with a name takes to save
        assert await content(unstreamed_ledger.db) == before
        await unstreamed_ledger.submit_job()
        await poll_until(lambda: events.position == 4)
        claimed = await claim(unstreamed_ledger)
        assert await waiting == [claimed]
    after = await content(unstreamed_ledger.db)
    assert after.keys() == before.keys()
    assert after["events"][:3] == before["events"]
    assert len(after["events"]) == 6


async def test_types_are_named_by_class_or_by_name(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    await claim(unstreamed_ledger)
    await unstreamed_ledger.event_store.append(append_of(progress()))
    async with client.subscribe(types=[JobClaimed, "JobProgressed"]) as events:
        assert [event.type for event in await some(events, 2)] == ["JobClaimed", "JobProgressed"]


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
async def test_a_misspelt_type_is_refused_with_a_suggestion_before_anything_is_connected(types: Any, hint: str) -> None:
    with pytest.raises(ValueError, match=hint):
        async with ledger_client(NOT_A_URI).subscribe("mine", types=types):
            pass


# With a name ------------------------------------------------------------------------------------------------------


async def test_a_name_goes_on_behind_the_last_event_that_was_handed_out(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    await unstreamed_ledger.event_store.append(append_of(*[progress()] * 20))
    begun = 1
    for count in (1, 3, 0, 5):  # what is left waits in the subscriber's memory when the block is left
        async with client.subscribe("mine") as events:
            assert event_positions(await some(events, count)) == list(range(begun, begun + count))
        begun += count
        assert await saved(unstreamed_ledger.db) == begun - 1
    async with client.subscribe("mine") as events:
        async for event in events:
            if event.position == 15:
                break
    assert await saved(unstreamed_ledger.db) == 15


async def test_unwanted_types_move_the_saved_position_on_too(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    claimed = [await claim(unstreamed_ledger) for _ in range(3)]
    async with client.subscribe("mine", types=[JobClaimed]) as events:
        assert await some(events, 1) == claimed[:1]
    assert await saved(unstreamed_ledger.db) == 3
    async with client.subscribe("mine", types=[JobClaimed]) as events:
        assert await some(events, 2) == claimed[1:]
        waiting = asyncio.create_task(some(events, 1))
        await unstreamed_ledger.submit_job()
        await until_saved(unstreamed_ledger.db, 7)
        wanted = await claim(unstreamed_ledger)
        assert await waiting == [wanted]


async def test_after_counts_only_the_first_time(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    await unstreamed_ledger.event_store.append(append_of(*[progress()] * 9))
    async with client.subscribe("mine", after=3):
        pass  # it has begun, although nothing was asked for
    async with client.subscribe("mine", after=7) as events:
        assert event_positions(await some(events, 2)) == [4, 5]
    async with client.subscribe("mine", after=0) as events:
        assert event_positions(await some(events, 1)) == [6]


@pytest.mark.parametrize("ending", [RuntimeError, asyncio.CancelledError])
async def test_the_event_in_hand_comes_again_when_the_body_raised(
    unstreamed_ledger: Ledger, client: LedgerClient, ending: type[BaseException]
) -> None:
    async def fail() -> None:
        async with client.subscribe("mine") as events:
            await some(events, 3)
            raise ending

    await unstreamed_ledger.event_store.append(append_of(*[progress()] * 5))
    with pytest.raises(ending):
        await fail()
    assert await saved(unstreamed_ledger.db) == 2
    async with client.subscribe("mine") as events:
        assert event_positions(await some(events, 3)) == [3, 4, 5]


async def test_it_saves_once_a_second_and_asks_nothing_when_idle(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    clock = asyncio.get_running_loop().time
    async with client.subscribe("mine") as events:
        reading = asyncio.create_task(some(events, 1_000_000))
        await unstreamed_ledger.db.command("profile", 2)
        begun = clock()
        async with writing(unstreamed_ledger):
            await unstreamed_ledger.submit_job()
            await until_saved(unstreamed_ledger.db, 1, seconds=2.5)  # though there is no pause to do it in
        head = await unstreamed_ledger.event_store.head_position()
        assert head > 20
        await until_saved(unstreamed_ledger.db, head, seconds=2.5)
        assert await saves(unstreamed_ledger.db) <= clock() - begun + 1
        idle_since = datetime.now(UTC) + timedelta(milliseconds=100)  # our own questions are over by then
        await asyncio.sleep(1.2)
        idle = {"ts": {"$gt": idle_since, "$lt": datetime.now(UTC)}, "op": {"$ne": "getmore"}}
        assert await unstreamed_ledger.db["system.profile"].find(idle).to_list() == []
        await unstreamed_ledger.db.command("profile", 0)
        reading.cancel()


async def test_whoever_is_killed_leaves_nothing_out_and_repeats_only_what_was_not_saved(
    unstreamed_ledger: Ledger, client: LedgerClient, connection: Connection
) -> None:
    place = 0
    async with writing(unstreamed_ledger):
        for _ in range(2):
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", PROGRAM, connection.uri, connection.db_name),
                cwd=Path(__file__).parents[2],
                stdout=asyncio.subprocess.PIPE,
            )
            await until_saved(unstreamed_ledger.db, place + 50)
            process.kill()
            printed, _ = await process.communicate()
            seen = [int(line) for line in printed.split()]
            assert seen == list(range(place + 1, place + len(seen) + 1))
            place = await saved(unstreamed_ledger.db) or 0
            assert seen[0] <= place <= seen[-1]
    head = await unstreamed_ledger.event_store.head_position()
    async with client.subscribe("mine") as events:
        assert event_positions(await some(events, head - place)) == list(range(place + 1, head + 1))


async def test_whoever_is_cancelled_while_waiting_ends_at_once_and_has_saved(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    seen: list[RecordedEvent] = []

    async def follow() -> None:
        async with client.subscribe("mine") as events:
            async for event in events:
                seen.append(event)

    for count in (1, 2, 3):
        following = asyncio.create_task(follow())
        await unstreamed_ledger.submit_job()
        await poll_until(lambda count=count: len(seen) == count)  # type: ignore[misc]  # a lambda's default
        following.cancel()
        async with asyncio.timeout(2):
            with pytest.raises(asyncio.CancelledError):
                await following
        assert await saved(unstreamed_ledger.db) == count
    assert event_positions(seen) == [1, 2, 3]
    await until_no_stream(unstreamed_ledger.db)


# One holder -------------------------------------------------------------------------------------------------------


async def test_of_two_holders_the_newer_goes_on_and_the_older_ends(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    async def follow() -> None:
        async with client.subscribe("mine") as events:
            async for _ in events:
                pass

    async with writing(unstreamed_ledger):
        older = asyncio.create_task(follow())
        await until_saved(unstreamed_ledger.db, 1)
        async with client.subscribe("mine") as newer:
            begun = newer.position
            async with asyncio.timeout(DEADLINE_SECONDS):
                with pytest.raises(SubscriptionTakenOver, match="'mine'"):
                    await older
            assert await saved(unstreamed_ledger.db) == begun
            assert event_positions(await some(newer, 20)) == list(range(begun + 1, begun + 21))
            await newer.save()
            assert await saved(unstreamed_ledger.db) == begun + 19


async def test_the_older_holder_never_writes_over_the_newer_ones_position(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    await unstreamed_ledger.event_store.append(append_of(*[progress()] * 9))
    async with AsyncExitStack() as stack:
        older = await stack.enter_async_context(client.subscribe("mine"))
        await some(older, 8)
        async with client.subscribe("mine") as newer:
            with pytest.raises(SubscriptionTakenOver):
                await older.save()
            await stack.aclose()  # the older leaves its block
            assert await saved(unstreamed_ledger.db) == 0
            assert event_positions(await some(newer, 4)) == [1, 2, 3, 4]
            await newer.save()
            assert await saved(unstreamed_ledger.db) == 3
        assert await saved(unstreamed_ledger.db) == 4


async def test_two_names_are_independent_and_save_at_once_when_asked(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    await unstreamed_ledger.event_store.append(append_of(*[progress()] * 5))
    async with client.subscribe("mine") as mine, client.subscribe("yours", after=1) as yours:
        assert event_positions(await some(mine, 5)) == [1, 2, 3, 4, 5]
        assert event_positions(await some(yours, 1)) == [2]
        await mine.save()
        assert (await saved(unstreamed_ledger.db), await saved(unstreamed_ledger.db, "yours")) == (4, 1)
        await yours.save()
    assert (await saved(unstreamed_ledger.db), await saved(unstreamed_ledger.db, "yours")) == (5, 2)


# Outliving trouble ------------------------------------------------------------------------------------------------


async def test_a_broken_or_silent_connection_costs_nothing_but_time(
    mongodb_uri: str, unstreamed_ledger: Ledger
) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        async with ledger_client(proxy.uri, db_name=unstreamed_ledger.db.name).subscribe("mine") as events:
            await unstreamed_ledger.event_store.append(append_of(*[progress()] * 2500))
            assert event_positions(await some(events, 700)) == list(range(1, 701))
            for begin in (700, 1300, 1900):
                proxy.close_connections()
                assert event_positions(await some(events, 600)) == list(range(begin + 1, begin + 601))
            proxy.suspend()
            await unstreamed_ledger.event_store.append(append_of(*[progress()] * 3))
            waiting = asyncio.create_task(some(events, 3))
            assert not (await asyncio.wait({waiting}, timeout=0.2))[0]
            proxy.resume()
            assert event_positions(await waiting) == [2501, 2502, 2503]
            proxy.close_connections()
            await until_saved(unstreamed_ledger.db, 2502)


async def test_what_is_lost_on_the_wire_is_asked_again(mongodb_uri: str, unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.event_store.append(append_of(*[progress()] * 5))
    with MessageProxy(mongodb_uri) as wire:
        async with ledger_client(wire.uri, db_name=unstreamed_ledger.db.name).subscribe("mine") as events:
            wire.drop_request("find")
            wire.drop_request("getMore")
            assert event_positions(await some(events, 4)) == [1, 2, 3, 4]
            wire.drop_response("update")
            with pytest.raises(LedgerUnavailable, match="saving the position of the subscription mine"):
                await events.save()
            await events.save()
            assert await saved(unstreamed_ledger.db) == 3
            wire.drop_request("update")
            waiting = asyncio.create_task(some(events, 3))
            await unstreamed_ledger.submit_job()
            await until_saved(unstreamed_ledger.db, 6)
            await unstreamed_ledger.submit_job()
            assert event_positions(await waiting) == [5, 6, 7]
        assert wire.dropped_count == 4


async def test_a_killed_change_stream_and_a_dead_writer_leave_no_gap(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    async with client.subscribe("mine") as events:
        for position, how in ((1, "killCursors"), (2, "killOp")):
            await kill_change_stream(unstreamed_ledger.db, how)
            await unstreamed_ledger.submit_job()
            assert event_positions(await some(events, 1)) == [position]
        await kill_change_stream(unstreamed_ledger.db, "killCursors")
        await create_position_gap(unstreamed_ledger.db)
        await unstreamed_ledger.submit_job()
        assert [event.type for event in await some(events, 2)] == ["PositionVoided", "JobSubmitted"]


async def test_nobody_listening_and_a_uri_that_is_none_are_told_when_the_block_is_entered(mongodb_uri: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        proxy.close()
        async with asyncio.timeout(3):
            with pytest.raises(LedgerUnavailable, match="Is it running"):
                async with ledger_client(proxy.uri, connect_timeout_ms=300).subscribe():
                    pass
    for none in (NOT_A_URI, "mongodb://", "", "mongodb://127.0.0.1:99999"):
        unconnected = ledger_client(none)
        with pytest.raises(ConfigurationError):
            async with unconnected.subscribe():
                pass


# What is not as it should be yet ----------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [{"after": -1}, {"after": 1.5}, {"after": "1"}, {"name": ""}, {"name": 5}], ids=str)
async def test_what_is_no_position_or_no_name_is_refused_before_anything_is_connected(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"name|after"):
        async with ledger_client(NOT_A_URI).subscribe(**wrong):
            pass


@pytest.mark.parametrize("name", ["", "a.b", "$x", "a b", "x" * 64])
def test_a_name_that_no_database_can_have_is_refused(name: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a database name"):
        ledger_client("mongodb://127.0.0.1", db_name=name)


async def test_all_subscriptions_of_a_client_share_one_change_stream(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    async with client.subscribe() as first:
        async with client.subscribe("mine") as second, client.subscribe(after=1) as third:
            await claim(unstreamed_ledger)
            seen = [len(await change_stream_operations(unstreamed_ledger.db)) for _ in range(20)]
            assert max(seen) == 1  # between two getMores, there may be none
            assert event_positions([*await some(first, 1), *await some(second, 1), *await some(third, 1)]) == [1, 1, 2]
        assert event_positions(await some(first, 1)) == [2], "the others have ended, and this one goes on"
    await until_no_stream(unstreamed_ledger.db)
    async with client.subscribe("mine") as again:
        assert event_positions(await some(again, 1)) == [2]


async def test_behind_its_block_a_subscription_is_over(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    await unstreamed_ledger.submit_job()
    async with client.subscribe() as events:
        pass
    with pytest.raises(RuntimeError, match="is closed"):
        await anext(events)


async def test_a_beginning_before_the_log_leaves_the_log_as_it_is(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    await unstreamed_ledger.event_store.append(append_of(progress()))
    before = await load_event_documents(unstreamed_ledger.db)
    with suppress(ValueError):
        async with client.subscribe(after=-3) as events:
            await some(events, 1)
    assert await load_event_documents(unstreamed_ledger.db) == before


async def test_a_wait_given_up_in_the_moment_of_delivery_loses_no_event(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    async with client.subscribe("mine") as events:
        waiting = asyncio.create_task(some(events, 1))
        await poll_until(lambda: any("Subscription.next_chunk" in repr(task) for task in asyncio.all_tasks()))
        [reading] = [task for task in asyncio.all_tasks() if "Subscription.next_chunk" in repr(task)]
        reading.add_done_callback(lambda _: waiting.cancel())  # as the deadline of an asyncio.timeout would
        await unstreamed_ledger.submit_job()
        await asyncio.wait({waiting})
        await unstreamed_ledger.submit_job()
        assert event_positions(await some(events, 1)) == [1]


async def test_a_save_that_arrives_late_does_not_take_the_position_back(
    mongodb_uri: str, unstreamed_ledger: Ledger
) -> None:
    await unstreamed_ledger.event_store.append(append_of(*[progress()] * 5))
    await unstreamed_ledger.db.command("profile", 2)
    with MessageProxy(mongodb_uri) as wire:
        async with ledger_client(wire.uri, db_name=unstreamed_ledger.db.name).subscribe("mine") as events:
            wire.hold_request("update")
            await some(events, 2)
            await asyncio.to_thread(wire.message_held.wait, DEADLINE_SECONDS)  # the first is done, and is being saved
            await some(events, 3)
            asyncio.get_running_loop().call_later(
                0.3, wire.release_request
            )  # whether or not the next save waits for it
            await events.save()
            async with asyncio.timeout(DEADLINE_SECONDS):
                while await saves(unstreamed_ledger.db) < 2:  # noqa: ASYNC110 - the server tells nobody
                    await asyncio.sleep(0.02)
            assert await saved(unstreamed_ledger.db) == 4


async def test_the_older_holder_ends_although_nothing_it_wants_comes(
    unstreamed_ledger: Ledger, client: LedgerClient
) -> None:
    async with client.subscribe("mine", types=[JobClaimed]) as older, client.subscribe("mine"):
        waiting = asyncio.create_task(some(older, 1))
        await unstreamed_ledger.submit_job()
        await asyncio.wait({waiting}, timeout=1.7)
        ended = waiting.done()
        waiting.cancel()
        assert ended
        with pytest.raises(SubscriptionTakenOver):
            await waiting
