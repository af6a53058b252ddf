"""Run a command in the process of the test. This is faster, and a traceback surfaces as an exception."""

from __future__ import annotations

import io
import sys

import pytest

from jobledger.cli import main
from tests.support.installation import CommandOutcome


def run_command_in_process(
    *arguments: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    stdin: str | bytes = b"",
) -> CommandOutcome:
    """Run `jobledger` with these arguments in the current directory."""
    stdin_bytes = stdin.encode() if isinstance(stdin, str) else stdin
    monkeypatch.setattr(sys, "argv", ["jobledger", *arguments])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin_bytes), encoding="utf-8"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as exited:
        main.run()
    output = capfd.readouterr()
    assert "Traceback" not in output.err
    return CommandOutcome(int(exited.value.code or 0), output.out, output.err)
