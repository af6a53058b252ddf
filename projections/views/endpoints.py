"""projections: the view `receivers`, to whom webhooks go: an address, for one user. It counts what each is told.

So every delivery has a number, `sequence`, 1, 2, 3 … for its receiver, in the order of the log: who misses one notices,
and asks `GET /api/monitoring/events/webhooks?receiver=…&after_sequence=…` for it.
"""

from __future__ import annotations

from typing import Final

from pymongo import IndexModel

from jobledger.ledger.domain.delivery import receiver_of
from jobledger.ledger.domain.events import DeliveryQueued
from jobledger.ledger.mongo.connection import Document

NAME: Final = "receivers"
INDEXES: Final[list[IndexModel]] = []


def key(queued: DeliveryQueued) -> str:
    """Return whose delivery it is."""
    return receiver_of(queued.user_id, queued.webhook.url)


def with_one_more(receiver: Document | None, delivery: Document) -> Document:
    """Return a receiver's document as it is after one more delivery."""
    if receiver is None:
        facts = {"_id": delivery["receiver"], "url": delivery["url"], "user_id": delivery["user_id"]}
        return {**facts, "deliveries": 1, "first_at": delivery["created_at"]}
    return {**receiver, "deliveries": receiver["deliveries"] + 1}
