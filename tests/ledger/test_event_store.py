"""The log: dense positions whoever writes, dies or dawdles, and subscribers who all see the same."""

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


def append_of(*events: Event, stream: str | None = None, head: StreamHead | None = None) -> StreamAppend:
    return StreamAppend(stream or new_job_id(), head or StreamHead(), events, EVENT_METADATA, NOON)


def head_of(event: RecordedEvent) -> StreamHead:
    return StreamHead(event.version, event.position, event.hash)


def progress(percent: float = 0.0) -> JobProgressed:
    return JobProgressed(attempt=1, step="page", percent=percent, message="")


class Dawdler(EventStore):
    """A log whose writer can be held up between taking its numbers and inserting."""

    def __init__(self, db: Database, limits: EventStoreLimits) -> None:
        super().__init__(db, limits)
        self._appender = _DawdlingAppender(db, self._events, limits, self)
        self.go_on = asyncio.Event()
        self.go_on.set()
        self.numbered = asyncio.Event()
        self.db = db
        self.held: list[int] = []
        """The sizes of the groups that were about to be inserted."""

    async def held_up(self, *appends: StreamAppend) -> asyncio.Task[list[RecordedEvent]]:
        """Begin to append and stop there; `go_on` lets it continue."""
        self.go_on.clear()
        self.numbered.clear()
        appending = asyncio.create_task(self.append(*appends))
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.numbered.wait()
        return appending


class _DawdlingAppender(Appender):
    def __init__(
        self, db: Database, events: AsyncCollection[Document], limits: EventStoreLimits, dawdler: Dawdler
    ) -> None:
        super().__init__(db, events, limits)
        self._dawdler = dawdler

    async def _insert(self, todo: Sequence[PendingAppend]) -> list[PendingAppend]:
        self._dawdler.numbered.set()
        self._dawdler.held.append(len(todo))
        await self._dawdler.go_on.wait()
        return await super()._insert(todo)


@asynccontextmanager
async def dawdler_on(connection: Connection, limits: EventStoreLimits = FAST_GAP_LIMITS) -> AsyncIterator[Dawdler]:
    async with open_ledger(connection, limits, with_change_stream=False, store_class=Dawdler) as ledger:
        assert isinstance(ledger.event_store, Dawdler)
        try:
            yield ledger.event_store
        finally:
            ledger.event_store.go_on.set()


class ForgetfulAppender(Appender):
    """An appender whose network breaks after the server has done what it was asked to: the first `losses` times."""

    losses = 1
    lost_after = 1_000_000
    """How many of the documents the server still took in."""

    async def _insert(self, todo: Sequence[Any]) -> list[Any]:
        if self.losses:
            self.losses -= 1
            documents = [document for waiting in todo for document in waiting.documents]
            await self._events.insert_many(documents[: self.lost_after])
            raise AutoReconnect("connection closed")
        return await super()._insert(todo)


class Forgetful(EventStore):
    """A log with a `ForgetfulAppender`."""

    appender_class = ForgetfulAppender

    def __init__(self, db: Database, limits: EventStoreLimits) -> None:
        super().__init__(db, limits)
        self._appender: ForgetfulAppender = self.appender_class(db, self._events, limits)

    def lose_after(self, documents: int) -> None:
        self._appender.lost_after = documents


# Append -----------------------------------------------------------------------------------------------------------


async def test_positions_count_through_the_log_and_versions_through_each_stream(unstreamed_ledger: Ledger) -> None:
    one = await unstreamed_ledger.submit_job()
    two = await unstreamed_ledger.submit_job()
    claimed = await handle_command(
        unstreamed_ledger.event_store,
        one.events[0].stream,
        ClaimJob("w1", NOON),
        meta=EVENT_METADATA,
        stream_state=one.stream_state,
    )
    events = [*one.events, *two.events, *claimed.events]
    assert [(event.position, event.version) for event in events] == [(1, 1), (2, 1), (3, 2)]
    assert await unstreamed_ledger.event_store.read() == events
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_log_may_reach_its_positions_and_none_beyond(unstreamed_ledger: Ledger) -> None:
    assert not await unstreamed_ledger.event_store.may_have_reached(1)
    await unstreamed_ledger.event_store.append(append_of(make_job_submitted(), progress(), stream="job-1"))
    await unstreamed_ledger.db.events.insert_one({"_id": "z", "stream": "none", "version": 1})
    assert [await unstreamed_ledger.event_store.may_have_reached(position) for position in range(4)] == [
        True,
        True,
        True,
        False,
    ]


async def test_what_append_returns_is_what_is_stored(unstreamed_ledger: Ledger) -> None:
    recorded = await unstreamed_ledger.event_store.append(
        append_of(make_job_submitted(), progress(0.5), stream="job-1")
    )
    assert recorded == await unstreamed_ledger.event_store.read_stream("job-1")
    assert [event.time for event in recorded] == [NOON, NOON]
    assert [event.meta for event in recorded] == [EVENT_METADATA, EVENT_METADATA]
    assert len({event.event_id for event in recorded}) == 2


async def test_appending_nothing_takes_no_number(unstreamed_ledger: Ledger) -> None:
    assert await unstreamed_ledger.event_store.append() == []
    assert await unstreamed_ledger.event_store.append(append_of()) == []
    assert await unstreamed_ledger.db.counters.find_one({"_id": "events"}) is None


