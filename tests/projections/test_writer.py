"""`ProjectionWriter.apply` writes many events in parts: each part once, whatever fails, and in the order of the log."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.errors import LedgerUnavailable, UnsupportedEvent
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.leader_election import LeadershipLost
from jobledger.ledger.store.event_store import ReadPosition
from jobledger.projections.engine import writer as writing
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID
from jobledger.projections.engine.view_changes import ChunkTooLarge, ViewChanges
from jobledger.projections.engine.view_registry import PROJECTION_VERSION
from jobledger.projections.engine.writer import ProjectionWriter
from tests.projections.expected_views import assert_views_match_log, run_random_history
from tests.support.polling import DEADLINE_SECONDS
from tests.support.role_runner import RunningRoles, run_roles_in_process

PART_EVENTS = 4


@pytest.fixture
async def roles(connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[RunningRoles]:
    monkeypatch.setattr(writing, "_MAX_PART_EVENTS", PART_EVENTS)
    async with run_roles_in_process(connection, store) as roles:
        checkpoint = {"position": 0, "fencing_token": 1, "version": PROJECTION_VERSION, "slots": {}}
        await roles.db.checkpoints.replace_one({"_id": VIEWS_CHECKPOINT_ID}, checkpoint, upsert=True)
        yield roles


async def create_writer(roles: RunningRoles) -> ProjectionWriter:
    checkpoint = await roles.db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID}) or {}
    return ProjectionWriter(
        roles.db,
        roles.checkpoint.views,
        checkpoint_id=VIEWS_CHECKPOINT_ID,
        checkpoint_filter={"fencing_token": 1, "slots": {}},
        last_applied=ReadPosition.from_document(checkpoint),
    )


async def submit_jobs(roles: RunningRoles, count: int) -> list[RecordedEvent]:
    for _ in range(count):
        await roles.submit()
    return await roles.read_all_events()


async def read_position(roles: RunningRoles) -> int:
    checkpoint = await roles.db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID}) or {}
    return int(checkpoint["position"])


@pytest.mark.parametrize("seed", range(6))
async def test_parts_that_are_too_large_are_divided(
    roles: RunningRoles, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size of a part is known when its documents are loaded, or only when the server rejects its transaction."""
    dice = random.Random(seed)
    await run_random_history(roles, dice, steps=60)
    prepare, write = ProjectionWriter.prepare, ProjectionWriter._write

    async def prepare_or_fail(self: ProjectionWriter, events: Any) -> ViewChanges:
        changes = await prepare(self, events)
        if len(events) > 1 and dice.random() < 0.3:
            raise ChunkTooLarge("simulated")
        return changes

    async def write_or_fail(self: ProjectionWriter, changes: ViewChanges, *arguments: Any) -> None:
        await asyncio.sleep(dice.choice((0, 0.005)))
        if changes.position - self.position > 1 and dice.random() < 0.3:
            raise ChunkTooLarge("simulated")
        await write(self, changes, *arguments)

    monkeypatch.setattr(ProjectionWriter, "prepare", prepare_or_fail)
    monkeypatch.setattr(ProjectionWriter, "_write", write_or_fail)
    events = await roles.read_all_events()
    projection = await create_writer(roles)
    for begin in range(0, len(events), 30):
        await projection.apply(events[begin : begin + 30])
    assert projection.last_applied == ReadPosition(events[-1].position, events[-1].hash)
    assert await read_position(roles) == events[-1].position
    await assert_views_match_log(roles)


