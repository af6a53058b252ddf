"""A state machine that uses an event store from several processes and injects faults."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Coroutine, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from jobledger.ledger.domain.errors import LedgerUnavailable, VersionConflict
from jobledger.ledger.domain.events import JobProgressed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.envelope import VOID_STREAM, StreamAppend, StreamHead
from jobledger.ledger.store.subscription import Subscription
from tests.support.event_examples import NOON
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    change_stream_operations,
    check_log,
    create_position_gap,
    load_event_documents,
    open_ledger,
    read_all_events,
)
from tests.support.message_proxy import MessageProxy

STEP_TIMEOUT_SECONDS = 15.0
DEFAULT_LIMITS = EventStoreLimits(gap_timeout_seconds=0.05, page_events=7, max_tail_events=10)
NO_RETRY_LIMITS = EventStoreLimits(
    append_timeout_seconds=0.0
)  # fails after the first error, because a crashed process does not retry
MAX_PROCESSES = 3

CRASH_POINTS = (
    (1, "insert", "before"),
    (1, "insert", "after"),
    (3, "insert", "before"),
    (3, "insert", "after"),
    (3, "commitTransaction", "before"),
    (3, "commitTransaction", "after"),
    (2, "findAndModify", "after"),
)
DURABLE_CRASH_POINTS = ((1, "insert", "after"), (3, "commitTransaction", "after"))
PAUSE_POINTS = (
    *[(1, "insert"), (3, "insert")] * 3,
    (2, "commitTransaction"),
)  # the last one delays all others by a second or two

T = TypeVar("T")
indexes = st.integers(0, 1000)  # taken modulo the number of items
counts = st.integers(1, 3)


class Subscriber:
    """Takes events from a subscription, up to `at_a_time` per chunk, while a step runs."""

    def __init__(self, subscription: Subscription, at_a_time: int) -> None:
        self.start_position = subscription.position
        self.delivered: list[RecordedEvent] = []
        self.task = asyncio.create_task(self._follow(subscription, at_a_time))

    async def _follow(self, subscription: Subscription, at_a_time: int) -> None:
        while True:
            with suppress(LedgerUnavailable):  # the connection broke while it read history
                self.delivered += await subscription.read_chunk(at_a_time)
            await asyncio.sleep(0)

    async def wait_until_reached(self, position: int) -> None:
        while self.start_position + len(self.delivered) < position:
            assert not self.task.done(), self.task
            await asyncio.sleep(0.002)

    async def stop(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@dataclass
class Process:
    """The event store of one process, and its subscribers."""

    ledger: Ledger
    proxy: MessageProxy
    stack: AsyncExitStack
    subscribers: list[Subscriber] = field(default_factory=list)

    async def subscribe(self, *, after: int, at_a_time: int) -> Subscriber:
        subscription = await self.stack.enter_async_context(self.ledger.event_store.subscribe(after=after))
        subscriber = Subscriber(subscription, at_a_time)
        self.stack.push_async_callback(subscriber.stop)
        self.subscribers.append(subscriber)
        return subscriber


@dataclass
class PausedAppend:
    """An append whose request the proxy holds."""

    appends: Sequence[StreamAppend]
    task: asyncio.Task[list[RecordedEvent]]


class EventStoreMachine(RuleBasedStateMachine):
    """Each rule is one step. The model has the events of each stream, and the positions that were acknowledged."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.connection = Connection(uri, f"test_{uuid4().hex[:16]}")
        self.runner = asyncio.Runner()
        self.numbers = count(1)
        self.streams: dict[str, list[str]] = {}
        """The messages of each stream's events, in order. Each message is unique."""
        self.acknowledged: dict[str, int] = {}
        """The position of each acknowledged event, by message."""
        self.processes: list[Process] = []
        self.all_subscribers: list[Subscriber] = []
        self.paused: PausedAppend | None = None

    # Helpers ------------------------------------------------------------------------------------------------------

    def run_step(self, step: Coroutine[Any, Any, T]) -> T:
        async def run_with_timeout() -> T:
            async with asyncio.timeout(STEP_TIMEOUT_SECONDS):
                return await step

        return self.runner.run(run_with_timeout())

    async def start_process(self, *, limits: EventStoreLimits = DEFAULT_LIMITS, live: bool = True) -> Process:
        stack = AsyncExitStack()
        proxy = stack.enter_context(MessageProxy(self.connection.uri))
        ledger = await stack.enter_async_context(
            open_ledger(Connection(proxy.uri, self.connection.db_name), limits, with_change_stream=live)
        )
        return Process(ledger, proxy, stack)

    async def add_process(self) -> None:
        self.processes.append(await self.start_process())
        self.all_subscribers.append(await self.processes[-1].subscribe(after=0, at_a_time=1000))

    def process(self, number: int) -> Process:
        return self.processes[number % len(self.processes)]

    def stream(self, number: int) -> str:
        """Return an existing stream or a new one."""
        existing = sorted(self.streams)
        return existing[number % len(existing)] if existing and number % 3 else f"job-{next(self.numbers)}"

    def events(self, length: int) -> list[JobProgressed]:
        messages = [f"message {next(self.numbers)}" for _ in range(length)]
        return [JobProgressed(attempt=1, step="page", percent=0, message=message) for message in messages]

    async def build_append(self, stream: str, length: int) -> StreamAppend:
        existing = await self.processes[0].ledger.event_store.read_stream(stream)
        head = StreamHead(existing[-1].version, existing[-1].position, existing[-1].hash) if existing else StreamHead()
        assert head.version == len(self.streams.get(stream, []))
        return StreamAppend(stream, head, self.events(length), EVENT_METADATA, NOON)

    def record_stored(self, append: StreamAppend) -> None:
        self.streams.setdefault(append.stream, []).extend(get_messages(append))

    def record_acknowledged(self, appends: Sequence[StreamAppend], recorded: Sequence[RecordedEvent]) -> None:
        recorded_messages = [(event.stream, event.data["message"]) for event in recorded]
        assert recorded_messages == [(append.stream, message) for append in appends for message in get_messages(append)]
        first = recorded[0].position
        assert [event.position for event in recorded] == list(range(first, first + len(recorded)))
        for append in appends:
            assert first > append.head.position
            self.record_stored(append)
        self.acknowledged |= {event.data["message"]: event.position for event in recorded}

    async def expect_conflict(self, stream: str, appending: Awaitable[Any], *, expected: int) -> None:
        with pytest.raises(VersionConflict) as conflict:
            await appending
        found = len(self.streams[stream])
        assert (conflict.value.stream, conflict.value.expected, conflict.value.found) == (stream, expected, found)

    # Steps --------------------------------------------------------------------------------------------------------

    @initialize()
    def start_two_processes(self) -> None:
        async def start_process() -> None:
            for _ in range(2):
                await self.add_process()
            self.crashing_process = await self.start_process(limits=NO_RETRY_LIMITS, live=False)
            self.pausing_process = await self.start_process(live=False)

        self.run_step(start_process())

    @rule(process=indexes, stream=indexes, length=counts)
    def append(self, process: int, stream: int, length: int) -> None:
        async def run() -> None:
            append = await self.build_append(self.stream(stream), length)
            self.record_acknowledged([append], await self.process(process).ledger.event_store.append(append))

        self.run_step(run())

    @rule(process=indexes, streams=st.lists(indexes, min_size=2, max_size=4))
    def append_to_several_streams(self, process: int, streams: list[int]) -> None:
        async def run() -> None:
            appends = [await self.build_append(stream, 1) for stream in {self.stream(stream) for stream in streams}]
            self.record_acknowledged(appends, await self.process(process).ledger.event_store.append(*appends))

        self.run_step(run())

    @rule(processes=st.lists(indexes, min_size=2, max_size=12))
    def append_concurrently(self, processes: list[int]) -> None:
        async def run() -> None:
            appends = [
                StreamAppend(f"job-{next(self.numbers)}", StreamHead(), self.events(1), EVENT_METADATA, NOON)
                for _ in processes
            ]
            appending = (
                self.process(process).ledger.event_store.append(append)
                for process, append in zip(processes, appends, strict=True)
            )
            for append, recorded in zip(appends, await asyncio.gather(*appending), strict=True):
                self.record_acknowledged([append], recorded)

        self.run_step(run())

    @precondition(lambda self: self.streams)
    @rule(process=indexes, stream=indexes, behind=counts, length=counts, with_other_stream=st.booleans())
    def append_with_stale_head(
        self, process: int, stream: int, behind: int, length: int, with_other_stream: bool
    ) -> None:
        name = sorted(self.streams)[stream % len(self.streams)]
        stale_head = StreamHead(version=max(0, len(self.streams[name]) - behind))
        appends = [StreamAppend(name, stale_head, self.events(length), EVENT_METADATA, NOON)]
        if with_other_stream:
            appends.insert(
                0, StreamAppend(f"job-{next(self.numbers)}", StreamHead(), self.events(1), EVENT_METADATA, NOON)
            )
        event_store = self.process(process).ledger.event_store
        self.run_step(self.expect_conflict(name, event_store.append(*appends), expected=stale_head.version))

    @rule(stream=indexes, processes=st.lists(indexes, min_size=2, max_size=5), length=counts)
    def race_for_a_version(self, stream: int, processes: list[int], length: int) -> None:
        async def run() -> None:
            first = await self.build_append(self.stream(stream), length)
            appends = [first] + [
                StreamAppend(first.stream, first.head, self.events(length), EVENT_METADATA, NOON) for _ in processes[1:]
            ]
            results = await asyncio.gather(
                *(
                    self.process(process).ledger.event_store.append(append)
                    for process, append in zip(processes, appends, strict=True)
                ),
                return_exceptions=True,
            )
            [winner] = [index for index, result in enumerate(results) if isinstance(result, list)]
            recorded = results.pop(winner)
            assert isinstance(recorded, list)
            self.record_acknowledged([appends[winner]], recorded)
            found = first.head.version + length
            assert [getattr(result, "found", result) for result in results] == [found] * len(results)

        self.run_step(run())

    @rule(length=counts)
    def leave_position_gap(self, length: int) -> None:
        self.run_step(create_position_gap(self.processes[0].ledger.db, length))

    @rule(
        stream=indexes,
        crash_point=st.sampled_from(CRASH_POINTS),
    )
    def crash_during_append(self, stream: int, crash_point: tuple[int, str, str]) -> None:
        """Crash before or after the server has run the command. No client receives the reply or retries."""
        length, command, when = crash_point

        async def run() -> None:
            append = await self.build_append(self.stream(stream), length)
            drop = (
                self.crashing_process.proxy.drop_request
                if when == "before"
                else self.crashing_process.proxy.drop_response
            )
            drop(command)
            with pytest.raises(LedgerUnavailable):
                await self.crashing_process.ledger.event_store.append(append)
            drop(command, 0)
            existing = await self.processes[0].ledger.event_store.read_stream(
                append.stream, after_version=append.head.version
            )
            if existing:  # not certain: the position may have been taken
                assert crash_point in DURABLE_CRASH_POINTS
                assert [event.data["message"] for event in existing] == get_messages(append)
                self.record_stored(append)

        self.run_step(run())

    @rule(
        process=indexes,
        stream=indexes,
        length=counts,
        command=st.sampled_from(["insert", "commitTransaction", "findAndModify"]),
        lost_part=st.sampled_from(["request", "response"]),
        times=counts,
    )
    def append_over_lossy_connection(
        self, process: int, stream: int, length: int, command: str, lost_part: str, times: int
    ) -> None:
        async def run() -> None:
            append = await self.build_append(self.stream(stream), length)
            proxy = self.process(process).proxy
            (proxy.drop_request if lost_part == "request" else proxy.drop_response)(command, times)
            recorded = await self.process(process).ledger.event_store.append(append)
            (proxy.drop_request if lost_part == "request" else proxy.drop_response)(command, 0)
            self.record_acknowledged([append], recorded)

        self.run_step(run())

    @precondition(lambda self: self.paused is None)
    @rule(stream=indexes, new=st.booleans(), paused=st.sampled_from(PAUSE_POINTS))
    def pause_append(self, stream: int, new: bool, paused: tuple[int, str]) -> None:
        """Pause an append after it reserved a position, or before its commit. All other processes continue."""
        length, command = paused

        async def run() -> None:
            # The transaction locks its stream. Other appends to it wait until the server aborts the transaction.
            name = f"job-{next(self.numbers)}" if new or command != "insert" else self.stream(stream)
            append = await self.build_append(name, length)
            self.pausing_process.proxy.hold_request(command)
            self.paused = PausedAppend(
                [append], asyncio.create_task(self.pausing_process.ledger.event_store.append(append))
            )
            assert await asyncio.to_thread(self.pausing_process.proxy.message_held.wait, STEP_TIMEOUT_SECONDS)

        self.run_step(run())

    @precondition(lambda self: self.paused is not None)
    @rule()
    def resume_append(self) -> None:
        paused = self.paused
        assert paused
        self.paused = None

        async def run() -> None:
            self.pausing_process.proxy.release_request()
            [append] = paused.appends
            if len(self.streams.get(append.stream, [])) > append.head.version:
                await self.expect_conflict(append.stream, paused.task, expected=append.head.version)
            else:
                self.record_acknowledged(paused.appends, await paused.task)

        self.run_step(run())

    @rule(by=st.integers(1, 10))
    def lower_counter(self, by: int) -> None:
        """Lower the counter, as in a failover to a primary that lacks the last increments."""

        async def run() -> None:
            counters = self.processes[0].ledger.db.counters
            await counters.update_one(
                {"_id": "events"}, [{"$set": {"next": {"$max": [0, {"$subtract": ["$next", by]}]}}}]
            )

        self.run_step(run())

    @rule(process=indexes, stream=indexes, conflict=counts, length=counts)
    def append_with_free_smaller_positions(self, process: int, stream: int, conflict: int, length: int) -> None:
        """Leave a gap, append after it, and let the counter assign the gap's positions again, as after a failover."""

        async def run() -> None:
            log, counters = self.process(process).ledger.event_store, self.processes[0].ledger.db.counters
            first_free = await create_position_gap(self.processes[0].ledger.db, conflict)
            append = await self.build_append(self.stream(stream), 1)
            self.record_acknowledged([append], await log.append(append))
            await counters.update_one({"_id": "events"}, {"$set": {"next": first_free - 1}})
            append = await self.build_append(append.stream, length)
            self.record_acknowledged([append], await log.append(append))

        self.run_step(run())

    @rule(process=indexes)
    def break_connection(self, process: int) -> None:
        self.process(process).proxy.close_connections()

    @rule(process=indexes)
    def kill_change_stream(self, process: int) -> None:
        async def run() -> None:
            db = self.processes[0].ledger.db
            operations = await change_stream_operations(db)
            cursors = [operation["cursor"]["cursorId"] for operation in operations]
            if cursors:
                await db.command({"killCursors": "$cmd.aggregate", "cursors": [cursors[process % len(cursors)]]})

        self.run_step(run())

    @rule(process=indexes)
    def replace_process(self, process: int) -> None:
        async def run() -> None:
            await self.add_process()
            if len(self.processes) > MAX_PROCESSES:
                ended = self.processes.pop(process % MAX_PROCESSES)
                await ended.stack.aclose()

        self.run_step(run())

    @rule(process=indexes)
    def read_everything(self, process: int) -> None:
        async def run() -> None:
            all_events = await read_all_events(self.process(process).ledger.event_store)
            assert [event.position for event in all_events] == list(range(1, len(all_events) + 1))

        self.run_step(run())

    @rule(process=indexes, after=indexes, at_a_time=st.integers(1, 10))
    def add_subscriber(self, process: int, after: int, at_a_time: int) -> None:
        async def run() -> None:
            start_process = after % (await self.processes[0].ledger.event_store.read_head_position() + 1)
            self.all_subscribers.append(await self.process(process).subscribe(after=start_process, at_a_time=at_a_time))

        self.run_step(run())

    @rule()
    def wait_for_subscribers(self) -> None:
        async def run() -> None:
            await self.wait_until_all_reach(await self.processes[0].ledger.event_store.read_head_position())

        self.run_step(run())

    async def wait_until_all_reach(self, position: int) -> None:
        current_subscribers = [subscriber for process in self.processes for subscriber in process.subscribers]
        await asyncio.gather(*(subscriber.wait_until_reached(position) for subscriber in current_subscribers))

    # Invariants ---------------------------------------------------------------------------------------------------

    @invariant()
    def log_matches_model(self) -> None:
        if self.processes:
            self.check_streams(self.run_step(load_event_documents(self.processes[0].ledger.db)))

    def check_streams(self, documents: Sequence[Document]) -> None:
        streams: dict[str, list[str]] = {}
        positions = {}
        for document in documents:
            if document["stream"] != VOID_STREAM:
                message = document["data"]["message"]
                streams.setdefault(document["stream"], []).append(message)
                positions[message] = document["_id"]
        assert streams == self.streams
        assert {message: positions[message] for message in self.acknowledged} == self.acknowledged

    def teardown(self) -> None:
        try:
            if self.processes:
                self.check_final_log()
        finally:
            self.run_step(self.stop())
            self.runner.close()

    def check_final_log(self) -> None:
        if self.paused:
            self.resume_append()

        async def run() -> None:
            [append] = [await self.build_append("job-last", 1)]
            self.record_acknowledged([append], await self.processes[0].ledger.event_store.append(append))
            # Check subscribers before any read, which would fill gaps for them.
            await self.wait_until_all_reach(self.acknowledged[get_messages(append)[0]])
            log = await read_all_events(self.processes[0].ledger.event_store)
            documents = await load_event_documents(self.processes[0].ledger.db)
            check_log(documents)
            self.check_streams(documents)
            assert [event.event_id for event in log] == [document["event_id"] for document in documents]
            for subscriber in self.all_subscribers:
                start_position = subscriber.start_position
                assert subscriber.delivered == log[start_position : start_position + len(subscriber.delivered)]

        self.run_step(run())

    async def stop(self) -> None:
        if self.processes:
            for process in (*self.processes, self.crashing_process, self.pausing_process):
                await process.stack.aclose()
            async with self.connection.create_client() as client:
                await client.drop_database(self.connection.db_name)


def get_messages(append: StreamAppend) -> list[str]:
    return [event.message for event in append.events if isinstance(event, JobProgressed)]
