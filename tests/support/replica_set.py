"""A replica set of three server processes that can be killed, suspended or excluded from replication.

All methods block, some for seconds: call them with `asyncio.to_thread`. Methods that start a process must run in the
main thread, because the kernel ends such a process with the thread that started it.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Self

import bson
import pymongo
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.mongo.embedded import find_mongod
from jobledger.ledger.mongo.embedded_files import wait_until
from jobledger.ledger.system.process_attributes import set_parent_death_signal
from tests.support.polling import DEADLINE_SECONDS
from tests.support.suspension import suspend

NODES: Final = 3
ELECTION_TIMEOUT_MS: Final = 1500
RESPONSE_TIMEOUT_MS: Final = 2000
STEP_DOWN_SECONDS: Final = 20
"""How long a primary that stepped down is not electable unless another one is elected before."""

SERVER_PARAMETERS: Final = (
    "enableTestCommands=1",  # for fail points
    "oplogNetworkTimeoutBufferSeconds=1",  # a secondary leaves a suspended node after two seconds instead of ten
    "diagnosticDataCollectionEnabled=false",
)
SECONDARY: Final = 2  # replSetGetStatus


class Node:
    """One server. Port and data directory stay the same when its process restarts."""

    def __init__(self, directory: Path, port: int) -> None:
        self.address = f"127.0.0.1:{port}"
        self.is_suspended = False
        self._port = port
        self._data = directory / "data"
        self._data.mkdir(parents=True)
        self._log = directory / "mongod.log"
        self._process: subprocess.Popen[bytes] | None = None
        self.client: MongoClient[Document] = MongoClient(
            self.address,
            directConnection=True,
            serverSelectionTimeoutMS=RESPONSE_TIMEOUT_MS,
            connectTimeoutMS=RESPONSE_TIMEOUT_MS,
            socketTimeoutMS=RESPONSE_TIMEOUT_MS,
            retryWrites=False,
            w=1,
        )
        """A client that reads from this node only, including data that is not replicated."""

    def __repr__(self) -> str:
        return self.address

    def start(self) -> None:
        assert self._process is None
        parent = os.getpid()
        command = [str(find_mongod()), "--replSet", "rs0", "--bind_ip", "127.0.0.1", "--port", str(self._port)]
        command += ["--dbpath", str(self._data), "--quiet", "--nounixsocket", "--wiredTigerCacheSizeGB", "0.25"]
        for parameter in SERVER_PARAMETERS:
            command += ["--setParameter", parameter]
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                [*command, "--oplogSize", "256"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                preexec_fn=lambda: exit_with_parent(parent),
            )

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = None
        self.is_suspended = False

    def remove(self) -> None:
        """Remove all files except the log."""
        self.kill()
        shutil.rmtree(self._data)

    def suspend(self) -> None:
        assert self._process is not None, f"{self} is not running"
        suspend(self._process.pid)
        self.is_suspended = True

    def resume(self) -> None:
        assert self._process is not None, f"{self} is not running"
        self._process.send_signal(signal.SIGCONT)
        self.is_suspended = False

    def hello(self) -> Mapping[str, Any]:
        """Return the response to `hello`, or an empty document without one."""
        if self._process is None or self.is_suspended:
            return {}
        assert self._process.poll() is None, f"{self} exited unexpectedly: {self._read_log_tail()}"
        try:
            return self.client.admin.command("hello")
        except PyMongoError:
            return {}

    def is_in_sync_with(self, primary: Node) -> bool:
        """Return whether the node is a secondary with a write of this primary, so its rollback is finished."""
        try:
            status = self.client.admin.command("replSetGetStatus")
            term = primary.client.admin.command("replSetGetStatus")["term"]
        except PyMongoError:
            return False
        return bool(status["myState"] == SECONDARY and status["optimes"]["appliedOpTime"]["t"] == term)

    def read_rolled_back_documents(self) -> list[Document]:
        """Return the documents that this node rolled back."""
        documents: list[Document] = []
        for path in self._data.glob("rollback/*/removed.*.bson"):
            with path.open("rb") as file:
                documents += bson.decode_file_iter(file)
        return documents

    def _read_log_tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-8:])


class ReplicaSet:
    """Three servers that elect a primary within seconds."""

    def __init__(self, directory: Path) -> None:
        self.nodes = [Node(directory / f"node-{number}", free_port()) for number in range(NODES)]

    def __enter__(self) -> Self:
        try:
            for node in self.nodes:
                node.start()
            self._initiate()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:  # first, because a closing client waits for its server
            node.client.close()
        for node in self.nodes:
            node.remove()

    @property
    def uri(self) -> str:
        """The URI with a heartbeat interval of one second instead of ten, to detect a suspended node early."""
        return f"mongodb://{','.join(node.address for node in self.nodes)}/?replicaSet=rs0&heartbeatFrequencyMS=1000"

    # Election ------------------------------------------------------------------------------------------------------

    def primary(self) -> Node | None:
        """Return the primary. If two nodes claim to be primary, return the one elected last."""
        primaries = [(hello["electionId"], node) for node in self.nodes if _is_primary(hello := node.hello())]
        return max(primaries, key=lambda primary: primary[0])[1] if primaries else None

    def other_nodes(self, node: Node) -> list[Node]:
        return [candidate for candidate in self.nodes if candidate is not node]

    def wait_for_primary(self, excluding: Node | None = None) -> Node:
        candidates: list[Node] = []

        def has_primary() -> bool:
            candidates[:] = [node] if (node := self.primary()) is not None and node is not excluding else []
            return bool(candidates)

        _wait(has_primary, f"a primary other than {excluding}")
        return candidates[0]

    def wait_until_in_sync(self) -> Node:
        """Wait until all other nodes replicate from a primary, and return it."""

        def is_in_sync() -> bool:
            primary = self.primary()
            return primary is not None and all(node.is_in_sync_with(primary) for node in self.other_nodes(primary))

        _wait(is_in_sync, "a primary that all other nodes replicate from")
        return self.wait_for_primary()

    # Faults --------------------------------------------------------------------------------------------------------

    def kill(self, node: Node) -> None:
        """Kill a node with SIGKILL. Writes that are not in its journal are lost."""
        node.kill()

    def restart_node(self, node: Node) -> None:
        """Start a killed node with its data, without waiting. Call it in the main thread."""
        node.start()

    def suspend(self, node: Node) -> None:
        """Suspend a node with SIGSTOP. The other nodes see it as unreachable."""
        node.suspend()

    def resume(self, node: Node) -> None:
        node.resume()

    def step_down(self, primary: Node, *, force: bool = False) -> Node:
        """Make a primary step down and return the next one. With `force`, ignore unreplicated writes."""
        command = {
            "replSetStepDown": STEP_DOWN_SECONDS,
            "secondaryCatchUpPeriodSecs": 0 if force else 5,
            "force": force,
        }

        def has_stepped_down() -> bool:
            with suppress(PyMongoError), pymongo.timeout(10):  # rejected while no other node is in sync
                primary.client.admin.command(command)
            return self.primary() is not primary

        _wait(has_stepped_down, f"{primary} to step down")
        successor = self.wait_for_primary(excluding=primary)
        with suppress(PyMongoError):  # the node may still roll back
            primary.client.admin.command({"replSetFreeze": 0})
        return successor

    @contextmanager
    def replication_stopped(self, primary: Node) -> Iterator[None]:
        """Stop replication of the primary's writes inside the block. Heartbeats continue."""
        secondaries = self.other_nodes(primary)
        try:
            for node in secondaries:
                node.client.admin.command({"configureFailPoint": "stopReplProducer", "mode": "alwaysOn"})
            yield
        finally:
            for node in secondaries:
                node.client.admin.command({"configureFailPoint": "stopReplProducer", "mode": "off"})

    def _initiate(self) -> None:
        _wait(lambda: all(node.hello() for node in self.nodes), "all nodes to respond")
        config = {
            "_id": "rs0",
            "members": [{"_id": number, "host": node.address} for number, node in enumerate(self.nodes)],
            "writeConcernMajorityJournalDefault": True,
            "settings": {
                "electionTimeoutMillis": ELECTION_TIMEOUT_MS,
                "heartbeatIntervalMillis": 300,
                # A new primary does not fetch missing writes from the old one, so more writes are rolled back.
                "catchUpTimeoutMillis": 0,
            },
        }
        with pymongo.timeout(DEADLINE_SECONDS):
            self.nodes[0].client.admin.command("replSetInitiate", config)
        self.wait_until_in_sync()


def _is_primary(hello: Mapping[str, Any]) -> bool:
    return bool(hello.get("isWritablePrimary")) and "electionId" in hello


def _wait(condition: Callable[[], bool], expected: str) -> None:
    assert wait_until(condition, DEADLINE_SECONDS), f"timeout after {DEADLINE_SECONDS:.0f} s: {expected}"


def exit_with_parent(parent: int) -> None:
    """Run between fork and exec: let the kernel kill this process with its parent, even while suspended."""
    set_parent_death_signal(signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def free_port() -> int:
    """Return a port below the range of outgoing connections, so that it stays free while the node is down."""
    while True:
        with socket.socket() as server, suppress(OSError):
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            server.bind(("127.0.0.1", port := random.randrange(20_000, 32_000)))
            return port
