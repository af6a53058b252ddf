"""Jobs that are claimed for a worker when they are submitted: each runs once, also if a real worker stops."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.ledger.domain.commands import CancelJob, SubmitJob
from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import EventMetadata, JobClaimed, JobReleased
from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.appender import Appender
from jobledger.ledger.store.command_handler import StreamState, create_claimed_job, create_job_id, load_stream_state
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.views import queue
from jobledger.workers.processor import JobContext, Results
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, make_echo_job, run_roles_in_process
from tests.workers.inline_processor import install_processor


async def dispatch(roles: RunningRoles, worker_id: str, job_type: str = "test", **parameters: float) -> str:
    """Submit a job that is claimed for a worker, whether or not the worker has a free slot."""
    job_id, command = create_job_id(), SubmitJob(make_echo_job(parameters, job_type=job_type, max_attempts=3))
    await create_claimed_job(roles.event_store, job_id, command, worker_id, meta=EventMetadata("test"))
    return job_id


class Runs:
    """Counts the runs of each job of the type `test`. They end when `may_end` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.job_ids: list[str] = []
        self.may_end = asyncio.Event()
        self.seconds_to_stop = 0.0
        install_processor(monkeypatch, self.run)

    async def run(self, job: JobContext) -> Results:
        self.job_ids.append(job.job_id)
        try:
            await self.may_end.wait()
        except asyncio.CancelledError:
            await asyncio.sleep(self.seconds_to_stop)
            raise
        return Results()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Runs:
    return Runs(monkeypatch)


async def wait_for_worker(roles: RunningRoles) -> str:
    """Wait until the worker of these roles has its lease, and return its ID."""
    worker = roles.worker
    assert worker is not None
    await poll_until(lambda: worker._claim_queue.worker_id, "the worker has its lease")
    return worker.worker_id


async def wait_until_accepting(roles: RunningRoles) -> None:
    """Wait until the dispatcher of these roles knows that a worker accepts jobs."""
    dispatcher = roles.dispatcher
    assert dispatcher is not None
    await poll_until(lambda: any(lease.accepts("test") for lease in dispatcher._leases.values()), "a worker accepts")


async def test_idle_worker_runs_dispatched_jobs_without_claims_of_its_own(
    connection: Connection, store: Path, runs: Runs
) -> None:
    runs.may_end.set()
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(), dispatches=True
    ) as roles:
        await wait_until_accepting(roles)
        job_ids = [await roles.submit(job_type="test", max_attempts=3) for _ in range(20)]
        await roles.wait_until_finished(*job_ids)
        events = await roles.read_all_events()
        claims = [event for event in events if event.type == "JobClaimed"]
        submissions = {event.stream: event.position for event in events if event.type == "JobSubmitted"}
        assert {event.stream: event.position - 1 for event in claims} == submissions
        assert {event.meta.actor for event in claims} == {"system"}
        assert sorted(runs.job_ids) == sorted(job_ids)


async def test_worker_with_a_backlog_refuses_dispatch_until_it_has_emptied_the_queue(
    connection: Connection, store: Path, runs: Runs
) -> None:
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(max_concurrent=2), dispatches=True
    ) as roles:
        await wait_until_accepting(roles)
        _, job_ids = await roles.submit_batch(*({} for _ in range(5)), job_type="test")

        async def list_accepted() -> list[str]:
            lease = await roles.db.workers.find_one({"_id": await wait_for_worker(roles)})
            assert lease is not None
            accepted: list[str] = lease["accepted_job_types"]
            return accepted

        async def refuses() -> bool:
            return not await list_accepted()

        await poll_until(refuses, "the worker refuses jobs")
        runs.may_end.set()
        await roles.wait_until_finished(*job_ids)
        await wait_until_accepting(roles)
        assert "test" in await list_accepted()


async def test_type_with_a_limit_per_worker_is_not_dispatched(connection: Connection, store: Path, runs: Runs) -> None:
    runs.may_end.set()
    options = WorkerOptions(max_concurrent_per_type={"echo": 1})
    async with run_roles_in_process(connection, store, projector=True, worker=options, dispatches=True) as roles:
        await wait_until_accepting(roles)
        job_id = await roles.submit(max_attempts=3)
        await roles.wait_until_finished(job_id)
        assert (await roles.wait_for_event(JobClaimed, job_id)).meta.actor.startswith("worker:")


async def test_job_for_a_worker_without_free_slot_is_released_and_runs_elsewhere(
    connection: Connection, store: Path, runs: Runs
) -> None:
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=WorkerOptions(max_concurrent=1)) as full,
    ):
        first = await dispatch(roles, await wait_for_worker(full))
        await poll_until(lambda: runs.job_ids == [first], "the first job runs")
        second = await dispatch(roles, await wait_for_worker(full))
        released = await roles.wait_for_event(JobReleased, second)
        assert "cannot start it now" in released.data["reason"]
        async with run_roles_in_process(connection, store, worker=WorkerOptions()) as other:
            claimed = await roles.wait_for_event(JobClaimed, second, after=released.position)
            assert (claimed.data["worker_id"], claimed.data["attempt"]) == (await wait_for_worker(other), 2)
            runs.may_end.set()
            await roles.wait_until_finished(first, second)
        assert sorted(runs.job_ids) == sorted([first, second])


