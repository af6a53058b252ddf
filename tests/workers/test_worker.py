"""The worker: wakes, claims, runs, reports. No job waits for ever, and none is done twice."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
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
    Recorded,
)
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.lease import OVER
from jobledger.ledger.store.command_handler import Handled, handle
from jobledger.ledger.store.envelope import Append
from jobledger.ledger.store.event_store import EventLog
from jobledger.workers.processor import Job, ProcessorError, Results
from tests.support.running import Process, WorkerOptions, process, until
from tests.workers.inline import install


async def claims(here: Process, *job_ids: str) -> list[int]:
    """How often each of the jobs was claimed."""
    counted = Counter(event.stream for event in await here.everything() if isinstance(event.event, JobClaimed))
    return [counted[job_id] for job_id in job_ids]


async def order_of_claims(here: Process) -> list[str]:
    return [event.stream for event in await here.everything() if isinstance(event.event, JobClaimed)]


# One job --------------------------------------------------------------------------------------------------------------


async def test_an_echo_job_is_done_and_its_file_is_in_the_store(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit({"text": "Grüße"})
        job = await here.ended(job_id)
        assert (job["status"], job["retries"], job["attempt"], job["error"]) == ("completed", 0, 1, None)
        (file,) = job["results"]["files"]
        content = here.store.path(file["sha256"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
        assert (file["size"], file["path"]) == (len(content), f"echo/{job_id}/echo.md")
        assert '"text":"Grüße"' in content.decode()
        assert job["results"]["markdown_file"] == f"/events/{file['path']}"
        assert job["results"]["markdown_url"] == f"/api/events/files/{file['path']}"
        assert await here.history(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]


async def test_what_will_not_pass_fails_at_once(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job = await here.ended(await here.submit({"fail": "no such talk"}))
        assert (job["status"], job["retries"], job["attempt"]) == ("failed", 0, 1)
        assert job["error"]["code"] == "ECHO_FAILED"
        assert job["error"]["message"] == "no such talk"
        assert job["error"]["details"] == {"retryable": False}


async def test_what_may_pass_is_tried_again_until_the_attempts_are_used_up(connection: Connection, store: Path) -> None:
    options = WorkerOptions(retry_base_seconds=0.2)
    async with process(connection, store, projector=True, worker=options) as here:
        job_id = await here.submit({"fail": "busy", "transient": True}, max_attempts=3)
        job = await here.ended(job_id)
        assert (job["status"], job["retries"], job["attempt"]) == ("failed", 2, 3)
        assert job["error"]["details"] == {"retryable": True}
        events = await here.log.read_stream(job_id)
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
    async def talk(job: Job) -> Results:
        for number in range(1000):
            await job.progress(number / 10, f"number {number}")
            await job.log("info", f"line {number}")
            await asyncio.sleep(0.001)
        return Results()

    install(monkeypatch, talk)
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit(job_type="test")
        job = await here.ended(job_id)
        history = Counter(await here.history(job_id))
        assert 1 <= history["JobProgressed"] <= 12
        assert 1 <= history["JobLogged"] <= 12
        assert [line["message"] for line in job["logs"]] == [f"line {number}" for number in range(900, 1000)]
        told = [event.event for event in await here.log.read_stream(job_id)]
        percents = [event.percent for event in told if isinstance(event, JobProgressed)]
        assert percents == sorted(percents)


async def test_a_job_tells_how_far_it_is_while_it_runs(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit({"seconds": 1.2})
        progressed = await here.heard(JobProgressed, job_id)
        await here.views_reach(progressed.position)
        job = await here.job(job_id)
        assert (job["status"], job["progress"]["percent"]) == ("processing", 0.0)
        assert (await here.ended(job_id))["status"] == "completed"


async def test_nothing_is_said_for_an_attempt_after_its_end(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Log lines and progress are on their way, in two appends, when the job is done: it must come last."""
    done = asyncio.Event()

    async def talk(job: Job) -> Results:
        await job.log("info", "a line")
        await job.progress(50, "half")
        await done.wait()
        return Results()

    class Slow(EventLog):
        async def append(self, *appends: Append) -> list[Recorded]:
            logged = any(type(event).__name__ == "JobLogged" for append in appends for event in append.events)
            recorded = await super().append(*appends)
            if logged:
                done.set()
                await asyncio.sleep(0.1)
            return recorded

    install(monkeypatch, talk)
    async with process(connection, store, projector=True, worker=WorkerOptions(), log_class=Slow) as here:
        job_id = await here.submit(job_type="test")
        await here.ended(job_id)
    async with process(connection, store) as here:
        expected = ["JobSubmitted", "JobClaimed", "JobLogged", "JobProgressed", "JobCompleted"]
        assert await here.history(job_id) == expected


