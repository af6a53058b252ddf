"""The appender: positions, stream versions, conflicts and transactions over several streams."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from jobledger.ledger.domain.commands import ChangeAccess, ClaimJob, SubmitBatch, SubmitJob
from jobledger.ledger.domain.errors import InvalidEvent, LedgerBusy, VersionConflict
from jobledger.ledger.domain.events import BatchSubmitted
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.appender import Appender, EventStoreLimits
from jobledger.ledger.store.command_handler import create_batch_id, create_job_id, create_streams, handle_command
from jobledger.ledger.store.envelope import VOID_STREAM, StreamHead
from jobledger.ledger.store.pending_appends import PendingAppend
from tests.support.driver_hooks import CommandCounter, monitor_connection
from tests.support.event_examples import ACCESS, NOON, make_job_submitted
from tests.support.event_stores import FAST_GAP_LIMITS, create_append, create_progress, head_after, open_pausable_store
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    check_log,
    collect_outcomes,
    load_event_documents,
    open_ledger,
    read_all_events,
)
from tests.support.polling import DEADLINE_SECONDS


async def test_append_numbers_positions_per_log_and_versions_per_stream(unstreamed_ledger: Ledger) -> None:
    first = await unstreamed_ledger.submit_job()
    second = await unstreamed_ledger.submit_job()
    claimed = await handle_command(
        unstreamed_ledger.event_store,
        first.events[0].stream,
        ClaimJob("w1", NOON),
        meta=EVENT_METADATA,
        stream_state=first.stream_state,
    )
    events = [*first.events, *second.events, *claimed.events]
    assert [(event.position, event.version) for event in events] == [(1, 1), (2, 1), (3, 2)]
    assert await unstreamed_ledger.event_store.read() == events
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_append_returns_stored_events(unstreamed_ledger: Ledger) -> None:
    recorded = await unstreamed_ledger.event_store.append(
        create_append(make_job_submitted(), create_progress(0.5), stream="job-1")
    )
    assert recorded == await unstreamed_ledger.event_store.read_stream("job-1")
    assert [event.time for event in recorded] == [NOON, NOON]
    assert [event.meta for event in recorded] == [EVENT_METADATA, EVENT_METADATA]
    assert len({event.event_id for event in recorded}) == 2


async def test_append_without_events_reserves_no_position(unstreamed_ledger: Ledger) -> None:
    assert await unstreamed_ledger.event_store.append() == []
    assert await unstreamed_ledger.event_store.append(create_append()) == []
    assert await unstreamed_ledger.db.counters.find_one({"_id": "events"}) is None


async def test_version_conflict_reports_current_version(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.event_store.append(
        create_append(make_job_submitted(), create_progress(), create_progress(), stream="job-1")
    )
    with pytest.raises(VersionConflict) as conflict:
        await unstreamed_ledger.event_store.append(
            create_append(create_progress(), stream="job-1", head=StreamHead(version=1))
        )
    assert (conflict.value.stream, conflict.value.expected, conflict.value.found) == ("job-1", 1, 3)
    with pytest.raises(VersionConflict) as conflict:
        await unstreamed_ledger.event_store.append(
            create_append(create_progress(), create_progress(), stream="job-1", head=StreamHead(version=2))
        )
    assert (conflict.value.stream, conflict.value.expected, conflict.value.found) == ("job-1", 2, 3)


async def test_concurrent_appends_at_one_version_succeed_once(connection: Connection) -> None:
    async with (
        open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False) as one,
        open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False) as two,
    ):
        [submitted] = await one.event_store.append(create_append(make_job_submitted(), stream="job-1"))
        head = head_after(submitted)
        for _ in range(5):
            attempts = [
                event_store.append(create_append(create_progress(writer), stream="job-1", head=head))
                for writer in range(10)
                for event_store in (one.event_store, two.event_store)
            ]
            results = await asyncio.gather(*attempts, return_exceptions=True)
            winners = [result for result in results if isinstance(result, list)]
            losers = [result for result in results if isinstance(result, VersionConflict)]
            assert (len(winners), len(losers)) == (1, 19)
            assert {loser.found for loser in losers} == {head.version + 1}
            head = head_after(winners[0][0])
        await read_all_events(one.event_store)
        check_log(await load_event_documents(one.db))


async def test_many_conflicts_in_one_write_are_resolved_together(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    voided_positions: list[list[int]] = []
    void_positions = Appender.void_positions

    async def record_positions(self: Appender, positions: Iterable[int]) -> None:
        voided_positions.append(sorted(positions))
        await void_positions(self, voided_positions[-1])

    monkeypatch.setattr(Appender, "void_positions", record_positions)
    async with open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False) as ledger:
        streams = [f"job-{number}" for number in range(100)]
        for version in range(2):
            await ledger.event_store.append(
                *(
                    create_append(make_job_submitted(), stream=stream, head=StreamHead(version=version))
                    for stream in streams
                )
            )
        new_stream_results = await asyncio.gather(
            *(ledger.event_store.append(create_append(make_job_submitted(), stream=stream)) for stream in streams),
            ledger.event_store.append(create_append(make_job_submitted(), stream="job-new")),
            return_exceptions=True,
        )
        conflicts = [result for result in new_stream_results if isinstance(result, VersionConflict)]
        assert {(conflict.stream, conflict.expected, conflict.found) for conflict in conflicts} == {
            (name, 0, 2) for name in streams
        }
        assert isinstance(new_stream_results[-1], list)
        assert len(voided_positions) == 1
        assert len(voided_positions[0]) == 100
        await read_all_events(ledger.event_store)


async def test_concurrent_commands_on_one_stream_get_distinct_versions(connection: Connection) -> None:
    async with (
        open_ledger(connection, FAST_GAP_LIMITS) as one,
        open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False) as two,
    ):
        job_id = (await one.submit_job()).events[0].stream
        commands = [
            handle_command(ledger.event_store, job_id, ChangeAccess(f"user-{number}", ACCESS), meta=EVENT_METADATA)
            for number in range(8)
            for ledger in (one, two)
        ]
        handled = await asyncio.gather(*commands)
        assert sorted(result.events[0].version for result in handled) == list(range(2, 18))
        assert {result.stream_state.head.version for result in handled} == set(range(2, 18))
        check_log(await load_event_documents(one.db))


async def test_append_to_several_streams_is_atomic(unstreamed_ledger: Ledger) -> None:
    existing = (await unstreamed_ledger.submit_job()).events[0].stream
    batch_id, job_id = create_batch_id(), create_job_id()
    batch = SubmitBatch(BatchSubmitted(total_jobs=2, job_ids=[job_id, existing], user_id="alice"))
    with pytest.raises(VersionConflict, match=existing):
        await create_streams(
            unstreamed_ledger.event_store,
            [(batch_id, batch), (job_id, SubmitJob(make_job_submitted())), (existing, SubmitJob(make_job_submitted()))],
            meta=EVENT_METADATA,
        )
    assert (
        await unstreamed_ledger.event_store.read_stream(batch_id)
        == await unstreamed_ledger.event_store.read_stream(job_id)
        == []
    )
    recorded = await create_streams(
        unstreamed_ledger.event_store,
        [(batch_id, batch), (job_id, SubmitJob(make_job_submitted()))],
        meta=EVENT_METADATA,
    )
    assert [event.stream for event in recorded] == [batch_id, job_id]
    assert recorded[1].position == recorded[0].position + 1
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_positions_unused_after_conflict_are_voided_by_appender(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.event_store.append(create_append(make_job_submitted(), stream="job-1"))
    with pytest.raises(VersionConflict):
        await unstreamed_ledger.event_store.append(create_append(make_job_submitted(), stream="job-1"))
    with pytest.raises(VersionConflict):
        await unstreamed_ledger.event_store.append(
            create_append(make_job_submitted(), stream="job-2"), create_append(make_job_submitted(), stream="job-1")
        )
    voids = [
        document for document in await load_event_documents(unstreamed_ledger.db) if document["stream"] == VOID_STREAM
    ]
    assert [(void["_id"], void["version"], void["type"]) for void in voids] == [
        (position, position, "PositionVoided") for position in (2, 3, 4)
    ]


async def test_two_appends_to_one_stream_in_one_call_are_rejected(unstreamed_ledger: Ledger) -> None:
    appends = create_append(make_job_submitted(), stream="job-1"), create_append(make_job_submitted(), stream="job-1")
    with pytest.raises(ValueError, match="two appends to the stream job-1 in one call"):
        async with asyncio.timeout(DEADLINE_SECONDS):
            await unstreamed_ledger.event_store.append(*appends)
    assert await unstreamed_ledger.event_store.read_head_position() == 0


async def test_queued_single_events_get_consecutive_positions(connection: Connection) -> None:
    async with open_pausable_store(connection) as event_store:
        first_append = await event_store.append_and_pause(create_append(make_job_submitted()))
        queued_appends = [
            asyncio.create_task(event_store.append(create_append(make_job_submitted()))) for _ in range(50)
        ]
        await asyncio.sleep(0)
        event_store.may_insert.set()
        recorded = await asyncio.gather(first_append, *queued_appends)
        assert [event.position for events in recorded for event in events] == list(range(1, 52))


# Independent appends --------------------------------------------------------------------------------------------------


async def test_append_each_returns_events_or_error_of_each_append(unstreamed_ledger: Ledger) -> None:
    [existing] = await unstreamed_ledger.event_store.append(create_append(make_job_submitted(), stream="job-1"))
    outcomes = unstreamed_ledger.event_store.append_each(
        [
            create_append(make_job_submitted(), stream="job-2"),
            create_append(create_progress(), stream="job-1", head=StreamHead()),
            create_append(make_job_submitted(parameters={"number": float("nan")}), stream="job-3"),
            create_append(make_job_submitted(), create_progress(), stream="job-4"),
            create_append(create_progress(), stream="job-5"),
        ]
    )
    results = await collect_outcomes(outcomes)
    stored, conflict, invalid, several, last = results
    assert isinstance(conflict, VersionConflict)
    assert (conflict.stream, conflict.found) == ("job-1", 1)
    assert isinstance(invalid, InvalidEvent)
    for name, result in (("job-1", [existing]), ("job-2", stored), ("job-3", []), ("job-4", several), ("job-5", last)):
        assert await unstreamed_ledger.event_store.read_stream(name) == result
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_append_each_writes_appends_with_one_insert(connection: Connection) -> None:
    commands = CommandCounter()
    async with open_ledger(monitor_connection(connection, commands)) as ledger:
        commands.started_by_name.clear()
        appends = [create_append(make_job_submitted()) for _ in range(50)]
        results = await collect_outcomes(ledger.event_store.append_each(appends))
        assert all(isinstance(result, list) for result in results)
        assert commands.started_by_name["insert"] == 1


async def test_append_each_reports_full_queue_for_each_append(connection: Connection) -> None:
    limits = EventStoreLimits(max_pending_events=2)
    async with open_ledger(connection, limits=limits) as ledger:
        appends = [create_append(make_job_submitted()) for _ in range(4)]
        results = await collect_outcomes(ledger.event_store.append_each(appends))
        assert [type(result) for result in results] == [list, list, LedgerBusy, LedgerBusy]


async def test_cancelled_append_each_is_written(unstreamed_ledger: Ledger) -> None:
    outcomes = unstreamed_ledger.event_store.append_each([create_append(make_job_submitted(), stream="job-1")])
    appending = asyncio.create_task(collect_outcomes(outcomes))
    await asyncio.sleep(0)
    appending.cancel()
    await asyncio.wait({appending})
    await unstreamed_ledger.event_store.aclose()
    assert len(await unstreamed_ledger.event_store.read_stream("job-1")) == 1


async def test_append_each_returns_events_before_slower_appends_are_done(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One append of several events is a transaction, and a write of its own."""
    may_insert, insert_in_transaction = asyncio.Event(), Appender._insert_in_transaction

    async def insert_later(appender: Appender, append: PendingAppend) -> bool:
        await may_insert.wait()
        return await insert_in_transaction(appender, append)

    monkeypatch.setattr(Appender, "_insert_in_transaction", insert_later)
    async with asyncio.timeout(DEADLINE_SECONDS), open_ledger(connection) as ledger:
        appends = [
            create_append(make_job_submitted(), create_progress(), stream="job-1"),
            create_append(make_job_submitted(), stream="job-2"),
        ]
        parts = []
        async for part in ledger.event_store.append_each(appends):
            parts.append([index for index, _ in part])
            may_insert.set()
    assert parts == [[1], [0]]
