"""Signing secrets of webhook endpoints. An endpoint is a URL of one user (`build_endpoint_id`).

Each endpoint has its own secret. So a message for one user never validates at the endpoint of another, even if both use
the same URL. Secrets are stored only in the collection `endpoint_secrets`. No event, log entry or later response
contains them.

A secret is created on first use of its endpoint, and revealed by the submission that marks it as shown. Both are single
atomic writes, so exactly one process creates it and one reveals it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from pymongo import ReturnDocument, UpdateOne

from jobledger.ledger.domain.delivery import build_endpoint_id
from jobledger.ledger.mongo.connection import Database, Document, translate_errors
from jobledger.ledger.mongo.server_clock import get_server_clock
from jobledger.ledger.webhooks.signature import generate_secret

COLLECTION: Final = "endpoint_secrets"
MAX_PREVIOUS_SECRETS: Final = 3


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A URL to which a user's webhooks are sent."""

    user_id: str
    url: str

    @property
    def endpoint_id(self) -> str:
        return build_endpoint_id(self.user_id, self.url)


@dataclass(frozen=True, slots=True)
class RevealedSecret:
    """A secret in the only response that reveals it."""

    endpoint_id: str
    url: str
    secret: str = field(repr=False)

    def to_response(self) -> dict[str, str]:
        return asdict(self)


async def ensure_secrets(db: Database, endpoints: Collection[Endpoint]) -> None:
    """Create the secrets of endpoints that have none.

    Raises:
        LedgerUnavailable: The database failed.
    """
    by_id = {it.endpoint_id: it for it in endpoints}
    if not by_id:
        return
    with translate_errors("reading the endpoints of webhooks"):
        found = {it["_id"] async for it in db[COLLECTION].find({"_id": {"$in": list(by_id)}}, {"_id": 1})}
        # If another process creates one at the same time, the server repeats the upsert as an update.
        missing = [
            UpdateOne({"_id": endpoint_id}, {"$setOnInsert": _new_document(it, _estimate_now(db))}, upsert=True)
            for endpoint_id, it in by_id.items()
            if endpoint_id not in found
        ]
        if missing:
            await db[COLLECTION].bulk_write(missing, ordered=False)


def _estimate_now(db: Database) -> datetime:
    """Return the server's time, because other processes compare with the times stored here."""
    return get_server_clock(db.client).estimate()


def _new_document(endpoint: Endpoint, now: datetime) -> Document:
    return {
        "user_id": endpoint.user_id,
        "url": endpoint.url,
        "secret": generate_secret(),
        "previous_secrets": [],
        "shown": False,
        "created_at": now,
        "rotated_at": None,
    }


async def reveal_new_secrets(db: Database, endpoints: Collection[Endpoint]) -> list[RevealedSecret]:
    """Return the secrets of these endpoints that were never revealed, and mark them as shown.

    The same write reads the secret and sets the mark, so no secret is revealed twice.

    Raises:
        LedgerUnavailable: The database failed.
    """
    endpoint_ids = {it.endpoint_id for it in endpoints}
    if not endpoint_ids:
        return []
    shown = []
    with translate_errors("reading the secrets of webhooks"):
        wanted = {"_id": {"$in": list(endpoint_ids)}, "shown": False}
        for endpoint_id in [it["_id"] async for it in db[COLLECTION].find(wanted, {"_id": 1})]:
            found = await db[COLLECTION].find_one_and_update(
                {"_id": endpoint_id, "shown": False, "secret": {"$ne": None}}, {"$set": {"shown": True}}
            )
            if found is not None:
                shown.append(RevealedSecret(endpoint_id, found["url"], found["secret"]))
    return shown


async def load_signing_secrets(db: Database, endpoint: Endpoint) -> list[str]:
    """Return the secrets to sign a message with: the current one and previous ones in their grace period.

    An empty list means that the secret was revoked.

    Raises:
        LedgerUnavailable: The database failed.
    """
    found = await _load(db, endpoint)
    if found is None:  # such as after an import of the log into another database
        await ensure_secrets(db, [endpoint])
        found = await _load(db, endpoint)
    if found is None or found["secret"] is None:
        return []
    now = _estimate_now(db)
    return [found["secret"], *(it["secret"] for it in found["previous_secrets"] if it["expires_at"] > now)]


