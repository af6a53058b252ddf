"""Check the links, commands, options and settings in the documentation, and run the README and the tutorial."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer
from pymongo import MongoClient

from jobledger.cli import main
from jobledger.cli.administration.mongo_roles import create_role_commands
from jobledger.cli.settings_file import read_settings
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.mongo.embedded import find_mongod
from jobledger.ledger.mongo.embedded_files import wait_until
from tests.support import generated_docs
from tests.support.doc_examples import DOCS, create_installation, needs_curl, read_code_blocks, run_shell
from tests.support.installation import COMMAND, Installation
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS
from tests.support.replica_set import exit_with_parent, free_port


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


ROOT = DOCS.parent
DOCUMENTS = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "config.yaml", *DOCS.rglob("*.md")])


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


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_document_names_existing_files(document: Path) -> None:
    folders = "api|benchmarks|cli|deploy|docs|jobledger|ledger|projections|tests|workers"
    for path in re.findall(rf"`((?:{folders})/[\w./-]+)`", document.read_text(encoding="utf-8")):
        assert (ROOT / path).exists(), f"{document.name}: {path}"


def test_table_of_folders_names_existing_folders_and_modules() -> None:
    _, _, text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Where code lives")
    rows = re.findall(r"^\| (`(\w+)/.*) \| .* \| (.*) \|$", text.partition("\n## ")[0], re.MULTILINE)
    assert len(rows) > 20
    for paths, package, imported in rows:
        for name in re.findall(r"`([^`]+)`", paths + imported):
            assert (ROOT / name).exists() or (ROOT / package / name).exists(), name


def test_recipes_name_existing_constants_and_functions() -> None:
    _, _, text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## Recipes")
    code = "".join(
        path.read_text(encoding="utf-8")
        for folder in ("ledger", "projections", "workers", "api", "cli", "tests")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in (".py", ".yaml")
    )
    names = re.findall(r"`(_?[A-Z]+_[A-Z_]+|_\w+|[a-z]+_\w+(?:\(\))?)`", text)
    assert len(names) > 20
    for name in names:
        assert re.search(rf"\b{name.removesuffix('()')}\b", code), name


def test_collections_page_lists_each_collection_once() -> None:
    page = (DOCS / "reference" / "collections.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`[^|]+) \|", page, re.MULTILINE)
    listed = [name for cell in first_cells for name in re.findall(r"`([\w.]+)`", cell)]
    privileges = create_role_commands("any")[0]["privileges"]
    collections = {privilege["resource"]["collection"] for privilege in privileges} - {""}
    assert sorted(listed) == sorted(name for name in collections if not name.endswith(".b"))


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
