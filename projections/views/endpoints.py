"""View `endpoints`: the webhook endpoints and the number of their deliveries. An endpoint is a URL of one user.

The deliveries of an endpoint are numbered 1, 2, 3 and so on in the order of the log (`sequence`). An endpoint
that misses a number can request the missing messages:
`GET /api/monitoring/events/webhooks?endpoint_id=…&after_sequence=…`.
"""

from __future__ import annotations

from typing import Final

from pymongo import IndexModel

from jobledger.ledger.mongo.connection import Document

NAME: Final = "endpoints"
INDEXES: Final[list[IndexModel]] = []


def add_delivery(endpoint: Document | None, delivery: Document) -> Document:
    """Return an endpoint's document with one more delivery. None stands for an endpoint without deliveries."""
    if endpoint is None:
        return {
            "_id": delivery["endpoint_id"],
            "url": delivery["url"],
            "user_id": delivery["user_id"],
            "delivery_count": 1,
            "created_at": delivery["created_at"],
        }
    return {**endpoint, "delivery_count": endpoint["delivery_count"] + 1}
