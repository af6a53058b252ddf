"""`jobledger jobs …` and `jobledger batches …` against a running installation."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from jobledger.cli.commands import api_client, jobs, live_stream, options, resources
from jobledger.cli.hosting import logging_setup
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.embedded_files import wait_until
from jobledger.ledger.store.event_store import MAX_POSITION
from tests.support.installation import CommandOutcome, Installation, assert_one_line_error
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS
from tests.support.scripted_server import serve_answers

pytestmark = needs_local_mongod

WAITING = {"job_type": "echo", "job_name": "Waiting", "max_attempts": 20}
BATCH: dict[str, Any] = {
    "batch_name": "Day \x1b[31mone",
    "jobs": [
        {"job_type": "echo", "job_name": "Opening [b]", "parameters": {"text": "hello"}},
        {"job_type": "echo", "parameters": {"session": "Key\x07note", "seconds": 120}},
        {"job_type": "echo", "job_name": "Broken", "parameters": {"fail": "no [luck]"}},
        {
            "job_type": "echo",
            "job_name": "Waiting",
            "parameters": {"fail": "late", "transient": True},
            "max_attempts": 20,
        },
    ],
}


class SubmittedBatch:
    """A batch whose jobs are completed, processing, failed and waiting for a retry, and commands for it."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.url = installation.commands[0].url
        self.batch_id = self.run_expecting(0, "submit", "-", stdin=yaml.safe_dump(BATCH)).split(":")[0]
        assert wait_until(
            lambda: [self.get_job(n)["status"] for n in range(3)] == ["completed", "processing", "failed"],
            DEADLINE_SECONDS,
        )
        assert wait_until(
            lambda: self.get_job(3)["retries"] > 0 and "of 120" in str(self.get_job(1)["progress"]), DEADLINE_SECONDS
        )

    def run(self, *arguments: str, stdin: str = "") -> CommandOutcome:
        return self.installation.run(*arguments, stdin=stdin, JOBLEDGER_URL=self.url)

    def run_expecting(self, exit_code: int, *arguments: str, stdin: str = "") -> str:
        outcome = self.run(*arguments, stdin=stdin)
        assert outcome.exit_code == exit_code, outcome.out + outcome.err
        return outcome.out

    def run_json(self, *arguments: str) -> Any:
        return json.loads(self.run_expecting(0, *arguments, "--json"))

    def list_jobs(self) -> list[dict[str, Any]]:
        """Return the jobs of the batch in the order of submission."""
        return list(self.run_json("jobs", "ls", "--batch", self.batch_id, "--oldest-first"))

    def get_job(self, number: int) -> dict[str, Any]:
        jobs = self.list_jobs()
        return jobs[number] if len(jobs) == len(BATCH["jobs"]) else {"status": "", "retries": 0, "progress": None}


@pytest.fixture
def batch(running_installation: Installation) -> Iterator[SubmittedBatch]:
    batch = SubmittedBatch(running_installation)
    yield batch
    batch.run_expecting(0, "batches", "cancel", batch.batch_id)  # otherwise the next test finds no free worker


def test_jobs_list_shows_status_name_and_detail(batch: SubmittedBatch) -> None:
    output = batch.run_expecting(0, "jobs", "ls", "--batch", batch.batch_id, "--oldest-first").splitlines()
    header, opening, keynote, broken, waiting = output
    assert header.split() == ["JOB", "STATUS", "AGE", "RUNTIME", "WORKER", "NAME", "DETAIL"]
    assert " completed " in opening
    assert opening.endswith("Opening [b]  1 file")
    assert " processing " in keynote
    assert "Key\\x07note" in keynote
    assert "of 120 seconds elapsed" in keynote
    assert broken.endswith("Broken       ECHO_FAILED: no [luck]")
    assert " pending " in waiting
    assert "not before 20" in waiting
    assert waiting.endswith(": ECHO_FAILED: late")
    assert {line.split()[0] for line in output[1:]} == {job["job_id"] for job in batch.list_jobs()}