async def test_finished_steps_are_not_repeated_by_the_next_attempt(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []

    async def steps(job: Job) -> Results:
        async def page() -> Any:
            ran.append("page")
            await job.warn("it was thin")
            return {"text": "hello"}

        assert await job.step("page", {"url": "a"}, page) == {"text": "hello"}
        if job.attempt == 1:
            raise ProcessorError("LATER", "come back later", transient=True)
        return Results(metadata={"attempt": job.attempt})

    install(monkeypatch, steps)
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit(job_type="test")
        job = await here.ended(job_id)
        assert (job["status"], ran) == ("completed", ["page"])
        assert job["results"]["metadata"]["warnings"] == ["it was thin"]
        assert job["results"]["metadata"]["attempt"] == 2
        position = await here.log.head()
        await here.do(job_id, RestartJob("user-1", reuse_steps=False))
        await here.heard(JobCompleted, job_id, after=position)
        assert ran == ["page", "page"]


@pytest.mark.parametrize("kind", ["crash", "nonsense", "nothing stored"])
async def test_a_fault_in_a_processor_ends_the_job_and_not_the_worker(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    async def faulty(job: Job) -> Results:
        if kind == "crash":
            raise ZeroDivisionError("oh")
        if kind == "nonsense":
            return Results(metadata={"a": float("nan")})
        await job.step("page", {}, lambda: asyncio.sleep(0, {"big": "x" * 9_000_000}))
        return Results()

    install(monkeypatch, faulty)
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job = await here.ended(await here.submit(job_type="test", max_attempts=1))
        assert job["status"] == "failed"
        assert job["error"]["code"] in ("PROCESSOR_FAULT", "INVALID_RESULT", "WORKER_FAULT")
        assert (await here.ended(await here.submit()))["status"] == "completed"


# Many jobs ------------------------------------------------------------------------------------------------------------


async def test_more_jobs_than_slots_are_all_done(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True, worker=WorkerOptions(slots=3)) as here:
        batch_id, job_ids = await here.submit_batch(*({"seconds": 0.05} for _ in range(40)))
        await here.ended(*job_ids)
        assert await claims(here, *job_ids) == [1] * 40
        assert (await here.batch(batch_id))["completed_jobs"] == 40


async def test_there_are_never_more_running_than_slots(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, most = 0, 0

    async def count(job: Job) -> Results:
        nonlocal now, most
        now += 1
        most = max(most, now)
        await asyncio.sleep(0.1)
        now -= 1
        return Results()

    install(monkeypatch, count)
    async with process(connection, store, projector=True, worker=WorkerOptions(slots=3)) as here:
        _, first = await here.submit_batch(*({} for _ in range(10)), job_type="test")
        second = [await here.submit(job_type="test") for _ in range(10)]
        await here.ended(*first, *second)
    assert most == 3


async def test_what_was_submitted_while_nobody_worked_is_done_most_urgent_first(
    connection: Connection, store: Path
) -> None:
    async with process(connection, store, projector=True) as here:
        job_ids = [await here.submit(priority=priority) for priority in (1, 3, 2, 3)]
        await here.views_reach()
        async with process(connection, store, worker=WorkerOptions(slots=1), deaf=True):
            await here.ended(*job_ids)
        low, high, middle, high_too = job_ids
        assert await order_of_claims(here) == [high, high_too, middle, low]


async def test_what_is_submitted_while_the_worker_is_busy_is_done_most_urgent_first(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = asyncio.Event()

    async def wait(job: Job) -> Results:
        await free.wait()
        return Results()

    install(monkeypatch, wait)
    async with process(connection, store, projector=True, worker=WorkerOptions(slots=1)) as here:
        first = await here.submit(job_type="test")
        await here.heard(JobClaimed, first)
        low, high = await here.submit(job_type="test", priority=1), await here.submit(job_type="test", priority=5)
        await here.views_reach()
        free.set()
        await here.ended(first, low, high)
        assert await order_of_claims(here) == [first, high, low]


async def test_two_workers_share_and_no_job_is_run_twice(connection: Connection, store: Path) -> None:
    options = WorkerOptions(slots=2)
    async with (
        process(connection, store, projector=True) as here,
        process(connection, store, worker=options, deaf=True),
        process(connection, store, worker=options, deaf=True),
    ):
        _, job_ids = await here.submit_batch(*({"seconds": 0.1} for _ in range(30)))
        job_ids += [await here.submit({"seconds": 0.1}) for _ in range(10)]
        await here.ended(*job_ids)
        assert await claims(here, *job_ids) == [1] * 40
        events = [event.event for event in await here.everything()]
        assert len({event.worker_id for event in events if isinstance(event, JobClaimed)}) == 2
        assert not [event for event in events if type(event).__name__ == "WorkerFenced"]


async def test_lost_races_leave_nothing_behind(connection: Connection, store: Path) -> None:
    """A row that is wrong, and stays, is tried once."""
    async with process(connection, store, projector=True) as here:
        job_id = await here.submit()
        await here.views_reach()
        row = await here.db.queue.find_one({"_id": job_id})
        assert row is not None
        await here.claim(job_id)
        await here.views_reach()
        await here.db.queue.insert_one(row)
        async with process(connection, store, worker=WorkerOptions(slots=1)) as there:
            worker = there.worker
            assert worker is not None
            await until(lambda: worker._claims._left == {job_id}, "the worker tried and lost")
            (await here.ended(await here.submit()))  # a stale row does not hide a fresh job


# Waiting for a time ---------------------------------------------------------------------------------------------------


async def test_a_job_is_begun_when_its_time_has_come_and_not_before(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        due = datetime.now(UTC) + timedelta(seconds=1.5)
        waits, fresh = await here.submit(not_before=due), await here.submit()
        await here.ended(fresh)
        await here.ended(waits)
        claimed = await here.heard(JobClaimed, waits)
        assert timedelta(milliseconds=-1) <= claimed.time - due < timedelta(seconds=1)


async def test_a_worker_that_starts_later_knows_the_times_too_and_asks_for_nothing_meanwhile(
    connection: Connection, store: Path
) -> None:
    async with process(connection, store, projector=True) as here:
        due = datetime.now(UTC) + timedelta(seconds=3)
        waits = await here.submit(not_before=due)
        await here.views_reach()
        async with process(connection, store, worker=WorkerOptions()) as there:
            assert there.worker is not None
            worker = there.worker
            await until(lambda: worker._claims._timer is not None, "the worker has set its timer")
            queries = await _queries(here)
            await asyncio.sleep(1)
            assert await _queries(here) == queries, "the worker polls"
            await here.ended(waits)
        claimed = await here.heard(JobClaimed, waits)
        assert timedelta(milliseconds=-1) <= claimed.time - due < timedelta(seconds=1)


async def _queries(here: Process) -> int:
    """How often the view `queue` was read, by anybody."""
    top = await here.db.client.admin.command("top")
    return int(top["totals"][f"{here.connection.db_name}.queue"]["queries"]["count"])


# Cancelling and stopping ----------------------------------------------------------------------------------------------


async def test_a_running_job_is_cancelled_and_the_slot_is_free(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True, worker=WorkerOptions(slots=1)) as here:
        job_id = await here.submit({"seconds": 60})
        await here.heard(JobClaimed, job_id)
        await here.do(job_id, CancelJob("user-1", "enough"))
        job = await here.ended(job_id, seconds=3)
        assert job["status"] == "cancelled"
        assert (await here.ended(await here.submit()))["status"] == "completed"


async def test_a_cancellation_that_overtakes_the_claim_is_obeyed(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else sees the claim in the log, and cancels, before the claiming worker has heard that it won."""
    heard, told = asyncio.Event(), asyncio.Event()

    async def late(*arguments: Any, **named: Any) -> Handled:
        handled = await handle(*arguments, **named)
        if handled.events and isinstance(handled.events[0].event, JobClaimed):
            heard.set()
            await told.wait()
        return handled

    monkeypatch.setattr("jobledger.workers.worker.handle", late)
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit({"seconds": 60})
        await heard.wait()
        await here.do(job_id, CancelJob("user-1"))
        await here.heard(JobCancelRequested, job_id)
        told.set()
        assert (await here.ended(job_id, seconds=3))["status"] == "cancelled"


async def test_a_cancellation_missed_while_the_change_stream_was_closed_is_obeyed(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        process(connection, store, projector=True) as here,
        process(connection, store, worker=WorkerOptions(), deaf=True) as there,
    ):
        job_id = await here.submit({"seconds": 60})
        await here.heard(JobProgressed, job_id)
        assert there.worker is not None
        worker = there.worker
        # As if it had come while the stream was interrupted: only the resync can tell.
        with monkeypatch.context() as patched:
            patched.setattr(there.worker, "_running", {})
            await here.do(job_id, CancelJob("user-1"))
            await until(lambda: job_id in worker._cancels, "the worker has not noticed")
            worker._cancels.clear()
        async with there.db.client.start_session() as session:
            for listener in there.changes._listeners:
                await listener.resync(session)
        assert (await here.ended(job_id, seconds=3))["status"] == "cancelled"


async def test_a_job_given_back_at_shutdown_has_lost_no_attempt(connection: Connection, store: Path) -> None:
    async with process(connection, store, projector=True) as here:
        job_id = await here.submit({"seconds": 60}, max_attempts=1)
        async with process(connection, store, worker=WorkerOptions(shutdown_grace_seconds=0.1)):
            await here.heard(JobClaimed, job_id)
        released = await here.heard(JobReleased, job_id)
        await here.views_reach(released.position)
        job = await here.job(job_id)
        assert (job["status"], job["retries"], job["worker_id"]) == ("pending", 0, None)
        async with process(connection, store, worker=WorkerOptions()):
            claimed = await here.heard(JobClaimed, job_id, after=released.position)
            assert claimed.event.model_dump()["attempt"] == 2
            await here.do(job_id, CancelJob("user-1"))
            await here.ended(job_id)


async def test_a_worker_that_stops_lets_jobs_end_within_the_grace_time_and_claims_no_more(
    connection: Connection, store: Path
) -> None:
    async with process(connection, store, projector=True) as here:
        job_id = await here.submit({"seconds": 1})
        async with process(connection, store, worker=WorkerOptions(slots=2)) as there:
            await here.heard(JobClaimed, job_id)
            assert there.worker is not None
            there.worker.stop()
            late = await here.submit()
        job = await here.ended(job_id)
        assert job["status"] == "completed"
        assert await here.history(late) == ["JobSubmitted"]


async def test_a_claim_that_is_on_its_way_when_the_worker_stops_costs_no_attempt(
    connection: Connection, store: Path
) -> None:
    on_its_way, go_on = asyncio.Event(), asyncio.Event()

    class Slow(EventLog):
        async def _insert(self, todo: Any) -> Any:
            if any(waiting.documents[0]["type"] == "JobClaimed" for waiting in todo):
                on_its_way.set()
                await go_on.wait()
            return await super()._insert(todo)

    async with process(connection, store, projector=True) as here:
        job_id = await here.submit()
        async with process(connection, store, worker=WorkerOptions(lease_seconds=2), log_class=Slow) as there:
            async with asyncio.timeout(10):
                await on_its_way.wait()
            assert there.worker is not None
            assert there.working is not None
            there.worker.stop()
            asyncio.get_running_loop().call_later(0.3, go_on.set)
            await there.working
        async with process(connection, store, worker=WorkerOptions()):
            job = await here.ended(job_id)
        assert (job["status"], job["retries"]) == ("completed", 0)
        assert "JobLeaseExpired" not in await here.history(job_id)


async def test_a_job_whose_cancellation_was_overtaken_by_a_shutdown_is_not_run_again(
    connection: Connection, store: Path
) -> None:
    """The cancellation is on record; the worker that shut down gave the job back without having heard of it."""
    async with process(connection, store, projector=True) as here:
        job_id = await here.submit({"seconds": 60})
        await here.do(job_id, ClaimJob("worker-1", datetime.now(UTC)), CancelJob("user-1"))
        await here.do(job_id, ReleaseJob("worker-1", 1, "the worker shuts down"))
        async with process(connection, store, worker=WorkerOptions()):
            assert (await here.ended(job_id, seconds=3))["status"] == "cancelled"


# Losing the lease while stopping --------------------------------------------------------------------------------------


async def test_a_worker_that_loses_its_lease_in_the_grace_time_gives_up_at_once(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun = asyncio.Event()

    async def silent(job: Job) -> Results:
        """Says nothing, so it is not told either that its attempt is over."""
        begun.set()
        await asyncio.Event().wait()
        return Results()

    install(monkeypatch, silent)
    async with process(connection, store, projector=True) as here:
        job_id = await here.submit(job_type="test")
        options = WorkerOptions(lease_seconds=1.5, shutdown_grace_seconds=60)
        async with process(connection, store, worker=options) as there:
            async with asyncio.timeout(10):
                await begun.wait()
            assert there.worker is not None
            assert there.working is not None
            there.worker.stop()
            await here.db.workers.update_one({}, OVER)
            async with asyncio.timeout(5):
                await there.working
        assert "JobReleased" not in await here.history(job_id)


async def test_a_worker_that_cannot_give_its_jobs_back_ends_when_its_lease_would(
    connection: Connection, store: Path
) -> None:
    class Away(EventLog):
        async def append(self, *appends: Append) -> list[Recorded]:
            if any(isinstance(event, JobReleased) for append in appends for event in append.events):
                raise LedgerUnavailable("the database is away")
            return await super().append(*appends)

    async with process(connection, store, projector=True) as here:
        job_id = await here.submit({"seconds": 60})
        options = WorkerOptions(lease_seconds=1.5, shutdown_grace_seconds=0.1)
        async with process(connection, store, worker=options, log_class=Away) as there:
            await here.heard(JobProgressed, job_id)
            assert there.worker is not None
            assert there.working is not None
            there.worker.stop()
            async with asyncio.timeout(6):
                await there.working


# In doubt -------------------------------------------------------------------------------------------------------------


class Deaf:
    """Lets the first append of an event of one type land, and says that the database did not answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kind: type[JobClaimed | JobCompleted]) -> None:
        self.happened = False
        append = EventLog.append

        async def unheard(log: EventLog, *appends: Append) -> list[Recorded]:
            recorded = await append(log, *appends)
            if not self.happened and isinstance(appends[0].events[0], kind):
                self.happened = True
                raise LedgerUnavailable("no answer")
            return recorded

        monkeypatch.setattr(EventLog, "append", unheard)


@pytest.mark.parametrize("kind", [JobClaimed, JobCompleted])
async def test_a_report_that_landed_unheard_counts_and_is_not_made_again(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, kind: type[JobClaimed | JobCompleted]
) -> None:
    deaf = Deaf(monkeypatch, kind)
    async with process(connection, store, projector=True, worker=WorkerOptions()) as here:
        job_id = await here.submit()
        job = await here.ended(job_id)
        assert deaf.happened
        assert (job["status"], job["retries"]) == ("completed", 0)
        assert await here.history(job_id) == ["JobSubmitted", "JobClaimed", "JobCompleted"]
