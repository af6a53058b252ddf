"""`jobledger log history`, `log ls`, `log state` and `jobledger views …`."""

from __future__ import annotations

import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from jobledger.ledger.domain.commands import CancelJob, FailAttempt, PauseBatch, UpdateJob
from jobledger.ledger.domain.events import ErrorInfo
from jobledger.ledger.mongo.embedded_files import wait_until
from jobledger.projections.engine import rebuild
from jobledger.projections.views.waiting import KINDS, derive_waiting_for
from tests.cli.log.conftest import LedgerCommands, write_job_history, write_long_history
from tests.projections.expected_views import make_results
from tests.support.installation import Installation
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS
from tests.support.role_runner import RunningRoles
from tests.support.worker_reports import report_results

# log history ----------------------------------------------------------------------------------------------------------


def test_log_history_shows_actors_changes_and_results(ledger: LedgerCommands) -> None:
    job_id = ledger.run_with_roles(write_job_history)
    lines = ledger.run("log", "history", job_id).out.splitlines()
    assert "JobSubmitted echo 'Die Rede' by user-1" in lines[0]
    assert "status pending" in lines[1]
    assert any("JobClaimed attempt 1 on worker-7" in line for line in lines)
    assert any("status pending → processing" in line for line in lines)
    assert any("JobAttemptFailed BROKEN: it broke; retry at " in line for line in lines)
    assert any("JobCancelled" in line and "no longer wanted" in line for line in lines)
    assert any("status processing → completed" in line for line in lines)
    assert all("(test)" in line for line in lines if "Job" in line.split("(")[0])


def test_log_history_as_of_position_or_time_shows_earlier_events(ledger: LedgerCommands) -> None:
    job_id = ledger.run_with_roles(write_job_history)
    history = [json.loads(line) for line in ledger.run("log", "history", job_id, "--json").out.splitlines()]
    assert [entry["event"]["type"] for entry in history] == [
        "JobSubmitted",
        "JobClaimed",
        "JobAttemptFailed",
        "JobCancelled",
        "JobRestarted",
        "JobClaimed",
        "JobCompleted",
    ]
    assert history[-1]["state"]["status"] == "completed"
    third = history[2]["event"]
    for as_of in (str(third["position"]), third["time"]):
        outcome = ledger.run("log", "history", job_id, "--as-of", as_of, "--json")
        earlier = [json.loads(line) for line in outcome.out.splitlines()]
        assert [entry["event"]["position"] for entry in earlier][:3] == [
            entry["event"]["position"] for entry in history[:3]
        ]
        assert len(earlier) < len(history) or as_of == third["time"]
    before = ledger.run("log", "history", job_id, "--as-of", "2001-01-01T00:00:00Z")
    assert (before.exit_code, before.out) == (0, "")
    assert "did not exist at that time" in before.err


def test_log_history_unknown_stream_is_one_line_error(ledger: LedgerCommands) -> None:
    ledger.run_with_roles(write_job_history)
    outcome = ledger.run("log", "history", "job-unknown")
    assert (outcome.exit_code, outcome.err.count("\n")) == (1, 1)
    assert "job-unknown is not in the log" in outcome.err
    outcome = ledger.run("log", "history", "job-unknown", "--as-of", "yesterday")
    assert outcome.exit_code == 2
    assert "expected a position in the log or a time" in outcome.err


# log ls ---------------------------------------------------------------------------------------------------------------


def test_log_ls_filters_by_type_and_stream(ledger: LedgerCommands) -> None:
    job_id = ledger.run_with_roles(write_job_history)
    last = ledger.run("log", "ls", "-n", "3").out.splitlines()
    assert [line.split()[0] for line in last] == ["6", "7", "8"]
    for option in (("--after", "0"), ("-n", "1")):
        failed = ledger.run("log", "ls", *option, "--type", "JobAttemptFailed").out
        assert failed.count("\n") == 1, "the newest event of this type, although newer events have other types"
        assert "it broke" in failed
    of_stream = ledger.run("log", "ls", "--stream", job_id, "--json").out.splitlines()
    assert {json.loads(line)["stream"] for line in of_stream} == {job_id}
    assert len(of_stream) == 7
    outcome = ledger.run("log", "ls", "--type", "jobfaild")
    assert outcome.exit_code == 2
    assert "unknown event type" in outcome.err
    assert "hint: Did you mean JobFailed?\nhint: Event types: BatchAccessChanged, " in outcome.err


