"""Jobledger reports missing and excessive privileges of its MongoDB user, and never its password."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from jobledger.cli.checks.database import check_database
from jobledger.cli.checks.result import CheckResult
from jobledger.ledger.domain.errors import DatabaseUnsuitable, JobledgerError
from jobledger.ledger.mongo.connection import (
    Connection,
    Database,
    check_server,
    read_oplog_window,
    read_transaction_limit_seconds,
)
from jobledger.ledger.store.event_store import EventStore
from tests.api.conftest import make_settings
from tests.cli.mongo_roles.conftest import SECRETS, SERVICE, Attempt, PreparedDatabase, parse_calls
from tests.cli.mongo_roles.forbidden_actions import CHANGES, FORBIDDEN_ACTIONS
from tests.support.installation import Installation
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = needs_local_mongod


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
    with connection.create_blocking_client() as client:
        change(client[prepared.db.name])  # the privilege really allows it

    assert "can change and remove events" in rights_check.detail


async def test_server_limits_without_privilege_are_none(prepared: PreparedDatabase) -> None:
    async with prepared.subscriber.create_client() as client:
        db = client[prepared.db.name]
        assert await read_oplog_window(db) is None
        assert await read_transaction_limit_seconds(db) is None
    async with prepared.open_as_administrator() as db:
        assert await read_oplog_window(db) is not None
        assert await read_transaction_limit_seconds(db) == 60, "the default of MongoDB"


async def test_prepare_without_index_fails_and_prints_command(prepared: PreparedDatabase) -> None:
    prepared.db.events.drop_index("stream_1_version_1")
    async with prepared.service.create_client() as client:
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
    async with prepared.service.create_client() as client:
        with pytest.raises(DatabaseUnsuitable, match="createIndex"):
            await EventStore(client[prepared.db.name]).prepare()


async def read_head(db: Database) -> None:
    await EventStore(db).read_head_position()


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
            async with connection.create_client() as client:
                with pytest.raises(JobledgerError) as raised:
                    await operation(client[prepared.db.name])
            errors.append(raised.value)
    assert "not authorized" in str(errors[0])
    assert "Authentication failed" in str(errors[3])
    for error in errors:
        assert not [secret for secret in SECRETS if secret in f"{error!r} {error.__cause__!r}"]
