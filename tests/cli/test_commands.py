"""The commands in real processes: exit codes and output, never a traceback."""

from __future__ import annotations

import http.server
import io
import json
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from jobledger.cli import main
from jobledger.cli.composition import ALL_ROLES, start_roles
from jobledger.ledger.domain.errors import ResourceUnavailable
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.embedded_lock import wait_until
from tests.api.conftest import make_settings
from tests.support.installation import (
    CommandOutcome,
    Installation,
    assert_one_line_error,
    has_exited,
    http_client,
    list_descendants,
)
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = needs_local_mongod

RunCommand = Callable[..., CommandOutcome]
ECHO = {"job_type": "echo", "parameters": {"text": "hello"}}
UNREACHABLE = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A running installation."""
    with Installation(tmp_path_factory.mktemp("up")) as installation:
        installation.start_up_command()
        yield installation


@pytest.fixture
def url(installation: Installation) -> str:
    return installation.commands[0].url


@pytest.fixture
def stopped_installation(tmp_path: Path) -> Iterator[Installation]:
    """An installation without running processes."""
    with Installation(tmp_path) as installation:
        yield installation


def assert_outcome(outcome: CommandOutcome, exit_code: int, *expected_texts: str) -> str:
    """Check the exit code and the texts of the output, and that it has no traceback. Return the output."""
    text = outcome.out + outcome.err
    assert outcome.exit_code == exit_code, text
    assert "Traceback" not in text, text
    for expected_text in expected_texts:
        assert expected_text in text, text
    return text


@pytest.fixture
def run_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunCommand:
    """Run commands in the process of the test, which is faster; a traceback surfaces as an exception."""

    def run(*arguments: str, stdin: str | bytes = b"") -> CommandOutcome:
        stdin_bytes = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["jobledger", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin_bytes), encoding="utf-8"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main.run()
        output = capfd.readouterr()
        return CommandOutcome(int(exited.value.code or 0), output.out, output.err)

    return run


# submit ---------------------------------------------------------------------------------------------------------------


def test_submit_wait_completed_jobs_exits_0(installation: Installation, url: str) -> None:
    (installation.directory / "jobs.json").write_text(json.dumps([ECHO, ECHO]))
    outcome = installation.run("submit", "jobs.json", "--wait", "--url", url)

    assert_outcome(outcome, 0, "2 jobs accepted")
    assert outcome.out.count("completed") == 2


def test_submit_wait_failed_job_exits_1(installation: Installation, url: str) -> None:
    jobs = [ECHO, {"job_type": "echo", "parameters": {"fail": "no [bold]luck[/nothing]", "session": "Sad [/] talk"}}]
    outcome = installation.run("submit", "-", "--wait", "--url", url, stdin=json.dumps(jobs))

    assert_outcome(outcome, 1, "completed", "failed Sad [/] talk: no [bold]luck[/nothing]")


def test_submit_without_wait_prints_accepted_batch(installation: Installation, url: str) -> None:
    outcome = installation.run("submit", "-", stdin=json.dumps({"batch_name": "x", "jobs": [ECHO]}), JOBLEDGER_URL=url)
    assert_outcome(outcome, 0, "batch-", "1 jobs accepted")


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
def test_submit_json_or_yaml_is_accepted_and_followed(installation: Installation, url: str, text: str) -> None:
    outcome = installation.run("submit", "-", "--wait", "--url", url, stdin=text)
    assert_outcome(outcome, 0, "1 jobs accepted", "completed")


def test_submit_type_option_applies_to_plain_sessions(installation: Installation, url: str) -> None:
    sessions = [{"event": "E", "session": f"Talk {number}"} for number in range(3)]
    outcome = installation.run("submit", "-", "--wait", "--type", "echo", "--url", url, stdin=json.dumps(sessions))
    assert_outcome(outcome, 0, "Talk 0", "Talk 1", "Talk 2")


@pytest.mark.parametrize(
    ("arguments", "stdin", "words"),
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
    run_command: RunCommand, monkeypatch: pytest.MonkeyPatch, arguments: list[str], stdin: str | bytes, words: list[str]
) -> None:
    monkeypatch.setenv("JOBLEDGER_URL", UNREACHABLE)
    assert_one_line_error(run_command(*arguments, stdin=stdin), 2, *words)


def test_submit_in_real_process_has_same_exit_codes(stopped_installation: Installation) -> None:
    assert_one_line_error(stopped_installation.run("submit", "nowhere.json"), 2, "nowhere.json: file not found")
    assert_one_line_error(stopped_installation.run("submit", "-", stdin="{["), 2, "- is neither JSON nor YAML")
    assert_one_line_error(
        stopped_installation.run("submit", "-", "--url", UNREACHABLE, stdin="{}"), 3, UNREACHABLE, "jobledger up"
    )


def test_submit_rejected_by_api_prints_its_message(installation: Installation, url: str) -> None:
    refused = installation.run("submit", "-", "--url", url, stdin=json.dumps([ECHO, {"event": "E"}]))
    assert_one_line_error(refused, 1, "jobs[1].parameters")


def test_submit_unreachable_url_exits_3(run_command: RunCommand) -> None:
    for url in (UNREACHABLE, "http://no-such-host.invalid:5001"):
        assert_one_line_error(run_command("submit", "-", "--url", url, stdin="{}"), 3, url, "jobledger up")


@pytest.mark.parametrize("answer", ["<html>", "[]", "{}", '{"status": "success"}', "null", '"x"'])
@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_submit_to_other_server_exits_1(run_command: RunCommand, answer: str, status: int) -> None:
    with serve_response(status, answer) as url:
        assert_one_line_error(run_command("submit", "-", "--url", url, stdin="{}"), 1)


def test_submit_to_api_without_database_exits_3(run_command: RunCommand) -> None:
    answer = json.dumps(
        {"status": "error", "code": "database_unavailable", "message": "The database is unavailable.", "details": {}}
    )
    with serve_response(503, answer) as url:
        assert_one_line_error(run_command("submit", "-", "--url", url, stdin="{}"), 3, "The database is unavailable.")


@contextmanager
def serve_response(status: int, body: str) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


# doctor and usage errors ----------------------------------------------------------------------------------------------


def test_doctor_running_installation_finds_no_problem(installation: Installation) -> None:
    text = assert_outcome(
        installation.run("doctor"), 0, "MongoDB", "replica set rs0 with 1 member", "Clocks", "Oplog", "Log"
    )
    assert "no " not in [line[:3] for line in text.splitlines()]
    assert not has_exited(installation.read_embedded_lock().pid), "the doctor stopped a server that it did not start"


def test_doctor_without_server_starts_and_stops_its_own(stopped_installation: Installation) -> None:
    assert_outcome(stopped_installation.run("doctor"), 0, "replica set rs0", "0 events")
    assert not (stopped_installation.directory / "data" / "server.json").exists()
    assert_outcome(stopped_installation.run("doctor"), 0)


def test_doctor_unreachable_database_prints_advice(
    stopped_installation: Installation,
) -> None:
    stopped_installation.write_config(mongodb={"uri": "mongodb://user:s3cret@127.0.0.1:1/", "connect_timeout_ms": 200})
    text = assert_outcome(stopped_installation.run("doctor"), 1, "no", "Is it running?")
    assert "s3cret" not in text


def test_doctor_prints_brackets_unchanged(stopped_installation: Installation) -> None:
    stopped_installation.write_config(results={"store": "odd[red]dir[/x]"})
    assert_outcome(stopped_installation.run("doctor"), 0, "odd[red]dir[/x]")


@pytest.mark.parametrize("command", ["up", "api", "projector", "worker", "doctor"])
def test_command_wrong_setting_is_one_line_usage_error(run_command: RunCommand, tmp_path: Path, command: str) -> None:
    (tmp_path / "config.yaml").write_text("api:\n  prot: 1\n")
    assert_one_line_error(run_command(command), 2, "config.yaml: api.prot", "Keys: host, port")
    assert_one_line_error(run_command(command, "--config", "nowhere.yaml"), 2, "nowhere.yaml: file not found")


def test_obsolete_setting_is_reported_and_ignored(stopped_installation: Installation) -> None:
    stopped_installation.write_config(event_worker={"poll_interval_sec": 5})
    outcome = stopped_installation.run("doctor")
    assert_outcome(outcome, 0)
    assert "note: event_worker.poll_interval_sec has no effect" in outcome.err


def test_unknown_command_or_option_is_usage_error(stopped_installation: Installation) -> None:
    assert_outcome(stopped_installation.run("explode"), 2, "No such command")
    assert_outcome(stopped_installation.run("up", "--fast"), 2, "No such option")
    assert_outcome(stopped_installation.run("submit"), 2, "Missing argument")
    assert stopped_installation.run("--help").exit_code == 0


def test_commands_without_demo_dependencies_run(stopped_installation: Installation) -> None:
    program = (
        "import sys; sys.modules['fpdf'] = None; from jobledger.cli.main import run; sys.argv[0] = 'jobledger'; run()"
    )
    for arguments, exit_code, word in [(["submit", "nowhere"], 2, "file not found"), (["demo"], 2, "jobledger[demo]")]:
        outcome = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=stopped_installation.directory,
            env=stopped_installation.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert_one_line_error(CommandOutcome(outcome.returncode, outcome.stdout, outcome.stderr), exit_code, word)


# Roles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_up_after_signal_stops_cleanly_and_keeps_data(
    stopped_installation: Installation, number: signal.Signals
) -> None:
    up = stopped_installation.start_up_command()
    submitted = stopped_installation.run("submit", "-", "--wait", "--url", up.url, stdin=json.dumps([ECHO]))
    assert_outcome(submitted, 0)
    with http_client(up) as client:
        before = client.get("/api/events/jobs").json()
    processes = list_descendants(up.process.pid)
    mongod = stopped_installation.read_embedded_lock().pid
    assert mongod in processes

    assert_outcome(up.stop(number), 0, "Stopping")
    assert wait_until(lambda: all(has_exited(pid) for pid in processes), 5), "a process is still running"
    assert not (stopped_installation.directory / "data" / "server.json").exists()

    with http_client(stopped_installation.start_up_command()) as client:
        assert client.get("/api/events/jobs").json() == before


def test_up_with_open_stream_and_running_job_stops_in_time(stopped_installation: Installation) -> None:
    stopped_installation.write_config(event_worker={"shutdown_grace_seconds": 1})
    up = stopped_installation.start_up_command()
    with http_client(up) as client, client.stream("GET", "/api/ledger/stream?after=0") as stream:
        client.post("/api/events/jobs", json={"job_type": "echo", "parameters": {"seconds": 3600}})
        assert any(line == "event: JobClaimed" for line in stream.iter_lines())
        started_at = time.monotonic()
        assert_outcome(up.stop(), 0)
        assert time.monotonic() - started_at < 15

    with http_client(stopped_installation.start_up_command()) as client:
        [job] = client.get("/api/events/jobs").json()["jobs"]
        history = client.get(f"/api/events/jobs/{job['job_id']}/history").json()["events"]
    assert "JobReleased" in [event["type"] for event in history]


def test_second_up_on_same_directory_exits_4(installation: Installation) -> None:
    second = installation.run("up")

    assert second.exit_code == 4
    assert second.err.splitlines()[-1].startswith("jobledger: ")
    assert f"is used by another jobledger (process {installation.commands[0].process.pid})" in second.err
    with http_client(installation.commands[0]) as client:
        assert client.get("/readyz").status_code == 200


def test_up_port_in_use_exits_4_and_names_setting(stopped_installation: Installation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        refused = stopped_installation.run("up", JOBLEDGER_API__PORT=str(port))
    assert refused.exit_code == 4
    assert f"cannot listen on 127.0.0.1:{port}" in refused.err
    assert "JOBLEDGER_API__PORT" in refused.err


async def test_start_roles_port_in_use_fails_before_database_access(
    mongodb_uri: str, db_name: str, tmp_path: Path
) -> None:
    """No worker may claim a job in a process that cannot serve."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = make_settings(mongodb_uri, db_name, tmp_path, api={"port": listener.getsockname()[1]})
        connection = Connection(mongodb_uri, db_name)
        with pytest.raises(ResourceUnavailable, match="cannot listen"):
            async with start_roles(settings, connection, ALL_ROLES, on_failure=lambda _: None):
                pass
    async with connection.client() as client:
        assert await client[db_name].list_collection_names() == []


