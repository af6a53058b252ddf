"""Operations that the roles of `jobledger mongo-roles` must not allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bson import Timestamp
from pymongo import DeleteOne, UpdateOne
from pymongo.client_session import ClientSession
from pymongo.database import Database as BlockingDatabase

from jobledger.ledger.mongo.connection import Document
from tests.cli.mongo_roles.conftest import SERVICE, SUBSCRIBER, Attempt


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
