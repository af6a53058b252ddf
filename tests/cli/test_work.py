"""`jobledger jobs …` and `jobledger batches …`, typed at an installation that is up."""

from __future__ import annotations

import http.server
import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest
import yaml
from typer.testing import CliRunner

from jobledger.cli import api_client as remote
from jobledger.cli import logging_setup, options
from jobledger.cli.commands import jobs
from jobledger.cli.commands import resource_commands as work
from jobledger.cli.commands import submit as follow
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.embedded_lock import wait_until
from jobledger.ledger.store.event_store import MAX_POSITION
from tests.support.installation import CommandOutcome, Installation, assert_one_line_error
from tests.support.mongodb_provider import needs_local_mongod

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


class Desk:
    """Where somebody types commands, with a batch that has got as far as it gets."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.url = installation.commands[0].url
        self.batch_id = self.says(0, "submit", "-", stdin=yaml.safe_dump(BATCH)).split(":")[0]
        assert wait_until(
            lambda: [self.job(n)["status"] for n in range(3)] == ["completed", "processing", "failed"], 20
        )
        assert wait_until(lambda: self.job(3)["retries"] > 0 and "of 120" in str(self.job(1)["progress"]), 20)

    def types(self, *arguments: str, stdin: str = "") -> CommandOutcome:
        return self.installation.run(*arguments, stdin=stdin, JOBLEDGER_URL=self.url)

    def says(self, exit_code: int, *arguments: str, stdin: str = "") -> str:
        ended = self.types(*arguments, stdin=stdin)
        assert ended.exit_code == exit_code, ended.out + ended.err
        return ended.out

    def told(self, *arguments: str) -> Any:
        return json.loads(self.says(0, *arguments, "--json"))

    def jobs(self) -> list[dict[str, Any]]:
        """The jobs of the batch, as they were submitted."""
        return list(self.told("jobs", "list", "--batch", self.batch_id, "--oldest-first"))

    def job(self, number: int) -> dict[str, Any]:
        jobs = self.jobs()
        return jobs[number] if len(jobs) == len(BATCH["jobs"]) else {"status": "", "retries": 0, "progress": None}


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with Installation(tmp_path_factory.mktemp("up")) as installation:
        installation.start_up_command()
        yield installation


@pytest.fixture
def desk(installation: Installation) -> Iterator[Desk]:
    desk = Desk(installation)
    yield desk
    desk.says(0, "batches", "cancel", desk.batch_id)  # else the next finds no worker


def test_a_list_says_of_each_job_what_one_wants_to_know(desk: Desk) -> None:
    said = desk.says(0, "jobs", "list", "--batch", desk.batch_id, "--oldest-first").splitlines()
    header, opening, keynote, broken, waiting, count = said
    assert header.split("  ")[0] == "JOB"
    assert " completed " in opening
    assert opening.endswith("Opening [b]  1 files")
    assert " processing " in keynote
    assert "Key\\x07note" in keynote
    assert "of 120 seconds elapsed" in keynote
    assert broken.endswith("Broken       ECHO_FAILED: no [luck]")
    assert " pending " in waiting
    assert "not before 20" in waiting
    assert waiting.endswith(": ECHO_FAILED: late")
    assert count == "4 of 4"
    assert {line.split()[0] for line in said[1:5]} == {job["job_id"] for job in desk.jobs()}


def test_lists_are_narrowed_down_and_read_page_by_page(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = [job["job_id"] for job in desk.jobs()]
    mine = ("--batch", desk.batch_id)
    assert desk.says(0, "jobs", "list", *mine, "--ids", "--oldest-first").split() == ids
    assert desk.says(0, "jobs", "list", *mine, "--ids").split() == ids[::-1]
    assert desk.says(0, "jobs", "list", *mine, "--ids", "--status", "failed").split() == [ids[2]]
    assert desk.says(0, "jobs", "list", *mine, "--ids", "--error", "ECHO_FAILED", "--oldest-first").split() == ids[2:]
    assert desk.says(0, "jobs", "list", *mine, "--ids", "--search", "opening").split() == [ids[0]]
    assert desk.says(0, "jobs", "list", *mine, "--ids", "--type", "session") == ""
    assert (
        desk.says(0, "jobs", "list", *mine, "--created-before", "2026-02-01T09:30Z") == "No jobs match these filters.\n"
    )
    assert len(desk.says(0, "jobs", "list", *mine, "--ids", "--created-after", "2026-02-01T00:00Z").split()) == 4
    assert desk.says(0, "jobs", "list", *mine, "--limit", "3").endswith("\n3 of 4\n")
    assert desk.batch_id in desk.says(0, "batches", "list", "--search", "day", "--ids").split()
    monkeypatch.setattr(work, "_PAGE_SIZE", 3)
    for limit in (2, 3, 4, 100):
        asked = ["list", *mine, "--ids", "--oldest-first", "--limit", str(limit), "--url", desk.url]
        assert CliRunner().invoke(jobs.app, asked).stdout.split() == ids[:limit]


def test_what_is_shown_of_a_job_cannot_steer_the_terminal(desk: Desk) -> None:
    opening, keynote, broken, waiting = desk.jobs()
    said = desk.says(0, "jobs", "show", opening["job_id"])
    assert said.startswith(f"{opening['job_id']}  completed\n")
    assert f"markdown   {desk.url}/api/events/files/" in said
    assert "echo.md (" in said
    assert "  retries " not in said
    said = desk.says(0, "jobs", "show", keynote["job_id"])
    assert "name       Key\\x07note\n" in said
    assert "progress   " in said
    said = desk.says(0, "jobs", "show", broken["job_id"])
    assert "error      ECHO_FAILED: no [luck]\n" in said
    said = desk.says(0, "jobs", "show", waiting["job_id"])
    assert re.search(r"retries    [1-9]\d*\n", said)
    assert "log        " in said
    said = desk.says(0, "jobs", "show", opening["job_id"], "--as-of", str(opening["position"] - 1))
    assert "completed" not in said.splitlines()[0]
    assert desk.told("jobs", "show", opening["job_id"]) == opening
    said = desk.says(0, "batches", "show", desk.batch_id)
    assert said.startswith(f"{desk.batch_id}  processing\n")
    assert "\x1b" not in said
    assert "name       Day \\x1b[31mone\n" in said
    assert "jobs       4: 1 pending, 1 processing, 1 completed, 1 failed\n" in said
    assert desk.told("batches", "show", desk.batch_id)["failed_jobs"] == 1


def test_jobs_are_cancelled_and_restarted_and_what_is_refused_is_told_and_keeps_nobody_back(desk: Desk) -> None:
    opening, keynote, broken, _ = (job["job_id"] for job in desk.jobs())
    ended = desk.types("jobs", "cancel", opening, keynote, "--reason", "wrong [recording]")
    assert ended.exit_code == 1
    assert ended.err == f"{opening}: the job is completed and cannot be cancelled: it has already ended\n"
    assert ended.out == f"{keynote} is processing, cancelling\n"
    assert wait_until(lambda: desk.job(1)["status"] == "cancelled", 10)
    assert "reason wrong [recording]" in desk.says(0, "log", "history", keynote)
    assert desk.says(0, "jobs", "restart", broken, broken, "--from-scratch") == f"{broken} is pending\n"
    assert wait_until(lambda: desk.job(2)["attempt"] == 2, 10)
    [restarted, refused] = json.loads(desk.says(1, "jobs", "restart", keynote, "job-0", "--json"))
    assert (restarted["id"], restarted["job"]["status"]) == (keynote, "pending")
    assert refused == {"id": "job-0", "error": "Job job-0 not found."}


def test_batches_are_paused_resumed_cancelled_and_restarted(desk: Desk) -> None:
    assert desk.says(0, "batches", "pause", desk.batch_id) == f"{desk.batch_id} is processing, paused\n"
    assert wait_until(lambda: "pending, paused" in desk.says(0, "jobs", "list", "--batch", desk.batch_id), 10)
    again = desk.types("batches", "pause", desk.batch_id, "batch-0")
    assert again.exit_code == 1
    assert "batch-0: Batch batch-0 not found.\n" in again.err
    assert desk.says(0, "batches", "resume", desk.batch_id) == f"{desk.batch_id} is processing\n"
    assert desk.says(0, "batches", "cancel", desk.batch_id) == f"{desk.batch_id}: 2 of 4 jobs changed\n"
    assert wait_until(lambda: desk.told("batches", "show", desk.batch_id)["status"] == "partial", 10)
    assert f"{desk.batch_id}  partial " in desk.says(0, "batches", "list")
    [answer] = desk.told("batches", "restart", desk.batch_id, "--only", "cancelled")
    assert answer["jobs"] == {"total": 4, "changed": 2, "unchanged": 2, "rejected": 0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["jobs", "show", "batch-1"], ["batch-1 is a batch ID", "jobledger batches"]),
        (["batches", "pause", "job-1"], ["job-1 is a job ID", "jobledger jobs"]),
        (["jobs", "show", "x"], ["'x' is not a job ID (they start with job-)"]),
        (["jobs", "cancel", "job-1", "job-/../../x"], ["is not a job ID"]),
        (["batches", "cancel", "batch-\x1b"], [r"\x1b", "is not a batch ID"]),
        (
            ["jobs", "list", "--created-after", "yesterday"],
            ["--created-after yesterday: expected a time with a UTC offset"],
        ),
        (["jobs", "show", "job-1", "--as-of", "then"], ["--as-of then: expected a position in the log or a time"]),
        (["jobs", "list", "--url", "nowhere"], ["http://127.0.0.1:5001"]),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_one_line_before_anything_is_done(
    installation: Installation, arguments: list[str], words: list[str]
) -> None:
    assert_one_line_error(installation.run(*arguments, JOBLEDGER_URL="http://127.0.0.1:1"), 2, *words)


def test_what_only_speaks_http_does_not_load_what_takes_a_second() -> None:
    heavy = {"pydantic", "pymongo", "starlette", "yt_dlp"}
    program = f"import sys, jobledger.cli.main; print(sorted({heavy} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout == "[]\n"
    assert options.LARGEST_POSITION == MAX_POSITION, "for the same reason it is written twice"


@contextmanager
def answering(*answers: tuple[int, dict[str, Any]], retry_after: str = "1") -> Iterator[str]:
    """A server that gives these answers, one after the other, the last of them again and again."""
    left = list(answers)

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, content = left.pop(0) if len(left) > 1 else left[0]
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Retry-After", retry_after)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = answer

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


BUSY = {"status": "error", "code": "too_many_requests", "message": "Too often.", "details": {}}
AWAY = {"status": "error", "code": "database_unavailable", "message": "It is away.", "details": {}}
DONE = {"status": "success", "job_id": "job-1", "job": {"status": "pending", "cancel_requested": False}}


def test_who_asks_too_often_is_patient_and_what_was_not_done_is_named(installation: Installation) -> None:
    with answering((429, BUSY), (200, DONE), (503, AWAY)) as url:
        ended = installation.run("jobs", "restart", "job-1", "job-2", "job-3", "--json", JOBLEDGER_URL=url)
    assert ended.exit_code == 3
    assert [answer["id"] for answer in json.loads(ended.out)] == ["job-1"]
    said = ["not processed, or result unknown: job-2 job-3", "jobledger: It is away."]
    assert ended.err.splitlines() == said


@pytest.mark.parametrize(
    ("said", "seconds"),
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
def test_any_retry_after_is_a_pause(said: str, seconds: int) -> None:
    headers = {"Retry-After": said, "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert remote.retry_delay(httpx.Response(429, headers=headers)) == seconds


def test_command_repeats_a_request_whatever_retry_after_says() -> None:
    with answering((429, BUSY), (200, DONE), retry_after="Wed, 21 Oct 2015 07:28:00 GMT") as url:
        ended = CliRunner().invoke(jobs.app, ["restart", "job-1", "--url", url])
    assert ended.exit_code == 0, ended


def test_what_a_list_leaves_out_is_not_shown_as_empty() -> None:
    job: dict[str, Any] = {"due_at": None, "error": None, "results": {"files": [], "assets": []}}
    completed = {**job, "status": "completed", "omitted": ["results"]}
    failed = {**job, "status": "failed", "omitted": ["error"]}
    waiting = {**job, "status": "pending", "due_at": "2026-01-01T00:00:00Z", "omitted": ["error"]}
    assert jobs._status_detail({**job, "status": "completed"}) == "0 files"
    for it in (completed, failed, waiting):
        assert "too large for a list" in jobs._status_detail(it)


@pytest.mark.parametrize("status", [429, 502, 503, 504])
async def test_follow_survives_an_api_that_is_away_for_a_moment(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "retry_delay", lambda _answer: 0.01)
    event = {"position": 8, "type": "BatchFinished", "stream": "batch-1", "data": {}}
    left = [status, status, 200]

    def answer(_request: httpx.Request) -> httpx.Response:
        if (now := left.pop(0)) != 200:
            return httpx.Response(now, text="<h1>Bad Gateway</h1>")
        return httpx.Response(200, content=b"data: " + json.dumps(event).encode() + b"\n\n")

    async with httpx.AsyncClient(base_url="http://here", transport=httpx.MockTransport(answer)) as client:
        async for found in follow.stream_events(client, after=1, batch_id="batch-1"):
            assert found == event
            break


async def test_follow_gives_up_on_an_api_that_stays_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "_RECONNECT_TIMEOUT_SECONDS", 0.05)
    monkeypatch.setattr(follow, "retry_delay", lambda _answer: 0.01)
    transport = httpx.MockTransport(lambda _request: httpx.Response(502))
    async with httpx.AsyncClient(base_url="http://here", transport=transport) as client:
        with pytest.raises(LedgerUnavailable, match="HTTP status 502"):
            await anext(follow.stream_events(client, after=1, batch_id="batch-1"))


@pytest.mark.parametrize("content", [{"status": "ok"}, {"status": "success"}, {"jobs": [], "total": 0}], ids=str)
@pytest.mark.parametrize(
    "arguments", [("jobs", "list"), ("jobs", "show", "job-1"), ("batches", "pause", "batch-1"), ("webhooks", "list")]
)
def test_what_is_no_jobledger_is_told_from_one_without_its_password(
    installation: Installation, content: dict[str, Any], arguments: tuple[str, ...]
) -> None:
    with answering((200, content)) as url:
        ended = installation.run(*arguments, JOBLEDGER_URL=url.replace("//", "//me:secret@"))
    assert ended.exit_code == 1
    assert "it is not a Jobledger API" in ended.err
    assert "secret" not in ended.err


def test_who_does_not_answer_may_have_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_TIMEOUT_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        ended = CliRunner().invoke(
            jobs.app, ["cancel", "job-1", "--url", f"http://127.0.0.1:{silent.getsockname()[1]}"]
        )
    assert isinstance(ended.exception, LedgerUnavailable)
    assert "may have been executed" in str(ended.exception)


def test_a_time_at_the_end_of_the_calendar_is_a_time(desk: Desk) -> None:
    job = {"job_type": "echo", "job_name": "never", "not_before": "9999-12-31T23:59:59Z", "parameters": {}}
    desk.says(0, "submit", "-", stdin=json.dumps(job))
    assert wait_until(lambda: "not before 9999-12-31 23:59:59" in desk.says(0, "jobs", "list", "--search", "never"), 10)
    listed = desk.installation.run(*("jobs", "list", "--search", "never"), JOBLEDGER_URL=desk.url, TZ="Europe/Berlin")
    assert "not before 9999-12-31 23:59:59" in listed.out


TIME = re.compile(r"\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d(?:\.\d+)?)?(?P<offset>\S{0,6})")


def test_commands_print_every_time_with_its_offset_as_options_take_it(desk: Desk) -> None:
    job_id, waiting = (desk.job(number)["job_id"] for number in (2, 3))
    hook = {"url": "http://receiver.invalid/hook"}
    body = {"jobs": [{"job_type": "echo", "parameters": {}, "webhook": hook}], "webhook": hook}
    told = desk.says(0, "submit", "-", stdin=json.dumps(body)).split(":")[0]
    assert wait_until(lambda: any(it["next_attempt_at"] for it in desk.told("webhooks", "list")), 20)
    desk.says(0, "keys", "create", "--user", "alice", "--expires-in", "1h")
    for command in (
        ("jobs", "list"),
        ("jobs", "show", job_id),
        ("jobs", "show", waiting),
        ("batches", "list"),
        ("batches", "show", told),
        ("log", "history", job_id),
        ("log", "history", desk.batch_id),
        ("log", "state", "--as-of", "20"),
        ("log", "state", "--as-of", "1", "--until", "20"),
        ("keys", "list"),
        ("webhooks", "list"),
        ("webhooks", "endpoints"),
    ):
        ended = desk.installation.run(*command, JOBLEDGER_URL=desk.url, TZ="Asia/Kolkata", COLUMNS="300")
        assert ended.exit_code == 0, ended.err
        found = [it for it in TIME.finditer(ended.out) if not it[0].startswith("9999")]  # has no local time
        assert found, command
        for shown in found:
            assert shown["offset"].startswith("+05:30"), (command, ended.out)
            text = shown[0][: -len(shown["offset"])] + "+05:30"
            assert options.parse_as_of(text, "--as-of") == datetime.fromisoformat(text)
            assert options.parse_time_option(text, "--created-after")


@pytest.mark.parametrize("kind", ["console", "json"])
def test_log_lines_have_a_time_with_its_offset(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TZ", "Asia/Kolkata")
    time.tzset()
    stamped = logging_setup._time_stamper(kind)(None, "info", {})["timestamp"]
    monkeypatch.undo()
    time.tzset()
    pattern = r"\d\d:\d\d:\d\d\+0530" if kind == "console" else r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z"
    assert re.fullmatch(pattern, stamped)
    if kind == "json":
        assert abs(datetime.now(UTC) - datetime.fromisoformat(stamped)) < timedelta(minutes=5)


def test_what_a_list_leaves_out_is_told_to_programs_beside_it(desk: Desk) -> None:
    ended = desk.types("jobs", "list", "--batch", desk.batch_id, "--limit", "3", "--ids")
    assert ended.out.count("\n") == 3
    assert ended.err == "note: showing 3 of 4; use --limit to get more\n"
    assert desk.types("jobs", "list", "--batch", desk.batch_id, "--json").err == ""


def test_what_the_api_says_is_said_in_its_words(installation: Installation) -> None:
    url = installation.commands[0].url
    wrong = installation.run("jobs", "list", "--status", "done", JOBLEDGER_URL=url)
    assert wrong.exit_code == 2
    assert "'pending', 'processing'" in wrong.err
    assert_one_line_error(installation.run("jobs", "show", "job-0", JOBLEDGER_URL=url), 1, "Job job-0 not found.")
    assert_one_line_error(
        installation.run("batches", "show", "batch-0", JOBLEDGER_URL=url), 1, "Batch batch-0 not found."
    )
    nobody = installation.run("jobs", "list", JOBLEDGER_URL="http://127.0.0.1:1")
    assert_one_line_error(nobody, 3, "Cannot connect to Jobledger at http://127.0.0.1:1", "jobledger up")