def test_lists_filter_and_page_results(batch: SubmittedBatch, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [job["job_id"] for job in batch.list_jobs()]
    mine = ("--batch", batch.batch_id)
    assert batch.run_expecting(0, "jobs", "ls", *mine, "-o", "name", "--oldest-first").split() == ids
    assert batch.run_expecting(0, "jobs", "ls", *mine, "-o", "name").split() == ids[::-1]
    assert batch.run_expecting(0, "jobs", "ls", *mine, "-o", "name", "--status", "failed").split() == [ids[2]]
    assert (
        batch.run_expecting(0, "jobs", "ls", *mine, "-o", "name", "--error", "ECHO_FAILED", "--oldest-first").split()
        == ids[2:]
    )
    assert batch.run_expecting(0, "jobs", "ls", *mine, "-o", "name", "--search", "opening").split() == [ids[0]]
    assert batch.run_expecting(0, "jobs", "ls", *mine, "-o", "name", "--type", "session") == ""
    none = batch.run("jobs", "ls", *mine, "--created-before", "2026-02-01T09:30Z")
    assert (none.exit_code, none.out, none.err) == (0, "", "No jobs match these filters.\n")
    assert (
        len(batch.run_expecting(0, "jobs", "ls", *mine, "-o", "name", "--created-after", "2026-02-01T00:00Z").split())
        == 4
    )
    assert batch.run_expecting(0, "jobs", "ls", *mine, "--limit", "3").count("\n") == 1 + 3
    assert batch.batch_id in batch.run_expecting(0, "batches", "ls", "--search", "day", "-o", "name").split()
    monkeypatch.setattr(resources, "_PAGE_SIZE", 3)
    for limit in (2, 3, 4, 100):
        arguments = ["ls", *mine, "-o", "name", "--oldest-first", "--limit", str(limit), "--url", batch.url]
        assert CliRunner().invoke(jobs.app, arguments).stdout.split() == ids[:limit]


def test_jobs_and_batches_show_escape_control_characters(batch: SubmittedBatch) -> None:
    opening, keynote, broken, waiting = batch.list_jobs()
    output = batch.run_expecting(0, "jobs", "get", opening["job_id"])
    assert output.startswith(f"{opening['job_id']}  completed\n")
    assert f"markdown   {batch.url}/api/events/files/" in output
    assert "echo.md (" in output
    assert "  retries " not in output
    output = batch.run_expecting(0, "jobs", "get", keynote["job_id"])
    assert "name       Key\\x07note\n" in output
    assert "progress   " in output
    output = batch.run_expecting(0, "jobs", "get", broken["job_id"])
    assert "error      ECHO_FAILED: no [luck]\n" in output
    output = batch.run_expecting(0, "jobs", "get", waiting["job_id"])
    assert re.search(r"retries    [1-9]\d*\n", output)
    assert "log        " in output
    output = batch.run_expecting(0, "jobs", "get", opening["job_id"], "--as-of", str(opening["position"] - 1))
    assert "completed" not in output.splitlines()[0]
    assert batch.run_json("jobs", "get", opening["job_id"]) == opening
    output = batch.run_expecting(0, "batches", "get", batch.batch_id)
    assert output.startswith(f"{batch.batch_id}  processing\n")
    assert "\x1b" not in output
    assert "name       Day \\x1b[31mone\n" in output
    assert "jobs       4: 1 pending, 1 processing, 1 completed, 1 failed\n" in output
    assert batch.run_json("batches", "get", batch.batch_id)["failed_jobs"] == 1


def test_jobs_cancel_and_restart_report_refused_jobs_and_continue(batch: SubmittedBatch) -> None:
    opening, keynote, broken, _ = (job["job_id"] for job in batch.list_jobs())
    outcome = batch.run("jobs", "cancel", opening, keynote, "--reason", "wrong [recording]")
    assert outcome.exit_code == 1
    assert outcome.err == f"{opening}: the job is completed: finished jobs cannot be cancelled\n"
    assert outcome.out == f"{keynote} is processing,cancelling\n"
    assert wait_until(lambda: batch.get_job(1)["status"] == "cancelled", DEADLINE_SECONDS)
    assert "reason wrong [recording]" in batch.run_expecting(0, "log", "history", keynote)
    assert batch.run_expecting(0, "jobs", "retry", broken, broken, "--from-scratch") == f"{broken} is pending\n"
    assert wait_until(lambda: batch.get_job(2)["attempt"] == 2, DEADLINE_SECONDS)
    [restarted, refused] = json.loads(batch.run_expecting(1, "jobs", "retry", keynote, "job-0", "--json"))
    assert (restarted["id"], restarted["job"]["status"]) == (keynote, "pending")
    assert refused == {"id": "job-0", "error": "Job job-0 not found."}


def test_batches_pause_resume_cancel_and_restart_change_jobs(batch: SubmittedBatch) -> None:
    assert batch.run_expecting(0, "batches", "pause", batch.batch_id) == f"{batch.batch_id} is processing,paused\n"
    assert wait_until(
        lambda: "pending,paused" in batch.run_expecting(0, "jobs", "ls", "--batch", batch.batch_id), DEADLINE_SECONDS
    )
    again = batch.run("batches", "pause", batch.batch_id, "batch-0")
    assert again.exit_code == 1
    assert "batch-0: Batch batch-0 not found.\n" in again.err
    assert batch.run_expecting(0, "batches", "resume", batch.batch_id) == f"{batch.batch_id} is processing\n"
    assert batch.run_expecting(0, "batches", "cancel", batch.batch_id) == f"{batch.batch_id}: 2 of 4 jobs changed\n"
    assert wait_until(lambda: batch.run_json("batches", "get", batch.batch_id)["status"] == "partial", DEADLINE_SECONDS)
    assert f"{batch.batch_id}  partial " in batch.run_expecting(0, "batches", "ls")
    [answer] = batch.run_json("batches", "retry", batch.batch_id, "--only", "cancelled")
    assert answer["jobs"] == {"total": 4, "changed": 2, "unchanged": 2, "rejected": 0}


@pytest.mark.parametrize(
    ("arguments", "expected_texts"),
    [
        (["jobs", "get", "batch-1"], ["batch-1 is a batch ID", "jobledger batches"]),
        (["batches", "pause", "job-1"], ["job-1 is a job ID", "jobledger jobs"]),
        (["jobs", "get", "x"], ["'x' is not a job ID (they start with job-)"]),
        (["jobs", "cancel", "job-1", "job-/../../x"], ["is not a job ID"]),
        (["batches", "cancel", "batch-\x1b"], [r"\x1b", "is not a batch ID"]),
        (
            ["jobs", "ls", "--created-after", "yesterday"],
            ["--created-after yesterday: expected a time with a UTC offset"],
        ),
        (
            ["jobs", "get", "job-1", "--as-of", "earlier"],
            ["--as-of earlier: expected a position in the log or a time"],
        ),
        (["jobs", "ls", "--url", "nowhere"], ["http://127.0.0.1:5001"]),
    ],
    ids=str,
)
def test_invalid_argument_is_usage_error_before_any_request(
    running_installation: Installation, arguments: list[str], expected_texts: list[str]
) -> None:
    assert_one_line_error(running_installation.run(*arguments, JOBLEDGER_URL="http://127.0.0.1:1"), 2, *expected_texts)


def test_http_commands_do_not_import_slow_packages() -> None:
    heavy = {"pydantic", "pymongo", "starlette", "yt_dlp"}
    program = f"import sys, jobledger.cli.main; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert options.LARGEST_POSITION == MAX_POSITION, "options.py repeats the value to avoid the import"


BUSY = json.dumps({"status": "error", "code": "too_many_requests", "message": "Too many requests.", "details": {}})
UNAVAILABLE = json.dumps(
    {
        "status": "error",
        "code": "database_unavailable",
        "message": "The database is unavailable.",
        "details": {},
    }
)
DONE = json.dumps({"status": "success", "job_id": "job-1", "job": {"status": "pending", "cancel_requested": False}})


def test_command_after_429_retries_and_names_unprocessed_jobs(running_installation: Installation) -> None:
    with serve_answers((429, BUSY), (200, DONE), (503, UNAVAILABLE), retry_after="1") as url:
        outcome = running_installation.run("jobs", "retry", "job-1", "job-2", "job-3", "--json", JOBLEDGER_URL=url)
    assert outcome.exit_code == 3
    assert [answer["id"] for answer in json.loads(outcome.out)] == ["job-1"]
    messages = ["not processed, or result unknown: job-2 job-3", "error: The database is unavailable."]
    assert outcome.err.splitlines() == messages


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        ("7", 7),
        ("Wed, 21 Oct 2015 07:28:20 GMT", 20),
        ("soon", 1),
        ("nan", 1),
        ("-5", 1),
        ("0", 1),
        ("", 1),
        ("99999", 60),
    ],
)
def test_retry_delay_any_header_is_limited_pause(retry_after: str, seconds: int) -> None:
    headers = {"Retry-After": retry_after, "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert api_client.compute_retry_delay(httpx.Response(429, headers=headers)) == seconds


def test_command_with_past_retry_after_repeats_request() -> None:
    with serve_answers((429, BUSY), (200, DONE), retry_after="Wed, 21 Oct 2015 07:28:00 GMT") as url:
        outcome = CliRunner().invoke(jobs.app, ["retry", "job-1", "--url", url])
    assert outcome.exit_code == 0, outcome


def test_jobs_list_omitted_fields_are_not_shown_as_empty() -> None:
    job: dict[str, Any] = {"due_at": None, "error": None, "results": {"files": [], "assets": []}}
    completed = {**job, "status": "completed", "omitted": ["results"]}
    failed = {**job, "status": "failed", "omitted": ["error"]}
    waiting = {**job, "status": "pending", "due_at": "2026-01-01T00:00:00Z", "omitted": ["error"]}
    assert jobs._format_detail({**job, "status": "completed"}) == "0 files"
    for listed_job in (completed, failed, waiting):
        assert "too large for a list" in jobs._format_detail(listed_job)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_submit_wait_short_api_outage_continues(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_stream, "compute_retry_delay", lambda _answer: 0.01)
    event = {"position": 8, "type": "BatchFinished", "stream": "batch-1", "data": {}}
    statuses = [status, status, 200]

    def answer(_request: httpx.Request) -> httpx.Response:
        if (answer_status := statuses.pop(0)) != 200:
            return httpx.Response(answer_status, text="<h1>Bad Gateway</h1>")
        content = f"data: {json.dumps(event)}\n\n"
        return httpx.Response(200, text=content, headers={"content-type": "text/event-stream"})

    async with httpx.AsyncClient(base_url="http://test", transport=httpx.MockTransport(answer)) as client:
        async for received in live_stream.stream_events(client, after=1, batch_id="batch-1"):
            assert received == event
            break


async def test_submit_wait_long_api_outage_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_stream, "_RECONNECT_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(live_stream, "compute_retry_delay", lambda _answer: 0.01)
    transport = httpx.MockTransport(lambda _request: httpx.Response(502))
    async with httpx.AsyncClient(base_url="http://test", transport=transport) as client:
        with pytest.raises(LedgerUnavailable, match="HTTP status 502"):
            await anext(live_stream.stream_events(client, after=1, batch_id="batch-1"))


@pytest.mark.parametrize("content", [{"status": "ok"}, {"status": "success"}, {"jobs": [], "total": 0}], ids=str)
@pytest.mark.parametrize(
    "arguments", [("jobs", "ls"), ("jobs", "get", "job-1"), ("batches", "pause", "batch-1"), ("webhooks", "ls")]
)
def test_command_to_other_server_fails_without_showing_password(
    running_installation: Installation, content: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    with serve_answers((200, json.dumps(content))) as url:
        outcome = running_installation.run(*arguments, JOBLEDGER_URL=url.replace("//", "//me:secret@"))
    assert outcome.exit_code == 1
    assert "it is not a Jobledger API" in outcome.err
    assert "secret" not in outcome.err


def test_command_without_answer_says_it_may_have_been_executed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_client, "_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        outcome = CliRunner().invoke(
            jobs.app, ["cancel", "job-1", "--url", f"http://127.0.0.1:{silent_server.getsockname()[1]}"]
        )
    assert isinstance(outcome.exception, LedgerUnavailable)
    assert "may have been executed" in str(outcome.exception)


def test_jobs_list_year_9999_is_printed(batch: SubmittedBatch) -> None:
    job = {"job_type": "echo", "job_name": "never", "not_before": "9999-12-31T23:59:59Z", "parameters": {}}
    batch.run_expecting(0, "submit", "-", stdin=json.dumps(job))
    assert wait_until(
        lambda: "not before 9999-12-31 23:59:59" in batch.run_expecting(0, "jobs", "ls", "--search", "never"),
        DEADLINE_SECONDS,
    )
    listed = batch.installation.run(*("jobs", "ls", "--search", "never"), JOBLEDGER_URL=batch.url, TZ="Europe/Berlin")
    assert "not before 9999-12-31 23:59:59" in listed.out


TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?P<offset>\S{0,6})")