@needs_local_mongod
def test_log_follow_continues_over_restart_without_gaps(tmp_path: Path) -> None:
    installation = Installation(tmp_path)
    job = json.dumps([{"job_type": "echo", "parameters": {"text": "hello"}}])
    up = installation.start_up_command().wait_until_ready()
    following = installation.start("log", "follow", "--after", "0", "--json")
    try:
        for completed in (1, 2):
            assert installation.run("submit", "-", "--wait", "--url", up.url, stdin=job).exit_code == 0
            assert wait_until(
                lambda count=completed: following.stdout.count('"JobCompleted"') >= count,  # type: ignore[misc]  # bound in this iteration
                DEADLINE_SECONDS,
            ), following.stderr
            assert up.stop().exit_code == 0
            if completed == 1:
                up = installation.start_up_command().wait_until_ready()
    finally:
        following.kill_group()
        installation.kill_all_processes()
    positions = [json.loads(line)["position"] for line in following.stdout.splitlines()]
    assert positions == list(range(1, len(positions) + 1))


# Views and states -----------------------------------------------------------------------------------------------------


def test_views_check_reports_edited_documents_and_rebuild_repairs(ledger: LedgerCommands) -> None:
    job_id = ledger.run_with_roles(write_job_history)
    assert "The views match the log" in ledger.run("log", "verify").out
    with MongoClient[dict[str, Any]](ledger.connection.uri) as client:
        db = client[ledger.connection.db_name]
        db.jobs.update_one({"_id": job_id}, {"$set": {"status": "failed"}})
        db.statistics.update_one({"_id": "jobs"}, {"$inc": {"completed": 1}})
    for command in (("log", "verify"), ("views", "check")):
        outcome = ledger.run(*command)
        assert outcome.exit_code == 1
        assert f"jobs: {job_id}: status is 'failed' and should be 'completed'" in outcome.out
        assert "statistics: jobs: completed is 2 and should be 1" in outcome.out
        assert "2 documents differ (1 in jobs, 1 in statistics)" in outcome.out
    comparison = ledger.json("views", "check", "--view", "jobs", exit_code=1)
    assert (comparison["differences"], comparison["by_view"]) == (1, {"jobs": 1})
    assert comparison["first_differences"] == [
        {"view": "jobs", "key": job_id, "fields": ["status"], "in_view": True, "in_log": True}
    ]
    assert ledger.run("log", "verify", "--no-views").exit_code == 0
    outcome = ledger.run("views", "rebuild")
    assert (outcome.exit_code, outcome.out) == (0, "Rebuilt all views up to position 8.\n")
    assert ledger.run("log", "verify").exit_code == 0
    outcome = ledger.run("views", "rebuild", "--view", "jops")
    assert outcome.exit_code == 2
    assert "unknown view. Views: jobs, batches, " in outcome.err


def test_log_state_as_of_and_until_shows_states_and_changes(ledger: LedgerCommands) -> None:
    async def write_jobs_of_a_day(roles: RunningRoles) -> tuple[str, str, str]:
        cancelled = await roles.submit(job_name="first")
        batch_id, [completed, running] = await roles.submit_batch({}, {})
        await roles.claim(completed, "worker-7")
        head = await roles.event_store.read_head_position()
        assert head == 5
        await roles.handle_commands(completed, report_results("worker-7", 1, make_results(completed)))
        await roles.handle_commands(cancelled, CancelJob("user:ada"))
        await roles.claim(running, "worker-8")
        return cancelled, completed, batch_id

    cancelled, completed, batch_id = ledger.run_with_roles(write_jobs_of_a_day)
    state = ledger.json("log", "state", "--as-of", "5")["as_of"]
    assert state["position"] == 5
    assert state["jobs"] == {"pending": 2, "processing": 1, "completed": 0, "failed": 0, "cancelled": 0}
    assert [(job["job_id"], job["worker_id"], job["attempt"]) for job in state["running"]] == [
        (completed, "worker-7", 1)
    ]
    assert state["batches"][0]["batch_id"] == batch_id
    assert state["batches"][0]["jobs"] == {"pending": 1, "processing": 1}
    output = ledger.run("log", "state", "--as-of", "5").out
    assert "2 pending, 1 processing" in output
    assert "worker-7" in output

    both = ledger.json("log", "state", "--as-of", "5", "--until", "8")
    assert both["until"]["jobs"] == {"pending": 0, "processing": 1, "completed": 1, "failed": 0, "cancelled": 1}
    assert both["changes"][cancelled] == ["pending", "cancelled"]
    assert both["changes"][completed] == ["processing", "completed"]
    assert len(both["changes"]) == 3
    assert "completed 0 → 1" in ledger.run("log", "state", "--as-of", "5", "--until", "8").out
    now = ledger.json("log", "state", "--as-of", datetime.now(UTC).isoformat())["as_of"]
    assert now["jobs"] == both["until"]["jobs"]
    assert "The log was empty." in ledger.run("log", "state", "--as-of", "2001-01-01T00:00:00Z").out
    for arguments in (("--until", "5"), (), ("--as-of", "8", "--until", "5")):
        assert ledger.run("log", "state", *arguments).exit_code == 2


