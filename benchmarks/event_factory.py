"""Create events such as workers report, as appends or as documents."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import count

from jobledger.ledger.domain.events import EventMetadata, JobProgressed
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead, build_documents

_META = EventMetadata("worker:bench-1", correlation_id="batch-674272d0c1a5e8b3f2a90b11")
_positions = count(1)


def make_appends(number: int) -> list[StreamAppend]:
    """Return appends of one event each, to different streams."""
    now = datetime.now(UTC)
    return [
        StreamAppend(
            create_job_id(),
            StreamHead(),
            [JobProgressed(attempt=1, step="slides", percent=n % 100, message=f"page {n}")],
            _META,
            now,
        )
        for n in range(number)
    ]


def make_documents(number: int, *, first: int | None = None) -> list[Document]:
    """Return the documents of such events.

    Args:
        number: Number of documents.
        first: Position of the first document. By default, positions continue those of the previous call.
    """
    documents: list[Document] = []
    for append in make_appends(number):
        build_documents(append, documents)
    for offset, document in enumerate(documents):
        document["_id"] = next(_positions) if first is None else first + offset
    return documents
