"""Fold the events of one stream into a view document, also as of a point in the past."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import datetime

from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.engine.as_of import PointInTime
from jobledger.projections.views import projection_errors


def as_of_filter(as_of: PointInTime) -> Callable[[RecordedEvent], bool]:
    """Return a predicate for the events up to a position of the log or a time, inclusive."""
    if isinstance(as_of, int):
        return lambda event: event.position <= as_of
    return lambda event: isinstance(event.document.get("time"), datetime) and event.time <= as_of


def events_up_to(events: Sequence[RecordedEvent], last: RecordedEvent) -> list[RecordedEvent]:
    """Return the events of a stream up to one of them, inclusive."""
    return [event for event in events if event.version <= last.version]


def fold_events(
    fold: Callable[[Document | None, RecordedEvent], Document | None], events: Iterable[RecordedEvent]
) -> Document | None:
    """Return the document after the events. At the first unreadable event, stop and name it in `projection_error`.

    Raises:
        UnreadableEvent: the first event cannot be read.
    """
    document: Document | None = None
    for event in events:
        try:
            document = fold(document, event)
        except UnreadableEvent as error:
            if document is None:
                raise
            return {**document, projection_errors.ERROR_FIELD: projection_errors.event_problem(event, error)}
    return document
