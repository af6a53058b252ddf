"""ledger: the envelope of an event: from an event to the document that is stored, with its place and hash, and back."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

import bson
import uuid_utils
from bson.errors import BSONError

from ledger.chain import GENESIS, chained_text
from ledger.errors import InvalidEvent
from ledger.events import EVENT_TYPES, Event, Meta, PositionVoided, Recorded, milliseconds
from ledger.mongo import Document

VOID_STREAM: Final = "void"
LARGEST_EVENT_BYTES: Final = 8 * 1024 * 1024
"""Half of what the database takes in one document; a change stream wraps each event in another."""


@dataclass(frozen=True, slots=True)
class Head:
    """How far a stream is known: its last event's version, position and hash."""

    version: int = 0
    position: int = 0
    hash: bytes = GENESIS


@dataclass(frozen=True, slots=True)
class Append:
    """Events to go to the end of a stream that is still at `head`. `time` is when they were decided."""

    stream: str
    head: Head
    events: Sequence[Event]
    meta: Meta
    time: datetime


def parse(document: Mapping[str, Any]) -> Recorded:
    """Return the event that a document of `events` holds."""
    meta = document["meta"]
    return Recorded(
        position=int(document["_id"]),
        event_id=document["event_id"],
        stream=document["stream"],
        version=int(document["version"]),
        time=document["time"],
        event=EVENT_TYPES[document["type"]].model_validate(document["data"]),
        meta=Meta(**meta),
        hash=document["hash"],
    )


def recorded(document: Document, event: Event, meta: Meta) -> Recorded:
    """Return the event that was just written as `document`, without reading it again."""
    return Recorded(
        document["_id"],
        document["event_id"],
        document["stream"],
        document["version"],
        document["time"],
        event,
        meta,
        document["hash"],
    )


def documents_of(append: Append) -> Iterable[Document]:
    """Return an append's documents, chained to the stream's head; their positions (`_id`) are still to come.

    Raises:
        InvalidEvent: an event cannot be hashed, or is too large.
    """
    previous, version = append.head.hash, append.head.version
    for event in append.events:
        version += 1
        document = _document(append.stream, version, event, append.meta, append.time, previous)
        previous = document["hash"]
        yield document


def _document(stream: str, version: int, event: Event, meta: Meta, at: datetime, previous: bytes) -> Document:
    document: Document = {
        "_id": 0,
        "event_id": str(uuid_utils.uuid7()),
        "stream": stream,
        "version": version,
        "type": type(event).__name__,
        "schema": event.schema_version,
        "time": milliseconds(at),
        "data": event.payload(),
        "meta": meta.payload(),
        "prev": previous,
    }
    text = chained_text(document)
    document["hash"] = hashlib.sha256(text).digest()
    if len(text) > LARGEST_EVENT_BYTES // 10:  # BSON takes up to nine times as much: 17 bytes for `0,` in a list
        _refuse_too_large(document)
    return document


def _refuse_too_large(document: Document) -> None:
    size = len(encoded(document))
    if size > LARGEST_EVENT_BYTES:
        raise InvalidEvent(f"a {document['type']} of {size} bytes is too large: {LARGEST_EVENT_BYTES} can be stored")


def encoded(document: Document) -> bytes:
    """Return a document in BSON, as the database takes it.

    Raises:
        InvalidEvent: BSON has no form for it.
    """
    try:
        return bson.encode(document)
    except (BSONError, ValueError, OverflowError) as error:
        raise InvalidEvent(f"the database has no form for this {document['type']}: {error}") from error


def void_document(position: int) -> Document:
    """A voided position is a stream of its own kind: its version is its position, and it begins no chain."""
    document = _document(VOID_STREAM, position, PositionVoided(), Meta(), datetime.now(UTC), GENESIS)
    document["_id"] = position
    return document
