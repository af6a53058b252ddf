"""The projector applies each event exactly once, and stalls when applied events were removed."""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import AsyncMock

import pytest
from pymongo import InsertOne, ReplaceOne

from jobledger.ledger.domain.commands import CancelJob
from jobledger.ledger.domain.errors import LedgerBusy
from jobledger.ledger.domain.events import BatchFinished, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.envelope import StreamAppend
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.system import pacing
from jobledger.projections.engine import projector, stalls, writer
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID
from jobledger.projections.engine.view_changes import ViewChanges
from jobledger.projections.engine.view_registry import DOCUMENT_VIEWS, PROJECTION_VERSION
from jobledger.projections.views import queue, statistics
from tests.projections.expected_views import (
    COMPARED_VIEWS,
    assert_views_match_log,
    fold_views,
    load_views,
    run_random_history,
)
from tests.support.driver_hooks import CommandCounter, monitor_connection
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import RunningRoles, run_roles_in_process
from tests.support.worker_reports import report_progress, report_step

# Exactly once ---------------------------------------------------------------------------------------------------------


def make_every_chunk_a_flood(monkeypatch: pytest.MonkeyPatch, events: int) -> None:
    monkeypatch.setattr(projector, "_FLOOD_EVENTS", events)
    monkeypatch.setattr(projector, "CHUNK_EVENTS", 7)
    monkeypatch.setattr(writer, "_MAX_PART_EVENTS", 3)
    monkeypatch.setattr(projector, "_FLOOD_READ_SECONDS", 0.01)


@pytest.mark.parametrize("is_flood", [False, True], ids=["change stream", "flood"])
@pytest.mark.parametrize("seed", [1, 2])
async def test_views_match_the_log_after_leaders_were_stopped_repeatedly(
    connection: Connection, store: Path, seed: int, is_flood: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "CHUNK_EVENTS", 7)
    make_every_chunk_a_flood(monkeypatch, events=2)
    dice = random.Random(seed)
    kills = 0
    async with run_roles_in_process(connection, store) as roles:
        writing = asyncio.create_task(run_random_history(roles, dice, steps=100))
        while not writing.done() or kills < 5:
            async with run_roles_in_process(
                connection, store, projector=True, projector_pauses_stream=is_flood
            ) as leader:
                assert leader.projector_task is not None
                target = roles.checkpoint.position + dice.randrange(1, 40)
                reached = asyncio.create_task(roles.checkpoint.wait_for_position(target))
                await asyncio.wait({reached, writing}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
                reached.cancel()
                leader.projector_task.cancel()
                kills += 1
        await writing
        async with run_roles_in_process(connection, store, projector=True):
            await roles.wait_for_views()
            await assert_views_match_log(roles)


async def test_two_projectors_apply_each_event_once(connection: Connection, store: Path) -> None:
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, projector=True),
    ):
        await run_random_history(roles, random.Random(3))
        await assert_views_match_log(roles)


async def test_views_projected_again_from_position_zero_are_identical(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(4), steps=30)
        await assert_views_match_log(roles)
    before = await _load_stored_views(connection)
    for chunk_events in (1000, 3):
        monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
        async with run_roles_in_process(connection, store) as roles:
            for view in COMPARED_VIEWS:
                await roles.db.drop_collection(view.NAME)
            await roles.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"position": 0}})
        async with run_roles_in_process(connection, store, projector=True) as roles:
            await roles.wait_for_views()
        assert await _load_stored_views(connection) == before


async def test_views_of_another_version_are_rebuilt(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(11))
        await roles.wait_for_views()
    expected = await _load_stored_views(connection)
    async with connection.create_client() as client:
        db = client[connection.db_name]
        await db.jobs.update_many({}, {"$unset": {"search_keys": ""}})
        await db.jobs.insert_one({"_id": "job-of-nobody"})
        await db.statistics.update_one({"_id": "jobs"}, {"$inc": {"total": 1000}})
        await db.checkpoints.update_one({"_id": "views"}, {"$set": {"version": PROJECTION_VERSION - 1}})
    async with run_roles_in_process(connection, store, projector=True) as roles:
        async with asyncio.timeout(DEADLINE_SECONDS):
            await roles.checkpoint.wait_for_version(other_than=PROJECTION_VERSION - 1)
        await roles.wait_for_views()
    assert await _load_stored_views(connection) == expected


