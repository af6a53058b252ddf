"""The view `jobs`: the complete document of a job after each kind of event."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    ChangeAccess,
    ClaimJob,
    ConfirmCancel,
    Delete,
    ExpireLease,
    FailAttempt,
    ReleaseJob,
    RestartJob,
    Unarchive,
    UpdateJob,
)
from jobledger.ledger.domain.events import AccessControl, LogEntry, Webhook, truncate_to_milliseconds
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.projections.views import job_list, jobs
from tests.projections.expected_views import make_failure, make_results
from tests.support.role_runner import RunningRoles, run_roles_in_process
from tests.support.worker_reports import report_log, report_progress, report_results, report_step

WORKER = "worker-1"
LATER = truncate_to_milliseconds(datetime.now(UTC) + timedelta(hours=1))
# konzept.md, "Event-Job Collection": each field and its type when it has a value.
DOCUMENT_FIELDS: dict[str, type] = {
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


async def load_job_after(roles: RunningRoles, job_id: str, *commands: Any) -> Document:
    """Handle commands, wait for the views, check what is true of every document, and return the document."""
    recorded = await roles.handle_commands(job_id, *commands)
    assert recorded, "the commands caused no event"
    await roles.wait_for_views(recorded[-1].position)
    job = await roles.db.jobs.find_one({"_id": job_id})
    assert job is not None
    assert (job["position"], job["version"]) == (recorded[-1].position, recorded[-1].version)
    assert job["updated_at"] == recorded[-1].time
    for name, type_ in DOCUMENT_FIELDS.items():
        assert job[name] is None or type(job[name]) is type_, f"{name} is {job[name]!r}"
    return job


async def submit_claimed_job(roles: RunningRoles, **fields: Any) -> str:
    job_id = await roles.submit(**fields)
    await roles.claim(job_id)
    return job_id


async def test_submitted_job_has_all_document_fields(roles: RunningRoles) -> None:
    access = AccessControl(visibility="team", read_access=["user-456"], write_access=["user-1"], admin_access=["a"])
    webhook = Webhook(url="https://example.com/hook", header_names=["Authorization"], include_markdown=True)
    parameters = {"event": "FOSDEM", "track": "Databases", "speakers": ["A", "B"], "a.b": 1, "deep": {"list": [None]}}
    job_id = await roles.submit(
        parameters, priority=7, webhook=webhook, access_control=access, batch_id="batch-1", not_before=LATER
    )
    await roles.wait_for_views()
    job = await roles.load_job(job_id)

    assert job["_id"] == job["job_id"] == job_id
    assert set(DOCUMENT_FIELDS) <= set(job)
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


async def test_claimed_job_has_worker_and_start_time(roles: RunningRoles) -> None:
    job_id = await roles.submit()
    await roles.claim(job_id)
    job = await load_job_after(
        roles, job_id, report_progress(WORKER, 1, "downloading_video", 60.5, "Video wird verarbeitet")
    )
    assert (job["status"], job["worker_id"], job["attempt"]) == ("processing", WORKER, 1)
    assert job["created_at"] <= job["started_at"] <= job["updated_at"]
    assert job["progress"] == {"step": "downloading_video", "percent": 60.5, "message": "Video wird verarbeitet"}


async def test_job_document_has_the_newest_hundred_log_lines(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles)
    now = truncate_to_milliseconds(datetime.now(UTC))
    lines = [LogEntry(timestamp=now, level="info", message=f"line {number}") for number in range(250)]
    await roles.handle_commands(
        job_id, report_log(WORKER, 1, tuple(lines[:30])), report_log(WORKER, 1, tuple(lines[30:130]))
    )
    job = await load_job_after(roles, job_id, report_log(WORKER, 1, tuple(lines[130:])))
    assert [line["message"] for line in job["logs"]] == [f"line {number}" for number in range(150, 250)]
    assert job["logs"][-1] == {"timestamp": now, "level": "info", "message": "line 249"}


async def test_job_with_large_log_lines_fits_into_a_document(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles)
    now = datetime.now(UTC)
    for letter in "abc":
        line = LogEntry(timestamp=now, level="debug", message=letter * 7_000_000)
        await roles.handle_commands(job_id, report_log(WORKER, 1, (line,)))
    job = await load_job_after(roles, job_id, report_progress(WORKER, 1, "page", 1.0, "after the log lines"))
    assert [line["message"][0] for line in job["logs"]] == ["a", "b", "c"]


async def test_completed_step_is_shown_without_its_output(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles)
    await roles.wait_for_views()
    before = await roles.load_job(job_id)
    job = await load_job_after(roles, job_id, report_step(WORKER, 1, "page", "key", {"big": "output"}, 1.0))
    changed = {name for name in job if job[name] != before[name]}
    assert changed <= {"steps", "updated_at", "version", "position"}
    assert job["version"] == before["version"] + 1
    [step] = job["steps"]
    assert (step["step"], step["key"], step["duration_s"], step["version"]) == ("page", "key", 1.0, job["version"])
    assert "output" not in step


async def test_completed_job_has_its_results(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles)
    results = make_results(job_id, tokens=1500)
    job = await load_job_after(roles, job_id, report_results(WORKER, 1, results))
    assert job["status"] == "completed"
    assert job["completed_at"] == job["updated_at"] >= job["started_at"]
    assert job["results"] == {"output": None, **results.model_dump()}
    assert type(job["results"]["metadata"]["processed_at"]) is datetime
    assert type(job["results"]["metadata"]["duration"]) is float
    assert type(job["results"]["metadata"]["tokens_used"]) is int
    assert job["progress"]["percent"] == 100.0
    assert (job["worker_id"], job["error"]) == (WORKER, None)
    row = await roles.db.files.find_one({"path": f"{job_id}/a.md"})
    assert row is not None
    assert (row["job_id"], row["size"], row["sha256"]) == (job_id, 3, "0" * 64)
    assert (row["modified_at"], row["position"]) == (job["completed_at"], job["position"])


async def test_failed_job_has_its_error(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles)
    job = await load_job_after(roles, job_id, FailAttempt(WORKER, 1, make_failure("no page"), None))
    assert (job["status"], job["retries"]) == ("failed", 0)
    assert job["error"] == {"code": "BROKEN", "message": "no page", "details": {"retryable": True}}
    assert job["completed_at"] == job["updated_at"]
    assert (job["logs"][-1]["level"], job["logs"][-1]["message"]) == ("error", "Failed: no page")


async def test_failed_attempt_with_retry_sets_the_due_time(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles)
    job = await load_job_after(roles, job_id, FailAttempt(WORKER, 1, make_failure("a 503"), LATER))
    assert (job["status"], job["retries"], job["worker_id"], job["due_at"]) == ("pending", 1, None, LATER)
    assert job["error"]["message"] == "a 503"
    assert job["completed_at"] is None
    row = await roles.db.queue.find_one({"_id": job_id})
    assert row is not None
    assert (row["due_at"], row["queued_position"]) == (LATER, job["queued_position"])


async def test_expired_lease_counts_a_retry_and_a_release_does_not(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles)
    job = await load_job_after(roles, job_id, ReleaseJob(WORKER, 1, "the worker shuts down"))
    assert (job["status"], job["retries"], job["worker_id"], job["due_at"]) == ("pending", 0, None, None)
    await roles.claim(job_id)
    job = await load_job_after(roles, job_id, ExpireLease(WORKER, 2))
    assert (job["status"], job["retries"], job["worker_id"], job["due_at"]) == ("pending", 1, None, None)
    assert [line["level"] for line in job["logs"]] == ["info", "warning"]
    assert not any(WORKER in line["message"] for line in job["logs"])  # readers of the job see them


async def test_running_job_is_cancelled_after_the_worker_confirms(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles)
    job = await load_job_after(roles, job_id, CancelJob("user-1", "no need"))
    assert (job["status"], job["cancel_requested"]) == ("processing", True)
    job = await load_job_after(roles, job_id, ConfirmCancel(WORKER, 1))
    assert (job["status"], job["cancel_requested"]) == ("cancelled", False)
    assert job["completed_at"] == job["updated_at"]


async def test_restarted_job_is_reset_and_queued_at_the_end(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles)
    now = datetime.now(UTC)
    await roles.handle_commands(
        job_id, FailAttempt(WORKER, 1, make_failure(), LATER), UpdateJob("user-1", not_before=now)
    )
    await roles.claim(job_id)
    await load_job_after(roles, job_id, report_results(WORKER, 2, make_results(job_id)))
    job = await load_job_after(roles, job_id, RestartJob("user-1"))
    reset_fields = ("started_at", "completed_at", "results", "error", "worker_id", "due_at")
    assert [job[name] for name in reset_fields] == [None] * len(reset_fields)
    assert (job["status"], job["retries"], job["attempt"]) == ("pending", 0, 2)
    assert job["queued_position"] == job["position"]
    assert await roles.db.files.count_documents({}) == 0
    assert await roles.claim(job_id) == 3


async def test_update_of_a_pending_job_changes_job_and_queue(roles: RunningRoles) -> None:
    job_id = await roles.submit({"track": "A"}, priority=1)
    job = await load_job_after(roles, job_id, UpdateJob("user-1", {"track": "B"}, 9, LATER))
    assert (job["parameters"], job["priority"], job["due_at"]) == ({"track": "B"}, 9, LATER)
    job = await load_job_after(roles, job_id, UpdateJob("user-1", priority=0))
    assert (job["parameters"], job["priority"], job["due_at"]) == ({"track": "B"}, 0, LATER)
    row = await roles.db.queue.find_one({"_id": job_id})
    assert row is not None
    assert (row["priority"], row["due_at"], row["position"]) == (0, LATER, job["position"])


async def test_access_and_archive_changes_are_in_the_document(roles: RunningRoles) -> None:
    job_id = await roles.submit()
    access = AccessControl(visibility="public", read_access=["team-marketing"])
    job = await load_job_after(roles, job_id, ChangeAccess("user-1", access), Archive("user-1"))
    assert (job["access_control"], job["archived"]) == (access.model_dump(), True)
    job = await load_job_after(roles, job_id, Unarchive("user-1"))
    assert job["archived"] is False


async def test_deleted_job_is_in_no_view(roles: RunningRoles) -> None:
    job_id = await submit_claimed_job(roles, parameters={"track": "A"})
    await roles.handle_commands(job_id, report_results(WORKER, 1, make_results(job_id)), Delete("user-1", "by mistake"))
    await roles.wait_for_views()
    for view in ("jobs", "job_list", "queue", "files"):
        assert await roles.db[view].count_documents({}) == 0, view
    assert await jobs.get(roles.checkpoint.views, roles.event_store, job_id) is None
    assert await job_list.find_jobs_of_worker(roles.checkpoint.views, WORKER) == []


async def test_running_jobs_of_a_worker_are_found_by_index(roles: RunningRoles) -> None:
    for _ in range(3):
        await roles.submit()
    own_job, other_job = await submit_claimed_job(roles), await roles.submit()
    await roles.handle_commands(other_job, ClaimJob("worker-2", datetime.now(UTC)))
    completed_job = await submit_claimed_job(roles)
    await roles.handle_commands(completed_job, report_results(WORKER, 1, make_results(completed_job)))
    await roles.wait_for_views()
    views = roles.checkpoint.views
    assert await job_list.count_running_by_worker(views) == {WORKER: 1, "worker-2": 1}
    assert [(job["_id"], job["attempt"]) for job in await job_list.find_jobs_of_worker(views, WORKER)] == [(own_job, 1)]
    query = job_list._build_status_query("processing")
    command = {"find": "job_list", "filter": query.filter, "hint": dict(query.hint)}
    plan = await roles.db.command({"explain": command, "verbosity": "executionStats"})
    assert plan["executionStats"]["totalDocsExamined"] == 2


async def test_job_missing_in_the_views_is_folded_from_the_log(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        job_id = await submit_claimed_job(roles)
        job = await roles.load_job(job_id)
        assert (job["status"], job["version"]) == ("processing", 2)
        assert await roles.db.jobs.count_documents({}) == 0
