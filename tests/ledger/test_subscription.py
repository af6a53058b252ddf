"""Subscriptions: history and live events, bounded chunks, cancellation, gaps and broken connections."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack, suppress
from itertools import cycle
from typing import Any

import pytest
from bson import ObjectId

from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.events import JobClaimed, JobSubmitted, RecordedEvent
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.appender import Appender, EventStoreLimits
from jobledger.ledger.store.command_handler import handle_command
from tests.support.decider_spec import type_name
from tests.support.event_examples import NOON, make_job_submitted
from tests.support.event_stores import FAST_GAP_LIMITS, create_append, create_progress, kill_change_stream
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    check_log,
    create_position_gap,
    event_positions,
    load_event_documents,
    open_ledger,
    read_first_events,
    take_events,
)
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.tcp_proxy import TcpProxy


async def test_subscription_switches_from_history_to_live_without_gaps(connection: Connection) -> None:
    async with AsyncExitStack() as stack:
        reader = await stack.enter_async_context(open_ledger(connection, FAST_GAP_LIMITS))
        writers = [
            await stack.enter_async_context(open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False))
            for _ in range(3)
        ]

        async def write(ledger: Ledger) -> None:
            for number in range(40):
                if number % 5:
                    await ledger.submit_job()
                else:
                    await ledger.event_store.append(create_append(*[create_progress()] * 3))

        writing = [asyncio.create_task(write(ledger)) for ledger in writers]
        total = 3 * (32 + 8 * 3)
        reading = []
        for after in (0, 1, 10, 50, 100):
            async with reader.event_store.subscribe(after=0) as events:
                await take_events(events, max(after, 1))
            reading.append(asyncio.create_task(read_first_events(reader.event_store, total - after, after=after)))
        await asyncio.gather(*writing)
        received = await asyncio.gather(*reading)
        assert event_positions(received[0]) == list(range(1, total + 1))
        assert [event_positions(events) for events in received] == [
            list(range(after + 1, total + 1)) for after in (0, 1, 10, 50, 100)
        ]
        assert received[0] == await reader.event_store.read(limit=total)


async def test_waiting_subscriber_receives_new_event(ledger: Ledger) -> None:
    async with ledger.event_store.subscribe(after=0) as events:
        taking = asyncio.create_task(take_events(events, 1))
        submitted = await ledger.submit_job()
        assert await taking == submitted.events
        assert events.position == 1


async def test_subscription_after_future_position_waits(ledger: Ledger) -> None:
    async with ledger.event_store.subscribe(after=3) as events:
        taking = asyncio.create_task(take_events(events, 1))
        for _ in range(4):
            await ledger.submit_job()
        assert event_positions(await taking) == [4]


async def test_slow_subscriber_reads_missed_events_from_collection(connection: Connection) -> None:
    async with (
        open_ledger(connection, EventStoreLimits(max_tail_events=10, page_events=7)) as ledger,
        ledger.event_store.subscribe(after=0) as slow_events,
        ledger.event_store.subscribe(after=0) as fast_events,
    ):
        await ledger.submit_job()
        assert event_positions(await take_events(slow_events, 1)) == [1]
        for _ in range(4):
            await ledger.event_store.append(create_append(*[create_progress()] * 15))
        await take_events(fast_events, 61)
        chunk = await slow_events.read_chunk(5)
        assert event_positions(chunk) == [2, 3, 4, 5, 6]
        assert event_positions(await take_events(slow_events, 55)) == list(range(7, 62))
        later = asyncio.gather(take_events(slow_events, 1), take_events(fast_events, 1))
        await ledger.submit_job()
        assert [event_positions(events) for events in await later] == [[62], [62]]


async def test_chunks_of_large_events_fit_one_server_reply(connection: Connection) -> None:
    large = make_job_submitted(parameters={"text": "x" * 1_000_000})
    async with (
        open_ledger(connection, EventStoreLimits(max_tail_bytes=5_000_000)) as ledger,
        ledger.event_store.subscribe(after=0) as slow_events,
    ):
        for _ in range(40):
            await ledger.event_store.append(create_append(large))
        await read_first_events(ledger.event_store, 1, after=39)  # the change stream has delivered them all
        pages = []
        async with asyncio.timeout(DEADLINE_SECONDS):
            while slow_events.position < 40:
                pages.append(event_positions(await slow_events.read_chunk()))
        assert [position for page in pages for position in page] == list(range(1, 41))
        assert max(len(page) for page in pages) <= 16  # the server puts at most 16 MB into one reply


@pytest.mark.parametrize("tail_bytes", [1, 100_000_000], ids=["from history", "from the live tail"])
async def test_chunk_bytes_bounds_chunks_and_disables_read_ahead(connection: Connection, tail_bytes: int) -> None:
    jobs = [
        make_job_submitted(parameters={"text": "x" * size})
        for size in [10] * 60 + [100_000] * 30 + [10] * 5 + [3_000_000, 10]
    ]
    async with open_ledger(connection, EventStoreLimits(max_tail_bytes=tail_bytes)) as ledger:
        await ledger.event_store.append(*[create_append(job) for job in jobs])
        await read_first_events(ledger.event_store, 1, after=len(jobs) - 1)
        async with ledger.event_store.subscribe(after=0, chunk_bytes=1_000_000) as slow_events:
            positions: list[int] = []
            async with asyncio.timeout(DEADLINE_SECONDS):
                while slow_events.position < len(jobs):
                    chunk = await slow_events.read_chunk(500)
                    sizes = [len(event.data["parameters"]["text"]) for event in chunk]
                    assert sum(sizes) < 1_000_000 or len(sizes) == 1
                    assert slow_events._ahead is None
                    positions += event_positions(chunk)
        assert positions == list(range(1, len(jobs) + 1))


@pytest.mark.parametrize(
    "bound", [{"max_tail_events": 20}, {"max_tail_bytes": 20_000}], ids=["limit of events", "limit of bytes"]
)
async def test_events_held_behind_gap_are_bounded(connection: Connection, bound: dict[str, int]) -> None:
    """A transaction of a dead appender can keep a gap open for a minute while thousands of events are appended."""
    job = make_job_submitted(parameters={"text": "x" * 1000})
    limits = EventStoreLimits(gap_timeout_seconds=0.5, **bound)
    async with open_ledger(connection, limits) as ledger, ledger.event_store.subscribe(after=0) as events:
        await ledger.submit_job(job)
        assert event_positions(await take_events(events, 1)) == [1]
        taking = asyncio.create_task(take_events(events, 101))
        assert await create_position_gap(ledger.db) == 2
        tail, max_held = ledger.event_store._tail, 0
        for _ in range(100):
            await ledger.submit_job(job)
            max_held = max(max_held, len(tail._out_of_order))
        assert 0 < max_held <= 20
        assert event_positions(await taking) == list(range(2, 103))
        check_log(await load_event_documents(ledger.db))


@pytest.mark.parametrize("removed_positions", [[3], [2, 3], [2], [1, 2, 3]], ids=str)
async def test_subscription_skips_removed_events(ledger: Ledger, removed_positions: list[int]) -> None:
    for _ in range(3):
        await ledger.submit_job()
    await read_first_events(ledger.event_store, 3)
    ledger.event_store.may_have_lost_events = False
    await ledger.db.events.delete_many({"_id": {"$in": removed_positions}})
    await poll_until(lambda: ledger.event_store.may_have_lost_events)
    await ledger.submit_job()
    events = await read_first_events(ledger.event_store, 4)
    assert [(event.position, event.type) for event in events] == [
        (document["_id"], document["type"]) for document in await load_event_documents(ledger.db)
    ]
    assert [event.position for event in events if event.type == "PositionVoided"] == removed_positions


@pytest.mark.parametrize("document_id", [ObjectId(), "12", True], ids=type_name)
async def test_documents_that_are_no_events_are_ignored(connection: Connection, document_id: Any) -> None:
    """Another program may have inserted a document by mistake. `log verify` reports it."""
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger, ledger.event_store.subscribe(after=0) as events:
        await ledger.submit_job()
        await ledger.db.events.insert_one({"_id": document_id, "note": "hello", "stream": "x"})
        await ledger.submit_job()
        assert event_positions(await take_events(events, 2)) == [1, 2]
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger:
        await ledger.submit_job()
        assert await ledger.event_store.read_head_position() == 3
        assert event_positions(await read_first_events(ledger.event_store, 2)) == [1, 2]


async def test_chunk_has_at_most_limit_events(ledger: Ledger) -> None:
    await ledger.event_store.append(create_append(*[create_progress()] * 25))
    async with ledger.event_store.subscribe(after=0) as events, asyncio.timeout(DEADLINE_SECONDS):
        sizes = []
        while events.position < 25:
            sizes.append(len(await events.read_chunk(10)))
    assert max(sizes) <= 10
    assert sum(sizes) == 25


async def test_types_filter_events_and_position_advances(ledger: Ledger) -> None:
    async with ledger.event_store.subscribe(after=0, types=[JobClaimed]) as events:
        taking = asyncio.create_task(events.read_chunk())
        for _ in range(3):
            await ledger.submit_job()
        submitted = await ledger.submit_job()
        job_id = submitted.events[0].stream
        claimed = await handle_command(
            ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=submitted.stream_state
        )
        assert await asyncio.wait_for(taking, DEADLINE_SECONDS) == claimed.events
        assert events.position == 5
    async with ledger.event_store.subscribe(after=0, types=[JobSubmitted]) as history:
        assert event_positions(await take_events(history, 4)) == [1, 2, 3, 4]


async def test_cancelled_wait_keeps_all_subscriptions_intact(ledger: Ledger) -> None:
    async with ledger.event_store.subscribe(after=0) as events, ledger.event_store.subscribe(after=0) as other_events:
        for _ in range(3):
            taking = asyncio.create_task(events.read_chunk())
            await asyncio.sleep(0)
            taking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await taking
            submitted = await ledger.submit_job()
            assert await take_events(other_events, 1) == await take_events(events, 1) == submitted.events


async def test_cancellation_during_read_ahead_keeps_position(connection: Connection) -> None:
    async with open_ledger(connection, EventStoreLimits(max_tail_events=1)) as ledger:
        await ledger.event_store.append(create_append(*[create_progress()] * 60))
        await read_first_events(ledger.event_store, 1, after=59)
        async with ledger.event_store.subscribe(after=0) as events, asyncio.timeout(DEADLINE_SECONDS):
            received: list[RecordedEvent] = []
            cancelled = 0
            while len(received) < 60:
                taking = asyncio.create_task(events.read_chunk(4))
                while not taking.done() and (events._ahead is None or events._ahead[0] == events.position):  # noqa: ASYNC110 - takes one iteration of the event loop
                    await asyncio.sleep(0)
                taking.cancel()
                with suppress(asyncio.CancelledError):
                    received += await taking
                cancelled += taking.cancelled()
                if len(received) < 60:
                    received += await events.read_chunk(4)
        assert event_positions(received) == list(range(1, 61))
        assert cancelled > 0


async def test_cancellation_while_reading_history_loses_nothing(connection: Connection) -> None:
    pauses = cycle([0, 0.0005, 0.001, 0.002, 0.005, 0.1])
    received: list[RecordedEvent] = []
    cancelled = 0
    async with (
        open_ledger(connection, EventStoreLimits(max_tail_events=10)) as ledger,
        asyncio.timeout(DEADLINE_SECONDS),
    ):
        await ledger.event_store.append(create_append(*[create_progress()] * 500))
        await read_first_events(ledger.event_store, 500)
        async with ledger.event_store.subscribe(after=0) as events:
            while events.position < 500:
                reading = asyncio.create_task(events.read_chunk(15))
                await asyncio.wait({reading}, timeout=next(pauses))
                reading.cancel()
                await asyncio.wait({reading})
                cancelled += reading.cancelled()
                if not reading.cancelled():
                    received += reading.result()
    assert event_positions(received) == list(range(1, 501))
    assert cancelled


@pytest.mark.parametrize("kill_command", ["killCursors", "killOp"])
async def test_killed_change_stream_is_reopened_without_loss(ledger: Ledger, kill_command: str) -> None:
    async with ledger.event_store.subscribe(after=0) as events:
        for round_ in range(3):
            await ledger.submit_job()
            await take_events(events, 1)
            await kill_change_stream(ledger.db, kill_command)
            gap = await create_position_gap(ledger.db)
            submitted = await asyncio.gather(*(ledger.submit_job() for _ in range(5)))
            expected = {gap} | {result.events[0].position for result in submitted}
            assert set(event_positions(await take_events(events, 6))) == expected
            assert events.position == (round_ + 1) * 7


async def test_broken_connection_does_not_lose_events(mongodb_uri: str, db_name: str) -> None:
    direct = Connection(mongodb_uri, db_name)
    with TcpProxy(mongodb_uri) as proxy:
        async with (
            open_ledger(direct, FAST_GAP_LIMITS, with_change_stream=False) as writer,
            open_ledger(Connection(proxy.uri, db_name), FAST_GAP_LIMITS) as reader,
            reader.event_store.subscribe(after=0) as events,
        ):
            for _ in range(3):
                await writer.submit_job()
                await take_events(events, 1)
                proxy.close_connections()
                await create_position_gap(writer.db)
                await writer.submit_job()
                assert [event.type for event in await take_events(events, 2)] == ["PositionVoided", "JobSubmitted"]


async def test_aclose_during_gap_filling_leaves_no_task(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap_filling = asyncio.Event()

    async def block_forever(_appender: Appender, _positions: Iterable[int]) -> None:
        gap_filling.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Appender, "void_positions", block_forever)
    async with open_ledger(connection, EventStoreLimits(gap_timeout_seconds=0.05)) as ledger:
        await create_position_gap(ledger.db)
        await ledger.submit_job()
        await asyncio.wait_for(gap_filling.wait(), DEADLINE_SECONDS)
        await ledger.event_store.aclose()
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert "fill-gaps" not in names
        gap_timer = ledger.event_store._gap_filler._timer
        assert gap_timer is None or gap_timer.cancelled()  # so no task starts later


@pytest.fixture
async def short_transactions(connection: Connection) -> AsyncIterator[None]:
    """Let the server abort open transactions after one second instead of a minute."""
    async with connection.create_client() as client:
        before = await client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        await client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": 1})
        yield
        seconds = before["transactionLifetimeLimitSeconds"]
        await client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": seconds})


@pytest.mark.usefixtures("short_transactions")
async def test_open_transaction_of_killed_appender_delays_readers_briefly(
    connection: Connection,
) -> None:
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger, connection.create_client() as killed_client:
        gap = await create_position_gap(ledger.db)
        session = killed_client.start_session()
        await session.start_transaction()
        document = {"_id": gap, "stream": "job-dead", "version": 1}
        await killed_client[connection.db_name].events.insert_one(document, session=session)
        await ledger.submit_job()
        assert [event.type for event in await read_first_events(ledger.event_store, 2)] == [
            "PositionVoided",
            "JobSubmitted",
        ]
        check_log(await load_event_documents(ledger.db))
