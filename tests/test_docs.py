"""Run the commands, programs and settings that the documentation shows, and check its links."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import Queue
from threading import Thread
from typing import Any

import pytest
import typer
import yaml
from pymongo import MongoClient

from jobledger.cli import main
from jobledger.cli.settings_file import read_settings
from jobledger.ledger.domain.commands import ClaimJob, CompleteJob
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.mongo.embedded import find_mongod
from jobledger.ledger.mongo.embedded_lock import wait_until
from jobledger.ledger.store.command_handler import handle_command
from jobledger.workers.processors.session.document import render_document
from tests.processors.session.fixtures import html, make_content, make_page_text, make_parameters, serve_site
from tests.support import generated_docs
from tests.support.event_examples import NOON, RESULTS
from tests.support.installation import COMMAND, DEADLINE_SECONDS, Installation
from tests.support.ledger_setup import EVENT_METADATA, Ledger, open_ledger
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.replica_set import exit_with_parent, free_port

DOCS = Path(__file__).parents[1] / "docs"


def read_code_blocks(document: Path, language: str) -> list[str]:
    """Return the code blocks of one language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


@contextmanager
def run_program(text: str, path: Path, *arguments: str) -> Iterator[Queue[str]]:
    """Run a program from the documentation and yield a queue of its output lines. Kill it at the end with SIGKILL."""
    path.write_text(text, encoding="utf-8")
    process = subprocess.Popen([sys.executable, path, *arguments], stdout=subprocess.PIPE, text=True, env=os.environ)
    lines: Queue[str] = Queue()

    def read() -> None:
        assert process.stdout
        for line in process.stdout:
            lines.put(line)

    reader = Thread(target=read, daemon=True)
    reader.start()
    try:
        yield lines
    finally:
        process.kill()
        process.wait()
        reader.join()


async def read_line(lines: Queue[str]) -> str:
    return await asyncio.to_thread(lines.get, timeout=DEADLINE_SECONDS)


async def complete_job(ledger: Ledger) -> str:
    submitted = await ledger.submit_job()
    stream = submitted.events[0].stream
    claimed = await handle_command(
        ledger.event_store, stream, ClaimJob("worker-1", NOON), meta=EVENT_METADATA, stream_state=submitted.stream_state
    )
    completed = CompleteJob("worker-1", 1, RESULTS)
    await handle_command(ledger.event_store, stream, completed, meta=EVENT_METADATA, stream_state=claimed.stream_state)
    return stream


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


AUTHENTICATION = DOCS / "how-to" / "authentication.md"
KEYS, PROVIDER, SHARED_SECRET, PROXY = (yaml.safe_load(block) for block in read_code_blocks(AUTHENTICATION, "yaml"))
CREATE_KEY, USE_KEY, REVOKE_KEY, END_SESSIONS, CREATE_SECRET, USE_PROXY = read_code_blocks(AUTHENTICATION, "sh")
LIST_JOBS = USE_KEY.splitlines()[0]
needs_curl = pytest.mark.skipif(shutil.which("curl") is None, reason="install curl: apt-get install curl")


@contextmanager
def create_installation(
    mongodb_uri: str, db_name: str, directory: Path, settings: dict[str, Any]
) -> Iterator[Installation]:
    """Create an installation with the settings that a document shows."""
    with Installation(directory, mongodb={"uri": mongodb_uri, "db_name": db_name}, **settings) as installation:
        yield installation


def run_shell(installation: Installation, *texts: str) -> str:
    """Run shell commands of a document. Port 5001 is replaced by the port of this installation. Return the output."""
    url = installation.commands[-1].url if installation.commands else "http://127.0.0.1:1"
    result = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(texts).replace("http://127.0.0.1:5001", url)],
        cwd=installation.directory,
        env={**installation.env, "PATH": f"{COMMAND.parent}:{os.environ['PATH']}", "JOBLEDGER_URL": url},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@needs_curl