async def test_claims_missed_by_the_change_stream_are_started_once(
    connection: Connection, store: Path, runs: Runs
) -> None:
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=WorkerOptions()) as worker,
    ):
        running = await dispatch(roles, await wait_for_worker(worker))
        await poll_until(lambda: runs.job_ids == [running], "the first job runs")
        async with missed_by(worker):
            missed = [await dispatch(roles, await wait_for_worker(worker)) for _ in range(3)]
            cancelled = await dispatch(roles, await wait_for_worker(worker))
            await roles.handle_commands(cancelled, CancelJob("user-1"))
            assert runs.job_ids == [running]
        await roles.wait_until_finished(cancelled)
        await poll_until(lambda: len(runs.job_ids) == 4, "the missed jobs run")
        runs.may_end.set()
        await roles.wait_until_finished(running, *missed)
        assert sorted(runs.job_ids) == sorted([running, *missed])
        assert (await roles.load_job(cancelled))["status"] == "cancelled"


async def test_job_dispatched_to_a_stopping_worker_loses_no_attempt(
    connection: Connection, store: Path, runs: Runs
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        async with run_roles_in_process(connection, store, worker=WorkerOptions(shutdown_grace_seconds=0.5)) as worker:
            worker_id = await wait_for_worker(worker)
            running = await dispatch(roles, worker_id)
            await poll_until(lambda: runs.job_ids == [running], "the job runs")
            assert worker.worker is not None
            worker.worker.stop()
            late = await dispatch(roles, worker_id)
        for job_id in (running, late):
            released = await roles.wait_for_event(JobReleased, job_id)
            await roles.wait_for_views(released.position)
            assert (await roles.load_job(job_id))["retries"] == 0
        assert runs.job_ids == [running]


async def test_stopping_worker_releases_a_job_that_is_dispatched_too_late(
    connection: Connection, store: Path, runs: Runs
) -> None:
    async with run_roles_in_process(connection, store, projector=True, dispatches=True) as roles:
        async with run_roles_in_process(connection, store, worker=WorkerOptions()) as worker:
            await wait_until_accepting(roles)
            assert worker.worker is not None
            worker.worker.stop()
            late = await roles.submit(job_type="test", max_attempts=3)  # the dispatcher has not heard of the stop
        await roles.wait_for_event(JobReleased, late)
        assert runs.job_ids == []
        dispatcher = roles.dispatcher
        assert dispatcher is not None
        await poll_until(lambda: not any(it.accepts("test") for it in dispatcher._leases.values()), "none accepts jobs")


async def test_job_dispatched_to_a_worker_that_has_gone_is_freed_by_the_lease_rules(
    connection: Connection, store: Path, runs: Runs
) -> None:
    runs.may_end.set()
    async with run_roles_in_process(connection, store, projector=True) as roles:
        gone = await dispatch(roles, "host-1-gone")
        async with (
            run_roles_in_process(connection, store, worker=WorkerOptions(lease_seconds=2.0)),
            asyncio.timeout(DEADLINE_SECONDS),
        ):
            later = await dispatch(roles, "host-2-gone")
            await roles.wait_until_finished(gone, later)
        assert sorted(runs.job_ids) == sorted([gone, later])
        assert await roles.read_event_types(later) == [
            "JobSubmitted", "JobClaimed", "JobLeaseExpired", "JobClaimed", "JobCompleted",
        ]  # fmt: skip


async def test_worker_that_has_just_refused_jobs_hears_of_the_last_ones_before_it_stops(
    connection: Connection, store: Path, runs: Runs
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        async with run_roles_in_process(connection, store, worker=WorkerOptions()) as worker:
            worker_id = await wait_for_worker(worker)
            assert worker.worker is not None
            worker.worker._set_acceptance(accepts=False)
            worker.worker.stop()
            await asyncio.sleep(0.05)
            late = await dispatch(roles, worker_id)
        await roles.wait_for_event(JobReleased, late)
        assert runs.job_ids == []


async def test_worker_that_fails_starts_no_dispatched_jobs(connection: Connection, store: Path, runs: Runs) -> None:
    """While its running job ends, another one is dispatched to it."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_ids: list[str] = []

        async def fail_worker() -> None:
            async with run_roles_in_process(connection, store, worker=WorkerOptions()) as worker:
                worker_id = await wait_for_worker(worker)
                job_ids.append(await dispatch(roles, worker_id))
                await poll_until(lambda: runs.job_ids == job_ids, "the job runs")
                assert worker.worker is not None
                assert worker.worker_task is not None
                runs.seconds_to_stop = 0.8
                worker.worker._stop_with_error(UnreadableEvent("damaged"))
                await asyncio.sleep(0.2)
                job_ids.append(await dispatch(roles, worker_id))
                await worker.worker_task

        with pytest.raises(UnreadableEvent):
            await fail_worker()
        running, late = job_ids
        assert runs.job_ids == [running]
        assert await roles.read_event_types(late) == ["JobSubmitted", "JobClaimed", "JobReleased"]


async def test_worker_that_stops_before_it_has_a_lease_leaves_no_search(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.ledger.mongo.lease.Lease.acquire", lambda *_: asyncio.sleep(60))
    async with run_roles_in_process(connection, store) as roles:
        await roles.submit()  # without a projector, the views never reach it
        async with run_roles_in_process(connection, store, worker=WorkerOptions()) as worker:
            assert worker.worker is not None
            search = worker.worker._dispatched_claims._search
            assert search is not None
            assert not search.done()
        assert search.done()


class SplittingAppender(Appender):
    """An appender for a server that commits the events of one insert separately, as for large ones."""

    async def _insert_documents(
        self, documents: list[Document], session: AsyncClientSession | None = None, *, is_ordered: bool = False
    ) -> set[int]:
        if not is_ordered:
            return await super()._insert_documents(documents, session)
        for index, document in enumerate(documents):
            if await super()._insert_documents([document]):
                return {index}
            await asyncio.sleep(0.001)
        return set()


class SplittingEventStore(EventStore):
    def __init__(self, db: Database) -> None:
        super().__init__(db)
        self._appender = SplittingAppender(db, self.events, self.limits)


async def test_job_whose_submission_arrives_before_its_claim_runs_once(
    connection: Connection, store: Path, runs: Runs
) -> None:
    """The worker also claims the job itself, which conflicts with the dispatched claim."""
    runs.may_end.set()
    async with (
        run_roles_in_process(connection, store, projector=True, store_class=SplittingEventStore) as roles,
        run_roles_in_process(connection, store, worker=WorkerOptions()) as worker,
    ):
        worker_id = await wait_for_worker(worker)
        await wait_until_idle(worker)
        job_ids = []
        for _ in range(30):
            job_ids.append(await dispatch(roles, worker_id))
            await asyncio.sleep(0.02)
        await roles.wait_until_finished(*job_ids)
        assert sorted(runs.job_ids) == sorted(job_ids)
        for job_id in job_ids:
            assert (await roles.read_event_types(job_id)).count("JobClaimed") == 1


async def test_job_dispatched_during_a_query_of_the_queue_takes_its_slot(
    connection: Connection, store: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_found, may_return = asyncio.Event(), asyncio.Event()
    find_rows = queue.find_rows

    async def find_slowly(*arguments: Any, **options: Any) -> list[queue.QueueRow]:
        if rows := await find_rows(*arguments, **options):
            has_found.set()
            await may_return.wait()
        return rows

    monkeypatch.setattr(queue, "find_rows", find_slowly)
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=WorkerOptions(max_concurrent=1)) as worker,
    ):
        worker_id = await wait_for_worker(worker)
        await wait_until_idle(worker)
        _, [queued] = await roles.submit_batch(
            {}, job_type="test", not_before=datetime.now(UTC) + timedelta(seconds=0.1)
        )
        await has_found.wait()
        dispatched = await dispatch(roles, worker_id)
        await poll_until(lambda: runs.job_ids == [dispatched], "the dispatched job runs")
        may_return.set()
        await asyncio.sleep(0.5)
        assert runs.job_ids == [dispatched]
        runs.may_end.set()
        await roles.wait_until_finished(queued, dispatched)


async def test_cancellation_that_is_missed_while_a_claim_is_checked_is_found(
    connection: Connection, store: Path, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_read, may_return = asyncio.Event(), asyncio.Event()

    async def load_slowly(*arguments: Any) -> StreamState:
        state = await load_stream_state(*arguments)
        has_read.set()
        await may_return.wait()
        return state

    monkeypatch.setattr("jobledger.workers.claims.dispatched_claims.load_stream_state", load_slowly)
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=WorkerOptions()) as worker,
    ):
        worker_id = await wait_for_worker(worker)
        async with missed_by(worker):
            job_id = await dispatch(roles, worker_id)
        await has_read.wait()
        async with missed_by(worker):
            await roles.handle_commands(job_id, CancelJob("user-1"))
        await poll_until(
            lambda: worker.worker and job_id in worker.worker._cancel_versions, "the cancellation is found"
        )
        may_return.set()
        await roles.wait_until_finished(job_id)
        assert (await roles.load_job(job_id))["status"] == "cancelled"


@asynccontextmanager
async def missed_by(roles: RunningRoles) -> AsyncIterator[None]:
    """Interrupt the change stream for events that are appended in the block."""
    restarts = roles.changes.restart_count
    with roles.changes.pause():
        await roles.submit(job_type="session", max_attempts=1)  # the stream notices its pause
        await asyncio.sleep(0.3)
        yield
        await asyncio.sleep(0.2)
    assert roles.changes.restart_count == restarts, "the stream was opened again during the pause"


async def wait_until_idle(roles: RunningRoles) -> None:
    """Wait until the worker waits for events."""
    worker = roles.worker
    assert worker is not None
    await poll_until(worker._needs_jobs, "the worker waits for jobs")
