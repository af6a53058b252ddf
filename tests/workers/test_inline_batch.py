"""Inline jobs that are claimed together: each of them ends once, in its own way, and costs the others nothing."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob, ExpireLease
from jobledger.ledger.domain.errors import JobledgerError, LedgerBusy, LedgerUnavailable
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import CommandRequest, handle_commands
from jobledger.workers.attempts.executor import JobExecutor
from jobledger.workers.processor import JobContext, ProcessorError, Results
from tests.support.driver_hooks import CommandCounter, monitor_connection
from tests.support.polling import poll_until
from tests.support.role_runner import WorkerOptions, run_roles_in_process
from tests.workers.inline_processor import install_processor

HANDLE_COMMANDS = "jobledger.workers.attempts.inline_batch.handle_commands"


async def run_in_some_way(job: JobContext) -> Results:
    """Run as the parameter `way` says."""
    way = job.parameters.model_extra["way"]
    if way == "wait":
        await asyncio.sleep(0.01)
    elif way == "log":
        await job.log("info", "hello")
    elif way == "fail":
        raise ProcessorError("BROKEN", "It is broken.")
    elif way == "exit":
        raise SystemExit(3)
    elif way == "task":
        asyncio.get_running_loop().create_task(asyncio.sleep(60))
    elif way == "cancel":
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
    elif way == "save":
        return Results(markdown=await job.save(f"{job.job_id}.md", b"# hello", "text/markdown"))
    elif way == "invalid":
        return "nothing"  # type: ignore[return-value]  # a wrong processor
    return Results(metadata={"way": way})


OUTCOMES = {
    "end": "completed",
    "wait": "completed",
    "log": "completed",
    "fail": "BROKEN",
    "exit": "PROCESSOR_FAULT",
    "task": "completed",
    "cancel": "PROCESSOR_FAULT",
    "save": "completed",
    "invalid": "INVALID_RESULT",
}


async def test_each_job_of_a_batch_ends_in_its_own_way(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_processor(monkeypatch, run_in_some_way)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(max_concurrent=20)
    ) as roles:
        ways = [way for way in OUTCOMES for _ in range(4)]
        _, job_ids = await roles.submit_batch(*({"way": way} for way in ways), job_type="test", max_attempts=1)
        await roles.wait_until_finished(*job_ids)
        jobs = [await roles.load_job(job_id) for job_id in job_ids]
        assert [job["error"]["code"] if job["error"] else job["status"] for job in jobs] == [
            OUTCOMES[way] for way in ways
        ]
        for job_id in job_ids:
            types = await roles.read_event_types(job_id)
            assert (types[:2], types.count("JobClaimed")) == (["JobSubmitted", "JobClaimed"], 1)
            assert types[-1] in {"JobCompleted", "JobFailed"}
        assert [job["logs"][0]["message"] for job, way in zip(jobs, ways, strict=True) if way == "log"] == ["hello"] * 4


async def test_jobs_without_work_are_claimed_and_completed_together(connection: Connection, store: Path) -> None:
    commands = CommandCounter()
    async with run_roles_in_process(connection, store, projector=True) as roles:
        _, job_ids = await roles.submit_batch(*({"file": False} for _ in range(60)))
        await roles.wait_for_views()
        monitored = monitor_connection(connection, commands)
        async with run_roles_in_process(monitored, store, worker=WorkerOptions(max_concurrent=20)):
            await roles.wait_until_finished(*job_ids)
        assert commands.started_by_name["insert"] <= 12  # at best 4; one by one, it would be 120


class Interference:
    """Do something to the first job of a batch between its end and the append of its completion."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, interfere: Any) -> None:
        self.job_id = ""

        async def handle(
            event_store: Any, requests: Sequence[CommandRequest], **options: Any
        ) -> AsyncGenerator[Any, None]:
            if not self.job_id:
                self.job_id = requests[0].stream
                await interfere(self.job_id)
            async for outcomes in handle_commands(event_store, requests, **options):
                yield outcomes

        monkeypatch.setattr(HANDLE_COMMANDS, handle)