def test_authentication_how_to_api_key_is_created_used_and_revoked(
    mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    with create_installation(mongodb_uri, db_name, tmp_path, KEYS) as installation:
        for role in ("projector", "worker", "api"):
            installation.start(role).wait_until_ready()
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


def test_manage_jobs_how_to_commands_list_stop_and_restart_jobs(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    """The batch has two jobs that fail and one that waits and is cancelled."""
    list_commands, show_commands, stop_commands, continue_commands, bulk_commands = read_code_blocks(
        DOCS / "how-to" / "manage-jobs.md", "sh"
    )
    failing = {"job_type": "echo", "job_name": "Opening", "parameters": {"fail": "no luck"}}
    batch = {"jobs": [failing, failing, {**failing, "not_before": "2099-01-01T00:00:00Z"}]}
    with create_installation(mongodb_uri, db_name, tmp_path, {}) as installation:
        for role in ("projector", "worker", "api"):
            installation.start(role).wait_until_ready()
        url = installation.commands[-1].url
        batch_id = installation.run("submit", "-", stdin=json.dumps(batch), JOBLEDGER_URL=url).out.split(":")[0]
        assert wait_until(
            lambda: "2 failed" in run_shell(installation, f"jobledger batches show {batch_id}"), DEADLINE_SECONDS
        )
        [waiting] = run_shell(installation, "jobledger jobs list --status pending --ids").split()
        ids = f"BATCH={batch_id} JOB={waiting}"
        output = run_shell(installation, ids, list_commands, show_commands)
        assert output.count("ECHO_FAILED: no luck") == 2 + 2, "in the list of failed jobs and in the search by name"
        assert "No jobs match these filters." in output
        assert "not before 2099" in output
        output = run_shell(installation, ids, stop_commands, continue_commands)
        assert f"{batch_id} is processing, paused\n" in output
        assert f"{waiting} is cancelled\n" in output
        assert f"{waiting} is pending\n" in output
        assert re.search(rf"{batch_id}: [23] of 3 jobs changed\n", output), "the third may have failed again already"
        assert wait_until(
            lambda: run_shell(installation, "jobledger jobs list --status failed --ids").count("job-") == 3,
            DEADLINE_SECONDS,
        )
        output = run_shell(installation, bulk_commands.replace("FETCH_FAILED", "ECHO_FAILED"))
        assert len(re.findall(r"job-\w+ is pending", output)) == 3


WEBHOOKS = DOCS / "how-to" / "webhooks.md"


@needs_curl
def test_webhooks_how_to_commands_send_list_and_redeliver(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    submit, list_missed, secrets, redeliver = read_code_blocks(WEBHOOKS, "sh")
    (example, created), [config] = read_code_blocks(WEBHOOKS, "json"), read_code_blocks(WEBHOOKS, "yaml")
    settings = yaml.safe_load(config)
    settings["webhooks"] |= {"allowed_private_hosts": ["127.0.0.1"], "echo_enabled": True, "retry_delays_seconds": [0]}
    with create_installation(mongodb_uri, db_name, tmp_path, settings) as installation:
        for role in ("projector", "worker", "webhook-sender", "api"):
            installation.start(role).wait_until_ready()
        callback_url = f"{installation.commands[-1].url}/api/events/test-webhook-callback"
        answer = json.loads(
            run_shell(installation, submit.replace("https://cms.example.org/hooks/jobledger", callback_url))
        )
        assert json.loads(created).keys() <= answer.keys()
        [endpoint] = answer["webhook_secrets"]
        assert endpoint.keys() == json.loads(created)["webhook_secrets"][0].keys()
        delivered: list[Any] = []

        def has_delivered() -> bool:
            output = run_shell(installation, "jobledger webhooks list --status delivered --json")
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
        assert output == "No webhook deliveries match these filters.\nScheduled 1 webhooks for redelivery.\n"
        assert run_shell(installation, redeliver_many) == "Scheduled 0 webhooks for redelivery.\n"
        missed = run_shell(installation, list_missed.replace("0f6c1a", delivery["endpoint_id"]).replace("=11", "=0"))
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


def test_job_types_how_to_example_plugin_processes_job(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    how_to = DOCS / "how-to" / "job-types.md"
    blocks = [read_code_blocks(how_to, language) for language in ("python", "toml", "sh")]
    [processor], [project], [install, submit] = blocks
    package, home = tmp_path / "package", tmp_path / "home"
    package.mkdir()
    (package / "wordcount.py").write_text(processor)
    (package / "pyproject.toml").write_text(project)
    subprocess.run(
        [
            sys.executable,
            "-m",
            *install.split(),
            "--no-deps",
            "--no-build-isolation",
            "--quiet",
            "--target",
            tmp_path / "installed",
        ],
        cwd=package,
        check=True,
        capture_output=True,
    )
    with serve_site() as site, create_installation(mongodb_uri, db_name, home, {}) as installation:
        site.put("/", html("<p>Four words and more</p>"))
        path = {"PYTHONPATH": str(tmp_path / "installed")}
        for role in ("projector", "worker", "api"):
            installation.start(role, **path).wait_until_ready()
        output = run_shell(installation, submit.replace("http://127.0.0.1:8000/", site.url("/")))
        assert "completed" in output
        invalid = installation.run(
            *("submit", "-", "--type", "wordcount"), stdin='{"uri": 1}', JOBLEDGER_URL=installation.commands[-1].url
        )
        assert invalid.exit_code != 0
        assert "url" in invalid.err
        jobs_json = run_shell(installation, "curl -s 'http://127.0.0.1:5001/api/events/jobs?job_type=wordcount'")
    [job] = json.loads(jobs_json)["jobs"]
    assert (job["status"], job["results"]["metadata"]["words"]) == ("completed", 4)


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


# Audit and backup -----------------------------------------------------------------------------------------------------


def test_audit_how_to_commands_follow_verify_and_rebuild(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    follow, show_history, verify, verify_files, rebuild, show_state = read_code_blocks(
        DOCS / "how-to" / "audit.md", "sh"
    )
    with create_installation(mongodb_uri, db_name, tmp_path, {}) as installation:
        for role in ("projector", "worker", "api"):
            installation.start(role).wait_until_ready()
        sessions = json.dumps([{"job_type": "echo", "parameters": {"text": "hello"}}] * 3)
        url = installation.commands[-1].url
        assert installation.run("submit", "-", "--wait", "--url", url, stdin=sessions).exit_code == 0
        listed = json.loads(run_shell(installation, "curl -s $JOBLEDGER_URL/api/events/jobs"))
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
        for role in ("projector", "worker", "api"):
            installation.start(role).wait_until_ready()
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


@needs_curl
def test_readme_commands_submit_session(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    """CI and `test_demo` run the first two blocks. The third is `jobledger up`."""
    demo, tests, up, submit = read_code_blocks(DOCS.parent / "README.md", "sh")
    assert (demo, tests, up) == ("make demo\n", "make test\n", ".venv/bin/jobledger up\n")
    with create_installation(mongodb_uri, db_name, tmp_path, {}) as installation:
        for role in ("projector", "api"):
            installation.start(role).wait_until_ready()
        answer = json.loads(run_shell(installation, submit.replace("curl ", "curl -s ", 1)))
        job = json.loads(run_shell(installation, f"curl -s $JOBLEDGER_URL/api/events/jobs/{answer['job_id']}"))["job"]
    assert job["parameters"]["session"] == "Welcome"


DOCUMENTS = sorted([DOCS.parent / "README.md", DOCS.parent / "config.yaml", *DOCS.rglob("*.md")])


def extract_commands(text: str) -> list[list[str]]:
    """Return the words of each `jobledger …` command in shell blocks and inline code."""
    quoted = [command for command in re.findall(r"`(jobledger [^`]*)`", text) if "…" not in command]
    shell_lines = [
        line
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
        for line in block.splitlines()
    ]
    commands = []
    for line in [*quoted, *shell_lines]:
        match = re.search(r"(?:^|[ (])(?:\.venv/bin/|/opt/jobledger/bin/)?jobledger ([^|>&)#]*)", line)
        if match is not None:
            commands.append([word for word in shlex.split(match[1]) if not word.startswith("[")])
    return commands


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_commands_and_options_exist(document: Path) -> None:
    for words in extract_commands(document.read_text(encoding="utf-8")):
        command: Any = typer.main.get_command(main.app)
        while words and hasattr(command, "commands"):
            name = words[0].rstrip(",")
            if name.startswith("-") or not name:
                break
            assert name in command.commands, f"{document.name}: jobledger {' '.join(words)}"
            command, words = command.commands[name], words[1:]
        options = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        used = {word.split("=")[0] for word in words if word.startswith("-") and word != "-"} - {"--help"}
        assert used <= options, f"{document.name}: {used - options} of jobledger … {' '.join(words)}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_links_have_targets(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        linked = (document.parent / path).resolve() if path else document
        assert linked.exists(), f"{document.name}: {target}"
        if anchor:
            titles = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
            assert anchor in slugs, f"{document.name}: {target}"


def test_operator_how_to_settings_are_valid(tmp_path: Path) -> None:
    examples = [
        *read_code_blocks(DOCS / "how-to" / "monitoring.md", "yaml"),
        *read_code_blocks(DOCS / "how-to" / "replica-set.md", "yaml"),
    ]
    settings_blocks = [block for block in examples if block.startswith(("metrics:", "mongodb:"))]
    assert len(settings_blocks) == 2
    for block in settings_blocks:
        (tmp_path / "config.yaml").write_text(block, encoding="utf-8")
        read_settings(tmp_path / "config.yaml")


@needs_local_mongod
@pytest.mark.skipif(
    shutil.which("mongosh") is None, reason="install mongosh: npm install --prefix ~/.cache/jobledger-tests mongosh@2"
)
@pytest.mark.timeout(120)
def test_replica_set_how_to_sets_up_three_servers_and_roles(tmp_path: Path) -> None:
    conf, _ = read_code_blocks(DOCS / "how-to" / "replica-set.md", "yaml")
    [initiate] = read_code_blocks(DOCS / "how-to" / "replica-set.md", "js")
    (tmp_path / "mongod.conf").write_text(conf, encoding="utf-8")
    ports, parent = [free_port() for _ in range(3)], os.getpid()
    servers = []
    try:
        for number, port in enumerate(ports, 1):
            (data := tmp_path / f"db{number}").mkdir()
            command = [str(find_mongod()), "--config", str(tmp_path / "mongod.conf"), "--dbpath", str(data)]
            command += ["--port", str(port), "--bind_ip", "127.0.0.1", "--nounixsocket", "--oplogSize", "256"]
            output = (tmp_path / f"db{number}.log").open("wb")
            servers.append(subprocess.Popen(command, stdout=output, preexec_fn=lambda: exit_with_parent(parent)))
            output.close()
            initiate = initiate.replace(f"db{number}.example.org:27017", f"127.0.0.1:{port}")
        assert "example.org" not in initiate
        with MongoClient[Document](f"127.0.0.1:{ports[0]}", directConnection=True) as first:
            first.admin.command("ping")  # waits until the server answers
            run_in_mongosh(ports[0], initiate)
            assert wait_until(lambda: first.admin.command("hello").get("isWritablePrimary", False), DEADLINE_SECONDS)
            uri = f"mongodb://127.0.0.1:{ports[0]}/?replicaSet=rs0"
            config = tmp_path / "config.yaml"
            config.write_text(f"mongodb: {{uri: '{uri}'}}\nresults: {{store: {tmp_path / 'results'}}}\n")
            doctor = subprocess.run([COMMAND, "doctor", "--config", config], capture_output=True, text=True, check=True)
            assert "replica set rs0 with 3 members" in doctor.stdout
            assert "transactionLifetimeLimitSeconds" not in doctor.stdout, "mongod.conf of the how-to sets it"
            script = subprocess.run([COMMAND, "mongo-roles", "--config", config], capture_output=True, check=True)
            script_text = script.stdout.decode().replace("passwordPrompt()", '"secret"')
            run_in_mongosh(ports[0], script_text)
            created = first["event_processing"].command("usersInfo", "jobledger")["users"]
        assert [[role["role"] for role in user["roles"]] for user in created] == [["jobledger"]]
    finally:
        for server in servers:
            server.kill()
            server.wait()


def run_in_mongosh(port: int, script: str) -> None:
    """Run a script in mongosh. A failing statement fails the test."""
    command = ["mongosh", "--quiet", "--norc", f"127.0.0.1:{port}", "--eval", script]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, stdin=subprocess.DEVNULL)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="install promtool: apt-get install prometheus")
def test_monitoring_how_to_settings_and_alert_rules_pass_promtool(tmp_path: Path) -> None:
    [config] = [
        block
        for block in read_code_blocks(DOCS / "how-to" / "monitoring.md", "yaml")
        if block.startswith("scrape_configs:")
    ]
    key = "/etc/prometheus/jobledger.key"
    assert key in config
    (tmp_path / "jobledger.key").write_text("jl_key", encoding="utf-8")
    (tmp_path / "prometheus.yml").write_text(config.replace(key, str(tmp_path / "jobledger.key")), encoding="utf-8")
    shutil.copy(DOCS.parent / "deploy" / "prometheus" / "alerts.yml", tmp_path / "jobledger-alerts.yml")

    def check() -> subprocess.CompletedProcess[str]:
        command = ["promtool", "check", "config", str(tmp_path / "prometheus.yml")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    valid = check()
    assert valid.returncode == 0, valid.stdout + valid.stderr
    assert re.search(r"\d+ rules found", valid.stdout), valid.stdout
    rules = tmp_path / "jobledger-alerts.yml"
    rules.write_text(rules.read_text(encoding="utf-8").replace("expr: ", "expr: ) ", 1), encoding="utf-8")
    assert check().returncode != 0


@pytest.mark.parametrize("document", generated_docs.GENERATED_FILES, ids=lambda path: path.name)
def test_reference_matches_generated_text(document: Path) -> None:
    assert document.read_text(encoding="utf-8") == generated_docs.GENERATED_FILES[document](), "make reference"


@needs_curl
@needs_local_mongod
@pytest.mark.timeout(300)
def test_tutorial_commands_succeed(tmp_path: Path) -> None:
    """Run all commands of the tutorial, on a free port."""
    parts = read_code_blocks(DOCS / "tutorial.md", "sh")
    installation = Installation(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    installation.write_config(api={"port": port}, event_worker={"lease_seconds": 5})
    text = "\n".join(parts)
    assert text.count("sleep 4\n") == 1
    # On a loaded machine the jobs take longer to reach the state in which the tutorial kills the service.
    text = text.replace(
        "sleep 4\n",
        "".join(
            f'until [[ $(curl -s "$JOBLEDGER_URL/api/events/jobs?status={status}") == *{name}* ]]; do sleep 0.1; done\n'
            for status, name in (("processing", "Keynote"), ("completed", "Opening"), ("failed", "Broken"))
        ),
    ).replace("127.0.0.1:5001", f"127.0.0.1:{port}")
    path = f"{COMMAND.parent}:{os.environ['PATH']}"
    url = f"http://127.0.0.1:{port}"
    tutorial = installation.start_command(
        ["bash", "-euo", "pipefail", "-c", text], "tutorial", PATH=path, JOBLEDGER_URL=url
    )
    try:
        outcome = tutorial.wait_for_exit(200)
    finally:
        installation.kill_all_processes()
    assert outcome.exit_code == 0, outcome.out + outcome.err
    assert "3 jobs accepted" in outcome.out
    assert outcome.out.count("JobLeaseExpired") == 1
    assert outcome.out.count("JobClaimed attempt 2") == 1
    assert "are intact" in outcome.out
    assert "The views match the log" in outcome.out
