"""The primary of three servers killed, deposed, cut off, under load: what was acknowledged or delivered stays.

Some faults find the primary ahead of the others. When it comes back it must undo what they never had; nothing of that
may have been acknowledged to a writer or delivered to a reader.
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import random
import signal
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import pytest
import structlog

from jobledger.ledger.domain.commands import ChangeAccess
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import EventMetadata, JobProgressed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.mongo.embedded_lock import wait_until as wait_until
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import handle_command, new_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore
from tests.support.event_examples import ACCESS
from tests.support.ledger_setup import EVENT_METADATA, Ledger, check_log, load_event_documents, open_ledger, poll_until
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.replica_set import Node, ReplicaSet
from tests.support.soak_only import soak_only

pytestmark = [needs_local_mongod, pytest.mark.timeout(180)]

DB_NAME = "test"
WRITERS = 3
CHAINS = 4  # streams of its own that each writer writes at a time
PROGRESS = 50  # events: more than a writer can have had on their way when the fault came
PATIENCE = EventStoreLimits(gap_timeout_seconds=0.3)
TOGETHER = 5
DEADLINE_SECONDS = 40.0
NOTHING_UNDONE = "the old primary had nothing to undo: the fault was too weak to show anything"

# Forked from a process that has everything imported, so that a writer writes within milliseconds of its start.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.test_replica_set_failover"])

Note = Callable[[Sequence[RecordedEvent]], None]


@pytest.fixture
def replica_set(tmp_path: Path) -> Iterator[ReplicaSet]:
    with ReplicaSet(tmp_path / "replica-set") as replica_set:
        yield replica_set


# What writes ----------------------------------------------------------------------------------------------------------


class Writer:
    """A process that writes until it is stopped, and the file in which it notes what was acknowledged."""

    def __init__(self, connection: Connection, shared: Sequence[str], notes: Path) -> None:
        self._notes = notes
        notes.touch()
        self._process = _context.Process(target=_main, args=(connection, tuple(shared), notes), daemon=True)
        self._process.start()

    def acknowledged(self) -> list[str]:
        return self._notes.read_text().splitlines()

    def stop(self) -> None:
        """Have it end what it has begun. Whatever it met that a log must not do has ended it with an error."""
        self._process.terminate()
        self._process.join(DEADLINE_SECONDS)
        assert self._process.exitcode == 0, f"a writer has ended with {self._process.exitcode}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _main(connection: Connection, shared: Sequence[str], notes: Path) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with notes.open("ab", buffering=0) as file:
        asyncio.run(_write(connection, shared, file.fileno()))


async def _write(connection: Connection, shared: Sequence[str], file: int) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)

    def note(events: Sequence[RecordedEvent]) -> None:
        os.write(file, "".join(f"{line_of(event)}\n" for event in events).encode())

    async def again_and_again(write: Callable[[EventStore, Note], Awaitable[None]]) -> None:
        while not stopped.is_set():
            with suppress(LedgerUnavailable):  # nobody knows whether it was written: begin something else
                await write(ledger.event_store, note)

    async with open_ledger(connection, with_change_stream=False) as ledger, asyncio.TaskGroup() as writing:
        for write in [_chain] * CHAINS + [_together] + [partial(_contended, stream) for stream in shared]:
            writing.create_task(again_and_again(write))


def line_of(event: RecordedEvent) -> str:
    return f"{event.event_id} {event.position} {event.stream} {event.version}"


def _progress(stream: str, head: StreamHead, events: int, meta: EventMetadata = EVENT_METADATA) -> StreamAppend:
    progress = JobProgressed(attempt=1, step="talk", percent=50, message="half of it")
    return StreamAppend(stream, head, [progress] * events, meta, datetime.now(UTC))


async def _chain(log: EventStore, note: Note) -> None:
    """A stream that nobody else writes: a version conflict would mean that the log has confused something."""
    stream, head = new_job_id(), StreamHead()
    for together in (1, 1, 1, 3, 1, 1):
        events = await log.append(_progress(stream, head, together))
        note(events)
        head = StreamHead(events[-1].version, events[-1].position, events[-1].hash)


async def _together(log: EventStore, note: Note) -> None:
    """Several streams at once: all of it will be there, or nothing."""
    streams = [new_job_id() for _ in range(TOGETHER)]
    note(
        await log.append(
            *(
                _progress(stream, StreamHead(), 1, replace(EVENT_METADATA, correlation_id=streams[0]))
                for stream in streams
            )
        )
    )


async def _contended(stream: str, log: EventStore, note: Note) -> None:
    """A stream that every writer writes."""
    note((await handle_command(log, stream, ChangeAccess(f"user:{os.getpid()}", ACCESS), meta=EVENT_METADATA)).events)
    await asyncio.sleep(random.uniform(0, 0.2))  # else one of them might lose as many races as `handle` runs


# What reads -----------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """Writers at work, and what two readers in the test's own process have seen of it."""

    replica_set: ReplicaSet
    connection: Connection
    ledger: Ledger
    shared: Sequence[str]
    directory: Path
    writers: list[Writer] = field(default_factory=list)
    """The last of them are at work."""
    readers: list[asyncio.Task[None]] = field(default_factory=list)
    followed: list[RecordedEvent] = field(default_factory=list)
    paged: list[RecordedEvent] = field(default_factory=list)
    pages: int = 0

    async def follow(self) -> None:
        """Take in everything by a subscription, history first, then live."""
        async with self.ledger.event_store.subscribe(after=0) as events:
            while True:
                try:
                    self.followed += await events.next_chunk()
                except LedgerUnavailable:
                    await asyncio.sleep(0.05)

    async def page(self) -> None:
        """Take in everything by looking into the collection, again and again."""
        while True:
            with suppress(LedgerUnavailable):
                self.paged += await self.ledger.event_store.read(after=len(self.paged))
                self.pages += 1
            await asyncio.sleep(0.02)

    def write(self) -> None:
        """Start writers, in place of those that were."""
        for _ in range(WRITERS):
            notes = self.directory / f"acknowledged-{len(self.writers)}"
            self.writers.append(Writer(self.connection, self.shared, notes))

    async def goes_on(self) -> None:
        """Wait until every writer has been acknowledged, and both readers have seen, events that are new."""
        before = self._counts()
        try:
            await poll_until(
                lambda: all(now >= then + PROGRESS for now, then in zip(self._counts(), before, strict=True)),
                DEADLINE_SECONDS,
            )
        except TimeoutError:
            pytest.fail(f"it does not go on: followed, paged, acknowledged were {before} and are {self._counts()}")

    def _counts(self) -> list[int]:
        for reader in self.readers:
            if reader.done():
                reader.result()
        at_work = self.writers[-WRITERS:]
        return [len(self.followed), len(self.paged), *(len(writer.acknowledged()) for writer in at_work)]

    async def check(self) -> None:
        """Stop writing, read everything, and see whether each promise was kept."""
        for writer in self.writers[-WRITERS:]:
            await asyncio.to_thread(writer.stop)
        await asyncio.to_thread(self.replica_set.wait_until_in_sync)
        head = await self.ledger.event_store.head_position()
        try:
            await poll_until(lambda: min(len(self.followed), len(self.paged)) >= head, DEADLINE_SECONDS)
        except TimeoutError:
            pytest.fail(f"of {head} events {len(self.followed)} were followed, {len(self.paged)} paged")
        documents = await load_event_documents(self.ledger.db)
        check_acknowledged([line for writer in self.writers for line in writer.acknowledged()], documents)
        check_log(documents)
        check_together(documents)
        check_seen(self.followed, documents)
        check_seen(self.paged, documents)


