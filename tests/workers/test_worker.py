"""The worker claims, runs and reports jobs, and starts them by priority and start time."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import RestartJob
from jobledger.ledger.domain.events import JobAttemptFailed, JobClaimed, JobCompleted, JobProgressed, RecordedEvent
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.envelope import StreamAppend
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.attempts.attempt_writer import FLUSH_INTERVAL_SECONDS
from jobledger.workers.processor import JobContext, ProcessorError, Results
from tests.support.polling import poll_until
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.workers.inline_processor import ConcurrencyProbe, install_processor

MIN_BACKOFF = timedelta(seconds=0.1)
MAX_DELAY = timedelta(seconds=30)
"""How late a scheduled job may start on a busy machine."""


async def count_claims(roles: RunningRoles, *job_ids: str) -> list[int]:
    """Return how often each of the jobs was claimed."""
    counts = Counter(event.stream for event in await roles.read_all_events() if isinstance(event.event, JobClaimed))
    return [counts[job_id] for job_id in job_ids]


async def list_claimed_jobs(roles: RunningRoles) -> list[str]:
    return [event.stream for event in await roles.read_all_events() if isinstance(event.event, JobClaimed)]


# One job --------------------------------------------------------------------------------------------------------------


async def test_echo_job_completes_and_its_file_is_stored(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job_id = await roles.submit({"text": "Grüße"})
        job = await roles.wait_until_finished(job_id)
        assert (job["status"], job["retries"], job["attempt"], job["error"]) == ("completed", 0, 1, None)
        (file,) = job["results"]["files"]
        content = roles.store.get_path(file["sha256"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert (file["size"], file["path"]) == (len(content), f"echo/{job_id}/echo.md")
        assert '"text":"Grüße"' in content.decode()
        assert job["results"]["markdown_file"] == f"/events/{file['path']}"
        assert job["results"]["markdown_url"] == f"/api/events/files/{file['path']}"
        assert await roles.read_event_types(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]


async def test_permanent_error_fails_job_at_once(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job = await roles.wait_until_finished(await roles.submit({"fail": "no such talk"}))
        assert (job["status"], job["retries"], job["attempt"]) == ("failed", 0, 1)
        assert job["error"]["code"] == "ECHO_FAILED"
        assert job["error"]["message"] == "no such talk"
        assert job["error"]["details"] == {"retryable": False}


async def test_transient_error_is_retried_until_max_attempts(connection: Connection, store: Path) -> None:
    options = WorkerOptions(retry_base_seconds=0.2)
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        job_id = await roles.submit({"fail": "busy", "transient": True}, max_attempts=3)
        job = await roles.wait_until_finished(job_id)
        assert (job["status"], job["retries"], job["attempt"]) == ("failed", 2, 3)
        assert job["error"]["details"] == {"retryable": True}
        events = await roles.event_store.read_stream(job_id)
        assert [event.type for event in events] == [
            "JobSubmitted",
            *["JobClaimed", "JobAttemptFailed"] * 2,
            "JobClaimed",
            "JobFailed",
        ]
        for started, failed, claimed in zip(events[1:-3:2], events[2:-2:2], events[3:-1:2], strict=True):
            assert isinstance(failed.event, JobAttemptFailed)
            assert started.time + MIN_BACKOFF <= failed.event.retry_at <= claimed.time, "retried too early"
            longest = timedelta(seconds=0.2 * 2 ** (failed.event.attempt - 1) + 0.01)
            assert failed.event.retry_at - failed.time <= longest


@pytest.mark.parametrize(("retry_after", "seconds"), [(20, 20.0), (7200, 60.0), (-5, 0.0), (None, 0.0), ("soon", 0.0)])
async def test_retry_waits_for_the_requested_time_within_the_maximum(
    retry_after: object, seconds: float, connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def fail(job: JobContext) -> Results:
        raise ProcessorError("BUSY", "Busy.", transient=True, details={"retry_after": retry_after})

    install_processor(monkeypatch, fail)
    options = WorkerOptions(retry_base_seconds=0.2, retry_max_seconds=60)
    async with run_roles_in_process(connection, store, projector=True, worker=options) as roles:
        failed = await roles.wait_for_event(JobAttemptFailed, await roles.submit(job_type="test"))
    assert isinstance(failed.event, JobAttemptFailed)
    delay = (failed.event.retry_at - failed.time).total_seconds()
    assert seconds - 0.5 < delay < seconds + 0.3


async def test_progress_and_log_lines_are_combined_into_few_events(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def report(job: JobContext) -> Results:
        for number in range(1000):
            await job.report_progress(number / 10, f"number {number}")
            await job.log("info", f"line {number}")
            await asyncio.sleep(0.001)
        return Results()

    install_processor(monkeypatch, report)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job_id = await roles.submit(job_type="test")
        job = await roles.wait_until_finished(job_id)
        history = Counter(await roles.read_event_types(job_id))
        events = await roles.event_store.read_stream(job_id)
        # 1 for each started interval, 1 for the first report, 1 for the end
        max_events = (events[-1].time - events[1].time).total_seconds() / FLUSH_INTERVAL_SECONDS + 3
        assert 1 <= history["JobProgressed"] <= max_events
        assert 1 <= history["JobLogged"] <= max_events
        assert [line["message"] for line in job["logs"]] == [f"line {number}" for number in range(900, 1000)]
        percents = [event.event.percent for event in events if isinstance(event.event, JobProgressed)]
        assert percents == sorted(percents)


async def test_running_job_reports_progress(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def report(job: JobContext) -> Results:
        await job.report_progress(30, "reading")
        await release.wait()
        return Results()

    install_processor(monkeypatch, report)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job_id = await roles.submit(job_type="test")
        progressed = await roles.wait_for_event(JobProgressed, job_id)
        await roles.wait_for_views(progressed.position)
        job = await roles.load_job(job_id)
        assert (job["status"], job["progress"]["percent"]) == ("processing", 30.0)
        release.set()
        assert (await roles.wait_until_finished(job_id))["status"] == "completed"


async def test_progress_never_falls_within_an_attempt(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.workers.attempts.attempt_writer.FLUSH_INTERVAL_SECONDS", 0.02)

    async def has_recorded(job: JobContext, count: int) -> bool:
        events = await roles.event_store.read_stream(job.job_id)
        return len([event for event in events if isinstance(event.event, JobProgressed)]) == count

    async def report(job: JobContext) -> Results:
        for count, percent in enumerate((10, 90, 82, float("nan"), 95), start=1):
            await job.report_progress(percent, f"reported {percent}")
            await poll_until(partial(has_recorded, job, count), "the progress is recorded")
        return Results()

    install_processor(monkeypatch, report)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job_id = await roles.submit(job_type="test")
        await roles.wait_until_finished(job_id)
        events = [event.event for event in await roles.event_store.read_stream(job_id)]
        reported = [(event.percent, event.message) for event in events if isinstance(event, JobProgressed)]
        assert reported == [
            (10.0, "reported 10"),
            (90.0, "reported 90"),
            (90.0, "reported 82"),
            (90.0, "reported nan"),
            (95.0, "reported 95"),
        ]


async def test_end_of_attempt_is_its_last_event(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log lines and progress are being appended, in two appends, when the job ends. Its end must come last."""
    logged_once = asyncio.Event()

    async def report(job: JobContext) -> Results:
        await job.log("info", "a line")
        await job.report_progress(50, "half")
        await logged_once.wait()
        return Results()

    class SlowEventStore(EventStore):
        async def append(self, *appends: StreamAppend) -> list[RecordedEvent]:
            logged = any(type(event).__name__ == "JobLogged" for append in appends for event in append.events)
            recorded = await super().append(*appends)
            if logged:
                logged_once.set()
                await asyncio.sleep(0.1)
            return recorded

    install_processor(monkeypatch, report)
    async with run_roles_in_process(
        connection, store, projector=True, worker=WorkerOptions(), store_class=SlowEventStore
    ) as roles:
        job_id = await roles.submit(job_type="test")
        await roles.wait_until_finished(job_id)
    async with run_roles_in_process(connection, store) as roles:
        expected = ["JobSubmitted", "JobClaimed", "JobLogged", "JobProgressed", "JobCompleted"]
        assert await roles.read_event_types(job_id) == expected


