"""Subscriptions with a name: they save their position, have one holder, and miss no event after a fault."""

from __future__ import annotations

import asyncio
import sys
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from jobledger.ledger.domain.errors import ConfigurationError, LedgerUnavailable
from jobledger.ledger.domain.events import JobClaimed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.subscriber import LedgerClient, SubscriptionTakenOver, ledger_client
from tests.ledger.subscriber.conftest import (
    NOT_A_MONGODB_URI,
    background_appends,
    count_saves,
    load_saved_position,
    submit_and_claim_job,
    take,
    wait_until_no_change_stream,
    wait_until_saved,
)
from tests.support.event_stores import create_append, create_progress, kill_change_stream
from tests.support.ledger_setup import Ledger, create_position_gap, event_positions
from tests.support.message_proxy import MessageProxy
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.tcp_proxy import TcpProxy

PROGRAM = """
import asyncio, sys
from jobledger.ledger.subscriber import ledger_client

async def main(uri, db_name):
    async with ledger_client(uri, db_name=db_name).subscribe("mine") as events:
        async for event in events:
            print(event.position, flush=True)

asyncio.run(main(*sys.argv[1:]))
"""

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
        head = await unstreamed_ledger.event_store.read_head_position()
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
                cwd=Path(__file__).parents[3],
                stdout=asyncio.subprocess.PIPE,
            )
            await wait_until_saved(unstreamed_ledger.db, saved_position + 50)
            process.kill()
            printed, _ = await process.communicate()
            received = [int(line) for line in printed.split()]
            assert received == list(range(saved_position + 1, saved_position + len(received) + 1))
            saved_position = await load_saved_position(unstreamed_ledger.db) or 0
            assert received[0] <= saved_position <= received[-1]
    head = await unstreamed_ledger.event_store.read_head_position()
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
            with pytest.raises(LedgerUnavailable, match="saving the cursor of the subscription mine"):
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


async def test_killed_change_stream_or_crashed_appender_leaves_no_gap(
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
            with pytest.raises(LedgerUnavailable, match="Check that it is running"):
                async with ledger_client(proxy.uri, connect_timeout_ms=300).subscribe():
                    pass
    for invalid_uri in (NOT_A_MONGODB_URI, "mongodb://", "", "mongodb://127.0.0.1:99999"):
        client_without_connection = ledger_client(invalid_uri)
        with pytest.raises(ConfigurationError):
            async with client_without_connection.subscribe():
                pass


async def test_wait_cancelled_during_delivery_loses_no_event(unstreamed_ledger: Ledger, client: LedgerClient) -> None:
    async with client.subscribe("mine") as events:
        pending = asyncio.create_task(take(events, 1))
        await poll_until(lambda: any("Subscription.read_chunk" in repr(task) for task in asyncio.all_tasks()))
        [reading] = [task for task in asyncio.all_tasks() if "Subscription.read_chunk" in repr(task)]
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

            async def are_saved() -> bool:
                return await count_saves(unstreamed_ledger.db) >= 2

            await poll_until(are_saved, "both positions were saved")
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
