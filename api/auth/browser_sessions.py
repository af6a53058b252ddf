"""api: sessions of the dashboard. A browser holds a random ID; what it stands for is stored here.

The database holds a digest of the ID, so reading the collection opens no session. A session never outlives the
credential that began it: one of an API key ends with its key, one of a token at the token's `exp`.

All sessions are in memory, as the API keys are, and follow the process's change stream. A session that this process has
not heard of yet is read from the database, because another process may just have begun it. Such a read is not kept:
the change stream could already have reported the end of the session, and would not report it again.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final

import structlog
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pymongo import ASCENDING, DESCENDING, IndexModel
from pymongo.asynchronous.client_session import AsyncClientSession

from jobledger.api.auth.permissions import RevocationNotifier
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.mongo.connection import MAJORITY, Database, Document, translate_errors

_log = structlog.get_logger()
COLLECTION: Final = "browser_sessions"
SESSION_LIFETIME: Final = timedelta(hours=12)
MAX_SESSIONS_PER_OWNER: Final = 20
"""Sessions of one API key, or of one user with tokens. A new one ends the oldest."""
_ID: Final = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


class BrowserSession(BaseModel):
    """A session as it is stored. `policy` identifies the sign-in settings that it was begun under."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    digest: str = Field(alias="_id", pattern=r"^[0-9a-f]{64}$")
    owner: str
    key_id: str | None = None
    user_id: str
    groups: list[str] = []
    roles: list[str] = []
    policy: str
    created_at: datetime
    expires_at: datetime


async def create_indexes(db: Database) -> None:
    """Create the indexes. The server removes expired sessions.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    with translate_errors("preparing the sessions"):
        await db[COLLECTION].create_indexes(
            [
                IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
                IndexModel([("owner", ASCENDING), ("created_at", DESCENDING)]),
            ]
        )


def get_session_owner(*, key_id: str | None = None, user_id: str = "") -> str:
    """Return whose sessions are counted and ended together: those of one key, or of one user with tokens."""
    return f"user:{user_id}" if key_id is None else f"key:{key_id}"


async def end_sessions(db: Database, owner: str) -> int:
    """End all sessions of an owner; return how many there were.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    with translate_errors("ending sessions"):
        return (await db[COLLECTION].delete_many({"owner": owner})).deleted_count


async def count_sessions(db: Database) -> dict[str, int]:
    """Return the number of sessions that have not expired, by owner.

    Raises:
        LedgerUnavailable: the database failed, or does not answer.
    """
    with translate_errors("counting sessions"):
        stages: list[Document] = [
            {"$match": {"expires_at": {"$gt": datetime.now(UTC)}}},
            {"$group": {"_id": "$owner", "number": {"$sum": 1}}},
        ]
        return {it["_id"]: it["number"] async for it in await db[COLLECTION].aggregate(stages)}


class BrowserSessions:
    """The sessions that a serving process accepts. A listener of the process's change stream.

    Args:
        policy: Identifies the sign-in settings. A session that was begun under others is refused.
        holder_of: Returns the holder of a valid API key by the key's ID, for `auth.mode` `keys`; None for other modes.
    """

    collection = COLLECTION

    def __init__(
        self,
        db: Database,
        revocation_notifier: RevocationNotifier,
        *,
        policy: str,
        get_key_holder: Callable[[str], Principal | None] | None = None,
    ) -> None:
        self._db = db
        self._stored = db.get_collection(COLLECTION, read_concern=MAJORITY)
        self._revocations = revocation_notifier
        self._policy = policy
        self._holder_of = get_key_holder
        self._known: dict[str, BrowserSession] = {}
        self._ended: set[str] = set()
        """Ended by this process. Their insertion may still be reported after that, and must not revive them."""

    async def create(self, principal: Principal, key_id: str | None) -> str:
        """Store a new session and return its ID, which nobody else knows.

        Raises:
            LedgerUnavailable: the database failed, or does not answer.
        """
        session_id, now = secrets.token_urlsafe(32), datetime.now(UTC)
        user_id = principal.user_id or ""
        key_id = key_id if self._holder_of is not None else None
        session = BrowserSession(
            digest=_digest(session_id),
            owner=get_session_owner(key_id=key_id, user_id=user_id),
            key_id=key_id,
            user_id=user_id,
            groups=sorted(principal.groups),
            roles=sorted(principal.roles),
            policy=self._policy,
            created_at=now,
            expires_at=min(now + SESSION_LIFETIME, principal.valid_until or now + SESSION_LIFETIME),
        )
        with translate_errors("beginning a session"):
            await self._db[COLLECTION].insert_one(session.model_dump(by_alias=True))
            # Two sign-ins at once may both delete the same ones; neither leaves more than the limit behind.
            newest = self._stored.find({"owner": session.owner}, {"_id": 1}, sort=[("created_at", -1)])
            surplus = [it["_id"] async for it in newest.skip(MAX_SESSIONS_PER_OWNER)]
            if surplus:
                await self._db[COLLECTION].delete_many({"_id": {"$in": surplus}})
        return session_id

    async def load_principal(self, session_id: str) -> Principal | None:
        """Return who a session belongs to; None if it does not exist, has expired, or its key has.

        Raises:
            LedgerUnavailable: the database failed, or does not answer.
        """
        if not _ID.fullmatch(session_id):
            return None
        digest = _digest(session_id)
        if digest in self._ended:
            return None
        session = self._known.get(digest)
        if session is None:
            with translate_errors("reading a session"):
                session = _readable(await self._stored.find_one({"_id": digest}))
        if session is None or session.policy != self._policy or session.expires_at <= datetime.now(UTC):
            return None
        if (session.key_id is None) != (self._holder_of is None):
            return None
        if session.key_id is not None and self._holder_of is not None and self._holder_of(session.key_id) is None:
            return None
        return Principal(session.user_id, frozenset(session.groups), frozenset(session.roles), session.expires_at)

    async def end(self, session_id: str) -> None:
        """End a session.

        Raises:
            LedgerUnavailable: the database failed, or does not answer.
        """
        if not _ID.fullmatch(session_id):
            return
        digest = _digest(session_id)
        if self._known.pop(digest, None) is not None:
            self._ended.add(digest)
        with translate_errors("ending a session"):
            removed = await self._db[COLLECTION].delete_one({"_id": digest})
        if removed.deleted_count:
            self._ended.add(digest)
        self._revocations.notify()

    async def resync(self, session: AsyncClientSession) -> None:
        with translate_errors("reading the sessions"):
            found = [_readable(it) async for it in self._stored.find(session=session)]
        known = {it.digest: it for it in found if it is not None}
        self._ended &= known.keys()
        self._known = {digest: it for digest, it in known.items() if digest not in self._ended}
        self._revocations.notify()

    def on_change(self, change: Mapping[str, Any]) -> None:
        digest = change["documentKey"]["_id"]
        if change["operationType"] == "insert" and (found := _readable(change["fullDocument"])) is not None:
            if digest not in self._ended:
                self._known[digest] = found
            return
        # Sessions are inserted and deleted. One that was changed by hand is not trusted.
        self._known.pop(digest, None)
        self._ended.discard(digest)
        self._revocations.notify()


def _digest(session_id: str) -> str:
    return sha256(session_id.encode()).hexdigest()


def _readable(document: Document | None) -> BrowserSession | None:
    try:
        return None if document is None else BrowserSession.model_validate(document)
    except ValidationError:
        _log.warning("ignoring invalid document in browser_sessions")
        return None
