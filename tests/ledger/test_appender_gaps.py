"""The appender: gaps, late inserts and a stale counter."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
from pymongo.errors import AutoReconnect

from jobledger.ledger.domain.errors import VersionConflict
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.appender import Appender, EventStoreLimits
from jobledger.ledger.store.envelope import VOID_STREAM
from tests.support.event_examples import make_job_submitted
from tests.support.event_stores import (
    FAST_GAP_LIMITS,
    ConnectionLossAppender,
    ConnectionLossEventStore,
    create_append,
    create_progress,
    head_after,
    open_pausable_store,
)
from tests.support.ledger_setup import (
    Ledger,
    check_log,
    create_position_gap,
    event_positions,
    load_event_documents,
    open_ledger,
    read_all_events,
    read_first_events,
    take_events,
)
from tests.support.polling import DEADLINE_SECONDS, poll_until


async def test_subscribers_of_all_processes_see_same_order_with_gaps(connection: Connection) -> None:
    async with AsyncExitStack() as stack:
        ledgers = [await stack.enter_async_context(open_ledger(connection, FAST_GAP_LIMITS)) for _ in range(3)]
        reading = [
            asyncio.create_task(read_first_events(ledger.event_store, 30 - after, after=after))
            for ledger in ledgers
            for after in (0, 0, 7)
        ]
        for number in range(10):
            await create_position_gap(ledgers[0].db, number % 3)
            await ledgers[number % 3].submit_job()
        await ledgers[0].event_store.append(create_append(*[create_progress()] * 30))
        received = await asyncio.gather(*reading)
        all_events = next(events for events in received if len(events) == 30)
        assert all(events == all_events[-len(events) :] for events in received)
        assert event_positions(all_events) == list(range(1, 31))
        assert sum(event.stream == VOID_STREAM for event in all_events) == 9
        check_log(await load_event_documents(ledgers[0].db))


@pytest.mark.parametrize("event_count", [1, 3], ids=["single event", "transaction"])
async def test_append_after_void_gets_later_position_once(connection: Connection, event_count: int) -> None:
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger, open_pausable_store(connection) as slow_store:
        slow_append = await slow_store.append_and_pause(
            create_append(*[create_progress()] * event_count, stream="job-late")
        )
        later_job = await ledger.submit_job()
        assert later_job.events[0].position == event_count + 1
        before = await read_first_events(ledger.event_store, event_count + 1)
        assert [event.stream for event in before] == [VOID_STREAM] * event_count + [later_job.events[0].stream]
        slow_store.may_insert.set()
        recorded = await asyncio.wait_for(slow_append, DEADLINE_SECONDS)
        assert event_positions(recorded) == [event_count + 1 + number for number in range(1, event_count + 1)]
        assert await ledger.event_store.read_stream("job-late") == recorded
        assert await read_first_events(ledger.event_store, 2 * event_count + 1) == before + recorded
        check_log(await load_event_documents(ledger.db))


async def test_append_after_void_can_still_conflict(connection: Connection) -> None:
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger, open_pausable_store(connection) as slow_store:
        slow_append = await slow_store.append_and_pause(create_append(create_progress(), stream="job-1"))
        await ledger.event_store.append(create_append(make_job_submitted(), stream="job-1"))
        await read_first_events(ledger.event_store, 2)
        slow_store.may_insert.set()
        with pytest.raises(VersionConflict) as conflict:
            await asyncio.wait_for(slow_append, DEADLINE_SECONDS)
        assert conflict.value.found == 1
        check_log(await load_event_documents(ledger.db))


async def test_append_within_gap_timeout_keeps_position(connection: Connection) -> None:
    limits = EventStoreLimits(gap_timeout_seconds=DEADLINE_SECONDS)
    async with open_ledger(connection, limits) as ledger, open_pausable_store(connection, limits) as slow_store:
        async with ledger.event_store.subscribe(after=0) as events:
            slow_append = await slow_store.append_and_pause(create_append(make_job_submitted(), stream="job-late"))
            later_job = await ledger.submit_job()
            slow_store.may_insert.set()
            assert [event.stream for event in await take_events(events, 2)] == [
                "job-late",
                later_job.events[0].stream,
            ]
        assert (await slow_append)[0].position == 1


async def test_closed_gap_does_not_shorten_timeout_of_later_gap(connection: Connection) -> None:
    limits = EventStoreLimits(gap_timeout_seconds=DEADLINE_SECONDS)
    async with (
        open_ledger(connection, limits) as ledger,
        open_pausable_store(connection) as slow_store,
        ledger.event_store.subscribe(after=0) as events,
    ):
        tail = ledger.event_store._tail
        slow_append = await slow_store.append_and_pause(create_append(make_job_submitted()))
        await ledger.submit_job()
        await poll_until(lambda: tail.newest_out_of_order == 2)
        first_timer = ledger.event_store._gap_filler._timer
        assert first_timer is not None
        slow_store.may_insert.set()
        await take_events(events, 2)
        await slow_append
        slow_append = await slow_store.append_and_pause(create_append(make_job_submitted(), stream="job-late"))
        await ledger.submit_job()
        await poll_until(lambda: tail.newest_out_of_order == 4)
        assert ledger.event_store._gap_filler._timer is first_timer
        first_timer.cancel()
        ledger.event_store._gap_filler._start_filling(2)  # the timeout of the first gap ends now
        second_timer = ledger.event_store._gap_filler._timer
        assert second_timer is not first_timer
        assert second_timer is not None
        assert second_timer.when() - asyncio.get_running_loop().time() > DEADLINE_SECONDS / 2
        assert "fill-gaps" not in {task.get_name() for task in asyncio.all_tasks()}
        slow_store.may_insert.set()
        assert (await take_events(events, 1))[0].stream == "job-late"
        await slow_append


@pytest.mark.parametrize("event_count", [1, 3], ids=["single event", "transaction"])
async def test_repeated_insert_detects_earlier_success(connection: Connection, event_count: int) -> None:
    async with open_ledger(
        connection, FAST_GAP_LIMITS, with_change_stream=False, store_class=ConnectionLossEventStore
    ) as ledger:
        recorded = await ledger.event_store.append(create_append(*[create_progress()] * event_count, stream="job-1"))
        assert event_positions(recorded) == list(range(1, event_count + 1))
        assert await ledger.event_store.read() == recorded
        check_log(await load_event_documents(ledger.db))


async def test_partly_inserted_write_is_completed(connection: Connection) -> None:
    async with open_ledger(
        connection, FAST_GAP_LIMITS, with_change_stream=False, store_class=ConnectionLossEventStore
    ) as ledger:
        assert isinstance(ledger.event_store, ConnectionLossEventStore)
        ledger.event_store.lose_connection_after(2)
        results = await asyncio.gather(
            *(ledger.event_store.append(create_append(make_job_submitted())) for _ in range(5))
        )
        assert sorted(event.position for events in results for event in events) == [1, 2, 3, 4, 5]
        assert await ledger.event_store.read() == sorted(
            (event for events in results for event in events), key=lambda event: event.position
        )
        check_log(await load_event_documents(ledger.db))


async def test_unconfirmed_insert_is_detected_at_earlier_position(connection: Connection) -> None:
    """The reply was lost, and after a failover the appender reserved new positions before it repeated the insert."""

    class ReassigningAppender(ConnectionLossAppender):
        async def _insert(self, todo: Sequence[Any]) -> list[Any]:
            try:
                return await super()._insert(todo)
            except AutoReconnect:
                await self._assign_positions(todo)
                raise

    class ReassigningEventStore(ConnectionLossEventStore):
        appender_class = ReassigningAppender

    async with open_ledger(
        connection, FAST_GAP_LIMITS, with_change_stream=False, store_class=ReassigningEventStore
    ) as ledger:
        [recorded] = await ledger.event_store.append(create_append(make_job_submitted()))
        assert recorded.position == 1
        assert [event.stream for event in await ledger.event_store.read()] == [recorded.stream, VOID_STREAM]
        check_log(await load_event_documents(ledger.db))


@pytest.mark.parametrize("counter_value", [None, 0, 3, 9], ids=["deleted", "at 0", "in the middle", "one behind"])
async def test_append_with_stale_counter_gets_position_after_its_basis(
    unstreamed_ledger: Ledger, counter_value: int | None
) -> None:
    heads = [head_after((await unstreamed_ledger.submit_job()).events[0]) for _ in range(10)]
    streams = [event.stream for event in await unstreamed_ledger.event_store.read()]
    await unstreamed_ledger.db.counters.delete_one({"_id": "events"})
    if counter_value is not None:
        await unstreamed_ledger.db.counters.insert_one({"_id": "events", "next": counter_value})
    [later] = await unstreamed_ledger.event_store.append(
        create_append(create_progress(), stream=streams[9], head=heads[9])
    )
    assert later.position > 10
    [unrelated] = await unstreamed_ledger.event_store.append(create_append(make_job_submitted()))
    assert unrelated.position == later.position + 1
    two = await unstreamed_ledger.event_store.append(
        create_append(create_progress(), create_progress(), stream=streams[4], head=heads[4])
    )
    assert event_positions(two) == [unrelated.position + 1, unrelated.position + 2]
    check_log(await load_event_documents(unstreamed_ledger.db))


@pytest.mark.parametrize("event_count", [1, 2], ids=["single event", "transaction"])
async def test_free_position_before_basis_is_not_used(unstreamed_ledger: Ledger, event_count: int) -> None:
    await unstreamed_ledger.submit_job()
    await create_position_gap(unstreamed_ledger.db, 3)
    [before] = await unstreamed_ledger.event_store.append(create_append(make_job_submitted(), stream="job-1"))
    assert before.position == 5
    await unstreamed_ledger.db.counters.update_one({"_id": "events"}, {"$set": {"next": 1}})
    after = await unstreamed_ledger.event_store.append(
        create_append(*[create_progress()] * event_count, stream="job-1", head=head_after(before))
    )
    assert event_positions(after) == [5 + number for number in range(1, event_count + 1)]
    await read_all_events(unstreamed_ledger.event_store)
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_counter_far_behind_is_raised_in_one_step(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * 3000))
    await unstreamed_ledger.db.counters.delete_one({"_id": "events"})
    reservations: list[int] = []
    reserve_positions = Appender.reserve_positions

    async def record_reservation(self: Appender, event_count: int) -> int:
        reservations.append(event_count)
        return await reserve_positions(self, event_count)

    monkeypatch.setattr(Appender, "reserve_positions", record_reservation)
    [recorded] = await unstreamed_ledger.event_store.append(create_append(make_job_submitted()))
    assert recorded.position == 3001
    assert reservations == [1, 1]


@pytest.mark.parametrize("event_count", [1, 3], ids=["single event", "transaction"])
async def test_new_stream_with_stale_counter_gets_free_position(unstreamed_ledger: Ledger, event_count: int) -> None:
    for _ in range(10):
        await unstreamed_ledger.submit_job()
    await unstreamed_ledger.db.counters.update_one({"_id": "events"}, {"$set": {"next": 4}})
    recorded = await unstreamed_ledger.event_store.append(create_append(*[create_progress()] * event_count))
    assert recorded[0].position > 10
    await unstreamed_ledger.event_store.read()
    check_log(await load_event_documents(unstreamed_ledger.db))
