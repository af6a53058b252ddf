"""Browser sessions of the dashboard. The browser holds a random ID in a cookie, the database holds the session.

The database stores only a digest of the ID, so the collection gives no access to sessions. A session ends at sign-out,
after 12 hours, and with the credential that created it: with its API key, or at the `exp` of its token.

All sessions are in memory and follow the process's change stream. A session that is not in memory is read from the
database, because another process may have just created it. Such a session is not kept in memory: the change stream may
have reported its end already, and would not report it again.

Browsers send a cookie to every port of its host, so the cookie must not contain the credential. Scripts cannot read it.
With https its name starts with `__Host-`. Browsers then accept the cookie only from this host, over https and for all
paths (RFC 6265bis, 4.1.3.2), and the server reads no other name. Plain http is for use on the same machine. There the
name has no prefix, because browsers differ: Chromium accepts a `Secure` cookie from http://localhost, Safari does not.

Other sites cannot use the cookie: browsers do not send it with their requests (SameSite=Strict). `SameSite` ignores
port and scheme, so the API accepts changes only from its own origin (`HostOriginMiddleware`).

Functions that access the database raise LedgerUnavailable if it fails or does not respond.
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
from starlette.requests import HTTPConnection

from jobledger.api.auth.permissions import AuthBackend, RevocationNotifier
from jobledger.api.http.errors import ApiError
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import MAJORITY, Database, Document, translate_errors

_log = structlog.get_logger()
COLLECTION: Final = "browser_sessions"
SESSION_LIFETIME: Final = timedelta(hours=12)
MAX_SESSIONS_PER_HOLDER: Final = 20
"""Sessions of one API key, or of one user with tokens. A new session beyond the limit ends the oldest."""
_ID: Final = re.compile(r"[A-Za-z0-9_-]{43}", re.ASCII)


class BrowserSession(BaseModel):
    """A session as stored. `policy` identifies the authentication settings that it was created under."""

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    digest: str = Field(alias="_id", pattern=r"^[0-9a-f]{64}$")
    holder: str
    key_id: str | None = None
    user_id: str
    groups: list[str] = []
    roles: list[str] = []
    policy: str
    created_at: datetime
    expires_at: datetime


async def create_indexes(db: Database) -> None:
    """Create the indexes. The server removes expired sessions."""
    with translate_errors("preparing the sessions"):
        await db[COLLECTION].create_indexes(
            [
                IndexModel([("expires_at", ASCENDING)], expireAfterSeconds=0),
                IndexModel([("holder", ASCENDING), ("created_at", DESCENDING)]),
            ]
        )


def build_holder(*, key_id: str | None = None, user_id: str = "") -> str:
    """Return the holder of sessions that are counted and ended together: an API key, or a user with tokens."""
    return f"user:{user_id}" if key_id is None else f"key:{key_id}"


async def end_sessions(db: Database, holder: str) -> int:
    """End all sessions of a holder. Return their number."""
    with translate_errors("ending sessions"):
        return (await db[COLLECTION].delete_many({"holder": holder})).deleted_count


async def count_sessions(db: Database) -> dict[str, int]:
    """Return the number of sessions that have not expired, by holder."""
    with translate_errors("counting sessions"):
        stages: list[Document] = [
            {"$match": {"expires_at": {"$gt": datetime.now(UTC)}}},
            {"$group": {"_id": "$holder", "number": {"$sum": 1}}},
        ]
        return {row["_id"]: row["number"] async for row in await db[COLLECTION].aggregate(stages)}


class BrowserSessions:
    """The sessions that a serving process accepts. It is a listener of the process's change stream.

    Args:
        db: The database.
        revocation_notifier: Is notified when a session ends.
        policy: Identifies the authentication settings. Sessions that were created under others are rejected.
        is_key_valid: Returns whether the API key with an ID is valid.
    """

    collection = COLLECTION

    def __init__(
        self,
        db: Database,
        revocation_notifier: RevocationNotifier,
        *,
        policy: str,
        is_key_valid: Callable[[str], bool],
    ) -> None:
        self._db = db
        self._stored = db.get_collection(COLLECTION, read_concern=MAJORITY)
        self._revocation_notifier = revocation_notifier
        self._policy = policy
        self._is_key_valid = is_key_valid
        self._sessions: dict[str, BrowserSession] = {}
        self._ended: set[str] = set()
        """Digests of sessions that this process has ended. A late report of their insertion must not restore them."""

    async def create(self, principal: Principal, key_id: str | None) -> str:
        """Store a new session and return its secret ID.

        Args:
            principal: Who signs in.
            key_id: The ID of the API key that they sign in with; None for a token.
        """
        session_id, now = secrets.token_urlsafe(32), datetime.now(UTC)
        user_id = principal.user_id or ""
        session = BrowserSession(
            digest=_compute_digest(session_id),
            holder=build_holder(key_id=key_id, user_id=user_id),
            key_id=key_id,
            user_id=user_id,
            groups=sorted(principal.groups),
            roles=sorted(principal.roles),
            policy=self._policy,
            created_at=now,
            expires_at=min(now + SESSION_LIFETIME, principal.valid_until or now + SESSION_LIFETIME),
        )
        with translate_errors("creating a session"):
            await self._db[COLLECTION].insert_one(session.model_dump(by_alias=True))
            # Concurrent sign-ins may delete the same sessions. Each leaves no more than the limit.
            newest = self._stored.find({"holder": session.holder}, {"_id": 1}, sort=[("created_at", -1)])
            surplus = [row["_id"] async for row in newest.skip(MAX_SESSIONS_PER_HOLDER)]
            if surplus:
                await self._db[COLLECTION].delete_many({"_id": {"$in": surplus}})
        return session_id

    async def load_principal(self, session_id: str) -> Principal | None:
        """Return the principal of a session; None if the session or its API key is unknown, expired or revoked."""
        if not _ID.fullmatch(session_id):
            return None
        digest = _compute_digest(session_id)
        if digest in self._ended:
            return None
        session = self._sessions.get(digest)
        if session is None:
            with translate_errors("reading a session"):
                session = _parse_session(await self._stored.find_one({"_id": digest}))
        if session is None or session.policy != self._policy or session.expires_at <= datetime.now(UTC):
            return None
        if session.key_id is not None and not self._is_key_valid(session.key_id):
            return None
        return Principal(session.user_id, frozenset(session.groups), frozenset(session.roles), session.expires_at)

    async def end(self, session_id: str) -> None:
        """End a session."""
        if not _ID.fullmatch(session_id):
            return
        digest = _compute_digest(session_id)
        if self._sessions.pop(digest, None) is not None:
            self._ended.add(digest)
        with translate_errors("ending a session"):
            removed = await self._db[COLLECTION].delete_one({"_id": digest})
        if removed.deleted_count:
            self._ended.add(digest)
        self._revocation_notifier.notify()

    async def resync(self, session: AsyncClientSession) -> None:
        with translate_errors("reading the sessions"):
            parsed = [_parse_session(row) async for row in self._stored.find(session=session)]
        stored = {entry.digest: entry for entry in parsed if entry is not None}
        self._ended &= stored.keys()
        self._sessions = {digest: entry for digest, entry in stored.items() if digest not in self._ended}
        self._revocation_notifier.notify()

    def on_change(self, change: Mapping[str, Any]) -> None:
        digest = change["documentKey"]["_id"]
        if change["operationType"] == "insert" and (inserted := _parse_session(change["fullDocument"])) is not None:
            if digest not in self._ended:
                self._sessions[digest] = inserted
            return
        # Sessions are inserted and deleted, never updated. A session that was updated by hand is not trusted.
        self._sessions.pop(digest, None)
        self._ended.discard(digest)
        self._revocation_notifier.notify()


def _compute_digest(session_id: str) -> str:
    return sha256(session_id.encode()).hexdigest()


def _parse_session(document: Document | None) -> BrowserSession | None:
    try:
        return None if document is None else BrowserSession.model_validate(document)
    except ValidationError:
        _log.warning("ignoring invalid document in browser_sessions")
        return None


class SessionCookieBackend:
    """Authenticates a request by its session cookie, unless it has an `Authorization` header.

    The cookie works only on the dashboard's own pages. A page of another origin (`api.cors_origins`) must send a
    credential.

    Args:
        auth_backend: Authenticates requests without a usable session cookie.
        sessions: None in authentication modes without sessions.
        cookie_name: The name of the session cookie.
    """

    def __init__(self, auth_backend: AuthBackend, sessions: BrowserSessions | None, cookie_name: str) -> None:
        self._auth_backend = auth_backend
        self._sessions = sessions
        self._cookie_name = cookie_name

    async def __call__(self, connection: HTTPConnection) -> Principal:
        session_id = connection.cookies.get(self._cookie_name)
        is_foreign = connection.scope.get("is_foreign_origin", False)
        if self._sessions is None or not session_id or is_foreign or "authorization" in connection.headers:
            return await self._auth_backend(connection)
        try:
            principal = await self._sessions.load_principal(session_id)
        except LedgerUnavailable as error:
            message = "Cannot check the session: the database does not respond. Try again later."
            raise ApiError(503, "database_unavailable", message, retry_after_seconds=2) from error
        if principal is None:
            raise ApiError(401, "invalid_credentials", "The session has ended. Sign in again.")
        connection.scope["uses_session_cookie"] = True
        return principal
