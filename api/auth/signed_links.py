"""api: signed links, which open one file without sign-in until they expire.

What is signed names the path, the content, the job and the end: a link leads to just this file, and to nothing once the
file is deleted or another has taken its place. Nothing is recorded of a link; whoever has it may pass it on.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from datetime import datetime
from typing import Final
from urllib.parse import quote, urlsplit

from pymongo import ReturnDocument
from starlette.requests import HTTPConnection

from jobledger.api.auth.permissions import AuthBackend
from jobledger.api.http.errors import ApiError
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.mongo.connection import Database, Document, translate_errors

FILES_URL: Final = "/api/events/files/"
MAX_LIFETIME_SECONDS: Final = 30 * 86_400
COLLECTION: Final = "secrets"
_KEY_BYTES: Final = 32


class SignedLinks:
    """Makes links and checks them, with a key that all processes share: it is made once, and kept in the database.

    Whoever removes the key (`secrets`, `_id: links`) and starts the API anew has made all links void.
    """

    def __init__(self, db: Database, public_url: str | None) -> None:
        self._db = db
        self._public_url = (public_url or "").rstrip("/")
        self.path_prefix = urlsplit(self._public_url).path
        """The path under which a proxy offers the API: empty, or such as `/tools/jobs`."""
        self._key: bytes | None = None

    @property
    def base_url(self) -> str:
        """The address of the API as an OpenAPI document names it."""
        return self._public_url or "/"

    async def create(self, file: Document, expires_at: datetime) -> str:
        """Return a link to a row of the view `files`, good `until` then (in whole seconds).

        It is a whole address if `api.public_url` is set, else one on this server.

        Raises:
            LedgerUnavailable: the database failed.
        """
        expires = str(int(expires_at.timestamp()))
        signature = await self._signature(file, expires)
        path = FILES_URL + quote(file["path"], safe="/&,+;=@!$~")
        return f"{self._public_url}{path}?expires={expires}&signature={signature}"

    async def verify(self, file: Document | None, *, expires: str, signature: str, now: datetime) -> None:
        """Make sure that a link opens this file; None if nothing is under its path.

        Raises:
            ApiError: 403, when it has expired or is not one that was made here.
            LedgerUnavailable: the database failed.
        """
        right = await self._signature(file, expires) if file is not None else secrets.token_hex(_KEY_BYTES)
        genuine = hmac.compare_digest(right.encode(), signature.encode())
        if not expires.isascii() or not expires.isdecimal() or len(expires) > 15:
            raise _altered()
        if int(expires) <= now.timestamp():
            raise ApiError(403, "link_expired", "This link has expired: ask for a new one.")
        if not genuine:
            raise _altered()

    async def _signature(self, file: Document, expires: str) -> str:
        # The path comes last: only it may hold a line break.
        signed = f"{expires}\n{file['job_id']}\n{file['sha256']}\n{file['path']}"
        return hmac.new(await self._shared_key(), signed.encode(), hashlib.sha256).hexdigest()

    async def _shared_key(self) -> bytes:
        if self._key is None:
            with translate_errors("reading the key of signed links"):
                kept = await self._db[COLLECTION].find_one_and_update(
                    {"_id": "links"},
                    {"$setOnInsert": {"key": secrets.token_bytes(_KEY_BYTES)}},
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
            assert kept is not None  # noqa: S101 - narrows the type; it has been inserted if it was not there
            self._key = bytes(kept["key"])
        return self._key


def _altered() -> ApiError:
    return ApiError(403, "link_invalid", "This link has been altered, or what it led to is no longer there.")


def is_signed_link_request(connection: HTTPConnection) -> bool:
    """Return whether a request comes by a signed link: whether it is a good one is for the route to check."""
    reads = connection.scope["method"] in ("GET", "HEAD") and connection.scope["path"].startswith(FILES_URL)
    return reads and "signature" in connection.query_params


class SignedLinkBackend:
    """Nobody has to say who they are when they come by a signed link; all others do."""

    def __init__(self, auth_backend: AuthBackend) -> None:
        self._sign_in = auth_backend

    async def __call__(self, connection: HTTPConnection) -> Principal:
        return Principal(None) if is_signed_link_request(connection) else await self._sign_in(connection)
