"""api: a receiver of webhooks for trying them out, if `webhooks.echo_enabled` is on. It keeps what it was sent for a
day."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from bson import ObjectId
from pydantic import BaseModel, ConfigDict, Field
from pymongo import ASCENDING, IndexModel
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_principal, require_user_id
from jobledger.api.context import get_api_context, parse_query
from jobledger.api.http.bodies import read_body_bytes
from jobledger.api.http.errors import ApiError, json_response
from jobledger.ledger.mongo.connection import Database, Document, translate_errors

COLLECTION: Final = "webhook_echo"
RETENTION: Final = timedelta(days=1)
MAX_BODY_BYTES: Final = 1024 * 1024
_MOST_SHOWN: Final = 100
_SECRET_HEADERS: Final = frozenset({"authorization", "cookie", "proxy-authorization"})


class WebhookEchoQuery(BaseModel):
    """How much of what was received is shown, the newest first."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(20, ge=1, le=_MOST_SHOWN)


async def create_indexes(db: Database) -> None:
    """Have what was received removed after a day."""
    with translate_errors("preparing the sink for webhooks"):
        seconds = int(RETENTION.total_seconds())
        await db[COLLECTION].create_indexes([IndexModel([("received_at", ASCENDING)], expireAfterSeconds=seconds)])


async def receive_webhook_echo(request: Request) -> Response:
    """POST /api/events/test-webhook-callback"""
    _has_to_be_on(request)
    user_id = require_user_id(request)
    received = {
        "_id": str(ObjectId()),
        "received_at": datetime.now(UTC),
        "user_id": user_id,
        "headers": {
            name: "***" if name in _SECRET_HEADERS else value for name, value in sorted(request.headers.items())
        },
        "body": (await read_body_bytes(request, MAX_BODY_BYTES)).decode(errors="replace"),
    }
    with translate_errors("keeping a webhook that was received"):
        await get_api_context(request).db[COLLECTION].insert_one(received)
    return json_response({"status": "success", "received": _shown(received)})


async def list_webhook_echoes(request: Request) -> Response:
    """GET /api/events/test-webhook-callback"""
    _has_to_be_on(request)
    asked, principal = parse_query(request, WebhookEchoQuery), get_principal(request)
    mine: Document = {} if principal.is_admin else {"user_id": require_user_id(request)}
    with translate_errors("reading the webhooks that were received"):
        found = get_api_context(request).db[COLLECTION].find(mine, sort=[("received_at", -1)], limit=asked.limit)
        return json_response({"status": "success", "received": [_shown(it) async for it in found]})


def _shown(received: Document) -> dict[str, Any]:
    return {("id" if name == "_id" else name): value for name, value in received.items()}


def _has_to_be_on(request: Request) -> None:
    if not get_api_context(request).webhook_options.echo_enabled:
        raise ApiError(404, "not_found", "The sink is off; `webhooks.echo_enabled: true` in config.yaml turns it on.")
