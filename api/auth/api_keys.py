"""api: API keys. What one looks like, where they are stored, and the ring of them that a serving process holds.

Of the secret only a digest is stored. A plain SHA-256 is enough, unlike for passwords: nobody guesses 32 random bytes.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Collection, Mapping
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
Role = Literal["admin", "monitor"]
_TEXT: Final = re.compile(r"jl_([0-9a-f]{16})_([A-Za-z0-9_-]{43})", re.ASCII)
_NO_DIGEST: Final = bytes(32)


def _label(text: str) -> str:
    if not text.isprintable():
        raise ValueError("expected text that can be printed")
    return text


class ApiKey(BaseModel):
    """A key as it is stored. It says who its holder is, and nothing of how to be it."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    key_id: str = Field(alias="_id", pattern=r"^[0-9a-f]{16}$")
    sha256: Annotated[bytes, Field(min_length=32, max_length=32, repr=False)]
    name: Annotated[str, Field(max_length=200), AfterValidator(_label)] | None = None
    user_id: Annotated[str, AfterValidator(parse_user_name)]
    groups: list[Annotated[str, AfterValidator(parse_group_name)]] = []
    roles: list[Role] = []
    created_at: datetime
    expires_at: datetime | None = None

    def is_valid(self, now: datetime) -> bool:
        """Return whether it has not expired yet."""
        return self.expires_at is None or now < self.expires_at


@dataclass(frozen=True, slots=True)
class ApiKeyToken:
    """The two parts of what a client sends: which key it is, and the proof that it is theirs."""

    key_id: str
    secret: str

    @classmethod
    def generate(cls) -> ApiKeyToken:
        """Return one that nobody has."""
        return cls(secrets.token_hex(8), secrets.token_urlsafe(32))

    @classmethod
    def parse(cls, text: str) -> ApiKeyToken | None:
        """Read `jl_<id>_<secret>`; None if it is something else."""
        found = _TEXT.fullmatch(text)
        return None if found is None else cls(found[1], found[2])

    def __str__(self) -> str:
        return f"jl_{self.key_id}_{self.secret}"

    def __repr__(self) -> str:
        return f"KeyText({self.key_id}, …)"

    @property
    def digest(self) -> bytes:
        """What is stored of the secret."""
        return sha256(self.secret.encode()).digest()


async def store_key(db: Database, key: ApiKey) -> None:
    """Put a new key on record.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    with translate_errors("storing an API key"):
        await db[COLLECTION].insert_one(key.model_dump(by_alias=True))


async def list_keys(db: Database) -> list[ApiKey]:
    """Return all keys, oldest first.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    with translate_errors("reading the API keys"):
        documents = await db[COLLECTION].find(sort=[("created_at", 1), ("_id", 1)]).to_list()
    return _readable(documents)


async def revoke_key(db: Database, key_id: str) -> bool:
    """Remove a key, which from then on opens nothing; return whether there was one.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    with translate_errors("revoking an API key"):
        removed = await db[COLLECTION].delete_one({"_id": key_id})
    return removed.deleted_count == 1


class ApiKeyCache:
    """All keys, in memory: a listener of the process's change stream. No request asks the database for them."""

    collection = COLLECTION

    def __init__(self, db: Database, revocations: RevocationNotifier) -> None:
        self._stored = db.get_collection(COLLECTION, read_concern=MAJORITY)
        self._revocations = revocations
        self._keys: dict[str, ApiKey] = {}

    def authenticate(self, text: ApiKeyToken, now: datetime) -> ApiKey | None:
        """Return the key, if there is one with this secret that has not expired."""
        key = self._keys.get(text.key_id)
        same = compare_digest(text.digest, _NO_DIGEST if key is None else key.sha256)
        return key if key is not None and same and key.is_valid(now) else None

    def get_valid(self, key_id: str, now: datetime) -> ApiKey | None:
        """Return the key with this ID, if it is neither revoked nor expired."""
        key = self._keys.get(key_id)
        return key if key is not None and key.is_valid(now) else None

    def get_groups(self, user_id: str, now: datetime) -> frozenset[str]:
        """Return the groups that a user is in, by all of their valid keys."""
        keys = list(self._keys.values())  # also called from other threads, while keys come and go
        mine = (key for key in keys if key.user_id == user_id and key.is_valid(now))
        return frozenset(group for key in mine for group in key.groups)

    async def resync(self, session: AsyncClientSession) -> None:
        with translate_errors("reading the API keys"):
            documents = await self._stored.find(session=session).to_list()
        self._keys = {key.key_id: key for key in _readable(documents)}
        self._revocations.notify()

    def on_change(self, change: Mapping[str, Any]) -> None:
        key_id = change["documentKey"]["_id"]
        # Keys are made and removed, never changed. One that somebody changes by hand is not to be trusted: its change
        # comes without the whole key, so that it opens nothing until the stream is opened anew.
        self._keys.pop(key_id, None)
        for key in _readable([change["fullDocument"]] if "fullDocument" in change else []):
            self._keys[key.key_id] = key
        self._revocations.notify()


def _readable(documents: Collection[Document]) -> list[ApiKey]:
    """Return those that are keys. What is none was put there by hand, and must not stop everybody else."""
    found = []
    for document in documents:
        try:
            found.append(ApiKey.model_validate(document))
        except ValidationError:
            _log.warning("ignoring invalid document in api_keys", key_id=str(document.get("_id")))
    return found
