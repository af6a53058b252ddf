"""Restart a command when source files change, for `--reload`.

The command runs in a child process. It is stopped in an orderly way: running jobs are released and start again with the
new code, without counting the attempt.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

from jobledger.cli.output.terminal_text import echo_text
from jobledger.ledger.system.process_attributes import set_parent_death_signal

POLL_SECONDS: Final = 0.5
STOP_SECONDS: Final = 30.0
"""Time in which the command must exit. It is killed after that: its leases expire, so no job is lost."""
_GRACE_VARIABLE: Final = "JOBLEDGER_EVENT_WORKER__SHUTDOWN_GRACE_SECONDS"
_GRACE_SECONDS: Final = "1"
"""A change of the code should not wait for running jobs."""
_EXCLUDED_DIRECTORIES: Final = frozenset({"__pycache__", "node_modules", "site-packages"})
Snapshot = Mapping[str, tuple[int, int]]
"""Time of change and size of each file."""


def run_with_reload(arguments: Sequence[str], directory: Path, config: Path | None) -> int:
    """Run `jobledger` with these arguments until a signal arrives, and restart it when a file changes.

    Args:
        arguments: Arguments of the command.
        directory: The directory whose Python files are watched, with its subdirectories.
        config: The settings file, which is watched as well.

    Returns:
        The exit code of the command.
    """
    reloader = _Reloader(arguments, directory, config or Path("config.yaml"))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: reloader.stop())
    return reloader.run()


class _Reloader:
    def __init__(self, arguments: Sequence[str], directory: Path, config: Path) -> None:
        self._arguments = arguments
        self._directory = directory
        self._config = config
        self._stopping = threading.Event()
        self._process: subprocess.Popen[bytes] | None = None
        self._terminated: subprocess.Popen[bytes] | None = None
        """The process that got a signal. A second one would end it at once."""

    def stop(self) -> None:
        """Stop the command, and do not start it again."""
        self._stopping.set()
        if self._process is not None:
            self._terminated = self._process
            self._process.terminate()

    def run(self) -> int:
        snapshot = self._take_snapshot()
        process = self._start()
        has_reported = False
        while not self._stopping.wait(POLL_SECONDS):
            if process.poll() is not None and not has_reported:
                has_reported = True
                echo_text(f"stopped with exit code {process.returncode}; waiting for a change of the code", err=True)
            changed = self._take_snapshot()
            if changed == snapshot:
                continue
            while (newer := self._wait_for_next_snapshot()) != changed:  # an editor may still be writing
                changed = newer
            names = sorted(path for path, _ in snapshot.items() ^ changed.items())
            snapshot = changed
            echo_text(f"reloading: {os.path.relpath(names[0])} has changed", err=True)
            self._end(process)
            if self._stopping.is_set():
                break
            process, has_reported = self._start(), False
        return self._end(process)

    def _wait_for_next_snapshot(self) -> Snapshot:
        self._stopping.wait(POLL_SECONDS / 2)
        return self._take_snapshot()

    def _start(self) -> subprocess.Popen[bytes]:
        # In a process group of its own, it gets each signal once: from this process, and not from the terminal.
        self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
            [sys.executable, "-m", "jobledger", *self._arguments],
            env={_GRACE_VARIABLE: _GRACE_SECONDS, **os.environ},
            process_group=0,
            preexec_fn=lambda: set_parent_death_signal(signal.SIGTERM),
        )
        return self._process

    def _end(self, process: subprocess.Popen[bytes]) -> int:
        if process is not self._terminated and process.poll() is None:
            process.terminate()
        try:
            return process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _take_snapshot(self) -> Snapshot:
        snapshot: dict[str, tuple[int, int]] = {}
        for path in (*_iterate_sources(os.fspath(self._directory)), os.fspath(self._config)):
            with suppress(OSError):  # it was removed
                status = os.stat(path)  # noqa: PTH116 - fast for many files
                snapshot[path] = status.st_mtime_ns, status.st_size
        return snapshot


def _iterate_sources(directory: str) -> Iterator[str]:
    """Yield the Python files below a directory. Hidden directories and virtual environments are not searched."""
    for parent, names, files in os.walk(directory):
        names[:] = [
            name
            for name in names
            if not name.startswith(".")
            and name not in _EXCLUDED_DIRECTORIES
            and not os.path.exists(os.path.join(parent, name, "pyvenv.cfg"))  # noqa: PTH110, PTH118 - fast for many files
        ]
        yield from (os.path.join(parent, name) for name in files if name.endswith(".py"))  # noqa: PTH118 - as above