async def _load(db: Database, endpoint: Endpoint) -> Document | None:
    with translate_errors("reading the secrets of a webhook"):
        return await db[COLLECTION].find_one({"_id": endpoint.endpoint_id})


async def get_endpoint(db: Database, endpoint_id: str) -> Document | None:
    """Return an endpoint without its secrets; None if it does not exist.

    Raises:
        LedgerUnavailable: The database failed.
    """
    with translate_errors("reading an endpoint of webhooks"):
        found = await db[COLLECTION].find_one({"_id": endpoint_id}, _WITHOUT_SECRETS)
    return None if found is None else _to_summary(found, _estimate_now(db))


_WITHOUT_SECRETS: Final = {
    "user_id": 1,
    "url": 1,
    "created_at": 1,
    "rotated_at": 1,
    "previous_secrets.expires_at": 1,
    "revoked": {"$eq": ["$secret", None]},
}


async def list_endpoints(db: Database, *, user_id: str | None, limit: int, after: str = "") -> list[Document]:
    """Return endpoints without their secrets, by ID: those of a user, or of all users.

    Raises:
        LedgerUnavailable: The database failed.
    """
    wanted: Document = {"_id": {"$gt": after}} | ({} if user_id is None else {"user_id": user_id})
    with translate_errors("listing the endpoints of webhooks"):
        found = db[COLLECTION].find(wanted, _WITHOUT_SECRETS, sort=[("_id", 1)], limit=limit)
        return [_to_summary(it, _estimate_now(db)) async for it in found]


def _to_summary(found: Document, now: datetime) -> Document:
    ends = [it["expires_at"] for it in found["previous_secrets"] if it["expires_at"] > now]
    return {
        "endpoint_id": found["_id"],
        "url": found["url"],
        "user_id": found["user_id"],
        "created_at": found["created_at"],
        "rotated_at": found["rotated_at"],
        "previous_secret_expires_at": max(ends, default=None),
        "revoked": found["revoked"],
    }


async def rotate_secret(db: Database, endpoint_id: str, grace: timedelta) -> RevealedSecret | None:
    """Give an endpoint a new secret and return it; None if the endpoint does not exist.

    The previous secret also signs during the grace period. This is one write, so of two concurrent rotations the later
    one keeps the secret of the earlier one as a previous secret.

    Raises:
        LedgerUnavailable: The database failed.
    """
    now, secret = _estimate_now(db), generate_secret()
    replaced = {"$cond": [{"$eq": ["$secret", None]}, [], [{"secret": "$secret", "expires_at": now + grace}]]}
    previous: Any = (
        {"$slice": [{"$concatArrays": [replaced, "$previous_secrets"]}, MAX_PREVIOUS_SECRETS]} if grace else []
    )
    changes: Sequence[Document] = [
        {"$set": {"secret": secret, "previous_secrets": previous, "shown": True, "rotated_at": now}}
    ]
    with translate_errors("rotating the secret of a webhook"):
        found = await db[COLLECTION].find_one_and_update(
            {"_id": endpoint_id}, changes, return_document=ReturnDocument.AFTER
        )
    return None if found is None else RevealedSecret(endpoint_id, found["url"], secret)


async def revoke_secrets(db: Database, endpoint_id: str) -> bool:
    """Remove the secrets of an endpoint. Return whether it exists. Nothing is sent until `rotate_secret` is called.

    Raises:
        LedgerUnavailable: The database failed.
    """
    with translate_errors("revoking the secret of a webhook"):
        changed = await db[COLLECTION].update_one(
            {"_id": endpoint_id}, {"$set": {"secret": None, "previous_secrets": []}}
        )
    return changed.matched_count == 1
