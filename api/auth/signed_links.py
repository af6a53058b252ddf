"""Signed links, which give access to one file without authentication until they expire.

The signature covers the path, the content, the job and the expiry. A link is therefore invalid after the file is
deleted or replaced. Links are not stored. Anyone with a link can use it.
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
COLLECTION: Final = "secrets"
_KEY_BYTES: Final = 32


class SignedLinks:
    """Creates and verifies links with a key that all processes share. The first use stores the key in the database.

    To revoke all links, delete the key (collection `secrets`, `_id: links`) and restart the API.
    """

    def __init__(self, db: Database, public_url: str | None) -> None:
        self._db = db
        self._public_url = (public_url or "").rstrip("/")
        self.path_prefix = urlsplit(self._public_url).path
        """The path of `api.public_url`, such as `/tools/jobs`; may be empty."""
        self._key: bytes | None = None

    async def create(self, file: Document, expires_at: datetime) -> str:
        """Return a link to a file that is valid until `expires_at`, rounded down to seconds.

        The link is an absolute URL if `api.public_url` is set, otherwise a path. `file` is a document of the view
        `files`.

        Raises:
            LedgerUnavailable: The database failed.
        """
        expires = str(int(expires_at.timestamp()))
        signature = await self._compute_signature(file, expires)
        path = FILES_URL + quote(file["path"], safe="/&,+;=@!$~")
        return f"{self._public_url}{path}?expires={expires}&signature={signature}"

    async def verify(self, file: Document | None, *, expires: str, signature: str, now: datetime) -> None:
        """Check that a link is valid for a file. The file is None if none has the path.

        Raises:
            ApiError: 403, the link has expired or its signature is wrong.
            LedgerUnavailable: The database failed.
        """
        expected = await self._compute_signature(file, expires) if file is not None else secrets.token_hex(_KEY_BYTES)
        is_genuine = hmac.compare_digest(expected.encode(), signature.encode())
        is_well_formed = expires.isascii() and expires.isdecimal() and len(expires) <= 15
        if is_well_formed and int(expires) <= now.timestamp():
            raise ApiError(403, "link_expired", "The link has expired. Request a new one.")
        if not is_well_formed or not is_genuine:
            message = "The link is invalid: it was altered, or its file no longer exists."
            raise ApiError(403, "link_invalid", message)

    async def _compute_signature(self, file: Document, expires: str) -> str:
        # The path is last, because only it may contain a line break.
        content = f"{expires}\n{file['job_id']}\n{file['sha256']}\n{file['path']}"
        return hmac.new(await self._load_key(), content.encode(), hashlib.sha256).hexdigest()

    async def _load_key(self) -> bytes:
        if self._key is None:
            with translate_errors("reading the key of signed links"):
                document = await self._db[COLLECTION].find_one_and_update(
                    {"_id": "links"},
                    {"$setOnInsert": {"key": secrets.token_bytes(_KEY_BYTES)}},
                    upsert=True,
                    return_document=ReturnDocument.AFTER,
                )
            assert document is not None  # noqa: S101 - narrows the type: an upsert returns a document
            self._key = bytes(document["key"])
        return self._key


def is_signed_link_request(connection: HTTPConnection) -> bool:
    """Return whether a request uses a signed link. The route verifies the link."""
    is_file_read = connection.scope["method"] in ("GET", "HEAD") and connection.scope["path"].startswith(FILES_URL)
    return is_file_read and "signature" in connection.query_params


class SignedLinkBackend:
    """Treats requests with a signed link as anonymous. Passes all others to the next backend."""

    def __init__(self, auth_backend: AuthBackend) -> None:
        self._auth_backend = auth_backend

    async def __call__(self, connection: HTTPConnection) -> Principal:
        return Principal(None) if is_signed_link_request(connection) else await self._auth_backend(connection)
