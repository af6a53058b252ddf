"""Connections: an unsuitable or unreachable database is rejected at start, with a helpful message."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from jobledger.ledger.domain.errors import ConfigurationError, DatabaseUnsuitable, JobledgerError, LedgerUnavailable
from jobledger.ledger.mongo.connection import (
    Connection,
    OplogWindow,
    check_server,
    read_oplog_window,
    read_transaction_limit_seconds,
    summarize_error,
    translate_errors,
)
from jobledger.ledger.mongo.embedded import TRANSACTION_SECONDS, EmbeddedServer, find_mongod
from jobledger.ledger.mongo.embedded_files import wait_until
from jobledger.ledger.store.event_store import EventStore
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.tcp_proxy import TcpProxy


def find_unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def standalone(tmp_path: Path) -> Iterator[str]:
    """A mongod without a replica set."""
    port = find_unused_port()
    uri = f"mongodb://127.0.0.1:{port}/"
    command = [str(find_mongod()), "--dbpath", str(tmp_path), "--port", str(port), "--bind_ip", "127.0.0.1"]
    with subprocess.Popen([*command, "--nounixsocket"], stdout=subprocess.DEVNULL) as process:
        try:
            assert wait_until(lambda: is_reachable(uri), 30)
            yield uri
        finally:
            process.kill()


def is_reachable(uri: str) -> bool:
    try:
        with MongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=200) as client:
            return bool(client.admin.command("ping"))
    except PyMongoError:
        return False


async def check(connection: Connection) -> None:
    async with connection.create_client() as client:
        await check_server(client[connection.db_name])


async def test_check_of_replica_set_succeeds_repeatedly(connection: Connection) -> None:
    await check(connection)
    await check(connection)


@needs_local_mongod
async def test_standalone_server_is_rejected_with_instructions(standalone: str) -> None:
    with pytest.raises(DatabaseUnsuitable, match=r"(?s)--replSet rs0.*rs\.initiate\(\).*embedded"):
        await check(Connection(standalone, "test"))


async def test_unreachable_server_error_is_timely_and_plain() -> None:
    started = time.monotonic()
    with pytest.raises(LedgerUnavailable, match=r"mongodb\.uri.*Check that it is running") as error:
        await check(Connection(f"mongodb://127.0.0.1:{find_unused_port()}/", "test", connect_timeout_ms=400))
    assert 0.3 < time.monotonic() - started < 10
    assert "Topology" not in str(error.value)


async def test_silent_server_is_reported_within_timeout(
    mongodb_uri: str,
) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        proxy.suspend()
        started = time.monotonic()
        with pytest.raises(LedgerUnavailable, match=r"mongodb\.uri"):
            await check(Connection(proxy.uri, "test", connect_timeout_ms=400))
        assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "http://localhost/",
        "mongodb://",
        "mongodb://localhost:notaport/",
        "mongodb://localhost:99999/",
        "mongodb://user:p@ss/word@localhost/",
        "mongodb://a,b/?directConnection=true",
    ],
)
async def test_invalid_uri_error_names_setting(uri: str) -> None:
    connection = Connection(uri, "test")
    for create_client in (connection.create_client, connection.create_blocking_client):
        with pytest.raises(ConfigurationError, match=r"mongodb\.uri.*mongodb://user:password@host1"):
            create_client()


async def test_uri_options_cannot_weaken_guarantees(mongodb_uri: str, db_name: str) -> None:
    weak_uri = f"{mongodb_uri}&w=0&journal=false&readPreference=secondary&tz_aware=false"
    async with Connection(weak_uri, db_name).create_client() as client:
        assert client.write_concern.document == {"w": "majority", "j": True}
        assert client.codec_options.tz_aware
        assert client.read_preference.mode == 0, "state for a decision must be read from the primary"


async def test_wrong_credentials_are_rejected_with_reason(mongodb_uri: str, db_name: str) -> None:
    uri_with_wrong_password = re.sub("//([^@/]*@)?", "//nobody:wrong@", mongodb_uri)
    with pytest.raises(DatabaseUnsuitable, match="Authentication failed"):
        await check(Connection(uri_with_wrong_password, db_name))


def test_translate_errors_adds_operation_to_message() -> None:
    with (
        pytest.raises(LedgerUnavailable, match="failed while counting sheep: no") as caught,
        translate_errors("counting sheep"),
    ):
        raise OperationFailure("no, full error: {'ok': 0}")
    assert isinstance(caught.value.__cause__, OperationFailure)
    with pytest.raises(ZeroDivisionError), translate_errors("dividing"):
        raise ZeroDivisionError


def test_summarize_error_omits_driver_details() -> None:
    text = "a:1: connection refused, Timeout: 0.4s, Topology Description: <TopologyDescription id: 1>"
    assert summarize_error(PyMongoError(text)) == "a:1: connection refused"


# Old servers and missing members ----------------------------------------------------------------------------------


class VersionRewritingProxy(TcpProxy):
    """A proxy that replaces the server's major version in replies by another one-digit version."""

    def __init__(self, uri: str, major: int) -> None:
        self._version = rb"\g<1>%d." % major
        super().__init__(uri)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError), source.makefile("rb") as stream:
            while length := stream.read(4):
                message = length + stream.read(int.from_bytes(length, "little") - 4)
                sink.sendall(re.sub(rb"(?s)(\x02version\0.{4})\d\.", self._version, message))
            sink.shutdown(socket.SHUT_WR)


