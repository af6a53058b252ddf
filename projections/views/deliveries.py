"""View `deliveries`: the webhook messages, pending and sent, with their attempts.

Fields of a document:
    status: `pending`, `delivered` or `abandoned`.
    next_attempt_at: When a pending delivery is due.
    queued_at: When its retry schedule began.
    counted_attempts: Number of attempts since it was queued last.
    sequence: Its number among the deliveries of its endpoint (projections/views/endpoints.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, Final, assert_never
from urllib.parse import urlsplit

from pymongo import ASCENDING, IndexModel

from jobledger.ledger.domain import events
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.delivery import build_endpoint_id, parse_source
from jobledger.ledger.domain.events import RecordedEvent
from jobledger.ledger.domain.limits import MAX_REASON_CHARACTERS, MAX_RESPONSE_CHARACTERS, truncate_text
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.slots import Views
from jobledger.projections.views import list_index, paging, projection_errors
from jobledger.projections.views.documents import apply_changes, dump_truncated_error
from jobledger.projections.views.list_index import ListQuery
from jobledger.projections.views.paging import PageCursor, PageRequest

NAME: Final = "deliveries"
MAX_ATTEMPTS_SHOWN: Final = 50
"""The document contains the newest attempts. The stream contains all of them."""
PENDING_QUERY: Final = {"status": "pending"}
INDEXES: Final = [
    list_index.LIST_INDEX,
    IndexModel([("next_attempt_at", ASCENDING)], partialFilterExpression=PENDING_QUERY),
]


# Fold ---------------------------------------------------------------------------------------------------------------


def fold(delivery: Document | None, event: RecordedEvent) -> Document:
    """Apply one event of a delivery's stream; see `documents.Fold`. The projection writer sets `sequence`."""
    if delivery is not None and projection_errors.REDUCED_FIELD in delivery:
        return apply_to_isolated(delivery, event)
    payload: Any = event.event
    if isinstance(payload, events.DeliveryQueued):
        return _build_document(payload, event)
    assert delivery is not None  # noqa: S101 - streams begin with their first event
    changes = _build_changes(delivery, payload, event)
    after = apply_changes(delivery, changes, event)
    if "status" in changes:
        _set_list_keys(after)
    return after


def _build_document(queued: events.DeliveryQueued, event: RecordedEvent) -> Document:
    source, endpoint_id = queued.source, build_endpoint_id(queued.user_id, queued.webhook.url)
    delivery: Document = {
        "_id": event.stream,
        "delivery_id": event.stream,
        "status": "pending",
        "type": queued.event_type,
        "job_id": source if source.startswith("job-") else None,
        "batch_id": queued.batch_id,
        "source_version": queued.source_version,
        "url": queued.webhook.url,
        "host": parse_host_and_port(queued.webhook.url),
        "endpoint_id": endpoint_id,
        "sequence": None,
        "user_id": queued.user_id,
        "created_at": event.time,
        "updated_at": event.time,
        "queued_at": event.time,
        "next_attempt_at": event.time,
        "delivered_at": None,
        "reason": None,
        "attempt": 0,
        "counted_attempts": 0,
        "attempts": [],
        "version": event.version,
        "position": event.position,
    }
    _set_list_keys(delivery)
    return delivery


def _set_list_keys(delivery: Document, *, is_reduced: bool = False) -> None:
    facets: list[list_index.Facet] = [
        ("status", delivery["status"]),
        list_index.NO_FACET,
        ("endpoint_id", delivery["endpoint_id"]),
        ("source", parse_source(delivery["_id"])),
        ("host", delivery["host"]),
    ]
    if delivery["batch_id"] is not None:
        facets.append(("batch", delivery["batch_id"]))
    # The owner's name may be truncated in a reduced document, and could then be the name of another user.
    owner = "" if is_reduced else delivery["user_id"]
    delivery["list_keys"] = list_index.build_list_keys(list_index.get_owner_scopes(owner), facets)


def parse_host_and_port(url: str) -> str:
    """Return the host and port of a URL. Deliveries to the same host and port fail together."""
    parts = urlsplit(url)
    return f"{parts.hostname or ''}:{parts.port or {'http': 80, 'https': 443}.get(parts.scheme, 0)}"


