"""Verification of intact logs: all types, ranges of positions, bounded memory, gaps and concurrent appends."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from contextlib import AsyncExitStack
from datetime import timedelta

import pytest
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.commands import ChangeAccess, ClaimJob
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store import verification
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.envelope import StreamHead, build_void_document
from jobledger.ledger.store.event_store import EventStore, StoredDocument
from jobledger.ledger.store.hash_chain import GENESIS_HASH
from jobledger.ledger.store.verification import IntegrityProblem, VerificationResult, verify_log
from tests.ledger.verification.conftest import (
    LAST_POSITION,
    PAGE_EVENTS,
    SHORT_GAP_LIMITS,
    SmallPageStore,
    add_hash,
    append_every_type,
    check_missing_at,
    check_problem_at,
    check_valid,
    compute_digest,
    create_history,
    get_digest,
    replace_documents,
)
from tests.support.event_examples import ACCESS, NOON
from tests.support.ledger_setup import (
    EVENT_METADATA,
    Ledger,
    create_position_gap,
    load_event_documents,
    open_ledger,
    read_all_events,
)
from tests.support.polling import DEADLINE_SECONDS

# Valid logs -------------------------------------------------------------------------------------------------------


async def test_intact_log_is_valid(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    assert await verify_log(unstreamed_ledger.event_store) == VerificationResult(
        LAST_POSITION, 2, LAST_POSITION, compute_digest(documents)[1], None
    )


async def test_log_with_every_event_type_is_valid(unstreamed_ledger: Ledger) -> None:
    documents = await append_every_type(unstreamed_ledger)
    assert check_valid(await verify_log(unstreamed_ledger.event_store)).events == len(documents)


async def test_empty_log_is_valid(unstreamed_ledger: Ledger) -> None:
    assert await verify_log(unstreamed_ledger.event_store) == VerificationResult(0, 0, 0, GENESIS_HASH, None)


async def test_verification_writes_nothing(unstreamed_ledger: Ledger) -> None:
    await create_position_gap(unstreamed_ledger.db)
    await unstreamed_ledger.submit_job()
    before = await load_event_documents(unstreamed_ledger.db)
    await verify_log(unstreamed_ledger.event_store)
    assert await load_event_documents(unstreamed_ledger.db) == before


async def test_log_is_valid_during_concurrent_appends(connection: Connection) -> None:
    async with AsyncExitStack() as stack:
        ledgers = [await stack.enter_async_context(open_ledger(connection, with_change_stream=False)) for _ in range(3)]
        shared = (await ledgers[0].submit_job()).events[0].stream
        stop = asyncio.Event()

        async def write(ledger: Ledger) -> None:
            while not stop.is_set():
                submitted = await ledger.submit_job()
                await handle_command(
                    ledger.event_store, submitted.events[0].stream, ClaimJob("w1", NOON), meta=EVENT_METADATA
                )
                await handle_command(
                    ledger.event_store, shared, ChangeAccess("user:alice", ACCESS), meta=EVENT_METADATA
                )

        checker = ledgers[-1].event_store
        async with asyncio.timeout(4 * DEADLINE_SECONDS), asyncio.TaskGroup() as writing:
            try:
                for ledger in ledgers[:2]:
                    for _ in range(3):
                        writing.create_task(write(ledger))
                previous = check_valid(await verify_log(checker))
                for _ in range(15):
                    head = await checker.read_head_position()
                    following = check_valid(await verify_log(checker, expected_digest=get_digest(previous)))
                    assert following.position >= max(head, previous.position)
                    assert following.events == following.position
                    previous = following
            finally:
                stop.set()
        assert check_valid(await verify_log(checker)).events == await checker.read_head_position()


# Ranges -----------------------------------------------------------------------------------------------------------


async def test_every_range_of_intact_log_is_valid(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    for after in range(LAST_POSITION + 2):
        for up_to in (*range(after, LAST_POSITION + 1), LAST_POSITION + 5, None):
            result = check_valid(await verify_log(unstreamed_ledger.event_store, after=after, up_to=up_to))
            stored = documents[after:up_to]
            assert result.events == len(stored)
            assert result.voided == sum(document["stream"] == "void" for document in stored)
            if stored:
                assert result.position == stored[-1]["_id"]
            # A range that starts later has no digest, because it would look like a digest of the whole log.
            assert result.digest == (None if after else compute_digest(stored)[1] if stored else GENESIS_HASH)


async def test_range_detects_problems_inside_only(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    for position in (1, 4, 6, 9, LAST_POSITION):
        forged = documents[position - 1] | {"time": NOON - timedelta(days=1)}
        await replace_documents(unstreamed_ledger, forged)
        for after in range(LAST_POSITION):
            for up_to in range(after + 1, LAST_POSITION + 1):
                result = await verify_log(unstreamed_ledger.event_store, after=after, up_to=up_to)
                if after < position <= up_to:
                    check_problem_at(result, forged, "its hash", after=after)
                else:
                    check_valid(result)
        await replace_documents(unstreamed_ledger, documents[position - 1])


@pytest.mark.parametrize("after", range(10))
async def test_broken_link_to_event_before_range_is_detected(unstreamed_ledger: Ledger, after: int) -> None:
    documents = await create_history(unstreamed_ledger)
    await replace_documents(unstreamed_ledger, add_hash(documents[2] | {"meta": {"actor": "user:mallory"}}))
    check_problem_at(
        await verify_log(unstreamed_ledger.event_store, after=after), documents[9], "is not linked", after=after
    )


async def test_misplaced_earlier_version_in_range_is_detected(
    unstreamed_ledger: Ledger,
) -> None:
    documents = await create_history(unstreamed_ledger)
    third, tenth = documents[2], documents[9]
    await replace_documents(unstreamed_ledger, build_void_document(10))
    await replace_documents(unstreamed_ledger, build_void_document(3), third | {"_id": 10})
    await replace_documents(unstreamed_ledger, tenth | {"_id": 3})
    for after in (1, 2):
        check_problem_at(
            await verify_log(unstreamed_ledger.event_store, after=after),
            tenth | {"_id": 3},
            "no event precedes it: version 2 is missing, or in the wrong place",
            after=after,
        )


async def test_gap_is_detected_only_inside_range(unstreamed_ledger: Ledger) -> None:
    await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.delete_one({"_id": 9})
    check_valid(await verify_log(unstreamed_ledger.event_store, after=9))
    check_valid(await verify_log(unstreamed_ledger.event_store, up_to=8))
    result = await verify_log(unstreamed_ledger.event_store, after=7, up_to=10)
    assert result.problem is not None
    assert (result.problem.position, result.events, result.position) == (9, 1, 8)


async def test_link_to_event_without_hash_before_range_is_detected(unstreamed_ledger: Ledger) -> None:
    documents = await create_history(unstreamed_ledger)
    await unstreamed_ledger.db.events.update_one({"_id": 3}, {"$unset": {"hash": 1}})
    check_problem_at(await verify_log(unstreamed_ledger.event_store, after=5), documents[9], after=5)


async def test_on_progress_receives_position_and_end(connection: Connection) -> None:
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        await create_history(ledger)
        progress: list[tuple[int, int]] = []
        await verify_log(ledger.event_store, on_progress=lambda position, up_to: progress.append((position, up_to)))
        assert progress == [(PAGE_EVENTS, LAST_POSITION), (LAST_POSITION, LAST_POSITION)]
        progress.clear()
        await verify_log(
            ledger.event_store,
            after=2,
            up_to=10,
            on_progress=lambda position, up_to: progress.append((position, up_to)),
        )
        assert progress == [(9, 10), (10, 10)]


# Memory -----------------------------------------------------------------------------------------------------------

STREAMS, ROUNDS, MAX_STREAMS = 30, 4, 5


class MeasuredDict(OrderedDict[str, StreamHead]):
    """A dictionary that records its largest size."""

    largest = 0

    def __setitem__(self, name: str, head: StreamHead) -> None:
        super().__setitem__(name, head)
        MeasuredDict.largest = max(MeasuredDict.largest, len(self))


@pytest.fixture
def low_memory_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "_MAX_CACHED_HEADS", MAX_STREAMS)


async def append_alternately(ledger: Ledger) -> list[Document]:
    """Append to many streams in turn, so that each continues after all others."""
    jobs = [await ledger.submit_job() for _ in range(STREAMS)]
    for _ in range(ROUNDS - 1):
        for number, job in enumerate(jobs):
            changed = ChangeAccess("user:alice", ACCESS)
            jobs[number] = await handle_command(
                ledger.event_store, job.events[0].stream, changed, meta=EVENT_METADATA, stream_state=job.stream_state
            )
    return await load_event_documents(ledger.db)


@pytest.mark.usefixtures("low_memory_limit")
@pytest.mark.parametrize("kind", [EventStore, SmallPageStore], ids=["one page", "many pages"])
async def test_more_streams_than_memory_limit_are_valid(connection: Connection, kind: type[EventStore]) -> None:
    async with open_ledger(connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=kind) as ledger:
        documents = await append_alternately(ledger)
        assert check_valid(await verify_log(ledger.event_store)).events == len(documents) == STREAMS * ROUNDS
        for after in (1, STREAMS - 3, STREAMS * 2 + 1):
            check_valid(await verify_log(ledger.event_store, after=after))


async def test_one_stream_above_memory_limit_is_valid(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    """The least recently used stream continues right after the first stream above the limit."""
    monkeypatch.setattr(verification, "_MAX_CACHED_HEADS", 2 * PAGE_EVENTS)
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        first, *_ = [await ledger.submit_job() for _ in range(2 * PAGE_EVENTS)]
        await ledger.submit_job()
        await handle_command(
            ledger.event_store, first.events[0].stream, ChangeAccess("user:alice", ACCESS), meta=EVENT_METADATA
        )
        check_valid(await verify_log(ledger.event_store))


@pytest.mark.usefixtures("low_memory_limit")
@pytest.mark.parametrize("position", [STREAMS // 2, STREAMS, STREAMS + 4, 3 * STREAMS - 1])
async def test_evicted_stream_is_still_verified(connection: Connection, position: int) -> None:
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        documents = await append_alternately(ledger)
        original, following = documents[position - 1], documents[position - 1 + STREAMS]
        assert following["stream"] == original["stream"]
        await replace_documents(ledger, add_hash(original | {"meta": {"actor": "user:mallory"}}))
        check_problem_at(await verify_log(ledger.event_store), following, "is not linked to the event before it")
        await replace_documents(ledger, build_void_document(position))
        check_problem_at(await verify_log(ledger.event_store), following, f"version {original['version']} is missing")


@pytest.mark.usefixtures("low_memory_limit")
async def test_remembered_streams_are_bounded_by_limit_and_page(
    connection: Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verification, "OrderedDict", MeasuredDict)
    MeasuredDict.largest = 0
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        for _ in range(10 * PAGE_EVENTS):
            await ledger.submit_job()
        check_valid(await verify_log(ledger.event_store))
    assert 0 < MeasuredDict.largest <= MAX_STREAMS + PAGE_EVENTS


# Gaps -------------------------------------------------------------------------------------------------------------


class GapWatchingStore(EventStore):
    """An event store that pauses at the second read that begins with a gap, until the test has filled the gap."""

    def __init__(self, db: Database, limits: EventStoreLimits) -> None:
        super().__init__(db, limits)
        self.gap_reads = 0
        self.is_waiting = asyncio.Event()
        self.is_filled = asyncio.Event()

    async def read_documents(self, *, after: int, limit: int) -> list[StoredDocument]:
        documents = await super().read_documents(after=after, limit=limit)
        if documents and documents[0][0]["_id"] != after + 1:
            self.gap_reads += 1
            if self.gap_reads == 2:
                self.is_waiting.set()
                await self.is_filled.wait()
        return documents

    async def fill_gap(self, document: Document) -> None:
        """Wait until the verification has read the gap twice, then insert the missing event."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            await self.is_waiting.wait()
        await self.db.events.insert_one(document)
        self.gap_reads = 0
        self.is_waiting.clear()
        self.is_filled.set()
        self.is_filled = asyncio.Event()


