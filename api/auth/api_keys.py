"""API keys: their format, their storage, and the cache of a serving process.

Only a digest of the secret is stored. Plain SHA-256 is sufficient, unlike for passwords: 32 random bytes cannot be
guessed. Functions that access the database raise LedgerUnavailable if it fails or does not respond.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from hashlib import sha256
from hmac import compare_digest
from typing import Annotated, Any, Final, Literal

import structlog
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.api.auth.permissions import RevocationNotifier
from jobledger.ledger.domain.access import parse_group_name, parse_user_name
from jobledger.ledger.mongo.connection import MAJORITY, Database, Document, translate_errors

_log = structlog.get_logger()
COLLECTION: Final = "api_keys"
UserRole = Literal["admin", "monitor"]
_TOKEN: Final = re.compile(r"jl_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)
_NO_DIGEST: Final = bytes(32)


def _parse_label(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected printable text")
    return text


class ApiKey(BaseModel):
    """An API key as stored: its holder and a digest of its secret."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    key_id: str = Field(alias="_id", pattern=r"^[0-9a-f]{16}$")
    sha256: Annotated[bytes, Field(min_length=32, max_length=32, repr=False)]
    name: Annotated[str, Field(max_length=200), AfterValidator(_parse_label)] | None = None
    user_id: Annotated[str, AfterValidator(parse_user_name)]
    groups: list[Annotated[str, AfterValidator(parse_group_name)]] = []
    roles: list[UserRole] = []
    created_at: datetime
    expires_at: datetime | None = None

    def is_valid(self, now: datetime) -> bool:
        """Return whether the key has not expired."""
        return self.expires_at is None or now < self.expires_at


@dataclass(frozen=True, slots=True)
class ApiKeyToken:
    """The token that a client sends: the ID of the key and its secret."""

    key_id: str
    secret: str

    @classmethod
    def generate(cls) -> ApiKeyToken:
        """Return a new random token."""
        return cls(secrets.token_hex(8), secrets.token_urlsafe(32))

    @classmethod
    def parse(cls, text: str) -> ApiKeyToken | None:
        """Parse `jl_<id>_<secret>`; return None for another format."""
        match = _TOKEN.fullmatch(text)
        return None if match is None else cls(match[1], match[2])

    def __str__(self) -> str:
        return f"jl_{self.key_id}_{self.secret}"

    def __repr__(self) -> str:
        return f"ApiKeyToken({self.key_id}, …)"

    @property
    def digest(self) -> bytes:
        """The SHA-256 digest of the secret."""
        return sha256(self.secret.encode()).digest()


async def store_key(db: Database, key: ApiKey) -> None:
    """Store a new key."""
    with translate_errors("storing an API key"):
        await db[COLLECTION].insert_one(key.model_dump(by_alias=True))


async def list_api_keys(db: Database) -> list[ApiKey]:
    """Return all keys, oldest first."""
    with translate_errors("reading the API keys"):
        documents = await db[COLLECTION].find(sort=[("created_at", 1), ("_id", 1)]).to_list()
    return _parse_valid(documents)


async def revoke_key(db: Database, key_id: str) -> bool:
    """Delete a key, which revokes it immediately. Return whether it existed."""
    with translate_errors("revoking an API key"):
        removed = await db[COLLECTION].delete_one({"_id": key_id})
    return removed.deleted_count == 1


class ApiKeyCache:
    """All keys in memory, so that no request reads them from the database.

    It is a listener of the process's change stream.

    Args:
        db: The database.
        revocation_notifier: Notified when keys change.
        now: Returns the current time, which decides whether a key has expired.
    """

    collection = COLLECTION

    def __init__(self, db: Database, revocation_notifier: RevocationNotifier, *, now: Callable[[], datetime]) -> None:
        self._stored = db.get_collection(COLLECTION, read_concern=MAJORITY)
        self._revocation_notifier = revocation_notifier
        self._now = now
        self._keys: dict[str, ApiKey] = {}

    def authenticate(self, token: ApiKeyToken) -> ApiKey | None:
        """Return the key with this ID and secret; None if it does not exist or has expired."""
        key = self._keys.get(token.key_id)
        # The comparison also runs for unknown keys, so that the response time reveals no key IDs.
        is_same = compare_digest(token.digest, _NO_DIGEST if key is None else key.sha256)
        return key if key is not None and is_same and key.is_valid(self._now()) else None

    def is_valid(self, key_id: str) -> bool:
        """Return whether the key with this ID is neither revoked nor expired."""
        key = self._keys.get(key_id)
        return key is not None and key.is_valid(self._now())

    def get_groups(self, user_id: str) -> frozenset[str]:
        """Return the groups of all valid keys of a user."""
        now, keys = self._now(), list(self._keys.values())  # a copy: other threads call this while keys change
        own_keys = (key for key in keys if key.user_id == user_id and key.is_valid(now))
        return frozenset(group for key in own_keys for group in key.groups)

    async def resync(self, session: AsyncClientSession) -> None:
        with translate_errors("reading the API keys"):
            documents = await self._stored.find(session=session).to_list()
        self._keys = {key.key_id: key for key in _parse_valid(documents)}
        self._revocation_notifier.notify()

    def on_change(self, change: Mapping[str, Any]) -> None:
        key_id = change["documentKey"]["_id"]
        # Keys are inserted and deleted, never updated. A key that was updated by hand is not trusted: its change has no
        # full document, so the key is invalid until the next resync().
        self._keys.pop(key_id, None)
        for key in _parse_valid([change["fullDocument"]] if "fullDocument" in change else []):
            self._keys[key.key_id] = key
        self._revocation_notifier.notify()


def _parse_valid(documents: Collection[Document]) -> list[ApiKey]:
    """Return the documents that are valid keys. An invalid one, inserted by hand, must not disable the others."""
    keys = []
    for document in documents:
        try:
            keys.append(ApiKey.model_validate(document))
        except ValidationError:
            _log.warning("ignoring invalid document in api_keys", key_id=str(document.get("_id")))
    return keys
