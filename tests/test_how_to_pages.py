"""Run the commands and programs of the how-to pages."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from pymongo import MongoClient

from jobledger.cli.settings_file import read_settings
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.embedded_files import wait_until
from jobledger.workers.processors.session.document import render_document
from tests.processors.session.fixtures import html, make_content, make_page_text, make_parameters, serve_site
from tests.support.doc_examples import (
    DOCS,
    complete_job,
    create_installation,
    needs_curl,
    read_code_blocks,
    read_line,
    run_program,
    run_shell,
)
from tests.support.installation import Installation
from tests.support.ledger_setup import open_ledger
from tests.support.polling import DEADLINE_SECONDS


@pytest.fixture(scope="module")
def installation(
    mongodb_uri: str, mongodb_client: MongoClient[dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Installation]:
    """An installation in which all roles run, with default settings. Tests must not stop or reconfigure it.

    A test asserts only about jobs that it added itself. Only one test may add jobs that fail: its commands list and
    restart all of them.
    """
    db_name = f"test_{uuid4().hex[:16]}"
    with create_installation(mongodb_uri, db_name, tmp_path_factory.mktemp("up"), {}) as installation:
        installation.start_up_command()
        yield installation
    mongodb_client.drop_database(db_name)


async def test_follow_the_log_program_after_kill_continues_at_its_position(
    mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    connection = Connection(mongodb_uri, db_name)
    [text] = read_code_blocks(DOCS / "how-to" / "follow-the-log.md", "python")
    text = text.replace("ledger_client(uri)", f"ledger_client(uri, db_name={connection.db_name!r})")
    async with open_ledger(connection, with_change_stream=False) as ledger:
        first = await complete_job(ledger)
        with run_program(text, tmp_path / "follow.py", connection.uri) as lines:
            assert first in await read_line(lines)
            second = await complete_job(ledger)
            assert second in await read_line(lines)
        third = await complete_job(ledger)
        with run_program(text, tmp_path / "follow.py", connection.uri) as lines:
            while third not in (line := await read_line(lines)):
                assert first in line or second in line  # events of the last second before the kill may repeat


async def test_submit_in_a_transaction_program_submits_job(installation: Installation, tmp_path: Path) -> None:
    [text] = read_code_blocks(DOCS / "how-to" / "submit-in-a-transaction.md", "python")
    mongodb = yaml.safe_load((installation.directory / "config.yaml").read_text())["mongodb"]
    uri, db_name = mongodb["uri"], mongodb["db_name"]
    text = text.replace("event_processing", db_name).replace("client.shop", f"client.{db_name}")
    with run_program(text, tmp_path / "order.py", uri) as lines:
        job_id = (await read_line(lines)).strip()
    url = installation.commands[-1].url

    def show() -> str:
        return installation.run("jobs", "show", job_id, "--json", JOBLEDGER_URL=url).out

    assert wait_until(lambda: '"completed"' in show(), DEADLINE_SECONDS)
    with MongoClient[dict[str, Any]](uri) as client:
        [order] = client[db_name].orders.find()
    assert str(order["_id"]) in show()


AUTHENTICATION = DOCS / "how-to" / "authentication.md"
KEYS, PROVIDER, SHARED_SECRET, PROXY = (yaml.safe_load(block) for block in read_code_blocks(AUTHENTICATION, "yaml"))
CREATE_KEY, USE_KEY, REVOKE_KEY, END_SESSIONS, CREATE_SECRET, USE_PROXY = read_code_blocks(AUTHENTICATION, "sh")
LIST_JOBS = USE_KEY.splitlines()[0]


@needs_curl
def test_authentication_how_to_api_key_is_created_used_and_revoked(
    mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    with create_installation(mongodb_uri, db_name, tmp_path, KEYS) as installation:
        installation.start_up_command()
        # The API learns of keys by the change stream, which may take longer than until the next request.
        wait_for_key, wait_for_revocation = (
            f"until {LIST_JOBS} > /dev/null; do sleep 0.1; done",
            f"while {LIST_JOBS}; do sleep 0.1; done",
        )
        output = run_shell(
            installation, CREATE_KEY, wait_for_key, USE_KEY, END_SESSIONS, REVOKE_KEY, wait_for_revocation
        )
    assert '"total":0' in output
    assert "1 job accepted" in output
    assert "completed" in output
    assert "Sessions ended: 0" in output
    assert "is revoked." in output
    assert '"code":"invalid_credentials"' in output


@needs_curl
def test_authentication_how_to_issued_token_is_accepted(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    [issue] = read_code_blocks(AUTHENTICATION, "python")
    (tmp_path / "issue.py").write_text(issue)
    with create_installation(mongodb_uri, db_name, tmp_path, SHARED_SECRET) as installation:
        run_shell(installation, CREATE_SECRET)
        installation.start("api").wait_until_ready()
        output = run_shell(installation, f"JOBLEDGER_KEY=$({sys.executable} issue.py)", LIST_JOBS)
    assert '"total":0' in output


@needs_curl
def test_authentication_how_to_proxy_headers_are_accepted(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    with create_installation(mongodb_uri, db_name, tmp_path, PROXY) as installation:
        installation.start("api").wait_until_ready()
        assert '"total":0' in run_shell(installation, USE_PROXY)
    [nginx] = read_code_blocks(AUTHENTICATION, "nginx")
    for header in ("user_header", "groups_header"):
        assert f"proxy_set_header {PROXY['auth']['proxy'][header]} $" in nginx


def test_authentication_how_to_identity_provider_settings_are_valid(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(PROVIDER))
    settings, _ = read_settings(tmp_path / "config.yaml")
    assert settings.auth.jwt.roles_claim == "realm_access.roles"
    assert settings.auth.admins == ["team-operators"]


def test_manage_jobs_how_to_commands_list_stop_and_restart_jobs(installation: Installation) -> None:
    """The batch has two jobs that fail and one that waits and is cancelled."""
    how_to = DOCS / "how-to" / "manage-jobs.md"
    list_commands, show_commands, stop_commands, continue_commands, correct, _, bulk_commands = read_code_blocks(
        how_to, "sh"
    )
    failing = {"job_type": "echo", "job_name": "Opening", "parameters": {"fail": "no luck"}}
    batch = {"jobs": [failing, failing, {**failing, "not_before": "2099-01-01T00:00:00Z"}]}
    url = installation.commands[-1].url
    batch_id = installation.run("submit", "-", stdin=json.dumps(batch), JOBLEDGER_URL=url).out.split(":")[0]
    assert wait_until(
        lambda: "2 failed" in run_shell(installation, f"jobledger batches get {batch_id}"), DEADLINE_SECONDS
    )
    [waiting] = run_shell(installation, f"jobledger jobs ls --batch {batch_id} --status pending -o name").split()
    ids = f"BATCH={batch_id} JOB={waiting}"
    output = run_shell(installation, ids, list_commands, show_commands)
    assert output.count("ECHO_FAILED: no luck") == 2 + 2, "in the list of failed jobs and in the search by name"
    assert re.search(r"\nECHO_FAILED +2 ", output)
    assert "not before 2099" in output
    output = run_shell(installation, ids, stop_commands, continue_commands)
    assert f"{batch_id} is processing,paused\n" in output
    assert f"{waiting} is cancelled\n" in output
    assert f"{waiting} is pending\n" in output
    assert re.search(rf"{batch_id}: [23] of 3 jobs changed\n", output), "the third may have failed again already"
    assert wait_until(
        lambda: (
            run_shell(installation, f"jobledger jobs ls --batch {batch_id} --status failed -o name").count("job-") == 3
        ),
        DEADLINE_SECONDS,
    )
    output = run_shell(installation, bulk_commands.replace("FETCH_FAILED", "ECHO_FAILED"))
    assert "3 of 3 matching jobs would change\n" in output
    assert "3 of 3 matching jobs changed\n" in output
    assert wait_until(
        lambda: "3 failed" in run_shell(installation, f"jobledger batches get {batch_id}"), DEADLINE_SECONDS
    )
    assert run_shell(installation, ids, correct) == f"{waiting} is pending\n"


WEBHOOKS = DOCS / "how-to" / "webhooks.md"


@needs_curl
def test_webhooks_how_to_commands_send_list_and_redeliver(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    submit, list_missed, secrets, redeliver = read_code_blocks(WEBHOOKS, "sh")
    (example, created), [config] = read_code_blocks(WEBHOOKS, "json"), read_code_blocks(WEBHOOKS, "yaml")
    settings = yaml.safe_load(config)
    settings["webhooks"] |= {"allowed_private_hosts": ["127.0.0.1"], "echo_enabled": True, "retry_delays_seconds": [0]}
    with create_installation(mongodb_uri, db_name, tmp_path, settings) as installation:
        installation.start_up_command()
        callback_url = f"{installation.commands[-1].url}/api/events/test-webhook-callback"
        answer = json.loads(
            run_shell(installation, submit.replace("https://cms.example.org/hooks/jobledger", callback_url))
        )
        assert json.loads(created).keys() <= answer.keys()
        [endpoint] = answer["webhook_secrets"]
        assert endpoint.keys() == json.loads(created)["webhook_secrets"][0].keys()
        delivered: list[Any] = []

        def has_delivered() -> bool:
            output = run_shell(installation, "jobledger webhooks ls --status delivered --json")
            delivered[:] = json.loads(output)
            return bool(delivered)

        assert wait_until(has_delivered, DEADLINE_SECONDS)
        [delivery] = delivered
        received = json.loads(run_shell(installation, f"curl -s {callback_url}"))["received"][0]
        body = json.loads(received["body"])
        list_command, redeliver_one, redeliver_many = redeliver.splitlines()
        output = run_shell(
            installation,
            list_command,
            redeliver_one.replace("delivery-job-679f3d0c8f1b2a0001000000-9", delivery["delivery_id"]),
        )
        assert output == "Scheduled 1 delivery.\n"
        assert run_shell(installation, redeliver_many) == "Scheduled 0 deliveries.\n"
        list_missed = list_missed.replace("0f6c1a2b3c4d5e6f70818283", delivery["endpoint_id"])
        missed = run_shell(installation, list_missed.replace("=11", "=0"))
        assert json.loads(missed)["deliveries"][0]["delivery_id"] == delivery["delivery_id"]
        test_output = run_shell(installation, f"jobledger webhooks test {callback_url} --header 'X-Key: 1'")
        assert test_output.startswith("200 delivered (")
        unreachable = installation.run("webhooks", "test", "http://127.0.0.1:1/")
        assert (unreachable.exit_code, "refused the connection" in unreachable.out) == (1, True)
        without_filter = installation.run("webhooks", "redeliver")
        assert (without_filter.exit_code, "--status abandoned" in without_filter.err) == (2, True)
        assert run_shell(installation, "jobledger webhooks generate-secret").startswith("whsec_")
        output = run_shell(installation, secrets.replace("0f6c1a2b3c4d5e6f70818283", endpoint["endpoint_id"]))
        assert callback_url in output
        assert "whsec_" in output.replace(endpoint["secret"], ""), "the rotation shows a new secret"
    assert body["job"]["parameters"] == {"text": "hello", "extra": {"node": 17}}
    assert body["job"]["job_name"] == "cms-4711"
    shown_body = json.loads(example)
    assert shown_body.keys() - {"batch"} == body.keys()
    assert shown_body["job"].keys() <= body["job"].keys()
    assert shown_body["metadata"].keys() <= body["metadata"].keys()


JOB_TYPES = DOCS / "how-to" / "job-types.md"
FUNCTION, CLASS = read_code_blocks(JOB_TYPES, "python")
RUN_APP, SUBMIT_JOB, INSTALL = read_code_blocks(JOB_TYPES, "sh")
MAX_EXAMPLE_LINES = 15


def write_word_count(directory: Path) -> None:
    """Write the example into a package of its own, beside packages with the names of Jobledger's own."""
    for name, text in {"shop/wordcount.py": FUNCTION, "workers/__init__.py": "", "api/__init__.py": ""}.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def submit_word_count(installation: Installation) -> Any:
    """Submit the job as the page does, and return it when it has ended."""
    with serve_site() as site:
        site.put("/", html("<p>Four words and more</p>"))
        output = run_shell(installation, SUBMIT_JOB.replace("http://127.0.0.1:8000/", site.url("/")))
        assert "completed" in output
        invalid = installation.run(
            *("submit", "-", "--type", "wordcount"), stdin='{"uri": 1}', JOBLEDGER_URL=installation.commands[-1].url
        )
        assert invalid.exit_code != 0
        assert "url" in invalid.err
        jobs_json = run_shell(installation, "curl -s 'http://127.0.0.1:5001/api/events/jobs?job_type=wordcount'")
    [job] = json.loads(jobs_json)["jobs"]
    return job


