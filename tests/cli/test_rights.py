"""What `jobledger mongo-roles` prints, carried out on a server that knows its users: enough rights, and no more."""

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
from tests.support.installation import Installation, http_client
from tests.support.ledger_setup import DEADLINE_SECONDS, create_position_gap, open_ledger
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.role_runner import run_roles_in_process

pytestmark = needs_local_mongod

Attempt = Callable[[BlockingDatabase[Document]], object]
SERVICE, SUBSCRIBER = "jobledger", "jobledger-subscriber"
PASSWORD = "s3cr3t:/p@ss"
SECRETS = (PASSWORD, quote_plus(PASSWORD))


# The text, as mongosh would carry it out ----------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Call:
    """A call that an administrator makes in mongosh: of a database's method, or of a collection's."""

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
                raise AssertionError(f"nobody here knows what mongosh does with {self}")


def calls_in(text: str) -> Iterator[Call]:
    """Understand the few lines of JavaScript, whose arguments are YAML; what is not understood fails the test."""
    named: dict[str, str] = {}
    for statement in re.split(r"\n(?=[\w/])", text):
        if statement.startswith("//"):
            continue
        if found := re.fullmatch(r"""(\w+) = db\.getSiblingDB\(['"](\w+)['"]\)""", statement):
            named[found[1]] = found[2]
            continue
        found = re.fullmatch(
            r"""(?:db\.getSiblingDB\(['"](\w+)['"]\)|(\w+))\.(?:(\w+)\.)?(\w+)\((.*)\)""", statement, re.DOTALL
        )
        assert found, f"this is no statement: {statement}"
        db_name, name, collection, method, arguments = found.groups()
        arguments = arguments.replace("passwordPrompt()", orjson.dumps(PASSWORD).decode())
        yield Call(db_name or named[name], collection, method, yaml.safe_load(f"[{arguments}]"))


def uri_in(text: str, server: AuthenticatedServer) -> str:
    """The value of `mongodb.uri` that the text recommends."""
    found = re.search(r"mongodb\.uri: (\S+)", text)
    assert found, text
    return found[1].replace("PASSWORD", quote_plus(PASSWORD)).replace("HOST", server.address)


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
    """The name of a database of the test's own, which nobody has prepared. It goes with the server."""
    return f"test_{uuid4().hex[:16]}"


@dataclass(frozen=True)
class Place:
    """A database that an administrator has prepared as the text says, and who may use it."""

    server: AuthenticatedServer
    administrator: MongoClient[Document]
    service: Connection

    @property
    def db(self) -> BlockingDatabase[Document]:
        """The database, for its administrator."""
        return self.administrator[self.service.db_name]

    @property
    def subscriber(self) -> Connection:
        return self.user("follower", SUBSCRIBER)

    def user(self, name: str, *roles: str) -> Connection:
        """Make a user, if it is not there yet."""
        if not self.db.command({"usersInfo": name})["users"]:
            self.db.command({"createUser": name, "pwd": PASSWORD, "roles": list(roles)})
        return Connection(self.server.uri_for(name, PASSWORD, self.db.name), self.db.name)

    @asynccontextmanager
    async def for_the_administrator(self) -> AsyncIterator[Database]:
        async with Connection(self.server.uri, self.db.name).client() as client:
            yield client[self.db.name]


@pytest.fixture
def place(server: AuthenticatedServer, administrator: MongoClient[Document], db_name: str) -> Place:
    text = mongosh_script(db_name)
    for call in calls_in(text):
        call.run(administrator)
    return Place(server, administrator, Connection(uri_in(text, server), db_name))


def test_the_command_prints_the_text_for_the_database_in_the_settings_and_asks_no_server(tmp_path: Path) -> None:
    with Installation(tmp_path, mongodb={"uri": "mongodb://127.0.0.1:1/", "db_name": "talks"}) as installation:
        ended = installation.run("mongo-roles")
    assert (ended.exit_code, ended.out, ended.err) == (0, mongosh_script("talks") + "\n", "")
    assert {call.db_name for call in calls_in(ended.out.rstrip())} == {"talks"}


async def test_an_administrator_can_run_the_text_as_it_is_printed_and_the_uri_in_it_works(
    server: AuthenticatedServer, administrator: MongoClient[Document], db_name: str
) -> None:
    text = mongosh_script(db_name)
    for call in calls_in(text):
        call.run(administrator)
    async with Connection(uri_in(text, server), db_name).client() as client:
        await check_server(client[db_name])


