"""The files beside an embedded server: the lock of its owner, its address and its log. Only file operations."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from jobledger.ledger.domain.errors import ServerInUse
from jobledger.ledger.system.private_files import replace_file

# A process that calls `is_owned` holds a shared lock for a moment. A process that acquires the lock waits this long.
LOCK_TIMEOUT_SECONDS = 0.5


class ServerInfo(BaseModel):
    """`server.json`: the address of the running embedded server with its secret, for other commands of this user."""

    model_config = ConfigDict(frozen=True)

    uri: str
    pid: int


class OwnerLock:
    """The right to run a server on a data directory. The kernel releases it when the process ends, in any way.

    It is an flock, which a child forked without exec inherits. So start helpers by spawn or exec.
    """

    def __init__(self, data_dir: Path) -> None:
        """Acquire the lock.

        Raises:
            ServerInUse: Another process has it. The message contains its ID.
            OSError: The lock file cannot be opened.
        """
        path = data_dir / "lock"
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        if not wait_until(lambda: try_lock(self._fd, fcntl.LOCK_EX), LOCK_TIMEOUT_SECONDS):
            os.close(self._fd)
            raise ServerInUse(
                f"{data_dir} is used by another Jobledger process (ID {path.read_text().strip() or 'unknown'}). "
                "Stop it first, or set mongodb.data_dir to another directory."
            )
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def is_owned(data_dir: Path) -> bool:
    """Return whether a running process owns the directory."""
    try:
        fd = os.open(data_dir / "lock", os.O_RDONLY)
    except OSError:
        return False
    try:
        return not try_lock(fd, fcntl.LOCK_SH)
    finally:
        os.close(fd)


def write_server_info(data_dir: Path, info: ServerInfo) -> None:
    """Write the file atomically. Only the owner of the directory may call it."""
    with replace_file(data_dir / "server.json") as file:
        file.write(f"{info.model_dump_json()}\n".encode())


def read_server_info(data_dir: Path) -> ServerInfo | None:
    """Return the content of the file, which may be stale; None if there is no readable one."""
    try:
        return ServerInfo.model_validate_json((data_dir / "server.json").read_bytes())
    except (OSError, ValidationError):
        return None


def remove_server_info(data_dir: Path) -> None:
    """Remove the file when the server ends. If that fails, it is stale: no process has its ID."""
    with suppress(OSError):
        (data_dir / "server.json").unlink()


def read_log_tail(path: Path, start: int, lines: int = 8) -> str:
    """Return mongod's last log messages after byte `start` for people: its errors, or else its last messages."""
    with path.open("rb") as file:
        file.seek(start)
        entries = [_parse_log_line(line) for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = list(dict.fromkeys(text for severity, text in entries if severity in "EF"))
    return "\n".join(f"    {text}" for text in (errors or [text for _, text in entries])[-lines:])


def _parse_log_line(line: str) -> tuple[str, str]:
    """Return a line of mongod's JSON log as (severity, text). Other lines come from the loader or a crash: errors."""
    try:
        entry = json.loads(line)
        attributes = {k: v.get("msg", v) if isinstance(v, dict) else v for k, v in entry.get("attr", {}).items()}
        details = ", ".join(f"{key}: {value}" for key, value in attributes.items())
        return entry["s"], " ".join(f"{entry['msg']} {details}".split())[:400]
    except (ValueError, KeyError, AttributeError):
        return "E", line


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, at most so many seconds. Return whether it became true."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return met


def try_lock(fd: int, operation: int) -> bool:
    """Acquire an flock (fcntl.LOCK_EX, LOCK_SH) if it is free. Never waits."""
    try:
        fcntl.flock(fd, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
