"""`jobledger jobs …`, `errors`, `workers`, `types` and `submit`: what users do with jobs, against a running ledger."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import zipfile
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from jobledger.ledger.mongo.embedded_files import wait_until
from tests.support.installation import COMMAND, CommandOutcome, Installation, assert_one_line_error, assert_outcome
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS

pytestmark = needs_local_mongod

Run = Callable[..., CommandOutcome]
ECHO: dict[str, Any] = {"job_type": "echo", "parameters": {"text": "hello"}}
LATER: dict[str, Any] = {**ECHO, "not_before": "2099-01-01T00:00:00Z"}


@pytest.fixture
def run(running_installation: Installation, url: str) -> Run:
    """A function that runs a command for the running installation."""

    def run_command(*arguments: str, stdin: str = "", **env: str) -> CommandOutcome:
        settings: dict[str, Any] = {"JOBLEDGER_URL": url, **env}
        return running_installation.run(*arguments, stdin=stdin, **settings)

    return run_command


def run_json(run: Run, *arguments: str, stdin: str = "") -> Any:
    outcome = run(*arguments, stdin=stdin)
    assert outcome.exit_code == 0, outcome
    return json.loads(outcome.out)


def submit(run: Run, *jobs: dict[str, Any]) -> list[str]:
    """Submit jobs and return their IDs."""
    return list(run_json(run, "submit", "-", "--json", stdin=json.dumps(jobs))["job_ids"])


def fail_job(run: Run, code_text: str = "no luck", **fields: Any) -> str:
    [job_id] = submit(run, {"job_type": "echo", "parameters": {"fail": code_text}, **fields})
    assert run("jobs", "wait", job_id).exit_code == 1
    return job_id


# Output formats and IDs -----------------------------------------------------------------------------------------------


def test_get_formats_and_fields(run: Run) -> None:
    [job_id] = submit(run, {**LATER, "job_name": "evil \x1b[31m\u202e Grüße"})
    document = run_json(run, "jobs", "get", job_id, "--json")
    assert yaml.safe_load(run("jobs", "get", job_id, "-o", "yaml").out) == document
    assert "Grüße" in run("jobs", "get", job_id, "-o", "yaml").out
    for arguments in (["-o", "yaml"], ["-o", "json"], ["-o", "wide"], []):
        assert not {"\x1b", "\u202e"} & set(run("jobs", "get", job_id, *arguments).out), arguments
    assert run("jobs", "get", job_id, "-o", "name").out == f"{job_id}\n"
    picked = {"status": "pending", "error.code": None, "parameters.text": "hello"}
    fields = "status,error.code,parameters.text"
    assert run_json(run, "jobs", "get", job_id, "--json", fields) == picked
    assert run_json(run, "jobs", "get", "--json", fields, job_id) == picked
    assert run_json(run, "jobs", "get", f"--json={fields}", job_id) == picked
    assert_one_line_error(run("jobs", "get", job_id, "--json", "state"), 2, "--json state: unknown field", "job_id")
    assert_one_line_error(run("jobs", "get", job_id, "--json", "-o", "yaml"), 2, "cannot be combined")
    assert len(run_json(run, "jobs", "get", job_id, *submit(run, ECHO), "--json")) == 2


def test_beginning_of_id_is_accepted_if_unique(run: Run) -> None:
    first, second = submit(run, LATER, LATER)
    digits = next(number for number in range(len(first)) if first[number] != second[number])
    assert run("jobs", "get", first, "-o", "name").out == f"{first}\n"
    [other] = submit(run, LATER)  # the IDs of one request differ only in their last characters
    assert run("jobs", "get", other[:16], "-o", "name").out == f"{other}\n"
    assert run("jobs", "get", first.removeprefix("job-"), "-o", "name").out == f"{first}\n"
    ambiguous = run("jobs", "cancel", first[:digits])
    assert_one_line_error(ambiguous, 2, "the beginning of several job IDs", first, second)
    assert_outcome(run("jobs", "get", "job-00000000"), 1, "error: Job job-00000000 not found.", "jobledger jobs ls")
    assert_outcome(run("jobs", "get", "job-0000"), 1, "error: Job job-0000 not found.")
    batch = run_json(run, "jobs", "get", first, "--json")["batch_id"]
    assert run("batches", "get", batch[:-1] + batch[-1], "-o", "name").out == f"{batch}\n"


def test_aliases_of_other_tools_work(run: Run) -> None:
    [job_id] = submit(run, LATER)
    assert run("jobs", "show", job_id, "-o", "name").out == run("jobs", "describe", job_id, "-o", "name").out
    assert job_id in run("jobs", "list", "-o", "name").out


# Waiting and following ------------------------------------------------------------------------------------------------


def test_wait_exit_code_says_how_jobs_ended(run: Run) -> None:
    completed, later = submit(run, ECHO, LATER)
    failed = fail_job(run)
    assert_outcome(run("jobs", "wait", completed), 0, f"{completed} is completed\n")
    assert_outcome(run("jobs", "wait", completed, failed), 1, f"{failed} is failed: ECHO_FAILED: no luck\n")
    assert_outcome(run("jobs", "wait", later, "--timeout", "1s"), 4, f"error: not finished after 1s: {later}")
    assert_outcome(run("jobs", "wait", later, "--timeout", "soon"), 2, "--timeout soon", "1h30m")
    batch = run_json(run, "jobs", "get", later, "--json")["batch_id"]
    assert run("batches", "wait", batch, "--timeout", "1s").exit_code == 4
    assert run("jobs", "cancel", later).exit_code == 0
    assert_outcome(run("jobs", "wait", later), 1, f"{later} is cancelled\n")
    assert_outcome(run("batches", "wait", batch), 1, f"{batch} is partial\n")
    assert [job["status"] for job in run_json(run, "jobs", "wait", completed, "--json")] == ["completed"]


def test_logs_filters_and_follow_ends_with_job(run: Run) -> None:
    failed = fail_job(run, "broken\nagain")
    lines = run("jobs", "logs", failed).out.splitlines()
    assert len(lines) == 2
    assert lines[0].endswith(" error   Failed: broken")
    assert lines[1] == "  again", "line breaks are kept, and no line looks like another entry"
    entry = run_json(run, "jobs", "logs", failed, "--json")
    assert (entry["level"], entry["attempt"]) == ("error", 1)
    assert run("jobs", "logs", failed, "--level", "error", "--since", "10m", "--attempt", "1", "-n", "1").out
    for option in (["--attempt", "2"], ["--lines", "0"]):
        assert run("jobs", "logs", failed, *option).out == ""
    [slow] = submit(run, {"job_type": "echo", "parameters": {"seconds": 1.5, "fail": "late"}})
    followed = run("jobs", "logs", slow, "--follow")
    assert followed.exit_code == 0
    assert followed.out.count("Failed: late") == 1
    assert run("jobs", "logs", slow, "-f").out == followed.out, "the job has ended"


def test_watch_shows_events_until_job_ends(run: Run) -> None:
    [slow] = submit(run, {"job_type": "echo", "parameters": {"seconds": 1.5, "fail": "late \x1b[2J"}})
    watched = run("jobs", "watch", slow)
    assert watched.exit_code == 1
    assert watched.out.splitlines()[-1].endswith("JobFailed ECHO_FAILED: late \\x1b[2J")
    assert_outcome(run("jobs", "watch", slow), 1, f"{slow} is failed\n")


# Changes --------------------------------------------------------------------------------------------------------------


def test_retry_with_changed_parameter_completes_job(run: Run) -> None:
    failed = fail_job(run, job_name="Wrong")
    preview = run("jobs", "retry", failed, "--set", "fail=null", "--set", "seconds=0.1", "--dry-run")
    assert (preview.exit_code, preview.err) == (0, "fail: no luck → null\nseconds: not set → 0.1\n")
    assert run_json(run, "jobs", "get", failed, "--json")["status"] == "failed"
    assert_outcome(run("jobs", "retry", failed, "--set", "fail=null"), 0, f"{failed} is pending\n")
    assert run("jobs", "wait", failed).exit_code == 0
    assert_one_line_error(run("jobs", "retry", "--set", "a=b", "--error", "X"), 2, "exactly one ID")
    assert_one_line_error(run("jobs", "retry", failed, "--set", "fail"), 2, "expected NAME=VALUE")


def test_bulk_retry_asks_previews_and_changes_matching_jobs(run: Run, running_installation: Installation) -> None:
    jobs = [{"job_type": "echo", "parameters": {"fail": "x", "track": "Bulk"}}] * 3
    ids = sorted(submit(run, *jobs))
    assert run("jobs", "wait", *ids).exit_code == 1
    filters = ("--error", "ECHO_FAILED", "--track", "Bulk")
    preview = run("jobs", "retry", *filters, "--dry-run")
    assert sorted(preview.out.splitlines()[:3]) == ids
    assert preview.out.endswith("\n3 of 3 matching jobs would change\n")
    other = run("jobs", "retry", "--error", "OTHER", "--track", "Bulk", "--dry-run")
    assert other.out == "0 of 0 matching jobs would change\n"
    unanswered = run("jobs", "retry", *filters)
    assert_one_line_error(unanswered, 2, "Retry 3 jobs?", "--yes")
    assert {run_json(run, "jobs", "get", job_id, "--json")["attempt"] for job_id in ids} == {1}
    assert ask(running_installation, run, "no\n", "jobs", "retry", *filters) == 1
    assert {run_json(run, "jobs", "get", job_id, "--json")["attempt"] for job_id in ids} == {1}
    assert ask(running_installation, run, "y\n", "jobs", "retry", *filters) == 0
    assert wait_until(
        lambda: {run_json(run, "jobs", "get", job_id, "--json")["attempt"] for job_id in ids} == {2}, DEADLINE_SECONDS
    )
    assert run("jobs", "wait", *ids).exit_code == 1
    answer = run_json(run, "jobs", "retry", *filters, "--yes", "--json")
    assert answer["jobs"] == {"total": 3, "changed": 3, "unchanged": 0, "rejected": 0}
    assert_one_line_error(run("jobs", "retry"), 2, "Which jobs?")
    assert_one_line_error(run("jobs", "cancel", ids[0], "--track", "Bulk"), 2, "cannot be combined")


def ask(installation: Installation, run: Run, answer: str, *arguments: str) -> int:
    """Run a command on a terminal that answers its question. Return the exit code."""
    controller, terminal = pty.openpty()
    os.write(controller, answer.encode())
    process = subprocess.Popen(
        [COMMAND, *arguments, "--url", installation.commands[0].url],
        cwd=installation.directory,
        env=installation.env,
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
    )
    try:
        return process.wait(60)
    finally:
        os.close(terminal)
        os.close(controller)


def test_delete_asks_and_deletes_jobs_by_id_and_filter(run: Run, running_installation: Installation) -> None:
    first, second, third = submit(run, *[{**LATER, "parameters": {"track": "Gone"}}] * 3)
    assert_one_line_error(run("jobs", "delete", first), 2, "Delete 1 job and all files?", "--yes")
    assert ask(running_installation, run, "no\n", "jobs", "delete", first) == 1
    assert run("jobs", "get", first).exit_code == 0
    assert_outcome(run("jobs", "delete", first, "--yes"), 0, f"{first} is deleted\n")
    assert_outcome(run("jobs", "delete", first, "--yes"), 1, f"{first}: Job {first} not found.")
    assert wait_until(lambda: run("jobs", "get", first).exit_code == 1, DEADLINE_SECONDS)
    filters = ("--track", "Gone", "--status", "pending")
    preview = run("jobs", "delete", *filters, "--dry-run")
    assert sorted(preview.out.splitlines()[:2]) == sorted([second, third])
    assert run("jobs", "get", second, third).exit_code == 0
    answer = run_json(run, "jobs", "delete", *filters, "--yes", "--json")
    assert answer["jobs"]["changed"] == 2
    assert wait_until(lambda: run("jobs", "ls", "--track", "Gone", "-o", "name").out == "", DEADLINE_SECONDS)


def test_bulk_cancel_changes_only_matching_jobs(run: Run) -> None:
    first, second = submit(run, {**LATER, "parameters": {"track": "A1"}}, {**LATER, "parameters": {"track": "A2"}})
    assert wait_until(lambda: first in run("jobs", "ls", "--track", "A1", "-o", "name").out, DEADLINE_SECONDS)
    assert_outcome(run("jobs", "cancel", "--track", "A1", "-y"), 0, "1 of 1 matching job changed\n")
    statuses = [run_json(run, "jobs", "get", job_id, "--json")["status"] for job_id in (first, second)]
    assert statuses == ["cancelled", "pending"]
    assert_outcome(run("jobs", "archive", "--track", "A1", "-y"), 0, "1 of 1 matching job changed\n")
    assert wait_until(lambda: first in run("jobs", "ls", "--archived", "-o", "name").out, DEADLINE_SECONDS)


def test_edit_changes_pending_job_by_option_and_editor(run: Run, running_installation: Installation) -> None:
    [job_id] = submit(run, LATER)
    assert_outcome(run("jobs", "edit", job_id, "--set", "text=7", "--priority", "5"), 0, "text: hello → 7")
    job = run_json(run, "jobs", "get", job_id, "--json")
    assert (job["parameters"]["text"], job["priority"]) == ("7", 5), "text stays text"
    editor = f'{sys.executable} -c \'import sys; open(sys.argv[1], "a").write("extra: [1, 2]\\n")\''
    assert_outcome(run("jobs", "edit", job_id, EDITOR=editor, VISUAL=""), 0, "extra: not set → [1, 2]")
    assert run_json(run, "jobs", "get", job_id, "--json")["parameters"] == {"text": "7", "extra": [1, 2]}
    assert_outcome(run("jobs", "edit", job_id, EDITOR="true", VISUAL=""), 0, "Nothing changed.")
    for command, text in (("false", "exited with 1"), ("/nowhere/editor", "cannot be run"), ("'", "cannot be run")):
        assert_one_line_error(run("jobs", "edit", job_id, EDITOR=command, VISUAL=""), 2, text)
    broken = f'{sys.executable} -c \'import sys; open(sys.argv[1], "wb").write(b"[\\xff")\''
    assert_one_line_error(run("jobs", "edit", job_id, EDITOR=broken, VISUAL=""), 2, "Not valid YAML")
    failed = fail_job(run)
    assert_one_line_error(run("jobs", "edit", failed, "--set", "fail=null"), 1, "only pending jobs", "--retry")
    assert_outcome(run("jobs", "edit", failed, "--set", "fail=null", "--retry"), 0, f"{failed} is pending")
    assert run("jobs", "wait", failed).exit_code == 0


def test_export_writes_archive_of_results(run: Run, running_installation: Installation) -> None:
    [job_id] = submit(run, ECHO)
    assert run("jobs", "wait", job_id).exit_code == 0
    assert_outcome(run("jobs", "export", job_id), 0, f"{job_id}.zip: ")
    path = running_installation.directory / f"{job_id}.zip"
    assert any(name.endswith("echo.md") for name in zipfile.ZipFile(path).namelist())
    batch = run_json(run, "jobs", "get", job_id, "--json")["batch_id"]
    assert_outcome(run("batches", "export", batch, "--to", "batch.zip"), 0, "batch.zip: ")
    assert_outcome(run("jobs", "export", job_id, "--to", "/nowhere/x.zip"), 1, "error: /nowhere/x.zip cannot be")
    failed = fail_job(run)
    assert_outcome(run("jobs", "export", failed), 1, "error: ")
    assert not [*running_installation.directory.glob("*.part"), *running_installation.directory.glob(f"{failed}*")]


# Overviews and submission ---------------------------------------------------------------------------------------------


def test_errors_ls_groups_failed_jobs(run: Run) -> None:
    jobs = [fail_job(run, text, user_id=None) for text in ("first", "second")]
    [batch] = {run_json(run, "jobs", "get", jobs[1], "--json")["batch_id"]}
    [group] = run_json(run, "errors", "ls", "--batch", batch, "--json")
    assert group["code"] == "ECHO_FAILED"
    assert (group["jobs"], group["job_id"], group["message"]) == (1, jobs[1], "second")
    assert run("errors", "ls").out.splitlines()[0].split() == ["ERROR", "JOBS", "LAST", "NEWEST", "JOB", "MESSAGE"]
    assert run("errors", "ls", "--track", "nowhere").err == "No failed jobs match these filters.\n"


def test_workers_and_types_ls_describe_them(run: Run) -> None:
    [worker] = run_json(run, "workers", "ls", "--json")
    assert worker["problem"] is None
    assert worker["worker_id"] in run("workers", "ls").out
    assert run("workers", "ls", "--unhealthy").err == "No unhealthy workers.\n"
    assert run("types", "ls", "-o", "name").out.split() == ["echo", "session"]
    assert "session  event session url filename track [" in run("types", "ls").out
    parameters = {it["name"]: it for it in run_json(run, "types", "get", "session", "-o", "json")["parameters"]}
    assert (parameters["url"]["required"], parameters["source_language"]["default"]) == (True, "en")
    assert_outcome(run("types", "get", "ekho"), 1, "error: Job type ekho not found.", "hint: Did you mean echo?")


def test_submit_combines_files_parameters_and_key(run: Run, running_installation: Installation) -> None:
    directory = running_installation.directory
    (directory / "one.json").write_text(json.dumps(ECHO))
    (directory / "two.yaml").write_text("[{job_type: echo, parameters: {text: b}}, {text: c}]")
    (directory / "three.yaml").write_text("{batch_name: Named, jobs: []}")
    files = ("one.json", "two.yaml", "--type", "echo", "--param", "track=T", "--param", "n.m=1", "--name", "Both")
    request = json.loads(run("submit", *files, "--dry-run").out)
    assert request["batch_name"] == "Both"
    assert [job["parameters"]["text"] for job in request["jobs"]] == ["hello", "b", "c"]
    assert all(job["parameters"]["track"] == "T" and job["parameters"]["n"] == {"m": 1} for job in request["jobs"])
    ids = run("submit", *files, "-o", "name").out.split()
    assert len(ids) == 3
    submitted = run("submit", "--type", "echo", "--param", "text=x", "--name", "One").out
    assert submitted.splitlines()[1].endswith("  One")
    keyed = [run("submit", "one.json", "--key", "once", "-o", "name").out for _ in range(2)]
    assert keyed[0] == keyed[1] != ""
    assert_one_line_error(run("submit", "one.json", "three.yaml"), 2, "three.yaml: only a single file", "batch_name")
    later = run("submit", "--type", "echo", "--param", "seconds=60", "--timeout", "1s", "--json")
    assert later.exit_code == 4
    assert "hint: Wait for it with `jobledger batches wait batch-" in later.err
    assert run("jobs", "cancel", *json.loads(later.out)["job_ids"]).exit_code == 0


def test_doctor_json_has_one_result_per_check(run: Run) -> None:
    results = {result["name"]: result for result in run_json(run, "doctor", "--json")}
    assert all(result["is_ok"] and result["advice"] is None for result in results.values())
    assert {"API", "Projector", "Jobs", "Workers", "Clocks", "Job type echo", "Job type session"} <= results.keys()
    lines = run("doctor", COLUMNS="40").out.splitlines()
    assert len(lines) == 1 + len(results), "one line per check"
    unreachable = run("doctor", "--json", JOBLEDGER_URL="http://127.0.0.1:1")
    assert unreachable.exit_code == 1
    [problem] = [result for result in json.loads(unreachable.out) if not result["is_ok"]]
    assert problem["name"] == "API"
