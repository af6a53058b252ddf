"""projections: the documents that were folded last, within bounds of number and memory."""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import orjson

from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import list_index

CACHED_DOCUMENTS: Final = 20_000
CACHED_BYTES: Final = 128 * 1024 * 1024
"""Of memory, about. 20,000 usual documents take less."""
_FIXED_BYTES: Final = 2000
_VALUE_BYTES: Final = 64
"""What each value of a list or object takes in Python, besides its text."""
_WITHOUT_LIMIT: Final = ("parameters", "results", "error", "logs", "steps", "step_files", "job_ids", "attempts")
"""The fields that may be large, but for those of the list index."""
Key = tuple[str, str]
"""A view, and the key of a document in it."""


class DocumentCache:
    """Documents by view and key. Those that were put in first leave first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Key, tuple[Document, int]] = OrderedDict()
        self.bytes = 0
        """Memory of the kept documents, about."""

    def get(self, key: Key) -> Document | None:
        """Return a document, None if it is not kept."""
        found = self._kept.get(key)
        return found[0] if found is not None else None

    def put(self, key: Key, document: Document | None) -> None:
        """Keep a document instead of the one before; None keeps none."""
        before = self._kept.pop(key, None)
        if before is not None:
            self.bytes -= before[1]
        if document is not None:
            size = before[1] if before is not None and _same_size(*before, document) else memory_of(document)
            self._kept[key] = document, size
            self.bytes += size

    def shrink(self) -> None:
        """Remove documents until the bounds are kept."""
        while len(self._kept) > CACHED_DOCUMENTS or self.bytes > CACHED_BYTES:
            _, (_, size) = self._kept.popitem(last=False)
            self.bytes -= size

    def clear(self) -> None:
        """Remove all documents."""
        self._kept.clear()
        self.bytes = 0


def memory_of(document: Document) -> int:
    """Return about how many bytes a document takes in memory. Takes half a microsecond for a small one."""
    try:
        text = orjson.dumps(tuple(map(document.get, _WITHOUT_LIMIT)), str, orjson.OPT_NON_STR_KEYS)
    except TypeError:  # such a document is not stored whole, and need not be cached
        return CACHED_BYTES
    return _FIXED_BYTES + len(text) + _VALUE_BYTES * text.count(b",") + list_index.memory_of_rows(document)


def _same_size(before: Document, size: int, document: Document) -> bool:
    """Return whether a large document takes what it took before, so that it need not be measured again."""
    if size < 100 * _FIXED_BYTES:
        return False
    return all(document.get(name) is before.get(name) for name in (*_WITHOUT_LIMIT, "headings", "words"))
