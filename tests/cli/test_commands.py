"""The commands as people run them: real processes, their exit codes, and what they say. Never a traceback."""

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

Here = Callable[..., CommandOutcome]
ECHO = {"job_type": "echo", "parameters": {"text": "hello"}}
NOBODY = "http://127.0.0.1:1"


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """One that is up, for commands that talk to it."""
    with Installation(tmp_path_factory.mktemp("up")) as installation:
        installation.start_up_command()
        yield installation


@pytest.fixture
def url(installation: Installation) -> str:
    return installation.commands[0].url


@pytest.fixture
def nothing(tmp_path: Path) -> Iterator[Installation]:
    """One where nothing runs."""
    with Installation(tmp_path) as installation:
        yield installation


def said(ended: CommandOutcome, exit_code: int, *words: str) -> str:
    """Check the exit code, that no traceback was shown, and that a failure is explained in one line."""
    text = ended.out + ended.err
    assert ended.exit_code == exit_code, text
    assert "Traceback" not in text, text
    for word in words:
        assert word in text, text
    return text


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Here:
    """Run a command in the test's process, which saves a second each; a traceback would come out as an exception."""

    def run_here(*arguments: str, stdin: str | bytes = b"") -> CommandOutcome:
        given = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["jobledger", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given), encoding="utf-8"))
        capfd.readouterr()
        with pytest.raises(SystemExit) as exited:
            main.run()
        said = capfd.readouterr()
        return CommandOutcome(int(exited.value.code or 0), said.out, said.err)

    return run_here


# submit -----------------------------------------------------------------------------------------------------------


def test_submitting_a_file_and_waiting_ends_well_when_all_jobs_do(installation: Installation, url: str) -> None:
    (installation.directory / "jobs.json").write_text(json.dumps([ECHO, ECHO]))
    ended = installation.run("submit", "jobs.json", "--wait", "--url", url)

    said(ended, 0, "2 jobs accepted")
    assert ended.out.count("completed") == 2


def test_submitting_and_waiting_exits_with_1_when_a_job_fails(installation: Installation, url: str) -> None:
    jobs = [ECHO, {"job_type": "echo", "parameters": {"fail": "no [bold]luck[/nothing]", "session": "Sad [/] talk"}}]
    ended = installation.run("submit", "-", "--wait", "--url", url, stdin=json.dumps(jobs))

    said(ended, 1, "completed", "failed Sad [/] talk: no [bold]luck[/nothing]")


def test_submitting_without_waiting_says_what_was_accepted(installation: Installation, url: str) -> None:
    ended = installation.run("submit", "-", stdin=json.dumps({"batch_name": "x", "jobs": [ECHO]}), JOBLEDGER_URL=url)
    said(ended, 0, "batch-", "1 jobs accepted")


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
    ids=["tabs", "one job", "escaped surrogate pairs", "line separators", "YAML", "YAML with a date"],
)
def test_whatever_json_or_yaml_says_is_understood_and_followed(installation: Installation, url: str, text: str) -> None:
    ended = installation.run("submit", "-", "--wait", "--url", url, stdin=text)
    said(ended, 0, "1 jobs accepted", "completed")


def test_plain_sessions_can_be_submitted_as_another_type(installation: Installation, url: str) -> None:
    sessions = [{"event": "E", "session": f"Talk {number}"} for number in range(3)]
    ended = installation.run("submit", "-", "--wait", "--type", "echo", "--url", url, stdin=json.dumps(sessions))
    said(ended, 0, "Talk 0", "Talk 1", "Talk 2")


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
def test_what_cannot_be_submitted_is_explained_in_one_line(
    here: Here, monkeypatch: pytest.MonkeyPatch, arguments: list[str], stdin: str | bytes, words: list[str]
) -> None:
    monkeypatch.setenv("JOBLEDGER_URL", NOBODY)
    assert_one_line_error(here(*arguments, stdin=stdin), 2, *words)


def test_the_exit_codes_of_a_real_process_are_the_same(nothing: Installation) -> None:
    assert_one_line_error(nothing.run("submit", "nowhere.json"), 2, "nowhere.json: file not found")
    assert_one_line_error(nothing.run("submit", "-", stdin="{["), 2, "- is neither JSON nor YAML")
    assert_one_line_error(nothing.run("submit", "-", "--url", NOBODY, stdin="{}"), 3, NOBODY, "jobledger up")


def test_what_the_api_refuses_is_said_in_its_words(installation: Installation, url: str) -> None:
    refused = installation.run("submit", "-", "--url", url, stdin=json.dumps([ECHO, {"event": "E"}]))
    assert_one_line_error(refused, 1, "jobs[1].parameters")


def test_an_address_where_nobody_answers_is_unreachable(here: Here) -> None:
    for url in (NOBODY, "http://no-such-host.invalid:5001"):
        assert_one_line_error(here("submit", "-", "--url", url, stdin="{}"), 3, url, "jobledger up")


