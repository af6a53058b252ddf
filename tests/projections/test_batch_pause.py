"""A paused batch: none of its waiting jobs is in the queue, wherever a chunk of events ends, and all are back later."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from jobledger.ledger.domain.commands import (
    CancelJob,
    ClaimJob,
    Delete,
    ExpireLease,
    FailAttempt,
    FinishBatch,
    PauseBatch,
    ReleaseJob,
    RestartJob,
    ResumeBatch,
    UpdateJob,
)
from jobledger.ledger.domain.events import BatchCounts, BatchSummary, JobClaimed, JobCompleted
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.projections.engine import projector
from jobledger.projections.views import batches, files, jobs, queue, statistics
from tests.projections.expected_views import Views, assert_views_match_log, load_views, make_failure
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.support.soak_only import soak_only

WORKER = "worker-1"
PAUSE, RESUME = PauseBatch("user-1"), ResumeBatch("user-1")


@pytest.fixture
async def here(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    async with run_roles_in_process(connection, store, projector=True) as running:
        yield running


async def queued(here: RunningRoles) -> list[str]:
    """The jobs in the queue, the oldest first."""
    await here.wait_for_views()
    return [row["_id"] async for row in here.db.queue.find(sort=[("queued_position", 1)])]


async def test_while_a_batch_is_paused_none_of_its_jobs_is_in_the_queue(here: RunningRoles) -> None:
    alone = await here.submit()
    batch_id, job_ids = await here.submit_batch({}, {}, {})
    _, others = await here.submit_batch({}, {})
    assert await queued(here) == [alone, *job_ids, *others]
    await here.handle_commands(batch_id, PAUSE)
    assert await queued(here) == [alone, *others]
    await here.handle_commands(batch_id, RESUME)
    assert await queued(here) == [alone, *job_ids, *others], "each is back in its place"
    await assert_views_match_log(here)


async def test_a_job_that_has_to_wait_anew_does_so_outside_the_queue_of_a_paused_batch(here: RunningRoles) -> None:
    batch_id, job_ids = await here.submit_batch(*[{}] * 5)
    retried, released, expired, restarted, changed = job_ids
    for job_id in (retried, released, expired):
        await here.claim(job_id)
    await here.handle_commands(restarted, CancelJob("user-1"))
    await here.handle_commands(batch_id, PAUSE)
    await here.handle_commands(retried, FailAttempt(WORKER, 1, make_failure(), datetime.now(UTC)))
    await here.handle_commands(released, ReleaseJob(WORKER, 1, "shutdown"))
    await here.handle_commands(expired, ExpireLease(WORKER, 1))
    await here.handle_commands(restarted, RestartJob("user-1"))
    await here.handle_commands(changed, UpdateJob("user-1", priority=9))
    assert await queued(here) == []
    await assert_views_match_log(here)

    await here.handle_commands(batch_id, RESUME)
    assert sorted(await queued(here)) == sorted(job_ids)
    rows = {row["_id"]: row async for row in here.db.queue.find()}
    assert rows[changed]["priority"] == 9
    assert rows[retried]["due_at"] is not None
    await assert_views_match_log(here)


async def test_what_ends_or_is_claimed_while_its_batch_is_paused_does_not_come_back(here: RunningRoles) -> None:
    batch_id, (cancelled, deleted, claimed, waiting) = await here.submit_batch({}, {}, {}, {})
    await here.handle_commands(batch_id, PAUSE)
    await here.handle_commands(cancelled, CancelJob("user-1"))
    await here.handle_commands(deleted, Delete("user-1"))
    await here.claim(claimed)  # by a worker that had read its row before the pause
    await here.handle_commands(batch_id, RESUME)
    assert await queued(here) == [waiting]
    await assert_views_match_log(here)


async def test_a_batch_that_has_ended_can_be_paused_so_that_what_is_restarted_waits(here: RunningRoles) -> None:
    batch_id, (one, two) = await here.submit_batch({}, {})
    for job_id in (one, two):
        await here.handle_commands(job_id, CancelJob("user-1"))
    await here.handle_commands(batch_id, PAUSE)
    await here.handle_commands(one, RestartJob("user-1"))
    assert await queued(here) == []
    await here.handle_commands(batch_id, RESUME)
    assert await queued(here) == [one]


@pytest.mark.parametrize("chunk_events", [1, 1000])
async def test_a_batch_that_is_deleted_while_it_is_paused_holds_no_job_back(
    connection: Connection, store: Path, chunk_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
    async with run_roles_in_process(connection, store) as here:  # no projector yet, which would open the batch again
        batch_id, (early, late) = await here.submit_batch({}, {})
        await here.handle_commands(batch_id, PAUSE)
        for job_id in (early, late):
            await here.handle_commands(job_id, CancelJob("user-1"))
        await here.handle_commands(batch_id, FinishBatch(BatchCounts(cancelled=2), BatchSummary()))
        await here.handle_commands(early, RestartJob("user-1"))
        await here.handle_commands(batch_id, Delete("user-1"))
        await here.handle_commands(late, RestartJob("user-1"))
        async with run_roles_in_process(connection, store, projector=True):
            assert await queued(here) == [early, late]
            await assert_views_match_log(here)


# Wherever chunks end --------------------------------------------------------------------------------------------------


async def a_story(here: RunningRoles) -> None:
    """Pauses of two batches, and their jobs change before, between and after."""
    one, (a, b, c, d) = await here.submit_batch({}, {}, {}, {})
    two, (e, f) = await here.submit_batch({}, {})
    await here.handle_commands(one, PAUSE, RESUME, PAUSE)
    await here.handle_commands(a, ClaimJob(WORKER, datetime.now(UTC)))
    await here.handle_commands(two, PAUSE)
    await here.handle_commands(a, ReleaseJob(WORKER, 1, "shutdown"))
    await here.handle_commands(b, CancelJob("user-1"))
    await here.handle_commands(one, RESUME)
    await here.handle_commands(b, RestartJob("user-1"))
    await here.handle_commands(c, ClaimJob(WORKER, datetime.now(UTC)))
    await here.handle_commands(one, PAUSE)
    await here.handle_commands(c, FailAttempt(WORKER, 1, make_failure(), datetime.now(UTC)))
    await here.handle_commands(d, UpdateJob("user-1", priority=5))
    await here.handle_commands(e, Delete("user-1"))
    await here.handle_commands(two, RESUME, PAUSE, RESUME)
    await here.handle_commands(f, UpdateJob("user-1", priority=7))


async def test_a_pause_means_the_same_wherever_chunks_end(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store) as here:
        await a_story(here)
        length = await here.event_store.head_position()
        told: list[Views] = []
        for chunk_events in (*range(1, length), 1000):
            monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
            await folded_anew(connection, store, here.db)
            told.append(await load_views(here.db))
            if len(told) == 1:
                await assert_views_match_log(here)
                assert len(told[0]["queue"]) == 1
        assert all(views == told[0] for views in told)
        assert await here.event_store.head_position() == length


async def folded_anew(connection: Connection, store: Path, db: Database) -> None:
    for view in (jobs, batches, queue, files, statistics):
        await db[view.NAME].delete_many({})
    await db.checkpoints.delete_many({})
    async with run_roles_in_process(connection, store, projector=True) as there:
        await there.wait_for_views()


@soak_only
async def test_ten_thousand_jobs_are_paused_and_resumed_in_a_moment(here: RunningRoles) -> None:
    batch_id, job_ids = await here.submit_batch(*[{}] * 10_000)
    await here.wait_for_views(seconds=60)
    for command, rows in ((PAUSE, 0), (RESUME, len(job_ids))):
        began = time.monotonic()
        await here.handle_commands(batch_id, command)
        await here.wait_for_views()
        assert time.monotonic() - began < 5  # half a second on a quiet machine
        assert await here.db.queue.count_documents({}) == rows


# With a worker --------------------------------------------------------------------------------------------------------


async def test_paused_jobs_are_not_claimed_and_running_ones_go_on(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(slots=1)) as here:
        batch_id, (running, waiting) = await here.submit_batch({"seconds": 1}, {})
        await here.wait_for_event(JobClaimed, running)
        await here.handle_commands(batch_id, PAUSE)
        await here.wait_for_views()
        assert await here.read_event_types(running) == ["JobSubmitted", "JobClaimed"]
        assert (await here.wait_until_finished(running))["status"] == "completed"
        assert (await here.wait_until_finished(await here.submit()))["status"] == "completed", (
            "others are done meanwhile"
        )
        assert await here.read_event_types(waiting) == ["JobSubmitted"]

        await here.handle_commands(batch_id, RESUME)
        assert (await here.wait_until_finished(waiting))["status"] == "completed"


async def test_jobs_that_were_paused_before_any_worker_came_are_done_once_they_are_resumed(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        batch_id, job_ids = await here.submit_batch(*[{}] * 20)
        await here.handle_commands(batch_id, PAUSE)
        await here.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            await here.wait_until_finished(await here.submit())
            assert {event.stream for event in await here.read_all_events() if event.type == "JobClaimed"}.isdisjoint(
                job_ids
            )
            await here.handle_commands(batch_id, RESUME)
            await here.wait_until_finished(*job_ids)
            claims = [event.stream for event in await here.read_all_events() if event.type == "JobClaimed"]
            assert sorted(claims[1:]) == sorted(job_ids)


async def test_an_idle_worker_takes_what_is_resumed_at_once(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        batch_id, (job_id,) = await here.submit_batch({})
        await here.wait_until_finished(job_id)
        await here.handle_commands(batch_id, PAUSE)
        await here.handle_commands(job_id, RestartJob("user-1"))
        await here.wait_until_finished(await here.submit())
        assert (await here.read_event_types(job_id))[-1] == "JobRestarted"
        resumed = await here.handle_commands(batch_id, RESUME)
        await here.wait_for_event(JobCompleted, job_id, after=resumed[0].position, seconds=5)
