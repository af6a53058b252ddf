"""The worker: wakes, claims, runs, reports. No job waits for ever, and none is done twice."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob, ClaimJob, ReleaseJob, RestartJob
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.domain.events import (
    JobAttemptFailed,
    JobCancelRequested,
    JobClaimed,
    JobCompleted,
    JobProgressed,
    JobReleased,
    RecordedEvent,
)
from jobledger.ledger.mongo.connection import Connection, Database
from jobledger.ledger.mongo.lease import EXPIRE_LEASE_UPDATE
from jobledger.ledger.store.appender import Appender, EventStoreLimits, PendingAppend
from jobledger.ledger.store.command_handler import CommandResult, handle_command
from jobledger.ledger.store.envelope import StreamAppend
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.processor import JobContext, ProcessorError, Results
from tests.support.role_runner import RunningRoles, WorkerOptions, poll_until, run_roles_in_process
from tests.workers.inline_processor import install_processor


async def claims(here: RunningRoles, *job_ids: str) -> list[int]:
    """How often each of the jobs was claimed."""
    counted = Counter(event.stream for event in await here.read_all_events() if isinstance(event.event, JobClaimed))
    return [counted[job_id] for job_id in job_ids]


async def order_of_claims(here: RunningRoles) -> list[str]:
    return [event.stream for event in await here.read_all_events() if isinstance(event.event, JobClaimed)]


# One job --------------------------------------------------------------------------------------------------------------


async def test_an_echo_job_is_done_and_its_file_is_in_the_store(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit({"text": "Grüße"})
        job = await here.wait_until_finished(job_id)
        assert (job["status"], job["retries"], job["attempt"], job["error"]) == ("completed", 0, 1, None)
        (file,) = job["results"]["files"]
        content = here.store.path(file["sha256"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert (file["size"], file["path"]) == (len(content), f"echo/{job_id}/echo.md")
        assert '"text":"Grüße"' in content.decode()
        assert job["results"]["markdown_file"] == f"/events/{file['path']}"
        assert job["results"]["markdown_url"] == f"/api/events/files/{file['path']}"
        assert await here.read_event_types(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]


async def test_what_will_not_pass_fails_at_once(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job = await here.wait_until_finished(await here.submit({"fail": "no such talk"}))
        assert (job["status"], job["retries"], job["attempt"]) == ("failed", 0, 1)
        assert job["error"]["code"] == "ECHO_FAILED"
        assert job["error"]["message"] == "no such talk"
        assert job["error"]["details"] == {"retryable": False}


async def test_what_may_pass_is_tried_again_until_the_attempts_are_used_up(connection: Connection, store: Path) -> None:
    options = WorkerOptions(retry_base_seconds=0.2)
    async with run_roles_in_process(connection, store, projector=True, worker=options) as here:
        job_id = await here.submit({"fail": "busy", "transient": True}, max_attempts=3)
        job = await here.wait_until_finished(job_id)
        assert (job["status"], job["retries"], job["attempt"]) == ("failed", 2, 3)
        assert job["error"]["details"] == {"retryable": True}
        events = await here.event_store.read_stream(job_id)
        assert [event.type for event in events] == [
            "JobSubmitted",
            *["JobClaimed", "JobAttemptFailed"] * 2,
            "JobClaimed",
            "JobFailed",
        ]
        for failed, claimed in zip(events[2:-2:2], events[3:-1:2], strict=True):
            assert isinstance(failed.event, JobAttemptFailed)
            assert failed.time < failed.event.retry_at <= claimed.time, "tried again before its time"
            longest = timedelta(seconds=0.2 * 2 ** (failed.event.attempt - 1) + 0.01)
            assert failed.event.retry_at - failed.time <= longest


async def test_progress_and_log_lines_are_gathered(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def talk(job: JobContext) -> Results:
        for number in range(1000):
            await job.report_progress(number / 10, f"number {number}")
            await job.log("info", f"line {number}")
            await asyncio.sleep(0.001)
        return Results()

    install_processor(monkeypatch, talk)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit(job_type="test")
        job = await here.wait_until_finished(job_id)
        history = Counter(await here.read_event_types(job_id))
        assert 1 <= history["JobProgressed"] <= 12
        assert 1 <= history["JobLogged"] <= 12
        assert [line["message"] for line in job["logs"]] == [f"line {number}" for number in range(900, 1000)]
        told = [event.event for event in await here.event_store.read_stream(job_id)]
        percents = [event.percent for event in told if isinstance(event, JobProgressed)]
        assert percents == sorted(percents)


async def test_a_job_tells_how_far_it_is_while_it_runs(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit({"seconds": 1.2})
        progressed = await here.wait_for_event(JobProgressed, job_id)
        await here.wait_for_views(progressed.position)
        job = await here.load_job(job_id)
        assert (job["status"], job["progress"]["percent"]) == ("processing", 0.0)
        assert (await here.wait_until_finished(job_id))["status"] == "completed"


async def test_nothing_is_said_for_an_attempt_after_its_end(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log lines and progress are on their way, in two appends, when the job is done: it must come last."""
    done = asyncio.Event()

    async def talk(job: JobContext) -> Results:
        await job.log("info", "a line")
        await job.report_progress(50, "half")
        await done.wait()
        return Results()

    class Slow(EventStore):
        async def append(self, *appends: StreamAppend) -> list[RecordedEvent]:
            logged = any(type(event).__name__ == "JobLogged" for append in appends for event in append.events)
            recorded = await super().append(*appends)
            if logged:
                done.set()
                await asyncio.sleep(0.1)
            return recorded

    install_processor(monkeypatch, talk)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(), store_class=Slow
    ) as here:
        job_id = await here.submit(job_type="test")
        await here.wait_until_finished(job_id)
    async with run_roles_in_process(connection, store) as here:
        expected = ["JobSubmitted", "JobClaimed", "JobLogged", "JobProgressed", "JobCompleted"]
        assert await here.read_event_types(job_id) == expected


