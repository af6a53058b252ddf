"""Connecting: what a ledger cannot stand on is refused at start, with words that help."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pymongo import MongoClient
from pymongo.errors import OperationFailure, PyMongoError

from ledger.embedded import find_mongod
from ledger.errors import ConfigurationError, DatabaseUnsuitable, LedgerUnavailable
from ledger.mongo import Connection, brief, check_server, driver_errors
from ledger.server_note import until
from tests.support.mongod import needs_local_mongod
from tests.support.proxy import Proxy


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
            assert until(lambda: answers(uri), 30)
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
    with Proxy(mongodb_uri) as proxy:
        proxy.freeze()
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
    wrong = mongodb_uri.replace("mongodb://", "mongodb://nobody:wrong@")
    with pytest.raises(DatabaseUnsuitable, match="Authentication failed"):
        await check(Connection(wrong, db_name))


def test_a_driver_error_becomes_ours_and_says_what_was_being_done() -> None:
    with (
        pytest.raises(LedgerUnavailable, match="failed while counting sheep: no") as caught,
        driver_errors("counting sheep"),
    ):
        raise OperationFailure("no, full error: {'ok': 0}")
    assert isinstance(caught.value.__cause__, OperationFailure)
    with pytest.raises(ZeroDivisionError), driver_errors("dividing"):
        raise ZeroDivisionError


def test_of_a_driver_error_only_the_part_for_people_is_shown() -> None:
    text = "a:1: connection refused, Timeout: 0.4s, Topology Description: <TopologyDescription id: 1>"
    assert brief(PyMongoError(text)) == "a:1: connection refused"
