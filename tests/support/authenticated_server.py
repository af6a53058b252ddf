"""A replica set with one node that requires authentication."""

from __future__ import annotations

import base64
import os
import re
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import quote_plus

from pymongo import MongoClient
from pymongo.errors import PyMongoError

from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.mongo.embedded import find_mongod
from jobledger.ledger.mongo.embedded_files import wait_until
from tests.support.polling import DEADLINE_SECONDS
from tests.support.replica_set import exit_with_parent, free_port

_REJECTION: Final = re.compile(r"not authorized on (\w+) to execute command \{ (\w+): \W*([\w.$]+)")
_ADMINISTRATOR: Final = "administrator"


@dataclass(frozen=True, slots=True)
class AuthenticatedServer:
    """The address and the administrator's password of the server."""

    address: str
    password: str
    log: Path

    @property
    def uri(self) -> str:
        """URI of the administrator."""
        return self.uri_for(_ADMINISTRATOR, self.password, "admin")

    def uri_for(self, user: str, password: str, auth_source: str) -> str:
        credentials = f"{quote_plus(user)}:{quote_plus(password)}"
        return f"mongodb://{credentials}@{self.address}/?replicaSet=rs0&directConnection=true&authSource={auth_source}"

    def authorization_failures(self, db_name: str) -> set[tuple[str, str]]:
        """Return the commands, and their collections, that the server rejected as unauthorized, from its log."""
        rejections = _REJECTION.findall(self.log.read_text(errors="replace"))
        return {(command, collection) for db, command, collection in rejections if db == db_name}


@contextmanager
def start_authenticated_server(directory: Path) -> Iterator[AuthenticatedServer]:
    """Start the server in the main thread, because the kernel ends it with the thread that started it."""
    data, log = directory / "data", directory / "mongod.log"
    data.mkdir(parents=True)
    port, parent = free_port(), os.getpid()
    command = [str(find_mongod()), "--replSet", "rs0", "--auth", "--keyFile", str(_write_key_file(directory))]
    command += ["--bind_ip", "127.0.0.1", "--port", str(port), "--dbpath", str(data), "--quiet", "--nounixsocket"]
    command += ["--wiredTigerCacheSizeGB", "0.25", "--oplogSize", "64"]
    command += ["--setParameter", "diagnosticDataCollectionEnabled=false"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, preexec_fn=lambda: exit_with_parent(parent)
        )
    server = AuthenticatedServer(f"127.0.0.1:{port}", secrets.token_hex(8), log)
    try:
        if not wait_until(lambda: process.poll() is not None or _is_primary(server.address), DEADLINE_SECONDS):
            raise AssertionError(f"no primary within {DEADLINE_SECONDS:.0f} s; see {log}")
        assert process.returncode is None, f"the server exited; see {log}"
        _create_administrator(server)
        yield server
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(data)


def _write_key_file(directory: Path) -> Path:
    """Write the key file of the replica set. mongod rejects a file that others can read."""
    path = directory / "key"
    path.touch(mode=0o600)
    path.write_bytes(base64.b64encode(secrets.token_bytes(96)))
    return path


def _is_primary(address: str) -> bool:
    """Initiate the replica set and return whether it has a primary. Local clients need no authentication yet."""
    with _connect_anonymously(address) as client:
        try:
            hello = client.admin.command("hello")
            if "setName" not in hello:
                config = {"_id": "rs0", "members": [{"_id": 0, "host": address}]}
                client.admin.command("replSetInitiate", config)
            return bool(hello["isWritablePrimary"])
        except PyMongoError:
            return False


def _create_administrator(server: AuthenticatedServer) -> None:
    """Create the first user. Further users require authentication."""
    with _connect_anonymously(server.address) as client:
        client.admin.command("createUser", _ADMINISTRATOR, pwd=server.password, roles=["root"])


def _connect_anonymously(address: str) -> MongoClient[Document]:
    return MongoClient(address, directConnection=True, serverSelectionTimeoutMS=1000)
