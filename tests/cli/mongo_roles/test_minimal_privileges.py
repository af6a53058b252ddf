"""The roles of `jobledger mongo-roles` allow nothing that Jobledger does not need."""

from __future__ import annotations

import pytest
from pymongo.errors import DuplicateKeyError, OperationFailure

from jobledger.ledger.mongo.connection import UNAUTHORIZED
from jobledger.ledger.subscriber import SUBSCRIPTIONS
from tests.cli.mongo_roles.conftest import SERVICE, Attempt, FilledDatabase
from tests.cli.mongo_roles.forbidden_actions import CHANGES, FORBIDDEN_ACTIONS, FORGED
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = needs_local_mongod


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
        with connection.create_blocking_client() as client:
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
    with (
        filled.prepared.service.create_blocking_client() as client,
        pytest.raises(OperationFailure, match="already exists"),
    ):
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
    with connection.create_blocking_client() as client:
        subscriber_db = client[connection.db_name]
        subscriber_db[SUBSCRIPTIONS].insert_one({"_id": "mine", "position": 1})
        subscriber_db[SUBSCRIPTIONS].update_one({"_id": "mine"}, {"$set": {"position": 2}})
        attempts = [attempt for name in other_collections for attempt in list_writes(name)]
        attempts.append(lambda db: db[SUBSCRIPTIONS].delete_one({"_id": "mine"}))
        for attempt in attempts:
            with pytest.raises(OperationFailure) as raised:
                attempt(subscriber_db)
            assert raised.value.code == UNAUTHORIZED, raised.value
