"""The appender: positions, group commits, conflicts, limits, gaps and retries."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Sequence
from contextlib import AsyncExitStack
from enum import Enum
from typing import Any
from uuid import UUID

import pytest
from pymongo.errors import AutoReconnect

from jobledger.ledger.domain import canonical_json
from jobledger.ledger.domain.commands import ChangeAccess, ClaimJob, SubmitBatch, SubmitJob
from jobledger.ledger.domain.errors import InvalidEvent, LedgerBusy, LedgerUnavailable, VersionConflict
from jobledger.ledger.domain.events import (
    BatchSubmitted,
)
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.appender import Appender, EventStoreLimits
from jobledger.ledger.store.command_handler import create_streams, handle_command, new_batch_id, new_job_id
from jobledger.ledger.store.envelope import MAX_EVENT_BYTES, VOID_STREAM, StreamHead
from tests.support.event_examples import ACCESS, NOON, make_job_submitted
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
    DEADLINE_SECONDS,
    EVENT_METADATA,
    Ledger,
    check_log,
    create_position_gap,
    event_positions,
    load_event_documents,
    open_ledger,
    poll_until,
    read_all_events,
    read_first_events,
    take_events,
)
from tests.support.tcp_proxy import TcpProxy


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
    batch_id, job_id = new_batch_id(), new_job_id()
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


async def test_two_appends_to_one_stream_in_one_call_conflict(unstreamed_ledger: Ledger) -> None:
    appends = create_append(make_job_submitted(), stream="job-1"), create_append(make_job_submitted(), stream="job-1")
    with pytest.raises(VersionConflict, match="job-1 is at version 1, not 0"):
        async with asyncio.timeout(5):
            await unstreamed_ledger.event_store.append(*appends)
    assert await unstreamed_ledger.event_store.head_position() == 0


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


# Errors and limits ------------------------------------------------------------------------------------------------


class Color(Enum):
    RED = "red"


INVALID_VALUES: dict[str, Any] = {
    "NaN": float("nan"),
    "lone surrogate": "\ud800",
    "operator": {"$set": 1},
    "huge integer": 2**64,
    "UUID": UUID(int=1),
    "enum": Color.RED,
    "too large": "x" * (MAX_EVENT_BYTES + 1),
    "too large in BSON only": [0] * 1_500_000,
}


@pytest.mark.parametrize("invalid_value", INVALID_VALUES.values(), ids=INVALID_VALUES.keys())
async def test_invalid_event_does_not_fail_other_appends(unstreamed_ledger: Ledger, invalid_value: Any) -> None:
    valid_appends = [unstreamed_ledger.event_store.append(create_append(make_job_submitted())) for _ in range(3)]
    results = await asyncio.wait_for(
        asyncio.gather(
            *valid_appends,
            unstreamed_ledger.event_store.append(create_append(make_job_submitted(parameters={"bad": invalid_value}))),
            unstreamed_ledger.event_store.append(
                create_append(make_job_submitted(), make_job_submitted(parameters={"bad": invalid_value}))
            ),
            unstreamed_ledger.event_store.append(create_append(make_job_submitted())),
            return_exceptions=True,
        ),
        DEADLINE_SECONDS,
    )
    assert [type(result) for result in results] == [list, list, list, InvalidEvent, InvalidEvent, list]
    await unstreamed_ledger.event_store.append(create_append(make_job_submitted()))
    assert len([event for event in await unstreamed_ledger.event_store.read() if event.stream != VOID_STREAM]) == 5
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_cancelled_append_does_not_cancel_write(connection: Connection) -> None:
    async with open_pausable_store(connection) as event_store:
        first_append = await event_store.append_and_pause(create_append(make_job_submitted(), stream="job-1"))
        cancelled_append = asyncio.create_task(event_store.append(create_append(make_job_submitted(), stream="job-2")))
        remaining_append = asyncio.create_task(event_store.append(create_append(make_job_submitted(), stream="job-3")))
        await asyncio.sleep(0)
        first_append.cancel()
        cancelled_append.cancel()
        event_store.may_insert.set()
        [recorded] = await asyncio.wait_for(remaining_append, DEADLINE_SECONDS)
        assert recorded.position == 3
        await (
            event_store._appender.wait_until_idle()
        )  # the first write may end last, and a reader would void its position
        assert [event.stream for event in await event_store.read()] == ["job-1", "job-2", "job-3"]
        assert first_append.cancelled()
        assert cancelled_append.cancelled()


async def test_aclose_finishes_pending_appends(connection: Connection) -> None:
    async with open_pausable_store(connection) as event_store:
        first_append = await event_store.append_and_pause(create_append(make_job_submitted()))
        pending = asyncio.create_task(event_store.append(create_append(make_job_submitted())))
        await asyncio.sleep(0)
        closing = asyncio.create_task(event_store.aclose())
        event_store.may_insert.set()
        await asyncio.wait_for(closing, DEADLINE_SECONDS)
        assert first_append.done()
        assert (await pending)[0].position == 2


async def test_append_above_pending_event_limit_is_rejected(connection: Connection) -> None:
    async with open_pausable_store(connection, EventStoreLimits(max_pending_events=3)) as event_store:
        first_append = await event_store.append_and_pause(create_append(make_job_submitted()))
        pending = [asyncio.create_task(event_store.append(create_append(make_job_submitted()))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LedgerBusy):
            await event_store.append(create_append(make_job_submitted()))
        event_store.may_insert.set()
        await asyncio.gather(first_append, *pending)
        await event_store.append(create_append(make_job_submitted()))
        assert await event_store.head_position() == 5


async def test_append_above_pending_byte_limit_is_rejected(connection: Connection) -> None:
    large = make_job_submitted(parameters={"text": "x" * 60_000})
    async with open_pausable_store(
        connection, EventStoreLimits(max_pending_bytes=150_000, max_concurrent_writes=1)
    ) as event_store:
        first_append = await event_store.append_and_pause(create_append(make_job_submitted()))
        pending = [asyncio.create_task(event_store.append(create_append(large))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LedgerBusy, match="bytes"):
            await event_store.append(create_append(make_job_submitted()))
        event_store.may_insert.set()
        await asyncio.gather(first_append, *pending)
        await event_store.append(create_append(large))
        assert await event_store.head_position() == 5


@pytest.mark.parametrize(
    ("parameters", "encoded_on_loop"),
    [
        ({"a": "x"}, True),
        ({"a": [1.0, None, "$"]}, True),
        ({"a": "x" * 100_000}, False),
        ({"a": [1.0] * 100_000}, False),
        ({"a": [None] * 100_000}, False),
        ({"a": "x" * 100_000 + "$"}, False),
        ({"a": ["ä"] * 10_000 + ["\U00010000"] * 10_000}, False),
    ],
    ids=["small", "small with slow path", "text", "whole floats", "nulls", "dollar", "not ASCII"],
)
async def test_large_event_is_encoded_in_thread(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], encoded_on_loop: bool
) -> None:
    threads: list[bool] = []

    def record_encoder_thread(value: Any, depth: int) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return encode_plain(value, depth)

    def record_check_thread(text: bytes) -> bool:
        threads.append(threading.current_thread() is threading.main_thread())
        return needs_slow_path(text)

    encode_plain, needs_slow_path = canonical_json._plain, canonical_json._needs_slow_path
    monkeypatch.setattr(canonical_json, "_plain", record_encoder_thread)
    monkeypatch.setattr(canonical_json, "_needs_slow_path", record_check_thread)
    for job in (make_job_submitted(parameters=parameters), make_job_submitted(parameters=parameters, not_before=NOON)):
        threads.clear()
        await unstreamed_ledger.event_store.append(create_append(make_job_submitted()), create_append(job))
        assert (False not in threads) is encoded_on_loop
        assert threads.count(True) == 1 or encoded_on_loop  # the small event
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_oversized_event_is_rejected_before_encoding(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canonical_json, "_plain", None)
    monkeypatch.setattr(canonical_json, "_needs_slow_path", None)
    for content in ([[1.0] * 3] * 240_000, [None] * 1_000_000, ["$"] * 1_000_000):
        with pytest.raises(InvalidEvent, match=r"parameters: \d+ bytes"):
            await unstreamed_ledger.event_store.append(create_append(make_job_submitted(parameters={"a": content})))


async def test_encoding_of_many_small_events_yields_to_other_tasks(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Encoding yields about once per 64 KiB, whatever the number of appends."""
    rounds = 0

    async def count_iterations() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    jobs = [create_append(make_job_submitted(parameters={"a": "x" * 30_000})) for _ in range(20)]
    counting = asyncio.create_task(count_iterations())
    rounds_before_write = 0
    real_write = unstreamed_ledger.event_store._appender.write

    async def write(*arguments: Any) -> None:
        nonlocal rounds_before_write
        rounds_before_write = rounds
        await real_write(*arguments)

    monkeypatch.setattr(unstreamed_ledger.event_store._appender, "write", write)
    await unstreamed_ledger.event_store.append(*jobs)
    counting.cancel()
    assert 5 <= rounds_before_write <= 20


