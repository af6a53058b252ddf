"""benchmarks: what is written: events as workers report them, ready to append or as the documents they become."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import count

from jobledger.ledger.domain.events import EventMetadata, JobProgressed
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import new_job_id
from jobledger.ledger.store.envelope import StreamAppend, StreamHead, build_documents

_META = EventMetadata("worker:bench-1", correlation_id="batch-674272d0c1a5e8b3f2a90b11")
_numbers = count(1)


def make_appends(number: int) -> list[StreamAppend]:
    """Return single events for streams of their own."""
    now = datetime.now(UTC)
    return [
        StreamAppend(
            new_job_id(),
            StreamHead(),
            [JobProgressed(attempt=1, step="slides", percent=n % 100, message=f"page {n}")],
            _META,
            now,
        )
        for n in range(number)
    ]


def make_documents(number: int, *, first: int | None = None) -> list[Document]:
    """Return the documents that such events become; numbered from `first`, else with numbers not used before here."""
    made: list[Document] = []
    for append in make_appends(number):
        build_documents(append, made)
    for offset, document in enumerate(made):
        document["_id"] = next(_numbers) if first is None else first + offset
    return made
