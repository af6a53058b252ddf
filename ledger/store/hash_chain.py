"""The hash chain over a stream: each event holds the hash of the event before it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import orjson

from jobledger.ledger.domain.canonical_json import JSON_OPTIONS, encode_canonical_json, encode_timestamp
from jobledger.ledger.domain.errors import InvalidEvent

GENESIS_HASH = bytes(32)
"""`prev` of a stream's first event."""
_HASH_INPUT = (
    b'{"data":%b,"event_id":%b,"meta":%b,"prev":"%b","schema":%d,"stream":%b,"time":%b,"type":%b,"version":%d}'
)


def build_hash_input(document: Mapping[str, Any], data: bytes | None = None, max_bytes: int = sys.maxsize) -> bytes:
    """Return the bytes whose SHA-256 is an event's hash: the canonical JSON of all its fields but `_id` and `hash`.

    The field names are in order, so a template suffices. Only `data` needs the general encoder.

    Args:
        document: The event.
        data: The result of `try_encode_canonical_json` for its `data`, if the caller has it.
        max_bytes: As in `encode_canonical_json`.

    Raises:
        InvalidEvent: As `encode_canonical_json`.
        TextTooLong: As `encode_canonical_json`.
    """
    try:
        return _HASH_INPUT % (
            data or encode_canonical_json(document["data"], max_bytes),
            orjson.dumps(document["event_id"]),
            orjson.dumps(document["meta"], option=JSON_OPTIONS),
            document["prev"].hex().encode(),
            document["schema"],
            orjson.dumps(document["stream"]),
            encode_timestamp(document["time"]),
            orjson.dumps(document["type"]),
            document["version"],
        )
    except orjson.JSONEncodeError as error:
        raise InvalidEvent(f"this cannot be written as JSON: {error}") from error
