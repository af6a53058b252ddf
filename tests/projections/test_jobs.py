"""The view `jobs`: the concept's job document, complete, after everything that can happen to a job."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import (
    AddLogEntries,
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    CompleteJob,
    CompleteStep,
    ConfirmCancel,
    Delete,
    ExpireLease,
    FailAttempt,
    ReleaseJob,
    ReportProgress,
    RestartJob,
    Unarchive,
    UpdateJob,
)
from jobledger.ledger.domain.events import AccessControl, LogEntry, Webhook, truncate_to_milliseconds
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.projections.views import jobs
from jobledger.projections.views.list_index import index_for
from tests.projections.expected_views import make_failure, make_results
from tests.support.role_runner import RunningRoles, run_roles_in_process

WORKER = "worker-1"
LATER = truncate_to_milliseconds(datetime.now(UTC) + timedelta(hours=1))
# konzept.md, "Event-Job Collection": each field and what it holds when it holds something.
CONCEPT: dict[str, type] = {
    "job_id": str,
    "status": str,
    "created_at": datetime,
    "updated_at": datetime,
    "started_at": datetime,
    "completed_at": datetime,
    "parameters": dict,
    "webhook": dict,
    "batch_id": str,
    "progress": dict,
    "results": dict,
    "error": dict,
    "logs": list,
    "worker_id": str,
    "retries": int,
    "priority": int,
    "user_id": str,
    "access_control": dict,
}


@pytest.fixture
async def here(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    async with run_roles_in_process(connection, store, projector=True) as running:
        yield running


async def after(here: RunningRoles, job_id: str, *commands: Any) -> Document:
    """The job's document once the commands have had their effect, checked for what is true of every document."""
    recorded = await here.handle_commands(job_id, *commands)
    assert recorded, "nothing happened"
    await here.wait_for_views(recorded[-1].position)
    job = await here.db.jobs.find_one({"_id": job_id})
    assert job is not None
    assert (job["position"], job["version"]) == (recorded[-1].position, recorded[-1].version)
    assert job["updated_at"] == recorded[-1].time
    for name, kind in CONCEPT.items():
        assert job[name] is None or type(job[name]) is kind, f"{name} is {job[name]!r}"
    return job


async def claimed(here: RunningRoles, **fields: Any) -> str:
    job_id = await here.submit(**fields)
    await here.claim(job_id)
    return job_id


async def test_a_submitted_job_has_every_field_of_the_concept(here: RunningRoles) -> None:
    access = AccessControl(visibility="team", read_access=["user-456"], write_access=["user-1"], admin_access=["a"])
    webhook = Webhook(url="https://example.com/hook", header_names=["Authorization"], include_markdown=True)
    parameters = {"event": "FOSDEM", "track": "Databases", "speakers": ["A", "B"], "a.b": 1, "deep": {"list": [None]}}
    job_id = await here.submit(
        parameters, priority=7, webhook=webhook, access_control=access, batch_id="batch-1", not_before=LATER
    )
    await here.wait_for_views()
    job = await here.load_job(job_id)

    assert job["_id"] == job["job_id"] == job_id
    assert set(CONCEPT) <= set(job)
    assert job["status"] == "pending"
    assert job["created_at"] == job["updated_at"]
    assert job["created_at"].tzinfo is not None
    assert job["parameters"] == parameters
    assert job["webhook"] == {
        "url": "https://example.com/hook",
        "headers": {"Authorization": "***"},
        "include_markdown": True,
        "include_metadata": False,
        "has_own_secrets": False,
    }
    assert job["progress"] == {"step": "waiting", "percent": 0.0, "message": "Waiting for a worker"}
    assert job["access_control"] == access.model_dump()
    assert (job["batch_id"], job["user_id"], job["priority"], job["retries"]) == ("batch-1", "user-1", 7, 0)
    assert [job[name] for name in ("started_at", "completed_at", "results", "error", "worker_id")] == [None] * 5
    assert job["logs"] == []
    assert job["due_at"] == LATER
    assert (job["version"], job["position"], job["queued_position"]) == (1, 1, 1)


async def test_a_claimed_job_names_its_worker_and_when_it_was_begun(here: RunningRoles) -> None:
    job_id = await here.submit()
    await here.claim(job_id)
    job = await after(here, job_id, ReportProgress(WORKER, 1, "downloading_video", 60.5, "Video wird verarbeitet"))
    assert (job["status"], job["worker_id"], job["attempt"]) == ("processing", WORKER, 1)
    assert job["created_at"] <= job["started_at"] <= job["updated_at"]
    assert job["progress"] == {"step": "downloading_video", "percent": 60.5, "message": "Video wird verarbeitet"}


