"""Connecting: what a ledger cannot stand on is refused at start, with words that help."""

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
from jobledger.ledger.mongo.embedded_lock import wait_until
from jobledger.ledger.store.event_store import EventStore
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.tcp_proxy import TcpProxy


def unused_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
def standalone(tmp_path: Path) -> Iterator[str]:
    """A mongod without a replica set."""
    port = unused_port()
    uri = f"mongodb://127.0.0.1:{port}/"
    command = [str(find_mongod()), "--dbpath", str(tmp_path), "--port", str(port), "--bind_ip", "127.0.0.1"]
    with subprocess.Popen([*command, "--nounixsocket"], stdout=subprocess.DEVNULL) as process:
        try:
            assert wait_until(lambda: answers(uri), 30)
            yield uri
        finally:
            process.kill()


def answers(uri: str) -> bool:
    try:
        with MongoClient[dict[str, Any]](uri, serverSelectionTimeoutMS=200) as client:
            return bool(client.admin.command("ping"))
    except PyMongoError:
        return False


async def check(connection: Connection) -> None:
    async with connection.client() as client:
        await check_server(client[connection.db_name])


async def test_a_replica_set_is_accepted_again_and_again(connection: Connection) -> None:
    await check(connection)
    await check(connection)


@needs_local_mongod
async def test_a_standalone_server_is_refused_with_what_to_do_about_it(standalone: str) -> None:
    with pytest.raises(DatabaseUnsuitable, match=r"(?s)--replSet rs0.*rs\.initiate\(\).*embedded"):
        await check(Connection(standalone, "test"))


async def test_nobody_listening_is_told_within_the_timeout_and_without_the_driver_s_details() -> None:
    begun = time.monotonic()
    with pytest.raises(LedgerUnavailable, match=r"mongodb\.uri.*Is it running\?") as error:
        await check(Connection(f"mongodb://127.0.0.1:{unused_port()}/", "test", connect_timeout_ms=400))
    assert 0.3 < time.monotonic() - begun < 3
    assert "Topology" not in str(error.value)


async def test_a_server_that_takes_connections_but_does_not_answer_is_told_within_the_timeout(
    mongodb_uri: str,
) -> None:
    with TcpProxy(mongodb_uri) as proxy:
        proxy.suspend()
        begun = time.monotonic()
        with pytest.raises(LedgerUnavailable, match=r"mongodb\.uri"):
            await check(Connection(proxy.uri, "test", connect_timeout_ms=400))
        assert time.monotonic() - begun < 3


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
async def test_an_address_that_is_none_is_a_setting_to_change(uri: str) -> None:
    connection = Connection(uri, "test")
    for make in (connection.client, connection.blocking_client):
        with pytest.raises(ConfigurationError, match=r"mongodb\.uri.*mongodb://user:password@host1"):
            make()


async def test_what_the_uri_says_cannot_weaken_what_is_promised(mongodb_uri: str, db_name: str) -> None:
    weak = f"{mongodb_uri}&w=0&journal=false&readPreference=secondary&tz_aware=false"
    async with Connection(weak, db_name).client() as client:
        assert client.write_concern.document == {"w": "majority", "j": True}
        assert client.codec_options.tz_aware
        assert client.read_preference.mode == 0, "state for a decision must be read from the primary"


async def test_credentials_that_the_server_does_not_take_are_refused_with_its_reason(
    mongodb_uri: str, db_name: str
) -> None:
    wrong = re.sub("//([^@/]*@)?", "//nobody:wrong@", mongodb_uri)
    with pytest.raises(DatabaseUnsuitable, match="Authentication failed"):
        await check(Connection(wrong, db_name))


def test_a_driver_error_becomes_ours_and_says_what_was_being_done() -> None:
    with (
        pytest.raises(LedgerUnavailable, match="failed while counting sheep: no") as caught,
        translate_errors("counting sheep"),
    ):
        raise OperationFailure("no, full error: {'ok': 0}")
    assert isinstance(caught.value.__cause__, OperationFailure)
    with pytest.raises(ZeroDivisionError), translate_errors("dividing"):
        raise ZeroDivisionError


def test_of_a_driver_error_only_the_part_for_people_is_shown() -> None:
    text = "a:1: connection refused, Timeout: 0.4s, Topology Description: <TopologyDescription id: 1>"
    assert summarize_error(PyMongoError(text)) == "a:1: connection refused"


# Servers that are too old, or too few -----------------------------------------------------------------------------


class Aged(TcpProxy):
    """A wire on which the server's answers say that it is of another major version, of one digit."""

    def __init__(self, uri: str, major: int) -> None:
        self._version = rb"\g<1>%d." % major
        super().__init__(uri)

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError), source.makefile("rb") as stream:
            while length := stream.read(4):
                message = length + stream.read(int.from_bytes(length, "little") - 4)
                sink.sendall(re.sub(rb"(?s)(\x02version\0.{4})\d\.", self._version, message))
            sink.shutdown(socket.SHUT_WR)


async def test_a_server_that_is_too_old_is_refused_with_the_version_that_is_needed(mongodb_uri: str) -> None:
    too_old = r"MongoDB 4\.\S+ is too old: the ledger needs 5\.0 or newer"
    with Aged(mongodb_uri, 4) as proxy, pytest.raises(DatabaseUnsuitable, match=too_old):
        await check(Connection(proxy.uri, "test"))
    with Aged(mongodb_uri, 5) as proxy:
        await check(Connection(proxy.uri, "test"))


