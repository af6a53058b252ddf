"""The oplog rolls over while a subscriber is suspended or stopped. It continues without missing or repeated events."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
from pymongo import MongoClient
from structlog.testing import capture_logs

from jobledger.ledger.domain.events import JobProgressed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.mongo.embedded import EmbeddedServer, find_mongod
from jobledger.ledger.mongo.embedded_files import wait_until
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.ledger.store.envelope import VOID_STREAM, StreamAppend, StreamHead
from tests.support.driver_hooks import CommandCounter, monitor_connection
from tests.support.event_examples import NOON
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    check_log,
    create_position_gap,
    load_event_documents,
    open_ledger,
    read_all_events,
)
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.suspension import suspend
from tests.support.tcp_proxy import TcpProxy

pytestmark = needs_local_mongod

OPLOG_MB = 1
LIMITS = EventStoreLimits(gap_timeout_seconds=0.2)
HISTORY_LOST_CODES = {286, 136}  # ChangeStreamHistoryLost, or CappedPositionLost if the cursor was still open
REOPENED_MESSAGE = "change stream interrupted, reopening"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.test_oplog_rollover"])


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URI of a server with an oplog of one megabyte, which it truncates every second.

    The server truncates only up to its last checkpoint. The checkpoint interval can only be set at its start.
    """
    directory = tmp_path_factory.mktemp("oplog")
    program = directory / "bin" / "mongod"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{find_mongod()}" "$@" --syncdelay 1\n')
    program.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(program.parent), prepend=os.pathsep)
        server = EmbeddedServer.start(directory / "data", oplog_mb=OPLOG_MB)
    with server:
        yield server.uri


@pytest.fixture
def connection(uri: str, request: pytest.FixtureRequest) -> Connection:
    return Connection(uri, f"test_{request.node.name[-30:]}")


@pytest.fixture
async def writer(connection: Connection) -> AsyncIterator[Ledger]:
    async with open_ledger(connection, LIMITS, with_change_stream=False) as ledger:
        yield ledger


async def append_events(writer: Ledger) -> int:
    """Append single events and a commit of several, with a position gap between. Return the last position."""
    await asyncio.gather(*(writer.submit_job() for _ in range(20)))
    await create_position_gap(writer.db)
    events = [JobProgressed(attempt=1, step="page", percent=number, message="") for number in range(30)]
    return (await writer.event_store.append(StreamAppend(create_job_id(), StreamHead(), events, EVENT_METADATA, NOON)))[
        -1
    ].position


def roll_over(uri: str) -> None:
    """Write to another database until the oplog contains no entry that it contains now."""
    with MongoClient[Document](uri) as client:
        oplog = client["local"]["oplog.rs"]
        [last] = oplog.find(sort=[("$natural", -1)], limit=1)

        def has_rolled_over() -> bool:
            client["filler"]["filler"].insert_many([{"filler": "x" * 10_000} for _ in range(50)])
            [oldest] = oplog.find(sort=[("$natural", 1)], limit=1)
            return bool(oldest["ts"] > last["ts"])

        assert wait_until(has_rolled_over, DEADLINE_SECONDS), "the oplog did not roll over"
        client.drop_database("filler")


async def check_delivered(writer: Ledger, delivered: list[tuple[int, str]]) -> None:
    documents = await load_event_documents(writer.db)
    check_log(documents)
    assert delivered == [(document["_id"], document["event_id"]) for document in documents]
    assert sum(document["stream"] == VOID_STREAM for document in documents) >= 3


# A suspended subscriber -------------------------------------------------------------------------------------------