async def test_append_above_byte_limit_is_rejected_with_size_and_limit(connection: Connection) -> None:
    large = make_job_submitted(parameters={"text": "x" * 40_000})
    async with open_ledger(connection, EventStoreLimits(max_append_bytes=100_000), with_change_stream=False) as ledger:
        with pytest.raises(InvalidEvent, match=r"3 events of 12\d{4} bytes .* 100000 bytes"):
            await ledger.event_store.append(*[create_append(large) for _ in range(3)])
        assert len(await ledger.event_store.append(*[create_append(large) for _ in range(2)])) == 2


async def test_append_larger_than_one_message_is_atomic(unstreamed_ledger: Ledger) -> None:
    """The documents have 52 MB in BSON, four times their JSON. A message has at most 16 MB."""
    numbers = make_job_submitted(parameters={"numbers": list(range(10, 90)) * 1000})
    existing = await unstreamed_ledger.event_store.append(create_append(make_job_submitted(), stream="job-existing"))
    many = [create_append(numbers) for _ in range(60)]
    with pytest.raises(VersionConflict):
        await unstreamed_ledger.event_store.append(*many, create_append(make_job_submitted(), stream="job-existing"))
    assert [event.stream for event in await unstreamed_ledger.event_store.read() if event.stream != VOID_STREAM] == [
        "job-existing"
    ]
    recorded = await unstreamed_ledger.event_store.append(*many)
    assert event_positions(recorded) == list(range(recorded[0].position, recorded[0].position + 60))
    assert recorded[0].position > existing[0].position
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_appends_are_grouped_while_other_writes_are_in_progress(connection: Connection) -> None:
    async with open_pausable_store(
        connection, EventStoreLimits(max_concurrent_writes=3, max_events_per_write=10)
    ) as event_store:
        event_store.may_insert.clear()
        appending = [
            asyncio.create_task(event_store.append(create_append(make_job_submitted(), stream=f"job-{n}")))
            for n in range(50)
        ]
        await poll_until(lambda: event_store.write_sizes == [10, 10, 10])
        event_store.may_insert.set()
        recorded = await asyncio.gather(*appending)
        assert sorted(event.position for [event] in recorded) == list(range(1, 51))
        assert event_store.write_sizes == [10] * 5
        check_log(await load_event_documents(event_store.db))


