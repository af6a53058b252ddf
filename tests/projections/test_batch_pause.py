"""The pending jobs of a paused batch are not in the queue. After it is resumed, all are there again.

The result does not depend on where a chunk of events ends.
"""

from __future__ import annotations

import asyncio
import time
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
from jobledger.ledger.domain.events import BatchJobCounts, BatchSummary, JobClaimed, JobCompleted
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.projections.engine import projector
from jobledger.projections.views import batches, files, jobs, queue, statistics
from jobledger.workers.processor import JobContext, Results
from jobledger.workers.processors.echo import EchoProcessor
from tests.projections.expected_views import Views, assert_views_match_log, load_views, make_failure
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.support.soak_only import soak_only

WORKER = "worker-1"
PAUSE, RESUME = PauseBatch("user-1"), ResumeBatch("user-1")


async def list_queued_jobs(roles: RunningRoles) -> list[str]:
    """Return the jobs in the queue, the oldest first."""
    await roles.wait_for_views()
    return [row["_id"] async for row in roles.db.queue.find(sort=[("queued_position", 1)])]


async def test_pause_removes_the_jobs_of_the_batch_from_the_queue(roles: RunningRoles) -> None:
    single_job = await roles.submit()
    batch_id, job_ids = await roles.submit_batch({}, {}, {})
    _, jobs_of_other_batch = await roles.submit_batch({}, {})
    assert await list_queued_jobs(roles) == [single_job, *job_ids, *jobs_of_other_batch]
    await roles.handle_commands(batch_id, PAUSE)
    assert await list_queued_jobs(roles) == [single_job, *jobs_of_other_batch]
    await roles.handle_commands(batch_id, RESUME)
    assert await list_queued_jobs(roles) == [single_job, *job_ids, *jobs_of_other_batch], "each has its former place"
    await assert_views_match_log(roles)


async def test_job_that_becomes_pending_in_a_paused_batch_is_not_queued(roles: RunningRoles) -> None:
    batch_id, job_ids = await roles.submit_batch(*[{}] * 5)
    retried, released, expired, restarted, changed = job_ids
    for job_id in (retried, released, expired):
        await roles.claim(job_id)
    await roles.handle_commands(restarted, CancelJob("user-1"))
    await roles.handle_commands(batch_id, PAUSE)
    await roles.handle_commands(retried, FailAttempt(WORKER, 1, make_failure(), datetime.now(UTC)))
    await roles.handle_commands(released, ReleaseJob(WORKER, 1, "shutdown"))
    await roles.handle_commands(expired, ExpireLease(WORKER, 1))
    await roles.handle_commands(restarted, RestartJob("user-1"))
    await roles.handle_commands(changed, UpdateJob("user-1", priority=9))
    assert await list_queued_jobs(roles) == []
    await assert_views_match_log(roles)

    await roles.handle_commands(batch_id, RESUME)
    assert sorted(await list_queued_jobs(roles)) == sorted(job_ids)
    rows = {row["_id"]: row async for row in roles.db.queue.find()}
    assert rows[changed]["priority"] == 9
    assert rows[retried]["due_at"] is not None
    await assert_views_match_log(roles)


async def test_resume_does_not_queue_jobs_that_are_no_longer_pending(roles: RunningRoles) -> None:
    batch_id, (cancelled, deleted, claimed, waiting) = await roles.submit_batch({}, {}, {}, {})
    await roles.handle_commands(batch_id, PAUSE)
    await roles.handle_commands(cancelled, CancelJob("user-1"))
    await roles.handle_commands(deleted, Delete("user-1"))
    await roles.claim(claimed)  # by a worker that read the row before the pause
    await roles.handle_commands(batch_id, RESUME)
    assert await list_queued_jobs(roles) == [waiting]
    await assert_views_match_log(roles)


async def test_pause_of_a_finished_batch_holds_restarted_jobs(roles: RunningRoles) -> None:
    batch_id, job_ids = await roles.submit_batch({}, {})
    for job_id in job_ids:
        await roles.handle_commands(job_id, CancelJob("user-1"))
    await roles.handle_commands(batch_id, PAUSE)
    await roles.handle_commands(job_ids[0], RestartJob("user-1"))
    assert await list_queued_jobs(roles) == []
    await roles.handle_commands(batch_id, RESUME)
    assert await list_queued_jobs(roles) == [job_ids[0]]


