"""Commands end with an exit code and a message, whatever arguments, settings, locales and outputs they get."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from tests.support.installation import COMMAND, Installation, assert_outcome
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = needs_local_mongod

ODD = b"\xff\xfe\xed\xa0\x80"
LONG_HOST = f"http://{'a' * 300}.example"


def run_bytes(
    installation: Installation, *arguments: bytes | str, env: Mapping[str, bytes | str] | None = None
) -> tuple[int, str]:
    """Run a command with arguments and environment variables that may be no text. Return exit code and output."""
    finished = subprocess.run(
        [COMMAND, *arguments],
        cwd=installation.directory,
        env={os.fsencode(name): os.fsencode(value) for name, value in {**installation.env, **(env or {})}.items()},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    output = (finished.stdout + finished.stderr).decode(errors="replace")
    assert "Traceback" not in output, output
    return finished.returncode, output


@pytest.mark.parametrize(
    ("arguments", "env", "text"),
    [
        (["jobs", "ls", "--search", ODD], {}, "--search"),
        (["jobs", "get", b"job-" + ODD], {}, "'ID'"),
        (["jobs", "retry", "job-1", "--set", b"a=" + ODD], {}, "--set"),
        (["jobs", ODD], {}, "No such command"),
        (["jobs", "ls", b"--" + ODD], {}, "No such option"),
        (["submit", ODD], {}, "file not found"),
        (["log", "ls", "--type", ODD], {}, "--type"),
        (["log", "ls", "--config", ODD], {}, "file not found"),
        (["log", "ls"], {"JOBLEDGER_CONFIG": ODD}, "file not found"),
        (["jobs", "ls"], {"JOBLEDGER_URL": b"http://" + ODD}, "JOBLEDGER_URL"),
        (["jobs", "ls"], {"JOBLEDGER_KEY": ODD}, "JOBLEDGER_KEY"),
        *[
            (["jobs", "ls"], {"JOBLEDGER_URL": url}, "is not a URL")
            for url in (
                "http://[",
                "http://a:99999",
                "http://ex ample",
                LONG_HOST,
                "x",
                "http://u:secret@",
                "http://a b",
            )
        ],
    ],
    ids=str,
)
def test_argument_that_is_no_text_or_url_is_usage_error(
    stopped_installation: Installation, arguments: list[bytes | str], env: dict[str, bytes | str], text: str
) -> None:
    code, output = run_bytes(stopped_installation, *arguments, env=env)
    assert code == 2, output
    assert text in output
    assert output.startswith("error: ")
    assert "secret" not in output


@pytest.mark.parametrize(
    "env", [{"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=str
)
def test_locale_without_unicode_prints_escapes(
    running_installation: Installation, url: str, env: dict[str, bytes | str]
) -> None:
    arguments = ("--type", "echo", "--name", "Grüße", "--url", url)
    assert run_bytes(running_installation, "submit", *arguments, "--wait", env=env)[0] == 0
    code, output = run_bytes(running_installation, "jobs", "ls", "--url", url, env=env)
    assert code == 0
    assert ("Grüße" if len(env) == 1 else "Gr\\xfc\\xdfe") in output


@pytest.mark.parametrize("arguments", [["-h"], ["--version"], ["jobs", "ls"], ["jobs", "ls", "-o", "yaml"], ["doctor"]])
def test_output_that_cannot_be_written_is_reported(
    running_installation: Installation, url: str, arguments: list[str]
) -> None:
    env = {**running_installation.env, "JOBLEDGER_URL": url}
    running_installation.run("submit", "--type", "echo", JOBLEDGER_URL=url)
    with Path("/dev/full").open("wb") as full:
        finished = subprocess.run(
            [COMMAND, *arguments],
            cwd=running_installation.directory,
            env=env,
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=60,
            check=False,
        )
    assert finished.stderr == b"error: Cannot write the output: No space left on device.\n"
    assert finished.returncode == 4
    reader, writer = os.pipe()
    os.close(reader)
    closed = subprocess.run(
        [COMMAND, *arguments],
        cwd=running_installation.directory,
        env=env,
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )
    os.close(writer)
    assert (closed.returncode, closed.stderr) == (141, b"")


@pytest.mark.parametrize("redirection", [">&-", "2>&-", "2>/dev/full", ">/dev/full 2>&1", "<&-"])
def test_missing_standard_streams_cause_no_traceback(stopped_installation: Installation, redirection: str) -> None:
    for command, code in (("-h", 4 if redirection.startswith(">/") else 0), ("jobs get x", 2)):
        finished = subprocess.run(
            ["bash", "-c", f"{COMMAND} {command} {redirection}"],
            cwd=stopped_installation.directory,
            env=stopped_installation.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert "Traceback" not in finished.stdout + finished.stderr
        assert finished.returncode == code, finished


def test_interrupt_ends_waiting_command_without_traceback(stopped_installation: Installation) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent_server:
        url = f"http://127.0.0.1:{silent_server.getsockname()[1]}"
        running = stopped_installation.start("jobs", "wait", "job-1", "--url", url)
        silent_server.accept()
        time.sleep(0.2)
        outcome = running.stop(signal.SIGINT)
    assert_outcome(outcome, 130)
    assert outcome.out + outcome.err == ""


def test_interrupt_while_modules_are_imported_prints_nothing(
    stopped_installation: Installation, tmp_path: Path
) -> None:
    (tmp_path / "typer.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    finished = subprocess.run(
        [COMMAND, "-h"],
        cwd=stopped_installation.directory,
        env={**stopped_installation.env, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert (finished.returncode, finished.stdout, finished.stderr) == (-signal.SIGINT, b"", b"")


def test_wrong_choice_suggests_similar_value(stopped_installation: Installation) -> None:
    outcome = stopped_installation.run("jobs", "ls", "--status", "faild")
    assert outcome.exit_code == 2
    assert outcome.err.splitlines()[1:] == ["hint: Did you mean 'failed'?", "hint: See `jobledger jobs ls --help`."]
    assert_outcome(stopped_installation.run("jobs", "ls", "--batc", "x"), 2, "hint: Did you mean --batch")
    assert_outcome(stopped_installation.run("jobs", "retri"), 2, "hint: Did you mean 'retry'?")
    assert_outcome(stopped_installation.run("jobs", "get", "--status", "x"), 2, "hint: List with `jobledger jobs ls`.")
    assert_outcome(
        stopped_installation.run("jobs", "ls", "--color", "x"), 2, "hint: --color belongs before the command"
    )
    assert_outcome(stopped_installation.run("submit", "echo", "text=x"), 2, "hint: Without a file, use --type")


class ScriptedServer(BaseHTTPRequestHandler):
    """Sends prepared responses in this order, and repeats the last one. None closes the connection instead."""

    answers: ClassVar[list[tuple[int, str, bytes] | None]] = []
    keys: ClassVar[list[str | None]] = []

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.keys.append(self.headers.get("Idempotency-Key"))
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            return
        status, media_type, body = answer
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_arguments: object) -> None:
        """Print nothing."""


@contextmanager
def run_scripted_server(*answers: tuple[int, str, bytes] | None) -> Iterator[str]:
    ScriptedServer.answers[:], ScriptedServer.keys[:] = answers, []
    with ThreadingHTTPServer(("127.0.0.1", 0), ScriptedServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def build_json(**content: object) -> tuple[int, str, bytes]:
    return 200, "application/json", json.dumps({"status": "success", **content}).encode()


BAD_GATEWAY = (502, "text/html", b"<html>Bad Gateway</html>")


def test_lost_response_to_action_is_requested_again_with_same_key(stopped_installation: Installation) -> None:
    job = {"job_id": "job-1", "status": "cancelled"}
    with run_scripted_server(None, BAD_GATEWAY, build_json(job_id="job-1", job=job)) as url:
        outcome = stopped_installation.run("jobs", "cancel", "job-1", "--url", url)
    assert_outcome(outcome, 0, "job-1 is cancelled\n")
    assert len(ScriptedServer.keys) == 3
    assert len(set(ScriptedServer.keys)) == 1
    assert ScriptedServer.keys[0]


def test_lost_response_to_submission_is_requested_again_with_same_key(stopped_installation: Installation) -> None:
    conflict = 409, "application/json", b'{"status": "error", "code": "x", "message": "Wrong."}'
    with run_scripted_server(None, conflict) as url:
        arguments = ("submit", "--type", "echo", "--url", url)
        assert_outcome(stopped_installation.run(*arguments), 1, "error: Wrong.")
        assert_outcome(stopped_installation.run(*arguments, "--key", "k"), 1, "error: Wrong.")
    first, second, own = ScriptedServer.keys
    assert first == second != own == "k"


def test_wait_continues_while_proxy_cannot_reach_api(stopped_installation: Installation) -> None:
    found = build_json(job={"job_id": "job-1", "status": "completed"})
    with run_scripted_server(*[BAD_GATEWAY] * 7, found) as url:
        outcome = stopped_installation.run("jobs", "wait", "job-1", "--url", url)
    assert_outcome(outcome, 0, "job-1 is completed\n")
    with run_scripted_server(BAD_GATEWAY) as url:
        assert_outcome(stopped_installation.run("jobs", "ls", "--url", url), 3, "a proxy cannot reach the API")


@pytest.mark.parametrize("answer", [(200, "text/html", b"<html>\n"), (302, "text/html", b"")])
def test_stream_of_other_server_is_error(stopped_installation: Installation, answer: tuple[int, str, bytes]) -> None:
    job = build_json(job={"job_id": "job-1", "status": "pending"})
    with run_scripted_server(build_json(head=1), job, answer) as url:
        outcome = stopped_installation.run("jobs", "watch", "job-1", "--url", url, seconds=20)
    assert_outcome(outcome, 1, "but it is not a Jobledger API", "hint: Check --url")


def test_proxy_of_environment_is_used_for_other_machines(stopped_installation: Installation) -> None:
    with run_scripted_server(BAD_GATEWAY) as proxy:
        for url in ("http://jobs.example", "http://localhost:1"):
            outcome = stopped_installation.run("jobs", "get", "job-1", "--url", url, HTTP_PROXY=proxy, NO_PROXY="")
            assert_outcome(outcome, 3)
    assert len(ScriptedServer.keys) == 1, "a proxy cannot reach this machine"
