"""kill -9 on writers of one log, again and again: what was acknowledged is there once, and the order has no holes."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import deque
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
from pymongo import MongoClient

from ledger.envelope import VOID_STREAM
from ledger.events import Recorded
from ledger.log import Limits
from ledger.mongo import Connection, Document
from tests.support.ledgers import check_log, ledger_on, positions, stored, until
from tests.support.writers import TOGETHER, start_writer

WRITERS = 4
SECONDS = 10.0
PATIENCE = Limits(void_after_seconds=0.3)


@pytest.fixture
def connection(mongodb_uri: str, db_name: str) -> Iterator[Connection]:
    """A database whose server ends the transactions of the killed after a second, not a minute."""
    with MongoClient[Document](mongodb_uri) as client:
        before = client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": 1})
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


async def kill_again_and_again(connection: Connection, shared: list[str], directory: Path) -> int:
    """Kill one writer after the other at random moments and replace it; return how many of them were at work."""
    notes = (directory / f"acknowledged-{number}" for number in count())
    writers = deque(Writer(connection, shared, next(notes)) for _ in range(WRITERS))
    at_work = 0
    try:
        async with asyncio.timeout(SECONDS):
            while True:
                await until(writers[0].is_at_work)
                await asyncio.sleep(random.uniform(0, 0.3))
                victim = writers.popleft()
                await asyncio.to_thread(victim.kill)
                at_work += 1
                writers.append(Writer(connection, shared, next(notes)))
    except TimeoutError:
        return at_work
    finally:
        for writer in writers:
            writer.process.kill()
            writer.process.join(10)


def acknowledged(directory: Path) -> dict[str, int]:
    """The position of every acknowledged event, by its id."""
    lines = [line for path in directory.iterdir() for line in path.read_text().splitlines()]
    noted = dict(line.split() for line in lines)
    assert len(noted) == len(lines), "an event was acknowledged twice"
    return {event_id: int(position) for event_id, position in noted.items()}


async def test_writers_killed_at_any_moment_lose_nothing_and_leave_no_hole(
    connection: Connection, tmp_path: Path
) -> None:
    async with ledger_on(connection, PATIENCE) as ledger:
        shared = [(await ledger.submit()).events[0].stream for _ in range(2)]
        async with ledger.log.subscription(after=0) as events:
            seen: list[Recorded] = []

            async def follow() -> None:
                async for event in events:
                    seen.append(event)

            following = asyncio.create_task(follow())
            at_work = await kill_again_and_again(connection, shared, tmp_path)
            last = (await ledger.submit()).events[0]
            await until(lambda: bool(seen) and seen[-1].position >= last.position, 30)
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)
        documents = await stored(ledger.db)
        assert at_work >= WRITERS
        check_log(documents)
        assert positions(seen) == [document["_id"] for document in documents]
        assert [event.event_id for event in seen] == [document["event_id"] for document in documents]
        there = {document["event_id"]: document["_id"] for document in documents}
        assert len(there) == len(documents)
        noted = acknowledged(tmp_path)
        assert noted
        assert {event_id: there.get(event_id) for event_id in noted} == noted
        check_order_within_streams(documents)
        check_batches(documents)


def check_order_within_streams(documents: list[Document]) -> None:
    """The order of positions never contradicts the order of versions."""
    reached: dict[str, int] = {}
    for document in documents:
        if document["stream"] != VOID_STREAM:
            assert document["version"] == reached.get(document["stream"], 0) + 1
            reached[document["stream"]] = document["version"]


def check_batches(documents: list[Document]) -> None:
    """A batch and its jobs are there together, side by side, or not at all."""
    batches = [document for document in documents if document["type"] == "BatchSubmitted"]
    assert batches
    streams = {document["_id"]: document["stream"] for document in documents}
    for batch in batches:
        behind = [streams[batch["_id"] + number] for number in range(1, TOGETHER)]
        assert behind == batch["data"]["job_ids"]
    with_a_batch = {document["stream"] for document in documents if document["data"].get("batch_id")}
    assert with_a_batch == {job_id for batch in batches for job_id in batch["data"]["job_ids"]}