async def test_a_conflict_tells_which_version_was_found(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.event_store.append(append_of(make_job_submitted(), progress(), progress(), stream="job-1"))
    with pytest.raises(VersionConflict) as lost:
        await unstreamed_ledger.event_store.append(append_of(progress(), stream="job-1", head=StreamHead(version=1)))
    assert (lost.value.stream, lost.value.expected, lost.value.found) == ("job-1", 1, 3)
    with pytest.raises(VersionConflict) as lost:
        await unstreamed_ledger.event_store.append(
            append_of(progress(), progress(), stream="job-1", head=StreamHead(version=2))
        )
    assert (lost.value.stream, lost.value.expected, lost.value.found) == ("job-1", 2, 3)


async def test_of_many_writers_for_a_version_one_wins_and_the_others_learn_which(connection: Connection) -> None:
    async with (
        open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False) as one,
        open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False) as two,
    ):
        [submitted] = await one.event_store.append(append_of(make_job_submitted(), stream="job-1"))
        head = head_of(submitted)
        for _ in range(5):
            attempts = [
                log.append(append_of(progress(writer), stream="job-1", head=head))
                for writer in range(10)
                for log in (one.event_store, two.event_store)
            ]
            answers = await asyncio.gather(*attempts, return_exceptions=True)
            winners = [answer for answer in answers if isinstance(answer, list)]
            losers = [answer for answer in answers if isinstance(answer, VersionConflict)]
            assert (len(winners), len(losers)) == (1, 19)
            assert {loser.found for loser in losers} == {head.version + 1}
            head = head_of(winners[0][0])
        await read_all_events(one.event_store)
        check_log(await load_event_documents(one.db))


async def test_a_hundred_lost_races_are_sorted_out_together(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    voidings: list[list[int]] = []
    void_positions = Appender.void_positions

    async def count(self: Appender, positions: Iterable[int]) -> None:
        voidings.append(sorted(positions))
        await void_positions(self, voidings[-1])

    monkeypatch.setattr(Appender, "void_positions", count)
    async with open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False) as ledger:
        streams = [f"job-{number}" for number in range(100)]
        for version in range(2):
            await ledger.event_store.append(
                *(
                    append_of(make_job_submitted(), stream=stream, head=StreamHead(version=version))
                    for stream in streams
                )
            )
        fresh = await asyncio.gather(
            *(ledger.event_store.append(append_of(make_job_submitted(), stream=stream)) for stream in streams),
            ledger.event_store.append(append_of(make_job_submitted(), stream="job-new")),
            return_exceptions=True,
        )
        conflicts = [answer for answer in fresh if isinstance(answer, VersionConflict)]
        assert {(lost.stream, lost.expected, lost.found) for lost in conflicts} == {(name, 0, 2) for name in streams}
        assert isinstance(fresh[-1], list)
        assert len(voidings) == 1
        assert len(voidings[0]) == 100
        await read_all_events(ledger.event_store)


async def test_racing_commands_for_one_stream_all_get_their_own_version(connection: Connection) -> None:
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
        assert sorted(answer.events[0].version for answer in handled) == list(range(2, 18))
        assert {answer.stream_state.head.version for answer in handled} == set(range(2, 18))
        check_log(await load_event_documents(one.db))


