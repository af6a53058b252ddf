"""tests: where the tests get their MongoDB from, in this order: the environment, a local mongod, a container."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import PyMongoError

from jobledger.ledger.domain.errors import DatabaseUnsuitable
from jobledger.ledger.mongo.embedded import EmbeddedServer, find_mongod
from jobledger.ledger.mongo.embedded_lock import wait_until

CONTAINER_IMAGE = "mongo:7"
START_TIMEOUT_SECONDS = 60.0


class MongoDBUnavailable(Exception):
    """None of the three places has a server; the message says why, for each."""


@contextmanager
def provide_mongodb(directory: Path) -> Iterator[str]:
    """The URI of a replica set the tests may fill and drop at will; data of a local mongod goes to `directory`."""
    if given := os.environ.get("JOBLEDGER_TEST_MONGODB_URI"):
        yield given
        return
    try:
        server = EmbeddedServer.start(directory, oplog_mb=256)
    except DatabaseUnsuitable as no_local_server:
        with _container(str(no_local_server)) as uri:
            yield uri
    else:
        with server:
            yield server.uri


@contextmanager
def _container(no_local_server: str) -> Iterator[str]:
    from docker.errors import DockerException  # type: ignore[import-untyped]  # docker ships no types
    from testcontainers.core.container import DockerContainer

    try:
        container = DockerContainer(CONTAINER_IMAGE, command="mongod --replSet rs0 --bind_ip_all")
        container.with_exposed_ports(27017).start()
    except DockerException as error:
        raise MongoDBUnavailable(f"{no_local_server} Nor is there a container: {str(error).splitlines()[0]}") from error
    try:
        address = f"{container.get_container_host_ip()}:{container.get_exposed_port(27017)}"
        if not wait_until(lambda: _initiated(address), START_TIMEOUT_SECONDS):
            raise MongoDBUnavailable(f"the {CONTAINER_IMAGE} container at {address} did not become a primary")
        yield f"mongodb://{address}/?replicaSet=rs0&directConnection=true"
    finally:
        container.stop()  # not `with container`: entering it would start a second one


def _initiated(address: str) -> bool:
    """One step nearer to a primary. Always a new client: one from before the initiation cannot start transactions."""
    with MongoClient[dict[str, Any]](address, directConnection=True, serverSelectionTimeoutMS=1000) as client:
        try:
            hello = client.admin.command("hello")
            if "setName" not in hello:
                client.admin.command("replSetInitiate")
            return bool(hello["isWritablePrimary"])
        except PyMongoError:
            return False


def has_local_mongod() -> bool:
    try:
        find_mongod()
    except DatabaseUnsuitable:
        return False
    return True


# For tests of the embedded server itself, which a container cannot stand in for.
needs_local_mongod = pytest.mark.skipif(not has_local_mongod(), reason="mongod not found on this machine")
