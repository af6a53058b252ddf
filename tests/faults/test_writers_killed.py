"""kill -9 on writers of one log, again and again: what was acknowledged is there once, and the order has no holes."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime
from itertools import count
from pathlib import Path

import pytest
from pymongo import MongoClient

from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.envelope import VOID_STREAM
from tests.support.driver_hooks import CommandCounter, monitor_connection
from tests.support.ledger_setup import (
    Ledger,
    check_log,
    create_position_gap,
    event_positions,
    load_event_documents,
    open_ledger,
    poll_until,
    read_all_events,
    read_first_events,
)
from tests.support.soak_only import IS_SOAK_RUN
from tests.support.writers import start_writer

WRITERS = 8
EVENTS = 6_000 if IS_SOAK_RUN else 3_000
KILLS = 2 * WRITERS if IS_SOAK_RUN else WRITERS
PATIENCE = EventStoreLimits(gap_timeout_seconds=0.3)
TRANSACTION_SECONDS = 1
# For the server to end a killed writer's transaction (it looks once a second), for the void, and for a loaded machine:
# whether one writer was killed or a hundred.
LONGEST_DELAY_SECONDS = 1.5 * TRANSACTION_SECONDS + 1 + PATIENCE.gap_timeout_seconds + 7


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Iterator[Connection]:
    """A database whose server ends the transactions of the killed after a second, not a minute."""
    with MongoClient[Document](mongodb_uri) as client:
        before = client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": TRANSACTION_SECONDS})
        yield Connection(mongodb_uri, db_name)
        seconds = before["transactionLifetimeLimitSeconds"]
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": seconds})


class Writer:
    """A process at work, and the file in which it notes what was acknowledged: an event's id and position a line."""

    def __init__(self, connection: Connection, shared: list[str], notes: Path) -> None:
        self.notes = notes
        self.process = start_writer(connection, shared, notes)

    def is_at_work(self) -> bool:
        return self.notes.exists() and self.notes.stat().st_size > 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        assert self.process.exitcode == -signal.SIGKILL, "the writer had ended by itself"


class Follower:
    """A live subscriber: keeps what it is given, and how old each event was by then."""

    def __init__(self) -> None:
        self.seen: list[RecordedEvent] = []
        self.delays: list[float] = []

    async def follow(self, ledger: Ledger) -> None:
        async with ledger.event_store.subscribe(after=0) as events:
            while True:
                chunk = await events.next_chunk()
                now = datetime.now(UTC)
                self.seen += chunk
                self.delays += [(now - event.time).total_seconds() for event in chunk]


async def kill_again_and_again(connection: Connection, shared: list[str], directory: Path, ledger: Ledger) -> int:
    """Kill writers at random moments and replace them, until the log is long; return how many of them were at work."""
    notes = (directory / f"acknowledged-{number}" for number in count())
    writers = [Writer(connection, shared, next(notes)) for _ in range(WRITERS)]
    at_work = 0
    try:
        while at_work < KILLS or await ledger.event_store.head_position() < EVENTS:
            await poll_until(lambda: any(writer.is_at_work() for writer in writers), 30)
            await asyncio.sleep(random.uniform(0, 0.3))
            index = random.randrange(WRITERS)
            at_work += writers[index].is_at_work()
            await asyncio.to_thread(writers[index].kill)
            writers[index] = Writer(connection, shared, next(notes))
    finally:
        for writer in writers:
            writer.process.kill()
            writer.process.join(10)
    return at_work


def acknowledged(directory: Path) -> dict[str, int]:
    """The position of every acknowledged event, by its id."""
    lines = [line for path in directory.iterdir() for line in path.read_text().splitlines()]
    noted = dict(line.split() for line in lines)
    assert len(noted) == len(lines), "an event was acknowledged twice"
    return {event_id: int(position) for event_id, position in noted.items()}


async def test_writers_killed_at_any_moment_lose_nothing_and_leave_no_hole(
    connection: Connection, tmp_path: Path
) -> None:
    of_reader = CommandCounter()
    async with (
        open_ledger(connection, with_change_stream=False) as ledger,
        open_ledger(monitor_connection(connection, of_reader), PATIENCE) as reader,
    ):
        shared = [(await ledger.submit_job()).events[0].stream for _ in range(2)]
        follower = Follower()
        following = asyncio.create_task(follower.follow(reader))
        at_work = await kill_again_and_again(connection, shared, tmp_path, ledger)
        last = (await ledger.submit_job()).events[0]
        await poll_until(lambda: bool(follower.seen) and follower.seen[-1].position >= last.position, 30)
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following

        documents, seen = await load_event_documents(ledger.db), follower.seen
        check_log(documents)
        assert event_positions(seen) == [document["_id"] for document in documents]
        assert [event.event_id for event in seen] == [document["event_id"] for document in documents]
        assert await read_all_events(ledger.event_store) == seen
        assert max(follower.delays) < LONGEST_DELAY_SECONDS

        there = {document["event_id"]: document["_id"] for document in documents}
        assert len(there) == len(documents)
        noted = acknowledged(tmp_path)
        assert {event_id: there.get(event_id) for event_id in noted} == noted
        check_batches(documents)

        # The killing was worth it: after a number was taken, and after events were there but not acknowledged.
        assert at_work >= KILLS
        assert of_reader.started_by_name["insert"] > 0, "nobody left a hole for readers to fill"
        own = len(shared) + 1
        voids = sum(document["stream"] == VOID_STREAM for document in documents)
        assert len(documents) - voids - own > len(noted) > EVENTS / 2, "whatever was there was acknowledged"


@pytest.mark.parametrize("live", [True, False], ids=["subscriber", "reader"])
async def test_readers_wait_for_a_hundred_killed_writers_no_longer_than_for_one(
    connection: Connection, live: bool
) -> None:
    holes, patient = 20, EventStoreLimits(gap_timeout_seconds=0.5)
    async with open_ledger(connection, patient, with_change_stream=live) as ledger:
        for _ in range(holes):
            await create_position_gap(ledger.db)
            await ledger.submit_job()
        async with asyncio.timeout(holes * patient.gap_timeout_seconds / 2):
            events = (
                await read_first_events(ledger.event_store, 2 * holes)
                if live
                else await read_all_events(ledger.event_store)
            )
        assert [event.stream == VOID_STREAM for event in events] == [True, False] * holes


def check_batches(documents: list[Document]) -> None:
    """A batch and its jobs are there together, side by side, or not at all."""
    batches = [document for document in documents if document["type"] == "BatchSubmitted"]
    assert batches
    streams = {document["_id"]: document["stream"] for document in documents}
    for batch in batches:
        job_ids = batch["data"]["job_ids"]
        behind = [streams[batch["_id"] + number] for number in range(1, len(job_ids) + 1)]
        assert behind == job_ids
    with_a_batch = {document["stream"] for document in documents if document["data"].get("batch_id")}
    assert with_a_batch == {job_id for batch in batches for job_id in batch["data"]["job_ids"]}
