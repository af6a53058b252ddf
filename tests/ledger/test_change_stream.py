"""The change stream of a process: listeners load a snapshot when it opens, and then receive each change."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import AutoReconnect

from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import DURABLE, MAJORITY, Connection, Database
from jobledger.ledger.store.change_stream import CallbackListener, ChangeStream
from jobledger.ledger.system import pacing
from tests.support.driver_hooks import CommandCounter, monitor_connection
from tests.support.ledger_setup import Ledger, change_stream_operations, open_ledger
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.tcp_proxy import TcpProxy

Change = Mapping[str, Any]


class RecordingListener:
    """A listener that records its snapshots and the keys of changed documents, in order."""

    def __init__(self, db: Database, collection: str = "numbers") -> None:
        self.collection = collection
        self.snapshots: list[set[int]] = []
        self.changed_keys: list[Any] = []
        self._numbers = db.get_collection(collection, read_concern=MAJORITY)
        self._updated = asyncio.Event()

    async def resync(self, session: AsyncClientSession) -> None:
        self.snapshots.append({document["_id"] async for document in self._numbers.find({}, session=session)})
        self._updated.set()

    def on_change(self, change: Change) -> None:
        self.changed_keys.append(change["documentKey"]["_id"])
        self._updated.set()

    async def wait_until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                self._updated.clear()
                await self._updated.wait()

    def seen_keys(self) -> set[Any]:
        return set().union(*self.snapshots, self.changed_keys)

    async def wait_until_seen(self, *keys: Any) -> None:
        await self.wait_until(lambda: self.seen_keys() >= set(keys))


@pytest.fixture
async def db(connection: Connection) -> AsyncIterator[Database]:
    async with connection.create_client() as client:
        yield client.get_database(connection.db_name, write_concern=DURABLE)


@asynccontextmanager
async def running_stream(db: Database, *listeners: RecordingListener) -> AsyncIterator[asyncio.Task[None]]:
    changes = ChangeStream(db)
    for listener in listeners:
        changes.add_listener(listener)
    async with changes.keep_open() as task:
        yield task


async def kill_stream(db: Database, listener: RecordingListener) -> None:
    """Kill the server's cursor until the stream is reopened."""
    before = len(listener.snapshots)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len(listener.snapshots) == before:
            for operation in await change_stream_operations(db):
                if operation["type"] == "op":  # it may end before it is killed: retry with the next one
                    await db.client.admin.command({"killOp": 1, "op": operation["opid"]})
            await asyncio.sleep(0.05)


async def test_listener_loads_snapshot_then_receives_changes(db: Database) -> None:
    await db.numbers.insert_many([{"_id": 1}, {"_id": 2}])
    listener = RecordingListener(db)
    async with running_stream(db, listener):
        assert listener.snapshots == [{1, 2}]
        await db.numbers.insert_one({"_id": 3})
        await db.numbers.update_one({"_id": 1}, {"$set": {"x": 1}})
        await db.numbers.replace_one({"_id": 2}, {"y": 1})
        await db.numbers.delete_one({"_id": 3})
        await listener.wait_until(lambda: listener.changed_keys[-1:] == [3] and len(listener.changed_keys) >= 4)
        # The last change before the stream opened may be both in the snapshot and in the stream.
        assert listener.changed_keys in ([3, 1, 2, 3], [2, 3, 1, 2, 3])
    assert len(listener.snapshots) == 1


async def test_no_change_is_missed_between_snapshot_and_stream(db: Database) -> None:
    written = 0

    async def write() -> None:
        nonlocal written
        while True:
            await db.numbers.insert_one({"_id": written})
            written += 1

    writing = [asyncio.create_task(write())]

    async def check_one_listener() -> None:
        listener = RecordingListener(db)
        async with running_stream(db, listener):
            written_before = written
            await listener.wait_until(lambda: max(listener.changed_keys, default=-1) > written_before + 3)
            assert len(listener.snapshots) == 1
            assert listener.seen_keys() >= set(range(max(listener.changed_keys)))
            assert listener.changed_keys == sorted(listener.changed_keys)

    for _ in range(12):
        await check_one_listener()
    for task in writing:
        task.cancel()
    await asyncio.gather(*writing, return_exceptions=True)


async def test_listener_receives_changes_of_its_collection_only(db: Database) -> None:
    numbers, letters, more_numbers = RecordingListener(db), RecordingListener(db, "letters"), RecordingListener(db)
    async with running_stream(db, numbers, letters, more_numbers):
        await db.others.insert_one({"_id": 0})
        await db.letters.insert_one({"_id": "a"})
        await db.numbers.insert_one({"_id": 1})
        await letters.wait_until_seen("a")
        await numbers.wait_until_seen(1)
        await more_numbers.wait_until_seen(1)
        assert (numbers.changed_keys, letters.changed_keys, more_numbers.changed_keys) == ([1], ["a"], [1])


