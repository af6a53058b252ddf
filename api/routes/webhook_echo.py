"""api: a receiver of webhooks for trying them out, if `webhooks.sink` is on. It keeps what it was sent for a day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from bson import ObjectId
from pydantic import BaseModel, ConfigDict, Field
from pymongo import ASCENDING, IndexModel
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import signed_in, who_asks
from jobledger.api.context import query_of, services
from jobledger.api.http.bodies import read_bytes
from jobledger.api.http.errors import ApiError, json_response
from jobledger.ledger.mongo.connection import Database, Document, driver_errors

COLLECTION: Final = "webhook_sink"
KEPT: Final = timedelta(days=1)
LARGEST_BODY_BYTES: Final = 1024 * 1024
_MOST_SHOWN: Final = 100
_SECRET_HEADERS: Final = frozenset({"authorization", "cookie", "proxy-authorization"})


class SinkQuery(BaseModel):
    """How much of what was received is shown, the newest first."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=_MOST_SHOWN)


async def prepare(db: Database) -> None:
    """Have what was received removed after a day."""
    with driver_errors("preparing the sink for webhooks"):
        seconds = int(KEPT.total_seconds())
        await db[COLLECTION].create_indexes([IndexModel([("at", ASCENDING)], expireAfterSeconds=seconds)])


async def receive(request: Request) -> Response:
    """POST /api/events/test-webhook-callback"""
    _has_to_be_on(request)
    user_id = signed_in(request)
    received = {
        "_id": str(ObjectId()),
        "at": datetime.now(UTC),
        "user_id": user_id,
        "headers": {
            name: "***" if name in _SECRET_HEADERS else value for name, value in sorted(request.headers.items())
        },
        "body": (await read_bytes(request, LARGEST_BODY_BYTES)).decode(errors="replace"),
    }
    with driver_errors("keeping a webhook that was received"):
        await services(request).db[COLLECTION].insert_one(received)
    return json_response({"status": "success", "received": _shown(received)})


async def listing(request: Request) -> Response:
    """GET /api/events/test-webhook-callback"""
    _has_to_be_on(request)
    asked, principal = query_of(request, SinkQuery), who_asks(request)
    mine: Document = {} if principal.sees_everything else {"user_id": signed_in(request)}
    with driver_errors("reading the webhooks that were received"):
        found = services(request).db[COLLECTION].find(mine, sort=[("at", -1)], limit=asked.limit)
        return json_response({"status": "success", "received": [_shown(it) async for it in found]})


def _shown(received: Document) -> dict[str, Any]:
    return {("id" if name == "_id" else name): value for name, value in received.items()}


def _has_to_be_on(request: Request) -> None:
    if not services(request).webhooks.sink:
        raise ApiError(404, "not_found", "The sink is off; `webhooks.sink: true` in config.yaml turns it on.")
