"""Idempotency-Key: repeat a request without repeating its effect.

Keys need no store of their own. The ID of a submitted job or batch is derived from the key, so the event store rejects
a second submission. The events of each such request hold its fingerprint. A key therefore works for as long as the
events are kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, Final

import orjson
from starlette.requests import Request

from jobledger.api.auth.permissions import get_actor, require_user_id
from jobledger.api.http.errors import ApiError
from jobledger.ledger.domain.events import EventMetadata, RecordedEvent

_KEY: Final = re.compile(r"[\x21-\x7e]{1,200}")


@dataclass(frozen=True, slots=True)
class RequestFingerprint:
    """Identifies a request with an Idempotency-Key. Its text is `request_fingerprint` of the events it causes.

    Attributes:
        key_digest: Digest of the user, method, path and key.
        body_digest: Digest of the parsed body.
    """

    key_digest: str
    body_digest: str

    @classmethod
    def from_request(cls, request: Request, content: Any) -> RequestFingerprint | None:
        """Return the fingerprint of a request with this parsed body; None without an Idempotency-Key.

        Raises:
            ApiError: 400, the key is malformed; 401, the principal is anonymous.
        """
        value = request.headers.get("idempotency-key")
        if value is None:
            return None
        if not _KEY.fullmatch(value):
            message = "Malformed Idempotency-Key: expected 1 to 200 visible ASCII characters, for example a UUID."
            raise ApiError(400, "malformed_idempotency_key", message)
        user_id = require_user_id(request)
        return cls(
            _compute_digest(user_id, request.method, request.url.path, value), _compute_digest(_serialize(content))
        )

    def __str__(self) -> str:
        return f"{self.key_digest} {self.body_digest}"

    def derive_id(self, number: int = 0) -> str:
        """Return 24 hexadecimal digits for the ID of the `number`th resource that the request creates.

        The IDs of a request are in ascending order, as those of a request without a key: lists sort jobs of the same
        time by ID. 80 bits of the digest keep the IDs of different keys apart.
        """
        return f"{self.key_digest[:20]}{number:04x}"

    def find_in(self, events: Iterable[RecordedEvent]) -> RecordedEvent | None:
        """Return the last event that an earlier request with this key has caused; None if there is none.

        Raises:
            ApiError: 422, the earlier request had another body.
        """
        caused = [
            event for event in events if (event.meta.request_fingerprint or "").partition(" ")[0] == self.key_digest
        ]
        if not caused:
            return None
        if caused[-1].meta.request_fingerprint != str(self):
            message = "This Idempotency-Key was used with another body. Use a new key for a new request."
            raise ApiError(422, "idempotency_key_reused", message)
        return caused[-1]


def build_metadata(
    request: Request, fingerprint: RequestFingerprint | None, batch_id: str | None = None
) -> EventMetadata:
    """Return the metadata of the events that a request causes.

    Raises:
        ApiError: 401, the principal is anonymous.
    """
    text = None if fingerprint is None else str(fingerprint)
    return EventMetadata(get_actor(request), batch_id, request_fingerprint=text)


def _serialize(content: Any) -> str:
    try:
        return orjson.dumps(content, option=orjson.OPT_SORT_KEYS).decode()
    except orjson.JSONEncodeError:
        return json.dumps(content, sort_keys=True)  # integers beyond 64 bits, which orjson cannot encode


def _compute_digest(*parts: str) -> str:
    text = "\0".join(parts)
    return blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()