async def test_killed_stream_is_reopened_and_all_listeners_resync(db: Database) -> None:
    listener, letters_listener = RecordingListener(db), RecordingListener(db, "letters")
    async with running_stream(db, listener, letters_listener) as task:
        for number in range(3):
            await kill_stream(db, listener)
            await db.numbers.insert_one({"_id": number})
            await listener.wait_until_seen(number)
        assert len(letters_listener.snapshots) == len(listener.snapshots) >= 4
        assert not task.done()


async def test_broken_connection_loses_no_change(mongodb_uri: str, db_name: str, db: Database) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        async with Connection(proxy.uri, db_name).create_client() as client:
            listener = RecordingListener(client[db_name])
            async with running_stream(client[db_name], listener):
                for number in range(30):
                    if number % 10 == 5:
                        proxy.close_connections()
                    await db.numbers.insert_one({"_id": number})
                await listener.wait_until_seen(*range(30))


@pytest.mark.parametrize("error", [AutoReconnect("away"), LedgerUnavailable("away")], ids=["driver", "ledger"])
async def test_resync_is_retried_after_transient_error(db: Database, error: Exception) -> None:
    failures = [error, error]

    async def resync(_session: AsyncClientSession) -> None:
        if failures:
            raise failures.pop()

    listener = RecordingListener(db)
    changes = ChangeStream(db)
    changes.add_listener(CallbackListener("letters", lambda _change: None, resync))
    changes.add_listener(listener)
    async with asyncio.timeout(DEADLINE_SECONDS), changes.keep_open():
        assert not failures
        await db.numbers.insert_one({"_id": 1})
        await listener.wait_until(lambda: listener.changed_keys == [1])


