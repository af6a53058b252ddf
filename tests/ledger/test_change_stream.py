"""The change stream of a process: what happened before it opened is read, what happened after is heard."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest
from pymongo.asynchronous.client_session import AsyncClientSession
from pymongo.errors import AutoReconnect

from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import DURABLE, MAJORITY, Connection, Database
from jobledger.ledger.store.change_stream import CallbackListener, ChangeStream
from tests.support.ledger_setup import DEADLINE_SECONDS, Ledger, change_stream_operations, open_ledger
from tests.support.tcp_proxy import TcpProxy

Change = Mapping[str, Any]


class Diary:
    """A listener that notes what it read and what it heard, in order."""

    def __init__(self, db: Database, collection: str = "numbers") -> None:
        self.collection = collection
        self.read: list[set[int]] = []
        self.heard: list[Any] = []
        self._numbers = db.get_collection(collection, read_concern=MAJORITY)
        self._more = asyncio.Event()

    async def resync(self, session: AsyncClientSession) -> None:
        self.read.append({document["_id"] async for document in self._numbers.find({}, session=session)})
        self._more.set()

    def on_change(self, change: Change) -> None:
        self.heard.append(change["documentKey"]["_id"])
        self._more.set()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not condition():
                self._more.clear()
                await self._more.wait()

    def knows(self) -> set[Any]:
        return set().union(*self.read, self.heard)

    async def until_it_knows(self, *keys: Any) -> None:
        await self.until(lambda: self.knows() >= set(keys))


@pytest.fixture
async def db(connection: Connection) -> AsyncIterator[Database]:
    async with connection.client() as client:
        yield client.get_database(connection.db_name, write_concern=DURABLE)


@asynccontextmanager
async def listening(db: Database, *diaries: Diary) -> AsyncIterator[asyncio.Task[None]]:
    changes = ChangeStream(db)
    for diary in diaries:
        changes.add_listener(diary)
    async with changes.running() as task:
        yield task


async def end_stream(db: Database, diary: Diary) -> None:
    """End the server's side, in a way that the driver does not mend by itself, until it was opened anew."""
    before = len(diary.read)
    async with asyncio.timeout(DEADLINE_SECONDS):
        while len(diary.read) == before:
            for operation in await change_stream_operations(db):
                if operation["type"] == "op":  # may be over before it is killed: then the next one
                    await db.client.admin.command({"killOp": 1, "op": operation["opid"]})
            await asyncio.sleep(0.05)


async def test_a_listener_reads_what_there_is_and_then_hears_what_comes(db: Database) -> None:
    await db.numbers.insert_many([{"_id": 1}, {"_id": 2}])
    diary = Diary(db)
    async with listening(db, diary):
        assert diary.read == [{1, 2}]
        await db.numbers.insert_one({"_id": 3})
        await db.numbers.update_one({"_id": 1}, {"$set": {"x": 1}})
        await db.numbers.replace_one({"_id": 2}, {"y": 1})
        await db.numbers.delete_one({"_id": 3})
        await diary.until(lambda: diary.heard[-1:] == [3] and len(diary.heard) >= 4)
        # The last change before the opening may be both read and heard.
        assert diary.heard in ([3, 1, 2, 3], [2, 3, 1, 2, 3])
    assert len(diary.read) == 1


async def test_nothing_falls_between_reading_and_hearing_while_others_write(db: Database) -> None:
    written = 0

    async def write() -> None:
        nonlocal written
        while True:
            await db.numbers.insert_one({"_id": written})
            written += 1

    writing = [asyncio.create_task(write())]

    async def open_and_listen() -> None:
        diary = Diary(db)
        async with listening(db, diary):
            so_far = written
            await diary.until(lambda: max(diary.heard, default=-1) > so_far + 3)
            assert len(diary.read) == 1
            assert diary.knows() >= set(range(max(diary.heard)))
            assert diary.heard == sorted(diary.heard)

    for _ in range(12):
        await open_and_listen()
    for task in writing:
        task.cancel()
    await asyncio.gather(*writing, return_exceptions=True)


async def test_every_listener_hears_of_its_own_collection_only(db: Database) -> None:
    numbers, letters, more = Diary(db), Diary(db, "letters"), Diary(db)
    async with listening(db, numbers, letters, more):
        await db.others.insert_one({"_id": 0})
        await db.letters.insert_one({"_id": "a"})
        await db.numbers.insert_one({"_id": 1})
        await letters.until_it_knows("a")
        await numbers.until_it_knows(1)
        await more.until_it_knows(1)
        assert (numbers.heard, letters.heard, more.heard) == ([1], ["a"], [1])


async def test_a_stream_that_was_ended_is_opened_again_and_everybody_reads_anew(db: Database) -> None:
    diary, other = Diary(db), Diary(db, "letters")
    async with listening(db, diary, other) as task:
        for number in range(3):
            await end_stream(db, diary)
            await db.numbers.insert_one({"_id": number})
            await diary.until_it_knows(number)
        assert len(other.read) == len(diary.read) >= 4
        assert not task.done()


