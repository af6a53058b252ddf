"""The worker cancels jobs, stops, and loses its lease or a response. No job waits forever or runs twice."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob, ClaimJob, ReleaseJob
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import (
    JobCancelRequested,
    JobClaimed,
    JobCompleted,
    JobProgressed,
    JobReleased,
    RecordedEvent,
)
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.mongo.lease import EXPIRE_LEASE_UPDATE
from jobledger.ledger.store.appender import Appender, EventStoreLimits
from jobledger.ledger.store.command_handler import handle_commands
from jobledger.ledger.store.envelope import StreamAppend
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.pending_appends import PendingAppend
from jobledger.workers.processor import JobContext, Results
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import WorkerOptions, run_roles_in_process
from tests.workers.inline_processor import install_processor

# Cancelling and stopping ----------------------------------------------------------------------------------------------


async def test_cancelled_running_job_ends_and_frees_its_slot(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(max_concurrent=1)) as roles:
        job_id = await roles.submit({"seconds": 60})
        await roles.wait_for_event(JobClaimed, job_id)
        await roles.handle_commands(job_id, CancelJob("user-1", "enough"))
        job = await roles.wait_until_finished(job_id)
        assert job["status"] == "cancelled"
        assert (await roles.wait_until_finished(await roles.submit()))["status"] == "completed"


async def test_cancellation_before_claim_result_arrives_cancels_job(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user sees the claim in the log and cancels before the claiming worker gets the result of its append."""
    claimed, release = asyncio.Event(), asyncio.Event()

    async def respond_late(*arguments: Any, **options: Any) -> AsyncGenerator[Any, None]:
        async for outcomes in handle_commands(*arguments, **options):
            claimed.set()
            await release.wait()
            yield outcomes

    monkeypatch.setattr("jobledger.workers.claims.claimer.handle_commands", respond_late)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job_id = await roles.submit({"seconds": 60})
        await claimed.wait()
        await roles.handle_commands(job_id, CancelJob("user-1"))
        await roles.wait_for_event(JobCancelRequested, job_id)
        release.set()
        assert (await roles.wait_until_finished(job_id))["status"] == "cancelled"


async def test_cancellation_missed_by_change_stream_is_found_by_resync(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=WorkerOptions(), is_worker_process=True) as worker_roles,
    ):
        job_id = await roles.submit({"seconds": 60})
        await roles.wait_for_event(JobProgressed, job_id)
        assert worker_roles.worker is not None
        worker = worker_roles.worker
        # The cancellation comes while the change stream is interrupted, so only the resync can find it.
        with monkeypatch.context() as patched:
            patched.setattr(worker_roles.worker, "_running", {})
            await roles.handle_commands(job_id, CancelJob("user-1"))
            await poll_until(lambda: job_id in worker._cancel_versions, "the worker received the cancellation")
            worker._cancel_versions.clear()
        async with worker_roles.db.client.start_session() as session:
            for listener in worker_roles.changes._listeners:
                await listener.resync(session)
        assert (await roles.wait_until_finished(job_id))["status"] == "cancelled"