async def test_stream_waits_for_a_server_that_is_starting(db: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    # A member that does not know its replica set yet answers without an operation time. A client meets it if the
    # member restarts while the client opens a connection to it.
    operation_times = [None, None]
    original: property = inspect.getattr_static(AsyncClientSession, "operation_time")

    def read_operation_time(session: AsyncClientSession) -> Any:
        return operation_times.pop() if operation_times else original.__get__(session)

    monkeypatch.setattr(AsyncClientSession, "operation_time", property(read_operation_time))
    listener = RecordingListener(db)
    async with running_stream(db, listener):
        assert not operation_times
        await db.numbers.insert_one({"_id": 1})
        await listener.wait_until_seen(1)


async def test_deleted_event_resyncs_all_listeners_once(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.change_stream._PAUSE_AFTER_REMOVAL_SECONDS", 0.01)
    for _ in range(3):
        await unstreamed_ledger.submit_job()
    events, numbers = RecordingListener(unstreamed_ledger.db, "events"), RecordingListener(unstreamed_ledger.db)
    async with running_stream(unstreamed_ledger.db, events, numbers):
        await unstreamed_ledger.db.events.delete_one({"_id": 2})
        await events.wait_until(lambda: len(events.snapshots) > 1)
        await unstreamed_ledger.submit_job()
        await events.wait_until(lambda: 4 in events.changed_keys)  # a repeated deletion would come before it
    assert events.snapshots == [{1, 2, 3}, {1, 3}]
    assert numbers.snapshots == [set(), set()]


async def do_nothing(_session: AsyncClientSession) -> None: ...


async def raise_error(_session: AsyncClientSession) -> None:
    raise ZeroDivisionError


async def test_error_in_first_resync_is_raised_to_caller(db: Database) -> None:
    changes = ChangeStream(db)
    changes.add_listener(CallbackListener("numbers", lambda _change: None, raise_error))
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(DEADLINE_SECONDS), changes.keep_open():
            pytest.fail("entered although a listener failed")


async def test_error_in_listener_ends_task_and_is_raised(db: Database) -> None:
    def raise_on_change(_change: Change) -> None:
        raise ZeroDivisionError

    changes = ChangeStream(db)
    changes.add_listener(CallbackListener("numbers", raise_on_change, do_nothing))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - leaving the block raises the error again
        async with changes.keep_open() as task:
            await db.numbers.insert_one({"_id": 1})
            await asyncio.wait({task}, timeout=DEADLINE_SECONDS)
            assert task.done()


async def test_exit_under_load_is_quick_and_closes_stream(connection: Connection) -> None:
    async with open_ledger(connection, with_change_stream=False) as ledger:
        listener = RecordingListener(ledger.db)
        async with running_stream(ledger.db, listener):
            await ledger.db.numbers.insert_many([{"_id": number} for number in range(3000)])
            await listener.wait_until(lambda: len(listener.changed_keys) > 100)
            started = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - started < 10
        assert await change_stream_operations(ledger.db) == []


async def test_cancellation_before_stream_opens_leaves_no_task(db: Database) -> None:
    started = asyncio.Event()

    async def block_forever(_session: AsyncClientSession) -> None:
        started.set()
        await asyncio.Event().wait()

    async def run_stream(callback_listener: CallbackListener) -> None:
        changes = ChangeStream(db)
        changes.add_listener(callback_listener)
        async with changes.keep_open():
            pytest.fail("entered before all listeners had a snapshot")

    running = asyncio.create_task(run_stream(CallbackListener("numbers", lambda _change: None, block_forever)))
    await asyncio.wait_for(started.wait(), DEADLINE_SECONDS)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, DEADLINE_SECONDS)
    assert "changes" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_event_types_filter_changes_of_events(unstreamed_ledger: Ledger) -> None:
    listener, numbers = RecordingListener(unstreamed_ledger.db, "events"), RecordingListener(unstreamed_ledger.db)
    changes = ChangeStream(unstreamed_ledger.db, event_types=["JobClaimed"])
    changes.add_listener(listener)
    changes.add_listener(numbers)
    async with changes.keep_open():
        await unstreamed_ledger.submit_job()
        await unstreamed_ledger.db.events.insert_one({"_id": 7, "type": "JobClaimed", "stream": "job-7", "version": 1})
        await unstreamed_ledger.db.numbers.insert_one({"_id": 1})
        await numbers.wait_until(lambda: numbers.changed_keys == [1])
        assert listener.changed_keys == [7]


# Pacing -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_urgent", [False, True], ids=["paced", "urgent"])
async def test_frequent_changes_are_read_together_unless_urgent(
    connection: Connection, monkeypatch: pytest.MonkeyPatch, is_urgent: bool
) -> None:
    monkeypatch.setattr(pacing, "PACE_SECONDS", 0.5)
    commands = CommandCounter()
    async with monitor_connection(connection, commands).create_client() as client:
        db = client.get_database(connection.db_name, write_concern=DURABLE)
        listener = RecordingListener(db)
        changes = ChangeStream(db, get_max_delay=lambda: 0.0 if is_urgent else pacing.PACE_SECONDS)
        changes.add_listener(listener)
        async with changes.keep_open():
            before, started = commands.started_by_name["getMore"], time.monotonic()
            for number in range(100):
                await db.numbers.insert_one({"_id": number})
            await listener.wait_until_seen(*range(100))
            reads = commands.started_by_name["getMore"] - before
            most_paced_reads = pacing.BURST + 1 + (time.monotonic() - started) / 0.5
    assert (reads > most_paced_reads) is is_urgent


async def test_hurried_stream_delivers_without_the_rest_of_its_pause(db: Database) -> None:
    listener, changes = RecordingListener(db), ChangeStream(db, get_max_delay=lambda: 3600.0)
    changes.add_listener(listener)

    def hurry_until_seen(number: int) -> bool:
        changes.hurry()
        return number in listener.changed_keys

    async with changes.keep_open():
        for number in range(pacing.BURST + 2):
            await db.numbers.insert_one({"_id": number})
            await poll_until(partial(hurry_until_seen, number))


async def test_timeout_of_commands_does_not_interrupt_an_idle_stream(connection: Connection) -> None:
    """An idle read waits a second, and longer until its response arrives."""
    short = Connection(f"{connection.uri}{'&' if '?' in connection.uri else '?'}timeoutMS=1000", connection.db_name)
    async with short.create_client() as client:
        listener = RecordingListener(client[connection.db_name])
        changes = ChangeStream(client[connection.db_name])
        changes.add_listener(listener)
        async with changes.keep_open():
            await asyncio.sleep(3.5)
            assert changes.restart_count == 0


async def test_stream_survives_a_dropped_database(db: Database) -> None:
    listener = RecordingListener(db)
    await db.numbers.insert_one({"_id": 1})
    async with running_stream(db, listener) as task:
        await db.client.drop_database(db.name)
        await listener.wait_until(lambda: listener.snapshots[-1] == set())
        await db.numbers.insert_one({"_id": 2})
        await listener.wait_until_seen(2)
        assert not task.done()


# Pauses ---------------------------------------------------------------------------------------------------------


async def test_paused_stream_delivers_nothing_and_resyncs_afterwards(db: Database) -> None:
    listener, changes = RecordingListener(db), ChangeStream(db)
    changes.add_listener(listener)
    async with changes.keep_open():
        await db.numbers.insert_one({"_id": 1})
        await listener.wait_until_seen(1)
        resyncs = len(listener.snapshots)
        with changes.pause():
            await db.numbers.insert_one({"_id": 2})  # may be in the last batch
            await asyncio.sleep(0.1)
            await db.numbers.insert_one({"_id": 3})
            await asyncio.sleep(0.1)
            assert 3 not in listener.changed_keys
        await poll_until(lambda: len(listener.snapshots) == resyncs + 1)
        await db.numbers.insert_one({"_id": 4})
        await listener.wait_until_seen(4)
        assert changes.restart_count == 0
