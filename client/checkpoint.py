"""Keep the position of a named reader of the log in a file, so that it continues there after a restart."""

from __future__ import annotations

import fcntl
import re
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO, Final

import orjson

from jobledger.client.errors import CheckpointError

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_MAX_FILE_BYTES: Final = 1000


def find_state_dir(environment: Mapping[str, str]) -> Path:
    """Return the directory of the positions: JOBLEDGER_STATE_DIR, or `jobledger` in the user's state directory."""
    if directory := environment.get("JOBLEDGER_STATE_DIR"):
        return Path(directory)
    return Path(environment.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "jobledger"


class FileCheckpoint:
    """The position of one reader. One process at a time may use it."""

    def __init__(self, directory: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError(f"name must be 1 to 100 letters, digits, '.', '_' and '-', got {name[:200]!r}")
        self.path: Final = directory / f"{name}.json"
        self._name = name
        self._lock: BinaryIO | None = None

    def open(self) -> int | None:
        """Lock the file and return the saved position, None if there is none.

        Raises:
            CheckpointError: Another process reads under this name, or the file is damaged or not accessible.
        """
        lock_path = self.path.with_suffix(".lock")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = lock_path.open("ab")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with self.path.open("rb") as file:
                text = file.read(_MAX_FILE_BYTES)
        except BlockingIOError:
            self.close()
            message = f"Another reader uses the name {self._name!r} ({lock_path}). Stop it, or use another name."
            raise CheckpointError(message) from None
        except FileNotFoundError:
            return None
        except OSError as error:
            self.close()
            message = f"The position of {self._name!r} cannot be read: {error}. Set JOBLEDGER_STATE_DIR."
            raise CheckpointError(message) from error
        return self._parse(text)

    def _parse(self, text: bytes) -> int:
        try:
            position = orjson.loads(text)["position"]
        except (orjson.JSONDecodeError, LookupError, TypeError):
            position = None
        if not isinstance(position, int) or position < 0:
            self.close()
            message = f"{self.path} contains no position. Delete it to read from the beginning, or restore it."
            raise CheckpointError(message)
        return position

    def save(self, position: int) -> None:
        """Replace the saved position.

        Raises:
            CheckpointError: The file cannot be written.
        """
        temporary = self.path.with_suffix(".tmp")
        try:
            temporary.write_bytes(orjson.dumps({"position": position}))
            temporary.replace(self.path)
        except OSError as error:
            message = f"The position {position} of {self._name!r} cannot be saved: {error}."
            raise CheckpointError(message) from error

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            self._lock.close()
            self._lock = None
