"""projections: the view `deliveries`: each webhook that was, or is to be, sent, with every attempt.

`status` is pending, delivered or abandoned; `next_attempt_at` is when a pending one is due; `queued_at` is when its
schedule
began. `sequence` is its number for its receiver (receivers.py).
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from datetime import datetime
from typing import Any, Final, assert_never
from urllib.parse import urlsplit

from pymongo import ASCENDING, IndexModel

from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.events import (
    DELIVERY_EVENTS,
    DeliveryAbandoned,
    DeliveryAttempted,
    DeliveryEvent,
    DeliveryQueued,
    DeliveryRequeued,
    DeliverySucceeded,
    RecordedEvent,
)
from jobledger.ledger.domain.limits import MAX_REASON_CHARACTERS, MAX_RESPONSE_CHARACTERS, truncate_text
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.projections.engine.slots import Views
from jobledger.projections.views import endpoints, list_index, projection_errors
from jobledger.projections.views.jobs import shorten_error
from jobledger.projections.views.list_index import PageCursor

NAME: Final = "deliveries"
MAX_ATTEMPTS_SHOWN: Final = 50  # the newest; all of them are in the stream
MAX_COUNT: Final = 10_000
PENDING_QUERY: Final = {"status": "pending"}
INDEXES: Final = [
    *list_index.INDEXES[:2],
    IndexModel([("next_attempt_at", ASCENDING)], partialFilterExpression=PENDING_QUERY),
]


def fold(delivery: Document | None, event: RecordedEvent) -> Document:
    """Return the delivery's document as it is after one more event of its stream. Its number is for the projector."""
    if delivery is not None and projection_errors.ERROR_FIELD in delivery:
        return _followed(delivery, event)
    happened = event.event
    if isinstance(happened, DeliveryQueued):
        return _queued(happened, event)
    assert delivery is not None  # noqa: S101 - streams begin with their first event
    assert isinstance(happened, DELIVERY_EVENTS)  # noqa: S101 - narrows the type; streams hold events of one kind
    changes = _changes(delivery, happened, event)  # type: ignore[arg-type]  # isinstance with a tuple is not narrowed to the union
    return {**delivery, **changes, "updated_at": event.time, "version": event.version, "position": event.position}


def _queued(asked: DeliveryQueued, event: RecordedEvent) -> Document:
    receiver = endpoints.endpoint_id(asked)
    source, batch_id = asked.source, asked.batch_id
    facets = [("endpoint_id", receiver), ("source", source), ("host", host_and_port(asked.webhook.url))]
    if batch_id is not None:
        facets.append(("batch", batch_id))
    return {
        "_id": event.stream,
        "delivery_id": event.stream,
        "status": "pending",
        "type": asked.event_type,
        "job_id": source if source.startswith("job-") else None,
        "batch_id": batch_id,
        "source_version": asked.source_version,
        "url": asked.webhook.url,
        "host": host_and_port(asked.webhook.url),
        "endpoint_id": receiver,
        "sequence": None,
        "user_id": asked.user_id,
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
        "list_keys": list_index.build_list_keys(
            list_index.scopes_for_owner(asked.user_id), [list_index.NO_FACET, *facets]
        ),
    }


_STATUS_AFTER: Final = {
    DeliverySucceeded.__name__: "delivered",
    DeliveryAbandoned.__name__: "abandoned",
    DeliveryRequeued.__name__: "pending",
}


def isolate(delivery: Document, event: RecordedEvent, problem: Document) -> Document:
    """Return the document of a delivery one of whose events cannot be folded: as it was, with the reason."""
    return _followed({**delivery, projection_errors.ERROR_FIELD: problem}, event)


def _followed(delivery: Document, event: RecordedEvent) -> Document:
    """Return an isolated delivery's document after one more event; of that, only the type counts."""
    status = _STATUS_AFTER.get(event.type, delivery["status"])
    changes = {"status": status, "next_attempt_at": event.time if status == "pending" else None}
    return {**delivery, **changes, "updated_at": event.time, "version": event.version, "position": event.position}


def reduce_to_storable(delivery: Document, problem: Document) -> Document:
    """Return a document that can be stored, of one that cannot: without what may be large."""
    listed = list_index.build_list_keys(list_index.scopes_for_owner(""), [list_index.NO_FACET])
    texts = {name: truncate_text(str(delivery[name]), 200) for name in ("url", "host", "user_id")}
    blank = {"attempts": [], "reason": None, "list_keys": listed}
    return {**delivery, **texts, **blank, projection_errors.REDUCED_FIELD: True, projection_errors.ERROR_FIELD: problem}