@pytest.mark.parametrize("chunk_events", [1, 1000])
async def test_deletion_of_a_paused_batch_queues_its_pending_jobs(
    connection: Connection, store: Path, chunk_events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
    async with run_roles_in_process(connection, store) as roles:  # no projector, which would reopen the batch
        batch_id, (early, late) = await roles.submit_batch({}, {})
        await roles.handle_commands(batch_id, PAUSE)
        for job_id in (early, late):
            await roles.handle_commands(job_id, CancelJob("user-1"))
        await roles.handle_commands(batch_id, FinishBatch(BatchJobCounts(cancelled=2), BatchSummary()))
        await roles.handle_commands(early, RestartJob("user-1"))
        await roles.handle_commands(batch_id, Delete("user-1"))
        await roles.handle_commands(late, RestartJob("user-1"))
        async with run_roles_in_process(connection, store, projector=True):
            assert await list_queued_jobs(roles) == [early, late]
            await assert_views_match_log(roles)


# Ends of chunks -------------------------------------------------------------------------------------------------------


async def write_pause_history(roles: RunningRoles) -> None:
    """Pause and resume two batches, and change their jobs before, between and after."""
    first_batch, (a, b, c, d) = await roles.submit_batch({}, {}, {}, {})
    second_batch, (e, f) = await roles.submit_batch({}, {})
    await roles.handle_commands(first_batch, PAUSE, RESUME, PAUSE)
    await roles.handle_commands(a, ClaimJob(WORKER, datetime.now(UTC)))
    await roles.handle_commands(second_batch, PAUSE)
    await roles.handle_commands(a, ReleaseJob(WORKER, 1, "shutdown"))
    await roles.handle_commands(b, CancelJob("user-1"))
    await roles.handle_commands(first_batch, RESUME)
    await roles.handle_commands(b, RestartJob("user-1"))
    await roles.handle_commands(c, ClaimJob(WORKER, datetime.now(UTC)))
    await roles.handle_commands(first_batch, PAUSE)
    await roles.handle_commands(c, FailAttempt(WORKER, 1, make_failure(), datetime.now(UTC)))
    await roles.handle_commands(d, UpdateJob("user-1", priority=5))
    await roles.handle_commands(e, Delete("user-1"))
    await roles.handle_commands(second_batch, RESUME, PAUSE, RESUME)
    await roles.handle_commands(f, UpdateJob("user-1", priority=7))


async def test_pause_has_the_same_result_for_each_chunk_size(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store) as roles:
        await write_pause_history(roles)
        length = await roles.event_store.read_head_position()
        results: list[Views] = []
        for chunk_events in (*range(1, length), 1000):
            monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
            await project_from_empty_views(connection, store, roles.db)
            results.append(await load_views(roles.db))
            if len(results) == 1:
                await assert_views_match_log(roles)
                assert len(results[0]["queue"]) == 1
        assert all(views == results[0] for views in results)
        assert await roles.event_store.read_head_position() == length


async def project_from_empty_views(connection: Connection, store: Path, db: Database) -> None:
    for view in (jobs, batches, queue, files, statistics):
        await db[view.NAME].delete_many({})
    await db.checkpoints.delete_many({})
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.wait_for_views()


@soak_only
async def test_pause_and_resume_of_ten_thousand_jobs_take_seconds(roles: RunningRoles) -> None:
    batch_id, job_ids = await roles.submit_batch(*[{}] * 10_000)
    await roles.wait_for_views()
    for command, rows in ((PAUSE, 0), (RESUME, len(job_ids))):
        started_at = time.monotonic()
        await roles.handle_commands(batch_id, command)
        await roles.wait_for_views()
        assert time.monotonic() - started_at < 5  # half a second on a quiet machine
        assert await roles.db.queue.count_documents({}) == rows


# With a worker --------------------------------------------------------------------------------------------------------


async def test_pause_lets_running_jobs_finish_and_claims_no_pending_ones(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, may_run = EchoProcessor.run, asyncio.Event()

    async def run_when_allowed(self: EchoProcessor, job: JobContext) -> Results:
        await may_run.wait()
        return await run(self, job)

    monkeypatch.setattr(EchoProcessor, "run", run_when_allowed)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(max_concurrent=1)) as roles:
        batch_id, (running, waiting) = await roles.submit_batch({"seconds": 0.1}, {})
        await roles.wait_for_event(JobClaimed, running)
        await roles.handle_commands(batch_id, PAUSE)
        await roles.wait_for_views()
        assert await roles.read_event_types(running) == ["JobSubmitted", "JobClaimed"]
        may_run.set()
        assert (await roles.wait_until_finished(running))["status"] == "completed"
        assert (await roles.wait_until_finished(await roles.submit()))["status"] == "completed", (
            "other jobs are done meanwhile"
        )
        assert await roles.read_event_types(waiting) == ["JobSubmitted"]

        await roles.handle_commands(batch_id, RESUME)
        assert (await roles.wait_until_finished(waiting))["status"] == "completed"


async def test_jobs_paused_before_a_worker_starts_are_done_after_resume(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        batch_id, job_ids = await roles.submit_batch(*[{}] * 20)
        await roles.handle_commands(batch_id, PAUSE)
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            await roles.wait_until_finished(await roles.submit())
            assert {event.stream for event in await roles.read_all_events() if event.type == "JobClaimed"}.isdisjoint(
                job_ids
            )
            await roles.handle_commands(batch_id, RESUME)
            await roles.wait_until_finished(*job_ids)
            claims = [event.stream for event in await roles.read_all_events() if event.type == "JobClaimed"]
            assert sorted(claims[1:]) == sorted(job_ids)


async def test_idle_worker_claims_a_resumed_job(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        batch_id, (job_id,) = await roles.submit_batch({})
        await roles.wait_until_finished(job_id)
        await roles.handle_commands(batch_id, PAUSE)
        await roles.handle_commands(job_id, RestartJob("user-1"))
        await roles.wait_until_finished(await roles.submit())
        assert (await roles.read_event_types(job_id))[-1] == "JobRestarted"
        resumed = await roles.handle_commands(batch_id, RESUME)
        await roles.wait_for_event(JobCompleted, job_id, after=resumed[0].position)