class Subscriber:
    """A process that subscribes and writes the delivered events and the error codes of the server to files."""

    def __init__(self, connection: Connection, after: int, directory: Path) -> None:
        self._events = directory / "events"
        self._errors = directory / "errors"
        self._process = _context.Process(
            target=_main, args=(connection, after, self._events, self._errors), daemon=True
        )
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def delivered(self) -> list[tuple[int, str]]:
        lines = self._events.read_text().splitlines() if self._events.exists() else []
        return [(int(position), event_id) for position, event_id in (line.split() for line in lines)]

    def errors(self) -> set[int]:
        return {int(code) for code in self._errors.read_text().split()}

    async def wait_for_position(self, position: int) -> None:
        await poll_until(lambda: self.delivered()[-1:] >= [(position, "")])

    def suspend(self) -> None:
        suspend(self.pid)

    def resume(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(10)


def _main(connection: Connection, after: int, events: Path, errors: Path) -> None:
    asyncio.run(_subscribe(connection, after, events, errors))


async def _subscribe(connection: Connection, after: int, delivered: Path, errors: Path) -> None:
    commands = CommandCounter()
    with delivered.open("a", buffering=1) as events_file, errors.open("a", buffering=1) as errors_file:
        async with (
            open_ledger(monitor_connection(connection, commands), LIMITS) as ledger,
            ledger.event_store.subscribe(after=after) as events,
        ):
            async for event in events:
                if commands.failed_by_code:
                    errors_file.write(" ".join(map(str, commands.failed_by_code)) + "\n")
                events_file.write(f"{event.position} {event.event_id}\n")


async def test_subscriber_suspended_during_the_rollover_misses_no_event(
    connection: Connection, writer: Ledger, tmp_path: Path
) -> None:
    subscriber = Subscriber(connection, 0, tmp_path)
    try:
        await subscriber.wait_for_position(await append_events(writer))
        assert subscriber.errors() & HISTORY_LOST_CODES == set()
        subscriber.suspend()
        await append_events(writer)
        await asyncio.to_thread(roll_over, connection.uri)
        last = await append_events(writer)
        # Afterwards the oplog contains no event, wherever the change stream resumes.
        await asyncio.to_thread(roll_over, connection.uri)
        subscriber.resume()
        await subscriber.wait_for_position(last)
        await subscriber.wait_for_position(await append_events(writer))
        assert subscriber.errors() & HISTORY_LOST_CODES, "the oplog still contained the missed events"
        await check_delivered(writer, subscriber.delivered())
    finally:
        subscriber.kill()


async def test_subscriber_restarted_after_the_rollover_continues_at_its_position(
    connection: Connection, writer: Ledger, tmp_path: Path
) -> None:
    first = Subscriber(connection, 0, tmp_path)
    try:
        await first.wait_for_position(await append_events(writer))
    finally:
        first.kill()
    await append_events(writer)
    last = await append_events(writer)
    await asyncio.to_thread(roll_over, connection.uri)
    position, _ = first.delivered()[-1]
    assert position < last
    second = Subscriber(connection, position, tmp_path)  # appends to the same files
    try:
        await second.wait_for_position(last)
        await second.wait_for_position(await append_events(writer))
        await check_delivered(writer, second.delivered())
    finally:
        second.kill()


# An interrupted change stream -------------------------------------------------------------------------------------


async def test_change_stream_with_lost_history_is_reopened_for_all_subscribers(
    connection: Connection, writer: Ledger
) -> None:
    with TcpProxy(connection.uri) as proxy, capture_logs() as warnings:
        async with (
            open_ledger(Connection(proxy.uri, connection.db_name), LIMITS) as reader,
            collect_events(reader) as early,
        ):
            first = await append_events(writer)
            await poll_until(lambda: len(early) == first)
            proxy.suspend()
            await append_events(writer)
            await asyncio.to_thread(roll_over, connection.uri)
            last = await append_events(writer)
            await asyncio.to_thread(roll_over, connection.uri)
            assert len(early) == first
            assert REOPENED_MESSAGE not in [warning["event"] for warning in warnings]
            proxy.close_connections()  # a stream that continued where it was interrupted would find no history
            proxy.resume()
            await poll_until(lambda: len(early) >= last)
            async with collect_events(reader, after=first) as late:
                last = await append_events(writer)
                await poll_until(lambda: len(early) >= last and len(late) >= last - first)
        assert REOPENED_MESSAGE in [warning["event"] for warning in warnings]
    assert late == early[first:]
    await check_delivered(writer, [(event.position, event.event_id) for event in early])
    assert await read_all_events(writer.event_store) == early


@asynccontextmanager
async def collect_events(ledger: Ledger, *, after: int = 0) -> AsyncIterator[list[RecordedEvent]]:
    """Subscribe inside the block. Yields the list to which delivered events are appended."""
    delivered: list[RecordedEvent] = []

    async def collect() -> None:
        async with ledger.event_store.subscribe(after=after) as events:
            async for event in events:
                delivered.append(event)

    task = asyncio.create_task(collect())
    try:
        yield delivered
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