async def test_next_part_is_applied_in_memory_while_one_is_written(
    roles: RunningRoles, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared: list[int] = []
    is_next_prepared = asyncio.Event()
    prepare, write = ProjectionWriter.prepare, ProjectionWriter._write

    async def observe_prepare(self: ProjectionWriter, events: Any) -> ViewChanges:
        changes = await prepare(self, events)
        prepared.append(changes.position)
        is_next_prepared.set()
        return changes

    async def write_after_next_part(self: ProjectionWriter, changes: ViewChanges, *arguments: Any) -> None:
        is_next_prepared.clear()
        if changes.position < 10:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await is_next_prepared.wait()
        await write(self, changes, *arguments)

    monkeypatch.setattr(ProjectionWriter, "prepare", observe_prepare)
    monkeypatch.setattr(ProjectionWriter, "_write", write_after_next_part)
    await (await create_writer(roles)).apply(await submit_jobs(roles, 10))
    assert prepared == [4, 8, 10]
    assert await read_position(roles) == 10


async def test_last_transaction_contains_the_additional_write(roles: RunningRoles) -> None:
    positions: list[int] = []

    async def before_write(session: AsyncClientSession) -> None:
        positions.append(await read_position(roles))

    await (await create_writer(roles)).apply(await submit_jobs(roles, 10), before_write=before_write)
    assert set(positions) == {8}  # the transaction may be repeated


async def test_events_before_one_of_a_later_version_are_written(roles: RunningRoles) -> None:
    events = await submit_jobs(roles, 10)
    later = {**events[9].document, "type": "JobOfALaterVersion"}
    del later["hash"]  # which would not match
    events[9] = RecordedEvent(later)
    with pytest.raises(UnsupportedEvent):
        await (await create_writer(roles)).apply(events)
    assert await read_position(roles) == 8


async def test_event_that_exceeds_a_transaction_alone_is_reported(
    roles: RunningRoles, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = ProjectionWriter._write

    async def reject_sixth(self: ProjectionWriter, changes: ViewChanges, *arguments: Any) -> None:
        if self.position < 6 <= changes.position:
            raise ChunkTooLarge("simulated")
        await write(self, changes, *arguments)

    monkeypatch.setattr(ProjectionWriter, "_write", reject_sixth)
    with pytest.raises(LedgerUnavailable, match="position 6 cannot be written to the views: simulated"):
        await (await create_writer(roles)).apply(await submit_jobs(roles, 10))
    assert await read_position(roles) == 5


@pytest.mark.parametrize("chunk_events", [24, PART_EVENTS])
async def test_parts_shrink_while_transactions_are_slow(
    roles: RunningRoles, chunk_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server aborts slow transactions."""
    now = 0.0
    sizes: list[int] = []
    write = ProjectionWriter._write

    async def write_slowly(self: ProjectionWriter, changes: ViewChanges, *arguments: Any) -> None:
        nonlocal now
        sizes.append(changes.position - self.position)
        now += 10 if len(sizes) < 4 else 1
        await write(self, changes, *arguments)

    monkeypatch.setattr(ProjectionWriter, "_write", write_slowly)
    monkeypatch.setattr(writing, "time", SimpleNamespace(monotonic=lambda: now))
    events = await submit_jobs(roles, 24)
    projection = await create_writer(roles)
    for begin in range(0, 24, chunk_events):
        await projection.apply(events[begin : begin + chunk_events])
    # With a single chunk, the second part is ready when the first one turns out to be slow.
    assert sizes[:3] == ([4, 4, 2] if chunk_events == 24 else [4, 2, 2])
    assert min(sizes) == 1
    assert 4 in sizes[4:]
    assert sum(sizes) == 24


async def test_replaced_writer_writes_no_further_part(roles: RunningRoles, monkeypatch: pytest.MonkeyPatch) -> None:
    write = ProjectionWriter.write

    async def write_and_lose(self: ProjectionWriter, changes: ViewChanges, **options: Any) -> None:
        await write(self, changes, **options)
        await roles.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"fencing_token": 2}})

    monkeypatch.setattr(ProjectionWriter, "write", write_and_lose)
    with pytest.raises(LeadershipLost):
        await (await create_writer(roles)).apply(await submit_jobs(roles, 10))
    assert await read_position(roles) == PART_EVENTS
    assert await roles.db.jobs.count_documents({}) == PART_EVENTS


@pytest.mark.parametrize("seed", range(4))
async def test_stopped_writer_is_continued_at_its_last_part(roles: RunningRoles, seed: int) -> None:
    dice = random.Random(seed)
    await run_random_history(roles, dice, steps=60)
    events = await roles.read_all_events()
    stops = 0
    while (position := await read_position(roles)) < len(events):
        projection = await create_writer(roles)
        applying = asyncio.create_task(projection.apply(events[position:]))
        await asyncio.sleep(dice.uniform(0, 0.05))
        applying.cancel()
        await asyncio.gather(applying, return_exceptions=True)
        assert "write-views" not in {task.get_name() for task in asyncio.all_tasks()}
        stops += applying.cancelled()
    assert stops > 1
    await assert_views_match_log(roles)
