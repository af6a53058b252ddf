"""What the documents of jobs, batches and deliveries have in common: how they are folded, and some of their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import Failure, RecordedEvent, Webhook
from jobledger.ledger.domain.limits import truncate_failure
from jobledger.ledger.mongo.connection import Document
from jobledger.projections.views import projection_errors

Fold = Callable[[Document | None, RecordedEvent], Document | None]
"""Returns the document after an event, from the document before it. None: the document does not exist."""


def fold_events(fold: Fold, events: Iterable[RecordedEvent]) -> Document | None:
    """Return the document after the events. At the first unreadable event, stop and name it in `projection_error`.

    Raises:
        UnreadableEvent: The first event cannot be read.
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


def shorten_error(error: Failure) -> Document:
    """Return an error as a document contains it: truncated to its budget."""
    return truncate_failure(error).model_dump()


def redact_webhook(webhook: Webhook | None) -> Document | None:
    """Return a webhook without its secrets: header names, but not their values."""
    if webhook is None:
        return None
    return {
        "url": webhook.url,
        "headers": dict.fromkeys(webhook.header_names, "***"),
        "include_markdown": webhook.include_markdown,
        "include_metadata": webhook.include_metadata,
        "has_own_secrets": webhook.has_own_secrets,
    }


def mark_truncated(document: Document, name: str, *, truncated: bool) -> None:
    """Record in `truncated` whether the document contains only a part of a field."""
    set_field_flag(document, "truncated", name, is_set=truncated)


def set_field_flag(document: Document, flag: str, name: str, *, is_set: bool) -> None:
    """Add a field name to the list `flag` of a document, or remove it. A document has no empty list."""
    names = document.get(flag, ())
    if is_set == (name in names):
        return
    changed = sorted({*names, name} if is_set else {*names} - {name})
    document.pop(flag, None)
    if changed:
        document[flag] = changed