async def test_next_attempt_reuses_finished_steps(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executed = []

    async def steps(job: JobContext) -> Results:
        async def page(url: str) -> Any:
            executed.append("page")
            await job.warn("the page is short")
            return {"text": "hello"}

        assert await job.step("page", page, "a") == {"text": "hello"}
        if job.attempt == 1:
            raise ProcessorError("LATER", "come back later", transient=True)
        return Results(metadata={"attempt": job.attempt})

    install_processor(monkeypatch, steps)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job_id = await roles.submit(job_type="test")
        job = await roles.wait_until_finished(job_id)
        assert (job["status"], executed) == ("completed", ["page"])
        assert job["results"]["metadata"]["warnings"] == ["the page is short"]
        assert job["results"]["metadata"]["attempt"] == 2
        position = await roles.event_store.read_head_position()
        await roles.handle_commands(job_id, RestartJob("user-1", reuse_steps=False))
        await roles.wait_for_event(JobCompleted, job_id, after=position)
        assert executed == ["page", "page"]


@pytest.mark.parametrize("kind", ["crash", "nonsense", "nothing stored"])
async def test_fault_of_processor_fails_job_and_worker_continues(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async def run_faulty(job: JobContext) -> Results:
        if kind == "crash":
            raise ZeroDivisionError("division")
        if kind == "nonsense":
            return Results(metadata={"a": float("nan")})
        await job.step("page", lambda: asyncio.sleep(0, {"big": "x" * 9_000_000}))
        return Results()

    install_processor(monkeypatch, run_faulty)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        job = await roles.wait_until_finished(await roles.submit(job_type="test", max_attempts=1))
        assert job["status"] == "failed"
        assert job["error"]["code"] in ("PROCESSOR_FAULT", "INVALID_RESULT", "WORKER_FAULT")
        assert (await roles.wait_until_finished(await roles.submit()))["status"] == "completed"


# Many jobs ------------------------------------------------------------------------------------------------------------


async def test_more_jobs_than_slots_all_complete_once(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(max_concurrent=3)) as roles:
        batch_id, job_ids = await roles.submit_batch(*({"seconds": 0.05} for _ in range(40)))
        await roles.wait_until_finished(*job_ids)
        assert await count_claims(roles, *job_ids) == [1] * 40
        assert (await roles.load_batch(batch_id))["completed_jobs"] == 40


async def test_worker_never_runs_more_jobs_than_slots(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe = ConcurrencyProbe(seconds=0.1)
    install_processor(monkeypatch, probe.run)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(max_concurrent=3)) as roles:
        _, first = await roles.submit_batch(*({} for _ in range(10)), job_type="test")
        second = [await roles.submit(job_type="test") for _ in range(10)]
        await roles.wait_until_finished(*first, *second)
    assert probe.maximum == 3


async def test_jobs_submitted_before_worker_start_run_by_priority(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_ids = [await roles.submit(priority=priority) for priority in (1, 3, 2, 3)]
        await roles.wait_for_views()
        async with run_roles_in_process(
            connection, store, worker=WorkerOptions(max_concurrent=1), is_worker_process=True
        ):
            await roles.wait_until_finished(*job_ids)
        low, high, middle, second_high = job_ids
        assert await list_claimed_jobs(roles) == [high, second_high, middle, low]


async def test_jobs_submitted_to_busy_worker_run_by_priority(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = asyncio.Event()

    async def wait(job: JobContext) -> Results:
        await release.wait()
        return Results()

    install_processor(monkeypatch, wait)
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions(max_concurrent=1)) as roles:
        first = await roles.submit(job_type="test")
        await roles.wait_for_event(JobClaimed, first)
        low, high = await roles.submit(job_type="test", priority=1), await roles.submit(job_type="test", priority=5)
        await roles.wait_for_views()
        release.set()
        await roles.wait_until_finished(first, low, high)
        assert await list_claimed_jobs(roles) == [first, high, low]


async def test_two_workers_share_jobs_and_run_each_once(connection: Connection, store: Path) -> None:
    options = WorkerOptions(max_concurrent=2)
    async with (
        run_roles_in_process(connection, store, projector=True) as roles,
        run_roles_in_process(connection, store, worker=options, is_worker_process=True),
        run_roles_in_process(connection, store, worker=options, is_worker_process=True),
    ):
        _, job_ids = await roles.submit_batch(*({"seconds": 0.1} for _ in range(30)))
        job_ids += [await roles.submit({"seconds": 0.1}) for _ in range(10)]
        await roles.wait_until_finished(*job_ids)
        assert await count_claims(roles, *job_ids) == [1] * 40
        events = [event.event for event in await roles.read_all_events()]
        assert len({event.worker_id for event in events if isinstance(event, JobClaimed)}) == 2
        assert not [event for event in events if type(event).__name__ == "WorkerFenced"]


async def test_stale_queue_row_is_tried_once_and_hides_no_other_job(connection: Connection, store: Path) -> None:
    """A queue row of a job that is claimed already stays in the view."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        job_id = await roles.submit()
        await roles.wait_for_views()
        row = await roles.db.queue.find_one({"_id": job_id})
        assert row is not None
        await roles.claim(job_id)
        await roles.wait_for_views()
        await roles.db.queue.insert_one(row)
        async with run_roles_in_process(connection, store, worker=WorkerOptions(max_concurrent=1)) as worker_roles:
            worker = worker_roles.worker
            assert worker is not None
            await poll_until(lambda: worker._claim_queue._skipped == {job_id}, "the worker skips the row")
            await roles.wait_until_finished(await roles.submit())


# Scheduled jobs -------------------------------------------------------------------------------------------------------


async def test_job_with_not_before_starts_when_due(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        due = datetime.now(UTC) + timedelta(seconds=1.5)
        scheduled, immediate = await roles.submit(not_before=due), await roles.submit()
        await roles.wait_until_finished(immediate)
        await roles.wait_until_finished(scheduled)
        claimed = await roles.wait_for_event(JobClaimed, scheduled)
        assert timedelta(milliseconds=-1) <= claimed.time - due < MAX_DELAY


async def test_worker_started_later_starts_due_job_without_polling(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.submit(not_before=datetime(2100, 1, 1, tzinfo=UTC))
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions()) as worker_roles:
            assert worker_roles.worker is not None
            worker = worker_roles.worker
            await poll_until(lambda: worker._claim_queue._timer is not None, "the worker has set its timer")
            queries = await _count_queue_queries(roles)
            await asyncio.sleep(1)
            assert await _count_queue_queries(roles) == queries, "the worker polls"
        due = datetime.now(UTC) + timedelta(seconds=1.5)
        scheduled = await roles.submit(not_before=due)
        await roles.wait_for_views()
        async with run_roles_in_process(connection, store, worker=WorkerOptions()):
            await roles.wait_until_finished(scheduled)
        claimed = await roles.wait_for_event(JobClaimed, scheduled)
        assert timedelta(milliseconds=-1) <= claimed.time - due < MAX_DELAY


async def _count_queue_queries(roles: RunningRoles) -> int:
    """Return how often the view `queue` was read, by any client."""
    top = await roles.db.client.admin.command("top")
    return int(top["totals"][f"{roles.connection.db_name}.queue"]["queries"]["count"])
