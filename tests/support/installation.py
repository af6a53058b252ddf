"""Run the `jobledger` command in subprocesses, in a test directory with its own config.yaml."""

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

from jobledger.ledger.mongo.embedded_files import ServerInfo, read_server_info, wait_until
from tests.support import forked_commands

COMMAND = Path(sys.executable).parent / "jobledger"
START_TIMEOUT_SECONDS = 40.0
EXIT_TIMEOUT_SECONDS = 40.0
_URL_LINE = re.compile(r"^Jobledger listens on (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class CommandOutcome:
    """Exit code and output of a finished command."""

    exit_code: int
    out: str
    err: str


class RunningCommand:
    """A running `jobledger` command. Its output goes to files, so that it never blocks on a full pipe."""

    def __init__(self, directory: Path, name: str, command: Sequence[str | Path], env: Mapping[str, str]) -> None:
        self.directory = directory
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
                start_new_session=True,  # a process group that can be killed as a whole
            )

    @property
    def stdout(self) -> str:
        return self._out.read_text(encoding="utf-8")

    @property
    def stderr(self) -> str:
        return self._err.read_text(encoding="utf-8")

    def wait_until_ready(self, ready_text: str = "Ctrl-C stops it") -> Self:
        """Wait until the output contains `ready_text`. Fail with the output if the command exits."""
        wait_until(lambda: ready_text in self.stdout or self.process.poll() is not None, START_TIMEOUT_SECONDS)
        assert ready_text in self.stdout, (
            f"the command did not start (exit code {self.process.poll()}):\n{self.stdout}{self.stderr}"
        )
        return self

    @property
    def url(self) -> str:
        match = _URL_LINE.search(self.stdout)
        assert match, f"the output contains no URL:\n{self.stdout}{self.stderr}"
        return match[1]

    def wait_for_exit(self, seconds: float = EXIT_TIMEOUT_SECONDS) -> CommandOutcome:
        """Wait for the exit of the command."""
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"the command is still running after {seconds} s:\n{self.stdout}{self.stderr}"
            ) from None
        return CommandOutcome(self.process.returncode, self.stdout, self.stderr)

    def stop(self, number: signal.Signals = signal.SIGTERM) -> CommandOutcome:
        """Send a signal and wait for the exit of the command."""
        self.process.send_signal(number)
        return self.wait_for_exit()

    def kill_group(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Installation:
    """A directory with a config.yaml, and the commands started in it."""

    def __init__(self, directory: Path, **sections: Mapping[str, Any]) -> None:
        self.directory = directory
        self.commands: list[RunningCommand] = []
        directory.mkdir(parents=True, exist_ok=True)
        self.write_config(**sections)

    def write_config(self, **sections: Mapping[str, Any]) -> None:
        """Write config.yaml with free ports and the given sections."""
        own: dict[str, dict[str, Any]] = {"api": {"port": 0}}
        content = {name: {**own.get(name, {}), **sections.get(name, {})} for name in own.keys() | sections.keys()}
        (self.directory / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")

    @property
    def env(self) -> dict[str, str]:
        """The environment of this process without Jobledger settings."""
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("JOBLEDGER_")}
        return {**inherited, "COLUMNS": "200", "NO_COLOR": "1"}

    def start(self, *arguments: str, **env: str) -> RunningCommand:
        """Start a command without waiting for it."""
        return self.start_command([COMMAND, *arguments], arguments[0], **env)

    def start_command(self, command: Sequence[str | Path], name: str, **env: str) -> RunningCommand:
        """Start any command line, for example another program that runs jobledger."""
        running = RunningCommand(self.directory, f"{name}-{len(self.commands)}", command, {**self.env, **env})
        self.commands.append(running)
        return running

    def start_up_command(self) -> RunningCommand:
        return self.start("up").wait_until_ready()

    def run(self, *arguments: str, stdin: str | bytes = b"", seconds: float = 60, **env: str) -> CommandOutcome:
        """Run a command in a process forked from one with loaded modules (tests/support/forked_commands.py)."""
        code, out, err = forked_commands.run_command(
            arguments,
            directory=self.directory,
            env={**self.env, **env},
            stdin=stdin.encode() if isinstance(stdin, str) else stdin,
            seconds=seconds,
        )
        return CommandOutcome(code, out.decode(), err.decode())

    def read_server_info(self) -> ServerInfo:
        """Return the address and process ID of the embedded server."""
        info = read_server_info(self.directory / "data")
        assert info is not None, "there is no server.json"
        return info

    def kill_all_processes(self) -> None:
        """Kill all processes with SIGKILL: commands, their children and the embedded server."""
        info = read_server_info(self.directory / "data")
        for running in self.commands:
            with suppress(ProcessLookupError):
                os.killpg(running.process.pid, signal.SIGKILL)
        if info is not None:
            with suppress(ProcessLookupError):
                os.kill(info.pid, signal.SIGKILL)
        for running in self.commands:
            running.process.wait()
        assert info is None or wait_until(lambda: has_exited(info.pid), 10)
        self.commands.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for running in reversed(self.commands):  # in reverse order, because later commands depend on earlier ones
            if running.process.poll() is None:
                running.process.terminate()
                try:
                    running.process.wait(15)
                except subprocess.TimeoutExpired:
                    running.kill_group()


def assert_outcome(outcome: CommandOutcome, exit_code: int, *expected_texts: str) -> str:
    """Check the exit code and the texts of the output, and that it has no traceback. Return the output."""
    text = outcome.out + outcome.err
    assert outcome.exit_code == exit_code, text
    assert "Traceback" not in text, text
    for expected_text in expected_texts:
        assert expected_text in text, text
    return text


def assert_one_line_error(outcome: CommandOutcome, exit_code: int, *expected_texts: str) -> None:
    """Check that a command failed with this exit code, one line of error with these texts, and hints."""
    assert (outcome.exit_code, outcome.out) == (exit_code, ""), outcome
    error, *hints = outcome.err.splitlines()
    assert error.startswith("error: "), outcome.err
    assert all(hint.startswith("hint: ") for hint in hints), outcome.err
    for word in expected_texts:
        assert word in outcome.err


@contextmanager
def http_client(command: RunningCommand) -> Iterator[httpx.Client]:
    """Yield an HTTP client for a running API."""
    with httpx.Client(base_url=command.url, timeout=30, trust_env=False) as client:
        yield client


def has_exited(pid: int) -> bool:
    """Return whether the process exited. Zombies count, because in a container nothing may reap them."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def list_descendants(pid: int) -> set[int]:
    """Return all running descendants of a process."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] != "Z":
                parents[int(path.parent.name)] = int(fields[1])
    descendants: set[int] = set()
    new = {pid}
    while new:
        new = {child for child, parent in parents.items() if parent in new} - descendants
        descendants |= new
    return descendants
