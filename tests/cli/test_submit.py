"""`jobledger submit`: input formats, exit codes, and errors."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import RunCommand
from tests.support.installation import Installation, assert_one_line_error, assert_outcome
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.scripted_server import serve_answers

pytestmark = needs_local_mongod

ECHO = {"job_type": "echo", "parameters": {"text": "hello"}}
UNREACHABLE = "http://127.0.0.1:1"


def test_submit_wait_completed_jobs_exits_0(running_installation: Installation, url: str) -> None:
    (running_installation.directory / "jobs.json").write_text(json.dumps([ECHO, ECHO]))
    outcome = running_installation.run("submit", "jobs.json", "--wait", "--url", url)

    assert_outcome(outcome, 0, "2 jobs accepted")
    assert outcome.out.count("completed") == 2


def test_submit_wait_failed_job_exits_1(running_installation: Installation, url: str) -> None:
    jobs = [ECHO, {"job_type": "echo", "parameters": {"fail": "no [bold]luck[/nothing]", "session": "Sad [/] talk"}}]
    outcome = running_installation.run("submit", "-", "--wait", "--url", url, stdin=json.dumps(jobs))

    assert_outcome(outcome, 1, "completed", "failed Sad [/] talk: no [bold]luck[/nothing]")


def test_submit_without_wait_prints_accepted_batch(running_installation: Installation, url: str) -> None:
    outcome = running_installation.run(
        "submit", "-", stdin=json.dumps({"batch_name": "x", "jobs": [ECHO]}), JOBLEDGER_URL=url
    )
    assert_outcome(outcome, 0, "batch-", "1 job accepted")


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([ECHO], indent="\t"),
        json.dumps(ECHO),
        json.dumps({"jobs": [{**ECHO, "parameters": {"session": "Emoji 😀"}}]}),
        json.dumps({"jobs": [{**ECHO, "parameters": {"session": "a\u2028b\u2029c\x85d\x0be"}}]}),
        "- job_type: echo\n  parameters: {session: Käse}\n",
        "job_type: echo\nparameters:\n  day: 2025-02-02\n",
    ],
    ids=["JSON with tabs", "single job", "escaped surrogate pairs", "line separators", "YAML", "YAML with a date"],
)
def test_submit_json_or_yaml_is_accepted_and_followed(running_installation: Installation, url: str, text: str) -> None:
    outcome = running_installation.run("submit", "-", "--wait", "--url", url, stdin=text)
    assert_outcome(outcome, 0, "1 job accepted", "completed")


def test_submit_type_option_applies_to_plain_sessions(running_installation: Installation, url: str) -> None:
    sessions = [{"event": "E", "session": f"Talk {number}"} for number in range(3)]
    outcome = running_installation.run(
        "submit", "-", "--wait", "--type", "echo", "--url", url, stdin=json.dumps(sessions)
    )
    assert_outcome(outcome, 0, "Talk 0", "Talk 1", "Talk 2")


@pytest.mark.parametrize(
    ("arguments", "stdin", "expected_texts"),
    [
        (["submit", "nowhere.json"], "", ["nowhere.json: file not found"]),
        (["submit", "."], "", [". cannot be read"]),
        (["submit", "-"], "{[", ["- is neither JSON nor YAML"]),
        (["submit", "-"], "[" * 20_000, ["- is neither JSON nor YAML"]),
        (["submit", "-"], b"\xff\xfe\x00", ["-"]),
        (["submit", "-"], "", ["Expected a job, a list of jobs, or a batch"]),
        (["submit", "-"], "just words", ["Expected a job, a list of jobs, or a batch, got str"]),
        (["submit", "-"], '{"jobs": 5}', ["jobs: expected a list of jobs, got int"]),
        (["submit", "-", "--type", "echo"], '{"jobs": null}', ["jobs: expected a list"]),
        (["submit", "-"], "1: x", ["cannot be written as JSON"]),
        (["submit", "-"], "a: !!binary aGVsbG8=", ["cannot be written as JSON"]),
        (["submit", "-"], f"a: {10**30}", ["cannot be written as JSON"]),
        (["submit", "-", "--url", "localhost:5001"], "{}", ["http://127.0.0.1:5001"]),
        (["submit", "-", "--url", "http://[::1"], "{}", ["is not a URL"]),
        (["submit", "-", "--url", ""], "{}", ["is not a URL"]),
    ],
    ids=str,
)
def test_submit_invalid_input_is_one_line_usage_error(
    run_command: RunCommand,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    stdin: str | bytes,
    expected_texts: list[str],
) -> None:
    monkeypatch.setenv("JOBLEDGER_URL", UNREACHABLE)
    assert_one_line_error(run_command(*arguments, stdin=stdin), 2, *expected_texts)


def test_submit_in_real_process_has_same_exit_codes(stopped_installation: Installation) -> None:
    assert_one_line_error(stopped_installation.run("submit", "nowhere.json"), 2, "nowhere.json: file not found")
    assert_one_line_error(stopped_installation.run("submit", "-", stdin="{["), 2, "- is neither JSON nor YAML")
    assert_one_line_error(
        stopped_installation.run("submit", "-", "--url", UNREACHABLE, stdin="{}"), 3, UNREACHABLE, "jobledger up"
    )


def test_submit_rejected_by_api_prints_its_message(running_installation: Installation, url: str) -> None:
    refused = running_installation.run("submit", "-", "--url", url, stdin=json.dumps([ECHO, {"event": "E"}]))
    assert_one_line_error(refused, 1, "jobs[1].parameters")


def test_submit_unreachable_url_exits_3(run_command: RunCommand) -> None:
    for url in (UNREACHABLE, "http://no-such-host.invalid:5001"):
        assert_one_line_error(run_command("submit", "-", "--url", url, stdin="{}"), 3, url, "jobledger up")


@pytest.mark.parametrize("answer", ["<html>", "[]", "{}", '{"status": "success"}', "null", '"x"'])
@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_submit_to_other_server_exits_1(run_command: RunCommand, answer: str, status: int) -> None:
    with serve_answers((status, answer)) as url:
        assert_one_line_error(run_command("submit", "-", "--url", url, stdin="{}"), 1)


def test_submit_to_api_without_database_exits_3(run_command: RunCommand) -> None:
    answer = json.dumps(
        {"status": "error", "code": "database_unavailable", "message": "The database is unavailable.", "details": {}}
    )
    with serve_answers((503, answer)) as url:
        assert_one_line_error(run_command("submit", "-", "--url", url, stdin="{}"), 3, "The database is unavailable.")
