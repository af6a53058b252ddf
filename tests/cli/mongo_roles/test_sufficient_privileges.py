"""The roles of `jobledger mongo-roles` are sufficient on a server with access control."""

from __future__ import annotations

import asyncio
from pathlib import Path

import orjson
import pytest
from pymongo import AsyncMongoClient, MongoClient
from pymongo.errors import OperationFailure

from jobledger import App
from jobledger.cli.administration import view_maintenance
from jobledger.cli.administration.mongo_roles import build_mongosh_script
from jobledger.cli.checks.database import check_database
from jobledger.ledger.domain.errors import JobledgerError, LedgerUnavailable
from jobledger.ledger.mongo.connection import Connection, Document, check_server
from jobledger.ledger.mongo.embedded_files import wait_until
from jobledger.ledger.store.verification import verify_log
from jobledger.ledger.subscriber import SUBSCRIPTIONS, ledger_client
from tests.api.conftest import Api, make_settings, run_api
from tests.cli.mongo_roles.conftest import SERVICE, PreparedDatabase, parse_calls, read_uri
from tests.support.authenticated_server import AuthenticatedServer
from tests.support.installation import Installation, http_client
from tests.support.ledger_setup import create_position_gap, open_ledger
from tests.support.mongodb_provider import needs_local_mongod
from tests.support.polling import DEADLINE_SECONDS, poll_until
from tests.support.role_runner import run_roles_in_process

pytestmark = needs_local_mongod


def test_mongo_roles_prints_script_without_server_access(tmp_path: Path) -> None:
    with Installation(tmp_path, mongodb={"uri": "mongodb://127.0.0.1:1/", "db_name": "talks"}) as installation:
        outcome = installation.run("mongo-roles")
    assert (outcome.exit_code, outcome.out, outcome.err) == (0, build_mongosh_script("talks") + "\n", "")
    assert {call.db_name for call in parse_calls(outcome.out.rstrip())} == {"talks"}


async def test_mongo_roles_script_runs_and_its_uri_connects(
    server: AuthenticatedServer, administrator: MongoClient[Document], db_name: str
) -> None:
    text = build_mongosh_script(db_name)
    for call in parse_calls(text):
        call.run(administrator)
    async with Connection(read_uri(text, server), db_name).create_client() as client:
        await check_server(client[db_name])


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
    assert "1 event up to position 1 is intact" in outcome.out
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


async def test_submitter_role_submits_in_its_transactions_and_reads_nothing_else(
    prepared: PreparedDatabase, tmp_path: Path
) -> None:
    app = App(db_name=prepared.db.name)
    async for api in run_api(prepared.service.uri, prepared.db.name, tmp_path):
        async with AsyncMongoClient[Document](prepared.submitter.uri) as client, client.start_session() as session:
            await session.start_transaction()
            job_id = await app.submit("echo", {}, session=session, key="k")
            await session.commit_transaction()
            db = client[prepared.db.name]
            await poll_until(lambda: prepared.db.outbox.find_one() is None)
            assert (await api.wait_until_finished(job_id))["status"] == "completed"
            for attempt in (
                *(db[collection].find_one() for collection in ("events", "jobs", "api_keys", "outbox_rejected")),
                db.outbox.delete_one({}),
                db.events.insert_one({"_id": 99}),
            ):
                with pytest.raises(OperationFailure, match="not authorized"):
                    await attempt
    failed = {collection for _, collection in prepared.server.authorization_failures(prepared.db.name)}
    assert failed == {"events", "jobs", "api_keys", "outbox_rejected", "outbox"}
