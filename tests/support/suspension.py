"""Suspend processes with SIGSTOP."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

SUSPEND_SECONDS = 30.0


def suspend(pid: int) -> None:
    """Send SIGSTOP to a process and wait until all of its threads have stopped.

    The signal stops the threads of a process one by one. Until then the process may still answer.

    Raises:
        TimeoutError: A thread still runs after 30 seconds.
    """
    os.kill(pid, signal.SIGSTOP)
    deadline = time.monotonic() + SUSPEND_SECONDS
    while not is_suspended(pid):
        if time.monotonic() > deadline:
            raise TimeoutError(f"process {pid} was not suspended within {SUSPEND_SECONDS:.0f} s")
        time.sleep(0.001)


def is_suspended(pid: int) -> bool:
    """Return whether all threads of a process have stopped."""
    threads = Path(f"/proc/{pid}/task").iterdir()
    return all((thread / "stat").read_text().rpartition(")")[2].split()[0] == "T" for thread in threads)
