"""Help pages: every command has one with examples, it fits into the terminal, and its examples can be run."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from jobledger.cli.main import app
from jobledger.ledger.mongo.embedded_files import wait_until
from tests.support.forked_commands import create_command
from tests.support.generated_docs import list_help_pages
from tests.support.installation import COMMAND, Installation, assert_outcome
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS

ROLES = ("up", "api", "projector", "worker", "webhook-sender", "demo")
"""Commands that keep running. `test_roles.py` and `test_demo.py` run them."""


def iterate_commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the path and the object of each command."""
    for name, subcommand in getattr(command, "commands", {}).items():
        yield from iterate_commands(subcommand, f"{path} {name}".strip())
    if not hasattr(command, "commands"):
        yield path, command


COMMANDS = dict(iterate_commands(typer.main.get_command(app)))


@pytest.mark.parametrize("path", COMMANDS)
def test_command_has_summary_examples_and_described_parameters(path: str) -> None:
    command = COMMANDS[path]
    summary = command.help.splitlines()[0]
    assert re.fullmatch(r"[A-Z].*[^.]", summary), summary
    assert command.examples, "a new user starts with an example"
    assert all(re.search(rf"\bjobledger {path}\b", line) for line in command.examples.splitlines())
    for parameter in command.params:
        assert parameter.help, parameter.name


@pytest.mark.parametrize("width", [60, 80, 120])
def test_help_page_lines_fit_into_terminal(width: int) -> None:
    pages = list_help_pages(width)
    assert len(pages) > len(COMMANDS)
    for name, page in pages:
        examples = page.partition("Examples:\n")[2].partition("\n\n")[0]
        text = page.replace(examples, "") if examples else page
        words = max(map(len, text.split()))  # a choice of values is one word
        assert max(map(len, text.splitlines())) <= max(width, words + 10, 80), name


@needs_local_mongod
@pytest.mark.parametrize("arguments", [["-h"], ["--help"], [], ["help"]], ids=str)
def test_help_of_program_and_group_is_printed_with_success(
    stopped_installation: Installation, arguments: list[str]
) -> None:
    assert_outcome(stopped_installation.run(*arguments), 0, "Use:", "Operate:", "Run:", "Audit:", "Exit codes:")
    group = ["help", "jobs"] if arguments == ["help"] else ["jobs", *arguments]
    assert_outcome(stopped_installation.run(*group), 0, "Usage: jobledger jobs", "retry")


@needs_local_mongod
def test_help_of_alias_and_unknown_command(stopped_installation: Installation) -> None:
    assert_outcome(stopped_installation.run("jobs", "list", "-h"), 0, "jobledger jobs list [OPTIONS]")
    assert_outcome(stopped_installation.run("help", "jbs"), 2, "error: No such command 'jbs'.", "Did you mean 'jobs'?")


@needs_local_mongod
@pytest.mark.parametrize(
    ("shell", "variables", "expected_lines"),
    [
        ("bash", {"COMP_WORDS": "jobledger jobs ls --status p", "COMP_CWORD": "4"}, ["pending", "processing"]),
        ("zsh", {"_TYPER_COMPLETE_ARGS": "jobledger jobs un"}, ["""_arguments '*: :(("unarchive":"""]),
        (
            "fish",
            {"_TYPER_COMPLETE_FISH_ACTION": "get-args", "_TYPER_COMPLETE_ARGS": "jobledger jobs un"},
            ["unarchive\t"],
        ),
    ],
)
def test_completion_script_asks_command_for_completions(
    stopped_installation: Installation, shell: str, variables: dict[str, str], expected_lines: list[str]
) -> None:
    script = assert_outcome(stopped_installation.run("completion", shell), 0)
    [variable] = set(re.findall(r"_[A-Z]+_COMPLETE(?==complete_)", script))
    env: dict[str, Any] = {variable: f"complete_{shell}", **variables}
    completed = stopped_installation.run(**env)
    lines = completed.out.splitlines()
    assert len(lines) == len(expected_lines)
    assert all(line.startswith(expected) for line, expected in zip(lines, expected_lines, strict=True)), lines


@needs_local_mongod
def test_version_matches_installed_package(stopped_installation: Installation) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", stopped_installation.run("--version").out)


@needs_local_mongod
@pytest.mark.parametrize(
    ("option", "env", "is_colored"),
    [
        ([], {"FORCE_COLOR": "1"}, True),
        (["--color", "always"], {}, True),
        (["--color", "always"], {"NO_COLOR": "1"}, True),
        (["--color=never"], {"FORCE_COLOR": "1"}, False),
        ([], {}, False),
    ],
    ids=str,
)
def test_colored_output_to_a_pipe_is_complete(
    running_installation: Installation, url: str, option: list[str], env: dict[str, str], *, is_colored: bool
) -> None:
    name = "A long name " * 20
    run = running_installation.run
    job_id = run("submit", "--type", "echo", "--name", name, "-o", "name", "--wait", JOBLEDGER_URL=url).out.strip()
    variables: dict[str, Any] = {"NO_COLOR": "", "COLUMNS": "40", "TERM": "xterm", **env}
    listed = run(*option, "jobs", "ls", "--search", job_id, JOBLEDGER_URL=url, **variables).out
    assert name.strip() in listed
    assert ("\x1b[32mcompleted" in listed) == is_colored


