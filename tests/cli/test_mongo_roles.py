"""The roles that `jobledger mongo-roles` creates are sufficient and minimal on a server with access control."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus
from uuid import uuid4

import orjson
import pytest
import yaml
from bson import Timestamp
from bson.codec_options import CodecOptions
from bson.raw_bson import RawBSONDocument
from pymongo import DeleteOne, MongoClient, UpdateOne
from pymongo.client_session import ClientSession
from pymongo.database import Database as BlockingDatabase
from pymongo.errors import DuplicateKeyError, OperationFailure

from jobledger.cli import view_maintenance
from jobledger.cli.checks.database import check_database
from jobledger.cli.checks.result import CheckResult
from jobledger.cli.mongo_roles import mongosh_script
from jobledger.ledger.domain.errors import DatabaseUnsuitable, JobledgerError, LedgerUnavailable
from jobledger.ledger.mongo.connection import (
    UNAUTHORIZED,
    Connection,
    Database,
    Document,
    check_server,
    read_oplog_window,
    read_transaction_limit_seconds,
)
from jobledger.ledger.mongo.embedded_lock import wait_until
from jobledger.ledger.store.event_store import EventStore
from jobledger.ledger.store.verification import verify_log
from jobledger.ledger.subscriber import SUBSCRIPTIONS, ledger_client
from tests.api.conftest import Api, make_settings, run_api
from tests.support.authenticated_server import AuthenticatedServer, start_authenticated_server
from tests.support.installation import DEADLINE_SECONDS, Installation, http_client
from tests.support.ledger_setup import create_position_gap, open_ledger
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.role_runner import run_roles_in_process

pytestmark = needs_local_mongod

Attempt = Callable[[BlockingDatabase[Document]], object]
SERVICE, SUBSCRIBER = "jobledger", "jobledger-subscriber"
PASSWORD = "s3cr3t:/p@ss"
SECRETS = (PASSWORD, quote_plus(PASSWORD))


# The script as mongosh runs it ----------------------------------------------------------------------------------------


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


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[AuthenticatedServer]:
    with start_authenticated_server(tmp_path_factory.mktemp("guarded")) as server:
        yield server


@pytest.fixture(scope="module")
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

    def create_user(self, name: str, *roles: str) -> Connection:
        """Create a user if it does not exist. Return its connection."""
        if not self.db.command({"usersInfo": name})["users"]:
            self.db.command({"createUser": name, "pwd": PASSWORD, "roles": list(roles)})
        return Connection(self.server.uri_for(name, PASSWORD, self.db.name), self.db.name)

    @asynccontextmanager
    async def open_as_administrator(self) -> AsyncIterator[Database]:
        async with Connection(self.server.uri, self.db.name).client() as client:
            yield client[self.db.name]


@pytest.fixture
def prepared(server: AuthenticatedServer, administrator: MongoClient[Document], db_name: str) -> PreparedDatabase:
    text = mongosh_script(db_name)
    for call in parse_calls(text):
        call.run(administrator)
    return PreparedDatabase(server, administrator, Connection(read_uri(text, server), db_name))


def test_mongo_roles_prints_script_without_server_access(tmp_path: Path) -> None:
    with Installation(tmp_path, mongodb={"uri": "mongodb://127.0.0.1:1/", "db_name": "talks"}) as installation:
        outcome = installation.run("mongo-roles")
    assert (outcome.exit_code, outcome.out, outcome.err) == (0, mongosh_script("talks") + "\n", "")
    assert {call.db_name for call in parse_calls(outcome.out.rstrip())} == {"talks"}


async def test_mongo_roles_script_runs_and_its_uri_connects(
    server: AuthenticatedServer, administrator: MongoClient[Document], db_name: str
) -> None:
    text = mongosh_script(db_name)
    for call in parse_calls(text):
        call.run(administrator)
    async with Connection(read_uri(text, server), db_name).client() as client:
        await check_server(client[db_name])


# Sufficient privileges ------------------------------------------------------------------------------------------------


@pytest.fixture
async def api(prepared: PreparedDatabase, tmp_path: Path) -> AsyncIterator[Api]:
    """All roles of the service. The test fails if the server log contains a refused operation of theirs."""
    async for running in run_api(prepared.service.uri, prepared.db.name, tmp_path):
        yield running
    # At each start the store tries to create its index, which exists. The role may not create it and need not.
    assert prepared.server.authorization_failures(prepared.db.name) == {("createIndexes", "events")}


async def test_service_role_processes_jobs_and_serves_views_and_files(api: Api, prepared: PreparedDatabase) -> None:
    webhook = {"url": "https://example.org/", "headers": {"Authorization": "Bearer x"}}
    job = await api.wait_until_finished(await api.submit({"text": "héllo"}, webhook=webhook))
    assert job["status"] == "completed"
    assert "héllo" in (await api.get(job["results"]["markdown_url"])).text
    assert prepared.db.webhook_secrets.count_documents({}) == 1

    batch_id = (await api.submit_batch({"number": 1}, {"number": 2}, {"fail": "no"}))["batch_id"]
    await api.wait_for_event(batch_id, "BatchFinished")
    batch = (await api.get(f"/api/events/batches/{batch_id}")).json()["batch"]
    assert (batch["completed_jobs"], batch["failed_jobs"]) == (2, 1)

    assert (await api.get("/api/events/jobs?status=completed")).json()["total"] == 3
    assert (await api.get("/api/events/batches")).json()["total"] == 1
    assert (await api.get(f"/api/events/jobs/{job['job_id']}/history")).json()["events"][0]["type"] == "JobSubmitted"
    assert (await api.get("/readyz")).status_code == 200
    assert (await verify_log(api.event_store)).problem is None


async def test_service_role_compares_and_rebuilds_views(api: Api, prepared: PreparedDatabase) -> None:
    await api.wait_until_finished(await api.submit({"text": "x"}))
    for _ in range(2):
        await view_maintenance.rebuild_views(prepared.service, on_progress=lambda position, end: None)
        comparison = await view_maintenance.compare_views(prepared.service, on_progress=lambda position, end: None)
        assert (comparison.difference_count, comparison.position > 0) == (0, True)
    await api.wait_until_finished(await api.submit({"text": "y"}))


async def test_read_role_verifies_log_and_skips_views(prepared: PreparedDatabase, tmp_path: Path) -> None:
    async with run_roles_in_process(prepared.service, tmp_path / "results", projector=True) as roles:
        await roles.submit()
        await roles.wait_for_views()
    reader = prepared.create_user("auditor", "read")
    with Installation(tmp_path / "auditor", mongodb={"uri": reader.uri, "db_name": reader.db_name}) as installation:
        outcome = await asyncio.to_thread(installation.run, "log", "verify")
    assert outcome.exit_code == 0, outcome
    assert "are intact" in outcome.out
    assert "views were not compared" in outcome.err


async def test_service_role_stores_files_in_gridfs_and_signs_links(prepared: PreparedDatabase, tmp_path: Path) -> None:
    async for api in run_api(prepared.service.uri, prepared.db.name, tmp_path, results={"store": "gridfs"}):
        job = await api.wait_until_finished(await api.submit({"text": "héllo"}))
        assert job["status"] == "completed"
        assert "héllo" in (await api.get(job["results"]["markdown_url"])).text
        link = (await api.post(f"{job['results']['markdown_url']}/link")).json()["url"]
        assert (await api.get(link)).status_code == 200
    assert prepared.server.authorization_failures(prepared.db.name) == {("createIndexes", "events")}
    settings = make_settings(prepared.service.uri, prepared.db.name, tmp_path, results={"store": "gridfs"})
    [files] = [result async for result in check_database(settings, prepared.service) if result.name == "Result files"]
    assert (files.is_ok, files.detail) == (True, f"GridFS in {prepared.db.name} (fs.chunks, fs.files)")


async def test_doctor_missing_gridfs_privilege_is_reported(prepared: PreparedDatabase, tmp_path: Path) -> None:
    prepared.db.command({"revokePrivilegesFromRole": SERVICE, "privileges": [load_chunks_privilege(prepared)]})
    settings = make_settings(prepared.service.uri, prepared.db.name, tmp_path, results={"store": "gridfs"})
    [files] = [result async for result in check_database(settings, prepared.service) if result.name == "Result files"]
    assert not files.is_ok
    assert "jobledger mongo-roles" in files.advice


def load_chunks_privilege(prepared: PreparedDatabase) -> Document:
    role = prepared.db.command({"rolesInfo": SERVICE, "showPrivileges": True})["roles"][0]
    [chunks_privilege] = [
        privilege for privilege in role["privileges"] if privilege["resource"]["collection"] == "fs.chunks"
    ]
    return dict(chunks_privilege)


async def test_service_role_retries_cancels_restarts_archives_and_deletes(api: Api) -> None:
    retried = await api.wait_until_finished(await api.submit({"fail": "no", "transient": True}, max_attempts=2))
    assert (retried["status"], retried["attempt"]) == ("failed", 2)

    job_id = await api.submit({"seconds": 3600})
    await api.wait_for_event(job_id, "JobClaimed")
    assert (await api.post(f"/api/events/jobs/{job_id}/cancel")).status_code == 200
    await api.wait_for_event(job_id, "JobCancelled")
    for action in ("archive", "unarchive", "restart", "cancel"):
        answer = await api.post(f"/api/events/jobs/{job_id}/{action}")
        assert answer.status_code == 200, answer.text
    assert (await api.http.delete(f"/api/events/jobs/{retried['job_id']}")).status_code == 200


async def test_service_role_removes_dead_worker_and_voids_position(api: Api, prepared: PreparedDatabase) -> None:
    pipeline = [{"$match": {"operationType": "delete"}}]
    async with prepared.open_as_administrator() as db, await db.workers.watch(pipeline) as deletions:
        now = (await db.client.admin.command("hello", codec_options=db.codec_options))["localTime"]
        await db.workers.insert_one({"_id": "dead", "seconds": 1, "lease_until": now, "released": False})
        gap = await create_position_gap(db)
        assert (await api.wait_until_finished(await api.submit()))["status"] == "completed"
        voided = await db.events.find_one({"_id": gap})
        assert voided is not None
        assert voided["type"] == "PositionVoided"
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert (await anext(deletions))["documentKey"]["_id"] == "dead"


async def test_service_role_manages_api_keys_and_follows_changes(prepared: PreparedDatabase, tmp_path: Path) -> None:
    mongodb = {"uri": prepared.service.uri, "db_name": prepared.db.name}
    with Installation(tmp_path, mongodb=mongodb, auth={"mode": "keys"}) as installation:
        up = installation.start("api").wait_until_ready()
        created = installation.run("keys", "create", "--user", "alice", "--json")
        assert created.exit_code == 0, created.err
        key = orjson.loads(created.out)
        headers = {"Authorization": f"Bearer {key['key']}"}
        with http_client(up) as client:
            assert wait_until(
                lambda: client.get("/api/events/jobs", headers=headers).status_code == 200, DEADLINE_SECONDS
            )
            assert key["key_id"] in installation.run("keys", "list").out
            assert installation.run("keys", "revoke", key["key_id"]).exit_code == 0
            assert wait_until(
                lambda: client.get("/api/events/jobs", headers=headers).status_code == 401, DEADLINE_SECONDS
            )


async def test_subscriber_role_follows_log_voids_gaps_and_stores_position(prepared: PreparedDatabase) -> None:
    client = ledger_client(prepared.subscriber.uri, db_name=prepared.db.name)
    async with (
        prepared.open_as_administrator() as db,
        open_ledger(prepared.service, with_change_stream=False) as ledger,
    ):
        await ledger.submit_job()
        await create_position_gap(db)
        await ledger.submit_job()
        async with asyncio.timeout(DEADLINE_SECONDS), client.subscribe("cms-import") as events:
            history = [(await anext(events)).type for _ in range(3)]
            await ledger.submit_job()
            live = await anext(events)
        assert history == ["JobSubmitted", "PositionVoided", "JobSubmitted"]
        assert live.position == 4

        await ledger.submit_job()
        async with asyncio.timeout(DEADLINE_SECONDS), client.subscribe("cms-import") as events:
            assert (await anext(events)).position == 5
        subscription = await db[SUBSCRIPTIONS].find_one({"_id": "cms-import"})
    assert subscription is not None
    assert subscription["position"] == 5
    assert prepared.server.authorization_failures(prepared.db.name) == {("createIndexes", "events")}, (
        "only the writer of this test was refused"
    )


async def test_read_role_follows_without_name_but_not_with_name(prepared: PreparedDatabase) -> None:
    client = ledger_client(prepared.create_user("reader", "read").uri, db_name=prepared.db.name)
    async with open_ledger(prepared.service, with_change_stream=False) as ledger, asyncio.timeout(DEADLINE_SECONDS):
        await ledger.submit_job()
        async with client.subscribe() as events:
            assert (await anext(events)).position == 1
        with pytest.raises(LedgerUnavailable, match="opening the subscription cms-import: not authorized"):
            async with client.subscribe("cms-import"):
                pass


async def test_subscription_without_change_stream_privilege_is_refused(prepared: PreparedDatabase) -> None:
    only_reads = {"resource": {"db": prepared.db.name, "collection": "events"}, "actions": ["find"]}
    prepared.db.command({"createRole": "find-only", "privileges": [only_reads], "roles": []})
    client = ledger_client(prepared.create_user("find-only", "find-only").uri, db_name=prepared.db.name)
    with pytest.raises(JobledgerError, match="not authorized"):
        async with asyncio.timeout(DEADLINE_SECONDS), client.subscribe():
            pass


# Minimal privileges ---------------------------------------------------------------------------------------------------


def in_transaction(write: Callable[[BlockingDatabase[Document], ClientSession], object]) -> Attempt:
    def attempt(db: BlockingDatabase[Document]) -> None:
        with db.client.start_session() as session, session.start_transaction():
            write(db, session)

    return attempt


def apply_ops(*entries: dict[str, Any]) -> Attempt:
    return lambda db: db.client.admin.command({"applyOps": [{"ns": f"{db.name}.events", **entry} for entry in entries]})


def rename(source: str, target: str) -> Attempt:
    """Rename a collection over another that exists."""
    return lambda db: db.client.admin.command(
        {"renameCollection": f"{db.name}.{source}", "to": f"{db.name}.{target}", "dropTarget": True}
    )


FORGED: Document = {"$set": {"type": "JobDeleted"}}
CHANGES: dict[str, Attempt] = {
    "update one": lambda db: db.events.update_one({"_id": 1}, FORGED),
    "update many": lambda db: db.events.update_many({}, FORGED),
    "update by a pipeline": lambda db: db.events.update_one({"_id": 1}, [FORGED]),
    "upsert": lambda db: db.events.update_one({"_id": 99}, FORGED, upsert=True),
    "replace": lambda db: db.events.replace_one({"_id": 1}, {"type": "JobDeleted"}),
    "delete one": lambda db: db.events.delete_one({"_id": 1}),
    "delete many": lambda db: db.events.delete_many({}),
    "find and update": lambda db: db.events.find_one_and_update({"_id": 1}, FORGED),
    "find and replace": lambda db: db.events.find_one_and_replace({"_id": 1}, {"type": "JobDeleted"}),
    "find and delete": lambda db: db.events.find_one_and_delete({"_id": 1}),
    "bulk update": lambda db: db.events.bulk_write([UpdateOne({"_id": 1}, FORGED)]),
    "bulk delete, unordered": lambda db: db.events.bulk_write([DeleteOne({"_id": 1})], ordered=False),
    "update in a transaction": in_transaction(lambda db, session: db.events.update_one({}, FORGED, session=session)),
    "delete in a transaction": in_transaction(lambda db, session: db.events.delete_one({}, session=session)),
    "find and delete in a transaction": in_transaction(
        lambda db, session: db.events.find_one_and_delete({}, session=session)
    ),
    "$out": lambda db: db.jobs.aggregate([{"$out": "events"}]),
    "$out of events": lambda db: db.events.aggregate([{"$match": {"_id": {"$gt": 1}}}, {"$out": "events"}]),
    "$merge": lambda db: db.jobs.aggregate([{"$merge": "events"}]),
    "$merge replacing": lambda db: db.jobs.aggregate([{"$merge": {"into": "events", "whenMatched": "replace"}}]),
    "$merge by a pipeline": lambda db: db.events.aggregate(
        [{"$merge": {"into": "events", "whenMatched": [FORGED], "whenNotMatched": "discard"}}]
    ),
    "map and reduce": lambda db: db.command(
        {
            "mapReduce": "jobs",
            "map": "function() { emit('all', 1) }",
            "reduce": "function(key, values) { return 1 }",
            "out": {"replace": "events"},
        }
    ),
    "drop": lambda db: db.events.drop(),
    "drop the database": lambda db: db.command("dropDatabase"),
    "rename": lambda db: db.events.rename("away"),
    "rename over another": rename("events", "jobs"),
    "rename another to events": rename("jobs", "events"),
    "convert to capped": lambda db: db.command({"convertToCapped": "events", "size": 4096}),
    "index that expires events": lambda db: db.events.create_index("time", expireAfterSeconds=0),
    "drop an index": lambda db: db.events.drop_index("stream_1_version_1"),
    "drop all indexes": lambda db: db.events.drop_indexes(),
    "validation": lambda db: db.command({"collMod": "events", "validator": {"x": 1}}),
    "hide the index": lambda db: db.command(
        {"collMod": "events", "index": {"name": "stream_1_version_1", "hidden": True}}
    ),
    "apply an update": apply_ops({"op": "u", "o2": {"_id": 1}, "o": {"$v": 2, "diff": {"u": {"type": "JobDeleted"}}}}),
    "apply a deletion": apply_ops({"op": "d", "o": {"_id": 1}}),
    "apply a drop": lambda db: db.client.admin.command(
        {"applyOps": [{"op": "c", "ns": f"{db.name}.$cmd", "o": {"drop": "events"}}]}
    ),
}
"""Ways to change or remove events, or what protects them. `jobs` is another collection."""

FORBIDDEN_ACTIONS: dict[str, Attempt] = {
    "view in place of events": lambda db: db.create_collection("events", viewOn="jobs", check_exists=False),
    "view of events": lambda db: db.create_collection("seen", viewOn="events", check_exists=False),
    "capped copy in place of events": lambda db: db.command(
        {"cloneCollectionAsCapped": "jobs", "toCollection": "events", "size": 4096}
    ),
    "any other collection": lambda db: db.others.insert_one({}),
    "another database": lambda db: db.client[f"{db.name}_other"].events.insert_one({}),
    "grant own user a role": lambda db: db.command({"grantRolesToUser": _user_name(db), "roles": ["dbOwner"]}),
    "change roles of own user": lambda db: db.command({"updateUser": _user_name(db), "roles": ["dbOwner"]}),
    "change own password": lambda db: db.command({"updateUser": _user_name(db), "pwd": "other"}),
    "grant own role a privilege": lambda db: db.command(
        {
            "grantPrivilegesToRole": SERVICE,
            "privileges": [{"resource": {"db": db.name, "collection": "events"}, "actions": ["remove"]}],
        }
    ),
    "grant own role another": lambda db: db.command({"grantRolesToRole": SUBSCRIBER, "roles": ["dbOwner"]}),
    "change own role": lambda db: db.command({"updateRole": SERVICE, "privileges": [], "roles": ["dbOwner"]}),
    "create a role": lambda db: db.command({"createRole": "mine", "privileges": [], "roles": ["dbOwner"]}),
    "create a user": lambda db: db.command({"createUser": "other", "pwd": "other", "roles": ["dbOwner"]}),
    "write to the users": lambda db: db.client.admin["system.users"].update_one({}, {"$set": {"x": 1}}),
    "write to the oplog": lambda db: db.client.local["oplog.rs"].delete_one({"ts": Timestamp(1, 1)}),
    "set a parameter": lambda db: db.client.admin.command({"setParameter": 1, "ttlMonitorEnabled": True}),
}
"""Actions that would help to reach the events, or that the service does not need."""


def _user_name(db: BlockingDatabase[Document]) -> str:
    [user] = db.command("connectionStatus")["authInfo"]["authenticatedUsers"]
    # The administrator is not a user of this database.
    return str(user["user"]) if user["db"] == db.name else SERVICE


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
        """Check that neither role may do it and that the attempt changed nothing."""
        before = self.load_protected_state()
        for connection in (self.prepared.service, self.prepared.subscriber):
            with connection.blocking_client() as client, pytest.raises(OperationFailure) as raised:
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


@pytest.mark.parametrize("attempt", CHANGES.values(), ids=CHANGES)
def test_change_of_events_is_refused_except_for_administrator(filled: FilledDatabase, attempt: Attempt) -> None:
    filled.assert_refused(attempt)

    before = filled.load_protected_state()
    attempt(filled.prepared.db)
    assert filled.load_protected_state() != before, "the attempt changes nothing even as administrator"


@pytest.mark.parametrize("attempt", FORBIDDEN_ACTIONS.values(), ids=FORBIDDEN_ACTIONS)
def test_action_the_ledger_does_not_need_is_refused(filled: FilledDatabase, attempt: Attempt) -> None:
    filled.assert_refused(attempt)

    try:
        attempt(filled.prepared.db)
    except OperationFailure as error:
        assert error.code != UNAUTHORIZED, error  # noqa: PT017 - some actions fail for other reasons even as administrator


def test_service_and_subscriber_roles_can_only_append_events(filled: FilledDatabase) -> None:
    events_before, *_ = filled.load_protected_state()
    for position, connection in enumerate(
        (filled.prepared.service, filled.prepared.subscriber), len(events_before) + 1
    ):
        with connection.blocking_client() as client:
            events = client[connection.db_name].events
            events.insert_one({"_id": position, "stream": f"job-{position}", "version": 1})
            for duplicate in ({"_id": position}, {"_id": 99, "stream": f"job-{position}", "version": 1}):
                with pytest.raises(DuplicateKeyError):
                    events.insert_one(duplicate)
    events_after, *_ = filled.load_protected_state()
    assert events_after[: len(events_before)] == events_before
    assert len(events_after) == len(events_before) + 2


def test_create_events_collection_with_options_fails_because_it_exists(filled: FilledDatabase) -> None:
    """A user who may insert may also create the collection with any options. The script creates it before."""
    before = filled.load_protected_state()
    with filled.prepared.service.blocking_client() as client, pytest.raises(OperationFailure, match="already exists"):
        client[filled.prepared.db.name].create_collection("events", validator={"x": 1}, check_exists=False)
    assert filled.load_protected_state() == before


def list_writes(name: str) -> list[Attempt]:
    return [
        lambda db: db[name].insert_one({}),
        lambda db: db[name].update_one({}, FORGED, upsert=True),
        lambda db: db[name].delete_one({}),
    ]


def test_subscriber_role_writes_only_its_subscription(filled: FilledDatabase) -> None:
    db = filled.prepared.db
    [role] = db.command({"rolesInfo": SERVICE, "showPrivileges": True})["roles"]
    other_collections = {
        privilege["resource"]["collection"] for privilege in role["privileges"] if "update" in privilege["actions"]
    } - {SUBSCRIPTIONS}
    assert other_collections >= {"api_keys", "jobs", "batches", "checkpoints", "counters", "workers"}
    connection = filled.prepared.subscriber
    with connection.blocking_client() as client:
        subscriber_db = client[connection.db_name]
        subscriber_db[SUBSCRIPTIONS].insert_one({"_id": "mine", "position": 1})
        subscriber_db[SUBSCRIPTIONS].update_one({"_id": "mine"}, {"$set": {"position": 2}})
        attempts = [attempt for name in other_collections for attempt in list_writes(name)]
        attempts.append(lambda db: db[SUBSCRIPTIONS].delete_one({"_id": "mine"}))
        for attempt in attempts:
            with pytest.raises(OperationFailure) as raised:
                attempt(subscriber_db)
            assert raised.value.code == UNAUTHORIZED, raised.value


# Messages -------------------------------------------------------------------------------------------------------------


def test_doctor_reports_whether_user_can_change_events(prepared: PreparedDatabase, tmp_path: Path) -> None:
    for user, uri, expected_text in (
        ("service", prepared.service.uri, "this MongoDB user can append events, but not change or remove them"),
        ("administrator", prepared.server.uri, "this MongoDB user can change and remove events"),
    ):
        with Installation(tmp_path / user, mongodb={"uri": uri, "db_name": prepared.db.name}) as installation:
            outcome = installation.run("doctor")
        output = outcome.out + outcome.err
        assert outcome.exit_code == 0, output
        assert expected_text in output
        assert not [secret for secret in (*SECRETS, prepared.server.password) if secret in output]
        # A check that this user may not run is no problem.
        assert "no " not in [line[:3] for line in outcome.out.splitlines()]


async def run_check(prepared: PreparedDatabase, connection: Connection, directory: Path, name: str) -> CheckResult:
    settings = make_settings(connection.uri, prepared.db.name, directory)
    [check_result] = [result async for result in check_database(settings, connection) if result.name == name]
    return check_result


@pytest.mark.parametrize(
    ("action", "collection", "change"),
    [
        pytest.param("update", "events", CHANGES["update one"], id="update"),
        pytest.param("remove", "events", CHANGES["delete one"], id="remove"),
        pytest.param("dropCollection", "events", CHANGES["drop"], id="dropCollection"),
        pytest.param("anyAction", "", CHANGES["drop"], id="anyAction"),
        pytest.param("createIndex", "events", CHANGES["index that expires events"], id="createIndex"),
        pytest.param("convertToCapped", "events", CHANGES["convert to capped"], id="convertToCapped"),
        pytest.param("dropDatabase", "", CHANGES["drop the database"], id="dropDatabase"),
        pytest.param("renameCollectionSameDB", "", CHANGES["rename"], id="renameCollectionSameDB"),
        pytest.param("grantRole", "", FORBIDDEN_ACTIONS["grant own user a role"], id="grantRole"),
    ],
)
async def test_doctor_detects_privilege_to_change_events(
    prepared: PreparedDatabase, tmp_path: Path, action: str, collection: str, change: Attempt
) -> None:
    privilege = {"resource": {"db": prepared.db.name, "collection": collection}, "actions": [action]}
    prepared.db.command({"createRole": "more", "privileges": [privilege], "roles": [SERVICE]})
    connection = prepared.create_user("extended", "more")
    rights_check = await run_check(prepared, connection, tmp_path, "Rights")
    prepared.db.events.insert_one({"_id": 1})
    with connection.blocking_client() as client:
        change(client[prepared.db.name])  # the privilege really allows it

    assert "can change and remove events" in rights_check.detail


async def test_server_limits_without_privilege_are_none(prepared: PreparedDatabase) -> None:
    async with prepared.subscriber.client() as client:
        db = client[prepared.db.name]
        assert await read_oplog_window(db) is None
        assert await read_transaction_limit_seconds(db) is None
    async with prepared.open_as_administrator() as db:
        assert await read_oplog_window(db) is not None
        assert await read_transaction_limit_seconds(db) == 60, "the default of MongoDB"


async def test_prepare_without_index_fails_and_prints_command(prepared: PreparedDatabase) -> None:
    prepared.db.events.drop_index("stream_1_version_1")
    async with prepared.service.client() as client:
        event_store = EventStore(client[prepared.db.name])
        with pytest.raises(DatabaseUnsuitable, match="this user may not create it") as raised:
            await event_store.prepare()
        command = str(raised.value).partition("in mongosh: ")[2]
        for call in parse_calls(command):
            call.run(prepared.administrator)
        await event_store.prepare()
    assert prepared.db.events.index_information()["stream_1_version_1"]["unique"]


@pytest.mark.parametrize("options", [{}, {"unique": True, "partialFilterExpression": {"version": {"$gt": 1}}}])
async def test_prepare_with_unsuitable_index_fails(prepared: PreparedDatabase, options: dict[str, Any]) -> None:
    prepared.db.events.drop_index("stream_1_version_1")
    prepared.db.events.create_index([("stream", 1), ("version", 1)], **options)
    async with prepared.service.client() as client:
        with pytest.raises(DatabaseUnsuitable, match="createIndex"):
            await EventStore(client[prepared.db.name]).prepare()


async def read_head(db: Database) -> None:
    await EventStore(db).head_position()


async def prepare_store(db: Database) -> None:
    await EventStore(db).prepare()


async def test_connection_errors_do_not_show_password(prepared: PreparedDatabase) -> None:
    without_roles = prepared.create_user("no-roles")
    wrong_user = replace(without_roles, uri=without_roles.uri.replace("no-roles", "nobody"))
    unreachable = replace(
        without_roles, uri=without_roles.uri.replace(prepared.server.address, "127.0.0.1:1"), connect_timeout_ms=200
    )
    errors: list[JobledgerError] = []
    for connection in (without_roles, wrong_user, unreachable):
        for operation in (check_server, read_head, prepare_store):
            async with connection.client() as client:
                with pytest.raises(JobledgerError) as raised:
                    await operation(client[prepared.db.name])
            errors.append(raised.value)
    assert "not authorized" in str(errors[0])
    assert "Authentication failed" in str(errors[3])
    for error in errors:
        assert not [secret for secret in SECRETS if secret in f"{error!r} {error.__cause__!r}"]