async def test_old_server_is_rejected_with_required_version(mongodb_uri: str) -> None:
    too_old = r"MongoDB 4\.\S+ is too old: Jobledger needs 5\.0 or newer"
    with VersionRewritingProxy(mongodb_uri, 4) as proxy, pytest.raises(DatabaseUnsuitable, match=too_old):
        await check(Connection(proxy.uri, "test"))
    with VersionRewritingProxy(mongodb_uri, 5) as proxy:
        await check(Connection(proxy.uri, "test"))


@contextmanager
def start_without_majority(directory: Path) -> Iterator[EmbeddedServer]:
    """Start a primary whose two other members do not run. It does not notice this during the test."""
    with EmbeddedServer.start(directory) as server:
        with MongoClient[dict[str, Any]](server.uri) as client:
            config = client.admin.command("replSetGetConfig")["config"]
            config["members"] += [{"_id": number, "host": f"127.0.0.1:{number}"} for number in (1, 2)]
            config["settings"]["electionTimeoutMillis"] = 600_000
            client.admin.command("replSetReconfig", config, force=True)
        try:
            yield server
        finally:
            os.kill(server.pid, signal.SIGKILL)  # a normal shutdown would wait for the other members


@dataclass(frozen=True, slots=True)
class Rejection:
    error: JobledgerError
    seconds: float


@pytest.fixture(scope="module")
def rejection_without_majority(tmp_path_factory: pytest.TempPathFactory) -> Rejection:
    """The error for a primary without a majority. A check without writes succeeds."""

    async def check_lone_primary(connection: Connection) -> Rejection:
        async with connection.create_client() as client:
            await check_server(client[connection.db_name], needs_write=False)
        started = time.monotonic()
        with pytest.raises(JobledgerError) as raised:
            await check(connection)
        return Rejection(raised.value, time.monotonic() - started)

    with start_without_majority(tmp_path_factory.mktemp("alone")) as server:
        return asyncio.run(check_lone_primary(Connection(server.uri, "test")))


@needs_local_mongod
def test_primary_without_majority_is_detected_at_start(rejection_without_majority: Rejection) -> None:
    assert "waiting for replication timed out" in str(rejection_without_majority.error)
    assert rejection_without_majority.seconds < 10


@needs_local_mongod
def test_missing_majority_is_reported_as_unavailable(rejection_without_majority: Rejection) -> None:
    assert isinstance(rejection_without_majority.error, LedgerUnavailable)


@needs_local_mongod
async def test_replica_set_without_primary_is_reported_within_timeout(tmp_path: Path) -> None:
    with start_without_majority(tmp_path) as server:
        with MongoClient[dict[str, Any]](server.uri) as client:
            client.admin.command("replSetStepDown", 600, force=True)
        for uri, reason in (
            (server.uri, "not primary"),
            (server.uri.replace("&directConnection=true", ""), "No replica set members match.*Primary"),
        ):
            started = time.monotonic()
            with pytest.raises(LedgerUnavailable, match=reason):
                await check(Connection(uri, "test", connect_timeout_ms=400))
            assert time.monotonic() - started < 10


# Server settings --------------------------------------------------------------------------------------------------


@needs_local_mongod
async def test_oplog_is_too_short_only_when_full(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path, oplog_mb=1) as server:
        async with Connection(server.uri, "test").create_client() as client:
            fresh = await read_oplog_window(client["test"])
            await client["test"].talks.insert_many([{"text": "." * 10_000} for _ in range(120)])
            full = await read_oplog_window(client["test"])
            seconds = await read_transaction_limit_seconds(client["test"])
    assert fresh is not None
    assert (fresh.size_mb, fresh.is_full, fresh.is_too_short) == (1, False, False)
    assert full is not None
    assert (full.size_mb, full.is_full, full.is_too_short) == (1, True, True)
    assert 0 <= fresh.hours <= full.hours < 0.1
    assert seconds == TRANSACTION_SECONDS


def test_oplog_of_one_hour_is_long_enough() -> None:
    assert OplogWindow(1, hours=0.9, is_full=True).is_too_short
    assert not OplogWindow(1, hours=1, is_full=True).is_too_short
    assert not OplogWindow(1, hours=0.9, is_full=False).is_too_short


# The unique index of the log --------------------------------------------------------------------------------------


VERSIONS = [("stream", 1), ("version", 1)]


async def test_non_unique_index_is_rejected_until_dropped(connection: Connection) -> None:
    async with connection.create_client() as client:
        db = client[connection.db_name]
        name = await db.events.create_index(VERSIONS)
        event_store = EventStore(db)
        with pytest.raises(DatabaseUnsuitable, match="is not unique: drop it"):
            await event_store.prepare()
        assert not await event_store.has_unique_version_index()

        await db.events.drop_index(name)
        await event_store.prepare()
        assert await event_store.has_unique_version_index()


async def test_prepare_creates_unique_index_beside_other_index(connection: Connection) -> None:
    async with connection.create_client() as client:
        db = client[connection.db_name]
        await db.events.create_index(VERSIONS, name="of_another_program")
        event_store = EventStore(db)
        await event_store.prepare()
        assert await event_store.has_unique_version_index()


async def test_unique_index_with_other_name_is_accepted(connection: Connection) -> None:
    async with connection.create_client() as client:
        db = client[connection.db_name]
        await db.events.create_index(VERSIONS, unique=True, name="of_another_program")
        event_store = EventStore(db)
        assert await event_store.has_unique_version_index()
        await event_store.prepare()


async def test_log_with_duplicate_version_is_rejected(connection: Connection) -> None:
    async with connection.create_client() as client:
        db = client[connection.db_name]
        await db.events.insert_many([{"_id": number, "stream": "job-1", "version": 7} for number in (1, 2)])
        with pytest.raises(DatabaseUnsuitable, match=r"Two events .* version of a stream.*job-1.*version: 7"):
            await EventStore(db).prepare()