# Enough -------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def api(place: Place, tmp_path: Path) -> AsyncIterator[Api]:
    """All roles of the service. A test fails if the server, by its own log, refused them anything."""
    async for running in run_api(place.service.uri, place.db.name, tmp_path):
        yield running
    # A ledger makes sure of its index at each start, and finds that it may not, and need not.
    assert place.server.authorization_failures(place.db.name) == {("createIndexes", "events")}


async def test_the_service_takes_jobs_and_batches_runs_them_and_serves_views_and_files(api: Api, place: Place) -> None:
    webhook = {"url": "https://example.org/", "headers": {"Authorization": "Bearer x"}}
    job = await api.wait_until_finished(await api.submit({"text": "héllo"}, webhook=webhook))
    assert job["status"] == "completed"
    assert "héllo" in (await api.get(job["results"]["markdown_url"])).text
    assert place.db.webhook_secrets.count_documents({}) == 1

    batch_id = (await api.submit_batch({"number": 1}, {"number": 2}, {"fail": "no"}))["batch_id"]
    await api.wait_for_event(batch_id, "BatchFinished")
    batch = (await api.get(f"/api/events/batches/{batch_id}")).json()["batch"]
    assert (batch["completed_jobs"], batch["failed_jobs"]) == (2, 1)

    assert (await api.get("/api/events/jobs?status=completed")).json()["total"] == 3
    assert (await api.get("/api/events/batches")).json()["total"] == 1
    assert (await api.get(f"/api/events/jobs/{job['job_id']}/history")).json()["events"][0]["type"] == "JobSubmitted"
    assert (await api.get("/readyz")).status_code == 200
    assert (await verify_log(api.event_store)).problem is None


async def test_views_are_compared_and_made_anew_with_the_rights_of_the_service(api: Api, place: Place) -> None:
    await api.wait_until_finished(await api.submit({"text": "x"}))
    for _ in range(2):
        await view_maintenance.rebuild_views(place.service, on_progress=lambda position, upto: None)
        found = await view_maintenance.compare_views(place.service, on_progress=lambda position, upto: None)
        assert (found.difference_count, found.position > 0) == (0, True)
    await api.wait_until_finished(await api.submit({"text": "y"}))


async def test_who_may_only_read_can_verify_the_log_and_is_told_what_was_left_out(place: Place, tmp_path: Path) -> None:
    async with run_roles_in_process(place.service, tmp_path / "results", projector=True) as here:
        await here.submit()
        await here.wait_for_views()
    reader = place.user("auditor", "read")
    with Installation(tmp_path / "auditor", mongodb={"uri": reader.uri, "db_name": reader.db_name}) as installation:
        ended = await asyncio.to_thread(installation.run, "log", "verify")
    assert ended.exit_code == 0, ended
    assert "are intact" in ended.out
    assert "views were not compared" in ended.err


async def test_the_service_keeps_files_in_the_database_and_signs_links(place: Place, tmp_path: Path) -> None:
    async for api in run_api(place.service.uri, place.db.name, tmp_path, results={"store": "gridfs"}):
        job = await api.wait_until_finished(await api.submit({"text": "héllo"}))
        assert job["status"] == "completed"
        assert "héllo" in (await api.get(job["results"]["markdown_url"])).text
        link = (await api.post(f"{job['results']['markdown_url']}/link")).json()["url"]
        assert (await api.get(link)).status_code == 200
    assert place.server.authorization_failures(place.db.name) == {("createIndexes", "events")}
    settings = make_settings(place.service.uri, place.db.name, tmp_path, results={"store": "gridfs"})
    found = [finding async for finding in check_database(settings, place.service.uri)]
    [files] = [finding for finding in found if finding.name == "Result files"]
    assert (files.is_ok, files.detail) == (True, f"GridFS in {place.db.name} (fs.chunks, fs.files)")


async def test_the_doctor_says_when_files_may_not_be_put_into_the_database(place: Place, tmp_path: Path) -> None:
    place.db.command({"revokePrivilegesFromRole": SERVICE, "privileges": [_on_chunks(place)]})
    settings = make_settings(place.service.uri, place.db.name, tmp_path, results={"store": "gridfs"})
    found = [finding async for finding in check_database(settings, place.service.uri)]
    [files] = [finding for finding in found if finding.name == "Result files"]
    assert not files.is_ok
    assert "jobledger mongo-roles" in files.advice