def test_commands_print_times_with_offset_that_options_accept(batch: SubmittedBatch) -> None:
    job_id, waiting = (batch.get_job(number)["job_id"] for number in (2, 3))
    hook = {"url": "http://endpoint.invalid/hook"}
    body = {"jobs": [{"job_type": "echo", "parameters": {}, "webhook": hook}], "webhook": hook}
    batch_id = batch.run_expecting(0, "submit", "-", stdin=json.dumps(body)).split(":")[0]
    assert wait_until(
        lambda: any(delivery["next_attempt_at"] for delivery in batch.run_json("webhooks", "ls")), DEADLINE_SECONDS
    )
    batch.run_expecting(0, "keys", "create", "--user", "alice", "--expires-in", "1h")
    for command in (
        ("jobs", "ls", "-o", "wide"),
        ("jobs", "get", job_id),
        ("jobs", "get", waiting),
        ("jobs", "logs", job_id),
        ("batches", "ls", "-o", "wide"),
        ("batches", "get", batch_id),
        ("log", "history", job_id),
        ("log", "history", batch.batch_id),
        ("log", "state", "--as-of", "20"),
        ("log", "state", "--as-of", "1", "--until", "20"),
        ("keys", "ls"),
        ("webhooks", "ls"),
        ("webhooks", "endpoints"),
    ):
        outcome = batch.installation.run(*command, JOBLEDGER_URL=batch.url, TZ="Asia/Kolkata", COLUMNS="300")
        assert outcome.exit_code == 0, outcome.err
        times = [match for match in TIME.finditer(outcome.out) if not match[0].startswith("9999")]  # has no local time
        assert times, command
        for match in times:
            assert match["offset"].startswith("+05:30"), (command, outcome.out)
            text = match[0][: -len(match["offset"])] + "+05:30"
            assert options.parse_as_of(text, "--as-of") == datetime.fromisoformat(text)
            assert options.parse_time_option(text, "--created-after")


