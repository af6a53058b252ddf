"""MongoDB roles with only the rights that Jobledger needs (`jobledger mongo-roles`).

Users with the role `jobledger` can read and insert events, but the server rejects updates and deletions. Users with
the role `jobledger-subscriber` can follow the log from another program and store the position of their subscription.
Users with the role `jobledger-submitter` can only submit jobs, in transactions of their own programs.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from jobledger.api.auth.api_keys import COLLECTION as API_KEYS
from jobledger.api.auth.browser_sessions import COLLECTION as SESSIONS
from jobledger.api.routes.webhook_echo import COLLECTION as WEBHOOK_ECHO
from jobledger.ledger.files.gridfs import COLLECTIONS as GRIDFS
from jobledger.ledger.files.store_marker import COLLECTION as RESULT_STORE
from jobledger.ledger.outbox.submission import COLLECTION as OUTBOX
from jobledger.ledger.outbox.submission import REJECTED_COLLECTION as REJECTED_OUTBOX
from jobledger.ledger.subscriber import SUBSCRIPTIONS
from jobledger.ledger.webhooks.endpoint_secrets import COLLECTION as ENDPOINTS
from jobledger.projections.engine.view_registry import VIEW_NAMES
from jobledger.projections.slots import SLOTS, get_collection_name
from jobledger.workers.cleanup import FILE_REMOVALS
from jobledger.workers.results.path_reservations import COLLECTION as RESULT_PATHS

_MUTABLE_COLLECTIONS: Final = (
    API_KEYS,
    "checkpoints",
    "counters",
    *GRIDFS,
    "leaders",
    OUTBOX,
    REJECTED_OUTBOX,
    RESULT_PATHS,
    RESULT_STORE,
    "secrets",
    SESSIONS,
    SUBSCRIPTIONS,
    ENDPOINTS,
    "webhook_secrets",
    WEBHOOK_ECHO,
    "workers",
    FILE_REMOVALS,
    *(get_collection_name(name, slot) for name in VIEW_NAMES for slot in SLOTS),
)
_WRITE_ACTIONS: Final = ["find", "insert", "update", "remove", "createCollection", "createIndex", "listIndexes"]


def create_role_commands(db_name: str) -> list[dict[str, Any]]:
    """Return the commands that create the roles. An administrator runs them on the database `db_name`."""
    database = _build_privilege(db_name, "", ["find", "changeStream"])
    log = _build_privilege(db_name, "events", ["find", "insert", "listIndexes"])
    return [
        {
            "createRole": "jobledger",
            "privileges": [
                database,
                log,
                *(_build_privilege(db_name, name, _WRITE_ACTIONS) for name in _MUTABLE_COLLECTIONS),
            ],
            "roles": [],
        },
        {
            "createRole": "jobledger-subscriber",
            "privileges": [database, log, _build_privilege(db_name, SUBSCRIPTIONS, ["find", "insert", "update"])],
            "roles": [],
        },
        {
            "createRole": "jobledger-submitter",
            "privileges": [
                _build_privilege(db_name, OUTBOX, ["find", "insert"]),
                _build_privilege(db_name, "checkpoints", ["find"]),
            ],
            "roles": [],
        },
    ]


def _build_privilege(db_name: str, collection: str, actions: list[str]) -> dict[str, Any]:
    return {"resource": {"db": db_name, "collection": collection}, "actions": actions}


def build_mongosh_script(db_name: str) -> str:
    """Return a mongosh script that creates the index of the log, the roles, and a user whose password it asks for."""
    commands = "\n".join(
        f"ledger.runCommand({orjson.dumps(role, option=orjson.OPT_INDENT_2).decode()})"
        for role in create_role_commands(db_name)
    )
    return (
        f'ledger = db.getSiblingDB("{db_name}")\n'
        "ledger.events.createIndex({stream: 1, version: 1}, {unique: true})\n"
        f"{commands}\n"
        'ledger.createUser({user: "jobledger", pwd: passwordPrompt(), roles: ["jobledger"]})\n'
        f"// then: mongodb.uri: mongodb://jobledger:PASSWORD@HOST/?replicaSet=rs0&authSource={db_name}"
    )
