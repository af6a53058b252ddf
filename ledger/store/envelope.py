"""The envelope of an event: build the document that is stored, with its position and hash."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Final

import bson
import uuid_utils
from bson.errors import BSONError

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.canonical_json import TextTooLong, try_encode_canonical_json
from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.domain.events import Event, EventMetadata, PositionVoided, truncate_to_milliseconds
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.hash_chain import GENESIS_HASH, build_hash_input
from jobledger.ledger.store.storage_format import find_data_deviation

VOID_STREAM: Final = "void"
MAX_EVENT_BYTES: Final = 8 * 1024 * 1024
"""Half of the largest document, because a change stream wraps each event in another document."""


@dataclass(frozen=True, slots=True)
class StreamHead:
    """The version, position and hash of a stream's last known event."""

    version: int = 0
    position: int = 0
    hash: bytes = GENESIS_HASH


@dataclass(frozen=True, slots=True)
class StreamAppend:
    """Events to append to a stream whose head is `head`. `time` is when they were decided."""

    stream: str
    head: StreamHead
    events: Sequence[Event]
    meta: EventMetadata
    time: datetime


def build_documents(append: StreamAppend, documents: list[Document], max_bytes: int = sys.maxsize) -> int:
    """Append the documents of an append to a list, chained to the stream's head. Positions (`_id`) are assigned
    later.

    Args:
        append: The events.
        documents: The list.
        max_bytes: The maximum size of an event in bytes of JSON. Encoding 8 MB may take a second.

    Returns:
        Their size in bytes of canonical JSON.

    Raises:
        InvalidEvent: An event cannot be hashed, is too large, or exceeds a limit of `domain.limits`.
        TextTooLong: An event is larger than `max_bytes`, or may be. Nothing was added.
    """
    at, meta = truncate_to_milliseconds(append.time), append.meta.to_document()
    version, previous, size, begin = append.head.version, append.head.hash, 0, len(documents)
    for event in append.events:
        version += 1
        document: Document = {
            "_id": 0,
            "event_id": str(uuid_utils.uuid7()),
            "stream": append.stream,
            "version": version,
            "type": type(event).__name__,
            "schema": event.schema_version,
            "time": at,
            "data": event.to_payload(),
            "meta": meta,
            "prev": previous,
        }
        try:
            data = try_encode_canonical_json(document["data"], max_bytes)
            text = build_hash_input(document, data, max_bytes)
        except TextTooLong as long:
            del documents[begin:]
            limits.check_event(event, long.size)  # now, and not after the second that the text may take
            raise
        if data is None and (what := find_data_deviation(document)) is not None:
            raise InvalidEvent(f"a {document['type']} cannot be stored: {what}. Use a text, number, list or object")
        limits.check_event(event, len(text))
        document["hash"] = previous = hashlib.sha256(text).digest()
        # BSON may take nine times as much as JSON.
        if len(text) > MAX_EVENT_BYTES // 10 and (bson_bytes := len(encode_bson(document))) > MAX_EVENT_BYTES:
            raise InvalidEvent(
                f"a {document['type']} of {bson_bytes} bytes is too large: at most {MAX_EVENT_BYTES} are allowed"
            )
        size += len(text)
        documents.append(document)
    return size


def encode_bson(document: Document) -> bytes:
    """Return a document in BSON.

    Raises:
        InvalidEvent: BSON cannot express it.
    """
    try:
        return bson.encode(document)
    except (BSONError, ValueError, OverflowError) as error:
        raise InvalidEvent(f"BSON cannot express this {document['type']}: {error}") from error


def build_void_document(position: int) -> Document:
    """Build the event of a voided position. Its version in the stream `void` is its position, and it has no chain."""
    documents: list[Document] = []
    at = StreamHead(version=position - 1)
    build_documents(StreamAppend(VOID_STREAM, at, [PositionVoided()], EventMetadata(), datetime.now(UTC)), documents)
    [document] = documents
    document["_id"] = position
    return document