async def test_events_of_several_streams_are_written_all_or_none(unstreamed_ledger: Ledger) -> None:
    taken = (await unstreamed_ledger.submit_job()).events[0].stream
    batch_id, job_id = new_batch_id(), new_job_id()
    batch = SubmitBatch(BatchSubmitted(total_jobs=2, job_ids=[job_id, taken], user_id="alice"))
    with pytest.raises(VersionConflict, match=taken):
        await create_streams(
            unstreamed_ledger.event_store,
            [(batch_id, batch), (job_id, SubmitJob(make_job_submitted())), (taken, SubmitJob(make_job_submitted()))],
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


async def test_numbers_that_a_lost_race_leaves_over_are_voided_at_once_by_the_writer(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.event_store.append(append_of(make_job_submitted(), stream="job-1"))
    with pytest.raises(VersionConflict):
        await unstreamed_ledger.event_store.append(append_of(make_job_submitted(), stream="job-1"))
    with pytest.raises(VersionConflict):
        await unstreamed_ledger.event_store.append(
            append_of(make_job_submitted(), stream="job-2"), append_of(make_job_submitted(), stream="job-1")
        )
    voids = [
        document for document in await load_event_documents(unstreamed_ledger.db) if document["stream"] == VOID_STREAM
    ]
    assert [(void["_id"], void["version"], void["type"]) for void in voids] == [
        (position, position, "PositionVoided") for position in (2, 3, 4)
    ]


async def test_of_two_appends_to_one_stream_in_one_call_the_second_is_too_late(unstreamed_ledger: Ledger) -> None:
    twice = append_of(make_job_submitted(), stream="job-1"), append_of(make_job_submitted(), stream="job-1")
    with pytest.raises(VersionConflict, match="job-1 is at version 1, not 0"):
        async with asyncio.timeout(5):
            await unstreamed_ledger.event_store.append(*twice)
    assert await unstreamed_ledger.event_store.head_position() == 0


async def test_many_single_events_travel_together(connection: Connection) -> None:
    async with dawdler_on(connection) as log:
        ahead = await log.held_up(append_of(make_job_submitted()))
        gathering = [asyncio.create_task(log.append(append_of(make_job_submitted()))) for _ in range(50)]
        await asyncio.sleep(0)
        log.go_on.set()
        recorded = await asyncio.gather(ahead, *gathering)
        assert [event.position for events in recorded for event in events] == list(range(1, 52))


# Errors and the group ---------------------------------------------------------------------------------------------


class Colour(Enum):
    RED = "red"


BAD: dict[str, Any] = {
    "NaN": float("nan"),
    "lone surrogate": "\ud800",
    "operator": {"$set": 1},
    "huge integer": 2**64,
    "UUID": UUID(int=1),
    "enum": Colour.RED,
    "too large": "x" * (MAX_EVENT_BYTES + 1),
    "too large for the database only": [0] * 1_500_000,
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD.keys())
async def test_an_event_that_cannot_be_stored_does_not_hurt_those_it_would_travel_with(
    unstreamed_ledger: Ledger, bad: Any
) -> None:
    good = [unstreamed_ledger.event_store.append(append_of(make_job_submitted())) for _ in range(3)]
    answers = await asyncio.wait_for(
        asyncio.gather(
            *good,
            unstreamed_ledger.event_store.append(append_of(make_job_submitted(parameters={"bad": bad}))),
            unstreamed_ledger.event_store.append(
                append_of(make_job_submitted(), make_job_submitted(parameters={"bad": bad}))
            ),
            unstreamed_ledger.event_store.append(append_of(make_job_submitted())),
            return_exceptions=True,
        ),
        DEADLINE_SECONDS,
    )
    assert [type(answer) for answer in answers] == [list, list, list, InvalidEvent, InvalidEvent, list]
    await unstreamed_ledger.event_store.append(append_of(make_job_submitted()))
    assert len([event for event in await unstreamed_ledger.event_store.read() if event.stream != VOID_STREAM]) == 5
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_a_caller_that_is_cancelled_does_not_take_its_group_along(connection: Connection) -> None:
    async with dawdler_on(connection) as log:
        ahead = await log.held_up(append_of(make_job_submitted(), stream="job-1"))
        impatient = asyncio.create_task(log.append(append_of(make_job_submitted(), stream="job-2")))
        patient = asyncio.create_task(log.append(append_of(make_job_submitted(), stream="job-3")))
        await asyncio.sleep(0)
        ahead.cancel()
        impatient.cancel()
        log.go_on.set()
        [recorded] = await asyncio.wait_for(patient, DEADLINE_SECONDS)
        assert recorded.position == 3
        assert [event.stream for event in await log.read()] == ["job-1", "job-2", "job-3"]
        assert ahead.cancelled()
        assert impatient.cancelled()


async def test_closing_finishes_the_appends_that_wait(connection: Connection) -> None:
    async with dawdler_on(connection) as log:
        ahead = await log.held_up(append_of(make_job_submitted()))
        waiting = asyncio.create_task(log.append(append_of(make_job_submitted())))
        await asyncio.sleep(0)
        closing = asyncio.create_task(log.aclose())
        log.go_on.set()
        await asyncio.wait_for(closing, DEADLINE_SECONDS)
        assert ahead.done()
        assert (await waiting)[0].position == 2


async def test_too_much_waiting_is_refused_until_it_is_written(connection: Connection) -> None:
    async with dawdler_on(connection, EventStoreLimits(max_pending_events=3)) as log:
        ahead = await log.held_up(append_of(make_job_submitted()))
        waiting = [asyncio.create_task(log.append(append_of(make_job_submitted()))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LedgerBusy):
            await log.append(append_of(make_job_submitted()))
        log.go_on.set()
        await asyncio.gather(ahead, *waiting)
        await log.append(append_of(make_job_submitted()))
        assert await log.head_position() == 5


async def test_too_many_bytes_waiting_are_refused_like_too_many_events(connection: Connection) -> None:
    large = make_job_submitted(parameters={"text": "x" * 60_000})
    async with dawdler_on(connection, EventStoreLimits(max_pending_bytes=150_000, max_concurrent_writes=1)) as log:
        ahead = await log.held_up(append_of(make_job_submitted()))
        waiting = [asyncio.create_task(log.append(append_of(large))) for _ in range(3)]
        await asyncio.sleep(0)
        with pytest.raises(LedgerBusy, match="bytes"):
            await log.append(append_of(make_job_submitted()))
        log.go_on.set()
        await asyncio.gather(ahead, *waiting)
        await log.append(append_of(large))
        assert await log.head_position() == 5


@pytest.mark.parametrize(
    ("parameters", "on_loop"),
    [
        ({"a": "x"}, True),
        ({"a": [1.0, None, "$"]}, True),
        ({"a": "x" * 100_000}, False),
        ({"a": [1.0] * 100_000}, False),
        ({"a": [None] * 100_000}, False),
        ({"a": "x" * 100_000 + "$"}, False),
        ({"a": ["ä"] * 10_000 + ["\U00010000"] * 10_000}, False),
    ],
    ids=["small", "small and delicate", "text", "whole floats", "nulls", "dollar", "not ASCII"],
)
async def test_large_content_is_never_encoded_on_the_event_loop(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch, parameters: dict[str, Any], on_loop: bool
) -> None:
    threads: list[bool] = []

    def walk(found: Any, depth: int) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return real(found, depth)

    def look(text: bytes) -> bool:
        threads.append(threading.current_thread() is threading.main_thread())
        return is_delicate(text)

    real, is_delicate = canonical_json._plain, canonical_json._needs_slow_path
    monkeypatch.setattr(canonical_json, "_plain", walk)
    monkeypatch.setattr(canonical_json, "_needs_slow_path", look)
    for job in (make_job_submitted(parameters=parameters), make_job_submitted(parameters=parameters, not_before=NOON)):
        threads.clear()
        await unstreamed_ledger.event_store.append(append_of(make_job_submitted()), append_of(job))
        assert (False not in threads) is on_loop
        assert threads.count(True) == 1 or on_loop  # that of the small one
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_content_that_is_too_large_is_refused_before_it_is_looked_at(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canonical_json, "_plain", None)
    monkeypatch.setattr(canonical_json, "_needs_slow_path", None)
    for content in ([[1.0] * 3] * 240_000, [None] * 1_000_000, ["$"] * 1_000_000):
        with pytest.raises(InvalidEvent, match=r"parameters: \d+ bytes"):
            await unstreamed_ledger.event_store.append(append_of(make_job_submitted(parameters={"a": content})))


async def test_other_tasks_run_while_much_small_content_is_encoded(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once for each 64 KiB or so, however many appends that are."""
    rounds = 0

    async def count() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    jobs = [append_of(make_job_submitted(parameters={"a": "x" * 30_000})) for _ in range(20)]
    counting = asyncio.create_task(count())
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


async def test_an_append_that_is_too_large_as_a_whole_is_refused_with_both_numbers(connection: Connection) -> None:
    large = make_job_submitted(parameters={"text": "x" * 40_000})
    async with open_ledger(connection, EventStoreLimits(max_append_bytes=100_000), with_change_stream=False) as ledger:
        with pytest.raises(InvalidEvent, match=r"3 events of 12\d{4} bytes .* 100000 bytes"):
            await ledger.event_store.append(*[append_of(large) for _ in range(3)])
        assert len(await ledger.event_store.append(*[append_of(large) for _ in range(2)])) == 2


async def test_an_append_larger_than_a_message_to_the_server_is_still_all_or_nothing(unstreamed_ledger: Ledger) -> None:
    """Its documents take four times as many bytes in BSON as in JSON: 52 MB, and a message holds 16."""
    numbers = make_job_submitted(parameters={"numbers": list(range(10, 90)) * 1000})
    taken = await unstreamed_ledger.event_store.append(append_of(make_job_submitted(), stream="job-taken"))
    many = [append_of(numbers) for _ in range(60)]
    with pytest.raises(VersionConflict):
        await unstreamed_ledger.event_store.append(*many, append_of(make_job_submitted(), stream="job-taken"))
    assert [event.stream for event in await unstreamed_ledger.event_store.read() if event.stream != VOID_STREAM] == [
        "job-taken"
    ]
    recorded = await unstreamed_ledger.event_store.append(*many)
    assert event_positions(recorded) == list(range(recorded[0].position, recorded[0].position + 60))
    assert recorded[0].position > taken[0].position
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_groups_gather_and_take_their_numbers_while_others_are_on_their_way(connection: Connection) -> None:
    async with dawdler_on(connection, EventStoreLimits(max_concurrent_writes=3, max_events_per_write=10)) as log:
        log.go_on.clear()
        appending = [
            asyncio.create_task(log.append(append_of(make_job_submitted(), stream=f"job-{n}"))) for n in range(50)
        ]
        await poll_until(lambda: log.held == [10, 10, 10])
        log.go_on.set()
        recorded = await asyncio.gather(*appending)
        assert sorted(event.position for [event] in recorded) == list(range(1, 51))
        assert log.held == [10] * 5
        check_log(await load_event_documents(log.db))


async def test_what_waiting_does_not_mend_fails_at_once(connection: Connection) -> None:
    """A validator that some administrator put on the collection stands for every lasting refusal."""
    async with open_ledger(connection, with_change_stream=False) as ledger:
        await ledger.submit_job()
        await ledger.db.command({"collMod": "events", "validator": {"type": "Nothing"}})
        async with asyncio.timeout(3):
            with pytest.raises(LedgerUnavailable, match="rejects the events: Document failed validation"):
                await ledger.submit_job()
        await ledger.db.command({"collMod": "events", "validator": {}})
        await ledger.submit_job()
        events = await read_all_events(ledger.event_store)
        assert [event.type for event in events] == ["JobSubmitted", "PositionVoided", "JobSubmitted"]


async def test_without_a_database_an_append_gives_up_at_its_deadline(mongodb_uri: str, db_name: str) -> None:
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


async def test_those_behind_in_the_queue_do_not_wait_for_the_database_in_turn(mongodb_uri: str, db_name: str) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        connection = Connection(proxy.uri, db_name, connect_timeout_ms=300)
        limits = EventStoreLimits(append_timeout_seconds=1, max_events_per_write=1, max_concurrent_writes=2)
        async with open_ledger(connection, limits, with_change_stream=False) as ledger:
            await ledger.submit_job()
            proxy.close()
            async with asyncio.timeout(4):
                answers = await asyncio.gather(*(ledger.submit_job() for _ in range(40)), return_exceptions=True)
            assert {type(answer) for answer in answers} == {LedgerUnavailable}


async def test_a_connection_that_breaks_delays_an_append_and_does_not_repeat_it(mongodb_uri: str, db_name: str) -> None:
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


# Numbers: lost, late, left behind ---------------------------------------------------------------------------------


async def test_a_lost_number_is_voided_by_whoever_reads(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.submit_job()
    lost = await create_position_gap(unstreamed_ledger.db, 3)
    await unstreamed_ledger.submit_job()
    assert await unstreamed_ledger.event_store.read(limit=10) != []
    events = await unstreamed_ledger.event_store.read(after=1)
    assert event_positions(events) == [2, 3, 4, 5]
    assert [type(event.event) for event in events[:3]] == [PositionVoided] * 3
    assert lost == 2
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_a_lost_number_at_the_end_holds_nobody_up_and_is_no_event(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.submit_job()
    await create_position_gap(unstreamed_ledger.db)
    assert event_positions(await unstreamed_ledger.event_store.read()) == [1]
    assert await unstreamed_ledger.event_store.read(after=1) == []
    assert await unstreamed_ledger.event_store.head_position() == 1


async def test_all_subscribers_of_all_processes_see_the_same_where_numbers_were_lost(connection: Connection) -> None:
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
        await ledgers[0].event_store.append(append_of(*[progress()] * 30))
        seen = await asyncio.gather(*reading)
        everything = next(events for events in seen if len(events) == 30)
        assert all(events == everything[-len(events) :] for events in seen)
        assert event_positions(everything) == list(range(1, 31))
        assert sum(event.stream == VOID_STREAM for event in everything) == 9
        check_log(await load_event_documents(ledgers[0].db))


@pytest.mark.parametrize("together", [1, 3], ids=["single event", "transaction"])
async def test_a_writer_that_was_too_slow_lands_behind_the_void_and_once(connection: Connection, together: int) -> None:
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger, dawdler_on(connection) as slow:
        late = await slow.held_up(append_of(*[progress()] * together, stream="job-late"))
        behind = await ledger.submit_job()
        assert behind.events[0].position == together + 1
        before = await read_first_events(ledger.event_store, together + 1)
        assert [event.stream for event in before] == [VOID_STREAM] * together + [behind.events[0].stream]
        slow.go_on.set()
        recorded = await asyncio.wait_for(late, DEADLINE_SECONDS)
        assert event_positions(recorded) == [together + 1 + number for number in range(1, together + 1)]
        assert await ledger.event_store.read_stream("job-late") == recorded
        assert await read_first_events(ledger.event_store, 2 * together + 1) == before + recorded
        check_log(await load_event_documents(ledger.db))


async def test_a_writer_whose_number_was_voided_may_find_its_race_lost(connection: Connection) -> None:
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger, dawdler_on(connection) as slow:
        late = await slow.held_up(append_of(progress(), stream="job-1"))
        await ledger.event_store.append(append_of(make_job_submitted(), stream="job-1"))
        await read_first_events(ledger.event_store, 2)
        slow.go_on.set()
        with pytest.raises(VersionConflict) as lost:
            await asyncio.wait_for(late, DEADLINE_SECONDS)
        assert lost.value.found == 1
        check_log(await load_event_documents(ledger.db))


async def test_a_writer_that_is_a_little_slow_keeps_its_number(connection: Connection) -> None:
    patient = EventStoreLimits(gap_timeout_seconds=DEADLINE_SECONDS)
    async with open_ledger(connection, patient) as ledger, dawdler_on(connection, patient) as slow:
        async with ledger.event_store.subscribe(after=0) as events:
            late = await slow.held_up(append_of(make_job_submitted(), stream="job-late"))
            behind = await ledger.submit_job()
            slow.go_on.set()
            assert [event.stream for event in await take_events(events, 2)] == ["job-late", behind.events[0].stream]
        assert (await late)[0].position == 1


async def test_an_earlier_hole_that_closed_does_not_shorten_the_time_of_a_later_one(connection: Connection) -> None:
    patient = EventStoreLimits(gap_timeout_seconds=0.6)
    async with (
        open_ledger(connection, patient) as ledger,
        dawdler_on(connection) as slow,
        ledger.event_store.subscribe(after=0) as events,
    ):
        late = await slow.held_up(append_of(make_job_submitted()))
        await ledger.submit_job()
        await asyncio.sleep(0.4)
        slow.go_on.set()
        await take_events(events, 2)
        await late
        late = await slow.held_up(append_of(make_job_submitted(), stream="job-late"))
        await ledger.submit_job()
        await asyncio.sleep(0.4)
        slow.go_on.set()
        assert (await take_events(events, 1))[0].stream == "job-late"
        await late


@pytest.mark.parametrize("together", [1, 3], ids=["single event", "transaction"])
async def test_a_repeated_insert_recognises_its_own_success(connection: Connection, together: int) -> None:
    async with open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False, store_class=Forgetful) as ledger:
        recorded = await ledger.event_store.append(append_of(*[progress()] * together, stream="job-1"))
        assert event_positions(recorded) == list(range(1, together + 1))
        assert await ledger.event_store.read() == recorded
        check_log(await load_event_documents(ledger.db))


async def test_a_group_that_was_written_in_part_is_completed(connection: Connection) -> None:
    async with open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False, store_class=Forgetful) as ledger:
        assert isinstance(ledger.event_store, Forgetful)
        ledger.event_store.lose_after(2)
        answers = await asyncio.gather(*(ledger.event_store.append(append_of(make_job_submitted())) for _ in range(5)))
        assert sorted(event.position for events in answers for event in events) == [1, 2, 3, 4, 5]
        assert await ledger.event_store.read() == sorted(
            (event for events in answers for event in events), key=lambda event: event.position
        )
        check_log(await load_event_documents(ledger.db))


async def test_a_success_that_nobody_heard_of_is_recognised_under_its_old_number(connection: Connection) -> None:
    """The answer was lost, and before the repetition a fail-over (or a fault) had the writer take new numbers."""

    class RenumberingAppender(ForgetfulAppender):
        async def _insert(self, todo: Sequence[Any]) -> list[Any]:
            try:
                return await super()._insert(todo)
            except AutoReconnect:
                await self._assign_positions(todo)
                raise

    class Renumbering(Forgetful):
        appender_class = RenumberingAppender

    async with open_ledger(connection, FAST_GAP_LIMITS, with_change_stream=False, store_class=Renumbering) as ledger:
        [recorded] = await ledger.event_store.append(append_of(make_job_submitted()))
        assert recorded.position == 1
        assert [event.stream for event in await ledger.event_store.read()] == [recorded.stream, VOID_STREAM]
        check_log(await load_event_documents(ledger.db))


@pytest.mark.parametrize("left_at", [None, 0, 3, 9], ids=["gone", "at 0", "in the middle", "one behind"])
async def test_a_counter_that_fell_behind_gives_nobody_a_position_before_what_it_decided_on(
    unstreamed_ledger: Ledger, left_at: int | None
) -> None:
    heads = [head_of((await unstreamed_ledger.submit_job()).events[0]) for _ in range(10)]
    streams = [event.stream for event in await unstreamed_ledger.event_store.read()]
    await unstreamed_ledger.db.counters.delete_one({"_id": "events"})
    if left_at is not None:
        await unstreamed_ledger.db.counters.insert_one({"_id": "events", "next": left_at})
    [later] = await unstreamed_ledger.event_store.append(append_of(progress(), stream=streams[9], head=heads[9]))
    assert later.position > 10
    [fresh] = await unstreamed_ledger.event_store.append(append_of(make_job_submitted()))
    assert fresh.position == later.position + 1
    two = await unstreamed_ledger.event_store.append(
        append_of(progress(), progress(), stream=streams[4], head=heads[4])
    )
    assert event_positions(two) == [fresh.position + 1, fresh.position + 2]
    check_log(await load_event_documents(unstreamed_ledger.db))


@pytest.mark.parametrize("together", [1, 2], ids=["single event", "transaction"])
async def test_a_number_that_is_still_free_is_not_used_for_what_was_decided_on_a_later_event(
    unstreamed_ledger: Ledger, together: int
) -> None:
    await unstreamed_ledger.submit_job()
    await create_position_gap(unstreamed_ledger.db, 3)
    [before] = await unstreamed_ledger.event_store.append(append_of(make_job_submitted(), stream="job-1"))
    assert before.position == 5
    await unstreamed_ledger.db.counters.update_one({"_id": "events"}, {"$set": {"next": 1}})
    after = await unstreamed_ledger.event_store.append(
        append_of(*[progress()] * together, stream="job-1", head=head_of(before))
    )
    assert event_positions(after) == [5 + number for number in range(1, together + 1)]
    await read_all_events(unstreamed_ledger.event_store)
    check_log(await load_event_documents(unstreamed_ledger.db))


async def test_a_counter_that_is_far_behind_is_set_right_and_not_counted_up(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.event_store.append(append_of(*[progress()] * 3000))
    await unstreamed_ledger.db.counters.delete_one({"_id": "events"})
    async with asyncio.timeout(2):
        [recorded] = await unstreamed_ledger.event_store.append(append_of(make_job_submitted()))
    assert recorded.position == 3001


@pytest.mark.parametrize("together", [1, 3], ids=["single event", "transaction"])
async def test_with_the_counter_behind_a_new_stream_finds_a_free_position_too(
    unstreamed_ledger: Ledger, together: int
) -> None:
    for _ in range(10):
        await unstreamed_ledger.submit_job()
    await unstreamed_ledger.db.counters.update_one({"_id": "events"}, {"$set": {"next": 4}})
    recorded = await unstreamed_ledger.event_store.append(append_of(*[progress()] * together))
    assert recorded[0].position > 10
    await unstreamed_ledger.event_store.read()
    check_log(await load_event_documents(unstreamed_ledger.db))


# Read -------------------------------------------------------------------------------------------------------------


async def test_history_is_read_in_pages(connection: Connection) -> None:
    async with open_ledger(connection, EventStoreLimits(page_events=4), with_change_stream=False) as ledger:
        recorded = await ledger.event_store.append(append_of(*[progress()] * 10, stream="job-1"))
        assert event_positions(await ledger.event_store.read()) == [1, 2, 3, 4]
        assert event_positions(await ledger.event_store.read(after=8)) == [9, 10]
        assert event_positions(await ledger.event_store.read(after=2, limit=6)) == [3, 4, 5, 6, 7, 8]
        assert await ledger.event_store.read(after=10) == await ledger.event_store.read(after=4711) == []
        assert await ledger.event_store.read_stream("job-1", after_version=7) == recorded[7:]
        assert await ledger.event_store.read_stream("job-2") == []


async def test_a_hole_before_an_old_event_is_voided_at_once(connection: Connection) -> None:
    async with open_ledger(connection, EventStoreLimits(gap_timeout_seconds=60), with_change_stream=False) as ledger:
        await create_position_gap(ledger.db)
        await ledger.event_store.append(append_of(make_job_submitted()))  # of last year, by its time
        async with asyncio.timeout(5):
            assert event_positions(await ledger.event_store.read()) == [1, 2]


async def test_a_hole_before_a_fresh_event_is_left_to_its_writer_for_a_while(connection: Connection) -> None:
    async with (
        open_ledger(connection, EventStoreLimits(gap_timeout_seconds=0.5), with_change_stream=False) as ledger,
        dawdler_on(connection) as slow,
    ):
        late = await slow.held_up(append_of(make_job_submitted(), stream="job-late"))
        behind = await ledger.submit_job()
        reading = asyncio.create_task(ledger.event_store.read())
        await asyncio.sleep(0.05)
        slow.go_on.set()
        assert [event.stream for event in await reading] == ["job-late", behind.events[0].stream]
        await late


async def test_what_happened_while_the_stream_was_closed_is_read_and_nothing_is_delivered_twice(
    unstreamed_ledger: Ledger,
) -> None:
    """The log as a listener of a change stream that brings position 4, is closed, and is opened again at 6."""
    async with unstreamed_ledger.db.client.start_session() as session:
        for _ in range(3):
            await unstreamed_ledger.submit_job()
        await unstreamed_ledger.event_store.resync(session)
        for _ in range(3):
            await unstreamed_ledger.submit_job()
        four, five, six = (await load_event_documents(unstreamed_ledger.db))[3:]
        hear(unstreamed_ledger.event_store, four)
        assert event_positions(await read_first_events(unstreamed_ledger.event_store, 1, after=3)) == [4]
        await unstreamed_ledger.event_store.resync(session)
        for document in (five, six):  # the stream begins with changes that were read already
            hear(unstreamed_ledger.event_store, document)
        for after in range(6):
            assert event_positions(
                await read_first_events(unstreamed_ledger.event_store, 6 - after, after=after)
            ) == list(range(after + 1, 7))
        await unstreamed_ledger.submit_job()
        hear(unstreamed_ledger.event_store, (await load_event_documents(unstreamed_ledger.db))[6])
        for after in range(7):
            assert event_positions(
                await read_first_events(unstreamed_ledger.event_store, 7 - after, after=after)
            ) == list(range(after + 1, 8))
        lost = await create_position_gap(unstreamed_ledger.db)
        await unstreamed_ledger.submit_job()
        hear(unstreamed_ledger.event_store, (await load_event_documents(unstreamed_ledger.db))[7])
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await load_event_documents(unstreamed_ledger.db, {"_id": lost, "stream": VOID_STREAM}):  # noqa: ASYNC110 - no stream here
                await asyncio.sleep(0.02)


def hear(log: EventStore, document: Document) -> None:
    log.on_change({"operationType": "insert", "fullDocument": document})


# Subscribe --------------------------------------------------------------------------------------------------------


async def test_history_becomes_live_without_a_gap_or_a_double_while_others_write(connection: Connection) -> None:
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
                    await ledger.event_store.append(append_of(*[progress()] * 3))

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


async def test_a_subscriber_hears_of_an_event_without_asking(ledger: Ledger) -> None:
    async with ledger.event_store.subscribe(after=0) as events:
        waiting = asyncio.create_task(take_events(events, 1))
        submitted = await ledger.submit_job()
        assert await waiting == submitted.events
        assert events.position == 1


async def test_a_subscriber_may_wait_for_a_position_that_is_far_ahead(ledger: Ledger) -> None:
    async with ledger.event_store.subscribe(after=3) as events:
        waiting = asyncio.create_task(take_events(events, 1))
        for _ in range(4):
            await ledger.submit_job()
        assert event_positions(await waiting) == [4]


async def test_a_slow_subscriber_falls_back_to_the_collection_and_misses_nothing(connection: Connection) -> None:
    async with (
        open_ledger(connection, EventStoreLimits(max_tail_events=10, page_events=7)) as ledger,
        ledger.event_store.subscribe(after=0) as slow,
        ledger.event_store.subscribe(after=0) as fast,
    ):
        await ledger.submit_job()
        assert event_positions(await take_events(slow, 1)) == [1]
        for _ in range(4):
            await ledger.event_store.append(append_of(*[progress()] * 15))
        await take_events(fast, 61)
        chunk = await slow.next_chunk(5)
        assert event_positions(chunk) == [2, 3, 4, 5, 6]
        assert event_positions(await take_events(slow, 55)) == list(range(7, 62))
        later = asyncio.gather(take_events(slow, 1), take_events(fast, 1))
        await ledger.submit_job()
        assert [event_positions(events) for events in await later] == [[62], [62]]


async def test_large_events_are_kept_and_read_a_few_at_a_time(connection: Connection) -> None:
    large = make_job_submitted(parameters={"text": "x" * 1_000_000})
    async with (
        open_ledger(connection, EventStoreLimits(max_tail_bytes=5_000_000)) as ledger,
        ledger.event_store.subscribe(after=0) as slow,
    ):
        for _ in range(40):
            await ledger.event_store.append(append_of(large))
        await read_first_events(ledger.event_store, 1, after=39)  # the change stream has brought them all
        pages = []
        async with asyncio.timeout(DEADLINE_SECONDS):
            while slow.position < 40:
                pages.append(event_positions(await slow.next_chunk()))
        assert [position for page in pages for position in page] == list(range(1, 41))
        assert max(len(page) for page in pages) <= 16  # what the server puts in one answer, 16 MB


@pytest.mark.parametrize("tail_bytes", [1, 100_000_000], ids=["of history", "of the tail"])
async def test_chunks_of_bounded_size_miss_nothing_and_fetch_nothing_ahead(
    connection: Connection, tail_bytes: int
) -> None:
    jobs = [
        make_job_submitted(parameters={"text": "x" * size})
        for size in [10] * 60 + [100_000] * 30 + [10] * 5 + [3_000_000, 10]
    ]
    async with open_ledger(connection, EventStoreLimits(max_tail_bytes=tail_bytes)) as ledger:
        await ledger.event_store.append(*[append_of(it) for it in jobs])
        await read_first_events(ledger.event_store, 1, after=len(jobs) - 1)
        async with ledger.event_store.subscribe(after=0, chunk_bytes=1_000_000) as slow:
            found: list[int] = []
            async with asyncio.timeout(DEADLINE_SECONDS):
                while slow.position < len(jobs):
                    chunk = await slow.next_chunk(500)
                    sizes = [len(it.data["parameters"]["text"]) for it in chunk]
                    assert sum(sizes) < 1_000_000 or len(sizes) == 1
                    assert slow._ahead is None
                    found += event_positions(chunk)
        assert found == list(range(1, len(jobs) + 1))


@pytest.mark.parametrize(
    "bound", [{"max_tail_events": 20}, {"max_tail_bytes": 20_000}], ids=["of so many events", "of so many bytes"]
)
async def test_while_a_hole_is_open_no_more_is_held_back_than_can_be_kept(
    connection: Connection, bound: dict[str, int]
) -> None:
    """A writer that died inside its transaction may keep a hole open for a minute, and thousands write meanwhile."""
    job = make_job_submitted(parameters={"text": "x" * 1000})
    patient = EventStoreLimits(gap_timeout_seconds=0.5, **bound)
    async with open_ledger(connection, patient) as ledger, ledger.event_store.subscribe(after=0) as events:
        await ledger.submit_job(job)
        assert event_positions(await take_events(events, 1)) == [1]
        taking = asyncio.create_task(take_events(events, 101))
        assert await create_position_gap(ledger.db) == 2
        tail, most = ledger.event_store._tail, 0
        for _ in range(100):
            await ledger.submit_job(job)
            most = max(most, len(tail._early))
        assert 0 < most <= 20
        assert event_positions(await taking) == list(range(2, 103))
        check_log(await load_event_documents(ledger.db))


@pytest.mark.parametrize("removed", [[3], [2, 3], [2], [1, 2, 3]], ids=str)
async def test_subscription_does_not_yield_events_that_were_removed(ledger: Ledger, removed: list[int]) -> None:
    for _ in range(3):
        await ledger.submit_job()
    await read_first_events(ledger.event_store, 3)
    ledger.event_store.may_have_lost_events = False
    await ledger.db.events.delete_many({"_id": {"$in": removed}})
    await poll_until(lambda: ledger.event_store.may_have_lost_events)
    await ledger.submit_job()
    found = await read_first_events(ledger.event_store, 4)
    assert [(it.position, it.type) for it in found] == [
        (it["_id"], it["type"]) for it in await load_event_documents(ledger.db)
    ]
    assert [it.position for it in found if it.type == "PositionVoided"] == removed


@pytest.mark.parametrize("place", [ObjectId(), "12", True], ids=lambda place: type(place).__name__)
async def test_what_stands_in_the_collection_and_is_no_event_stops_nobody(connection: Connection, place: Any) -> None:
    """Somebody mistook the collection for another, say. `log verify` names it."""
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger, ledger.event_store.subscribe(after=0) as events:
        await ledger.submit_job()
        await ledger.db.events.insert_one({"_id": place, "note": "hello", "stream": "x"})
        await ledger.submit_job()
        assert event_positions(await take_events(events, 2)) == [1, 2]
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger:
        await ledger.submit_job()
        assert await ledger.event_store.head_position() == 3
        assert event_positions(await read_first_events(ledger.event_store, 2)) == [1, 2]


async def test_a_chunk_holds_at_most_what_was_asked_for(ledger: Ledger) -> None:
    await ledger.event_store.append(append_of(*[progress()] * 25))
    async with ledger.event_store.subscribe(after=0) as events, asyncio.timeout(DEADLINE_SECONDS):
        sizes = []
        while events.position < 25:
            sizes.append(len(await events.next_chunk(10)))
    assert max(sizes) <= 10
    assert sum(sizes) == 25


async def test_only_the_wanted_types_are_delivered_and_the_position_goes_on(ledger: Ledger) -> None:
    async with ledger.event_store.subscribe(after=0, types=[JobClaimed]) as events:
        waiting = asyncio.create_task(events.next_chunk())
        for _ in range(3):
            await ledger.submit_job()
        submitted = await ledger.submit_job()
        job_id = submitted.events[0].stream
        claimed = await handle_command(
            ledger.event_store, job_id, ClaimJob("w1", NOON), meta=EVENT_METADATA, stream_state=submitted.stream_state
        )
        assert await asyncio.wait_for(waiting, DEADLINE_SECONDS) == claimed.events
        assert events.position == 5
    async with ledger.event_store.subscribe(after=0, types=[JobSubmitted]) as history:
        assert event_positions(await take_events(history, 4)) == [1, 2, 3, 4]


async def test_a_subscriber_that_is_cancelled_leaves_the_others_and_itself_in_order(ledger: Ledger) -> None:
    async with ledger.event_store.subscribe(after=0) as events, ledger.event_store.subscribe(after=0) as others:
        for _ in range(3):
            waiting = asyncio.create_task(events.next_chunk())
            await asyncio.sleep(0)
            waiting.cancel()
            with pytest.raises(asyncio.CancelledError):
                await waiting
            submitted = await ledger.submit_job()
            assert await take_events(others, 1) == await take_events(events, 1) == submitted.events


async def test_whoever_is_cancelled_after_the_next_page_was_asked_for_has_not_moved_on(connection: Connection) -> None:
    async with open_ledger(connection, EventStoreLimits(max_tail_events=1)) as ledger:
        await ledger.event_store.append(append_of(*[progress()] * 60))
        await read_first_events(ledger.event_store, 1, after=59)
        async with ledger.event_store.subscribe(after=0) as events, asyncio.timeout(DEADLINE_SECONDS):
            seen: list[RecordedEvent] = []
            cancelled = 0
            while len(seen) < 60:
                taking = asyncio.create_task(events.next_chunk(4))
                while not taking.done() and (events._ahead is None or events._ahead[0] == events.position):  # noqa: ASYNC110 - it lasts one turn of the loop
                    await asyncio.sleep(0)
                taking.cancel()
                with suppress(asyncio.CancelledError):
                    seen += await taking
                cancelled += taking.cancelled()
                if len(seen) < 60:
                    seen += await events.next_chunk(4)
        assert event_positions(seen) == list(range(1, 61))
        assert cancelled > 0


async def test_cancelling_in_the_middle_of_history_loses_nothing(connection: Connection) -> None:
    pauses = cycle([0, 0.0005, 0.001, 0.002, 0.005, 0.1])
    seen: list[RecordedEvent] = []
    cancelled = 0
    async with (
        open_ledger(connection, EventStoreLimits(max_tail_events=10)) as ledger,
        asyncio.timeout(DEADLINE_SECONDS),
    ):
        await ledger.event_store.append(append_of(*[progress()] * 500))
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


@pytest.mark.parametrize("how", ["killCursors", "killOp"])
async def test_a_change_stream_that_is_killed_is_opened_again_and_nothing_is_lost(ledger: Ledger, how: str) -> None:
    async with ledger.event_store.subscribe(after=0) as events:
        for round_ in range(3):
            await ledger.submit_job()
            await take_events(events, 1)
            await kill_change_stream(ledger.db, how)
            lost = await create_position_gap(ledger.db)
            submitted = await asyncio.gather(*(ledger.submit_job() for _ in range(5)))
            expected = {lost} | {answer.events[0].position for answer in submitted}
            assert set(event_positions(await take_events(events, 6))) == expected
            assert events.position == (round_ + 1) * 7


async def kill_change_stream(db: Database, how: str) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            for operation in await change_stream_operations(db):
                if how == "killCursors":
                    cursor = operation["cursor"]["cursorId"]
                    killed = await db.command({"killCursors": "$cmd.aggregate", "cursors": [cursor]})
                    if killed["cursorsKilled"]:
                        return
                elif operation["type"] == "op":
                    await db.client.admin.command({"killOp": 1, "op": operation["opid"]})
                    return


async def test_a_broken_connection_costs_a_subscriber_nothing_but_time(mongodb_uri: str, db_name: str) -> None:
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


async def test_closing_while_a_hole_is_being_filled_leaves_nothing_behind(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    filling = asyncio.Event()

    async def stick(_appender: Appender, _positions: Iterable[int]) -> None:
        filling.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Appender, "void_positions", stick)
    async with open_ledger(connection, EventStoreLimits(gap_timeout_seconds=0.05)) as ledger:
        await create_position_gap(ledger.db)
        await ledger.submit_job()
        await asyncio.wait_for(filling.wait(), DEADLINE_SECONDS)
        await ledger.event_store.aclose()
        names = {task.get_name() for task in asyncio.all_tasks()}
        assert "fill-gaps" not in names
        await asyncio.sleep(0.15)
        assert "fill-gaps" not in {task.get_name() for task in asyncio.all_tasks()}


@pytest.fixture
async def short_transactions(connection: Connection) -> AsyncIterator[None]:
    """The server ends transactions that are left open after a second, not a minute."""
    async with connection.client() as client:
        before = await client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        await client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": 1})
        yield
        seconds = before["transactionLifetimeLimitSeconds"]
        await client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": seconds})


@pytest.mark.usefixtures("short_transactions")
async def test_a_transaction_left_open_by_a_killed_writer_holds_readers_up_only_until_the_server_ends_it(
    connection: Connection,
) -> None:
    async with open_ledger(connection, FAST_GAP_LIMITS) as ledger, connection.client() as dead:
        lost = await create_position_gap(ledger.db)
        session = dead.start_session()
        await session.start_transaction()
        document = {"_id": lost, "stream": "job-dead", "version": 1}
        await dead[connection.db_name].events.insert_one(document, session=session)
        await ledger.submit_job()
        assert [event.type for event in await read_first_events(ledger.event_store, 2)] == [
            "PositionVoided",
            "JobSubmitted",
        ]
        check_log(await load_event_documents(ledger.db))