def test_log_state_says_what_pending_jobs_wait_for(ledger: LedgerCommands) -> None:
    start = datetime.now(UTC)

    async def write(roles: RunningRoles) -> None:
        await roles.submit()
        await roles.submit(not_before=start + timedelta(minutes=30))
        for not_before in (None, start + timedelta(hours=2)):
            retried = await roles.submit()
            attempt = await roles.claim(retried, "worker-7")
            error = ErrorInfo(code="BROKEN", message="it broke")
            await roles.handle_commands(retried, FailAttempt("worker-7", attempt, error, start + timedelta(hours=1)))
            if not_before is not None:
                await roles.handle_commands(retried, UpdateJob("user:alice", not_before=not_before))
        batch_id, _ = await roles.submit_batch({}, {})
        await roles.handle_commands(batch_id, PauseBatch("user:alice"))

    ledger.run_with_roles(write)
    state = ledger.json("log", "state", "--as-of", str(10**9))["as_of"]
    assert state["waiting_for"] == {"worker": 1, "due_time": 2, "retry": 1, "batch_paused": 2}
    output = ledger.run("log", "state", "--as-of", str(10**9)).out
    assert (
        "1 waiting for a worker, 2 waiting for their start time, 1 waiting for a retry, 2 in paused batches" in output
    )
    later = ledger.json("log", "state", "--as-of", "2999-01-01T00:00:00Z")["as_of"]
    assert later["waiting_for"] == state["waiting_for"], "nothing of the future has happened yet"
    earlier = ledger.json("log", "state", "--as-of", "2001-01-01T00:00:00Z")["as_of"]
    assert set(earlier["waiting_for"].values()) == {0}


def test_log_state_of_random_history_matches_views(ledger: LedgerCommands) -> None:
    async def write_and_load_statuses(roles: RunningRoles) -> dict[str, Any]:
        await write_long_history(roles)
        jobs = {job["_id"]: job["status"] async for job in roles.db.jobs.find()}
        batches = {batch["_id"]: (batch["status"], batch["paused"]) async for batch in roles.db.batches.find()}
        [last] = await roles.db.events.find().sort("_id", -1).limit(1).to_list()
        waiting = Counter(
            [
                derive_waiting_for(job, is_batch_paused=batches.get(job["batch_id"], ("", False))[1], now=last["time"])
                async for job in roles.db.jobs.find()
            ]
        )
        return {"jobs": jobs, "batches": batches, "waiting": {kind: waiting[kind] for kind in KINDS}}

    statuses = ledger.run_with_roles(write_and_load_statuses)
    state = ledger.json("log", "state", "--as-of", str(10**9))["as_of"]
    counts = {name: list(statuses["jobs"].values()).count(name) for name in state["jobs"]}
    assert state["jobs"] == counts
    assert {batch["batch_id"]: (batch["status"], batch["paused"]) for batch in state["batches"]} == statuses["batches"]
    assert state["waiting_for"] == statuses["waiting"]
    running = {job_id for job_id, status in statuses["jobs"].items() if status == "processing"}
    assert {job["job_id"] for job in state["running"]} == running


def test_views_check_of_other_version_is_one_line_error(
    ledger: LedgerCommands, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger.run_with_roles(write_job_history)

    async def raise_not_comparable(*_: Any, **__: Any) -> int:
        raise rebuild.NotComparable("The views were made by another version of this program: they differ.")

    monkeypatch.setattr(rebuild.Rebuild, "compare", raise_not_comparable)
    outcome = ledger.run("views", "check")
    assert (outcome.exit_code, outcome.err.count("\n")) == (1, 1)