async def test_a_broken_connection_loses_no_change(mongodb_uri: str, db_name: str, db: Database) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        async with Connection(proxy.uri, db_name).client() as client:
            diary = Diary(client[db_name])
            async with listening(client[db_name], diary):
                for number in range(30):
                    if number % 10 == 5:
                        proxy.close_connections()
                    await db.numbers.insert_one({"_id": number})
                await diary.until_it_knows(*range(30))


@pytest.mark.parametrize("error", [AutoReconnect("away"), LedgerUnavailable("away")], ids=["driver", "ledger"])
async def test_a_listener_that_cannot_read_now_is_asked_again(db: Database, error: Exception) -> None:
    failures = [error, error]

    async def resync(_session: AsyncClientSession) -> None:
        if failures:
            raise failures.pop()

    diary = Diary(db)
    changes = ChangeStream(db)
    changes.add_listener(CallbackListener("letters", lambda _change: None, resync))
    changes.add_listener(diary)
    async with asyncio.timeout(DEADLINE_SECONDS), changes.running():
        assert not failures
        await db.numbers.insert_one({"_id": 1})
        await diary.until(lambda: diary.heard == [1])


async def test_a_deleted_event_makes_all_listeners_read_again_once(
    unstreamed_ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.change_stream._PAUSE_AFTER_REMOVAL_SECONDS", 0.01)
    for _ in range(3):
        await unstreamed_ledger.submit_job()
    events, numbers = Diary(unstreamed_ledger.db, "events"), Diary(unstreamed_ledger.db)
    async with listening(unstreamed_ledger.db, events, numbers):
        await unstreamed_ledger.db.events.delete_one({"_id": 2})
        await events.until(lambda: len(events.read) > 1)
        await asyncio.sleep(0.2)  # the deletion may be heard again, and must not count again
    assert events.read == [{1, 2, 3}, {1, 3}]
    assert numbers.read == [set(), set()]


async def fine(_session: AsyncClientSession) -> None: ...


async def broken(_session: AsyncClientSession) -> None:
    raise ZeroDivisionError


async def test_a_fault_at_start_is_raised_to_whoever_starts(db: Database) -> None:
    changes = ChangeStream(db)
    changes.add_listener(CallbackListener("numbers", lambda _change: None, broken))
    with pytest.raises(ZeroDivisionError):
        async with asyncio.timeout(DEADLINE_SECONDS), changes.running():
            pytest.fail("entered although nobody listens")


async def test_a_fault_in_a_listener_ends_the_task_and_is_not_hidden(db: Database) -> None:
    def trip(_change: Change) -> None:
        raise ZeroDivisionError

    changes = ChangeStream(db)
    changes.add_listener(CallbackListener("numbers", trip, fine))
    with pytest.raises(ZeroDivisionError):  # noqa: PT012 - it is raised again when the block is left
        async with changes.running() as task:
            await db.numbers.insert_one({"_id": 1})
            await asyncio.wait({task}, timeout=DEADLINE_SECONDS)
            assert task.done()


async def test_leaving_while_changes_stream_in_is_quick_and_closes_the_stream(connection: Connection) -> None:
    async with open_ledger(connection, with_change_stream=False) as ledger:
        diary = Diary(ledger.db)
        async with listening(ledger.db, diary):
            await ledger.db.numbers.insert_many([{"_id": number} for number in range(3000)])
            await diary.until(lambda: len(diary.heard) > 100)
            begun = asyncio.get_running_loop().time()
        assert asyncio.get_running_loop().time() - begun < 5
        assert await change_stream_operations(ledger.db) == []


async def test_being_cancelled_before_the_stream_is_open_leaves_no_task_behind(db: Database) -> None:
    begun = asyncio.Event()

    async def never(_session: AsyncClientSession) -> None:
        begun.set()
        await asyncio.Event().wait()

    async def run(reaction: CallbackListener) -> None:
        changes = ChangeStream(db)
        changes.add_listener(reaction)
        async with changes.running():
            pytest.fail("entered before everybody has read")

    running = asyncio.create_task(run(CallbackListener("numbers", lambda _change: None, never)))
    await asyncio.wait_for(begun.wait(), DEADLINE_SECONDS)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(running, DEADLINE_SECONDS)
    assert "changes" not in {task.get_name() for task in asyncio.all_tasks()}


async def test_a_process_may_hear_of_some_types_of_events_only(unstreamed_ledger: Ledger) -> None:
    diary, numbers = Diary(unstreamed_ledger.db, "events"), Diary(unstreamed_ledger.db)
    changes = ChangeStream(unstreamed_ledger.db, event_types=["JobClaimed"])
    changes.add_listener(diary)
    changes.add_listener(numbers)
    async with changes.running():
        await unstreamed_ledger.submit_job()
        await unstreamed_ledger.db.events.insert_one({"_id": 7, "type": "JobClaimed", "stream": "job-7", "version": 1})
        await unstreamed_ledger.db.numbers.insert_one({"_id": 1})
        await numbers.until(lambda: numbers.heard == [1])
        assert diary.heard == [7]
