"""The address of the embedded MongoDB server, a Unix socket, and its secret. Pure file operations.

The server does not listen on TCP. Its socket is in the data directory. If that path is too long for a socket, or its
file system has no sockets, the socket is in another directory with a short path. The secret is the server's key file: a
client that knows it authenticates as `__system`, the user of the members of a replica set. So the database stores no
user, and an existing data directory is protected from the next start on (docs/decisions/0054).
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import secrets
import socket
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

from jobledger.ledger.domain.errors import DatabaseUnsuitable
from jobledger.ledger.system.private_files import make_private_directory, replace_file

SOCKET_NAME: Final = "mongodb.sock"
KEY_NAME: Final = "mongodb.key"
# mongod splits --bind_ip at commas and an address at colons, and the system allows 107 bytes.
_SOCKET_PATH: Final = re.compile(r"[A-Za-z0-9_./+=@-]{1,107}")
_KEY: Final = re.compile(r"[A-Za-z0-9+/]{64,1024}")


def build_uri(socket_path: Path, key: str) -> str:
    """Return the URI of the server, which contains the secret.

    It names the set: without it, the driver uses a server that has not read its configuration yet.
    """
    return (
        f"mongodb://__system:{quote(key, safe='')}@{quote(str(socket_path), safe='')}/"
        "?authSource=local&replicaSet=rs0&directConnection=true"
    )


def load_key(data_dir: Path) -> str:
    """Return the server's secret. Creates it if it is missing, or if other users could have read it.

    Call it only while the server is stopped: a new secret locks out clients with the old one.

    Raises:
        OSError: The file cannot be read or written.
    """
    path = data_dir / KEY_NAME
    with suppress(FileNotFoundError, UnicodeDecodeError):
        found = path.lstat()
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077:
            key = path.read_text(encoding="ascii").strip()
            if _KEY.fullmatch(key):
                return key
    key = base64.b64encode(secrets.token_bytes(96)).decode()
    with replace_file(path) as file:
        file.write(f"{key}\n".encode())
    return key


def choose_socket_path(data_dir: Path) -> Path:
    """Return the path for the server's socket, in a directory that only this user may enter.

    Raises:
        DatabaseUnsuitable: The directory belongs to another user.
        OSError: The directory cannot be written.
    """
    path = data_dir / SOCKET_NAME
    if _SOCKET_PATH.fullmatch(str(path)) and _supports_sockets(data_dir):
        return path
    name = f"jobledger-{os.geteuid()}-{hashlib.sha256(os.fsencode(data_dir)).hexdigest()[:16]}"
    runtime = Path(os.environ.get("XDG_RUNTIME_DIR", ""))
    usable = runtime.is_absolute() and os.access(runtime, os.W_OK) and len(os.fsencode(runtime)) < 50
    short = (runtime if usable else Path("/tmp")) / name  # noqa: S108 - checked below
    _make_own_directory(short)
    return short / SOCKET_NAME


def _make_own_directory(path: Path) -> None:
    """Create a directory in a shared place, or check that an existing one belongs to this user."""
    with suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise DatabaseUnsuitable(
            f"{path}, the directory for the embedded server's socket, belongs to another user. Remove it, or set "
            "mongodb.data_dir to a directory with a shorter path of plain letters, which holds the socket itself."
        )
    make_private_directory(path)


def _supports_sockets(directory: Path) -> bool:
    """Return whether a directory supports sockets. Some file systems, such as shared folders, do not."""
    trial = directory / f"{SOCKET_NAME}.{os.getpid()}"
    if not _SOCKET_PATH.fullmatch(str(trial)):
        return False
    with socket.socket(socket.AF_UNIX) as server, suppress(OSError):
        trial.unlink(missing_ok=True)
        server.bind(str(trial))
        trial.unlink()
        return True
    return False


def is_listening(socket_path: Path) -> bool:
    """Return whether a process accepts connections at the socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(str(socket_path)) == 0
