"""A server with access control, and databases that an administrator prepared with `jobledger mongo-roles`."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus
from uuid import uuid4

import orjson
import pytest
import yaml
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import MongoClient
from pymongo.database import Database as BlockingDatabase
from pymongo.errors import OperationFailure

from jobledger.cli.administration.mongo_roles import build_mongosh_script
from jobledger.ledger.mongo.connection import UNAUTHORIZED, Connection, Database, Document
from tests.api.conftest import Api, run_api
from tests.support.authenticated_server import AuthenticatedServer, start_authenticated_server
from tests.support.ledger_setup import open_ledger

Attempt = Callable[[BlockingDatabase[Document]], object]
SERVICE, SUBSCRIBER, SUBMITTER = "jobledger", "jobledger-subscriber", "jobledger-submitter"
PASSWORD = "s3cr3t:/p@ss"
SECRETS = (PASSWORD, quote_plus(PASSWORD))


@dataclass(frozen=True, slots=True)
class MongoshCall:
    """A call of a method of a database or of a collection in mongosh."""

    db_name: str
    collection: str | None
    method: str
    arguments: list[Any]

    def run(self, administrator: MongoClient[Document]) -> None:
        db = administrator[self.db_name]
        match self.collection, self.method:
            case None, "runCommand":
                db.command(*self.arguments)
            case None, "createUser":
                [user] = self.arguments
                db.command({"createUser": user["user"], "pwd": user["pwd"], "roles": user["roles"]})
            case str(collection), "createIndex":
                keys, options = self.arguments
                db[collection].create_index(list(keys.items()), **options)
            case _:
                raise AssertionError(f"unsupported call: {self}")


def parse_calls(text: str) -> Iterator[MongoshCall]:
    """Parse the JavaScript of the script, whose arguments are YAML. An unknown statement fails the test."""
    databases: dict[str, str] = {}
    for statement in re.split(r"\n(?=[\w/])", text):
        if statement.startswith("//"):
            continue
        if assignment := re.fullmatch(r"""(\w+) = db\.getSiblingDB\(['"](\w+)['"]\)""", statement):
            databases[assignment[1]] = assignment[2]
            continue
        call = re.fullmatch(
            r"""(?:db\.getSiblingDB\(['"](\w+)['"]\)|(\w+))\.(?:(\w+)\.)?(\w+)\((.*)\)""", statement, re.DOTALL
        )
        assert call, f"unknown statement: {statement}"
        db_name, name, collection, method, arguments = call.groups()
        arguments = arguments.replace("passwordPrompt()", orjson.dumps(PASSWORD).decode())
        yield MongoshCall(db_name or databases[name], collection, method, yaml.safe_load(f"[{arguments}]"))


def read_uri(text: str, server: AuthenticatedServer) -> str:
    """Return the value of `mongodb.uri` that the script recommends."""
    match = re.search(r"mongodb\.uri: (\S+)", text)
    assert match, text
    return match[1].replace("PASSWORD", quote_plus(PASSWORD)).replace("HOST", server.address)


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuthenticatedServer]:
    with start_authenticated_server(tmp_path_factory.mktemp("guarded")) as server:
        yield server


@pytest.fixture(scope="package")
def administrator(server: AuthenticatedServer) -> Iterator[MongoClient[Document]]:
    with MongoClient[Document](server.uri, w="majority", journal=True) as client:
        yield client


@pytest.fixture
def db_name() -> str:
    """The name of a new database for one test. It is removed with the server."""
    return f"test_{uuid4().hex[:16]}"


@dataclass(frozen=True)
class PreparedDatabase:
    """A database that an administrator has prepared with the script, and connections of its users."""

    server: AuthenticatedServer
    administrator: MongoClient[Document]
    service: Connection

    @property
    def db(self) -> BlockingDatabase[Document]:
        """The database as its administrator."""
        return self.administrator[self.service.db_name]

    @property
    def subscriber(self) -> Connection:
        return self.create_user("follower", SUBSCRIBER)

    @property
    def submitter(self) -> Connection:
        return self.create_user("shop", SUBMITTER)

    def create_user(self, name: str, *roles: str) -> Connection:
        """Create a user if it does not exist. Return its connection."""
        if not self.db.command({"usersInfo": name})["users"]:
            self.db.command({"createUser": name, "pwd": PASSWORD, "roles": list(roles)})
        return Connection(self.server.uri_for(name, PASSWORD, self.db.name), self.db.name)

    @asynccontextmanager
    async def open_as_administrator(self) -> AsyncIterator[Database]:
        async with Connection(self.server.uri, self.db.name).create_client() as client:
            yield client[self.db.name]


@pytest.fixture
def prepared(server: AuthenticatedServer, administrator: MongoClient[Document], db_name: str) -> PreparedDatabase:
    text = build_mongosh_script(db_name)
    for call in parse_calls(text):
        call.run(administrator)
    return PreparedDatabase(server, administrator, Connection(read_uri(text, server), db_name))


@pytest.fixture
async def api(prepared: PreparedDatabase, tmp_path: Path) -> AsyncIterator[Api]:
    """All roles of the service. The test fails if the server log contains a refused operation of theirs."""
    async for running in run_api(prepared.service.uri, prepared.db.name, tmp_path):
        yield running
    # At each start the store tries to create its index, which exists. The role may not create it and need not.
    assert prepared.server.authorization_failures(prepared.db.name) == {("createIndexes", "events")}


@dataclass(frozen=True)
class FilledDatabase:
    """A database with some events."""

    prepared: PreparedDatabase

    def load_protected_state(self) -> tuple[list[bytes], list[Document], list[Any]]:
        """Return the bytes of the events, the options of their collection, and its indexes."""
        db = self.prepared.db
        raw = db.events.with_options(codec_options=CodecOptions(document_class=RawBSONDocument))
        documents = [bytes(document.raw) for document in raw.find(sort=[("_id", 1)])]
        collections = db.command({"listCollections": 1, "filter": {"name": "events"}})["cursor"]["firstBatch"]
        return documents, collections, list(db.events.list_indexes()) if collections else []

    def assert_refused(self, attempt: Attempt) -> None:
        """Check that no role may do it and that the attempt changed nothing."""
        before = self.load_protected_state()
        for connection in (self.prepared.service, self.prepared.subscriber, self.prepared.submitter):
            with connection.create_blocking_client() as client, pytest.raises(OperationFailure) as raised:
                attempt(client[connection.db_name])
            assert raised.value.code == UNAUTHORIZED, raised.value
        assert self.load_protected_state() == before


@pytest.fixture
def filled(prepared: PreparedDatabase) -> FilledDatabase:
    async def write() -> None:
        async with open_ledger(prepared.service, with_change_stream=False) as ledger:
            for _ in range(3):
                await ledger.submit_job()

    asyncio.run(write())
    prepared.db.jobs.insert_many([{"_id": 1, "stream": "job-1"}, {"_id": 4, "stream": "job-2"}])
    return FilledDatabase(prepared)