async def test_a_job_carries_the_newest_hundred_log_lines(here: RunningRoles) -> None:
    job_id = await claimed(here)
    now = truncate_to_milliseconds(datetime.now(UTC))
    lines = [LogEntry(timestamp=now, level="info", message=f"line {number}") for number in range(250)]
    await here.handle_commands(
        job_id, AddLogEntries(WORKER, 1, tuple(lines[:30])), AddLogEntries(WORKER, 1, tuple(lines[30:130]))
    )
    job = await after(here, job_id, AddLogEntries(WORKER, 1, tuple(lines[130:])))
    assert [line["message"] for line in job["logs"]] == [f"line {number}" for number in range(150, 250)]
    assert job["logs"][-1] == {"timestamp": now, "level": "info", "message": "line 249"}


async def test_talkative_jobs_do_not_outgrow_the_largest_document(here: RunningRoles) -> None:
    job_id = await claimed(here)
    now = datetime.now(UTC)
    for letter in "abc":
        line = LogEntry(timestamp=now, level="debug", message=letter * 7_000_000)
        await here.handle_commands(job_id, AddLogEntries(WORKER, 1, (line,)))
    job = await after(here, job_id, ReportProgress(WORKER, 1, "page", 1.0, "after the flood"))
    assert [line["message"][0] for line in job["logs"]] == ["a", "b", "c"]


async def test_of_a_finished_step_it_is_shown_what_it_took_and_not_what_it_yielded(here: RunningRoles) -> None:
    job_id = await claimed(here)
    await here.wait_for_views()
    before = await here.load_job(job_id)
    job = await after(here, job_id, CompleteStep(WORKER, 1, "page", "key", {"big": "output"}, 1.0))
    changed = {name for name in job if job[name] != before[name]}
    assert changed <= {"steps", "updated_at", "version", "position"}
    assert job["version"] == before["version"] + 1
    [step] = job["steps"]
    assert (step["step"], step["key"], step["duration_s"], step["version"]) == ("page", "key", 1.0, job["version"])
    assert "output" not in step


async def test_a_completed_job_has_its_results(here: RunningRoles) -> None:
    job_id = await claimed(here)
    yielded = make_results(job_id, tokens=1500)
    job = await after(here, job_id, CompleteJob(WORKER, 1, yielded))
    assert job["status"] == "completed"
    assert job["completed_at"] == job["updated_at"] >= job["started_at"]
    assert job["results"] == yielded.model_dump()
    assert type(job["results"]["metadata"]["processed_at"]) is datetime
    assert type(job["results"]["metadata"]["duration"]) is float
    assert type(job["results"]["metadata"]["tokens_used"]) is int
    assert job["progress"]["percent"] == 100.0
    assert (job["worker_id"], job["error"]) == (WORKER, None)
    row = await here.db.files.find_one({"path": f"{job_id}/a.md"})
    assert row is not None
    assert (row["job_id"], row["size"], row["sha256"]) == (job_id, 3, "0" * 64)
    assert (row["modified_at"], row["position"]) == (job["completed_at"], job["position"])


async def test_a_failed_job_says_why(here: RunningRoles) -> None:
    job_id = await claimed(here)
    job = await after(here, job_id, FailAttempt(WORKER, 1, make_failure("no page"), None))
    assert (job["status"], job["retries"]) == ("failed", 0)
    assert job["error"] == {"code": "BROKEN", "message": "no page", "details": {"retryable": True}}
    assert job["completed_at"] == job["updated_at"]
    assert (job["logs"][-1]["level"], job["logs"][-1]["message"]) == ("error", "Failed: no page")


async def test_a_job_that_is_to_be_tried_again_waits_for_its_time(here: RunningRoles) -> None:
    job_id = await claimed(here)
    job = await after(here, job_id, FailAttempt(WORKER, 1, make_failure("a 503"), LATER))
    assert (job["status"], job["retries"], job["worker_id"], job["due_at"]) == ("pending", 1, None, LATER)
    assert job["error"]["message"] == "a 503"
    assert job["completed_at"] is None
    row = await here.db.queue.find_one({"_id": job_id})
    assert row is not None
    assert (row["due_at"], row["queued_position"]) == (LATER, job["queued_position"])


async def test_a_lost_worker_costs_a_retry_and_a_shutdown_does_not(here: RunningRoles) -> None:
    job_id = await claimed(here)
    job = await after(here, job_id, ReleaseJob(WORKER, 1, "the worker shuts down"))
    assert (job["status"], job["retries"], job["worker_id"], job["due_at"]) == ("pending", 0, None, None)
    await here.claim(job_id)
    job = await after(here, job_id, ExpireLease(WORKER, 2))
    assert (job["status"], job["retries"], job["worker_id"], job["due_at"]) == ("pending", 1, None, None)
    assert [line["level"] for line in job["logs"]] == ["info", "warning"]
    assert not any(WORKER in line["message"] for line in job["logs"])  # readers of the job see them


