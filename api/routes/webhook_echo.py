"""An endpoint for trying out webhooks. It stores what it receives for a day (`webhooks.echo_enabled`)."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any, Final

from bson import ObjectId
from pymongo import ASCENDING, IndexModel
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_principal, require_user_id
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_body_bytes
from jobledger.api.http.errors import ApiError, build_json_response
from jobledger.api.http.validation import parse_query
from jobledger.api.openapi.operation import Operation
from jobledger.api.schemas.webhooks import AnyQuery, WebhookEchoListResponse, WebhookEchoQuery, WebhookEchoResponse
from jobledger.ledger.mongo.connection import Database, Document, translate_errors

COLLECTION: Final = "webhook_echo"
RETENTION: Final = timedelta(days=1)
MAX_BODY_BYTES: Final = 1024 * 1024
_SECRET_HEADERS: Final = frozenset({"authorization", "cookie", "proxy-authorization"})


async def create_indexes(db: Database) -> None:
    """Create the index that deletes stored webhooks after a day."""
    with translate_errors("creating the index of the webhook echo"):
        seconds = int(RETENTION.total_seconds())
        await db[COLLECTION].create_indexes([IndexModel([("received_at", ASCENDING)], expireAfterSeconds=seconds)])


@Operation(
    "POST",
    "/api/events/test-webhook-callback",
    response=WebhookEchoResponse,
    query=AnyQuery,
    can_append_events=False,
    error_codes=("not_found", "content_too_large", "incomplete_body", "unsupported_content_encoding", "server_busy"),
)
async def receive_webhook_echo(request: Request) -> Response:
    """Receive a webhook for a test, if `webhooks.echo_enabled` is on."""
    _check_enabled(request)
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
    with translate_errors("storing a received webhook"):
        await get_api_context(request).db[COLLECTION].insert_one(received)
    return build_json_response({"status": "success", "received": _render(received)})


@Operation(
    "GET",
    "/api/events/test-webhook-callback",
    response=WebhookEchoListResponse,
    query=WebhookEchoQuery,
    error_codes=("not_found",),
)
async def list_webhook_echoes(request: Request) -> Response:
    """List the webhooks that the test endpoint received."""
    _check_enabled(request)
    query, principal = parse_query(request, WebhookEchoQuery), get_principal(request)
    db_query: Document = {} if principal.is_admin else {"user_id": require_user_id(request)}
    with translate_errors("reading received webhooks"):
        cursor = get_api_context(request).db[COLLECTION].find(db_query, sort=[("received_at", -1)], limit=query.limit)
        return build_json_response({"status": "success", "received": [_render(webhook) async for webhook in cursor]})


def _render(received: Document) -> dict[str, Any]:
    return {("id" if name == "_id" else name): value for name, value in received.items()}


def _check_enabled(request: Request) -> None:
    if not get_api_context(request).is_webhook_echo_enabled:
        message = "The webhook echo is disabled. Set `webhooks.echo_enabled: true` in config.yaml to enable it."
        raise ApiError(404, "not_found", message)