@pytest.mark.parametrize("command", ["worker", "api", "projector"])
def test_role_without_embedded_server_exits_3(stopped_installation: Installation, command: str) -> None:
    assert_one_line_error(
        stopped_installation.run(command), 3, "jobledger up", str(stopped_installation.directory / "data")
    )


def test_role_unreachable_database_exits_3(stopped_installation: Installation) -> None:
    stopped_installation.write_config(
        mongodb={"uri": "mongodb://user:s3cret@127.0.0.1:1/?replicaSet=rs0", "connect_timeout_ms": 300}
    )
    outcome = stopped_installation.run("worker")
    assert_one_line_error(outcome, 3, "Is it running?")
    assert "s3cret" not in outcome.err


def test_roles_in_separate_processes_process_jobs(tmp_path: Path, mongodb_uri: str, db_name: str) -> None:
    with Installation(tmp_path, mongodb={"uri": mongodb_uri, "db_name": db_name}) as installation:
        # Each role starts before the roles that it depends on.
        roles = [installation.start(name) for name in ("worker", "worker", "projector", "projector", "api")]
        api = [role.wait_until_ready() for role in roles][-1]
        outcome = installation.run("submit", "-", "--wait", "--url", api.url, stdin=json.dumps([ECHO] * 20))
        assert_outcome(outcome, 0)
        assert outcome.out.count("completed") == 20
        with http_client(api) as client:
            stats = client.get("/api/monitoring/events/stats").json()["stats"]
        assert stats["jobs"]["completed"] == 20
        assert len(stats["workers"]) == 2
        assert_outcome(roles[2].stop(), 0)  # if it is the leader, the other one takes over
        assert_outcome(installation.run("submit", "-", "--wait", "--url", api.url, stdin=json.dumps([ECHO])), 0)
        for role in roles[:2] + roles[3:]:
            assert_outcome(role.stop(), 0)
            assert wait_until(lambda role=role: not list_descendants(role.process.pid), 5)  # type: ignore[misc]  # bound in this iteration


def test_worker_next_to_up_uses_embedded_server(stopped_installation: Installation) -> None:
    up = stopped_installation.start_up_command()
    worker = stopped_installation.start("worker").wait_until_ready()
    with http_client(up) as client:
        assert wait_until(lambda: len(client.get("/api/monitoring/events/stats").json()["stats"]["workers"]) == 2, 10)
    assert_outcome(worker.stop(), 0)
    assert_outcome(up.stop(), 0)


# Help -----------------------------------------------------------------------------------------------------------------


def test_top_level_commands_have_help() -> None:
    from jobledger.cli.main import app

    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