async def test_a_running_job_is_cancelled_in_two_steps(here: RunningRoles) -> None:
    job_id = await claimed(here)
    job = await after(here, job_id, CancelJob("user-1", "no need"))
    assert (job["status"], job["cancel_requested"]) == ("processing", True)
    job = await after(here, job_id, ConfirmCancel(WORKER, 1))
    assert (job["status"], job["cancel_requested"]) == ("cancelled", False)
    assert job["completed_at"] == job["updated_at"]


async def test_a_restarted_job_begins_anew_and_queues_at_the_end(here: RunningRoles) -> None:
    job_id = await claimed(here)
    now = datetime.now(UTC)
    await here.handle_commands(
        job_id, FailAttempt(WORKER, 1, make_failure(), LATER), UpdateJob("user-1", not_before=now)
    )
    await here.claim(job_id)
    await after(here, job_id, CompleteJob(WORKER, 2, make_results(job_id)))
    job = await after(here, job_id, RestartJob("user-1"))
    fresh = ("started_at", "completed_at", "results", "error", "worker_id", "due_at")
    assert [job[name] for name in fresh] == [None] * len(fresh)
    assert (job["status"], job["retries"], job["attempt"]) == ("pending", 0, 2)
    assert job["queued_position"] == job["position"]
    assert await here.db.files.count_documents({}) == 0
    assert await here.claim(job_id) == 3


async def test_a_waiting_job_can_be_changed(here: RunningRoles) -> None:
    job_id = await here.submit({"track": "A"}, priority=1)
    job = await after(here, job_id, UpdateJob("user-1", {"track": "B"}, 9, LATER))
    assert (job["parameters"], job["priority"], job["due_at"]) == ({"track": "B"}, 9, LATER)
    job = await after(here, job_id, UpdateJob("user-1", priority=0))
    assert (job["parameters"], job["priority"], job["due_at"]) == ({"track": "B"}, 0, LATER)
    row = await here.db.queue.find_one({"_id": job_id})
    assert row is not None
    assert (row["priority"], row["due_at"], row["position"]) == (0, LATER, job["position"])


async def test_access_and_archive_are_shown(here: RunningRoles) -> None:
    job_id = await here.submit()
    access = AccessControl(visibility="public", read_access=["team-marketing"])
    job = await after(here, job_id, ChangeAccess("user-1", access), Archive("user-1"))
    assert (job["access_control"], job["archived"]) == (access.model_dump(), True)
    job = await after(here, job_id, Unarchive("user-1"))
    assert job["archived"] is False


async def test_a_deleted_job_is_in_no_view_and_stays_so_whatever_a_zombie_says(here: RunningRoles) -> None:
    job_id = await claimed(here, parameters={"track": "A"})
    await here.handle_commands(job_id, CompleteJob(WORKER, 1, make_results(job_id)), Delete("user-1", "by mistake"))
    await here.wait_for_views()
    for view in ("jobs", "queue", "files"):
        assert await here.db[view].count_documents({}) == 0, view
    assert await jobs.get(here.checkpoint.views, here.event_store, job_id) is None
    assert await jobs.find_jobs_of_worker(here.checkpoint.views, WORKER) == []


async def test_who_runs_what_is_found_among_the_jobs_that_run(here: RunningRoles) -> None:
    for _ in range(3):
        await here.submit()
    mine, other = await claimed(here), await here.submit()
    await here.handle_commands(other, ClaimJob("elsewhere", datetime.now(UTC)))
    ended = await claimed(here)
    await here.handle_commands(ended, CompleteJob(WORKER, 1, make_results(ended)))
    await here.wait_for_views()
    views = here.checkpoint.views
    assert await jobs.count_running_by_worker(views) == {WORKER: 1, "elsewhere": 1}
    assert [(job["_id"], job["attempt"]) for job in await jobs.find_jobs_of_worker(views, WORKER)] == [(mine, 1)]
    looked: list[int] = []
    for asked in (
        {"find": "jobs", "filter": {**jobs._RUNNING, "worker_id": WORKER}},
        {"aggregate": "jobs", "pipeline": [{"$match": jobs._RUNNING}], "cursor": {}},
    ):
        hint = dict(index_for(jobs._RUNNING))
        told = await here.db.command({"explain": {**asked, "hint": hint}, "verbosity": "executionStats"})
        looked.append(told["executionStats"]["totalDocsExamined"])
    assert looked == [2, 2]


async def test_a_job_that_the_views_have_not_reached_is_folded_from_the_log(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as here:
        job_id = await claimed(here)
        job = await here.load_job(job_id)
        assert (job["status"], job["version"]) == ("processing", 2)
        assert await here.db.jobs.count_documents({}) == 0
