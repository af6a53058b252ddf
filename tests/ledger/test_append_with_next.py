"""An event and the next one of its stream, written by one command: the second one is there only after the first one."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import pytest
from pymongo.errors import AutoReconnect

from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.errors import InvalidEvent, NotDue, VersionConflict
from jobledger.ledger.domain.events import JobClaimed
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.store.appender import Appender, EventStoreLimits
from jobledger.ledger.store.command_handler import create_claimed_job, create_job_id, load_stream_state
from jobledger.ledger.store.envelope import VOID_STREAM
from jobledger.ledger.store.event_store import EventStore
from tests.support.event_examples import NOON, make_job_submitted
from tests.support.event_stores import FAST_GAP_LIMITS, PausableEventStore, create_append, open_pausable_store
from tests.support.ledger_setup import EVENT_METADATA, Ledger, check_log, load_event_documents, open_ledger
from tests.support.polling import DEADLINE_SECONDS, poll_until


async def create(event_store: EventStore, job_id: str = "job-1") -> int:
    command = SubmitJob(make_job_submitted())
    return (await create_claimed_job(event_store, job_id, command, "worker-1", meta=EVENT_METADATA)).position


async def list_types(db: Database, stream: str = "job-1") -> list[tuple[int, str]]:
    return [(document["_id"], document["type"]) for document in await load_event_documents(db, {"stream": stream})]


async def test_job_is_claimed_at_the_position_after_its_submission(ledger: Ledger) -> None:
    assert await create(ledger.event_store) == 1
    documents = await load_event_documents(ledger.db)
    check_log(documents)
    assert [document["type"] for document in documents] == ["JobSubmitted", "JobClaimed"]
    assert [document["meta"]["actor"] for document in documents] == [EVENT_METADATA.actor, "system"]
    assert documents[1]["data"] == {"worker_id": "worker-1", "attempt": 1, "via": "dispatched"}


async def test_many_appends_are_written_together_with_their_next_events(ledger: Ledger) -> None:
    single = [ledger.event_store.append(create_append(make_job_submitted(), stream=f"job-s{it}")) for it in range(20)]
    await asyncio.gather(*(create(ledger.event_store, f"job-c{number}") for number in range(20)), *single)
    check_log(await load_event_documents(ledger.db))
    for number in range(20):
        [(first, _), (second, _)] = await list_types(ledger.db, f"job-c{number}")
        assert second == first + 1


async def test_existing_stream_gets_no_next_event(ledger: Ledger) -> None:
    await create(ledger.event_store)
    other = create(ledger.event_store, "job-2")
    results = await asyncio.gather(create(ledger.event_store), other, return_exceptions=True)
    assert isinstance(results[0], VersionConflict)
    assert [name for _, name in await list_types(ledger.db, "job-2")] == ["JobSubmitted", "JobClaimed"]
    assert [name for _, name in await list_types(ledger.db)] == ["JobSubmitted", "JobClaimed"]
    check_log(await load_event_documents(ledger.db))


async def test_job_that_is_not_due_is_not_written(ledger: Ledger) -> None:
    later = SubmitJob(make_job_submitted(not_before=NOON.replace(year=2999)))
    with pytest.raises(NotDue):
        await create_claimed_job(ledger.event_store, "job-1", later, "worker-1", meta=EVENT_METADATA)
    assert await load_event_documents(ledger.db) == []


async def test_event_that_bson_cannot_express_leaves_no_gap(connection: Connection) -> None:
    async with open_ledger(connection, EventStoreLimits(gap_timeout_seconds=60)) as ledger:
        rejected = SubmitJob(make_job_submitted(parameters={"id": UUID(int=1)}))
        [error, *_] = await asyncio.gather(
            create_claimed_job(ledger.event_store, "job-1", rejected, "worker-1", meta=EVENT_METADATA),
            *(create(ledger.event_store, f"job-{number}") for number in range(2, 5)),
            return_exceptions=True,
        )
        assert isinstance(error, InvalidEvent)
        documents = await load_event_documents(ledger.db)
        check_log(documents)
        assert {document["stream"] for document in documents} == {"job-2", "job-3", "job-4", VOID_STREAM}


async def pause_create(store: PausableEventStore, stack: AsyncExitStack) -> asyncio.Task[int]:
    """Start to create a job, and pause before its insert at the positions 1 and 2."""
    store.may_insert.clear()
    creating = asyncio.create_task(create(store))
    stack.callback(creating.cancel)
    async with asyncio.timeout(DEADLINE_SECONDS):
        await store.is_reserved.wait()
    return creating


@pytest.mark.parametrize(
    ("voided", "expected"),
    [([1], [(3, "JobSubmitted")]), ([2], [(1, "JobSubmitted")]), ([1, 2], [(3, "JobSubmitted")])],
)
async def test_next_event_is_dropped_if_readers_have_voided_a_position(
    connection: Connection, voided: list[int], expected: list[tuple[int, str]]
) -> None:
    async with AsyncExitStack() as stack:
        store = await stack.enter_async_context(open_pausable_store(connection))
        creating = await pause_create(store, stack)
        await store._appender.void_positions(voided)
        store.may_insert.set()
        await creating
        assert await list_types(store.db) == expected
        check_log(await load_event_documents(store.db))


async def test_other_claim_before_a_repeated_insert_wins(connection: Connection) -> None:
    """The response to the first insert is lost, and another worker claims the job before the insert is repeated."""

    class LosingAppender(Appender):
        is_lost = False

        async def _insert_documents(self, documents: list[Any], *arguments: Any, **options: Any) -> set[int]:
            if self.is_lost:
                return await super()._insert_documents(documents, *arguments, **options)
            self.is_lost = True
            await super()._insert_documents(documents[:1])  # the server crashes after the first document
            state = await load_stream_state(other, "job-1")
            claim = create_append(JobClaimed(worker_id="worker-2", attempt=1), stream="job-1", head=state.head)
            await other.append(claim)
            raise AutoReconnect("connection closed")

    class LosingEventStore(EventStore):
        def __init__(self, db: Database, limits: EventStoreLimits) -> None:
            super().__init__(db, limits)
            self._appender = LosingAppender(db, self.events, limits)

    async with (
        open_ledger(connection, FAST_GAP_LIMITS) as other_ledger,
        open_ledger(connection, FAST_GAP_LIMITS, store_class=LosingEventStore) as ledger,
    ):
        other = other_ledger.event_store
        assert await create(ledger.event_store) == 1

        async def has_read_all() -> bool:
            return len(await ledger.event_store.read()) == 3

        await poll_until(has_read_all, "the gap at position 2 is filled")
        documents = await load_event_documents(ledger.db)
        check_log(documents)
        assert [document["data"].get("worker_id") for document in documents] == [None, None, "worker-2"]


@pytest.mark.parametrize("inserted", [0, 1, 2])
async def test_lost_connection_writes_the_job_once(connection: Connection, inserted: int) -> None:
    class LosingAppender(Appender):
        failures_left = 1

        async def _insert_documents(self, documents: list[Any], *arguments: Any, **options: Any) -> set[int]:
            if not self.failures_left:
                return await super()._insert_documents(documents, *arguments, **options)
            self.failures_left -= 1
            if inserted:
                await super()._insert_documents(documents[:inserted])
            raise AutoReconnect("connection closed")

    class LosingEventStore(EventStore):
        def __init__(self, db: Database, limits: EventStoreLimits) -> None:
            super().__init__(db, limits)
            self._appender = LosingAppender(db, self.events, limits)

    limits = EventStoreLimits(gap_timeout_seconds=60)
    async with open_ledger(connection, limits, store_class=LosingEventStore) as ledger:
        await create(ledger.event_store)
        await ledger.event_store.append(create_append(make_job_submitted(), stream=create_job_id()))
        check_log(await load_event_documents(ledger.db))  # the appender has filled the gap
        names = [name for _, name in await list_types(ledger.db)]
        assert names == (["JobSubmitted", "JobClaimed"] if inserted == 2 else ["JobSubmitted"])