async def _load_stored_views(connection: Connection) -> dict[str, list[str]]:
    async with connection.create_client() as client:
        return await load_views(client[connection.db_name])


async def test_chunk_writes_do_not_depend_on_the_chunk_size(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        await run_random_history(roles, random.Random(5), steps=30)
        events = await roles.read_all_events()
    at_once = ViewChanges()
    for event in events:
        at_once.apply(event)
    loaded: dict[str, dict[str, Document]] = {view: {} for view in DOCUMENT_VIEWS}
    increments: Counter[tuple[str, str]] = Counter()
    rows: dict[str, dict[str, Document]] = {view: {} for view in at_once.build_changed_rows()}
    for event in events:
        changes = ViewChanges(loaded, [job for job in loaded["jobs"].values() if job["status"] == "pending"])
        changes.apply(event)
        increments.update(changes.counter_increments)
        for _, write in changes.build_writes().get(queue.NAME, ()):
            if isinstance(write, InsertOne):
                assert write._doc["_id"] not in rows[queue.NAME]
            elif isinstance(write, ReplaceOne):
                assert write._filter["_id"] in rows[queue.NAME], "missing rows are inserted: see view_changes.py"
        for view, changed in changes.build_changed_rows().items():
            rows[view] = {key: row for key, row in {**rows[view], **changed}.items() if row is not None}
        for view, documents in changes.current.items():
            for key, document in documents.items():
                loaded[view].pop(key, None)
                if document is not None:
                    loaded[view][key] = document
    assert increments == at_once.counter_increments
    for view in DOCUMENT_VIEWS:
        assert loaded[view] == {
            key: document for key, document in at_once.current[view].items() if document is not None
        }
    assert rows == at_once.build_changed_rows()


async def test_superseded_progress_in_a_chunk_is_counted_but_not_applied(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        first, second = await roles.submit(), await roles.submit()
        await roles.claim(first)
        await roles.claim(second)
        for percent in (1, 2, 3):
            await roles.handle_commands(first, report_progress("worker-1", 1, "page", percent, f"first {percent}"))
            await roles.handle_commands(second, report_progress("worker-1", 1, "page", percent, f"second {percent}"))
        await roles.handle_commands(first, report_step("worker-1", 1, "page", "key", {}, 1.0))
        await roles.handle_commands(first, report_progress("worker-1", 1, "slides", 50, "half"))
        events = await roles.read_all_events()
    kept = writer._drop_superseded_progress(events)
    assert len(events) - len(kept) == 4
    assert [event.position for event in kept] == sorted(event.position for event in kept)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.wait_for_views()
        assert (await roles.load_job(first))["progress"] == {"step": "slides", "percent": 50.0, "message": "half"}
        assert (await roles.load_job(second))["progress"]["message"] == "second 3"
        await assert_views_match_log(roles)


async def test_statistics_equal_counts_of_the_documents(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(6))
        await roles.wait_for_views()
        counters = await statistics.load_statistics(roles.checkpoint.views, datetime.now(UTC))
        for status in ("pending", "processing", "completed", "failed", "cancelled"):
            assert counters["jobs"][status] == await roles.db.jobs.count_documents({"status": status}), status
        assert counters["jobs"]["total"] == await roles.db.jobs.count_documents({})
        assert counters["batches"]["total"] == await roles.db.batches.count_documents({}) == 2
        assert counters["batches"]["active"] == await roles.db.batches.count_documents({"status": "processing"})
        for track in counters["tracks"]:
            of_track = {"parameters.track": track["_id"]}
            assert track["count"] == await roles.db.jobs.count_documents(of_track)
            for status in ("completed", "failed"):
                assert track[status] == await roles.db.jobs.count_documents({**of_track, "status": status})
        tracks = {track["_id"] for track in counters["tracks"]}
        assert tracks == set(
            await roles.db.jobs.distinct("parameters.track", {"parameters.track": {"$type": "string"}})
        )


# Failures -------------------------------------------------------------------------------------------------------------


class BusyEventStore(EventStore):
    """Rejects the first BatchFinished, as an overloaded event store does that the API and the projector share."""

    rejections = 0

    async def append(self, *appends: StreamAppend) -> list[RecordedEvent]:
        if self.rejections == 0 and any(type(event) is BatchFinished for append in appends for event in append.events):
            self.rejections += 1
            raise LedgerBusy("too many pending appends")
        return await super().append(*appends)


async def test_projector_retries_after_the_event_store_was_busy(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, store_class=BusyEventStore) as roles:
        batch_id, (job_id,) = await roles.submit_batch({})
        await roles.handle_commands(job_id, CancelJob("user-1"))
        await roles.wait_for_event(BatchFinished, batch_id)
        assert isinstance(roles.event_store, BusyEventStore)
        assert roles.event_store.rejections == 1
        assert roles.projector_task is not None
        assert not roles.projector_task.done()


async def test_leader_with_a_checkpoint_set_back_projects_again(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit({"track": "A"})
        await roles.wait_for_views(1)
        for view in COMPARED_VIEWS:
            await roles.db[view.NAME].delete_many({})
        await roles.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"position": 0}})
        await poll_until(lambda: roles.checkpoint.position == 0, "the position is 0")
        await roles.submit({"track": "B"})
        await roles.wait_for_views(2)
        assert (await load_views(roles.db, zeros=False)) == fold_views(await roles.read_all_events())


