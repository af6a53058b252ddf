"""SIGSTOP for writers and readers at critical points: readers wait for a limited time, and an append happens once."""

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

from jobledger.ledger.domain.errors import VersionConflict
from jobledger.ledger.domain.events import JobProgressed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.envelope import VOID_STREAM, StreamAppend, StreamHead
from tests.support.driver_hooks import HookPoint, OneTimeHook, monitor_connection, suspend_own_process
from tests.support.event_examples import NOON, make_job_submitted
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    check_log,
    event_positions,
    load_event_documents,
    open_ledger,
    read_all_events,
)
from tests.support.mongodb_provider import transaction_lifetime
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.suspension import is_suspended

VOID_AFTER_SECONDS = 0.3
LIMITS = EventStoreLimits(gap_timeout_seconds=VOID_AFTER_SECONDS)
TRANSACTION_SECONDS = 2
NOISE_SECONDS = 10.0  # for a loaded machine, not a promise
LATE_STREAM = "job-late"

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.faults.test_suspended_writer"])

EventPlace = tuple[int, str, str]  # position, event_id, stream


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Iterator[Connection]:
    """A database whose server aborts open transactions after two seconds."""
    with transaction_lifetime(mongodb_uri, TRANSACTION_SECONDS):
        yield Connection(mongodb_uri, db_name)


# Suspended processes ------------------------------------------------------------------------------------------------


class SuspendedProcess:
    """A process that suspends itself at a hook point, as a laptop does when its lid is closed."""

    def __init__(self, work: Any, *arguments: Any) -> None:
        self._receiver, sender = _context.Pipe(duplex=False)
        self.process = _context.Process(target=_run, args=(work, sender, *arguments), daemon=True)
        self.process.start()
        sender.close()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    async def wait_until_suspended(self) -> None:
        await poll_until(lambda: not self.process.is_alive() or is_suspended(self.pid))
        assert self.process.is_alive(), "the process exited before it reached the hook point"

    def resume(self) -> None:
        assert is_suspended(self.pid), "the process must be suspended until now"
        os.kill(self.pid, signal.SIGCONT)

    async def wait_for_result(self) -> Any:
        """Return the result of the process."""
        has_result = await asyncio.wait_for(
            asyncio.to_thread(self._receiver.poll, DEADLINE_SECONDS), DEADLINE_SECONDS + 5
        )
        assert has_result, "the process returned no result after it was resumed"
        return self._receiver.recv()

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        self._receiver.close()


def _run(work: Any, sender: Pipe, *arguments: Any) -> None:
    sender.send(asyncio.run(work(*arguments)))


async def _append(
    connection: Connection, hook_point: HookPoint, appends: Sequence[StreamAppend]
) -> list[list[EventPlace]] | str:
    """Append concurrently and return the places of the events, or the version conflict."""
    monitored = monitor_connection(connection, OneTimeHook(hook_point, suspend_own_process))
    async with open_ledger(monitored, LIMITS, with_change_stream=False) as ledger:
        try:
            recorded = await asyncio.gather(*(ledger.event_store.append(append) for append in appends))
        except VersionConflict as conflict:
            return f"found {conflict.found}"
    return [get_places(events) for events in recorded]


async def _read(connection: Connection, hook_point: HookPoint) -> list[EventPlace]:
    monitored = monitor_connection(connection, OneTimeHook(hook_point, suspend_own_process))
    async with open_ledger(monitored, LIMITS, with_change_stream=False) as ledger:
        return get_places(await read_all_events(ledger.event_store))


def get_places(events: Sequence[RecordedEvent]) -> list[EventPlace]:
    return [(event.position, event.event_id, event.stream) for event in events]


@asynccontextmanager
async def suspended_writer(
    connection: Connection, hook_point: HookPoint, *appends: StreamAppend
) -> AsyncIterator[SuspendedProcess]:
    writer = SuspendedProcess(_append, connection, hook_point, appends)
    try:
        await writer.wait_until_suspended()
        yield writer
    finally:
        writer.kill()


def make_late_append(count: int, stream: str = LATE_STREAM) -> StreamAppend:
    events = [JobProgressed(attempt=1, step="page", percent=number, message="") for number in range(count)]
    return StreamAppend(stream, StreamHead(), events, EVENT_METADATA, NOON)


# Readers ----------------------------------------------------------------------------------------------------------


class Follower:
    """Collects the events of a live subscription."""

    def __init__(self) -> None:
        self.seen: list[RecordedEvent] = []

    async def wait_for_position(self, position: int, seconds: float) -> None:
        await poll_until(lambda: bool(self.seen) and self.seen[-1].position >= position, seconds=seconds)


@asynccontextmanager
async def run_follower(ledger: Ledger) -> AsyncIterator[Follower]:
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


async def check_readers(ledger: Ledger, follower: Follower) -> None:
    """Check the log, and that the subscription and reads deliver the same events."""
    documents = await load_event_documents(ledger.db)
    check_log(documents)
    await follower.wait_for_position(len(documents), DEADLINE_SECONDS)
    log = await read_all_events(ledger.event_store)
    assert [event.event_id for event in log] == [document["event_id"] for document in documents]
    assert get_places(follower.seen) == get_places(log)


# ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hook_point", "appends"),
    [
        ("after findAndModify", [make_late_append(1)]),
        ("before insert", [make_late_append(1)]),
        ("before insert", [make_late_append(1, f"job-late-{number}") for number in range(5)]),
        ("before insert", [make_late_append(3)]),
    ],
    ids=["single event after its position", "single event", "combined single events", "transaction"],
)
async def test_writer_suspended_before_insert_appends_once_after_the_voids(
    connection: Connection, hook_point: HookPoint, appends: Sequence[StreamAppend]
) -> None:
    total = sum(len(append.events) for append in appends)
    async with (
        open_ledger(connection, LIMITS) as ledger,
        run_follower(ledger) as follower,
        suspended_writer(connection, hook_point, *appends) as writer,
    ):
        started_at = monotonic()
        later_event = (await ledger.submit_job()).events[0]
        await follower.wait_for_position(later_event.position, VOID_AFTER_SECONDS + NOISE_SECONDS)
        assert monotonic() - started_at > VOID_AFTER_SECONDS, "a slow writer has time before its position is voided"
        before = await read_all_events(ledger.event_store)
        assert [event.stream for event in before] == [VOID_STREAM] * total + [later_event.stream]

        writer.resume()
        results = await writer.wait_for_result()
        landed = [place for append in results for place in append]
        assert sorted(position for position, _, _ in landed) == list(range(total + 2, 2 * total + 2))
        for append, result in zip(appends, results, strict=True):
            first_position = result[0][0]
            expected_positions = list(range(first_position, first_position + len(append.events)))
            assert [position for position, _, _ in result] == expected_positions
            assert get_places(await ledger.event_store.read_stream(append.stream)) == result
        assert get_places(await read_all_events(ledger.event_store)) == get_places(before) + sorted(landed)
        await check_readers(ledger, follower)


async def test_writer_suspended_in_a_transaction_delays_readers_until_its_abort(
    connection: Connection,
) -> None:
    async with (
        open_ledger(connection, LIMITS) as ledger,
        run_follower(ledger) as follower,
        suspended_writer(connection, "before commitTransaction", make_late_append(3)) as writer,
    ):
        later_event = (await ledger.submit_job()).events[0]
        assert later_event.position == 4
        # The server looks for expired transactions at intervals of half their lifetime.
        await follower.wait_for_position(4, 1.5 * TRANSACTION_SECONDS + 1 + VOID_AFTER_SECONDS + NOISE_SECONDS)
        before = await read_all_events(ledger.event_store)
        assert [event.stream for event in before] == [VOID_STREAM] * 3 + [later_event.stream]
        assert await ledger.event_store.read_stream(LATE_STREAM) == []

        writer.resume()
        [landed] = await writer.wait_for_result()
        assert [position for position, _, _ in landed] == [5, 6, 7]
        assert get_places(await read_all_events(ledger.event_store)) == get_places(before) + landed
        await check_readers(ledger, follower)


@pytest.mark.parametrize(
    ("hook_point", "count"),
    [("after insert", 1), ("after commitTransaction", 3)],
    ids=["single event", "transaction"],
)
async def test_writer_suspended_after_its_append_does_not_delay_readers(
    connection: Connection, hook_point: HookPoint, count: int
) -> None:
    async with (
        open_ledger(connection, LIMITS) as ledger,
        run_follower(ledger) as follower,
        suspended_writer(connection, hook_point, make_late_append(count)) as writer,
    ):
        await ledger.submit_job()
        await follower.wait_for_position(count + 1, NOISE_SECONDS)
        assert all(event.stream != VOID_STREAM for event in follower.seen)
        writer.resume()
        [landed] = await writer.wait_for_result()
        assert [position for position, _, _ in landed] == list(range(1, count + 1))
        assert get_places(await ledger.event_store.read_stream(LATE_STREAM)) == landed
        await check_readers(ledger, follower)


@pytest.mark.parametrize("count", [1, 3], ids=["single event", "transaction"])
async def test_writer_suspended_while_its_stream_changes_gets_a_version_conflict(
    connection: Connection, count: int
) -> None:
    async with (
        open_ledger(connection, LIMITS) as ledger,
        run_follower(ledger) as follower,
        suspended_writer(connection, "before insert", make_late_append(count)) as writer,
    ):
        [winner] = await ledger.event_store.append(
            StreamAppend(LATE_STREAM, StreamHead(), [make_job_submitted()], EVENT_METADATA, NOON)
        )
        await follower.wait_for_position(winner.position, VOID_AFTER_SECONDS + NOISE_SECONDS)
        writer.resume()
        assert await writer.wait_for_result() == "found 1"
        assert await ledger.event_store.read_stream(LATE_STREAM) == [winner]
        await check_readers(ledger, follower)


async def test_reader_suspended_before_it_voids_reads_the_late_event(connection: Connection) -> None:
    async with (
        open_ledger(connection, EventStoreLimits(gap_timeout_seconds=10 * DEADLINE_SECONDS)) as ledger,
        run_follower(ledger) as follower,
        suspended_writer(connection, "before insert", make_late_append(1)) as writer,
    ):
        later_event = (await ledger.submit_job()).events[0]
        reader = SuspendedProcess(_read, connection, "before insert")
        try:
            await reader.wait_until_suspended()
            assert event_positions(follower.seen) == []
            writer.resume()
            [[landed]] = await writer.wait_for_result()
            assert landed[0] == 1
            await follower.wait_for_position(later_event.position, NOISE_SECONDS)
            reader.resume()
            assert await reader.wait_for_result() == [landed, *get_places([later_event])]
        finally:
            reader.kill()
        await check_readers(ledger, follower)
