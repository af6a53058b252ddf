"""What the documents of jobs, batches and deliveries have in common: how they are folded, and some of their fields."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import ErrorInfo, RecordedEvent, Webhook
from jobledger.ledger.domain.limits import truncate_error
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.slots import Views
from jobledger.projections.views import projection_errors

Fold = Callable[[Document | None, RecordedEvent], Document | None]
"""Applies the next event of a stream to its document, which is not changed, and returns the new document.

None stands for the document before the first event and after the deletion. Raises UnreadableEvent if the event is
damaged, and UnsupportedEvent if a later version of the program wrote it.
"""


# Folding ------------------------------------------------------------------------------------------------------------


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
            return {**document, projection_errors.ERROR_FIELD: projection_errors.build_event_error(event, error)}
    return document


async def load_or_fold(views: Views, event_store: EventStore, view: str, key: str, fold: Fold) -> Document | None:
    """Return a document of a view, or None. If the projector has not reached it yet, fold it from the log.

    Therefore, the submitter of a job or batch can read it immediately.
    """
    with translate_errors(f"reading {key}"):
        document = await views[view].find_one({"_id": key})
    if document is None:
        for event in await event_store.read_stream(key):
            document = fold(document, event)
    return document


def apply_changes(document: Document, changes: Document, event: RecordedEvent) -> Document:
    """Return the document with the changed fields and with the time, version and position of the event."""
    return {**document, **changes, "updated_at": event.time, "version": event.version, "position": event.position}


# Fields -------------------------------------------------------------------------------------------------------------


def dump_truncated_error(error: ErrorInfo) -> Document:
    """Return an error as a document contains it: truncated to its budget."""
    return truncate_error(error).model_dump()


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


def set_name_in_list(document: Document, list_field: str, name: str, *, is_listed: bool) -> None:
    """Add a name to a list in a document, or remove it. Without names, the document has no list.

    The list `truncated` has the fields of which the document contains only a part.
    """
    names = document.get(list_field, ())
    if is_listed == (name in names):
        return
    changed = sorted({*names, name} if is_listed else {*names} - {name})
    document.pop(list_field, None)
    if changed:
        document[list_field] = changed
