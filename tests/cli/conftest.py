"""Installations and commands that the tests of the commands share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.in_process_command import run_command_in_process
from tests.support.installation import CommandOutcome, Installation

RunCommand = Callable[..., CommandOutcome]


@pytest.fixture(scope="package")
def running_installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """An installation in which `jobledger up` runs. Tests must not stop or reconfigure it.

    The delay of a retry is random. Its limit is high, so that a job that waits for a retry stays pending during a test.
    """
    retries = {"retry_base_seconds": 3600, "retry_max_seconds": 3600}
    with Installation(tmp_path_factory.mktemp("up"), event_worker=retries) as installation:
        installation.start_up_command()
        yield installation


@pytest.fixture
def url(running_installation: Installation) -> str:
    """The URL of the running installation."""
    return running_installation.commands[0].url


@pytest.fixture
def stopped_installation(tmp_path: Path) -> Iterator[Installation]:
    """An installation without running processes."""
    with Installation(tmp_path) as installation:
        yield installation


@pytest.fixture
def run_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> RunCommand:
    """A function that runs commands in the process and directory of the test."""

    def run(*arguments: str, stdin: str | bytes = b"") -> CommandOutcome:
        monkeypatch.chdir(tmp_path)
        return run_command_in_process(*arguments, capfd=capfd, monkeypatch=monkeypatch, stdin=stdin)

    return run