def _on_chunks(place: Place) -> Document:
    role = place.db.command({"rolesInfo": SERVICE, "showPrivileges": True})["roles"][0]
    [privilege] = [it for it in role["privileges"] if it["resource"]["collection"] == "fs.chunks"]
    return dict(privilege)


async def test_the_service_tries_again_cancels_restarts_archives_and_deletes(api: Api) -> None:
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


async def test_the_service_cleans_up_after_processes_that_died(api: Api, place: Place) -> None:
    deletions = [{"$match": {"operationType": "delete"}}]
    async with place.for_the_administrator() as db, await db.workers.watch(deletions) as gone:
        now = (await db.client.admin.command("hello", codec_options=db.codec_options))["localTime"]
        await db.workers.insert_one({"_id": "dead", "seconds": 1, "lease_until": now, "released": False})
        lost = await create_position_gap(db)
        assert (await api.wait_until_finished(await api.submit()))["status"] == "completed"
        voided = await db.events.find_one({"_id": lost})
        assert voided is not None
        assert voided["type"] == "PositionVoided"
        async with asyncio.timeout(DEADLINE_SECONDS):
            assert (await anext(gone))["documentKey"]["_id"] == "dead"


async def test_the_service_makes_lists_and_revokes_api_keys_and_hears_of_it(place: Place, tmp_path: Path) -> None:
    mongodb = {"uri": place.service.uri, "db_name": place.db.name}
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


async def test_a_subscriber_follows_the_log_fills_holes_and_keeps_its_place(place: Place) -> None:
    client = ledger_client(place.subscriber.uri, db_name=place.db.name)
    async with place.for_the_administrator() as db, open_ledger(place.service, with_change_stream=False) as ledger:
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
        kept = await db[SUBSCRIPTIONS].find_one({"_id": "cms-import"})
    assert kept is not None
    assert kept["position"] == 5
    assert place.server.authorization_failures(place.db.name) == {("createIndexes", "events")}, (
        "that was the writer of this test"
    )


async def test_the_built_in_role_read_is_enough_to_follow_without_a_name_and_not_for_a_name(place: Place) -> None:
    client = ledger_client(place.user("reader", "read").uri, db_name=place.db.name)
    async with open_ledger(place.service, with_change_stream=False) as ledger, asyncio.timeout(DEADLINE_SECONDS):
        await ledger.submit_job()
        async with client.subscribe() as events:
            assert (await anext(events)).position == 1
        with pytest.raises(LedgerUnavailable, match="opening the subscription cms-import: not authorized"):
            async with client.subscribe("cms-import"):
                pass


async def test_a_subscription_that_may_not_hear_of_changes_is_refused(place: Place) -> None:
    only_reads = {"resource": {"db": place.db.name, "collection": "events"}, "actions": ["find"]}
    place.db.command({"createRole": "deaf", "privileges": [only_reads], "roles": []})
    client = ledger_client(place.user("deaf", "deaf").uri, db_name=place.db.name)
    with pytest.raises(JobledgerError, match="not authorized"):
        async with asyncio.timeout(2), client.subscribe():
            pass


# And no more --------------------------------------------------------------------------------------------------------


def in_transaction(write: Callable[[BlockingDatabase[Document], ClientSession], object]) -> Attempt:
    def attempt(db: BlockingDatabase[Document]) -> None:
        with db.client.start_session() as session, session.start_transaction():
            write(db, session)

    return attempt


def operations(*given: dict[str, Any]) -> Attempt:
    return lambda db: db.client.admin.command({"applyOps": [{"ns": f"{db.name}.events", **it} for it in given]})