@pytest.mark.parametrize("kind", ["console", "json"])
def test_log_line_time_has_offset(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    timestamp = logging_setup._create_time_stamper(kind)(None, "info", {})["timestamp"]
    monkeypatch.undo()
    time.tzset()
    pattern = r"\d\d:\d\d:\d\d\+0530" if kind == "console" else r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    assert re.fullmatch(pattern, timestamp)
    if kind == "json":
        assert abs(datetime.now(UTC) - datetime.fromisoformat(timestamp)) < timedelta(minutes=5)


def test_jobs_list_limit_reached_prints_note_to_stderr(batch: SubmittedBatch) -> None:
    outcome = batch.run("jobs", "ls", "--batch", batch.batch_id, "--limit", "3", "-o", "name")
    assert outcome.out.count("\n") == 3
    assert outcome.err == "note: showing 3 of 4; use --limit to get more\n"
    assert batch.run("jobs", "ls", "--batch", batch.batch_id, "--json").err == ""


def test_command_rejected_by_api_prints_its_message(running_installation: Installation) -> None:
    url = running_installation.commands[0].url
    wrong = running_installation.run("jobs", "ls", "--status", "done", JOBLEDGER_URL=url)
    assert wrong.exit_code == 2
    assert "'pending', 'processing'" in wrong.err
    assert_one_line_error(
        running_installation.run("jobs", "get", "job-0", JOBLEDGER_URL=url), 1, "Job job-0 not found."
    )
    assert_one_line_error(
        running_installation.run("batches", "get", "batch-0", JOBLEDGER_URL=url), 1, "Batch batch-0 not found."
    )
    unreachable = running_installation.run("jobs", "ls", JOBLEDGER_URL="http://127.0.0.1:1")
    assert_one_line_error(unreachable, 3, "Cannot connect to Jobledger at http://127.0.0.1:1", "jobledger up")
