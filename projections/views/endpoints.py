"""projections: the view `receivers`, to whom webhooks go: an address, for one user. It counts what each is told.

So every delivery has a number, `sequence`, 1, 2, 3 … for its receiver, in the order of the log: who misses one notices,
and asks `GET /api/monitoring/events/webhooks?endpoint_id=…&after_sequence=…` for it.
"""

from __future__ import annotations

from typing import Final

from pymongo import IndexModel

from jobledger.ledger.domain.delivery import endpoint_id_for
from jobledger.ledger.domain.events import DeliveryQueued
from jobledger.ledger.mongo.connection import Document

NAME: Final = "endpoints"
INDEXES: Final[list[IndexModel]] = []


def endpoint_id(queued: DeliveryQueued) -> str:
    """Return whose delivery it is."""
    return endpoint_id_for(queued.user_id, queued.webhook.url)


def add_delivery(receiver: Document | None, delivery: Document) -> Document:
    """Return a receiver's document as it is after one more delivery."""
    if receiver is None:
        facts = {"_id": delivery["endpoint_id"], "url": delivery["url"], "user_id": delivery["user_id"]}
        return {**facts, "delivery_count": 1, "created_at": delivery["created_at"]}
    return {**receiver, "delivery_count": receiver["delivery_count"] + 1}
