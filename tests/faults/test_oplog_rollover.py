"""The oplog rolls over while a subscriber is away: it goes on where it was, misses nothing and gets nothing twice."""

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
from jobledger.ledger.mongo.embedded_lock import wait_until as until_true
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import new_job_id
from jobledger.ledger.store.envelope import VOID_STREAM, StreamAppend, StreamHead
from tests.support.driver_hooks import CommandCounter, is_suspended, monitor_connection
from tests.support.event_examples import NOON
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    check_log,
    create_position_gap,
    load_event_documents,
    open_ledger,
    poll_until,
    read_all_events,
)
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.tcp_proxy import TcpProxy

pytestmark = needs_local_mongod

OPLOG_MB = 1
QUICK = EventStoreLimits(gap_timeout_seconds=0.2)
PATIENCE_SECONDS = 40.0
HISTORY_LOST = {286, 136}  # ChangeStreamHistoryLost; CappedPositionLost, where the cursor was still open
REOPENED = "change stream interrupted, reopening"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.test_oplog_rollover"])


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server of our own with an oplog of one megabyte, which it cuts every second.

    It cuts no more than its last checkpoint allows, and the interval of these can only be set at its start.
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
    async with open_ledger(connection, QUICK, with_change_stream=False) as ledger:
        yield ledger


async def write(writer: Ledger) -> int:
    """Single events, several together, and a number that gets lost; return the last position."""
    await asyncio.gather(*(writer.submit_job() for _ in range(20)))
    await create_position_gap(writer.db)
    events = [JobProgressed(attempt=1, step="page", percent=number, message="") for number in range(30)]
    return (await writer.event_store.append(StreamAppend(new_job_id(), StreamHead(), events, EVENT_METADATA, NOON)))[
        -1
    ].position


def roll_over(uri: str) -> None:
    """Write, elsewhere, until nothing of what is in the oplog now is there any more."""
    with MongoClient[Document](uri) as client:
        oplog = client["local"]["oplog.rs"]
        [last] = oplog.find(sort=[("$natural", -1)], limit=1)

        def rolled() -> bool:
            client["filler"]["filler"].insert_many([{"filler": "x" * 10_000} for _ in range(50)])
            [oldest] = oplog.find(sort=[("$natural", 1)], limit=1)
            return bool(oldest["ts"] > last["ts"])

        assert until_true(rolled, PATIENCE_SECONDS), "the oplog did not roll over"
        client.drop_database("filler")


async def check(writer: Ledger, delivered: list[tuple[int, str]]) -> None:
    documents = await load_event_documents(writer.db)
    check_log(documents)
    assert delivered == [(document["_id"], document["event_id"]) for document in documents]
    assert sum(document["stream"] == VOID_STREAM for document in documents) >= 3


# A subscriber that is frozen --------------------------------------------------------------------------------------


class Subscriber:
    """A process that subscribes, and notes what it is given, and which errors the server answered."""

    def __init__(self, connection: Connection, after: int, directory: Path) -> None:
        self._events = directory / "events"
        self._errors = directory / "errors"
        self._process = _context.Process(
            target=_subscribe, args=(connection, after, self._events, self._errors), daemon=True
        )
        self._process.start()
        assert self._process.pid
        self.pid = self._process.pid

    def delivered(self) -> list[tuple[int, str]]:
        lines = self._events.read_text().splitlines() if self._events.exists() else []
        return [(int(position), event_id) for position, event_id in (line.split() for line in lines)]

    def errors(self) -> set[int]:
        return {int(code) for code in self._errors.read_text().split()}

    async def reaches(self, position: int) -> None:
        await poll_until(lambda: self.delivered()[-1:] >= [(position, "")], PATIENCE_SECONDS)

    async def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        await poll_until(lambda: is_suspended(self.pid))

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        self._process.kill()
        self._process.join(10)


def _subscribe(connection: Connection, after: int, events: Path, errors: Path) -> None:
    asyncio.run(_note(connection, after, events, errors))


