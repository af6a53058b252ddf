"""Views are made anew beside those that are read, and replace them at once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobledger.ledger.domain.commands import ClaimJob, CompleteJob, Delete
from jobledger.ledger.domain.errors import DatabaseUnsuitable
from jobledger.ledger.domain.events import BatchFinished, JobResults, ResultMetadata
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.mongo.leader_election import LeadershipLost
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine import projector, rebuild, shadow
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID, load_checkpoint
from jobledger.projections.engine.chunk import Chunk
from jobledger.projections.engine.comparison import Difference
from jobledger.projections.engine.rebuild import Rebuild
from jobledger.projections.engine.registry import PROJECTION_VERSION, VIEW_NAMES
from jobledger.projections.engine.writer import ProjectionWriter
from jobledger.projections.slots import SLOTS, Slot, Views, collection_name, other_slot
from tests.projections.expected_views import assert_views_match_log, load_views
from tests.projections.test_projector import a_history
from tests.support.role_runner import FAST_WEBHOOKS, WorkerOptions, poll_until, run_roles_in_process
from tests.support.webhook_endpoint import run_webhook_endpoint
from tests.workers.webhooks.test_deliverer import end_a_job, over


@asynccontextmanager
async def rebuilding(
    connection: Connection, *, holder: str = "auditor", seconds: float = 10.0
) -> AsyncIterator[Rebuild]:
    """What another process needs to make views anew."""
    async with connection.client() as client:
        db = client[connection.db_name]
        log, changes = EventStore(db), ChangeStream(db)
        found = Rebuild(db, log, connection, holder=holder, lease_seconds=seconds)
        changes.add_listener(log)
        changes.add_listener(found.leader_election)
        async with changes.running(), asyncio.timeout(60):
            yield found


async def sides(db: Database) -> dict[str, Slot]:
    live = (await load_checkpoint(db)).get("slots", {})
    return {name: live.get(name, "a") for name in VIEW_NAMES}


async def left_over(db: Database) -> int:
    """How many documents lie where nobody reads."""
    live = await sides(db)
    counts = [await db[collection_name(name, other_slot(live[name]))].count_documents({}) for name in VIEW_NAMES]
    return sum(counts)


async def compared(connection: Connection, names: Collection[str] = VIEW_NAMES) -> list[Difference]:
    found: list[Difference] = []
    async with rebuilding(connection) as auditor:
        await auditor.compare(names, on_difference=found.append)
    return found


async def spoil(db: Database) -> None:
    """What somebody does who should not."""
    live = Views(db, (await load_checkpoint(db)).get("slots"))
    await live["jobs"].update_one({"status": "pending"}, {"$set": {"status": "completed"}})
    await live["jobs"].insert_one({"_id": "job-of-nobody", "status": "failed"})
    await live["queue"].delete_one({})
    await live["statistics"].update_one({"_id": "jobs"}, {"$inc": {"total": 1000}})


# Making anew ----------------------------------------------------------------------------------------------------------


async def test_views_made_anew_are_what_they_were_and_are_read_from_the_other_side(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 50)
    told: list[tuple[int, int]] = []
    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(20), steps=60)
        await assert_views_match_log(here)
        before, head = await load_views(here.db), await here.event_store.head_position()
        for side in reversed(SLOTS):
            async with rebuilding(connection) as auditor:
                assert await auditor.run(on_progress=lambda position, upto: told.append((position, upto))) == head
            assert set((await sides(here.db)).values()) == {side}
            assert await load_views(here.db) == before
            assert head == await here.event_store.head_position() == here.checkpoint.position
        assert told == sorted(told[: len(told) // 2]) + sorted(told[len(told) // 2 :])
        assert told[0] == (50, head)
        assert told[-1] == (head, head)
        job_id = await here.submit()  # and life goes on
        await here.wait_for_views()
        assert (await here.load_job(job_id))["status"] == "pending"
        await assert_views_match_log(here)


async def test_what_was_spoiled_is_right_again(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(21), steps=30)
        await here.submit()
        await assert_views_match_log(here)
        before = await load_views(here.db)
        await spoil(here.db)
        assert await load_views(here.db) != before
        async with rebuilding(connection) as auditor:
            await auditor.run()
        assert await load_views(here.db) == before


async def test_while_jobs_are_submitted_and_done(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 20)
    monkeypatch.setattr(projector, "SHADOW_RETENTION_SECONDS", 0.2)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        submitted: list[str] = []

        async def submit() -> None:
            while True:
                submitted.append(await here.submit({"file": False}))
                await asyncio.sleep(0.002)

        submitting = asyncio.create_task(submit())
        async with rebuilding(connection) as auditor:
            for _ in range(4):
                await asyncio.sleep(0.5)
                await auditor.run()
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)
        await here.wait_until_finished(*submitted, seconds=60)
        await assert_views_match_log(here)
        assert len(submitted) > 100
        assert await compared(connection) == []


async def test_only_one_view_is_replaced(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(22), steps=20)
        await assert_views_match_log(here)
        right = await load_views(here.db)
        await spoil(here.db)
        wrong = await load_views(here.db)
        async with rebuilding(connection) as auditor:
            await auditor.run(["statistics"])
        assert await sides(here.db) == {name: "b" if name == "statistics" else "a" for name in VIEW_NAMES}
        assert await load_views(here.db) == {**wrong, "statistics": right["statistics"]}
        async with rebuilding(connection) as auditor:
            await auditor.run()
        assert await sides(here.db) == {name: "a" if name == "statistics" else "b" for name in VIEW_NAMES}
        assert await load_views(here.db) == right


async def test_one_view_of_another_version_is_not_replaced_alone(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.submit()
        await here.wait_for_views()
    async with connection.client() as client:
        await client[connection.db_name].checkpoints.update_one(
            {"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"version": PROJECTION_VERSION + 1}}
        )
    async with rebuilding(connection) as auditor:
        with pytest.raises(DatabaseUnsuitable, match="all of them"):
            await auditor.run(["statistics"])


async def test_an_empty_log_makes_empty_views(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here, rebuilding(connection) as auditor:
        assert await auditor.run() == 0
        assert await compared(connection) == []
        await here.submit()
        await here.wait_for_views()
        await assert_views_match_log(here)


async def test_who_hears_of_deliveries_hears_of_them_on_either_side(connection: Connection, store: Path) -> None:
    async with (
        run_webhook_endpoint() as cms,
        run_roles_in_process(connection, store, projector=True, webhooks=FAST_WEBHOOKS) as here,
        rebuilding(connection) as auditor,
    ):
        from jobledger.ledger.domain.events import Webhook

        for _ in SLOTS:
            await auditor.run()
            done = await over(here, await end_a_job(here, Webhook(url=cms.url())))
            assert done["status"] == "delivered"
        assert len({request.webhook_id for request in cms.requests}) == len(cms.requests) == 2


# Interrupted ----------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


async def test_what_was_interrupted_is_continued_where_it_was(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 40)
    written: list[int] = []
    write = ProjectionWriter.write

    async def counted(self: ProjectionWriter, chunk: Chunk, **given: Any) -> None:
        if len(written) == 3:
            raise Interrupted
        written.append(chunk.position)
        await write(self, chunk, **given)

    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(23), steps=100)
        await assert_views_match_log(here)
        before, head = await load_views(here.db), await here.event_store.head_position()
        with monkeypatch.context() as patched:
            patched.setattr(ProjectionWriter, "write", counted)
            with pytest.raises(Interrupted):
                async with rebuilding(connection) as auditor:
                    await auditor.run()
        assert written == [40, 80, 120]
        assert await load_views(here.db) == before
        began: list[int] = []
        async with rebuilding(connection) as auditor:
            await auditor.run(on_progress=lambda position, upto: began.append(position))
        assert began[0] == 160 < head
        assert await load_views(here.db) == before


async def test_what_another_version_has_begun_is_begun_again(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(24), steps=20)
        await assert_views_match_log(here)
        before = await load_views(here.db)
        for name in VIEW_NAMES:
            await here.db[collection_name(name, "b")].insert_one({"_id": "left"})
        note = {
            "slots": dict.fromkeys(VIEW_NAMES, "b"),
            "shadow_empty": True,
            "version": PROJECTION_VERSION - 1,
            "position": 5,
            "fencing_token": 0,
        }
        await here.db.checkpoints.insert_one({"_id": shadow.REBUILD_CHECKPOINT_ID, **note})
        async with rebuilding(connection) as auditor:
            await auditor.run()
        assert await load_views(here.db) == before


async def test_who_was_replaced_while_making_views_anew_writes_nothing(connection: Connection, store: Path) -> None:
    """A process that stood still for longer than its lease: another has begun on the same side, and is done."""
    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(25), steps=20)
        await assert_views_match_log(here)
        before = await load_views(here.db)
        async with rebuilding(connection, holder="slow") as slow, rebuilding(connection, holder="quick") as quick:
            reached, go_on = asyncio.Event(), asyncio.Event()

            async def stand_still() -> None:
                writer, slots = await slow._shadow.open()
                reached.set()
                await go_on.wait()
                for attempt in (
                    writer.apply(await here.read_all_events()),
                    slow._shadow.delete_documents(writer.views),
                    slow._switch_when_idle(0, slow._switch_function(slots, VIEW_NAMES)),
                ):
                    with pytest.raises(LeadershipLost):
                        await attempt

            standing = asyncio.create_task(slow.leader_election.run_once(stand_still))
            await reached.wait()
            await here.db.leaders.update_one(
                {"_id": shadow.REBUILD_CHECKPOINT_ID}, [{"$set": {"lease_until": "$$NOW"}}]
            )
            slow.leader_election._lease._lost = asyncio.Event()  # it does not notice
            await quick.run()
            assert await load_views(here.db) == before
            go_on.set()
            await asyncio.wait({standing}, timeout=5)
            assert await load_views(here.db) == before
            standing.cancel()
            await asyncio.gather(standing, return_exceptions=True)


async def test_of_two_at_once_the_second_says_that_it_waits_and_then_does_it_once_more(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.submit()
        async with rebuilding(connection, holder="one") as one, rebuilding(connection, holder="two") as two:
            reached, go_on = asyncio.Event(), asyncio.Event()

            async def stand_still() -> None:
                reached.set()
                await go_on.wait()

            standing = asyncio.create_task(one.leader_election.run_once(stand_still))
            await reached.wait()
            with capture_logs() as said:
                running = asyncio.create_task(two.run())
                await poll_until(lambda: bool(said), "it says so")
                assert not running.done()
                assert said[0] == {
                    "event": "another process is leader, standing by",
                    "role": shadow.REBUILD_CHECKPOINT_ID,
                    "log_level": "info",
                }
                go_on.set()
                await standing
                await asyncio.wait_for(running, 10)
        await assert_views_match_log(here)


async def test_a_leader_whose_views_were_replaced_begins_again_on_the_new_ones(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here, rebuilding(connection) as auditor:
        await here.submit({"track": "A"})
        await here.wait_for_views()
        await auditor.run()
        await here.submit({"track": "B"})  # only now does the leader notice
        await here.wait_for_views()
        await assert_views_match_log(here)
        assert await here.db.jobs.count_documents({}) <= 1
        assert await here.db["jobs.b"].count_documents({}) == 2


async def test_what_was_read_before_is_emptied_when_nobody_reads_it_any_more(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "SHADOW_RETENTION_SECONDS", 0.5)
    async with run_roles_in_process(connection, store, projector=True) as here, rebuilding(connection) as auditor:
        await a_history(here, random.Random(26), steps=20)
        await assert_views_match_log(here)
        await auditor.run()
        await auditor.clear_shadow(datetime.now(UTC) - timedelta(hours=1))
        assert await left_over(here.db) > 0, "that is of another rebuild, which readers may still be at"
        async with asyncio.timeout(20):
            while await left_over(here.db):  # noqa: ASYNC110 - nobody tells us
                await asyncio.sleep(0.05)
        await assert_views_match_log(here)


# Versions -------------------------------------------------------------------------------------------------------------


async def test_views_of_an_older_version_can_be_read_until_the_new_ones_are_there(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await a_history(here, random.Random(27), steps=20)
        await assert_views_match_log(here)
    fold, may_switch = Rebuild._apply, asyncio.Event()

    async def later(self: Rebuild, *given: Any) -> bool:
        await may_switch.wait()
        return await fold(self, *given)

    monkeypatch.setattr(Rebuild, "_apply", later)
    async with connection.client() as client:
        await client[connection.db_name].checkpoints.update_one(
            {"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"version": PROJECTION_VERSION - 1}}
        )
        before = await load_views(client[connection.db_name])
    async with (
        run_roles_in_process(connection, store, projector=True) as here,
        run_roles_in_process(connection, store, projector=True) as standby,
    ):
        await poll_until(lambda: here.checkpoint.version == PROJECTION_VERSION - 1, "it is known")
        job_id = await here.submit()
        await asyncio.sleep(0.5)
        assert await load_views(here.db) == before
        may_switch.set()
        await here.wait_for_views()
        await standby.wait_for_views()
        assert (await standby.load_job(job_id))["status"] == "pending"
        assert here.checkpoint.version == PROJECTION_VERSION
        await assert_views_match_log(here)


async def test_views_of_a_newer_version_are_left_alone(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.submit()
        await here.wait_for_views()
        head = await here.event_store.head_position()
        newer = {"version": PROJECTION_VERSION + 1, "slots": dict.fromkeys(VIEW_NAMES, "a")}
        await here.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": newer})
        await poll_until(lambda: here.checkpoint.version == PROJECTION_VERSION + 1, "it is known")
        await here.submit()
        await asyncio.sleep(0.5)
        assert here.checkpoint.position == head
        async with rebuilding(connection) as auditor:  # as `jobledger views rebuild` of this version does
            await auditor.run()
        await here.submit()
        await here.wait_for_views()
        await assert_views_match_log(here)


# Comparing ------------------------------------------------------------------------------------------------------------


async def test_right_views_differ_in_nothing_and_nothing_is_left(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        await a_history(here, random.Random(28), steps=40)
        await assert_views_match_log(here)
        assert await compared(connection) == []
        assert set((await sides(here.db)).values()) == {"a"}
        assert await left_over(here.db) == 0


async def test_every_kind_of_difference_is_found_and_told(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_ids = [await here.submit({"track": "A"}) for _ in range(3)]
        await here.wait_for_views()
        await here.db.jobs.update_one({"_id": job_ids[0]}, {"$set": {"status": "failed", "extra": 1}})
        await here.db.jobs.update_one({"_id": job_ids[1]}, {"$set": {"version": 1.0}})
        await here.db.queue.delete_one({"_id": job_ids[2]})
        await here.db.files.insert_one({"_id": "job-x/a.md"})
        told = [str(difference) for difference in await compared(connection)]
    assert sorted(told) == sorted(
        [
            f"jobs: {job_ids[0]}: extra is 1 and should be missing; status is 'failed' and should be 'pending'",
            f"jobs: {job_ids[1]}: version is 1.0 and should be 1",
            f"queue: {job_ids[2]} is missing",
            "files: job-x/a.md should not be there",
        ]
    )


async def test_comparing_while_jobs_are_done_finds_nothing(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:

        async def submit() -> None:
            while True:
                await here.submit({"file": False})
                await asyncio.sleep(0.005)

        submitting = asyncio.create_task(submit())
        for _ in range(3):
            assert await compared(connection) == []
            await asyncio.sleep(0.2)
        submitting.cancel()
        await asyncio.gather(submitting, return_exceptions=True)


async def test_large_jobs_are_folded_while_the_chunk_before_is_written(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large documents are not cached: what is being written has to be found all the same, whatever happens next."""
    monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 1)
    large = {"text": "x" * 70_000}
    async with run_roles_in_process(connection, store, projector=True) as here:
        batch_id, in_batch = await here.submit_batch(large, large)
        alone = [await here.submit(large) for _ in range(3)]
        done = JobResults(metadata=ResultMetadata(processed_at=datetime.now(UTC), duration=1.0, text="x" * 70_000))
        for job_id in [*in_batch, *alone[1:]]:
            await here.handle_commands(
                job_id, ClaimJob("worker-1", datetime.now(UTC)), CompleteJob("worker-1", 1, done)
            )
        await here.handle_commands(alone[2], Delete("user-1"))
        await here.wait_for_event(BatchFinished, batch_id)
        await here.wait_for_views()
        before = await load_views(here.db)
        assert await compared(connection) == []
        async with rebuilding(connection) as auditor:
            await auditor.run()
        assert await load_views(here.db) == before
        assert (await here.load_job(in_batch[0]))["status"] == "completed"


async def test_running_projector_does_not_fold_removed_events_after_a_rebuild(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_ATTEMPTS", 1)
    monkeypatch.setattr(projector, "STALL_RETRY_SECONDS", 0.1)
    async with run_roles_in_process(connection, store, projector=True) as here:
        for _ in range(3):
            await here.submit()
        await here.wait_for_views(3)
        await here.db.events.delete_many({"_id": {"$gte": 2}})
        async with rebuilding(connection) as auditor:
            await auditor.run()
        await poll_until(lambda: here.checkpoint.position == 1, "the views were rebuilt")
        await here.submit()
        await assert_views_match_log(here)
