"""Cache of recently changed view documents, bounded by number and memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import orjson

from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import list_index

MAX_CACHED_DOCUMENTS: Final = 20_000
MAX_CACHED_BYTES: Final = 128 * 1024 * 1024
"""Approximate maximum memory. 20,000 usual documents need less."""
_DOCUMENT_BYTES: Final = 2000
"""Memory of a document without the values of its unbounded fields."""
_VALUE_BYTES: Final = 64
"""Memory of each value in a list or object, in addition to its text."""
_UNBOUNDED_FIELDS: Final = ("parameters", "results", "error", "logs", "steps", "step_files", "job_ids", "attempts")
"""The fields that may be large, except those of the list index."""
DocumentKey = tuple[str, str]
"""Name of a view, and key of a document in it."""


class DocumentCache:
    """Documents by view and key. The oldest entries are evicted first.

    Attributes:
        bytes: Approximate memory of the documents.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[DocumentKey, tuple[Document, int]] = OrderedDict()
        self.bytes = 0

    def get(self, key: DocumentKey) -> Document | None:
        """Return a document, or None if the cache does not contain it."""
        entry = self._entries.get(key)
        return entry[0] if entry is not None else None

    def put(self, key: DocumentKey, document: Document | None) -> None:
        """Add or replace a document. None removes it."""
        before = self._entries.pop(key, None)
        if before is not None:
            self.bytes -= before[1]
        if document is not None:
            size = before[1] if before is not None and _has_same_size(*before, document) else estimate_memory(document)
            self._entries[key] = document, size
            self.bytes += size

    def evict(self) -> None:
        """Remove the oldest documents until the limits are met."""
        while len(self._entries) > MAX_CACHED_DOCUMENTS or self.bytes > MAX_CACHED_BYTES:
            _, (_, size) = self._entries.popitem(last=False)
            self.bytes -= size

    def clear(self) -> None:
        """Remove all documents."""
        self._entries.clear()
        self.bytes = 0


def estimate_memory(document: Document) -> int:
    """Estimate the bytes that a document takes in memory. This takes half a microsecond for a small document."""
    try:
        text = orjson.dumps(tuple(map(document.get, _UNBOUNDED_FIELDS)), str, orjson.OPT_NON_STR_KEYS)
    except TypeError:  # such a document is not stored completely, and need not be cached
        return MAX_CACHED_BYTES
    return (
        _DOCUMENT_BYTES + len(text) + _VALUE_BYTES * text.count(b",") + list_index.estimate_list_index_memory(document)
    )


def _has_same_size(before: Document, size: int, document: Document) -> bool:
    """Return whether a large document has unchanged unbounded fields, so that its size need not be estimated again."""
    if size < 100 * _DOCUMENT_BYTES:
        return False
    return all(document.get(name) is before.get(name) for name in (*_UNBOUNDED_FIELDS, "list_keys", "search_keys"))
