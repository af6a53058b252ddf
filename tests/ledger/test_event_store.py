"""The event store: appends, gaps in positions, reads and subscriptions."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from enum import Enum
from itertools import cycle
from typing import Any
from uuid import UUID

import pytest
from bson import ObjectId
from pymongo.asynchronous.collection import AsyncCollection
from pymongo.errors import AutoReconnect

from jobledger.ledger.domain import canonical_json
from jobledger.ledger.domain.commands import ChangeAccess, ClaimJob, SubmitBatch, SubmitJob
from jobledger.ledger.domain.errors import InvalidEvent, LedgerBusy, LedgerUnavailable, VersionConflict
from jobledger.ledger.domain.events import (
    BatchSubmitted,
    Event,
    JobClaimed,
    JobProgressed,
    JobSubmitted,
    PositionVoided,
    RecordedEvent,
)
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.appender import Appender, EventStoreLimits, PendingAppend
from jobledger.ledger.store.command_handler import create_streams, handle_command, new_batch_id, new_job_id
from jobledger.ledger.store.envelope import MAX_EVENT_BYTES, VOID_STREAM, StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore
from tests.ledger.conftest import FAST_GAP_LIMITS
from tests.support.decider_spec import type_name
from tests.support.event_examples import ACCESS, NOON, make_job_submitted
from tests.support.ledger_setup import (
    DEADLINE_SECONDS,
    EVENT_METADATA,
    Ledger,
    change_stream_operations,
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


def create_append(*events: Event, stream: str | None = None, head: StreamHead | None = None) -> StreamAppend:
    return StreamAppend(stream or new_job_id(), head or StreamHead(), events, EVENT_METADATA, NOON)


def head_after(event: RecordedEvent) -> StreamHead:
    return StreamHead(event.version, event.position, event.hash)


def create_progress(percent: float = 0.0) -> JobProgressed:
    return JobProgressed(attempt=1, step="page", percent=percent, message="")


class PausableEventStore(EventStore):
    """An event store whose appender can be paused between reserving positions and inserting."""

    def __init__(self, db: Database, limits: EventStoreLimits) -> None:
        super().__init__(db, limits)
        self._appender = PausableAppender(db, self._events, limits, self)
        self.may_insert = asyncio.Event()
        self.may_insert.set()
        self.is_reserved = asyncio.Event()
        self.db = db
        self.write_sizes: list[int] = []
        """The number of appends of each write that reached its insert."""

    async def append_and_pause(self, *appends: StreamAppend) -> asyncio.Task[list[RecordedEvent]]:
        """Start an append and pause it before its insert. `may_insert` lets it continue."""
        self.may_insert.clear()
        self.is_reserved.clear()
        appending = asyncio.create_task(self.append(*appends))
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.is_reserved.wait()
        return appending


class PausableAppender(Appender):
    def __init__(
        self, db: Database, events: AsyncCollection[Document], limits: EventStoreLimits, store: PausableEventStore
    ) -> None:
        super().__init__(db, events, limits)
        self._store = store

    async def _insert(self, todo: Sequence[PendingAppend]) -> list[PendingAppend]:
        self._store.is_reserved.set()
        self._store.write_sizes.append(len(todo))
        await self._store.may_insert.wait()
        return await super()._insert(todo)


@asynccontextmanager
async def open_pausable_store(
    connection: Connection, limits: EventStoreLimits = FAST_GAP_LIMITS
) -> AsyncIterator[PausableEventStore]:
    async with open_ledger(connection, limits, with_change_stream=False, store_class=PausableEventStore) as ledger:
        assert isinstance(ledger.event_store, PausableEventStore)
        try:
            yield ledger.event_store
        finally:
            ledger.event_store.may_insert.set()


class ConnectionLossAppender(Appender):
    """An appender that loses the connection after the server has inserted, the first `failures_left` times."""

    failures_left = 1
    inserted_before_loss = 1_000_000
    """The number of documents that the server inserts before the connection is lost."""

    async def _insert(self, todo: Sequence[Any]) -> list[Any]:
        if self.failures_left:
            self.failures_left -= 1
            documents = [document for append in todo for document in append.documents]
            await self._events.insert_many(documents[: self.inserted_before_loss])
            raise AutoReconnect("connection closed")
        return await super()._insert(todo)


class ConnectionLossEventStore(EventStore):
    """An event store with a `ConnectionLossAppender`."""

    appender_class = ConnectionLossAppender

    def __init__(self, db: Database, limits: EventStoreLimits) -> None:
        super().__init__(db, limits)
        self._appender: ConnectionLossAppender = self.appender_class(db, self._events, limits)

    def lose_connection_after(self, documents: int) -> None:
        self._appender.inserted_before_loss = documents


# Append -----------------------------------------------------------------------------------------------------------


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
                log.append(create_append(create_progress(writer), stream="job-1", head=head))
                for writer in range(10)
                for log in (one.event_store, two.event_store)
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
    async with open_pausable_store(connection) as log:
        first_append = await log.append_and_pause(create_append(make_job_submitted()))
        queued_appends = [asyncio.create_task(log.append(create_append(make_job_submitted()))) for _ in range(50)]
        await asyncio.sleep(0)
        log.may_insert.set()
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
    async with open_pausable_store(connection) as log:
        first_append = await log.append_and_pause(create_append(make_job_submitted(), stream="job-1"))
        cancelled_append = asyncio.create_task(log.append(create_append(make_job_submitted(), stream="job-2")))
        remaining_append = asyncio.create_task(log.append(create_append(make_job_submitted(), stream="job-3")))
        await asyncio.sleep(0)
        first_append.cancel()
        cancelled_append.cancel()
        log.may_insert.set()
        [recorded] = await asyncio.wait_for(remaining_append, DEADLINE_SECONDS)
        assert recorded.position == 3
        await log._appender.wait_until_idle()  # the first write may end last, and a reader would void its position
        assert [event.stream for event in await log.read()] == ["job-1", "job-2", "job-3"]
        assert first_append.cancelled()
        assert cancelled_append.cancelled()


async def test_aclose_finishes_pending_appends(connection: Connection) -> None:
    async with open_pausable_store(connection) as log:
        first_append = await log.append_and_pause(create_append(make_job_submitted()))
        pending = asyncio.create_task(log.append(create_append(make_job_submitted())))
        await asyncio.sleep(0)
        closing = asyncio.create_task(log.aclose())
        log.may_insert.set()
        await asyncio.wait_for(closing, DEADLINE_SECONDS)
        assert first_append.done()
        assert (await pending)[0].position == 2


async def test_append_above_pending_event_limit_is_rejected(connection: Connection) -> None:
    async with open_pausable_store(connection, EventStoreLimits(max_pending_events=3)) as log:
        first_append = await log.append_and_pause(create_append(make_job_submitted()))
        pending = [asyncio.create_task(log.append(create_append(make_job_submitted()))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LedgerBusy):
            await log.append(create_append(make_job_submitted()))
        log.may_insert.set()
        await asyncio.gather(first_append, *pending)
        await log.append(create_append(make_job_submitted()))
        assert await log.head_position() == 5


async def test_append_above_pending_byte_limit_is_rejected(connection: Connection) -> None:
    large = make_job_submitted(parameters={"text": "x" * 60_000})
    async with open_pausable_store(
        connection, EventStoreLimits(max_pending_bytes=150_000, max_concurrent_writes=1)
    ) as log:
        first_append = await log.append_and_pause(create_append(make_job_submitted()))
        pending = [asyncio.create_task(log.append(create_append(large))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LedgerBusy, match="bytes"):
            await log.append(create_append(make_job_submitted()))
        log.may_insert.set()
        await asyncio.gather(first_append, *pending)
        await log.append(create_append(large))
        assert await log.head_position() == 5


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
    seen = 0
    real_write = unstreamed_ledger.event_store._appender.write

    async def write(*arguments: Any) -> None:
        nonlocal seen
        seen = rounds
        await real_write(*arguments)

    monkeypatch.setattr(unstreamed_ledger.event_store._appender, "write", write)
    await unstreamed_ledger.event_store.append(*jobs)
    counting.cancel()
    assert 5 <= seen <= 20


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
    ) as log:
        log.may_insert.clear()
        appending = [
            asyncio.create_task(log.append(create_append(make_job_submitted(), stream=f"job-{n}"))) for n in range(50)
        ]
        await poll_until(lambda: log.write_sizes == [10, 10, 10])
        log.may_insert.set()
        recorded = await asyncio.gather(*appending)
        assert sorted(event.position for [event] in recorded) == list(range(1, 51))
        assert log.write_sizes == [10] * 5
        check_log(await load_event_documents(log.db))


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
    assert await unstreamed_ledger.event_store.head_position() == 1


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
        seen = await asyncio.gather(*reading)
        everything = next(events for events in seen if len(events) == 30)
        assert all(events == everything[-len(events) :] for events in seen)
        assert event_positions(everything) == list(range(1, 31))
        assert sum(event.stream == VOID_STREAM for event in everything) == 9
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
        first_timer = ledger.event_store._gap_timer
        assert first_timer is not None
        slow_store.may_insert.set()
        await take_events(events, 2)
        await slow_append
        slow_append = await slow_store.append_and_pause(create_append(make_job_submitted(), stream="job-late"))
        await ledger.submit_job()
        await poll_until(lambda: tail.newest_out_of_order == 4)
        assert ledger.event_store._gap_timer is first_timer
        first_timer.cancel()
        ledger.event_store._start_gap_filling(2)  # the timeout of the first gap ends now
        second_timer = ledger.event_store._gap_timer
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


# Read -------------------------------------------------------------------------------------------------------------


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
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await load_event_documents(unstreamed_ledger.db, {"_id": gap, "stream": VOID_STREAM}):  # noqa: ASYNC110 - no change stream
                await asyncio.sleep(0.02)


def deliver_change(log: EventStore, document: Document) -> None:
    log.on_change({"operationType": "insert", "fullDocument": document})


# Subscribe --------------------------------------------------------------------------------------------------------


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
        seen = await asyncio.gather(*reading)
        assert event_positions(seen[0]) == list(range(1, total + 1))
        assert [event_positions(events) for events in seen] == [
            list(range(after + 1, total + 1)) for after in (0, 1, 10, 50, 100)
        ]
        assert seen[0] == await reader.event_store.read(limit=total)


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
        chunk = await slow_events.next_chunk(5)
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
                pages.append(event_positions(await slow_events.next_chunk()))
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
                    chunk = await slow_events.next_chunk(500)
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
            max_held = max(max_held, len(tail._early))
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
        assert await ledger.event_store.head_position() == 3
        assert event_positions(await read_first_events(ledger.event_store, 2)) == [1, 2]


async def test_chunk_has_at_most_limit_events(ledger: Ledger) -> None:
    await ledger.event_store.append(create_append(*[create_progress()] * 25))
    async with ledger.event_store.subscribe(after=0) as events, asyncio.timeout(DEADLINE_SECONDS):
        sizes = []
        while events.position < 25:
            sizes.append(len(await events.next_chunk(10)))
    assert max(sizes) <= 10
    assert sum(sizes) == 25


async def test_types_filter_events_and_position_advances(ledger: Ledger) -> None:
    async with ledger.event_store.subscribe(after=0, types=[JobClaimed]) as events:
        taking = asyncio.create_task(events.next_chunk())
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
            taking = asyncio.create_task(events.next_chunk())
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
            seen: list[RecordedEvent] = []
            cancelled = 0
            while len(seen) < 60:
                taking = asyncio.create_task(events.next_chunk(4))
                while not taking.done() and (events._ahead is None or events._ahead[0] == events.position):  # noqa: ASYNC110 - takes one iteration of the event loop
                    await asyncio.sleep(0)
                taking.cancel()
                with suppress(asyncio.CancelledError):
                    seen += await taking
                cancelled += taking.cancelled()
                if len(seen) < 60:
                    seen += await events.next_chunk(4)
        assert event_positions(seen) == list(range(1, 61))
        assert cancelled > 0


async def test_cancellation_while_reading_history_loses_nothing(connection: Connection) -> None:
    pauses = cycle([0, 0.0005, 0.001, 0.002, 0.005, 0.1])
    seen: list[RecordedEvent] = []
    cancelled = 0
    async with (
        open_ledger(connection, EventStoreLimits(max_tail_events=10)) as ledger,
        asyncio.timeout(DEADLINE_SECONDS),
    ):
        await ledger.event_store.append(create_append(*[create_progress()] * 500))
        await read_first_events(ledger.event_store, 500)
        async with ledger.event_store.subscribe(after=0) as events:
            while events.position < 500:
                reading = asyncio.create_task(events.next_chunk(15))
                await asyncio.wait({reading}, timeout=next(pauses))
                reading.cancel()
                await asyncio.wait({reading})
                cancelled += reading.cancelled()
                if not reading.cancelled():
                    seen += reading.result()
    assert event_positions(seen) == list(range(1, 501))
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


async def kill_change_stream(db: Database, kill_command: str) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            for operation in await change_stream_operations(db):
                if kill_command == "killCursors":
                    cursor = operation["cursor"]["cursorId"]
                    killed = await db.command({"killCursors": "$cmd.aggregate", "cursors": [cursor]})
                    if killed["cursorsKilled"]:
                        return
                elif operation["type"] == "op":
                    await db.client.admin.command({"killOp": 1, "op": operation["opid"]})
                    return


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
        gap_timer = ledger.event_store._gap_timer
        assert gap_timer is None or gap_timer.cancelled()  # so no task starts later


@pytest.fixture
async def short_transactions(connection: Connection) -> AsyncIterator[None]:
    """Let the server abort open transactions after one second instead of a minute."""
    async with connection.client() as client:
        before = await client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        await client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": 1})
        yield
        seconds = before["transactionLifetimeLimitSeconds"]
        await client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": seconds})


@pytest.mark.usefixtures("short_transactions")
async def test_open_transaction_of_killed_appender_delays_readers_briefly(
    connection: Connection,
) -> None:
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger, connection.client() as dead:
        gap = await create_position_gap(ledger.db)
        session = dead.start_session()
        await session.start_transaction()
        document = {"_id": gap, "stream": "job-dead", "version": 1}
        await dead[connection.db_name].events.insert_one(document, session=session)
        await ledger.submit_job()
        assert [event.type for event in await read_first_events(ledger.event_store, 2)] == [
            "PositionVoided",
            "JobSubmitted",
        ]
        check_log(await load_event_documents(ledger.db))
