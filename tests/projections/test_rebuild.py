"""A rebuild writes views into shadow slots and switches to them at once, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from jobledger.ledger.domain.commands import CancelJob, ClaimJob, Delete
from jobledger.ledger.domain.errors import DatabaseUnsuitable
from jobledger.ledger.domain.events import BatchFinished, DeliverySucceeded, Webhook
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.mongo.leader_election import LeadershipLost
from jobledger.projections.engine import projector, rebuild, shadow
from jobledger.projections.engine.checkpoint import VIEWS_CHECKPOINT_ID, load_checkpoint
from jobledger.projections.engine.rebuild import Rebuild
from jobledger.projections.engine.view_changes import ViewChanges
from jobledger.projections.engine.view_registry import PROJECTION_VERSION, VIEW_NAMES
from jobledger.projections.engine.writer import ProjectionWriter
from jobledger.projections.slots import SLOTS, Slot, Views, get_collection_name, get_other_slot
from jobledger.projections.views import deliveries
from tests.projections.expected_views import (
    assert_views_match_log,
    load_views,
    make_empty_results,
    run_random_history,
)
from tests.projections.rebuild_runner import compare_views, open_rebuild, rebuild_views
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import FAST_WEBHOOKS, RunningRoles, WorkerOptions, run_roles_in_process
from tests.support.webhook_endpoint import run_webhook_endpoint
from tests.support.worker_reports import report_results


async def load_active_slots(db: Database) -> dict[str, Slot]:
    slots = (await load_checkpoint(db)).get("slots", {})
    return {name: slots.get(name, "a") for name in VIEW_NAMES}


async def count_shadow_documents(db: Database) -> int:
    active = await load_active_slots(db)
    counts = [
        await db[get_collection_name(name, get_other_slot(active[name]))].count_documents({}) for name in VIEW_NAMES
    ]
    return sum(counts)


async def tamper_with_views(db: Database) -> None:
    """Change the active views as no projector does."""
    active = Views(db, (await load_checkpoint(db)).get("slots"))
    await active["jobs"].update_one({"status": "pending"}, {"$set": {"status": "completed"}})
    await active["jobs"].insert_one({"_id": "job-unknown", "status": "failed"})
    await active["queue"].delete_one({})
    await active["statistics"].update_one({"_id": "jobs"}, {"$inc": {"total": 1000}})


class ContinuousSubmitter:
    """Submits jobs without files until it is stopped."""

    def __init__(self, roles: RunningRoles, pause_seconds: float) -> None:
        self._roles = roles
        self._pause_seconds = pause_seconds
        self._task = asyncio.create_task(self._run())
        self.job_ids: list[str] = []

    async def _run(self) -> None:
        while True:
            self.job_ids.append(await self._roles.submit({"file": False}))
            await asyncio.sleep(self._pause_seconds)

    async def wait_for_more_jobs(self, count: int) -> None:
        target = len(self.job_ids) + count
        await poll_until(lambda: len(self.job_ids) >= target or self._task.done(), "more jobs")
        assert not self._task.done()

    async def stop(self) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)


async def rebuild_during_appends(rebuild_process: Rebuild) -> None:
    """Rebuild, and again until the views contain an event that was appended after the rebuild had begun."""
    heads: list[int] = []
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await rebuild_process.run(on_progress=lambda _, head: heads.append(head)) == heads[0]:
            heads.clear()


# Rebuilding -----------------------------------------------------------------------------------------------------------


async def test_rebuilt_views_are_identical_and_active_in_the_other_slots(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 50)
    progress: list[tuple[int, int]] = []
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(20), steps=60)
        await assert_views_match_log(roles)
        before, head = await load_views(roles.db), await roles.event_store.read_head_position()
        for slot in reversed(SLOTS):
            async with open_rebuild(connection) as rebuild_process:
                position = await rebuild_process.run(
                    on_progress=lambda position, total: progress.append((position, total))
                )
            assert position == head
            assert set((await load_active_slots(roles.db)).values()) == {slot}
            assert await load_views(roles.db) == before
            assert head == await roles.event_store.read_head_position() == roles.checkpoint.position
        half = len(progress) // 2
        assert progress == sorted(progress[:half]) + sorted(progress[half:])
        assert progress[0] == (50, head)
        assert progress[-1] == (head, head)
        job_id = await roles.submit()  # the projector continues on the new views
        await roles.wait_for_views()
        assert (await roles.load_job(job_id))["status"] == "pending"
        await assert_views_match_log(roles)


async def test_rebuild_repairs_tampered_views(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(21), steps=30)
        await roles.submit()
        await assert_views_match_log(roles)
        before = await load_views(roles.db)
        await tamper_with_views(roles.db)
        assert await load_views(roles.db) != before
        await rebuild_views(connection)
        assert await load_views(roles.db) == before


@pytest.mark.timeout(300)
async def test_rebuild_while_jobs_run_gives_correct_views(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 10)
    monkeypatch.setattr(projector, "SHADOW_RETENTION_SECONDS", 0.2)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        submitter = ContinuousSubmitter(roles, 0.02)
        async with open_rebuild(connection) as rebuild_process:
            for _ in range(3):  # into each slot, and into one that was used before
                await submitter.wait_for_more_jobs(15)
                await rebuild_during_appends(rebuild_process)
        await submitter.stop()
        await roles.wait_until_finished(*submitter.job_ids, seconds=DEADLINE_SECONDS)
        await assert_views_match_log(roles)
        assert await compare_views(connection) == []


async def test_rebuild_of_one_view_replaces_only_this_view(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(22), steps=20)
        await assert_views_match_log(roles)
        correct = await load_views(roles.db)
        await tamper_with_views(roles.db)
        tampered = await load_views(roles.db)
        await rebuild_views(connection, ["statistics"])
        assert await load_active_slots(roles.db) == {name: "b" if name == "statistics" else "a" for name in VIEW_NAMES}
        assert await load_views(roles.db) == {**tampered, "statistics": correct["statistics"]}
        await rebuild_views(connection)
        assert await load_active_slots(roles.db) == {name: "a" if name == "statistics" else "b" for name in VIEW_NAMES}
        assert await load_views(roles.db) == correct


async def test_rebuild_of_one_view_of_another_version_is_rejected(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit()
        await roles.wait_for_views()
    async with connection.create_client() as client:
        await client[connection.db_name].checkpoints.update_one(
            {"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"version": PROJECTION_VERSION + 1}}
        )
    with pytest.raises(DatabaseUnsuitable, match="all of them"):
        await rebuild_views(connection, ["statistics"])


async def test_rebuild_of_an_empty_log_gives_empty_views(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        assert await rebuild_views(connection) == 0
        assert await compare_views(connection) == []
        await roles.submit()
        await roles.wait_for_views()
        await assert_views_match_log(roles)


async def test_webhooks_are_delivered_after_each_switch(connection: Connection, store: Path) -> None:
    async with (
        run_webhook_endpoint() as endpoint,
        run_roles_in_process(connection, store, projector=True, webhooks=FAST_WEBHOOKS) as roles,
        open_rebuild(connection) as rebuild_process,
    ):
        for _ in SLOTS:
            await rebuild_process.run()
            job_id = await roles.submit(webhook=Webhook(url=endpoint.url()))
            [cancelled] = await roles.handle_commands(job_id, CancelJob("user-1"))
            succeeded = await roles.wait_for_event(DeliverySucceeded, after=cancelled.position)
            await roles.wait_for_views(succeeded.position)
            delivery = await deliveries.get(roles.checkpoint.views, succeeded.stream)
            assert delivery is not None
            assert delivery["status"] == "delivered"
        assert len({request.webhook_id for request in endpoint.requests}) == len(endpoint.requests) == 2


# Interrupted ----------------------------------------------------------------------------------------------------------


class InterruptedRebuild(Exception):
    """A rebuild stopped after three chunks."""


async def test_interrupted_rebuild_continues_at_its_checkpoint(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 40)
    written: list[int] = []
    write = ProjectionWriter.write

    async def write_three_chunks(self: ProjectionWriter, changes: ViewChanges, **options: Any) -> None:
        if len(written) == 3:
            raise InterruptedRebuild
        written.append(changes.position)
        await write(self, changes, **options)

    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(23), steps=100)
        await assert_views_match_log(roles)
        before, head = await load_views(roles.db), await roles.event_store.read_head_position()
        with monkeypatch.context() as patched:
            patched.setattr(ProjectionWriter, "write", write_three_chunks)
            with pytest.raises(InterruptedRebuild):
                await rebuild_views(connection)
        assert written == [40, 80, 120]
        assert await load_views(roles.db) == before
        positions: list[int] = []
        async with open_rebuild(connection) as rebuild_process:
            await rebuild_process.run(on_progress=lambda position, _total: positions.append(position))
        assert positions[0] == 160 < head
        assert await load_views(roles.db) == before


async def test_interrupted_rebuild_of_another_version_starts_again(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(24), steps=20)
        await assert_views_match_log(roles)
        before = await load_views(roles.db)
        for name in VIEW_NAMES:
            await roles.db[get_collection_name(name, "b")].insert_one({"_id": "left"})
        checkpoint = {
            "slots": dict.fromkeys(VIEW_NAMES, "b"),
            "shadow_empty": True,
            "version": PROJECTION_VERSION - 1,
            "position": 5,
            "fencing_token": 0,
        }
        await roles.db.checkpoints.insert_one({"_id": shadow.REBUILD_CHECKPOINT_ID, **checkpoint})
        await rebuild_views(connection)
        assert await load_views(roles.db) == before


async def test_former_leader_of_a_rebuild_writes_nothing(connection: Connection, store: Path) -> None:
    """A process hangs for longer than its lease. Meanwhile another rebuilds into the same slots and finishes."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(25), steps=20)
        await assert_views_match_log(roles)
        before = await load_views(roles.db)
        async with open_rebuild(connection, holder="slow") as slow, open_rebuild(connection, holder="quick") as quick:
            reached, may_continue, all_rejected = asyncio.Event(), asyncio.Event(), asyncio.Event()

            async def hang_and_write() -> None:
                writer, slots = await slow._shadow.open()
                reached.set()
                await may_continue.wait()
                for attempt in (
                    writer.apply(await roles.read_all_events()),
                    slow._shadow.delete_documents(writer.views),
                    slow._switch_when_idle(0, slow._build_switch_function(slots, VIEW_NAMES)),
                ):
                    with pytest.raises(LeadershipLost):
                        await attempt
                all_rejected.set()

            slow_task = asyncio.create_task(slow.leader_election.run_once(hang_and_write))
            await reached.wait()
            await roles.db.leaders.update_one(
                {"_id": shadow.REBUILD_CHECKPOINT_ID}, [{"$set": {"lease_until": "$$NOW"}}]
            )
            slow.leader_election._lease._lost = asyncio.Event()  # the process does not notice the loss
            await quick.run()
            assert await load_views(roles.db) == before
            may_continue.set()
            await asyncio.wait({slow_task}, timeout=DEADLINE_SECONDS)
            assert all_rejected.is_set()
            assert await load_views(roles.db) == before
            slow_task.cancel()
            await asyncio.gather(slow_task, return_exceptions=True)


