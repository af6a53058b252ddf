"""SIGKILL for the owner of an embedded server, its mongod, or both: no orphan remains, acknowledged writes are kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient

from jobledger.ledger.mongo.embedded import EmbeddedServer
from jobledger.ledger.mongo.embedded_files import ServerInfo, read_server_info, wait_until
from tests.support.installation import has_exited
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = needs_local_mongod

WRITER_PROGRAM = """
import itertools, sys
from pathlib import Path
from pymongo import MongoClient
from pymongo.write_concern import WriteConcern
from jobledger.ledger.mongo.embedded import EmbeddedServer
server = EmbeddedServer.start(Path(sys.argv[1]))
client = MongoClient(server.uri, serverSelectionTimeoutMS=1000)
numbers = client.test.get_collection("numbers", write_concern=WriteConcern("majority", j=True))
for number in itertools.count():
    numbers.insert_one({"_id": number})
    print(number, flush=True)
"""


class Writer:
    """A process that owns a server on `data_dir` and prints each number that the server acknowledged."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER_PROGRAM, str(data_dir)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout
        self.output = self.process.stdout

    def read_acknowledged(self, count: int) -> list[int]:
        return [int(self.output.readline()) for _ in range(count)]

    def read_all_acknowledged(self) -> list[int]:
        """Return the remaining numbers, until the process exits."""
        return [int(line) for line in self.output]

    def read_server_info(self) -> ServerInfo:
        info = read_server_info(self.data_dir)
        assert info is not None
        return info


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    writer = Writer(tmp_path)
    yield writer
    writer.process.kill()
    writer.process.wait()
    writer.output.close()


def load_numbers(uri: str) -> set[int]:
    with MongoClient[dict[str, Any]](uri) as client:
        return {document["_id"] for document in client.test.numbers.find()}


def test_mongod_shuts_down_cleanly_after_its_owner_was_killed(writer: Writer) -> None:
    acknowledged = writer.read_acknowledged(200)
    mongod = writer.read_server_info().pid
    writer.process.kill()
    acknowledged += writer.read_all_acknowledged()

    assert wait_until(lambda: has_exited(mongod), 60), "mongod outlived its owner"
    assert (writer.data_dir / "mongodb" / "mongod.lock").read_bytes() == b"", "mongod did not shut down cleanly"
    with EmbeddedServer.start(writer.data_dir) as server:
        assert set(acknowledged) <= load_numbers(server.uri)


def test_start_after_the_owner_was_killed_waits_for_the_old_mongod(writer: Writer) -> None:
    acknowledged = writer.read_acknowledged(200)
    server_info = writer.read_server_info()
    writer.process.kill()
    with EmbeddedServer.start(writer.data_dir) as server:
        assert wait_until(lambda: has_exited(server_info.pid), 60)
        assert server.uri == server_info.uri
        assert set(acknowledged + writer.read_all_acknowledged()) <= load_numbers(server.uri)


@pytest.mark.parametrize("with_owner", [False, True], ids=["mongod alone", "mongod and its owner"])
def test_killed_mongod_has_all_acknowledged_documents_after_restart(writer: Writer, with_owner: bool) -> None:
    acknowledged = writer.read_acknowledged(200)
    server_info = writer.read_server_info()
    os.kill(server_info.pid, signal.SIGKILL)
    if with_owner:
        writer.process.kill()
    acknowledged += writer.read_all_acknowledged()
    writer.process.wait(30)
    with EmbeddedServer.start(writer.data_dir) as server:
        assert server.uri == server_info.uri
        assert set(acknowledged) <= load_numbers(server.uri)