@pytest.mark.parametrize("answer", ["<html>", "[]", "{}", '{"status": "success"}', "null", '"x"'])
@pytest.mark.parametrize("status", [200, 302, 404, 500])
def test_a_server_that_is_no_jobledger_is_told_from_one(here: Here, answer: str, status: int) -> None:
    with foreign_server(status, answer) as url:
        assert_one_line_error(here("submit", "-", "--url", url, stdin="{}"), 1)


def test_a_jobledger_without_its_database_is_unreachable(here: Here) -> None:
    away = json.dumps({"status": "error", "code": "database_unavailable", "message": "It is away.", "details": {}})
    with foreign_server(503, away) as url:
        assert_one_line_error(here("submit", "-", "--url", url, stdin="{}"), 3, "It is away.")


@contextmanager
def foreign_server(status: int, body: str) -> Iterator[str]:
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


# doctor, and wrong usage ------------------------------------------------------------------------------------------


def test_the_doctor_finds_a_running_installation_well(installation: Installation) -> None:
    text = said(installation.run("doctor"), 0, "MongoDB", "replica set rs0 with 1 member", "Clocks", "Oplog", "Log")
    assert "no " not in [line[:3] for line in text.splitlines()]
    assert not has_exited(installation.read_embedded_lock().pid), "the doctor has stopped what it did not start"


def test_the_doctor_starts_the_server_for_itself_where_nothing_runs(nothing: Installation) -> None:
    said(nothing.run("doctor"), 0, "replica set rs0", "0 events")
    assert not (nothing.directory / "data" / "server.json").exists()
    said(nothing.run("doctor"), 0)


def test_the_doctor_says_what_to_do_about_a_database_that_is_not_there(nothing: Installation) -> None:
    nothing.write_config(mongodb={"uri": "mongodb://user:s3cret@127.0.0.1:1/", "connect_timeout_ms": 200})
    text = said(nothing.run("doctor"), 1, "no", "Is it running?")
    assert "s3cret" not in text


def test_the_doctor_shows_brackets_as_they_are(nothing: Installation) -> None:
    nothing.write_config(results={"store": "odd[red]dir[/x]"})
    said(nothing.run("doctor"), 0, "odd[red]dir[/x]")


@pytest.mark.parametrize("command", ["up", "api", "projector", "worker", "doctor"])
def test_a_mistake_in_the_settings_is_one_line_and_exit_code_2(here: Here, tmp_path: Path, command: str) -> None:
    (tmp_path / "config.yaml").write_text("api:\n  prot: 1\n")
    assert_one_line_error(here(command), 2, "config.yaml: api.prot", "Keys: host, port")
    assert_one_line_error(here(command, "--config", "nowhere.yaml"), 2, "nowhere.yaml: file not found")


def test_an_old_key_is_reported_and_harms_nothing(nothing: Installation) -> None:
    nothing.write_config(event_worker={"poll_interval_sec": 5})
    ended = nothing.run("doctor")
    said(ended, 0)
    assert "note: event_worker.poll_interval_sec has no effect" in ended.err


def test_commands_and_options_that_do_not_exist_are_wrong_usage(nothing: Installation) -> None:
    said(nothing.run("explode"), 2, "No such command")
    said(nothing.run("up", "--fast"), 2, "No such option")
    said(nothing.run("submit"), 2, "Missing argument")
    assert nothing.run("--help").exit_code == 0


def test_commands_do_without_what_only_the_demo_needs(nothing: Installation) -> None:
    without = (
        "import sys; sys.modules['fpdf'] = None; from jobledger.cli.main import run; sys.argv[0] = 'jobledger'; run()"
    )
    for arguments, exit_code, word in [(["submit", "nowhere"], 2, "file not found"), (["demo"], 2, "jobledger[demo]")]:
        ended = subprocess.run(
            [sys.executable, "-c", without, *arguments],
            cwd=nothing.directory,
            env=nothing.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert_one_line_error(CommandOutcome(ended.returncode, ended.stdout, ended.stderr), exit_code, word)


# The roles --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything_cleanly_and_the_next_start_has_all_the_data(
    nothing: Installation, number: signal.Signals
) -> None:
    up = nothing.start_up_command()
    submitted = nothing.run("submit", "-", "--wait", "--url", up.url, stdin=json.dumps([ECHO]))
    said(submitted, 0)
    with http_client(up) as client:
        before = client.get("/api/events/jobs").json()
    processes = list_descendants(up.process.pid)
    mongod = nothing.read_embedded_lock().pid
    assert mongod in processes

    said(up.stop(number), 0, "Stopping")
    assert wait_until(lambda: all(has_exited(pid) for pid in processes), 5), "a process was left behind"
    assert not (nothing.directory / "data" / "server.json").exists()

    with http_client(nothing.start_up_command()) as client:
        assert client.get("/api/events/jobs").json() == before


