"""Appends that wait to be written, and their outcomes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final

from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.envelope import encode_bson

_MESSAGE_BYTES: Final = 15 * 1024 * 1024
"""BSON bytes in one insert command. The driver limits a command that it gets as a document to 16 MB."""
_BSON_FACTOR: Final = 9
"""BSON takes up to this many times the bytes of canonical JSON: 17 bytes for `0,` in a long list."""
MAX_JSON_BYTES_PER_WRITE: Final = _MESSAGE_BYTES // _BSON_FACTOR

OnDone = Callable[[Exception | None], None]


@dataclass(slots=True, eq=False)
class PendingAppend:
    """The documents of one append. `size` is in bytes of JSON.

    `on_done` is called when the documents are durable, or with the error. It may be called again, without effect.

    `next_document` continues the stream of the only document. It is tried once, and its outcome is not reported.
    """

    documents: list[Document]
    size: int
    based_on_position: int
    """The largest position that the decision was based on. The new positions must be larger."""
    deadline: float
    on_done: OnDone
    next_document: Document | None = None
    next_position: int | None = None
    """Its position after it was sent, until it is known whether the position is used."""


class AppendOutcomes:
    """The outcomes of appends that one caller waits for. Cancelling the caller does not cancel their writes."""

    def __init__(self, count: int) -> None:
        self._missing = set(range(count))
        self._new: list[tuple[int, Exception | None]] = []
        self._changed = asyncio.Event()

    def set(self, index: int, error: Exception | None) -> None:
        """Set the outcome of one append, unless it is set. None: it succeeded."""
        if index in self._missing:
            self._missing.discard(index)
            self._new.append((index, error))
            self._changed.set()

    async def wait(self) -> list[tuple[int, Exception | None]]:
        """Wait for outcomes and return the new ones by index, all that one write has. Empty if there are no more."""
        if not self._new and self._missing:
            self._changed.clear()
            await self._changed.wait()
        new, self._new = self._new, []
        return new


def split_into_messages(append: PendingAppend) -> Iterator[list[Document]]:
    """Split documents into commands that the server accepts. Only a very large append needs more than one."""
    if append.size <= MAX_JSON_BYTES_PER_WRITE:
        yield append.documents
        return
    part: list[Document] = []
    size = 0
    for document in append.documents:
        length = len(encode_bson(document))
        if part and size + length > _MESSAGE_BYTES:
            yield part
            part, size = [], 0
        part.append(document)
        size += length
    yield part


def find_encoding_error(append: PendingAppend) -> InvalidEvent | None:
    """Return why BSON cannot express one of the documents, or None."""
    try:
        for document in append.documents:
            encode_bson(document)
    except InvalidEvent as error:
        return error
    return None


def resolve_appends(appends: Iterable[PendingAppend], error: Exception | None = None) -> None:
    """Report the outcome of appends: they are durable, or failed with an error."""
    for append in appends:
        append.on_done(error)
