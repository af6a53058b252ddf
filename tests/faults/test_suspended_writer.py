"""SIGSTOP at the worst moments: readers wait for a frozen process within bounds, and what it had begun happens once."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from multiprocessing.connection import Connection as Pipe
from time import monotonic
from typing import Any

import pytest
from pymongo import MongoClient

from jobledger.ledger.domain.errors import VersionConflict
from jobledger.ledger.domain.events import JobProgressed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.envelope import VOID_STREAM, StreamAppend, StreamHead
from tests.support.driver_hooks import HookPoint, OneTimeHook, is_suspended, monitor_connection, suspend_own_process
from tests.support.event_examples import NOON, make_job_submitted
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    check_log,
    event_positions,
    load_event_documents,
    open_ledger,
    poll_until,
    read_all_events,
)

VOID_AFTER_SECONDS = 0.3
IMPATIENT = EventStoreLimits(gap_timeout_seconds=VOID_AFTER_SECONDS)
TRANSACTION_SECONDS = 2
NOISE_SECONDS = 5.0  # a loaded machine, not a promise
PATIENCE_SECONDS = 30.0
LATE = "job-late"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.test_suspended_writer"])

Place = tuple[int, str, str]  # position, event_id, stream


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Iterator[Connection]:
    """A database whose server ends transactions that are left open after two seconds."""
    with MongoClient[Document](mongodb_uri) as client:
        before = client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": TRANSACTION_SECONDS})
        yield Connection(mongodb_uri, db_name)
        seconds = before["transactionLifetimeLimitSeconds"]
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": seconds})


# The frozen -------------------------------------------------------------------------------------------------------


class Frozen:
    """A process that stops itself at a moment of its work, as a laptop does whose lid is closed."""

    def __init__(self, work: Any, *arguments: Any) -> None:
        self._answer, sender = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_run, args=(work, sender, *arguments), daemon=True)
        self.process.start()
        sender.close()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    async def until_frozen(self) -> None:
        await poll_until(lambda: not self.process.is_alive() or is_suspended(self.pid), PATIENCE_SECONDS)
        assert self.process.is_alive(), "the process has ended, and was to be frozen at a moment that did not come"

    def thaw(self) -> None:
        assert is_suspended(self.pid), "it should have slept until now"
        os.kill(self.pid, signal.SIGCONT)

    async def answer(self) -> Any:
        """What the process has to say at its end."""
        said = await asyncio.wait_for(asyncio.to_thread(self._answer.poll, PATIENCE_SECONDS), PATIENCE_SECONDS + 5)
        assert said, "the process did not answer after it was thawed"
        return self._answer.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)
        self._answer.close()


def _run(work: Any, sender: Pipe, *arguments: Any) -> None:
    sender.send(asyncio.run(work(*arguments)))


async def _append(
    connection: Connection, moment: HookPoint, appends: Sequence[StreamAppend]
) -> list[list[Place]] | str:
    """Append each on its own, all at once, and tell where they are; or which conflict there was."""
    sleepy = monitor_connection(connection, OneTimeHook(moment, suspend_own_process))
    async with open_ledger(sleepy, IMPATIENT, with_change_stream=False) as ledger:
        try:
            recorded = await asyncio.gather(*(ledger.event_store.append(append) for append in appends))
        except VersionConflict as conflict:
            return f"found {conflict.found}"
    return [places(events) for events in recorded]


async def _read(connection: Connection, moment: HookPoint) -> list[Place]:
    sleepy = monitor_connection(connection, OneTimeHook(moment, suspend_own_process))
    async with open_ledger(sleepy, IMPATIENT, with_change_stream=False) as ledger:
        return places(await read_all_events(ledger.event_store))


def places(events: Sequence[RecordedEvent]) -> list[Place]:
    return [(event.position, event.event_id, event.stream) for event in events]


@asynccontextmanager
async def frozen_writer(connection: Connection, moment: HookPoint, *appends: StreamAppend) -> AsyncIterator[Frozen]:
    writer = Frozen(_append, connection, moment, appends)
    try:
        await writer.until_frozen()
        yield writer
    finally:
        writer.end()


def late(count: int, stream: str = LATE) -> StreamAppend:
    events = [JobProgressed(attempt=1, step="page", percent=number, message="") for number in range(count)]
    return StreamAppend(stream, StreamHead(), events, EVENT_METADATA, NOON)


# The readers ------------------------------------------------------------------------------------------------------


class Follower:
    """A live subscriber that keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[RecordedEvent] = []

    async def reaches(self, position: int, seconds: float) -> None:
        await poll_until(lambda: bool(self.seen) and self.seen[-1].position >= position, seconds)


@asynccontextmanager
async def following(ledger: Ledger) -> AsyncIterator[Follower]:
    follower = Follower()

    async def follow() -> None:
        async with ledger.event_store.subscribe(after=0) as events:
            async for event in events:
                follower.seen.append(event)

    task = asyncio.create_task(follow())
    try:
        yield follower
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def check(ledger: Ledger, follower: Follower) -> None:
    """The log keeps its promises, and everybody sees the same."""
    documents = await load_event_documents(ledger.db)
    check_log(documents)
    await follower.reaches(len(documents), PATIENCE_SECONDS)
    log = await read_all_events(ledger.event_store)
    assert [event.event_id for event in log] == [document["event_id"] for document in documents]
    assert places(follower.seen) == places(log)


# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("moment", "appends"),
    [
        ("after findAndModify", [late(1)]),
        ("before insert", [late(1)]),
        ("before insert", [late(1, f"job-late-{number}") for number in range(5)]),
        ("before insert", [late(3)]),
    ],
    ids=["single event, with its number", "single event", "group of single events", "transaction"],
)
async def test_a_writer_frozen_between_its_number_and_its_insert_lands_behind_the_voids_and_once(
    connection: Connection, moment: HookPoint, appends: Sequence[StreamAppend]
) -> None:
    total = sum(len(append.events) for append in appends)
    async with (
        open_ledger(connection, IMPATIENT) as ledger,
        following(ledger) as follower,
        frozen_writer(connection, moment, *appends) as writer,
    ):
        begun = monotonic()
        behind = (await ledger.submit_job()).events[0]
        await follower.reaches(behind.position, VOID_AFTER_SECONDS + NOISE_SECONDS)
        assert monotonic() - begun > VOID_AFTER_SECONDS, "a slow writer has some time before its number is voided"
        before = await read_all_events(ledger.event_store)
        assert [event.stream for event in before] == [VOID_STREAM] * total + [behind.stream]

        writer.thaw()
        answer = await writer.answer()
        landed = [place for append in answer for place in append]
        assert sorted(position for position, _, _ in landed) == list(range(total + 2, 2 * total + 2))
        for append, told in zip(appends, answer, strict=True):
            assert [position for position, _, _ in told] == list(range(told[0][0], told[0][0] + len(append.events)))
            assert places(await ledger.event_store.read_stream(append.stream)) == told
        assert places(await read_all_events(ledger.event_store)) == places(before) + sorted(landed)
        await check(ledger, follower)


async def test_a_writer_frozen_inside_its_transaction_holds_readers_up_until_the_server_ends_it(
    connection: Connection,
) -> None:
    async with (
        open_ledger(connection, IMPATIENT) as ledger,
        following(ledger) as follower,
        frozen_writer(connection, "before commitTransaction", late(3)) as writer,
    ):
        behind = (await ledger.submit_job()).events[0]
        assert behind.position == 4
        # The server looks for transactions that are too old every half of what it grants them.
        await follower.reaches(4, 1.5 * TRANSACTION_SECONDS + 1 + VOID_AFTER_SECONDS + NOISE_SECONDS)
        before = await read_all_events(ledger.event_store)
        assert [event.stream for event in before] == [VOID_STREAM] * 3 + [behind.stream]
        assert await ledger.event_store.read_stream(LATE) == []

        writer.thaw()
        [landed] = await writer.answer()
        assert [position for position, _, _ in landed] == [5, 6, 7]
        assert places(await read_all_events(ledger.event_store)) == places(before) + landed
        await check(ledger, follower)


@pytest.mark.parametrize(
    ("moment", "count"),
    [("after insert", 1), ("after commitTransaction", 3)],
    ids=["single event", "transaction"],
)
async def test_a_writer_frozen_before_it_hears_of_its_success_holds_nobody_up(
    connection: Connection, moment: HookPoint, count: int
) -> None:
    async with (
        open_ledger(connection, IMPATIENT) as ledger,
        following(ledger) as follower,
        frozen_writer(connection, moment, late(count)) as writer,
    ):
        await ledger.submit_job()
        await follower.reaches(count + 1, NOISE_SECONDS)
        assert all(event.stream != VOID_STREAM for event in follower.seen)
        writer.thaw()
        [landed] = await writer.answer()
        assert [position for position, _, _ in landed] == list(range(1, count + 1))
        assert places(await ledger.event_store.read_stream(LATE)) == landed
        await check(ledger, follower)


@pytest.mark.parametrize("count", [1, 3], ids=["single event", "transaction"])
async def test_a_writer_whose_stream_went_on_while_it_was_frozen_learns_that_it_lost(
    connection: Connection, count: int
) -> None:
    async with (
        open_ledger(connection, IMPATIENT) as ledger,
        following(ledger) as follower,
        frozen_writer(connection, "before insert", late(count)) as writer,
    ):
        [winner] = await ledger.event_store.append(
            StreamAppend(LATE, StreamHead(), [make_job_submitted()], EVENT_METADATA, NOON)
        )
        await follower.reaches(winner.position, VOID_AFTER_SECONDS + NOISE_SECONDS)
        writer.thaw()
        assert await writer.answer() == "found 1"
        assert await ledger.event_store.read_stream(LATE) == [winner]
        await check(ledger, follower)


async def test_a_reader_frozen_just_before_it_voids_finds_the_late_event_instead(connection: Connection) -> None:
    async with (
        open_ledger(connection, EventStoreLimits(gap_timeout_seconds=10 * PATIENCE_SECONDS)) as ledger,
        following(ledger) as follower,
        frozen_writer(connection, "before insert", late(1)) as writer,
    ):
        behind = (await ledger.submit_job()).events[0]
        reader = Frozen(_read, connection, "before insert")
        try:
            await reader.until_frozen()
            assert event_positions(follower.seen) == []
            writer.thaw()
            [[landed]] = await writer.answer()
            assert landed[0] == 1
            await follower.reaches(behind.position, NOISE_SECONDS)
            reader.thaw()
            assert await reader.answer() == [landed, *places([behind])]
        finally:
            reader.end()
        await check(ledger, follower)