def test_an_open_stream_and_a_running_job_do_not_hold_up_the_end(nothing: Installation) -> None:
    nothing.write_config(event_worker={"shutdown_grace_seconds": 1})
    up = nothing.start_up_command()
    with http_client(up) as client, client.stream("GET", "/api/ledger/stream?after=0") as stream:
        client.post("/api/events/jobs", json={"job_type": "echo", "parameters": {"seconds": 3600}})
        assert any(line == "event: JobClaimed" for line in stream.iter_lines())
        began = time.monotonic()
        said(up.stop(), 0)
        assert time.monotonic() - began < 15

    with http_client(nothing.start_up_command()) as client:
        [job] = client.get("/api/events/jobs").json()["jobs"]
        history = client.get(f"/api/events/jobs/{job['job_id']}/history").json()["events"]
    assert "JobReleased" in [event["type"] for event in history]


def test_a_second_up_on_the_same_directory_is_refused_and_the_first_goes_on(installation: Installation) -> None:
    second = installation.run("up")

    assert second.exit_code == 4
    assert second.err.splitlines()[-1].startswith("jobledger: ")
    assert f"is used by another jobledger (process {installation.commands[0].process.pid})" in second.err
    with http_client(installation.commands[0]) as client:
        assert client.get("/readyz").status_code == 200


def test_a_taken_port_is_one_line(nothing: Installation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused = nothing.run("up", JOBLEDGER_API__PORT=str(port))
    assert refused.exit_code == 4
    assert f"cannot listen on 127.0.0.1:{port}" in refused.err
    assert "JOBLEDGER_API__PORT" in refused.err


async def test_a_taken_port_is_noticed_before_anything_is_done(mongodb_uri: str, db_name: str, tmp_path: Path) -> None:
    """No worker may take a job in a process that cannot run."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = make_settings(mongodb_uri, db_name, tmp_path, api={"port": taken.getsockname()[1]})
        connection = Connection(mongodb_uri, db_name)
        with pytest.raises(ResourceUnavailable, match="cannot listen"):
            async with start_roles(settings, connection, ALL_ROLES, on_failure=lambda _: None):
                pass
    async with connection.client() as client:
        assert await client[db_name].list_collection_names() == []


@pytest.mark.parametrize("command", ["worker", "api", "projector"])
def test_a_role_alone_without_a_running_server_is_unreachable(nothing: Installation, command: str) -> None:
    assert_one_line_error(nothing.run(command), 3, "jobledger up", str(nothing.directory / "data"))


def test_a_role_whose_database_does_not_answer_is_unreachable(nothing: Installation) -> None:
    nothing.write_config(
        mongodb={"uri": "mongodb://user:s3cret@127.0.0.1:1/?replicaSet=rs0", "connect_timeout_ms": 300}
    )
    ended = nothing.run("worker")
    assert_one_line_error(ended, 3, "Is it running?")
    assert "s3cret" not in ended.err


def test_roles_in_processes_of_their_own_work_together(tmp_path: Path, mongodb_uri: str, db_name: str) -> None:
    with Installation(tmp_path, mongodb={"uri": mongodb_uri, "db_name": db_name}) as installation:
        # In an order in which nobody finds what it needs at first.
        roles = [installation.start(name) for name in ("worker", "worker", "projector", "projector", "api")]
        api = [role.wait_until_ready() for role in roles][-1]
        ended = installation.run("submit", "-", "--wait", "--url", api.url, stdin=json.dumps([ECHO] * 20))
        said(ended, 0)
        assert ended.out.count("completed") == 20
        with http_client(api) as client:
            stats = client.get("/api/monitoring/events/stats").json()["stats"]
        assert stats["jobs"]["completed"] == 20
        assert len(stats["workers"]) == 2
        said(roles[2].stop(), 0)  # the projector that leads, perhaps: the other takes over
        said(installation.run("submit", "-", "--wait", "--url", api.url, stdin=json.dumps([ECHO])), 0)
        for role in roles[:2] + roles[3:]:
            said(role.stop(), 0)
            assert wait_until(lambda role=role: not list_descendants(role.process.pid), 5)  # type: ignore[misc]  # bound now


def test_a_worker_beside_up_finds_the_embedded_server(nothing: Installation) -> None:
    up = nothing.start_up_command()
    worker = nothing.start("worker").wait_until_ready()
    with http_client(up) as client:
        assert wait_until(lambda: len(client.get("/api/monitoring/events/stats").json()["stats"]["workers"]) == 2, 10)
    said(worker.stop(), 0)
    said(up.stop(), 0)


# Help -------------------------------------------------------------------------------------------------------------


def test_options_of_every_command_are_explained() -> None:
    from jobledger.cli.main import app

    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
