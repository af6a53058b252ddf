"""Usage errors, wrong settings, and help of all commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from jobledger.cli.main import app
from tests.cli.conftest import RunCommand
from tests.support.installation import CommandOutcome, Installation, assert_one_line_error, assert_outcome
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = needs_local_mongod


@pytest.mark.parametrize("command", ["up", "api", "projector", "worker", "doctor"])
def test_command_wrong_setting_is_one_line_usage_error(run_command: RunCommand, tmp_path: Path, command: str) -> None:
    (tmp_path / "config.yaml").write_text("api:\n  prot: 1\n")
    assert_one_line_error(run_command(command), 2, "config.yaml: api.prot", "Keys: host, port")
    assert_one_line_error(run_command(command, "--config", "nowhere.yaml"), 2, "nowhere.yaml: file not found")


def test_obsolete_setting_is_reported_and_ignored(
    stopped_installation: Installation, mongodb_uri: str, db_name: str
) -> None:
    stopped_installation.write_config(
        mongodb={"uri": mongodb_uri, "db_name": db_name}, event_worker={"poll_interval_sec": 5}
    )
    outcome = stopped_installation.run("doctor")
    assert_outcome(outcome, 0)
    assert "note: event_worker.poll_interval_sec has no effect" in outcome.err


def test_unknown_command_or_option_is_usage_error(stopped_installation: Installation) -> None:
    assert_outcome(stopped_installation.run("explode"), 2, "No such command")
    assert_outcome(stopped_installation.run("up", "--fast"), 2, "No such option")
    assert_outcome(stopped_installation.run("jobs", "get"), 2, "Missing argument")
    assert_outcome(stopped_installation.run("submit"), 2, "Nothing to submit")
    assert stopped_installation.run("--help").exit_code == 0


def test_commands_without_demo_dependencies_run(stopped_installation: Installation) -> None:
    program = (
        "import sys; sys.modules['fpdf'] = None; from jobledger.cli.main import run; sys.argv[0] = 'jobledger'; run()"
    )
    for arguments, exit_code, expected_text in [
        (["submit", "nowhere"], 2, "file not found"),
        (["demo"], 2, "jobledger[demo]"),
    ]:
        outcome = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=stopped_installation.directory,
            env=stopped_installation.env,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert_one_line_error(
            CommandOutcome(outcome.returncode, outcome.stdout, outcome.stderr), exit_code, expected_text
        )


def test_top_level_commands_have_help() -> None:
    for command in app.registered_commands:
        assert command.callback is not None
        assert command.callback.__doc__
