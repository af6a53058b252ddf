"""The projector: one leader, each event folded exactly once, whoever dies when."""

from __future__ import annotations

import asyncio
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pymongo import InsertOne, ReplaceOne

from jobledger.ledger.domain.commands import CancelJob, CompleteStep, ReportProgress
from jobledger.ledger.domain.errors import LedgerBusy
from jobledger.ledger.domain.events import BatchFinished, RecordedEvent
from jobledger.ledger.mongo import transactions
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.mongo.leader_election import LeadershipLost
from jobledger.ledger.store.envelope import StreamAppend
from jobledger.ledger.store.event_store import EventStore, ReadPosition
from jobledger.projections.engine import health, projector, writer
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID
from jobledger.projections.engine.chunk import Chunk
from jobledger.projections.engine.projector import Projector
from jobledger.projections.engine.registry import FOLDED_VIEWS, PROJECTION_VERSION
from jobledger.projections.engine.writer import ProjectionWriter
from jobledger.projections.views import batches, files, jobs, queue, statistics, steps
from tests.projections.expected_views import (
    assert_views_match_log,
    fold_views,
    load_views,
    run_random_batch_commands,
    run_random_job_commands,
)
from tests.support.message_proxy import MessageProxy
from tests.support.role_runner import (
    WAIT_TIMEOUT_SECONDS,
    RunningRoles,
    poll_until,
    run_roles_in_process,
    run_roles_subprocess,
)

SOON_SECONDS = 8.0
"""Before a standby would try again by itself (11 s with a lease of 30), or the server end an open transaction (10)."""


async def a_history(here: RunningRoles, dice: random.Random, *, lives: int = 4, steps: int = 60) -> None:
    """Jobs in two batches and of several tracks, and what happens to them, from several sides at once."""
    batch_one, one = await here.submit_batch(*({"track": track} for track in "AABBC"))
    batch_two, two = await here.submit_batch({}, {"track": "A"}, max_attempts=2)
    alone = [await here.submit({"track": "C"}, priority=number) for number in range(3)]
    job_ids = one + two + alone
    shares = [job_ids[start::lives] for start in range(lives)]
    await asyncio.gather(
        *(run_random_job_commands(here, share, random.Random(dice.random()), steps=steps) for share in shares),
        run_random_batch_commands(here, [batch_one, batch_two], random.Random(dice.random()), steps=steps // 2),
    )


async def fencing_token(db: Database) -> int:
    checkpoint = await db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID})
    assert checkpoint is not None
    return int(checkpoint["fencing_token"])


# Exactly once ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
async def test_however_often_the_leader_is_killed_the_views_are_what_the_log_says(
    connection: Connection, store: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "CHUNK_EVENTS", 7)
    dice = random.Random(seed)
    kills = 0
    async with run_roles_in_process(connection, store) as here:
        living = asyncio.create_task(a_history(here, dice, steps=100))
        while not living.done() or kills < 5:
            async with run_roles_in_process(connection, store, projector=True) as there:
                assert there.projector_task is not None
                begun, wanted = here.checkpoint.position, dice.randrange(1, 40)
                moved = asyncio.create_task(here.checkpoint.wait_for_position(begun + wanted))
                await asyncio.wait({moved, living}, return_when=asyncio.FIRST_COMPLETED, timeout=10)
                moved.cancel()
                there.projector_task.cancel()
                kills += 1
        await living
        async with run_roles_in_process(connection, store, projector=True):
            await here.wait_for_views()
            await assert_views_match_log(here)


async def test_two_projectors_at_once_count_nothing_twice(connection: Connection, store: Path) -> None:
    async with (
        run_roles_in_process(connection, store, projector=True) as here,
        run_roles_in_process(connection, store, projector=True),
    ):
        await a_history(here, random.Random(3))
        await assert_views_match_log(here)


async def test_views_that_are_dropped_and_folded_anew_are_identical(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(4), steps=30)
        await assert_views_match_log(here)
    before = await _stored(connection)
    for chunk_events in (1000, 3):
        monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
        async with run_roles_in_process(connection, store) as here:
            for view in (jobs, batches, queue, files, statistics, steps):
                await here.db.drop_collection(view.NAME)
            await here.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"position": 0}})
        async with run_roles_in_process(connection, store, projector=True) as here:
            await here.wait_for_views()
        assert await _stored(connection) == before