def _build_changes(delivery: Document, payload: events.DeliveryEvent, event: RecordedEvent) -> Document:
    """Return the fields that an event changes."""
    match payload:
        case events.DeliveryQueued():
            return {}
        case events.DeliveryAttempted():
            attempt = {"attempted_at": event.time, "error": None, **payload.model_dump()}
            attempt["response"] = truncate_text(payload.response, MAX_RESPONSE_CHARACTERS)
            if payload.error is not None:
                attempt["error"] = dump_truncated_error(payload.error)
            is_pending = delivery["status"] == "pending"
            return {
                "attempt": payload.attempt,
                "counted_attempts": delivery["counted_attempts"] + 1,
                "attempts": [*delivery["attempts"], attempt][-MAX_ATTEMPTS_SHOWN:],
                "next_attempt_at": payload.next_attempt_at if is_pending else delivery["next_attempt_at"],
            }
        case events.DeliverySucceeded():
            return {"status": "delivered", "next_attempt_at": None, "delivered_at": event.time, "reason": None}
        case events.DeliveryAbandoned():
            return {
                "status": "abandoned",
                "next_attempt_at": None,
                "reason": truncate_text(payload.reason, MAX_REASON_CHARACTERS),
            }
        case events.DeliveryRequeued():
            return {
                "status": "pending",
                "counted_attempts": 0,
                "queued_at": event.time,
                "next_attempt_at": event.time,
                "reason": None,
            }
        case _:
            assert_never(payload)


# Isolation of events and documents (projection_errors.py) -----------------------------------------------------------

_STATUS_AFTER: Final = {
    events.DeliverySucceeded.__name__: "delivered",
    events.DeliveryAbandoned.__name__: "abandoned",
    events.DeliveryRequeued.__name__: "pending",
}


def build_placeholder(_event: RecordedEvent) -> None:
    """Return None: without the URL in its first event, a delivery has no document."""


def apply_to_isolated(delivery: Document, event: RecordedEvent) -> Document:
    """Apply an event to an isolated delivery. Only the event's type is used, because it is always readable."""
    status = _STATUS_AFTER.get(event.type, delivery["status"])
    changes = {"status": status, "next_attempt_at": event.time if status == "pending" else None}
    after = apply_changes(delivery, changes, event)
    _set_list_keys(after, is_reduced=projection_errors.REDUCED_FIELD in delivery)
    return after


def reduce_to_storable(delivery: Document) -> Document:
    """Return a document that can be stored, without the fields that may be large."""
    texts = {name: truncate_text(str(delivery[name]), 200) for name in ("url", "host", "user_id")}
    document = {**delivery, **texts, "attempts": [], "reason": None}
    _set_list_keys(document, is_reduced=True)
    return document


# Queries ------------------------------------------------------------------------------------------------------------


async def get(views: Views, delivery_id: str) -> Document | None:
    """Return a delivery's document, or None if it does not exist or the view has not reached it."""
    with translate_errors("reading a delivery"):
        return await views[NAME].find_one({"_id": delivery_id})


async def iter_pending(views: Views, delivery_ids: Sequence[str] | None = None) -> AsyncIterator[Document]:
    """Yield the scheduling fields of the pending deliveries, or of those among `delivery_ids`."""
    fields = dict.fromkeys(("next_attempt_at", "queued_at", "host", "version", "sequence"), 1)
    query = PENDING_QUERY if delivery_ids is None else {"_id": {"$in": list(delivery_ids)}, **PENDING_QUERY}
    with translate_errors("finding pending deliveries"):
        async for delivery in views[NAME].find(query, fields):
            yield delivery


def build_query(
    principal: Principal,
    *,
    source: str | None = None,
    batch_id: str | None = None,
    endpoint_id: str | None = None,
    host: str | None = None,
    status: str | None = None,
    event_type: str | None = None,
    after_sequence: int | None = None,
    created_after: datetime | None = None,
    created_before: datetime | None = None,
) -> ListQuery:
    """Return the query for the matching deliveries that a principal may see; None matches any value."""
    sequence = None if after_sequence is None else {"$gt": after_sequence}
    return list_index.build_query(
        NAME,
        principal,
        {"status": status, "source": source, "endpoint_id": endpoint_id, "batch": batch_id, "host": host},
        conditions={"type": event_type, "sequence": sequence},
        created_after=created_after,
        created_before=created_before,
    )


async def find_page(views: Views, query: ListQuery, request: PageRequest) -> tuple[list[Document], PageCursor | None]:
    """Return a page of deliveries and the cursor of the next one; see `paging.find_page`."""
    return await paging.find_page(views, query, request, projection={"list_keys": 0})