async def test_cancellation_after_the_end_of_the_work_does_not_undo_it(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        interference = Interference(monkeypatch, lambda job_id: roles.handle_commands(job_id, CancelJob("user-1")))
        _, job_ids = await roles.submit_batch(*({"file": False} for _ in range(5)))
        await roles.wait_until_finished(*job_ids)
        events = ["JobSubmitted", "JobClaimed", "JobCancelRequested", "JobCompleted"]
        for job_id in job_ids:
            expected = events if job_id == interference.job_id else [events[0], events[1], events[3]]
            assert await roles.read_event_types(job_id) == expected


async def test_job_that_was_taken_away_is_fenced_and_runs_again(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        assert roles.worker is not None
        expire = ExpireLease(roles.worker.worker_id, 1)
        interference = Interference(monkeypatch, lambda job_id: roles.handle_commands(job_id, expire))
        job_id = await roles.submit({"file": False})
        await roles.wait_until_finished(job_id)
        assert job_id == interference.job_id
        types = await roles.read_event_types(job_id)
        assert sorted(types) == sorted(
            ["JobSubmitted", "JobClaimed", "JobLeaseExpired", "WorkerFenced", "JobClaimed", "JobCompleted"]
        )


async def test_slots_of_completed_jobs_are_limited_while_the_database_is_slow(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released = asyncio.Event()

    async def handle_slowly(*arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        await released.wait()
        async for outcomes in handle_commands(*arguments, **options):
            yield outcomes

    monkeypatch.setattr(HANDLE_COMMANDS, handle_slowly)
    worker = WorkerOptions(max_concurrent=3)
    async with run_roles_in_process(connection, store, projector=True, worker=worker) as roles:
        _, job_ids = await roles.submit_batch(*({"file": False} for _ in range(20)))
        await poll_until(lambda: len(roles.worker._running) == 6 if roles.worker else False)
        await asyncio.sleep(0.3)
        assert roles.worker is not None
        assert len(roles.worker._running) == 6
        released.set()
        await roles.wait_until_finished(*job_ids)


@pytest.mark.parametrize("error", [None, LedgerUnavailable("no response")])
async def test_ended_attempt_is_freed_without_garbage_collection(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, error: JobledgerError | None
) -> None:
    """Garbage collection of thousands of attempts would interrupt a busy worker for a tenth of a second."""
    executors: list[weakref.ref[JobExecutor]] = []
    create = JobExecutor.__init__

    def observe(executor: JobExecutor, *arguments: Any) -> None:
        create(executor, *arguments)
        executors.append(weakref.ref(executor))

    monkeypatch.setattr(JobExecutor, "__init__", observe)
    install_processor(monkeypatch, run_in_some_way)
    if error is not None:

        async def fail(_store: Any, requests: Sequence[CommandRequest], **_: Any) -> AsyncGenerator[Any, None]:
            yield [(index, error) for index in range(len(requests))]

        monkeypatch.setattr(HANDLE_COMMANDS, fail)
    ways = [way for way in OUTCOMES if way not in {"fail", "exit", "invalid"}]  # their exceptions have cycles
    gc.collect()
    gc.disable()
    try:
        async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
            _, job_ids = await roles.submit_batch(*({"way": way} for way in ways), job_type="test", max_attempts=1)
            await roles.wait_until_finished(*job_ids)
            await poll_until(lambda: not any(reference() for reference in executors), "the attempts are freed")
    finally:
        gc.enable()
    assert len(executors) == len(ways)


@pytest.mark.parametrize("error", [LedgerUnavailable("no response"), LedgerBusy("full"), LookupError("a bug"), None])
async def test_jobs_are_completed_although_completing_them_together_fails(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """None: an unexpected exception after the events were written."""

    async def fail(*arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        if isinstance(error, JobledgerError):
            yield [(index, error) for index in range(len(arguments[1]))]
        elif error is None:
            async for _ in handle_commands(*arguments, **options):
                raise LookupError("a bug")
        else:
            raise error

    monkeypatch.setattr(HANDLE_COMMANDS, fail)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        _, job_ids = await roles.submit_batch(*({"file": False} for _ in range(5)))
        await roles.wait_until_finished(*job_ids)
        for job_id in job_ids:
            assert await roles.read_event_types(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]


async def test_job_that_cannot_be_started_does_not_keep_others_from_starting(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created = 0
    create = JobExecutor.__init__

    def fail_once(executor: JobExecutor, *arguments: Any) -> None:
        nonlocal created
        created += 1
        if created == 2:
            raise LookupError("a bug")
        create(executor, *arguments)

    monkeypatch.setattr(JobExecutor, "__init__", fail_once)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        _, job_ids = await roles.submit_batch(*({"file": False} for _ in range(5)))
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            await poll_until(lambda: created == 5)
            running = job_ids[1]
            await roles.wait_until_finished(*(job_id for job_id in job_ids if job_id != running))
        assert (await roles.load_job(running))["status"] == "processing"


# Stopping -------------------------------------------------------------------------------------------------------------


async def test_jobs_that_wait_end_within_the_grace_period(connection: Connection, store: Path) -> None:
    """The worker is stopped while a claim of many jobs is being written."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        _, job_ids = await roles.submit_batch(*({"seconds": 0.02 * number, "file": False} for number in range(30)))
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions(max_concurrent=30)) as worker_roles:
            assert worker_roles.worker is not None
            worker = worker_roles.worker
            await poll_until(lambda: bool(worker._claim_queue.pending_claims) or bool(worker._running))
            worker.stop()
            assert worker_roles.worker_task is not None
            await worker_roles.worker_task
        await roles.wait_for_views()
        assert [(await roles.load_job(job_id))["status"] for job_id in job_ids] == ["completed"] * 30


async def test_completion_that_is_retried_is_recorded_within_the_grace_period(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached = asyncio.Event()

    async def fail(_store: Any, requests: Sequence[CommandRequest], **_: Any) -> AsyncGenerator[Any, None]:
        reached.set()
        await asyncio.sleep(0.1)
        yield [(index, LedgerUnavailable("no response")) for index in range(len(requests))]

    monkeypatch.setattr(HANDLE_COMMANDS, fail)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        async with run_roles_in_process(connection, store, worker=WorkerOptions()) as worker_roles:
            job_id = await roles.submit({"file": False})
            await reached.wait()
            assert worker_roles.worker is not None
            assert worker_roles.worker_task is not None
            worker_roles.worker.stop()
            await worker_roles.worker_task
        assert await roles.read_event_types(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]


async def test_jobs_that_outlast_the_grace_period_are_released(connection: Connection, store: Path) -> None:
    options = WorkerOptions(max_concurrent=10, shutdown_grace_seconds=0.2)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        _, job_ids = await roles.submit_batch(*({"seconds": 600} for _ in range(10)))
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, worker=options) as worker_roles:
            assert worker_roles.worker is not None
            worker = worker_roles.worker
            await poll_until(lambda: len(worker._running) == 10)
        for job_id in job_ids:
            assert (await roles.read_event_types(job_id))[-1] == "JobReleased"
