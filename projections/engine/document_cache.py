"""projections: the documents that were folded last, within bounds of number and memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import orjson

from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import list_index

MAX_CACHED_DOCUMENTS: Final = 20_000
MAX_CACHED_BYTES: Final = 128 * 1024 * 1024
"""Of memory, about. 20,000 usual documents take less."""
_FIXED_BYTES: Final = 2000
_VALUE_BYTES: Final = 64
"""What each value of a list or object takes in Python, besides its text."""
_UNBOUNDED_FIELDS: Final = ("parameters", "results", "error", "logs", "steps", "step_files", "job_ids", "attempts")
"""The fields that may be large, but for those of the list index."""
DocumentKey = tuple[str, str]
"""A view, and the key of a document in it."""


class DocumentCache:
    """Documents by view and key. Those that were put in first leave first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[DocumentKey, tuple[Document, int]] = OrderedDict()
        self.bytes = 0
        """Memory of the kept documents, about."""

    def get(self, key: DocumentKey) -> Document | None:
        """Return a document, None if it is not kept."""
        found = self._kept.get(key)
        return found[0] if found is not None else None

    def put(self, key: DocumentKey, document: Document | None) -> None:
        """Keep a document instead of the one before; None keeps none."""
        before = self._kept.pop(key, None)
        if before is not None:
            self.bytes -= before[1]
        if document is not None:
            size = before[1] if before is not None and _same_size(*before, document) else estimate_memory(document)
            self._kept[key] = document, size
            self.bytes += size

    def evict(self) -> None:
        """Remove documents until the bounds are kept."""
        while len(self._kept) > MAX_CACHED_DOCUMENTS or self.bytes > MAX_CACHED_BYTES:
            _, (_, size) = self._kept.popitem(last=False)
            self.bytes -= size

    def clear(self) -> None:
        """Remove all documents."""
        self._kept.clear()
        self.bytes = 0


def estimate_memory(document: Document) -> int:
    """Return about how many bytes a document takes in memory. Takes half a microsecond for a small one."""
    try:
        text = orjson.dumps(tuple(map(document.get, _UNBOUNDED_FIELDS)), str, orjson.OPT_NON_STR_KEYS)
    except TypeError:  # such a document is not stored whole, and need not be cached
        return MAX_CACHED_BYTES
    return _FIXED_BYTES + len(text) + _VALUE_BYTES * text.count(b",") + list_index.estimate_list_index_memory(document)


def _same_size(before: Document, size: int, document: Document) -> bool:
    """Return whether a large document takes what it took before, so that it need not be measured again."""
    if size < 100 * _FIXED_BYTES:
        return False
    return all(document.get(name) is before.get(name) for name in (*_UNBOUNDED_FIELDS, "list_keys", "search_keys"))