# A truncated log ------------------------------------------------------------------------------------------


async def truncate_log(roles: RunningRoles) -> None:
    await roles.db.events.delete_many({"_id": {"$gte": 2}})


async def restore_older_copy(roles: RunningRoles) -> None:
    await truncate_log(roles)
    await roles.db.counters.update_one({"_id": "events"}, {"$set": {"next": 1}})


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("damage", [truncate_log, restore_older_copy])
async def test_projector_stalls_when_applied_events_were_removed(
    connection: Connection,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[RunningRoles], Awaitable[None]],
    running: bool,
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_TRIES", 2)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        for _ in range(3):
            await roles.submit()
        await roles.wait_for_views(3)
        if running:
            await damage(roles)
            await append_until_stalled(roles)
    if not running:
        async with run_roles_in_process(connection, store) as roles:
            await damage(roles)
            await roles.submit()
        async with run_roles_in_process(connection, store, projector=True) as roles:
            await append_until_stalled(roles)


async def append_until_stalled(roles: RunningRoles) -> None:
    """Submit jobs until the projector records why it stalls."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while "reached position 3" not in await stalls.find_stall_reason(roles.db, 3, 9):
            await roles.submit()
            await asyncio.sleep(0.1)
    checkpoint = await roles.db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID})
    assert checkpoint is not None
    assert checkpoint["position"] == 3


class TruncatedDuringRead(EventStore):
    """An event store whose log is truncated after a read, before the reader gets the events."""

    async def read(
        self, *, after: int = 0, limit: int | None = None, without_metadata: bool = False
    ) -> list[RecordedEvent]:
        page = await super().read(after=after, limit=limit, without_metadata=without_metadata)
        if not after and len(page) == 3:
            self.may_have_lost_events = False
            await self.db.events.delete_many({"_id": {"$gte": 2}})
            await poll_until(lambda: self.may_have_lost_events, "the change stream delivered the deletion")
        return page


async def test_projector_does_not_apply_events_removed_during_its_read(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        for _ in range(3):
            await roles.submit()
    async with run_roles_in_process(connection, store, projector=True, store_class=TruncatedDuringRead) as roles:
        await poll_until(lambda: roles.changes.restart_count > 0, "the change stream was reopened")
        await roles.submit()
        await assert_views_match_log(roles)


async def test_frequent_events_are_applied_together(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pacing, "PACE_SECONDS", 0.5)
    commands = CommandCounter()
    async with run_roles_in_process(monitor_connection(connection, commands), store, projector=True) as roles:
        await roles.submit()
        await roles.wait_for_views()
        before, started = commands.started_by_name["commitTransaction"], time.monotonic()
        for _ in range(100):
            await roles.submit()
        await roles.wait_for_views()
        most_turns = pacing.BURST + 1 + (time.monotonic() - started) / 0.5
        assert commands.started_by_name["commitTransaction"] - before <= most_turns


# Floods ---------------------------------------------------------------------------------------------------------------


async def test_flood_is_read_from_the_log_and_delays_no_batch(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_every_chunk_a_flood(monkeypatch, events=3)
    commands = CommandCounter()
    async with (
        run_roles_in_process(connection, store) as roles,
        run_roles_in_process(
            monitor_connection(connection, commands), store, projector=True, projector_pauses_stream=True
        ),
    ):
        await roles.wait_for_views()
        opened = commands.started_by_name["aggregate"]
        batch_id, job_ids = await roles.submit_batch(*({} for _ in range(30)))
        for job_id in job_ids:
            await roles.handle_commands(job_id, CancelJob("user-1"))
        await roles.wait_for_event(BatchFinished, batch_id)
        await assert_views_match_log(roles)
        assert commands.started_by_name["aggregate"] > opened
        await roles.submit()
        await roles.wait_for_views()


async def test_endless_flood_delays_the_end_of_a_batch_only_for_a_moment(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "_MAX_FLOOD_SECONDS", 3600.0)
    make_every_chunk_a_flood(monkeypatch, events=0)
    async with (
        run_roles_in_process(connection, store) as roles,
        run_roles_in_process(connection, store, projector=True, projector_pauses_stream=True),
    ):
        await roles.submit()  # begins the flood
        await roles.wait_for_views()
        batch_id, [job_id] = await roles.submit_batch({})
        await roles.handle_commands(job_id, CancelJob("user-1"))
        await roles.wait_for_event(BatchFinished, batch_id)


async def test_flood_that_ends_by_time_forgets_no_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    make_every_chunk_a_flood(monkeypatch, events=0)
    monkeypatch.setattr(projector, "_MAX_FLOOD_SECONDS", 0.1)
    monkeypatch.setattr(projector, "_MAX_FOLLOW_UP_DELAY_SECONDS", math.inf)
    event_store, writer, append = AsyncMock(), AsyncMock(), AsyncMock()
    event_store.read.return_value = [object()]
    writer.apply.return_value = [batch := {"_id": "batch-1"}]
    leader = projector.Projector.__new__(projector.Projector)
    leader._event_store = event_store
    await leader._follow_flood(writer, projector._FollowUps(append))
    assert writer.apply.await_count > 1
    [call] = append.await_args_list
    assert list(call.args[0]) == [batch]


async def test_flood_ends_when_events_were_removed_from_the_log(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_every_chunk_a_flood(monkeypatch, events=0)
    monkeypatch.setattr(projector, "STALL_RETRY_SECONDS", 0.1)
    async with (
        run_roles_in_process(connection, store) as roles,
        run_roles_in_process(connection, store, projector=True, projector_pauses_stream=True),
    ):
        await roles.submit()
        last = await roles.submit()
        await roles.wait_for_views()
        await roles.db.events.delete_one({"stream": last})
        for _ in range(3):
            await roles.submit()
        await poll_until(
            lambda: roles.db.checkpoints.find_one({"_id": "projector_stall"}), "the projector reports the removed event"
        )