def renamed(source: str, target: str) -> Attempt:
    """Rename one collection to another that exists."""
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
    "rename over another": renamed("events", "jobs"),
    "rename another to it": renamed("jobs", "events"),
    "convert to capped": lambda db: db.command({"convertToCapped": "events", "size": 4096}),
    "index that lets events expire": lambda db: db.events.create_index("time", expireAfterSeconds=0),
    "drop an index": lambda db: db.events.drop_index("stream_1_version_1"),
    "drop all indexes": lambda db: db.events.drop_indexes(),
    "validation": lambda db: db.command({"collMod": "events", "validator": {"x": 1}}),
    "hide the index": lambda db: db.command(
        {"collMod": "events", "index": {"name": "stream_1_version_1", "hidden": True}}
    ),
    "apply an update": operations({"op": "u", "o2": {"_id": 1}, "o": {"$v": 2, "diff": {"u": {"type": "JobDeleted"}}}}),
    "apply a deletion": operations({"op": "d", "o": {"_id": 1}}),
    "apply a drop": lambda db: db.client.admin.command(
        {"applyOps": [{"op": "c", "ns": f"{db.name}.$cmd", "o": {"drop": "events"}}]}
    ),
}
"""Ways to change or remove events, or what guards them. `jobs` is another collection."""

POWERS: dict[str, Attempt] = {
    "view in its place": lambda db: db.create_collection("events", viewOn="jobs", check_exists=False),
    "view of it": lambda db: db.create_collection("seen", viewOn="events", check_exists=False),
    "capped copy in its place": lambda db: db.command(
        {"cloneCollectionAsCapped": "jobs", "toCollection": "events", "size": 4096}
    ),
    "any other collection": lambda db: db.others.insert_one({}),
    "another database": lambda db: db.client[f"{db.name}_other"].events.insert_one({}),
    "grant oneself a role": lambda db: db.command({"grantRolesToUser": _myself(db), "roles": ["dbOwner"]}),
    "change one's own roles": lambda db: db.command({"updateUser": _myself(db), "roles": ["dbOwner"]}),
    "change one's own password": lambda db: db.command({"updateUser": _myself(db), "pwd": "other"}),
    "grant one's role a privilege": lambda db: db.command(
        {
            "grantPrivilegesToRole": SERVICE,
            "privileges": [{"resource": {"db": db.name, "collection": "events"}, "actions": ["remove"]}],
        }
    ),
    "grant one's role another": lambda db: db.command({"grantRolesToRole": SUBSCRIBER, "roles": ["dbOwner"]}),
    "change one's role": lambda db: db.command({"updateRole": SERVICE, "privileges": [], "roles": ["dbOwner"]}),
    "make a role": lambda db: db.command({"createRole": "mine", "privileges": [], "roles": ["dbOwner"]}),
    "make a user": lambda db: db.command({"createUser": "other", "pwd": "other", "roles": ["dbOwner"]}),
    "write to the users": lambda db: db.client.admin["system.users"].update_one({}, {"$set": {"x": 1}}),
    "write to the oplog": lambda db: db.client.local["oplog.rs"].delete_one({"ts": Timestamp(1, 1)}),
    "set a parameter": lambda db: db.client.admin.command({"setParameter": 1, "ttlMonitorEnabled": True}),
}
"""What would help to get at the events, or is nobody's business who only keeps a ledger."""


def _myself(db: BlockingDatabase[Document]) -> str:
    [user] = db.command("connectionStatus")["authInfo"]["authenticatedUsers"]
    # The administrator's user is none of this database.
    return str(user["user"]) if user["db"] == db.name else SERVICE


@dataclass(frozen=True)
class Written:
    """A database with some events in it."""

    place: Place

    def guarded(self) -> tuple[list[bytes], list[Document], list[Any]]:
        """The events, byte for byte, and what their collection is like."""
        db = self.place.db
        raw = db.events.with_options(codec_options=CodecOptions(document_class=RawBSONDocument))
        documents = [bytes(document.raw) for document in raw.find(sort=[("_id", 1)])]
        collections = db.command({"listCollections": 1, "filter": {"name": "events"}})["cursor"]["firstBatch"]
        return documents, collections, list(db.events.list_indexes()) if collections else []

    def refused(self, attempt: Attempt) -> None:
        """Check that neither of the two roles can do it, and that trying has changed nothing."""
        before = self.guarded()
        for connection in (self.place.service, self.place.subscriber):
            with connection.blocking_client() as client, pytest.raises(OperationFailure) as refused:
                attempt(client[connection.db_name])
            assert refused.value.code == UNAUTHORIZED, refused.value
        assert self.guarded() == before