async def test_views_that_another_version_has_made_are_built_anew(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(11))
        await here.wait_for_views()
    made = await _stored(connection)
    async with connection.client() as client:
        db = client[connection.db_name]
        await db.jobs.update_many({}, {"$unset": {"list_keys": ""}})
        await db.jobs.insert_one({"_id": "job-of-nobody"})
        await db.statistics.update_one({"_id": "jobs"}, {"$inc": {"total": 1000}})
        await db.checkpoints.update_one({"_id": "views"}, {"$set": {"version": PROJECTION_VERSION - 1}})
    async with run_roles_in_process(connection, store, projector=True) as here:
        async with asyncio.timeout(20):
            await here.checkpoint.wait_for_version_change(PROJECTION_VERSION - 1)
        await here.wait_for_views()
    assert await _stored(connection) == made


async def _stored(connection: Connection) -> dict[str, list[str]]:
    async with connection.client() as client:
        return await load_views(client[connection.db_name])


async def test_what_a_chunk_amounts_to_does_not_depend_on_where_it_ends(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as here:
        await a_history(here, random.Random(5), steps=30)
        events = await here.read_all_events()
    together = Chunk({view: {} for view in FOLDED_VIEWS})
    for event in events:
        together.apply(event)
    loaded: dict[str, dict[str, Document]] = {view: {} for view in FOLDED_VIEWS}
    counted: Counter[tuple[str, str]] = Counter()
    rows: dict[str, dict[str, Document]] = {view: {} for view in together.changed_rows()}
    for event in events:
        chunk = Chunk(loaded, [job for job in loaded["jobs"].values() if job["status"] == "pending"])
        chunk.apply(event)
        counted.update(chunk.counter_increments)
        for _, write in chunk.build_writes().get(queue.NAME, ()):
            if isinstance(write, InsertOne):
                assert write._doc["_id"] not in rows[queue.NAME]
            elif isinstance(write, ReplaceOne):
                assert write._filter["_id"] in rows[queue.NAME], "what is not there is inserted: see chunk.py"
        for view, changed in chunk.changed_rows().items():
            rows[view] = {key: row for key, row in {**rows[view], **changed}.items() if row is not None}
        for view, documents in chunk.current.items():
            for key, document in documents.items():
                loaded[view].pop(key, None)
                if document is not None:
                    loaded[view][key] = document
    assert counted == together.counter_increments
    for view in FOLDED_VIEWS:
        assert loaded[view] == {
            key: document for key, document in together.current[view].items() if document is not None
        }
    assert rows == together.changed_rows()


async def test_progress_that_is_replaced_within_a_chunk_is_counted_and_changes_nothing(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as here:
        one, two = await here.submit(), await here.submit()
        await here.claim(one)
        await here.claim(two)
        for percent in (1, 2, 3):
            await here.handle_commands(one, ReportProgress("worker-1", 1, "page", percent, f"one {percent}"))
            await here.handle_commands(two, ReportProgress("worker-1", 1, "page", percent, f"two {percent}"))
        await here.handle_commands(one, CompleteStep("worker-1", 1, "page", "key", {}, 1.0, 0, ()))
        await here.handle_commands(one, ReportProgress("worker-1", 1, "slides", 50, "half"))
        events = await here.read_all_events()
    told = writer._drop_superseded_progress(events)
    assert len(events) - len(told) == 4
    assert [event.position for event in told] == sorted(event.position for event in told)
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.wait_for_views()
        assert (await here.load_job(one))["progress"] == {"step": "slides", "percent": 50.0, "message": "half"}
        assert (await here.load_job(two))["progress"]["message"] == "two 3"
        await assert_views_match_log(here)


async def test_the_counters_are_what_counting_the_jobs_yields(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(6))
        await here.wait_for_views()
        said = await statistics.load_statistics(here.checkpoint.views, datetime.now(UTC))
        for status in ("pending", "processing", "completed", "failed", "cancelled"):
            assert said["jobs"][status] == await here.db.jobs.count_documents({"status": status}), status
        assert said["jobs"]["total"] == await here.db.jobs.count_documents({})
        assert said["batches"]["total"] == await here.db.batches.count_documents({}) == 2
        assert said["batches"]["active"] == await here.db.batches.count_documents({"status": "processing"})
        for track in said["tracks"]:
            mine = {"parameters.track": track["_id"]}
            assert track["count"] == await here.db.jobs.count_documents(mine)
            for status in ("completed", "failed"):
                assert track[status] == await here.db.jobs.count_documents({**mine, "status": status})
        named = {track["_id"] for track in said["tracks"]}
        assert named == set(await here.db.jobs.distinct("parameters.track", {"parameters.track": {"$type": "string"}}))


# Leaders --------------------------------------------------------------------------------------------------------------


class HeldFolder(ProjectionWriter):
    """Stops with its documents loaded and its transaction not begun, and keeps what it was about to fold."""

    about_to_fold: Sequence[RecordedEvent]

    async def apply(self, events: Sequence[RecordedEvent], **given: Any) -> list[Document]:
        self.about_to_fold = events
        await self._loader.load(events, unwritten=None, position=self.position)
        Held.reached.set()
        return await asyncio.Future()


class Held(Projector):
    reached: asyncio.Event
    folder: HeldFolder

    async def _take_over(self) -> ProjectionWriter:
        found = await super()._take_over()
        self.folder = HeldFolder(
            self._db, found.views, checkpoint=found._checkpoint, fence=found._fence, last_applied=found.last_applied
        )
        return self.folder


async def test_the_transaction_of_a_deposed_leader_has_no_effect(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Held, "reached", asyncio.Event(), raising=False)
    async with run_roles_in_process(connection, store, projector=True, projector_class=Held) as first:
        assert isinstance(first.projector, Held)
        await first.submit({"track": "A"})
        async with asyncio.timeout(10):
            await Held.reached.wait()
        # Its lease runs out while it stands still, and another one leads.
        await first.db.leaders.update_one({}, [{"$set": {"lease_until": "$$NOW"}}])
        async with run_roles_in_process(connection, store, projector=True) as second:
            await second.wait_for_views(1)
            await second.submit({"track": "B"})
            await second.wait_for_views(2)
            before = await load_views(first.db)
            with pytest.raises(LeadershipLost):
                await ProjectionWriter.apply(first.projector.folder, first.projector.folder.about_to_fold)
            assert await load_views(first.db) == before
            await assert_views_match_log(second)


async def test_of_two_leaders_in_one_epoch_only_one_folds_a_position(connection: Connection, store: Path) -> None:
    """What the checkpoint's filter on the position is for: the same chunk again finds no such checkpoint."""
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.submit({"track": "A"})
        await here.wait_for_views(1)
        before = await load_views(here.db)
        views = here.checkpoint.views
        again = ProjectionWriter(
            here.db,
            views,
            checkpoint=VIEWS_CHECKPOINT_ID,
            fence={"fencing_token": 1, "slots": views.slots},
            last_applied=ReadPosition(0),
        )
        with pytest.raises(LeadershipLost):
            await again.apply(await here.read_all_events())
        assert await load_views(here.db) == before


async def test_a_standby_leads_at_once_when_the_leader_stops(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, projector_lease_seconds=30) as first:
        await first.submit()
        await first.wait_for_views(1)
        async with run_roles_in_process(connection, store, projector=True, projector_lease_seconds=30) as second:
            assert first.projector_task is not None
            first.projector_task.cancel()
            await asyncio.gather(first.projector_task, return_exceptions=True)
            await second.submit()
            await second.wait_for_views(2, seconds=SOON_SECONDS)


async def test_a_standby_that_was_just_refused_does_not_miss_that_the_leader_stops(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True, projector_lease_seconds=30) as first:
        await first.submit()
        await first.wait_for_views(1)
        async with run_roles_in_process(connection, store, projector_lease_seconds=30) as second:
            assert first.projector_task is not None
            leader = first.projector_task
            standby = Projector(
                second.db, second.event_store, connection, second.checkpoint, holder="standby", lease_seconds=30
            )
            second_try = standby._leader_election._lease.acquire

            async def acquire(facts: Any) -> bool:
                taken = await second_try(facts)
                if not leader.done():  # between the refusal and the waiting
                    leader.cancel()
                    await asyncio.gather(leader, return_exceptions=True)
                    standby._leader_election.on_change(
                        {
                            "documentKey": {"_id": "projector"},
                            "updateDescription": {"updatedFields": {"released": True}},
                        }
                    )
                return taken

            monkeypatch.setattr(standby._leader_election._lease, "acquire", acquire)
            standing_by = asyncio.create_task(standby.run())
            await second.submit()
            await second.wait_for_views(2, seconds=SOON_SECONDS)
            standing_by.cancel()
            await asyncio.gather(standing_by, return_exceptions=True)


@asynccontextmanager
async def stopped_within_a_transaction(
    mongodb_uri: str, connection: Connection, store: Path, *, wait_seconds: float | None
) -> AsyncIterator[RunningRoles]:
    """A leader was told to stop while the statement that begins its transaction was on its way.

    Which goes on after `wait_seconds`, or not at all. Yields another process, and the leader has stopped.
    """
    with MessageProxy(mongodb_uri) as wire:
        async with (
            run_roles_in_process(connection, store) as here,
            run_roles_in_process(replace(connection, uri=wire.uri), store, projector=True) as leader,
        ):
            await here.submit()
            await here.wait_for_views(1)
            wire.hold_request("update")
            await here.submit()
            assert await asyncio.to_thread(wire.message_held.wait, WAIT_TIMEOUT_SECONDS)
            assert leader.projector_task is not None
            leader.projector_task.cancel()
            if wait_seconds is not None:
                asyncio.get_running_loop().call_later(wait_seconds, wire.release_request)
            await asyncio.wait({leader.projector_task}, timeout=WAIT_TIMEOUT_SECONDS)
            assert leader.projector_task.done()
            if wait_seconds is None:
                wire.close_connections()  # what is held never arrives
            else:
                await asyncio.sleep(wait_seconds + 0.1)  # it has arrived, if nobody waited for it
            yield here


async def test_a_leader_that_stops_within_a_transaction_does_not_leave_it_open(
    mongodb_uri: str, connection: Connection, store: Path
) -> None:
    async with (
        stopped_within_a_transaction(mongodb_uri, connection, store, wait_seconds=0.5) as here,
        run_roles_in_process(connection, store, projector=True),
    ):
        await here.submit()
        await here.wait_for_views(3, seconds=SOON_SECONDS)
        await assert_views_match_log(here)


async def test_a_leader_stops_although_its_transaction_does_not_come_to_an_end(
    mongodb_uri: str, connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "CANCEL_TIMEOUT_SECONDS", 0.5)
    async with (
        stopped_within_a_transaction(mongodb_uri, connection, store, wait_seconds=None) as here,
        run_roles_in_process(connection, store, projector=True),
    ):
        await here.wait_for_views(2)


async def test_a_standby_leads_when_the_leader_was_killed_and_its_lease_has_run_out(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as here:
        with run_roles_subprocess(connection, store, "projector", lease_seconds=1.5) as leader:
            await leader.wait_until_started()
            await here.submit()
            await here.wait_for_views(1)
            async with run_roles_in_process(connection, store, projector=True, projector_lease_seconds=1.5):
                first = await fencing_token(here.db)
                leader.send_signal(signal.SIGKILL)
                await leader.wait_for_exit()
                await here.submit()
                await here.wait_for_views(2, seconds=1.5 + 1.5 / 3 + 1 + 2)
                assert await fencing_token(here.db) > first
                await assert_views_match_log(here)


async def test_a_leader_that_was_frozen_does_no_harm_when_it_goes_on(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as here:
        with run_roles_subprocess(connection, store, "projector", lease_seconds=1.5) as leader:
            await leader.wait_until_started()
            await here.submit({"track": "A"})
            await here.wait_for_views(1)
            leader.send_signal(signal.SIGSTOP)
            await here.submit({"track": "A"})
            async with run_roles_in_process(connection, store, projector=True, projector_lease_seconds=1.5):
                await here.wait_for_views(2, seconds=10)
                leader.send_signal(signal.SIGCONT)
                await a_history(here, random.Random(7), steps=10)
                await assert_views_match_log(here)


# Trouble --------------------------------------------------------------------------------------------------------------


class Busy(EventStore):
    """Refuses the first append, as a log does that has too much to do: the API shares it with the projector."""

    refused = 0

    async def append(self, *appends: StreamAppend) -> list[RecordedEvent]:
        if self.refused == 0 and any(type(event) is BatchFinished for append in appends for event in append.events):
            self.refused += 1
            raise LedgerBusy("too much is waiting")
        return await super().append(*appends)


async def test_a_log_that_is_too_busy_does_not_end_the_projector(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, store_class=Busy) as here:
        batch_id, (job_id,) = await here.submit_batch({})
        await live_to_the_end(here, job_id)
        await here.wait_for_event(BatchFinished, batch_id, seconds=10)
        assert isinstance(here.event_store, Busy)
        assert here.event_store.refused == 1
        assert here.projector_task is not None
        assert not here.projector_task.done()


async def live_to_the_end(here: RunningRoles, job_id: str) -> None:
    await here.handle_commands(job_id, CancelJob("user-1"))


async def test_a_leader_whose_checkpoint_is_set_back_begins_anew(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.submit({"track": "A"})
        await here.wait_for_views(1)
        for view in (jobs, batches, queue, files, statistics, steps):
            await here.db[view.NAME].delete_many({})
        await here.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"position": 0}})
        await poll_until(lambda: here.checkpoint.position == 0, "the checkpoint was set back")
        await here.submit({"track": "B"})
        await here.wait_for_views(2)
        assert (await load_views(here.db, zeros=False)) == fold_views(await here.read_all_events())


# A log whose end was removed ------------------------------------------------------------------------------------------


async def remove_end(here: RunningRoles) -> None:
    await here.db.events.delete_many({"_id": {"$gte": 2}})


async def restore_older_copy(here: RunningRoles) -> None:
    await remove_end(here)
    await here.db.counters.update_one({"_id": "events"}, {"$set": {"next": 1}})


@pytest.mark.parametrize("running", [True, False], ids=["running", "stopped"])
@pytest.mark.parametrize("damage", [remove_end, restore_older_copy])
async def test_projector_stands_still_when_events_it_has_read_were_removed_and_others_appended(
    connection: Connection,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[RunningRoles], Awaitable[None]],
    running: bool,
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_ATTEMPTS", 2)
    async with run_roles_in_process(connection, store, projector=True) as here:
        for _ in range(3):
            await here.submit()
        await here.wait_for_views(3)
        if running:
            await damage(here)
            await appended_until_noted(here)
    if not running:
        async with run_roles_in_process(connection, store) as here:
            await damage(here)
            await here.submit()
        async with run_roles_in_process(connection, store, projector=True) as here:
            await appended_until_noted(here)


async def appended_until_noted(here: RunningRoles) -> None:
    """Submit jobs until the projector says why it stands still."""
    async with asyncio.timeout(WAIT_TIMEOUT_SECONDS):
        while "reached position 3" not in await health.stall_reason(here.db, 3, 9):
            await here.submit()
            await asyncio.sleep(0.1)
    checkpoint = await here.db.checkpoints.find_one({"_id": VIEWS_CHECKPOINT_ID})
    assert checkpoint is not None
    assert checkpoint["position"] == 3


class RemovedWhileRead(EventStore):
    """A log whose end is removed after it was read, and before the reader has it."""

    async def read(
        self, *, after: int = 0, limit: int | None = None, without_metadata: bool = False
    ) -> list[RecordedEvent]:
        page = await super().read(after=after, limit=limit, without_metadata=without_metadata)
        if not after and len(page) == 3:
            self.may_have_lost_events = False
            await self._db.events.delete_many({"_id": {"$gte": 2}})
            await poll_until(lambda: self.may_have_lost_events, "the deletion was heard")
        return page


async def test_projector_does_not_fold_events_that_were_removed_while_it_read_them(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as here:
        for _ in range(3):
            await here.submit()
    async with run_roles_in_process(connection, store, projector=True, store_class=RemovedWhileRead) as here:
        await poll_until(lambda: here.changes.restart_count > 0, "the change stream was opened again")
        await here.submit()
        await assert_views_match_log(here)