@contextmanager
def without_majority(directory: Path) -> Iterator[EmbeddedServer]:
    """A primary whose two fellow members do not run, which it does not notice for as long as a test takes."""
    with EmbeddedServer.start(directory) as server:
        with MongoClient[dict[str, Any]](server.uri) as client:
            config = client.admin.command("replSetGetConfig")["config"]
            config["members"] += [{"_id": number, "host": f"127.0.0.1:{number}"} for number in (1, 2)]
            config["settings"]["electionTimeoutMillis"] = 600_000
            client.admin.command("replSetReconfig", config, force=True)
        try:
            yield server
        finally:
            os.kill(server.pid, signal.SIGKILL)  # asked to end, it would first wait for the other two


@dataclass(frozen=True, slots=True)
class Refusal:
    error: JobledgerError
    seconds: float


@pytest.fixture(scope="module")
def refusal_without_majority(tmp_path_factory: pytest.TempPathFactory) -> Refusal:
    """What a primary is told that is alone; and who only reads is not told anything."""

    async def refusal(connection: Connection) -> Refusal:
        async with connection.client() as client:
            await check_server(client[connection.db_name], needs_write=False)
        begun = time.monotonic()
        with pytest.raises(JobledgerError) as refused:
            await check(connection)
        return Refusal(refused.value, time.monotonic() - begun)

    with without_majority(tmp_path_factory.mktemp("alone")) as server:
        return asyncio.run(refusal(Connection(server.uri, "test")))


@needs_local_mongod
def test_a_primary_whose_writes_reach_no_majority_is_found_out_at_start(refusal_without_majority: Refusal) -> None:
    assert "waiting for replication timed out" in str(refusal_without_majority.error)
    assert refusal_without_majority.seconds < 10


@needs_local_mongod
def test_a_majority_that_is_away_may_come_back(refusal_without_majority: Refusal) -> None:
    assert isinstance(refusal_without_majority.error, LedgerUnavailable)


@needs_local_mongod
async def test_a_set_without_a_primary_is_unavailable_and_told_within_the_timeout(tmp_path: Path) -> None:
    with without_majority(tmp_path) as server:
        with MongoClient[dict[str, Any]](server.uri) as client:
            client.admin.command("replSetStepDown", 600, force=True)
        for uri, why in (
            (server.uri, "not primary"),
            (server.uri.replace("&directConnection=true", ""), "No replica set members match.*Primary"),
        ):
            begun = time.monotonic()
            with pytest.raises(LedgerUnavailable, match=why):
                await check(Connection(uri, "test", connect_timeout_ms=400))
            assert time.monotonic() - begun < 3


# What the server says of itself -----------------------------------------------------------------------------------


@needs_local_mongod
async def test_an_oplog_is_called_short_once_it_is_full_and_not_before(tmp_path: Path) -> None:
    with EmbeddedServer.start(tmp_path, oplog_mb=1) as server:
        async with Connection(server.uri, "test").client() as client:
            fresh = await read_oplog_window(client["test"])
            await client["test"].talks.insert_many([{"text": "." * 10_000} for _ in range(120)])
            used = await read_oplog_window(client["test"])
            seconds = await read_transaction_limit_seconds(client["test"])
    assert fresh is not None
    assert (fresh.size_mb, fresh.is_full, fresh.is_too_short) == (1, False, False)
    assert used is not None
    assert (used.size_mb, used.is_full, used.is_too_short) == (1, True, True)
    assert 0 <= fresh.hours <= used.hours < 0.1
    assert seconds == TRANSACTION_SECONDS


def test_an_oplog_of_an_hour_is_long_enough() -> None:
    assert OplogWindow(1, hours=0.9, is_full=True).is_too_short
    assert not OplogWindow(1, hours=1, is_full=True).is_too_short
    assert not OplogWindow(1, hours=0.9, is_full=False).is_too_short


# The index of the log ---------------------------------------------------------------------------------------------


VERSIONS = [("stream", 1), ("version", 1)]


async def test_an_index_that_lets_versions_repeat_is_refused_and_once_dropped_made_anew(connection: Connection) -> None:
    async with connection.client() as client:
        db = client[connection.db_name]
        name = await db.events.create_index(VERSIONS)
        log = EventStore(db)
        with pytest.raises(DatabaseUnsuitable, match="is not unique: drop it"):
            await log.prepare()
        assert not await log.has_unique_version_index()

        await db.events.drop_index(name)
        await log.prepare()
        assert await log.has_unique_version_index()


async def test_beside_an_index_of_somebody_else_the_unique_one_is_made(connection: Connection) -> None:
    async with connection.client() as client:
        db = client[connection.db_name]
        await db.events.create_index(VERSIONS, name="of_somebody_else")
        log = EventStore(db)
        await log.prepare()
        assert await log.has_unique_version_index()


async def test_a_unique_index_under_another_name_is_as_good(connection: Connection) -> None:
    async with connection.client() as client:
        db = client[connection.db_name]
        await db.events.create_index(VERSIONS, unique=True, name="of_somebody_else")
        log = EventStore(db)
        assert await log.has_unique_version_index()
        await log.prepare()


async def test_a_log_in_which_a_version_stands_twice_is_refused_with_the_version(connection: Connection) -> None:
    async with connection.client() as client:
        db = client[connection.db_name]
        await db.events.insert_many([{"_id": number, "stream": "job-1", "version": 7} for number in (1, 2)])
        with pytest.raises(DatabaseUnsuitable, match=r"Two events .* version of a stream.*job-1.*version: 7"):
            await EventStore(db).prepare()