async def test_finished_steps_are_not_repeated_by_the_next_attempt(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    async def steps(job: JobContext) -> Results:
        async def page() -> Any:
            ran.append("page")
            await job.warn("it was thin")
            return {"text": "hello"}

        assert await job.run_step("page", {"url": "a"}, page) == {"text": "hello"}
        if job.attempt == 1:
            raise ProcessorError("LATER", "come back later", transient=True)
        return Results(metadata={"attempt": job.attempt})

    install_processor(monkeypatch, steps)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit(job_type="test")
        job = await here.wait_until_finished(job_id)
        assert (job["status"], ran) == ("completed", ["page"])
        assert job["results"]["metadata"]["warnings"] == ["it was thin"]
        assert job["results"]["metadata"]["attempt"] == 2
        position = await here.event_store.head_position()
        await here.handle_commands(job_id, RestartJob("user-1", reuse_steps=False))
        await here.wait_for_event(JobCompleted, job_id, after=position)
        assert ran == ["page", "page"]


@pytest.mark.parametrize("kind", ["crash", "nonsense", "nothing stored"])
async def test_a_fault_in_a_processor_ends_the_job_and_not_the_worker(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async def faulty(job: JobContext) -> Results:
        if kind == "crash":
            raise ZeroDivisionError("oh")
        if kind == "nonsense":
            return Results(metadata={"a": float("nan")})
        await job.run_step("page", {}, lambda: asyncio.sleep(0, {"big": "x" * 9_000_000}))
        return Results()

    install_processor(monkeypatch, faulty)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job = await here.wait_until_finished(await here.submit(job_type="test", max_attempts=1))
        assert job["status"] == "failed"
        assert job["error"]["code"] in ("PROCESSOR_FAULT", "INVALID_RESULT", "WORKER_FAULT")
        assert (await here.wait_until_finished(await here.submit()))["status"] == "completed"


# Many jobs ------------------------------------------------------------------------------------------------------------


async def test_more_jobs_than_slots_are_all_done(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(slots=3)) as here:
        batch_id, job_ids = await here.submit_batch(*({"seconds": 0.05} for _ in range(40)))
        await here.wait_until_finished(*job_ids)
        assert await claims(here, *job_ids) == [1] * 40
        assert (await here.load_batch(batch_id))["completed_jobs"] == 40


async def test_there_are_never_more_running_than_slots(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most = 0, 0

    async def count(job: JobContext) -> Results:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.1)
        now -= 1
        return Results()

    install_processor(monkeypatch, count)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(slots=3)) as here:
        _, first = await here.submit_batch(*({} for _ in range(10)), job_type="test")
        second = [await here.submit(job_type="test") for _ in range(10)]
        await here.wait_until_finished(*first, *second)
    assert most == 3


async def test_what_was_submitted_while_nobody_worked_is_done_most_urgent_first(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_ids = [await here.submit(priority=priority) for priority in (1, 3, 2, 3)]
        await here.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions(slots=1), worker_events_only=True):
            await here.wait_until_finished(*job_ids)
        low, high, middle, high_too = job_ids
        assert await order_of_claims(here) == [high, high_too, middle, low]


async def test_what_is_submitted_while_the_worker_is_busy_is_done_most_urgent_first(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = asyncio.Event()

    async def wait(job: JobContext) -> Results:
        await free.wait()
        return Results()

    install_processor(monkeypatch, wait)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(slots=1)) as here:
        first = await here.submit(job_type="test")
        await here.wait_for_event(JobClaimed, first)
        low, high = await here.submit(job_type="test", priority=1), await here.submit(job_type="test", priority=5)
        await here.wait_for_views()
        free.set()
        await here.wait_until_finished(first, low, high)
        assert await order_of_claims(here) == [first, high, low]


async def test_two_workers_share_and_no_job_is_run_twice(connection: Connection, store: Path) -> None:
    options = WorkerOptions(slots=2)
    async with (
        run_roles_in_process(connection, store, projector=True) as here,
        run_roles_in_process(connection, store, worker=options, worker_events_only=True),
        run_roles_in_process(connection, store, worker=options, worker_events_only=True),
    ):
        _, job_ids = await here.submit_batch(*({"seconds": 0.1} for _ in range(30)))
        job_ids += [await here.submit({"seconds": 0.1}) for _ in range(10)]
        await here.wait_until_finished(*job_ids)
        assert await claims(here, *job_ids) == [1] * 40
        events = [event.event for event in await here.read_all_events()]
        assert len({event.worker_id for event in events if isinstance(event, JobClaimed)}) == 2
        assert not [event for event in events if type(event).__name__ == "WorkerFenced"]


async def test_lost_races_leave_nothing_behind(connection: Connection, store: Path) -> None:
    """A row that is wrong, and stays, is tried once."""
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit()
        await here.wait_for_views()
        row = await here.db.queue.find_one({"_id": job_id})
        assert row is not None
        await here.claim(job_id)
        await here.wait_for_views()
        await here.db.queue.insert_one(row)
        async with run_roles_in_process(connection, store, worker=WorkerOptions(slots=1)) as there:
            worker = there.worker
            assert worker is not None
            await poll_until(lambda: worker._claim_queue._skipped == {job_id}, "the worker tried and lost")
            (await here.wait_until_finished(await here.submit()))  # a stale row does not hide a fresh job


# Waiting for a time ---------------------------------------------------------------------------------------------------


async def test_a_job_is_begun_when_its_time_has_come_and_not_before(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        due = datetime.now(UTC) + timedelta(seconds=1.5)
        waits, fresh = await here.submit(not_before=due), await here.submit()
        await here.wait_until_finished(fresh)
        await here.wait_until_finished(waits)
        claimed = await here.wait_for_event(JobClaimed, waits)
        assert timedelta(milliseconds=-1) <= claimed.time - due < timedelta(seconds=1)


async def test_a_worker_that_starts_later_knows_the_times_too_and_asks_for_nothing_meanwhile(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        due = datetime.now(UTC) + timedelta(seconds=3)
        waits = await here.submit(not_before=due)
        await here.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions()) as there:
            assert there.worker is not None
            worker = there.worker
            await poll_until(lambda: worker._claim_queue._timer is not None, "the worker has set its timer")
            queries = await _queries(here)
            await asyncio.sleep(1)
            assert await _queries(here) == queries, "the worker polls"
            await here.wait_until_finished(waits)
        claimed = await here.wait_for_event(JobClaimed, waits)
        assert timedelta(milliseconds=-1) <= claimed.time - due < timedelta(seconds=1)


async def _queries(here: RunningRoles) -> int:
    """How often the view `queue` was read, by anybody."""
    top = await here.db.client.admin.command("top")
    return int(top["totals"][f"{here.connection.db_name}.queue"]["queries"]["count"])


# Cancelling and stopping ----------------------------------------------------------------------------------------------


async def test_a_running_job_is_cancelled_and_the_slot_is_free(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(slots=1)) as here:
        job_id = await here.submit({"seconds": 60})
        await here.wait_for_event(JobClaimed, job_id)
        await here.handle_commands(job_id, CancelJob("user-1", "enough"))
        job = await here.wait_until_finished(job_id, seconds=3)
        assert job["status"] == "cancelled"
        assert (await here.wait_until_finished(await here.submit()))["status"] == "completed"


async def test_a_cancellation_that_overtakes_the_claim_is_obeyed(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else sees the claim in the log, and cancels, before the claiming worker has heard that it won."""
    heard, told = asyncio.Event(), asyncio.Event()

    async def late(*arguments: Any, **named: Any) -> CommandResult:
        handled = await handle_command(*arguments, **named)
        if handled.events and isinstance(handled.events[0].event, JobClaimed):
            heard.set()
            await told.wait()
        return handled

    monkeypatch.setattr("jobledger.workers.worker.handle_command", late)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit({"seconds": 60})
        await heard.wait()
        await here.handle_commands(job_id, CancelJob("user-1"))
        await here.wait_for_event(JobCancelRequested, job_id)
        told.set()
        assert (await here.wait_until_finished(job_id, seconds=3))["status"] == "cancelled"


async def test_a_cancellation_missed_while_the_change_stream_was_closed_is_obeyed(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        run_roles_in_process(connection, store, projector=True) as here,
        run_roles_in_process(connection, store, worker=WorkerOptions(), worker_events_only=True) as there,
    ):
        job_id = await here.submit({"seconds": 60})
        await here.wait_for_event(JobProgressed, job_id)
        assert there.worker is not None
        worker = there.worker
        # As if it had come while the stream was interrupted: only the resync can tell.
        with monkeypatch.context() as patched:
            patched.setattr(there.worker, "_running", {})
            await here.handle_commands(job_id, CancelJob("user-1"))
            await poll_until(lambda: job_id in worker._cancel_versions, "the worker has not noticed")
            worker._cancel_versions.clear()
        async with there.db.client.start_session() as session:
            for listener in there.changes._listeners:
                await listener.resync(session)
        assert (await here.wait_until_finished(job_id, seconds=3))["status"] == "cancelled"


async def test_a_job_given_back_at_shutdown_has_lost_no_attempt(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit({"seconds": 60}, max_attempts=1)
        async with run_roles_in_process(connection, store, worker=WorkerOptions(shutdown_grace_seconds=0.1)):
            await here.wait_for_event(JobClaimed, job_id)
        released = await here.wait_for_event(JobReleased, job_id)
        await here.wait_for_views(released.position)
        job = await here.load_job(job_id)
        assert (job["status"], job["retries"], job["worker_id"]) == ("pending", 0, None)
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            claimed = await here.wait_for_event(JobClaimed, job_id, after=released.position)
            assert claimed.event.model_dump()["attempt"] == 2
            await here.handle_commands(job_id, CancelJob("user-1"))
            await here.wait_until_finished(job_id)


async def test_a_worker_that_stops_lets_jobs_end_within_the_grace_time_and_claims_no_more(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit({"seconds": 1})
        async with run_roles_in_process(connection, store, worker=WorkerOptions(slots=2)) as there:
            await here.wait_for_event(JobClaimed, job_id)
            assert there.worker is not None
            there.worker.stop()
            late = await here.submit()
        job = await here.wait_until_finished(job_id)
        assert job["status"] == "completed"
        assert await here.read_event_types(late) == ["JobSubmitted"]


async def test_a_claim_that_is_on_its_way_when_the_worker_stops_costs_no_attempt(
    connection: Connection, store: Path
) -> None:
    on_its_way, go_on = asyncio.Event(), asyncio.Event()

    class SlowAppender(Appender):
        async def _insert(self, todo: Sequence[PendingAppend]) -> list[PendingAppend]:
            if any(append.documents[0]["type"] == "JobClaimed" for append in todo):
                on_its_way.set()
                await go_on.wait()
            return await super()._insert(todo)

    class Slow(EventStore):
        def __init__(self, db: Database, limits: EventStoreLimits) -> None:
            super().__init__(db, limits)
            self._appender = SlowAppender(db, self._events, limits)

    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit()
        async with run_roles_in_process(
            connection, store, worker=WorkerOptions(lease_seconds=2), store_class=Slow
        ) as there:
            async with asyncio.timeout(10):
                await on_its_way.wait()
            assert there.worker is not None
            assert there.worker_task is not None
            there.worker.stop()
            asyncio.get_running_loop().call_later(0.3, go_on.set)
            await there.worker_task
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            job = await here.wait_until_finished(job_id)
        assert (job["status"], job["retries"]) == ("completed", 0)
        assert "JobLeaseExpired" not in await here.read_event_types(job_id)


async def test_a_job_whose_cancellation_was_overtaken_by_a_shutdown_is_not_run_again(
    connection: Connection, store: Path
) -> None:
    """The cancellation is on record; the worker that shut down gave the job back without having heard of it."""
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit({"seconds": 60})
        await here.handle_commands(job_id, ClaimJob("worker-1", datetime.now(UTC)), CancelJob("user-1"))
        await here.handle_commands(job_id, ReleaseJob("worker-1", 1, "the worker shuts down"))
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            assert (await here.wait_until_finished(job_id, seconds=3))["status"] == "cancelled"


# Losing the lease while stopping --------------------------------------------------------------------------------------


async def test_a_worker_that_loses_its_lease_in_the_grace_time_gives_up_at_once(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def silent(job: JobContext) -> Results:
        """Says nothing, so it is not told either that its attempt is over."""
        begun.set()
        await asyncio.Event().wait()
        return Results()

    install_processor(monkeypatch, silent)
    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit(job_type="test")
        options = WorkerOptions(lease_seconds=1.5, shutdown_grace_seconds=60)
        async with run_roles_in_process(connection, store, worker=options) as there:
            async with asyncio.timeout(10):
                await begun.wait()
            assert there.worker is not None
            assert there.worker_task is not None
            there.worker.stop()
            await here.db.workers.update_one({}, EXPIRE_LEASE_UPDATE)
            async with asyncio.timeout(5):
                await there.worker_task
        assert "JobReleased" not in await here.read_event_types(job_id)


async def test_a_worker_that_cannot_give_its_jobs_back_ends_when_its_lease_would(
    connection: Connection, store: Path
) -> None:
    class Away(EventStore):
        async def append(self, *appends: StreamAppend) -> list[RecordedEvent]:
            if any(isinstance(event, JobReleased) for append in appends for event in append.events):
                raise LedgerUnavailable("the database is away")
            return await super().append(*appends)

    async with run_roles_in_process(connection, store, projector=True) as here:
        job_id = await here.submit({"seconds": 60})
        options = WorkerOptions(lease_seconds=1.5, shutdown_grace_seconds=0.1)
        async with run_roles_in_process(connection, store, worker=options, store_class=Away) as there:
            await here.wait_for_event(JobProgressed, job_id)
            assert there.worker is not None
            assert there.worker_task is not None
            there.worker.stop()
            async with asyncio.timeout(6):
                await there.worker_task


# In doubt -------------------------------------------------------------------------------------------------------------


class Deaf:
    """Lets the first append of an event of one type land, and says that the database did not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[JobClaimed | JobCompleted]) -> None:
        self.happened = False
        append = EventStore.append

        async def unheard(log: EventStore, *appends: StreamAppend) -> list[RecordedEvent]:
            recorded = await append(log, *appends)
            if not self.happened and isinstance(appends[0].events[0], kind):
                self.happened = True
                raise LedgerUnavailable("no answer")
            return recorded

        monkeypatch.setattr(EventStore, "append", unheard)


@pytest.mark.parametrize("kind", [JobClaimed, JobCompleted])
async def test_a_report_that_landed_unheard_counts_and_is_not_made_again(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, kind: type[JobClaimed | JobCompleted]
) -> None:
    deaf = Deaf(monkeypatch, kind)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit()
        job = await here.wait_until_finished(job_id)
        assert deaf.happened
        assert (job["status"], job["retries"]) == ("completed", 0)
        assert await here.read_event_types(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]