def host_and_port(url: str) -> str:
    """Return the host and port of an address: what fails together."""
    parts = urlsplit(url)
    return f"{parts.hostname or ''}:{parts.port or {'http': 80, 'https': 443}.get(parts.scheme, 0)}"


def _changes(delivery: Document, happened: DeliveryEvent, event: RecordedEvent) -> Document:
    match happened:
        case DeliveryQueued():
            return {}
        case DeliveryAttempted():
            shown = {"attempted_at": event.time, "error": None, **happened.model_dump()}
            shown["response"] = truncate_text(happened.response, MAX_RESPONSE_CHARACTERS)
            if happened.error is not None:
                shown["error"] = shorten_error(happened.error)
            pending = delivery["status"] == "pending"
            return {
                "attempt": happened.attempt,
                "counted_attempts": delivery["counted_attempts"] + 1,
                "attempts": [*delivery["attempts"], shown][-MAX_ATTEMPTS_SHOWN:],
                "next_attempt_at": happened.next_attempt_at if pending else delivery["next_attempt_at"],
            }
        case DeliverySucceeded():
            return {"status": "delivered", "next_attempt_at": None, "delivered_at": event.time, "reason": None}
        case DeliveryAbandoned():
            return {
                "status": "abandoned",
                "next_attempt_at": None,
                "reason": truncate_text(happened.reason, MAX_REASON_CHARACTERS),
            }
        case DeliveryRequeued():
            now = event.time
            return {
                "status": "pending",
                "counted_attempts": 0,
                "queued_at": now,
                "next_attempt_at": now,
                "reason": None,
            }
        case _:
            assert_never(happened)


# Questions --------------------------------------------------------------------------------------------------------


async def get(views: Views, delivery_id: str) -> Document | None:
    """Return a delivery's document, None if there is no such delivery, or the views have not reached it."""
    with translate_errors("reading a delivery"):
        return await views[NAME].find_one({"_id": delivery_id})


async def iter_pending(views: Views, delivery_ids: Sequence[str] | None = None) -> AsyncIterator[Document]:
    """Yield what a sender needs to know of every delivery that is still to be made; of these ids only, if given."""
    facts = dict.fromkeys(("next_attempt_at", "queued_at", "host", "version", "sequence"), 1)
    wanted = PENDING_QUERY if delivery_ids is None else {"_id": {"$in": list(delivery_ids)}, **PENDING_QUERY}
    with translate_errors("looking for webhooks to be sent"):
        async for delivery in views[NAME].find(wanted, facts):
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
) -> Document:
    """Return the database query for those of the deliveries asked for that somebody may see; None means any."""
    asked = [("source", source), ("endpoint_id", endpoint_id), ("batch", batch_id), ("host", host)]
    given = [(name, value) for name, value in asked if value is not None]
    wanted: dict[str, Any] = list_index.build_query(principal, given[0] if given else list_index.NO_FACET)
    fields = {"batch": "batch_id", "endpoint_id": "endpoint_id", "host": "host"}
    wanted |= {fields[name]: value for name, value in given[1:]}
    wanted |= {name: value for name, value in (("status", status), ("type", event_type)) if value is not None}
    if after_sequence is not None:
        wanted["sequence"] = {"$gt": after_sequence}
    if created_after or created_before:
        bounds = {"$gt": created_after, "$lt": created_before}
        wanted["created_at"] = {name: value for name, value in bounds.items() if value is not None}
    return wanted


async def find_page(
    views: Views,
    wanted: Document,
    *,
    limit: int,
    skip: int = 0,
    after: PageCursor | None = None,
    newest_first: bool = True,
    max_bytes: int = list_index.MAX_PAGE_BYTES,
) -> tuple[list[Document], PageCursor | None]:
    """Return a page of deliveries in the order in which they were queued, and where the next one begins."""
    with translate_errors("listing deliveries"):
        return await list_index.find_page(
            views[NAME],
            wanted,
            limit=limit,
            skip=skip,
            after=after,
            newest_first=newest_first,
            projection={"list_keys": 0},
            max_bytes=max_bytes,
        )


async def count(views: Views, wanted: Document) -> int:
    """Count deliveries, but never more than `COUNTED_UP_TO`."""
    with translate_errors("counting deliveries"):
        return await list_index.count(views[NAME], wanted, limit=MAX_COUNT)
