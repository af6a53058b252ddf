"""cli: the rights in MongoDB that a ledger needs, and no more: `jobledger mongo-roles`.

A user with the role `jobledger` can add to the log and not change it: of `events` it may read and insert, and the
server refuses the rest. One with `jobledger-subscriber` can follow the log from another program, and keep its place.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from jobledger.api.auth.api_keys import COLLECTION as API_KEYS
from jobledger.api.auth.browser_sessions import COLLECTION as SESSIONS
from jobledger.api.routes.webhook_echo import COLLECTION as SINK
from jobledger.ledger.files.gridfs import COLLECTIONS as GRIDFS
from jobledger.ledger.files.store_marker import COLLECTION as RESULT_STORE
from jobledger.ledger.store.endpoint_secrets import COLLECTION as ENDPOINTS
from jobledger.ledger.subscriber import SUBSCRIPTIONS
from jobledger.projections.engine.rebuild import VIEW_NAMES
from jobledger.projections.slots import SLOTS, collection_name
from jobledger.workers.cleanup import FILE_REMOVALS
from jobledger.workers.path_reservations import COLLECTION as RESULT_PATHS

_MUTABLE: Final = (
    API_KEYS,
    "checkpoints",
    "counters",
    *GRIDFS,
    "leaders",
    RESULT_PATHS,
    RESULT_STORE,
    "secrets",
    SESSIONS,
    SUBSCRIPTIONS,
    ENDPOINTS,
    "webhook_secrets",
    SINK,
    "workers",
    FILE_REMOVALS,
    *(collection_name(name, side) for name in VIEW_NAMES for side in SLOTS),
)
_VIEW_ACTIONS: Final = ["find", "insert", "update", "remove", "createCollection", "createIndex", "listIndexes"]


def create_role_commands(db_name: str) -> list[dict[str, Any]]:
    """Return the commands that create the two roles, to be run by an administrator on the database `db_name`."""
    whole = _privilege(db_name, "", ["find", "changeStream"])
    log = _privilege(db_name, "events", ["find", "insert", "listIndexes"])
    return [
        {
            "createRole": "jobledger",
            "privileges": [whole, log, *(_privilege(db_name, name, _VIEW_ACTIONS) for name in _MUTABLE)],
            "roles": [],
        },
        {
            "createRole": "jobledger-subscriber",
            "privileges": [whole, log, _privilege(db_name, SUBSCRIPTIONS, ["find", "insert", "update"])],
            "roles": [],
        },
    ]


def _privilege(db_name: str, collection: str, actions: list[str]) -> dict[str, Any]:
    return {"resource": {"db": db_name, "collection": collection}, "actions": actions}


def mongosh_script(db_name: str) -> str:
    """Return what an administrator pastes into mongosh: the index of the log, the roles, and a user to be finished."""
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