async def test_gap_of_crashed_appender_is_reported_until_filled(unstreamed_ledger: Ledger) -> None:
    await unstreamed_ledger.submit_job()
    await create_position_gap(unstreamed_ledger.db)
    await unstreamed_ledger.submit_job()
    result = await verify_log(unstreamed_ledger.event_store)
    check_missing_at(result, 2)
    assert "no reader has filled the gap yet" in str(result.problem)
    await read_all_events(unstreamed_ledger.event_store)
    assert check_valid(await verify_log(unstreamed_ledger.event_store)).voided == 1


async def test_gap_closed_during_verification_is_valid(short_gap_ledger: Ledger) -> None:
    documents = await create_history(short_gap_ledger)
    await short_gap_ledger.db.events.delete_one({"_id": 9})
    store = GapWatchingStore(short_gap_ledger.db, SHORT_GAP_LIMITS)
    verifying = asyncio.create_task(verify_log(store))
    await store.fill_gap(documents[8])
    assert not verifying.done()
    assert check_valid(await verifying).events == LAST_POSITION


async def test_timeout_applies_to_each_gap(short_gap_ledger: Ledger) -> None:
    """Each gap has its own timeout, because a slow appender may have reserved many positions."""
    documents = await create_history(short_gap_ledger)
    await short_gap_ledger.db.events.delete_many({"_id": {"$in": [2, 4, 6, 8]}})
    store = GapWatchingStore(short_gap_ledger.db, SHORT_GAP_LIMITS)
    verifying = asyncio.create_task(verify_log(store))
    for position in (2, 4, 6, 8):
        await store.fill_gap(documents[position - 1])
    assert check_valid(await verifying).events == LAST_POSITION


async def test_events_after_start_of_verification_are_ignored(connection: Connection) -> None:
    async with open_ledger(
        connection, SHORT_GAP_LIMITS, with_change_stream=False, store_class=SmallPageStore
    ) as ledger:
        await create_history(ledger)
        progress: list[tuple[int, int]] = []

        class AppendingStore(SmallPageStore):
            async def read_head_position(self, session: AsyncClientSession | None = None) -> int:
                head = await super().read_head_position(session)
                await create_position_gap(ledger.db)
                await ledger.submit_job()
                return head

        log = AppendingStore(ledger.db, SHORT_GAP_LIMITS)
        result = check_valid(
            await verify_log(log, on_progress=lambda position, up_to: progress.append((position, up_to)))
        )
        assert (result.events, result.position) == (LAST_POSITION, LAST_POSITION)
        assert progress[-1] == (LAST_POSITION, LAST_POSITION)


def test_problem_text_names_place() -> None:
    assert str(IntegrityProblem(3, "odd", "job-1", 2)) == "position 3 (job-1, version 2): odd"
    assert str(IntegrityProblem(3, "odd")) == "position 3: odd"
