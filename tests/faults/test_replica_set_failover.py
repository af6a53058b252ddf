"""The primary of three servers is killed, steps down or hangs under load. Acknowledged and delivered events remain.

Some faults occur while the primary is ahead of the others. After its restart it rolls back the events that the others
never had. None of these may have been acknowledged to a writer or delivered to a reader.
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
from pymongo.write_concern import WriteConcern

from jobledger.ledger.domain.commands import ChangeAccess
from jobledger.ledger.domain.errors import LedgerUnavailable, StreamBusy
from jobledger.ledger.domain.events import EventMetadata, JobProgressed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.mongo.embedded_files import wait_until
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import create_job_id, handle_command
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.ledger.store.event_store import EventStore
from tests.support.event_examples import ACCESS
from tests.support.ledger_setup import EVENT_METADATA, Ledger, check_log, load_event_documents, open_ledger
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.replica_set import Node, ReplicaSet
from tests.support.soak_only import soak_only

pytestmark = [needs_local_mongod, pytest.mark.timeout(180)]

DB_NAME = "test"
WRITERS = 3
STREAMS_PER_WRITER = 4  # that no other writer appends to
PROGRESS_EVENTS = 50  # more than a writer can have in flight at the fault
LIMITS = EventStoreLimits(gap_timeout_seconds=0.3)
COMMIT_STREAMS = 5
NOTHING_ROLLED_BACK = "the old primary rolled back no event, so the test shows nothing"

# Forked from a process with loaded modules, so that a writer starts within milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.test_replica_set_failover"])

RecordAcknowledged = Callable[[Sequence[RecordedEvent]], None]


# Writers --------------------------------------------------------------------------------------------------------------


class Writer:
    """A process that appends until it is stopped and records the acknowledged events in a file."""

    def __init__(self, connection: Connection, shared: Sequence[str], acknowledged: Path) -> None:
        self._acknowledged = acknowledged
        acknowledged.touch()
        self._process = _context.Process(target=_main, args=(connection, tuple(shared), acknowledged), daemon=True)
        self._process.start()

    def read_acknowledged(self) -> list[str]:
        return self._acknowledged.read_text().splitlines()

    def stop(self) -> None:
        """Let it finish its appends. It exits with an error if the event store has violated a promise."""
        self._process.terminate()
        self._process.join(DEADLINE_SECONDS)
        assert self._process.exitcode == 0, f"a writer exited with {self._process.exitcode}"

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _main(connection: Connection, shared: Sequence[str], acknowledged: Path) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with acknowledged.open("ab", buffering=0) as file:
        asyncio.run(_write(connection, shared, file.fileno()))


async def _write(connection: Connection, shared: Sequence[str], descriptor: int) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)

    def record(events: Sequence[RecordedEvent]) -> None:
        os.write(descriptor, "".join(f"{format_event(event)}\n" for event in events).encode())

    async def repeat(append: Callable[[EventStore, RecordAcknowledged], Awaitable[None]]) -> None:
        while not stopped.is_set():
            with suppress(LedgerUnavailable):  # it is unknown whether the events were written
                await append(ledger.event_store, record)

    async with open_ledger(connection, with_change_stream=False) as ledger, asyncio.TaskGroup() as writing:
        shared_appends = [partial(_append_to_shared_stream, stream) for stream in shared]
        for append in [_append_to_own_stream] * STREAMS_PER_WRITER + [_append_to_several_streams] + shared_appends:
            writing.create_task(repeat(append))


def format_event(event: RecordedEvent) -> str:
    return f"{event.event_id} {event.position} {event.stream} {event.version}"


def _make_append(stream: str, head: StreamHead, events: int, meta: EventMetadata = EVENT_METADATA) -> StreamAppend:
    progress = JobProgressed(attempt=1, step="talk", percent=50, message="half of it")
    return StreamAppend(stream, head, [progress] * events, meta, datetime.now(UTC))


async def _append_to_own_stream(event_store: EventStore, record: RecordAcknowledged) -> None:
    """Append to a stream that no other writer appends to. A version conflict would be an error."""
    stream, head = create_job_id(), StreamHead()
    for count in (1, 1, 1, 3, 1, 1):
        events = await event_store.append(_make_append(stream, head, count))
        record(events)
        head = StreamHead(events[-1].version, events[-1].position, events[-1].hash)


async def _append_to_several_streams(event_store: EventStore, record: RecordAcknowledged) -> None:
    """Append to several streams in one commit: all events are written or none."""
    streams = [create_job_id() for _ in range(COMMIT_STREAMS)]
    record(
        await event_store.append(
            *(
                _make_append(stream, StreamHead(), 1, replace(EVENT_METADATA, correlation_id=streams[0]))
                for stream in streams
            )
        )
    )


async def _append_to_shared_stream(stream: str, event_store: EventStore, record: RecordAcknowledged) -> None:
    """Append to a stream that every writer appends to."""
    command = ChangeAccess(f"user:{os.getpid()}", ACCESS)
    with suppress(StreamBusy):
        record((await handle_command(event_store, stream, command, meta=EVENT_METADATA)).events)
    await asyncio.sleep(random.uniform(0, 0.2))  # otherwise the stream would always be busy


# Readers --------------------------------------------------------------------------------------------------------------


@dataclass
class Load:
    """Running writers, and the events that two readers in the process of the test have got."""

    replica_set: ReplicaSet
    connection: Connection
    ledger: Ledger
    shared: Sequence[str]
    directory: Path
    writers: list[Writer] = field(default_factory=list)
    """All writers. The last `WRITERS` of them run."""
    readers: list[asyncio.Task[None]] = field(default_factory=list)
    followed: list[RecordedEvent] = field(default_factory=list)
    paged: list[RecordedEvent] = field(default_factory=list)
    pages: int = 0

    async def follow(self) -> None:
        """Collect all events by a subscription."""
        async with self.ledger.event_store.subscribe(after=0) as events:
            while True:
                try:
                    self.followed += await events.read_chunk()
                except LedgerUnavailable:
                    await asyncio.sleep(0.05)

    async def read_pages(self) -> None:
        """Collect all events by repeated reads."""
        while True:
            with suppress(LedgerUnavailable):
                self.paged += await self.ledger.event_store.read(after=len(self.paged))
                self.pages += 1
            await asyncio.sleep(0.02)

    def start_writers(self) -> None:
        """Start new writers."""
        for _ in range(WRITERS):
            acknowledged = self.directory / f"acknowledged-{len(self.writers)}"
            self.writers.append(Writer(self.connection, self.shared, acknowledged))

    async def wait_for_progress(self) -> None:
        """Wait until all running writers and both readers have new events."""
        before = self._counts()
        try:
            await poll_until(
                lambda: all(
                    count >= earlier + PROGRESS_EVENTS for count, earlier in zip(self._counts(), before, strict=True)
                )
            )
        except AssertionError:
            pytest.fail(f"no progress: followed, paged, acknowledged were {before} and are {self._counts()}")

    def _counts(self) -> list[int]:
        for reader in self.readers:
            if reader.done():
                reader.result()
        running = self.writers[-WRITERS:]
        return [len(self.followed), len(self.paged), *(len(writer.read_acknowledged()) for writer in running)]

    async def check(self) -> None:
        """Stop the writers, read all events, and check the log and the readers."""
        for writer in self.writers[-WRITERS:]:
            await asyncio.to_thread(writer.stop)
        await asyncio.to_thread(self.replica_set.wait_until_in_sync)
        head = await self.ledger.event_store.read_head_position()
        try:
            await poll_until(lambda: min(len(self.followed), len(self.paged)) >= head)
        except AssertionError:
            pytest.fail(f"of {head} events {len(self.followed)} were followed, {len(self.paged)} paged")
        documents = await load_event_documents(self.ledger.db)
        check_acknowledged([line for writer in self.writers for line in writer.read_acknowledged()], documents)
        check_log(documents)
        check_commits(documents)
        check_delivered(self.followed, documents)
        check_delivered(self.paged, documents)


@asynccontextmanager
async def run_load(replica_set: ReplicaSet, directory: Path) -> AsyncIterator[Load]:
    """Start writers, then readers that find some history. Enter the block when all make progress."""
    connection = Connection(replica_set.uri, DB_NAME)
    async with open_ledger(connection, LIMITS) as ledger:
        shared = [(await ledger.submit_job()).events[0].stream for _ in range(2)]
        load = Load(replica_set, connection, ledger, shared, directory)
        load.start_writers()
        try:
            await poll_until(lambda: all(writer.read_acknowledged() for writer in load.writers))
            load.readers += [asyncio.create_task(load.follow()), asyncio.create_task(load.read_pages())]
            await load.wait_for_progress()
            yield load
        finally:
            for writer in load.writers:
                writer.kill()
            for reader in load.readers:
                reader.cancel()
            async with asyncio.timeout(DEADLINE_SECONDS):
                await asyncio.gather(*load.readers, return_exceptions=True)


# Checks ---------------------------------------------------------------------------------------------------------------


def check_acknowledged(lines: Sequence[str], documents: Sequence[Document]) -> None:
    """Check that each acknowledged event exists once, with its ID, position, stream and version."""
    stored = {
        f"{document['event_id']} {document['_id']} {document['stream']} {document['version']}" for document in documents
    }
    assert len({document["event_id"] for document in documents}) == len(documents), "an event exists twice"
    assert len(set(lines)) == len(lines), "an event was acknowledged twice"
    assert set(lines) - stored == set(), "acknowledged, but missing"


def check_delivered(delivered: Sequence[RecordedEvent], documents: Sequence[Document]) -> None:
    """Check that a reader got the log: no event is missing, repeated, or was rolled back later."""
    for event, document in zip(delivered, documents, strict=False):
        assert (event.position, event.event_id) == (document["_id"], document["event_id"])
        assert event.hash == document["hash"]
    assert len(delivered) == len(documents)


def check_commits(documents: Sequence[Document]) -> None:
    """Check that the events of a commit are complete and have consecutive positions."""
    positions: defaultdict[str, list[int]] = defaultdict(list)
    for document in documents:
        if correlation := document["meta"].get("correlation_id"):
            positions[correlation].append(document["_id"])
    assert positions
    for of_commit in positions.values():
        assert of_commit == list(range(of_commit[0], of_commit[0] + COMMIT_STREAMS))


def rolled_back_events(node: Node) -> list[Document]:
    return [document for document in node.read_rolled_back_documents() if "event_id" in document]


# Faults and the states of the primary in which they occur. They run in a thread while the load continues. -------------


@contextmanager
def any_primary(load: Load) -> Iterator[Node]:
    """Yield the primary in any state."""
    yield load.replica_set.wait_for_primary()


@contextmanager
def primary_ahead(load: Load) -> Iterator[Node]:
    """Yield the primary when it has events that no other node gets from it. Their writers append them again."""
    primary = load.replica_set.wait_for_primary()
    secondaries = load.replica_set.other_nodes(primary)

    def count_events(node: Node) -> int:
        return node.client[DB_NAME].events.count_documents({})

    with load.replica_set.replication_stopped(primary):
        assert wait_until(lambda: count_events(primary) > max(map(count_events, secondaries)), DEADLINE_SECONDS)
        # Flush the journal. Otherwise a killed primary may have lost these events, and rolls back nothing.
        journaled = WriteConcern(w=1, j=True)
        primary.client["flush"].get_collection("flush", write_concern=journaled).insert_one({})
        yield primary


@contextmanager
def primary_ahead_without_writers(load: Load) -> Iterator[Node]:
    """Like `primary_ahead`, but kill the writers, so that no writer appends again what a reader must not get."""
    with primary_ahead(load) as primary:
        for writer in load.writers:
            writer.kill()
        pages = load.pages
        wait_until(lambda: load.pages > pages + 1, 1)  # a reader that voids a position waits for the secondaries
        yield primary


PrimaryState = Callable[[Load], AbstractContextManager[Node]]


def kill_primary(load: Load, state: PrimaryState) -> Node:
    """Kill the primary. Return it when another was elected."""
    with state(load) as primary:
        load.replica_set.kill(primary)
    load.replica_set.wait_for_primary(excluding=primary)
    return primary


def step_down_primary(load: Load, state: PrimaryState) -> Node:
    """Let the primary step down. Return it when another was elected."""
    with state(load) as primary:
        load.replica_set.step_down(primary, force=state is not any_primary)
    return primary


def suspend_primary(load: Load, state: PrimaryState) -> Node:
    """Suspend the primary, which does not notice that it was replaced. Return it when another was elected."""
    with state(load) as primary:
        load.replica_set.suspend(primary)
    load.replica_set.wait_for_primary(excluding=primary)
    return primary


async def test_primary_killed_repeatedly_loses_no_acknowledged_event(replica_set: ReplicaSet, tmp_path: Path) -> None:
    async with run_load(replica_set, tmp_path) as load:
        old_primaries: list[Node] = []
        for state in (any_primary, primary_ahead, primary_ahead_without_writers):
            killed = await asyncio.to_thread(kill_primary, load, state)
            if state is primary_ahead_without_writers:
                load.start_writers()
            await load.wait_for_progress()
            replica_set.restart_node(killed)
            await asyncio.to_thread(replica_set.wait_until_in_sync)
            await load.wait_for_progress()
            old_primaries.append(killed)
        await load.check()
        assert all(map(rolled_back_events, old_primaries[1:])), NOTHING_ROLLED_BACK


@soak_only
async def test_primary_stepping_down_repeatedly_loses_no_acknowledged_event(
    replica_set: ReplicaSet, tmp_path: Path
) -> None:
    async with run_load(replica_set, tmp_path) as load:
        old_primaries: list[Node] = []
        for state in (any_primary, primary_ahead, any_primary, primary_ahead):
            stepped_down = await asyncio.to_thread(step_down_primary, load, state)
            await load.wait_for_progress()
            await asyncio.to_thread(replica_set.wait_until_in_sync)
            old_primaries.append(stepped_down)
        await load.wait_for_progress()
        await load.check()
        assert all(map(rolled_back_events, old_primaries[1::2])), NOTHING_ROLLED_BACK


async def test_primary_suspended_and_resumed_loses_no_acknowledged_event(
    replica_set: ReplicaSet, tmp_path: Path
) -> None:
    async with run_load(replica_set, tmp_path) as load:
        # First it resumes so soon that the drivers still wait for its responses.
        suspended = await asyncio.to_thread(suspend_primary, load, any_primary)
        async with open_ledger(load.connection, with_change_stream=False) as new_ledger:
            await new_ledger.submit_job()
        replica_set.resume(suspended)
        await load.wait_for_progress()
        await asyncio.to_thread(replica_set.wait_until_in_sync)

        # Then it resumes after the drivers have switched to the new primary.
        suspended = await asyncio.to_thread(suspend_primary, load, primary_ahead)
        await load.wait_for_progress()
        replica_set.resume(suspended)
        await asyncio.to_thread(replica_set.wait_until_in_sync)
        await load.wait_for_progress()
        await load.check()
        assert rolled_back_events(suspended), NOTHING_ROLLED_BACK