class Examples:
    """A ledger with jobs for the examples, and the IDs that replace those in the examples."""

    def __init__(self, installation: Installation, home: Path) -> None:
        self.installation = installation
        self.home = home
        self.url = installation.commands[0].url
        directory = installation.directory
        echo = {"job_type": "echo", "parameters": {"text": "hello"}}
        for name, content in {
            "batch.yaml": {"jobs": [echo, echo]},
            "opening.yaml": [echo],
            "keynote.yaml": echo,
            "restored.yaml": {"mongodb": {"db_name": "restored"}},
        }.items():
            (directory / name).write_text(yaml.safe_dump(content))
        for path in (".zfunc", ".config/fish/completions"):
            (home / path).mkdir(parents=True)
        hook = {"url": "http://endpoint.invalid/hook"}
        failing = {"job_type": "echo", "parameters": {"fail": "no luck"}, "webhook": hook}
        waiting = {**echo, "not_before": "2099-01-01T00:00:00Z"}
        jobs = [echo, failing, waiting, waiting, waiting]
        submitted = json.loads(self.run("submit", "-", "--json", stdin=json.dumps(jobs)))
        self.completed, self.failed, self.pending, self.pending_2, self.deleted = submitted["job_ids"]
        self.batch = submitted["batch_id"]
        self.finished_batch = json.loads(self.run("submit", "batch.yaml", "--wait", "--json"))["batch_id"]
        assert wait_until(lambda: "1 completed, 1 failed" in self.run("batches", "get", self.batch), DEADLINE_SECONDS)
        self.endpoint = self.run("webhooks", "endpoints", "-o", "name").strip()
        self.key = json.loads(self.run("keys", "create", "--user", "alice", "--json"))["key_id"]

    def run(self, *arguments: str, stdin: str = "") -> str:
        outcome = self.installation.run(*arguments, stdin=stdin, JOBLEDGER_URL=self.url)
        assert outcome.exit_code == 0, outcome.out + outcome.err
        return outcome.out

    def adapt(self, path: str, line: str) -> str:
        """Return an example with IDs of this ledger, and the current time."""
        job = {
            "jobs cancel": self.pending,
            "jobs edit": self.pending_2,
            "jobs retry": self.failed,
            "jobs delete": self.deleted,
        }
        line = re.sub(r"job-6b0c8f1a\w*|(?<= )6b0c8f1a\b", job.get(path, self.completed), line)
        batch = self.finished_batch if path == "batches wait" else self.batch
        line = re.sub(r"batch-6b0c8f1a\w*", batch, line)
        line = line.replace("0f6c1a2b3c4d5e6f70818283", self.endpoint).replace("0f6c1a2b3c4d5e6f", self.key)
        line = line.replace("2026-02-01T09:30Z", datetime.now(UTC).isoformat())
        return line.replace("jobledger", f"timeout --signal=INT 6 {COMMAND}") if path == "log follow" else line

    def run_line(self, line: str) -> subprocess.CompletedProcess[str]:
        """Run a line in bash."""
        commands = create_command().parent
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.installation.directory,
            env={
                **self.installation.env,
                "PATH": f"{commands}:/usr/bin:/bin",
                "HOME": str(self.home),
                "JOBLEDGER_URL": self.url,
                "EDITOR": "true",
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )


EXPECTED_CODES = {"log follow": 124, "webhooks test": 1}
"""`timeout` exits with 124. The host of the other example does not exist."""


@needs_local_mongod
@pytest.mark.timeout(300)
def test_every_example_runs(running_installation: Installation, tmp_path: Path) -> None:
    examples = Examples(running_installation, tmp_path)
    lines = [
        (path, line)
        for path, command in COMMANDS.items()
        for line in command.examples.splitlines()
        if path not in ROLES
    ]
    root: Any = typer.main.get_command(app)
    lines += [("", line) for line in root.examples.splitlines()]
    assert len(lines) > 60
    problems = []
    for path, line in lines:
        finished = examples.run_line(examples.adapt(path, line))
        if finished.returncode != EXPECTED_CODES.get(path, 0) or "Traceback" in finished.stderr:
            problems.append(f"{line}: {finished.returncode}\n{finished.stdout[-300:]}{finished.stderr[-600:]}")
    assert not problems, "\n".join(problems)