async def test_second_concurrent_rebuild_logs_that_it_waits_and_then_runs(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit()
        async with open_rebuild(connection, holder="one") as first, open_rebuild(connection, holder="two") as second:
            reached, may_continue = asyncio.Event(), asyncio.Event()

            async def lead_until_allowed_to_stop() -> None:
                reached.set()
                await may_continue.wait()

            leading = asyncio.create_task(first.leader_election.run_once(lead_until_allowed_to_stop))
            await reached.wait()
            with capture_logs() as log_entries:
                running = asyncio.create_task(second.run())
                await poll_until(lambda: bool(log_entries), "the second rebuild logs that it waits")
                assert not running.done()
                assert log_entries[0] == {
                    "event": "another process is leader, standing by",
                    "task": shadow.REBUILD_CHECKPOINT_ID,
                    "log_level": "info",
                }
                may_continue.set()
                await leading
                await asyncio.wait_for(running, DEADLINE_SECONDS)
        await assert_views_match_log(roles)


async def test_projector_continues_on_the_new_views_after_a_switch(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit({"track": "A"})
        await roles.wait_for_views()
        await rebuild_views(connection)
        await roles.submit({"track": "B"})  # the leader notices the switch at its next write
        await roles.wait_for_views()
        await assert_views_match_log(roles)
        assert await roles.db.jobs.count_documents({}) <= 1
        assert await roles.db["jobs.b"].count_documents({}) == 2


async def test_replaced_views_are_emptied_after_the_retention(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clear_shadow, may_clear = Rebuild.clear_shadow, asyncio.Event()

    async def clear_when_allowed(self: Rebuild, switched_at: datetime) -> None:
        await may_clear.wait()
        await clear_shadow(self, switched_at)

    monkeypatch.setattr(Rebuild, "clear_shadow", clear_when_allowed)
    monkeypatch.setattr(projector, "SHADOW_RETENTION_SECONDS", 0.1)
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        open_rebuild(connection) as rebuild_process,
    ):
        await run_random_history(roles, random.Random(26), steps=20)
        await assert_views_match_log(roles)
        await rebuild_process.run()
        await clear_shadow(rebuild_process, datetime.now(UTC) - timedelta(hours=1))
        assert await count_shadow_documents(roles.db) > 0, "the time is of another rebuild, requests may read the views"
        may_clear.set()

        async def is_cleared() -> bool:
            return await count_shadow_documents(roles.db) == 0

        await poll_until(is_cleared, "the shadow views are removed")
        await assert_views_match_log(roles)


# Versions -------------------------------------------------------------------------------------------------------------


async def test_views_of_an_older_version_are_active_until_the_switch(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await run_random_history(roles, random.Random(27), steps=20)
        await assert_views_match_log(roles)
    apply, reached, may_switch = Rebuild._apply, asyncio.Event(), asyncio.Event()

    async def apply_when_allowed(self: Rebuild, *arguments: Any) -> bool:
        reached.set()
        await may_switch.wait()
        return await apply(self, *arguments)

    monkeypatch.setattr(Rebuild, "_apply", apply_when_allowed)
    async with connection.create_client() as client:
        await client[connection.db_name].checkpoints.update_one(
            {"_id": VIEWS_CHECKPOINT_ID}, {"$set": {"version": PROJECTION_VERSION - 1}}
        )
        before = await load_views(client[connection.db_name])
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, projector=True) as standby,
    ):
        await poll_until(lambda: roles.checkpoint.version == PROJECTION_VERSION - 1, "the version is known")
        job_id = await roles.submit()
        await asyncio.wait_for(reached.wait(), DEADLINE_SECONDS)
        assert await load_views(roles.db) == before
        may_switch.set()
        await roles.wait_for_views()
        await standby.wait_for_views()
        assert (await standby.load_job(job_id))["status"] == "pending"
        assert roles.checkpoint.version == PROJECTION_VERSION
        await assert_views_match_log(roles)


async def test_views_of_a_newer_version_are_not_changed_by_the_projector(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit()
        await roles.wait_for_views()
        head = await roles.event_store.read_head_position()
        newer = {"version": PROJECTION_VERSION + 1, "slots": dict.fromkeys(VIEW_NAMES, "a")}
        await roles.db.checkpoints.update_one({"_id": VIEWS_CHECKPOINT_ID}, {"$set": newer})
        await poll_until(lambda: roles.checkpoint.version == PROJECTION_VERSION + 1, "the version is known")
        with capture_logs() as log_entries:
            await roles.submit()
            await poll_until(
                lambda: any("newer version, waiting" in entry["event"] for entry in log_entries), "the projector waits"
            )
        assert roles.checkpoint.position == head
        await rebuild_views(connection)  # as `jobledger views rebuild` of this version does
        await roles.submit()
        await roles.wait_for_views()
        await assert_views_match_log(roles)


# Comparison -----------------------------------------------------------------------------------------------------------


async def test_compare_correct_views_finds_nothing_and_leaves_no_documents(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        await run_random_history(roles, random.Random(28), steps=40)
        await assert_views_match_log(roles)
        assert await compare_views(connection) == []
        assert set((await load_active_slots(roles.db)).values()) == {"a"}
        assert await count_shadow_documents(roles.db) == 0


async def test_compare_reports_each_kind_of_difference(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_ids = [await roles.submit({"track": "A"}) for _ in range(3)]
        await roles.wait_for_views()
        await roles.db.jobs.update_one({"_id": job_ids[0]}, {"$set": {"status": "failed", "extra": 1}})
        await roles.db.jobs.update_one({"_id": job_ids[1]}, {"$set": {"version": 1.0}})
        await roles.db.queue.delete_one({"_id": job_ids[2]})
        await roles.db.files.insert_one({"_id": "job-x/a.md"})
        messages = [str(difference) for difference in await compare_views(connection)]
    assert sorted(messages) == sorted(
        [
            f"jobs: {job_ids[0]}: extra is 1 and should be missing; status is 'failed' and should be 'pending'",
            f"jobs: {job_ids[1]}: version is 1.0 and should be 1",
            f"queue: missing document {job_ids[2]}",
            "files: unexpected document job-x/a.md",
        ]
    )


async def test_compare_while_jobs_run_finds_nothing(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        submitter = ContinuousSubmitter(roles, 0.005)
        for _ in range(3):
            assert await compare_views(connection) == []
            await submitter.wait_for_more_jobs(20)
        await submitter.stop()


async def test_large_jobs_are_applied_while_the_previous_chunk_is_written(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large documents are not cached, so the next chunk must find those that are being written."""
    monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 1)
    large = {"text": "x" * 70_000}
    async with run_roles_in_process(connection, store, projector=True) as roles:
        batch_id, in_batch = await roles.submit_batch(large, large)
        single_jobs = [await roles.submit(large) for _ in range(3)]
        complete = report_results("worker-1", 1, make_empty_results(text="x" * 70_000))
        for job_id in [*in_batch, *single_jobs[1:]]:
            await roles.handle_commands(job_id, ClaimJob("worker-1", datetime.now(UTC)), complete)
        await roles.handle_commands(single_jobs[2], Delete("user-1"))
        await roles.wait_for_event(BatchFinished, batch_id)
        await roles.wait_for_views()
        before = await load_views(roles.db)
        assert await compare_views(connection) == []
        await rebuild_views(connection)
        assert await load_views(roles.db) == before
        assert (await roles.load_job(in_batch[0]))["status"] == "completed"


async def test_running_projector_does_not_fold_removed_events_after_a_rebuild(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.store.event_store._HEAD_READ_TRIES", 1)
    monkeypatch.setattr(projector, "STALL_RETRY_SECONDS", 0.1)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        for _ in range(3):
            await roles.submit()
        await roles.wait_for_views(3)
        await roles.db.events.delete_many({"_id": {"$gte": 2}})
        await rebuild_views(connection)
        await poll_until(lambda: roles.checkpoint.position == 1, "the views were rebuilt")
        await roles.submit()
        await assert_views_match_log(roles)