@asynccontextmanager
async def load_on(replica_set: ReplicaSet, directory: Path) -> AsyncIterator[Load]:
    """Start writers, then readers who find some history, and go on when all of them are at work."""
    connection = Connection(replica_set.uri, DB_NAME)
    async with open_ledger(connection, PATIENCE) as ledger:
        shared = [(await ledger.submit_job()).events[0].stream for _ in range(2)]
        load = Load(replica_set, connection, ledger, shared, directory)
        load.write()
        try:
            await poll_until(lambda: all(writer.acknowledged() for writer in load.writers), DEADLINE_SECONDS)
            load.readers += [asyncio.create_task(load.follow()), asyncio.create_task(load.page())]
            await load.goes_on()
            yield load
        finally:
            for writer in load.writers:
                writer.kill()
            while reading := [reader for reader in load.readers if not reader.done()]:
                for reader in reading:
                    reader.cancel()  # once need not be enough: the wait_for of Python 3.11 may lose it
                await asyncio.wait(reading, timeout=1)


# What must be true ----------------------------------------------------------------------------------------------------


def check_acknowledged(lines: Sequence[str], documents: Sequence[Document]) -> None:
    """What was acknowledged is there once, with the id and in the place that the writer was told."""
    there = {f"{it['event_id']} {it['_id']} {it['stream']} {it['version']}" for it in documents}
    assert len({it["event_id"] for it in documents}) == len(documents), "an event is there twice"
    assert len(set(lines)) == len(lines), "an event was acknowledged twice"
    assert set(lines) - there == set(), "acknowledged, but not there"


def check_seen(seen: Sequence[RecordedEvent], documents: Sequence[Document]) -> None:
    """A reader got the log as it is: nothing missing, nothing twice, nothing that was undone later."""
    for event, document in zip(seen, documents, strict=False):
        assert (event.position, event.event_id) == (document["_id"], document["event_id"])
        assert event.hash == document["hash"]
    assert len(seen) == len(documents)


