"""The event store: reads, gaps in positions, and resynchronization with the change stream."""

from __future__ import annotations

import asyncio

import pytest

from jobledger.ledger.domain.events import (
    PositionVoided,
)
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventStore
from tests.support.event_examples import make_job_submitted
from tests.support.event_stores import (
    create_append,
    create_progress,
    open_pausable_store,
)
from tests.support.ledger_setup import (
    Ledger,
    check_log,
    create_position_gap,
    event_positions,
    load_event_documents,
    open_ledger,
    read_first_events,
)
from tests.support.polling import DEADLINE_SECONDS, poll_until


async def test_may_have_reached_is_true_up_to_head(unstreamed_ledger: Ledger) -> None:
    assert not await unstreamed_ledger.event_store.may_have_reached(1)
    await unstreamed_ledger.event_store.append(create_append(make_job_submitted(), create_progress(), stream="job-1"))
    await unstreamed_ledger.db.events.insert_one({"_id": "z", "stream": "none", "version": 1})
    assert [await unstreamed_ledger.event_store.may_have_reached(position) for position in range(4)] == [
        True,
        True,
        True,
        False,
    ]


async def test_read_voids_position_gap(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.submit_job()
    gap = await create_position_gap(unstreamed_ledger.db, 3)
    await unstreamed_ledger.submit_job()
    assert await unstreamed_ledger.event_store.read(limit=10) != []
    events = await unstreamed_ledger.event_store.read(after=1)
    assert event_positions(events) == [2, 3, 4, 5]
    assert [type(event.event) for event in events[:3]] == [PositionVoided] * 3
    assert gap == 2
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_gap_at_end_of_log_is_ignored(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.submit_job()
    await create_position_gap(unstreamed_ledger.db)
    assert event_positions(await unstreamed_ledger.event_store.read()) == [1]
    assert await unstreamed_ledger.event_store.read(after=1) == []
    assert await unstreamed_ledger.event_store.read_head_position() == 1


async def test_read_returns_pages(connection: Connection) -> None:
    async with open_ledger(connection, EventStoreLimits(page_events=4), with_change_stream=False) as ledger:
        recorded = await ledger.event_store.append(create_append(*[create_progress()] * 10, stream="job-1"))
        assert event_positions(await ledger.event_store.read()) == [1, 2, 3, 4]
        assert event_positions(await ledger.event_store.read(after=8)) == [9, 10]
        assert event_positions(await ledger.event_store.read(after=2, limit=6)) == [3, 4, 5, 6, 7, 8]
        assert await ledger.event_store.read(after=10) == await ledger.event_store.read(after=4711) == []
        assert await ledger.event_store.read_stream("job-1", after_version=7) == recorded[7:]
        assert await ledger.event_store.read_stream("job-2") == []


async def test_gap_before_old_event_is_voided_at_once(connection: Connection) -> None:
    async with open_ledger(connection, EventStoreLimits(gap_timeout_seconds=60), with_change_stream=False) as ledger:
        await create_position_gap(ledger.db)
        await ledger.event_store.append(create_append(make_job_submitted()))  # its time is last year
        async with asyncio.timeout(DEADLINE_SECONDS):  # far less than the gap timeout
            assert event_positions(await ledger.event_store.read()) == [1, 2]


async def test_gap_before_recent_event_waits_for_appender(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    gap_timeout = 3600.0
    async with (
        open_ledger(connection, EventStoreLimits(gap_timeout_seconds=gap_timeout), with_change_stream=False) as ledger,
        open_pausable_store(connection) as slow_store,
    ):
        slow_append = await slow_store.append_and_pause(create_append(make_job_submitted(), stream="job-late"))
        later_job = await ledger.submit_job()
        sleep = asyncio.sleep

        async def insert_during_gap_timeout(seconds: float) -> None:
            if seconds == gap_timeout:
                slow_store.may_insert.set()
                await asyncio.wait({slow_append})
            else:
                await sleep(seconds)

        monkeypatch.setattr(asyncio, "sleep", insert_during_gap_timeout)
        events = await ledger.event_store.read()
        assert [event.stream for event in events] == ["job-late", later_job.events[0].stream]
        await slow_append


async def test_resync_reads_missed_events_without_duplicates(
    unstreamed_ledger: Ledger,
) -> None:
    """The store as a listener of a change stream that delivers position 4, is closed, and reopens at position 6."""
    async with unstreamed_ledger.db.client.start_session() as session:
        for _ in range(3):
            await unstreamed_ledger.submit_job()
        await unstreamed_ledger.event_store.resync(session)
        for _ in range(3):
            await unstreamed_ledger.submit_job()
        fourth, fifth, sixth = (await load_event_documents(unstreamed_ledger.db))[3:]
        deliver_change(unstreamed_ledger.event_store, fourth)
        assert event_positions(await read_first_events(unstreamed_ledger.event_store, 1, after=3)) == [4]
        await unstreamed_ledger.event_store.resync(session)
        for document in (fifth, sixth):  # the stream begins with changes that were already read
            deliver_change(unstreamed_ledger.event_store, document)
        for after in range(6):
            assert event_positions(
                await read_first_events(unstreamed_ledger.event_store, 6 - after, after=after)
            ) == list(range(after + 1, 7))
        await unstreamed_ledger.submit_job()
        deliver_change(unstreamed_ledger.event_store, (await load_event_documents(unstreamed_ledger.db))[6])
        for after in range(7):
            assert event_positions(
                await read_first_events(unstreamed_ledger.event_store, 7 - after, after=after)
            ) == list(range(after + 1, 8))
        gap = await create_position_gap(unstreamed_ledger.db)
        await unstreamed_ledger.submit_job()
        deliver_change(unstreamed_ledger.event_store, (await load_event_documents(unstreamed_ledger.db))[7])
        voided = {"_id": gap, "stream": VOID_STREAM}
        await poll_until(lambda: load_event_documents(unstreamed_ledger.db, voided), "the position is voided")


def deliver_change(event_store: EventStore, document: Document) -> None:
    event_store.on_change({"operationType": "insert", "fullDocument": document})
