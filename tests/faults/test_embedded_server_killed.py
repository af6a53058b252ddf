"""kill -9 on the owner of an embedded server, on its mongod, on both: no orphan, and nothing acknowledged is lost."""

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
from jobledger.ledger.mongo.embedded_lock import ServerInfo, read_server_info, wait_until
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = needs_local_mongod

WRITER = """
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
    """A process that owns a server on `data_dir` and prints every number the server has acknowledged."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.process = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(data_dir)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout
        self.said = self.process.stdout

    def acknowledged_so_far(self, count: int) -> list[int]:
        return [int(self.said.readline()) for _ in range(count)]

    def the_rest(self) -> list[int]:
        return [int(line) for line in self.said]

    def note(self) -> ServerInfo:
        note = read_server_info(self.data_dir)
        assert note is not None
        return note


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Writer]:
    writer = Writer(tmp_path)
    yield writer
    writer.process.kill()
    writer.process.wait()
    writer.said.close()


def is_gone(pid: int) -> bool:
    """Ended; a zombie counts, since in a container nobody may be there to reap it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def numbers_in(uri: str) -> set[int]:
    with MongoClient[dict[str, Any]](uri) as client:
        return {found["_id"] for found in client.test.numbers.find()}


def test_when_the_owner_is_killed_mongod_shuts_down_cleanly_by_itself(writer: Writer) -> None:
    acknowledged = writer.acknowledged_so_far(200)
    mongod = writer.note().pid
    writer.process.kill()
    acknowledged += writer.the_rest()

    assert wait_until(lambda: is_gone(mongod), 15), "mongod outlived its owner"
    assert (writer.data_dir / "mongodb" / "mongod.lock").read_bytes() == b"", "mongod did not shut down cleanly"
    with EmbeddedServer.start(writer.data_dir) as server:
        assert set(acknowledged) <= numbers_in(server.uri)


def test_a_start_right_after_the_owner_was_killed_waits_for_the_old_mongod(writer: Writer) -> None:
    acknowledged = writer.acknowledged_so_far(200)
    note = writer.note()
    writer.process.kill()
    with EmbeddedServer.start(writer.data_dir) as server:
        assert wait_until(lambda: is_gone(note.pid), 5)
        assert server.uri == note.uri
        assert set(acknowledged + writer.the_rest()) <= numbers_in(server.uri)


@pytest.mark.parametrize("owner_too", [False, True], ids=["mongod alone", "mongod and its owner"])
def test_a_killed_mongod_has_every_acknowledged_document_after_the_next_start(writer: Writer, owner_too: bool) -> None:
    acknowledged = writer.acknowledged_so_far(200)
    note = writer.note()
    os.kill(note.pid, signal.SIGKILL)
    if owner_too:
        writer.process.kill()
    acknowledged += writer.the_rest()
    writer.process.wait(30)
    with EmbeddedServer.start(writer.data_dir) as server:
        assert server.uri == note.uri
        assert set(acknowledged) <= numbers_in(server.uri)
