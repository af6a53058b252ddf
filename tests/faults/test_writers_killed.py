"""SIGKILL for writers of one log, repeatedly: each acknowledged event exists once, and positions have no gaps."""

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
    read_all_events,
    read_first_events,
)
from tests.support.mongodb_provider import transaction_lifetime
from tests.support.polling import poll_until
from tests.support.soak_only import IS_SOAK_RUN
from tests.support.writers import start_writer

WRITERS = 8
EVENTS = 6_000 if IS_SOAK_RUN else 3_000
KILLS = 2 * WRITERS if IS_SOAK_RUN else WRITERS
LIMITS = EventStoreLimits(gap_timeout_seconds=0.3)
TRANSACTION_SECONDS = 1
# The time until the server aborts a killed writer's transaction (it looks once a second), the gap timeout, and 7 s for
# a loaded machine. The number of killed writers does not matter.
MAX_DELAY_SECONDS = 1.5 * TRANSACTION_SECONDS + 1 + LIMITS.gap_timeout_seconds + 7


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Iterator[Connection]:
    """A database whose server aborts the transactions of killed writers after a second."""
    with transaction_lifetime(mongodb_uri, TRANSACTION_SECONDS):
        yield Connection(mongodb_uri, db_name)


class Writer:
    """A process that appends, and its file of acknowledged events with an event ID and a position per line."""

    def __init__(self, connection: Connection, shared: list[str], acknowledged: Path) -> None:
        self.acknowledged = acknowledged
        self.process = start_writer(connection, shared, acknowledged)

    def has_acknowledged_events(self) -> bool:
        return self.acknowledged.exists() and self.acknowledged.stat().st_size > 0

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)
        assert self.process.exitcode == -signal.SIGKILL, "the writer exited by itself"


class Follower:
    """Collects the events of a live subscription, and the age of each at its delivery."""

    def __init__(self) -> None:
        self.events: list[RecordedEvent] = []
        self.delays: list[float] = []

    async def follow(self, ledger: Ledger) -> None:
        async with ledger.event_store.subscribe(after=0) as events:
            while True:
                chunk = await events.read_chunk()
                now = datetime.now(UTC)
                self.events += chunk
                self.delays += [(now - event.time).total_seconds() for event in chunk]


async def kill_writers_repeatedly(connection: Connection, shared: list[str], directory: Path, ledger: Ledger) -> int:
    """Kill and replace writers at random times until the log is long. Return the number of kills of active writers."""
    paths = (directory / f"acknowledged-{number}" for number in count())
    writers = [Writer(connection, shared, next(paths)) for _ in range(WRITERS)]
    active_kills = 0
    try:
        while active_kills < KILLS or await ledger.event_store.read_head_position() < EVENTS:
            await poll_until(lambda: any(writer.has_acknowledged_events() for writer in writers))
            await asyncio.sleep(random.uniform(0, 0.3))
            index = random.randrange(WRITERS)
            active_kills += writers[index].has_acknowledged_events()
            await asyncio.to_thread(writers[index].kill)
            writers[index] = Writer(connection, shared, next(paths))
    finally:
        for writer in writers:
            writer.process.kill()
            writer.process.join(10)
    return active_kills


def load_acknowledged(directory: Path) -> dict[str, int]:
    """Return the position of each acknowledged event by its ID."""
    lines = [line for path in directory.iterdir() for line in path.read_text().splitlines()]
    positions = dict(line.split() for line in lines)
    assert len(positions) == len(lines), "an event was acknowledged twice"
    return {event_id: int(position) for event_id, position in positions.items()}


async def test_killed_writers_lose_no_acknowledged_event_and_leave_no_gap(
    connection: Connection, tmp_path: Path
) -> None:
    reader_commands = CommandCounter()
    async with (
        open_ledger(connection, with_change_stream=False) as ledger,
        open_ledger(monitor_connection(connection, reader_commands), LIMITS) as reader,
    ):
        shared = [(await ledger.submit_job()).events[0].stream for _ in range(2)]
        follower = Follower()
        following = asyncio.create_task(follower.follow(reader))
        active_kills = await kill_writers_repeatedly(connection, shared, tmp_path, ledger)
        last = (await ledger.submit_job()).events[0]
        await poll_until(lambda: bool(follower.events) and follower.events[-1].position >= last.position)
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following

        documents, delivered = await load_event_documents(ledger.db), follower.events
        check_log(documents)
        assert event_positions(delivered) == [document["_id"] for document in documents]
        assert [event.event_id for event in delivered] == [document["event_id"] for document in documents]
        assert await read_all_events(ledger.event_store) == delivered
        assert max(follower.delays) < MAX_DELAY_SECONDS

        stored = {document["event_id"]: document["_id"] for document in documents}
        assert len(stored) == len(documents)
        acknowledged = load_acknowledged(tmp_path)
        assert {event_id: stored.get(event_id) for event_id in acknowledged} == acknowledged
        check_batches(documents)

        # Some writers were killed between position and insert, and some between insert and acknowledgement.
        assert active_kills >= KILLS
        assert reader_commands.started_by_name["insert"] > 0, "no writer left a gap for readers to void"
        own = len(shared) + 1
        voids = sum(document["stream"] == VOID_STREAM for document in documents)
        assert len(documents) - voids - own > len(acknowledged) > EVENTS / 2, "all stored events were acknowledged"


@pytest.mark.parametrize("live", [True, False], ids=["subscriber", "reader"])
async def test_readers_wait_for_many_gaps_no_longer_than_for_one(connection: Connection, live: bool) -> None:
    gaps, limits = 20, EventStoreLimits(gap_timeout_seconds=0.8)
    async with open_ledger(connection, limits, with_change_stream=live) as ledger:
        for _ in range(gaps):
            await create_position_gap(ledger.db)
            await ledger.submit_job()
        async with asyncio.timeout(gaps * limits.gap_timeout_seconds / 2):
            events = (
                await read_first_events(ledger.event_store, 2 * gaps)
                if live
                else await read_all_events(ledger.event_store)
            )
        assert [event.stream == VOID_STREAM for event in events] == [True, False] * gaps


def check_batches(documents: list[Document]) -> None:
    """Check that a batch and its jobs exist completely, with consecutive positions, or not at all."""
    batches = [document for document in documents if document["type"] == "BatchSubmitted"]
    assert batches
    streams = {document["_id"]: document["stream"] for document in documents}
    for batch in batches:
        job_ids = batch["data"]["job_ids"]
        next_streams = [streams[batch["_id"] + number] for number in range(1, len(job_ids) + 1)]
        assert next_streams == job_ids
    jobs_with_batch = {document["stream"] for document in documents if document["data"].get("batch_id")}
    assert jobs_with_batch == {job_id for batch in batches for job_id in batch["data"]["job_ids"]}
