"""tests: a jobledger of a test's own: the real command as real processes, in a directory with its own config.yaml."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import httpx
import yaml

from jobledger.ledger.mongo.embedded_lock import ServerInfo, read_server_info, wait_until
from tests.support import forked_commands

COMMAND = Path(sys.executable).parent / "jobledger"
START_TIMEOUT_SECONDS = 40.0
EXIT_TIMEOUT_SECONDS = 40.0
_ANSWERS = re.compile(r"^Jobledger listens on (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class CommandOutcome:
    """A command that has ended, and what it said."""

    exit_code: int
    out: str
    err: str


class RunningCommand:
    """A running `jobledger` command. Its output goes to files: it can never stand still for want of a reader."""

    def __init__(self, directory: Path, name: str, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        self._out = directory / f"{name}.out"
        self._err = directory / f"{name}.err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.process = subprocess.Popen(
                command,
                cwd=directory,
                env=dict(env),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                start_new_session=True,  # a process group of its own, to be killed as a whole
            )

    @property
    def stdout(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._err.read_text(encoding="utf-8")

    def wait_until_ready(self, ready_text: str = "Ctrl-C stops it") -> Self:
        """Wait until it says that it works; fail with what it said instead."""
        wait_until(lambda: ready_text in self.stdout or self.process.poll() is not None, START_TIMEOUT_SECONDS)
        assert ready_text in self.stdout, (
            f"it did not start (exit code {self.process.poll()}):\n{self.stdout}{self.stderr}"
        )
        return self

    @property
    def url(self) -> str:
        found = _ANSWERS.search(self.stdout)
        assert found, f"it has not said where it answers:\n{self.stdout}{self.stderr}"
        return found[1]

    def wait_for_exit(self, seconds: float = EXIT_TIMEOUT_SECONDS) -> CommandOutcome:
        """Wait for the end."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it is still running after {seconds} s:\n{self.stdout}{self.stderr}") from None
        return CommandOutcome(self.process.returncode, self.stdout, self.stderr)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> CommandOutcome:
        """Ask it to stop and wait until it has."""
        self.process.send_signal(number)
        return self.wait_for_exit()

    def kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Installation:
    """A directory with a config.yaml, and the commands that are run in it."""

    def __init__(self, directory: Path, **sections: Mapping[str, Any]) -> None:
        self.directory = directory
        self.commands: list[RunningCommand] = []
        directory.mkdir(parents=True, exist_ok=True)
        self.write_config(**sections)

    def write_config(self, **sections: Mapping[str, Any]) -> None:
        """Write config.yaml: everything on free ports, and what is given on top."""
        own: dict[str, dict[str, Any]] = {"api": {"port": 0}}
        content = {name: {**own.get(name, {}), **sections.get(name, {})} for name in own.keys() | sections.keys()}
        (self.directory / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    @property
    def env(self) -> dict[str, str]:
        """This process's environment without settings for jobledger."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("JOBLEDGER_")}
        return {**inherited, "COLUMNS": "200", "NO_COLOR": "1"}

    def start(self, *arguments: str, **env: str) -> RunningCommand:
        """Start a command and do not wait for anything."""
        return self.start_command([COMMAND, *arguments], arguments[0], **env)

    def start_command(self, command: Sequence[str | Path], name: str, **env: str) -> RunningCommand:
        """Start a command line of another program, one that executes jobledger for example."""
        role = RunningCommand(self.directory, f"{name}-{len(self.commands)}", command, {**self.env, **env})
        self.commands.append(role)
        return role

    def start_up_command(self) -> RunningCommand:
        return self.start("up").wait_until_ready()

    def run(self, *arguments: str, stdin: str | bytes = b"", seconds: float = 60, **env: str) -> CommandOutcome:
        """Run a command to its end, in a process forked from one that has it loaded
        (tests/support/forked_commands.py)."""
        code, out, err = forked_commands.run_command(
            arguments,
            directory=self.directory,
            env={**self.env, **env},
            stdin=stdin.encode() if isinstance(stdin, str) else stdin,
            seconds=seconds,
        )
        return CommandOutcome(code, out.decode(), err.decode())

    def read_embedded_lock(self) -> ServerInfo:
        """Where the embedded server is."""
        note = read_server_info(self.directory / "data")
        assert note is not None, "no embedded server is noted"
        return note

    def kill_all_processes(self) -> None:
        """SIGKILL for every process at once: commands, their children, the embedded server."""
        note = read_server_info(self.directory / "data")
        for role in self.commands:
            with suppress(ProcessLookupError):
                os.killpg(role.process.pid, signal.SIGKILL)
        if note is not None:
            with suppress(ProcessLookupError):
                os.kill(note.pid, signal.SIGKILL)
        for role in self.commands:
            role.process.wait()
        assert note is None or wait_until(lambda: has_exited(note.pid), 10)
        self.commands.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for role in reversed(self.commands):  # those that were started first own what the later ones need
            if role.process.poll() is None:
                role.process.terminate()
                try:
                    role.process.wait(15)
                except subprocess.TimeoutExpired:
                    role.kill_group()


def assert_one_line_error(outcome: CommandOutcome, exit_code: int, *expected_texts: str) -> None:
    """Check that a command has failed as it should: with this code, and one line that says why, with these words."""
    assert (outcome.exit_code, outcome.out) == (exit_code, ""), outcome
    assert outcome.err.startswith("jobledger: "), outcome.err
    assert outcome.err.count("\n") == 1, outcome.err
    for word in expected_texts:
        assert word in outcome.err


@contextmanager
def http_client(role: RunningCommand) -> Iterator[httpx.Client]:
    """Yield an HTTP client for a role that answers."""
    with httpx.Client(base_url=role.url, timeout=30, trust_env=False) as client:
        yield client


def has_exited(pid: int) -> bool:
    """Ended; a zombie counts, since in a container nobody may be there to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def list_descendants(pid: int) -> set[int]:
    """Return every living process that stems from `pid`."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(path.parent.name)] = int(fields[1])
    found: set[int] = set()
    fresh = {pid}
    while fresh:
        fresh = {child for child, parent in parents.items() if parent in fresh} - found
        found |= fresh
    return found
