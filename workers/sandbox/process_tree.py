"""Find and kill the descendants of this process. Imports only the standard library, like `restrictions.py`."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path


def kill_children(seconds: float, exclude: frozenset[int] = frozenset()) -> None:
    """Kill all children of this subreaper except `exclude`, and their descendants, which become its children.

    Args:
        seconds: Timeout. Processes that survive it cannot be killed.
        exclude: Process IDs to spare.
    """
    deadline, pause = time.monotonic() + seconds, 0.001
    while time.monotonic() < deadline:
        remaining = list_children() - exclude
        for pid in remaining:
            # This also kills stopped processes. The PID cannot be reused, because the child was not reaped yet.
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        reaped = [pid for pid in remaining if _reap(pid)]
        if not remaining:
            return
        if not reaped:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)


def list_children() -> set[int]:
    """Return the process IDs of the children of this process."""
    with suppress(OSError):  # a thread has ended
        if files := list(Path("/proc/self/task").glob("*/children")):
            return {int(pid) for file in files for pid in file.read_text().split()}
    return _list_children_by_parent()


def _list_children_by_parent() -> set[int]:
    """Return the children of this process on a kernel without /proc/…/children."""
    children, own_pid = set(), os.getpid()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == own_pid:
                children.add(int(path.parent.name))
    return children


def _reap(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:
        return True
