"""The log under whatever can happen to it, in any order: what was acknowledged stays, and everybody sees the same.

Hypothesis makes up the stories; several processes (each a client of its own behind a wire that loses messages) act in
them against a real server. JOBLEDGER_EXAMPLES=1000 lets it run for longer.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Coroutine, Iterator, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from itertools import count
from typing import Any, TypeVar
from uuid import uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from pymongo import MongoClient

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

EXAMPLES = int(os.environ.get("JOBLEDGER_EXAMPLES", "12"))
STEPS = 30
PATIENCE_SECONDS = 15.0
LIVE = EventStoreLimits(gap_timeout_seconds=0.05, page_events=7, max_tail_events=10)
DYING = EventStoreLimits(
    append_timeout_seconds=0.0
)  # gives up after the first failure: nothing is done after a crash either
MOST_PROCESSES = 3

DEATHS = (
    (1, "insert", "before"),
    (1, "insert", "after"),
    (3, "insert", "before"),
    (3, "insert", "after"),
    (3, "commitTransaction", "before"),
    (3, "commitTransaction", "after"),
    (2, "findAndModify", "after"),
)
SUCCEEDED = ((1, "insert", "after"), (3, "commitTransaction", "after"))
STOPS = (*[(1, "insert"), (3, "insert")] * 3, (2, "commitTransaction"))  # the last costs all others a second or two

T = TypeVar("T")
which = st.integers(0, 1000)  # of so many as there are
few = st.integers(1, 3)


class Subscriber:
    """Takes what a subscription has, so many events at a time, whenever the story lets time pass."""

    def __init__(self, subscription: Subscription, at_a_time: int) -> None:
        self.begun = subscription.position
        self.delivered: list[RecordedEvent] = []
        self.following = asyncio.create_task(self._follow(subscription, at_a_time))

    async def _follow(self, subscription: Subscription, at_a_time: int) -> None:
        while True:
            with suppress(LedgerUnavailable):  # its connection was broken while it read history
                self.delivered += await subscription.next_chunk(at_a_time)
            await asyncio.sleep(0)

    async def reaches(self, position: int) -> None:
        while self.begun + len(self.delivered) < position:
            assert not self.following.done(), self.following
            await asyncio.sleep(0.002)

    async def end(self) -> None:
        self.following.cancel()
        await asyncio.wait([self.following])


@dataclass
class Process:
    """What one process has of the log, and whoever subscribes in it."""

    ledger: Ledger
    wire: MessageProxy
    stack: AsyncExitStack
    subscribers: list[Subscriber] = field(default_factory=list)

    async def subscribe(self, *, after: int, at_a_time: int) -> Subscriber:
        subscription = await self.stack.enter_async_context(self.ledger.event_store.subscribe(after=after))
        subscriber = Subscriber(subscription, at_a_time)
        self.stack.push_async_callback(subscriber.end)
        self.subscribers.append(subscriber)
        return subscriber


@dataclass
class Held:
    """An append whose message is held on the wire."""

    appends: Sequence[StreamAppend]
    task: asyncio.Task[list[RecordedEvent]]


class Story(RuleBasedStateMachine):
    """Each rule is something that happens. The model: what each stream must hold, and where, as far as was told."""

    def __init__(self, uri: str) -> None:
        super().__init__()
        self.connection = Connection(uri, f"test_{uuid4().hex[:16]}")
        self.runner = asyncio.Runner()
        self.numbers = count(1)
        self.streams: dict[str, list[str]] = {}
        """The words of each stream's events, in order. No two events have the same word."""
        self.acknowledged: dict[str, int] = {}
        """Where an event is, by its word."""
        self.processes: list[Process] = []
        self.everybody: list[Subscriber] = []
        self.held: Held | None = None

    # How stories are told -----------------------------------------------------------------------------------------

    def happens(self, what: Coroutine[Any, Any, T]) -> T:
        async def in_time() -> T:
            async with asyncio.timeout(PATIENCE_SECONDS):
                return await what

        return self.runner.run(in_time())

    async def begin(self, *, limits: EventStoreLimits = LIVE, live: bool = True) -> Process:
        stack = AsyncExitStack()
        wire = stack.enter_context(MessageProxy(self.connection.uri))
        ledger = await stack.enter_async_context(
            open_ledger(Connection(wire.uri, self.connection.db_name), limits, with_change_stream=live)
        )
        return Process(ledger, wire, stack)

    async def another_process(self) -> None:
        self.processes.append(await self.begin())
        self.everybody.append(await self.processes[-1].subscribe(after=0, at_a_time=1000))

    def process(self, number: int) -> Process:
        return self.processes[number % len(self.processes)]

    def stream(self, number: int) -> str:
        """One that is there, or a new one."""
        there = sorted(self.streams)
        return there[number % len(there)] if there and number % 3 else f"job-{next(self.numbers)}"

    def events(self, length: int) -> list[JobProgressed]:
        words = [f"word {next(self.numbers)}" for _ in range(length)]
        return [JobProgressed(attempt=1, step="page", percent=0, message=word) for word in words]

    async def append_to(self, stream: str, length: int) -> StreamAppend:
        there = await self.processes[0].ledger.event_store.read_stream(stream)
        head = StreamHead(there[-1].version, there[-1].position, there[-1].hash) if there else StreamHead()
        assert head.version == len(self.streams.get(stream, []))
        return StreamAppend(stream, head, self.events(length), EVENT_METADATA, NOON)

    def is_there(self, append: StreamAppend) -> None:
        self.streams.setdefault(append.stream, []).extend(words_of(append))

    def is_acknowledged(self, appends: Sequence[StreamAppend], recorded: Sequence[RecordedEvent]) -> None:
        told = [(event.stream, event.data["message"]) for event in recorded]
        assert told == [(append.stream, word) for append in appends for word in words_of(append)]
        first = recorded[0].position
        assert [event.position for event in recorded] == list(range(first, first + len(recorded)))
        for append in appends:
            assert first > append.head.position
            self.is_there(append)
        self.acknowledged |= {event.data["message"]: event.position for event in recorded}

    async def loses(self, stream: str, appending: Awaitable[Any], *, expected: int) -> None:
        with pytest.raises(VersionConflict) as lost:
            await appending
        found = len(self.streams[stream])
        assert (lost.value.stream, lost.value.expected, lost.value.found) == (stream, expected, found)

    # What happens -------------------------------------------------------------------------------------------------

    @initialize()
    def two_processes_begin(self) -> None:
        async def begin() -> None:
            for _ in range(2):
                await self.another_process()
            self.dying = await self.begin(limits=DYING, live=False)
            self.slow = await self.begin(live=False)

        self.happens(begin())

    @rule(process=which, stream=which, length=few)
    def append(self, process: int, stream: int, length: int) -> None:
        async def happen() -> None:
            append = await self.append_to(self.stream(stream), length)
            self.is_acknowledged([append], await self.process(process).ledger.event_store.append(append))

        self.happens(happen())

    @rule(process=which, streams=st.lists(which, min_size=2, max_size=4))
    def append_to_several_streams(self, process: int, streams: list[int]) -> None:
        async def happen() -> None:
            appends = [await self.append_to(stream, 1) for stream in {self.stream(stream) for stream in streams}]
            self.is_acknowledged(appends, await self.process(process).ledger.event_store.append(*appends))

        self.happens(happen())

    @rule(processes=st.lists(which, min_size=2, max_size=12))
    def append_side_by_side(self, processes: list[int]) -> None:
        async def happen() -> None:
            appends = [
                StreamAppend(f"job-{next(self.numbers)}", StreamHead(), self.events(1), EVENT_METADATA, NOON)
                for _ in processes
            ]
            appending = (
                self.process(process).ledger.event_store.append(append)
                for process, append in zip(processes, appends, strict=True)
            )
            for append, recorded in zip(appends, await asyncio.gather(*appending), strict=True):
                self.is_acknowledged([append], recorded)

        self.happens(happen())

    @precondition(lambda self: self.streams)
    @rule(process=which, stream=which, behind=few, length=few, together=st.booleans())
    def append_on_old_knowledge(self, process: int, stream: int, behind: int, length: int, together: bool) -> None:
        name = sorted(self.streams)[stream % len(self.streams)]
        old = StreamHead(version=max(0, len(self.streams[name]) - behind))
        appends = [StreamAppend(name, old, self.events(length), EVENT_METADATA, NOON)]
        if together:
            appends.insert(
                0, StreamAppend(f"job-{next(self.numbers)}", StreamHead(), self.events(1), EVENT_METADATA, NOON)
            )
        log = self.process(process).ledger.event_store
        self.happens(self.loses(name, log.append(*appends), expected=old.version))

    @rule(stream=which, processes=st.lists(which, min_size=2, max_size=5), length=few)
    def race_for_a_version(self, stream: int, processes: list[int], length: int) -> None:
        async def happen() -> None:
            first = await self.append_to(self.stream(stream), length)
            appends = [first] + [
                StreamAppend(first.stream, first.head, self.events(length), EVENT_METADATA, NOON) for _ in processes[1:]
            ]
            answers = await asyncio.gather(
                *(
                    self.process(process).ledger.event_store.append(append)
                    for process, append in zip(processes, appends, strict=True)
                ),
                return_exceptions=True,
            )
            [winner] = [index for index, answer in enumerate(answers) if isinstance(answer, list)]
            recorded = answers.pop(winner)
            assert isinstance(recorded, list)
            self.is_acknowledged([appends[winner]], recorded)
            found = first.head.version + length
            assert [getattr(answer, "found", answer) for answer in answers] == [found] * len(answers)

        self.happens(happen())

    @rule(length=few)
    def die_with_a_number(self, length: int) -> None:
        self.happens(create_position_gap(self.processes[0].ledger.db, length))

    @rule(
        stream=which,
        death=st.sampled_from(DEATHS),
    )
    def die_while_appending(self, stream: int, death: tuple[int, str, str]) -> None:
        """Before or after the server did it; nobody is there any more to hear the answer, or to try again."""
        length, command, when = death

        async def happen() -> None:
            append = await self.append_to(self.stream(stream), length)
            loses = self.dying.wire.drop_request if when == "before" else self.dying.wire.drop_response
            loses(command)
            with pytest.raises(LedgerUnavailable):
                await self.dying.ledger.event_store.append(append)
            loses(command, 0)
            there = await self.processes[0].ledger.event_store.read_stream(
                append.stream, after_version=append.head.version
            )
            if there:  # not for sure: the server may have refused its number
                assert death in SUCCEEDED
                assert [event.data["message"] for event in there] == words_of(append)
                self.is_there(append)

        self.happens(happen())

    @rule(
        process=which,
        stream=which,
        length=few,
        command=st.sampled_from(["insert", "commitTransaction", "findAndModify"]),
        losing=st.sampled_from(["request", "answer"]),
        times=few,
    )
    def append_over_a_bad_wire(
        self, process: int, stream: int, length: int, command: str, losing: str, times: int
    ) -> None:
        async def happen() -> None:
            append = await self.append_to(self.stream(stream), length)
            wire = self.process(process).wire
            (wire.drop_request if losing == "request" else wire.drop_response)(command, times)
            recorded = await self.process(process).ledger.event_store.append(append)
            (wire.drop_request if losing == "request" else wire.drop_response)(command, 0)
            self.is_acknowledged([append], recorded)

        self.happens(happen())

    @precondition(lambda self: self.held is None)
    @rule(stream=which, new=st.booleans(), held=st.sampled_from(STOPS))
    def begin_to_append_and_stop(self, stream: int, new: bool, held: tuple[int, str]) -> None:
        """Between the number and the insert, or before the commit; all the others go on."""
        length, command = held

        async def happen() -> None:
            # The transaction holds its stream: whoever wants to append there has to wait for the server to end it.
            name = f"job-{next(self.numbers)}" if new or command != "insert" else self.stream(stream)
            append = await self.append_to(name, length)
            self.slow.wire.hold_request(command)
            self.held = Held([append], asyncio.create_task(self.slow.ledger.event_store.append(append)))
            assert await asyncio.to_thread(self.slow.wire.message_held.wait, PATIENCE_SECONDS)

        self.happens(happen())

    @precondition(lambda self: self.held is not None)
    @rule()
    def go_on(self) -> None:
        held = self.held
        assert held
        self.held = None

        async def happen() -> None:
            self.slow.wire.release_request()
            [append] = held.appends
            if len(self.streams.get(append.stream, [])) > append.head.version:
                await self.loses(append.stream, held.task, expected=append.head.version)
            else:
                self.is_acknowledged(held.appends, await held.task)

        self.happens(happen())

    @rule(by=st.integers(1, 10))
    def the_counter_falls_behind(self, by: int) -> None:
        """As in a fail-over, when the new primary had not heard of the last numbers."""

        async def happen() -> None:
            counters = self.processes[0].ledger.db.counters
            await counters.update_one(
                {"_id": "events"}, [{"$set": {"next": {"$max": [0, {"$subtract": ["$next", by]}]}}}]
            )

        self.happens(happen())

    @rule(process=which, stream=which, lost=few, length=few)
    def numbers_are_free_that_are_too_small(self, process: int, stream: int, lost: int, length: int) -> None:
        """Numbers get lost, a stream goes on behind them, and after a fail-over they are handed out again."""

        async def happen() -> None:
            log, counters = self.process(process).ledger.event_store, self.processes[0].ledger.db.counters
            free = await create_position_gap(self.processes[0].ledger.db, lost)
            append = await self.append_to(self.stream(stream), 1)
            self.is_acknowledged([append], await log.append(append))
            await counters.update_one({"_id": "events"}, {"$set": {"next": free - 1}})
            append = await self.append_to(append.stream, length)
            self.is_acknowledged([append], await log.append(append))

        self.happens(happen())

    @rule(process=which)
    def the_connection_breaks(self, process: int) -> None:
        self.process(process).wire.close_connections()

    @rule(process=which)
    def the_change_stream_is_killed(self, process: int) -> None:
        async def happen() -> None:
            db = self.processes[0].ledger.db
            operations = await change_stream_operations(db)
            cursors = [operation["cursor"]["cursorId"] for operation in operations]
            if cursors:
                await db.command({"killCursors": "$cmd.aggregate", "cursors": [cursors[process % len(cursors)]]})

        self.happens(happen())

    @rule(process=which)
    def a_process_begins_and_another_ends(self, process: int) -> None:
        async def happen() -> None:
            await self.another_process()
            if len(self.processes) > MOST_PROCESSES:
                ended = self.processes.pop(process % MOST_PROCESSES)
                await ended.stack.aclose()

        self.happens(happen())

    @rule(process=which)
    def somebody_reads_everything(self, process: int) -> None:
        async def happen() -> None:
            everything = await read_all_events(self.process(process).ledger.event_store)
            assert [event.position for event in everything] == list(range(1, len(everything) + 1))

        self.happens(happen())

    @rule(process=which, after=which, at_a_time=st.integers(1, 10))
    def somebody_subscribes(self, process: int, after: int, at_a_time: int) -> None:
        async def happen() -> None:
            begin = after % (await self.processes[0].ledger.event_store.head_position() + 1)
            self.everybody.append(await self.process(process).subscribe(after=begin, at_a_time=at_a_time))

        self.happens(happen())

    @rule()
    def time_passes(self) -> None:
        async def happen() -> None:
            await self.all_reach(await self.processes[0].ledger.event_store.head_position())

        self.happens(happen())

    async def all_reach(self, position: int) -> None:
        living = [subscriber for process in self.processes for subscriber in process.subscribers]
        await asyncio.gather(*(subscriber.reaches(position) for subscriber in living))

    # What is always true ------------------------------------------------------------------------------------------

    @invariant()
    def what_is_acknowledged_is_there_and_every_stream_is_what_it_must_be(self) -> None:
        if self.processes:
            self.check(self.happens(load_event_documents(self.processes[0].ledger.db)))

    def check(self, documents: Sequence[Document]) -> None:
        streams: dict[str, list[str]] = {}
        places = {}
        for document in documents:
            if document["stream"] != VOID_STREAM:
                word = document["data"]["message"]
                streams.setdefault(document["stream"], []).append(word)
                places[word] = document["_id"]
        assert streams == self.streams
        assert {word: places[word] for word in self.acknowledged} == self.acknowledged

    def teardown(self) -> None:
        try:
            if self.processes:
                self.at_the_end_everybody_has_the_same_log()
        finally:
            self.happens(self.end())
            self.runner.close()

    def at_the_end_everybody_has_the_same_log(self) -> None:
        if self.held:
            self.go_on()

        async def happen() -> None:
            [append] = [await self.append_to("job-last", 1)]
            self.is_acknowledged([append], await self.processes[0].ledger.event_store.append(append))
            # Subscribers first: nobody who reads may fill holes for them.
            await self.all_reach(self.acknowledged[words_of(append)[0]])
            log = await read_all_events(self.processes[0].ledger.event_store)
            documents = await load_event_documents(self.processes[0].ledger.db)
            check_log(documents)
            self.check(documents)
            assert [event.event_id for event in log] == [document["event_id"] for document in documents]
            for subscriber in self.everybody:
                begun = subscriber.begun
                assert subscriber.delivered == log[begun : begun + len(subscriber.delivered)]

        self.happens(happen())

    async def end(self) -> None:
        if self.processes:
            for process in (*self.processes, self.dying, self.slow):
                await process.stack.aclose()
            async with self.connection.client() as client:
                await client.drop_database(self.connection.db_name)


def words_of(append: StreamAppend) -> list[str]:
    return [event.message for event in append.events if isinstance(event, JobProgressed)]


@pytest.fixture
def uri(mongodb_uri: str) -> Iterator[str]:
    """A server that ends transactions that are left open after a second."""
    with MongoClient[Document](mongodb_uri) as client:
        before = client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": 1})
        yield mongodb_uri
        seconds = before["transactionLifetimeLimitSeconds"]
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": seconds})


@pytest.mark.timeout(max(400, 10 * EXAMPLES))  # a story that fails is told again and again, ever shorter
def test_whatever_happens_to_it_the_log_keeps_its_promises(uri: str) -> None:
    class StoryHere(Story):
        def __init__(self) -> None:
            super().__init__(uri)

    run_state_machine_as_test(
        StoryHere,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=STEPS,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        ),
    )