@pytest.fixture
def written(place: Place) -> Written:
    async def write() -> None:
        async with open_ledger(place.service, with_change_stream=False) as ledger:
            for _ in range(3):
                await ledger.submit_job()

    asyncio.run(write())
    place.db.jobs.insert_many([{"_id": 1, "stream": "job-1"}, {"_id": 4, "stream": "job-2"}])
    return Written(place)


@pytest.mark.parametrize("attempt", CHANGES.values(), ids=CHANGES)
def test_the_server_refuses_to_change_events_for_all_but_an_administrator(written: Written, attempt: Attempt) -> None:
    written.refused(attempt)

    before = written.guarded()
    attempt(written.place.db)
    assert written.guarded() != before, "what was refused would have changed nothing anyway"


@pytest.mark.parametrize("attempt", POWERS.values(), ids=POWERS)
def test_the_server_refuses_whatever_a_ledger_does_not_need(written: Written, attempt: Attempt) -> None:
    written.refused(attempt)

    try:
        attempt(written.place.db)
    except OperationFailure as error:
        assert error.code != UNAUTHORIZED, error  # noqa: PT017 - some of it nobody can do, rights or not


def test_all_that_can_be_done_to_the_log_is_to_add_to_it(written: Written) -> None:
    there, *_ = written.guarded()
    for position, connection in enumerate((written.place.service, written.place.subscriber), len(there) + 1):
        with connection.blocking_client() as client:
            events = client[connection.db_name].events
            events.insert_one({"_id": position, "stream": f"job-{position}", "version": 1})
            for taken in ({"_id": position}, {"_id": 99, "stream": f"job-{position}", "version": 1}):
                with pytest.raises(DuplicateKeyError):
                    events.insert_one(taken)
    after, *_ = written.guarded()
    assert after[: len(there)] == there
    assert len(after) == len(there) + 2


def test_the_collection_of_the_log_cannot_be_made_anew_for_it_is_there(written: Written) -> None:
    """Whoever may insert may also create the collection, with other options if he likes: the index is made before."""
    before = written.guarded()
    with written.place.service.blocking_client() as client, pytest.raises(OperationFailure, match="already exists"):
        client[written.place.db.name].create_collection("events", validator={"x": 1}, check_exists=False)
    assert written.guarded() == before


def writes_to(name: str) -> list[Attempt]:
    return [
        lambda db: db[name].insert_one({}),
        lambda db: db[name].update_one({}, FORGED, upsert=True),
        lambda db: db[name].delete_one({}),
    ]


def test_a_subscriber_writes_nothing_but_its_place(written: Written) -> None:
    db = written.place.db
    [role] = db.command({"rolesInfo": SERVICE, "showPrivileges": True})["roles"]
    others = {it["resource"]["collection"] for it in role["privileges"] if "update" in it["actions"]} - {SUBSCRIPTIONS}
    assert others >= {"api_keys", "jobs", "batches", "checkpoints", "counters", "workers"}
    connection = written.place.subscriber
    with connection.blocking_client() as client:
        mine = client[connection.db_name]
        mine[SUBSCRIPTIONS].insert_one({"_id": "mine", "position": 1})
        mine[SUBSCRIPTIONS].update_one({"_id": "mine"}, {"$set": {"position": 2}})
        attempts = [attempt for name in others for attempt in writes_to(name)]
        attempts.append(lambda db: db[SUBSCRIPTIONS].delete_one({"_id": "mine"}))
        for attempt in attempts:
            with pytest.raises(OperationFailure) as refused:
                attempt(mine)
            assert refused.value.code == UNAUTHORIZED, refused.value


# What is said of it -------------------------------------------------------------------------------------------------


def test_the_doctor_says_that_the_service_s_user_can_change_no_event_and_an_administrator_can(
    place: Place, tmp_path: Path
) -> None:
    for user, uri, word in (
        ("service", place.service.uri, "this MongoDB user can append events, but not change or remove them"),
        ("administrator", place.server.uri, "this MongoDB user can change and remove events"),
    ):
        with Installation(tmp_path / user, mongodb={"uri": uri, "db_name": place.db.name}) as installation:
            ended = installation.run("doctor")
        told = ended.out + ended.err
        assert ended.exit_code == 0, told
        assert word in told
        assert not [secret for secret in (*SECRETS, place.server.password) if secret in told]
        # What this user may not look at is nothing wrong.
        assert "no " not in [line[:3] for line in ended.out.splitlines()]