async def test_permanent_database_error_fails_append_at_once(connection: Connection) -> None:
    """A validator on the collection represents any permanent rejection."""
    async with open_ledger(connection, with_change_stream=False) as ledger:
        await ledger.submit_job()
        await ledger.db.command({"collMod": "events", "validator": {"type": "Nothing"}})
        async with asyncio.timeout(DEADLINE_SECONDS):  # half of the append timeout
            with pytest.raises(LedgerUnavailable, match="rejects the events: Document failed validation"):
                await ledger.submit_job()
        await ledger.db.command({"collMod": "events", "validator": {}})
        await ledger.submit_job()
        events = await read_all_events(ledger.event_store)
        assert [event.type for event in events] == ["JobSubmitted", "PositionVoided", "JobSubmitted"]


async def test_append_without_database_fails_after_timeout(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        connection = Connection(proxy.uri, db_name, connect_timeout_ms=300)
        async with open_ledger(
            connection, EventStoreLimits(append_timeout_seconds=0.5), with_change_stream=False
        ) as ledger:
            await ledger.submit_job()
            proxy.close()
            with pytest.raises(LedgerUnavailable, match="in time"):
                await asyncio.wait_for(ledger.submit_job(), DEADLINE_SECONDS)
            for reading in (
                ledger.event_store.head_position(),
                ledger.event_store.read(),
                ledger.event_store.read_stream("job-1"),
            ):
                with pytest.raises(LedgerUnavailable):
                    await reading


async def test_queued_appends_without_database_time_out_together(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        connection = Connection(proxy.uri, db_name, connect_timeout_ms=300)
        limits = EventStoreLimits(append_timeout_seconds=1, max_events_per_write=1, max_concurrent_writes=2)
        async with open_ledger(connection, limits, with_change_stream=False) as ledger:
            await ledger.submit_job()
            proxy.close()
            async with asyncio.timeout(DEADLINE_SECONDS):  # one after the other, they would take 30 s
                results = await asyncio.gather(*(ledger.submit_job() for _ in range(200)), return_exceptions=True)
            assert {type(result) for result in results} == {LedgerUnavailable}


async def test_broken_connection_does_not_duplicate_events(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        async with open_ledger(Connection(proxy.uri, db_name), with_change_stream=False) as ledger:
            for _ in range(5):
                appending = asyncio.gather(*(ledger.submit_job() for _ in range(20)))
                await asyncio.sleep(0.001)
                proxy.close_connections()
                await asyncio.wait_for(appending, DEADLINE_SECONDS)
            events = await read_all_events(ledger.event_store)
            assert len([event for event in events if event.stream != VOID_STREAM]) == 100
            check_log(await load_event_documents(ledger.db))


# Gaps, late inserts and a stale counter ---------------------------------------------------------------------------


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