async def test_job_released_at_shutdown_loses_no_attempt(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit({"seconds": 60}, max_attempts=1)
        async with run_roles_in_process(connection, store, worker=WorkerOptions(shutdown_grace_seconds=0.1)):
            await roles.wait_for_event(JobClaimed, job_id)
        released = await roles.wait_for_event(JobReleased, job_id)
        await roles.wait_for_views(released.position)
        job = await roles.load_job(job_id)
        assert (job["status"], job["retries"], job["worker_id"]) == ("pending", 0, None)
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            claimed = await roles.wait_for_event(JobClaimed, job_id, after=released.position)
            assert claimed.event.model_dump()["attempt"] == 2
            await roles.handle_commands(job_id, CancelJob("user-1"))
            await roles.wait_until_finished(job_id)


async def test_stopping_worker_finishes_jobs_in_grace_time_and_claims_none(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit({"seconds": 1})
        async with run_roles_in_process(connection, store, worker=WorkerOptions(max_concurrent=2)) as worker_roles:
            await roles.wait_for_event(JobClaimed, job_id)
            assert worker_roles.worker is not None
            worker_roles.worker.stop()
            late = await roles.submit()
        job = await roles.wait_until_finished(job_id)
        assert job["status"] == "completed"
        assert await roles.read_event_types(late) == ["JobSubmitted"]


async def test_claim_in_flight_when_worker_stops_costs_no_attempt(connection: Connection, store: Path) -> None:
    in_flight, release = asyncio.Event(), asyncio.Event()

    class SlowAppender(Appender):
        async def _insert(self, pending: Sequence[PendingAppend]) -> list[PendingAppend]:
            if any(append.documents[0]["type"] == "JobClaimed" for append in pending):
                in_flight.set()
                await release.wait()
            return await super()._insert(pending)

    class SlowEventStore(EventStore):
        def __init__(self, db: Database) -> None:
            limits = EventStoreLimits()
            super().__init__(db, limits)
            self._appender = SlowAppender(db, self.events, limits)

    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit()
        async with run_roles_in_process(
            connection, store, worker=WorkerOptions(), store_class=SlowEventStore
        ) as worker_roles:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await in_flight.wait()
            assert worker_roles.worker is not None
            assert worker_roles.worker_task is not None
            worker_roles.worker.stop()
            asyncio.get_running_loop().call_later(0.3, release.set)
            await worker_roles.worker_task
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            job = await roles.wait_until_finished(job_id)
        assert (job["status"], job["retries"]) == ("completed", 0)
        assert "JobLeaseExpired" not in await roles.read_event_types(job_id)


async def test_job_cancelled_before_its_release_is_not_run_again(connection: Connection, store: Path) -> None:
    """The cancellation is recorded. The worker that shuts down releases the job without knowing of it."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit({"seconds": 60})
        await roles.handle_commands(job_id, ClaimJob("worker-1", datetime.now(UTC)), CancelJob("user-1"))
        await roles.handle_commands(job_id, ReleaseJob("worker-1", 1, "the worker shuts down"))
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            assert (await roles.wait_until_finished(job_id))["status"] == "cancelled"


# Losing the lease while stopping --------------------------------------------------------------------------------------


async def test_worker_that_loses_lease_in_grace_time_ends_at_once(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = asyncio.Event()

    async def run_silently(job: JobContext) -> Results:
        """Send no request, so that no response reports the end of the attempt."""
        started.set()
        await asyncio.Event().wait()
        return Results()

    install_processor(monkeypatch, run_silently)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit(job_type="test")
        options = WorkerOptions(lease_seconds=1.5, shutdown_grace_seconds=60)
        async with run_roles_in_process(connection, store, worker=options) as worker_roles:
            async with asyncio.timeout(DEADLINE_SECONDS):
                await started.wait()
            assert worker_roles.worker is not None
            assert worker_roles.worker_task is not None
            worker_roles.worker.stop()
            await roles.db.workers.update_one({}, EXPIRE_LEASE_UPDATE)
            async with asyncio.timeout(DEADLINE_SECONDS):
                await worker_roles.worker_task
        assert "JobReleased" not in await roles.read_event_types(job_id)


async def test_worker_that_cannot_release_jobs_ends_with_its_lease(connection: Connection, store: Path) -> None:
    class FailingEventStore(EventStore):
        async def append(self, *appends: StreamAppend) -> list[RecordedEvent]:
            if any(isinstance(event, JobReleased) for append in appends for event in append.events):
                raise LedgerUnavailable("the database is unavailable")
            return await super().append(*appends)

    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit({"seconds": 60})
        options = WorkerOptions(lease_seconds=1.5, shutdown_grace_seconds=0.1)
        async with run_roles_in_process(
            connection, store, worker=options, store_class=FailingEventStore
        ) as worker_roles:
            await roles.wait_for_event(JobProgressed, job_id)
            assert worker_roles.worker is not None
            assert worker_roles.worker_task is not None
            worker_roles.worker.stop()
            async with asyncio.timeout(DEADLINE_SECONDS):
                await worker_roles.worker_task


# Lost responses -------------------------------------------------------------------------------------------------------


class LostResponse:
    """Let the first append of an event of one type succeed, and report that the database did not respond."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[JobClaimed | JobCompleted]) -> None:
        self.is_lost = False
        append, append_each = EventStore.append, EventStore.append_each

        async def append_each_without_response(
            event_store: EventStore, appends: Sequence[StreamAppend]
        ) -> AsyncGenerator[Any, None]:
            async for outcomes in append_each(event_store, appends):
                if self.is_lost or not any(isinstance(append.events[0], kind) for append in appends):
                    yield outcomes
                else:
                    self.is_lost = True
                    yield [(index, LedgerUnavailable("no response")) for index, _ in outcomes]

        async def append_without_response(event_store: EventStore, *appends: StreamAppend) -> list[RecordedEvent]:
            recorded = await append(event_store, *appends)
            if not self.is_lost and isinstance(appends[0].events[0], kind):
                self.is_lost = True
                raise LedgerUnavailable("no response")
            return recorded

        monkeypatch.setattr(EventStore, "append", append_without_response)
        monkeypatch.setattr(EventStore, "append_each", append_each_without_response)


@pytest.mark.parametrize("has_file", [True, False], ids=["completed alone", "completed together"])
@pytest.mark.parametrize("kind", [JobClaimed, JobCompleted])
async def test_append_without_response_counts_and_is_not_repeated(
    connection: Connection,
    store: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: type[JobClaimed | JobCompleted],
    has_file: bool,
) -> None:
    lost_response = LostResponse(monkeypatch, kind)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job_id = await roles.submit({"file": has_file})
        job = await roles.wait_until_finished(job_id)
        assert lost_response.is_lost
        assert (job["status"], job["retries"]) == ("completed", 0)
        assert await roles.read_event_types(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]