def check_together(documents: Sequence[Document]) -> None:
    """What was written together is there together, side by side."""
    positions: defaultdict[str, list[int]] = defaultdict(list)
    for document in documents:
        if correlation := document["meta"].get("correlation_id"):
            positions[correlation].append(document["_id"])
    assert positions
    for together in positions.values():
        assert together == list(range(together[0], together[0] + TOGETHER))


def undone(node: Node) -> list[Document]:
    """The events that a node had to undo."""
    return [document for document in node.read_rolled_back_documents() if "event_id" in document]


# The faults, and the moments when they come: called in a thread, while the load goes on -------------------------------


@contextmanager
def whenever(load: Load) -> Iterator[Node]:
    """At any moment; yields the primary."""
    yield load.replica_set.wait_for_primary()


@contextmanager
def ahead(load: Load) -> Iterator[Node]:
    """When the primary holds events that no other node will get from it. Their writers will write them again."""
    primary = load.replica_set.wait_for_primary()
    others = load.replica_set.other_nodes(primary)

    def events(node: Node) -> int:
        return node.client[DB_NAME].events.count_documents({})

    with load.replica_set.replication_stopped(primary):
        assert wait_until(lambda: events(primary) > max(map(events, others)), DEADLINE_SECONDS)
        yield primary


@contextmanager
def ahead_and_alone(load: Load) -> Iterator[Node]:
    """The same, but the writers are killed, too: nobody will write again what a reader should not have seen."""
    with ahead(load) as primary:
        for writer in load.writers:
            writer.kill()
        pages = load.pages
        wait_until(lambda: load.pages > pages + 1, 1)  # no longer, for to void a position it needs the others
        yield primary


Moment = Callable[[Load], AbstractContextManager[Node]]


def kill_the_primary(load: Load, moment: Moment) -> Node:
    """Kill the primary; return it when another has been elected."""
    with moment(load) as primary:
        load.replica_set.kill(primary)
    load.replica_set.wait_for_primary(excluding=primary)
    return primary


def depose_the_primary(load: Load, moment: Moment) -> Node:
    """Have the primary step down; return it when another has been elected."""
    with moment(load) as primary:
        load.replica_set.step_down(primary, force=moment is not whenever)
    return primary


def cut_off_the_primary(load: Load, moment: Moment) -> Node:
    """Freeze the primary, which goes on believing that it is one; return it when another has been elected."""
    with moment(load) as primary:
        load.replica_set.suspend(primary)
    load.replica_set.wait_for_primary(excluding=primary)
    return primary


async def test_a_primary_killed_again_and_again_takes_nothing_along_that_was_acknowledged_or_delivered(
    replica_set: ReplicaSet, tmp_path: Path
) -> None:
    async with load_on(replica_set, tmp_path) as load:
        victims: list[Node] = []
        for moment in (whenever, ahead, ahead_and_alone):
            killed = await asyncio.to_thread(kill_the_primary, load, moment)
            if moment is ahead_and_alone:
                load.write()
            await load.goes_on()
            replica_set.restart_node(killed)
            await asyncio.to_thread(replica_set.wait_until_in_sync)
            await load.goes_on()
            victims.append(killed)
        await load.check()
        assert all(map(undone, victims[1:])), NOTHING_UNDONE


@soak_only
async def test_a_primary_that_steps_down_again_and_again_takes_nothing_along_that_was_acknowledged_or_delivered(
    replica_set: ReplicaSet, tmp_path: Path
) -> None:
    async with load_on(replica_set, tmp_path) as load:
        victims: list[Node] = []
        for moment in (whenever, ahead, whenever, ahead):
            deposed = await asyncio.to_thread(depose_the_primary, load, moment)
            await load.goes_on()
            await asyncio.to_thread(replica_set.wait_until_in_sync)
            victims.append(deposed)
        await load.goes_on()
        await load.check()
        assert all(map(undone, victims[1::2])), NOTHING_UNDONE


async def test_a_primary_cut_off_for_a_while_takes_nothing_along_that_was_acknowledged_or_delivered(
    replica_set: ReplicaSet, tmp_path: Path
) -> None:
    async with load_on(replica_set, tmp_path) as load:
        # At first it comes back so soon that the drivers still wait for its answers to what they sent before.
        cut_off = await asyncio.to_thread(cut_off_the_primary, load, whenever)
        async with open_ledger(load.connection, with_change_stream=False) as newcomer:
            await newcomer.submit_job()
        replica_set.resume(cut_off)
        await load.goes_on()
        await asyncio.to_thread(replica_set.wait_until_in_sync)

        # Then only after they have turned to the new one.
        cut_off = await asyncio.to_thread(cut_off_the_primary, load, ahead)
        await load.goes_on()
        replica_set.resume(cut_off)
        await asyncio.to_thread(replica_set.wait_until_in_sync)
        await load.goes_on()
        await load.check()
        assert undone(cut_off), NOTHING_UNDONE