async def _note(connection: Connection, after: int, delivered: Path, errors: Path) -> None:
    tally = CommandCounter()
    with delivered.open("a", buffering=1) as notes, errors.open("a", buffering=1) as codes:
        async with (
            open_ledger(monitor_connection(connection, tally), QUICK) as ledger,
            ledger.event_store.subscribe(after=after) as events,
        ):
            async for event in events:
                if tally.failed_by_code:
                    codes.write(" ".join(map(str, tally.failed_by_code)) + "\n")
                notes.write(f"{event.position} {event.event_id}\n")


async def test_a_subscriber_that_was_frozen_while_the_oplog_rolled_over_goes_on_where_it_was(
    connection: Connection, writer: Ledger, tmp_path: Path
) -> None:
    subscriber = Subscriber(connection, 0, tmp_path)
    try:
        await subscriber.reaches(await write(writer))
        assert subscriber.errors() & HISTORY_LOST == set()
        await subscriber.freeze()
        await write(writer)
        await asyncio.to_thread(roll_over, connection.uri)
        last = await write(writer)
        await asyncio.to_thread(
            roll_over, connection.uri
        )  # nothing of the log is left, whatever the stream begins with
        subscriber.thaw()
        await subscriber.reaches(last)
        await subscriber.reaches(await write(writer))
        assert subscriber.errors() & HISTORY_LOST, "the server still had what was missed"
        await check(writer, subscriber.delivered())
    finally:
        subscriber.end()


async def test_a_subscriber_that_did_not_run_while_the_oplog_rolled_over_goes_on_after_its_position(
    connection: Connection, writer: Ledger, tmp_path: Path
) -> None:
    before = Subscriber(connection, 0, tmp_path)
    try:
        await before.reaches(await write(writer))
    finally:
        before.end()
    await write(writer)
    last = await write(writer)
    await asyncio.to_thread(roll_over, connection.uri)
    position, _ = before.delivered()[-1]
    assert position < last
    after = Subscriber(connection, position, tmp_path)  # notes what it is given in the same place
    try:
        await after.reaches(last)
        await after.reaches(await write(writer))
        await check(writer, after.delivered())
    finally:
        after.end()


# A change stream that is cut off ----------------------------------------------------------------------------------


async def test_a_stream_whose_place_in_the_oplog_is_gone_is_opened_anew_and_every_subscriber_goes_on(
    connection: Connection, writer: Ledger
) -> None:
    tally = CommandCounter()
    with TcpProxy(connection.uri) as proxy, capture_logs() as warnings:
        cut_off = monitor_connection(Connection(proxy.uri, connection.db_name), tally)
        async with (
            open_ledger(cut_off, QUICK) as reader,
            subscribed(reader) as early,
        ):
            first = await write(writer)
            await poll_until(lambda: len(early) == first, PATIENCE_SECONDS)
            proxy.suspend()
            await write(writer)
            await asyncio.to_thread(roll_over, connection.uri)
            last = await write(writer)
            await asyncio.to_thread(roll_over, connection.uri)
            assert len(early) == first
            assert REOPENED not in [warning["event"] for warning in warnings]
            proxy.close_connections()  # so the driver has to resume, with a token from before
            proxy.resume()
            await poll_until(lambda: len(early) >= last, PATIENCE_SECONDS)
            async with subscribed(reader, after=first) as late:
                last = await write(writer)
                await poll_until(lambda: len(early) >= last and len(late) >= last - first, PATIENCE_SECONDS)
        assert tally.failed_by_code[286], "the server still had what was missed"
        assert REOPENED in [warning["event"] for warning in warnings]
    assert late == early[first:]
    await check(writer, [(event.position, event.event_id) for event in early])
    assert await read_all_events(writer.event_store) == early


@asynccontextmanager
async def subscribed(ledger: Ledger, *, after: int = 0) -> AsyncIterator[list[RecordedEvent]]:
    """What a subscription delivers from now on."""
    delivered: list[RecordedEvent] = []

    async def take() -> None:
        async with ledger.event_store.subscribe(after=after) as events:
            async for event in events:
                delivered.append(event)

    task = asyncio.create_task(take())
    try:
        yield delivered
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