def test_job_types_how_to_function_of_own_package_processes_job(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    assert sum(bool(line.strip()) for line in FUNCTION.splitlines()) <= MAX_EXAMPLE_LINES
    with create_installation(mongodb_uri, db_name, tmp_path, {}) as installation:
        write_word_count(installation.directory)
        installation.start(*RUN_APP.split()[1:]).wait_until_ready()
        job = submit_word_count(installation)
    assert (job["status"], job["results"]["output"]) == ("completed", {"words": 4})
    assert job["results"]["markdown_file"] == f"/events/wordcount/{job['job_id']}.md"
    assert any("fetched 26 characters" in entry["message"] for entry in job["logs"])


def test_job_types_how_to_installed_package_processes_job(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    [project] = read_code_blocks(JOB_TYPES, "toml")
    package = tmp_path / "package"
    write_word_count(package)
    (package / "pyproject.toml").write_text(project)
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--target", tmp_path / "installed")
    subprocess.run([sys.executable, "-m", *INSTALL.split(), *options], cwd=package, check=True, capture_output=True)
    with create_installation(mongodb_uri, db_name, tmp_path / "home", {}) as installation:
        installation.start("up", PYTHONPATH=str(tmp_path / "installed")).wait_until_ready()
        job = submit_word_count(installation)
    assert (job["status"], job["results"]["output"]) == ("completed", {"words": 4})


def test_job_types_how_to_class_processes_job(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    with create_installation(mongodb_uri, db_name, tmp_path, {}) as installation:
        (tmp_path / "count.py").write_text(CLASS)
        up = installation.start("up", "--app", "count:app").wait_until_ready()
        submitted = installation.run(
            *("submit", "-", "--type", "count", "--wait"), stdin='{"text": "one two"}', JOBLEDGER_URL=up.url
        )
        assert "completed" in submitted.out, submitted
        jobs_json = run_shell(installation, "curl -s 'http://127.0.0.1:5001/api/events/jobs?job_type=count'")
    [job] = json.loads(jobs_json)["jobs"]
    assert job["results"]["output"] == {"words": 2}


SESSIONS = DOCS / "how-to" / "sessions.md"


def test_sessions_how_to_settings_are_valid(tmp_path: Path) -> None:
    for number, block in enumerate(read_code_blocks(SESSIONS, "yaml")):
        path = tmp_path / f"{number}.yaml"
        path.write_text(block)
        settings, _ = read_settings(path)
        assert settings.processors["session"]


def test_sessions_how_to_template_names_are_defined() -> None:
    named = re.findall(r"^\| `([a-z_]+)` \|", SESSIONS.read_text(encoding="utf-8"), re.MULTILINE)
    names = [name for name in named if name not in ("enrich", "markdown")]  # these are steps
    assert {"front_matter", "session", "labels", "warnings"} <= set(names)
    rendered = render_document(
        parameters=make_parameters(),
        job_id="job-1",
        content=make_content(make_parameters(), make_page_text()),
        warnings=["Example warning"],
        template="".join(f"{{{{ {name} }}}}" for name in names),
    )
    assert "Example warning" in rendered


def test_audit_how_to_commands_follow_verify_and_rebuild(installation: Installation) -> None:
    follow, show_history, verify, verify_files, rebuild, show_state = read_code_blocks(
        DOCS / "how-to" / "audit.md", "sh"
    )
    sessions = json.dumps([{"job_type": "echo", "parameters": {"text": "hello"}}] * 3)
    url = installation.commands[-1].url
    assert installation.run("submit", "-", "--wait", "--url", url, stdin=sessions).exit_code == 0
    listed = json.loads(run_shell(installation, 'curl -s "$JOBLEDGER_URL/api/events/jobs?status=completed"'))
    job = f"JOB={listed['jobs'][0]['job_id']}"
    assert "JobCompleted" in run_shell(installation, follow)
    assert "status processing → completed" in run_shell(installation, job, show_history)
    output = run_shell(installation, verify)
    assert "are intact" in output
    assert "The views match the log" in output
    assert "checked: all are intact" in run_shell(installation, verify_files)
    output = run_shell(installation, rebuild)
    assert "The views match the log" in output
    assert "all views" in output
    assert "Rebuilt statistics" in output
    assert '"changes"' in run_shell(installation, show_state)


def test_backup_how_to_export_is_imported(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    full_export, incremental_export, restore, *_ = read_code_blocks(DOCS / "how-to" / "backup.md", "sh")
    with create_installation(mongodb_uri, db_name, tmp_path, {}) as installation:
        installation.start_up_command()
        url = installation.commands[-1].url
        sessions = json.dumps([{"job_type": "echo", "parameters": {"text": "hello"}}] * 3)
        exported = {"to": 0}
        for export in (full_export, incremental_export):
            assert installation.run("submit", "-", "--wait", "--url", url, stdin=sessions).exit_code == 0
            command = export.rstrip().replace("1043", str(exported["to"] + 1))
            exported = json.loads(run_shell(installation, f"{command} --json"))
        try:
            output = run_shell(installation, restore.replace("DB_NAME=restored", f"DB_NAME={db_name}-r"))
        finally:
            with MongoClient[dict[str, Any]](mongodb_uri) as client:
                client.drop_database(f"{db_name}-r")
    assert f"Imported and verified {exported['to']} events" in output
    assert "The views match the log" in output


def test_backup_how_to_copied_directory_is_complete_installation(tmp_path: Path) -> None:
    copy_command = read_code_blocks(DOCS / "how-to" / "backup.md", "sh")[-1]
    with Installation(tmp_path) as installation:
        up = installation.start_up_command()
        job = json.dumps([{"job_type": "echo", "parameters": {"text": "hello"}}])
        assert installation.run("submit", "-", "--wait", "--url", up.url, stdin=job).exit_code == 0
        assert up.stop().exit_code == 0
        run_shell(installation, copy_command)
        restored = installation.start("up", JOBLEDGER_MONGODB__DATA_DIR="backup-of-data").wait_until_ready()
        listed = json.loads(run_shell(installation, "curl -s $JOBLEDGER_URL/api/events/jobs"))
        assert [job["status"] for job in listed["jobs"]] == ["completed"]
        assert restored.stop().exit_code == 0