async def finding(place: Place, connection: Connection, directory: Path, what: str) -> CheckResult:
    settings = make_settings(connection.uri, place.db.name, directory)
    found = [it async for it in check_database(settings, connection.uri)]
    [wanted] = [it for it in found if it.name == what]
    return wanted


@pytest.mark.parametrize(
    ("action", "collection", "change"),
    [
        pytest.param("update", "events", CHANGES["update one"], id="update"),
        pytest.param("remove", "events", CHANGES["delete one"], id="remove"),
        pytest.param("dropCollection", "events", CHANGES["drop"], id="dropCollection"),
        pytest.param("anyAction", "", CHANGES["drop"], id="anyAction"),
        pytest.param("createIndex", "events", CHANGES["index that lets events expire"], id="createIndex"),
        pytest.param("convertToCapped", "events", CHANGES["convert to capped"], id="convertToCapped"),
        pytest.param("dropDatabase", "", CHANGES["drop the database"], id="dropDatabase"),
        pytest.param("renameCollectionSameDB", "", CHANGES["rename"], id="renameCollectionSameDB"),
        pytest.param("grantRole", "", POWERS["grant oneself a role"], id="grantRole"),
    ],
)
async def test_the_doctor_sees_every_power_to_change_events(
    place: Place, tmp_path: Path, action: str, collection: str, change: Attempt
) -> None:
    more = {"resource": {"db": place.db.name, "collection": collection}, "actions": [action]}
    place.db.command({"createRole": "more", "privileges": [more], "roles": [SERVICE]})
    connection = place.user("mighty", "more")
    rights = await finding(place, connection, tmp_path, "Rights")
    place.db.events.insert_one({"_id": 1})
    with connection.blocking_client() as client:
        change(client[place.db.name])  # it is a power to do so

    assert "can change and remove events" in rights.detail


async def test_what_this_user_may_not_look_at_is_no_error(place: Place) -> None:
    async with place.subscriber.client() as client:
        db = client[place.db.name]
        assert await read_oplog_window(db) is None
        assert await read_transaction_limit_seconds(db) is None
    async with place.for_the_administrator() as db:
        assert await read_oplog_window(db) is not None
        assert await read_transaction_limit_seconds(db) == 60, "what MongoDB does unless told otherwise"


async def test_without_its_index_a_log_is_refused_with_the_command_that_makes_it(place: Place) -> None:
    place.db.events.drop_index("stream_1_version_1")
    async with place.service.client() as client:
        log = EventStore(client[place.db.name])
        with pytest.raises(DatabaseUnsuitable, match="this user may not create it") as missing:
            await log.prepare()
        command = str(missing.value).partition("in mongosh: ")[2]
        for call in calls_in(command):
            call.run(place.administrator)
        await log.prepare()
    assert place.db.events.index_information()["stream_1_version_1"]["unique"]


@pytest.mark.parametrize("options", [{}, {"unique": True, "partialFilterExpression": {"version": {"$gt": 1}}}])
async def test_an_index_that_guards_nothing_does_not_count(place: Place, options: dict[str, Any]) -> None:
    place.db.events.drop_index("stream_1_version_1")
    place.db.events.create_index([("stream", 1), ("version", 1)], **options)
    async with place.service.client() as client:
        with pytest.raises(DatabaseUnsuitable, match="createIndex"):
            await EventStore(client[place.db.name]).prepare()


async def head(db: Database) -> None:
    await EventStore(db).head_position()


async def prepare(db: Database) -> None:
    await EventStore(db).prepare()


async def test_no_error_shows_the_password(place: Place) -> None:
    powerless = place.user("powerless")
    wrong = replace(powerless, uri=powerless.uri.replace("powerless", "nobody"))
    nowhere = replace(powerless, uri=powerless.uri.replace(place.server.address, "127.0.0.1:1"), connect_timeout_ms=200)
    errors: list[JobledgerError] = []
    for connection in (powerless, wrong, nowhere):
        for ask in (check_server, head, prepare):
            async with connection.client() as client:
                with pytest.raises(JobledgerError) as refused:
                    await ask(client[place.db.name])
            errors.append(refused.value)
    assert "not authorized" in str(errors[0])
    assert "Authentication failed" in str(errors[3])
    for error in errors:
        assert not [secret for secret in SECRETS if secret in f"{error!r} {error.__cause__!r}"]
