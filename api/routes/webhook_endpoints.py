"""api: endpoints of webhooks and their signing secrets. A secret is shown once: when it is created or rotated."""

from __future__ import annotations

from datetime import timedelta
from typing import Final

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_principal, require_user_id
from jobledger.api.context import get_api_context, parse_query
from jobledger.api.http.bodies import read_optional_json_body
from jobledger.api.http.errors import ApiError, json_response
from jobledger.ledger.store import endpoint_secrets

_LONGEST_GRACE_SECONDS: Final = 30 * 86_400


class EndpointListQuery(BaseModel):
    """Which endpoints: your own; for admins, those of all users. `after`: the last `endpoint_id` of the page before."""

    model_config = ConfigDict(extra="forbid")

    limit: int = Field(100, ge=1, le=1000)
    after: str = Field("", max_length=100)


class RotateSecretBody(BaseModel):
    """How long the old secret signs beside the new one, in seconds. 0: it stops at once."""

    model_config = ConfigDict(extra="forbid")

    grace_period_s: int = Field(86_400, strict=True, ge=0, le=_LONGEST_GRACE_SECONDS)


async def list_webhook_endpoints(request: Request) -> Response:
    """GET /api/monitoring/events/webhook-endpoints"""
    asked, mine = parse_query(request, EndpointListQuery), require_user_id(request)
    user_id = None if get_principal(request).is_admin else mine
    found = await endpoint_secrets.list_endpoints(
        get_api_context(request).db, user_id=user_id, limit=asked.limit, after=asked.after
    )
    return json_response({"status": "success", "endpoints": found})


async def rotate_endpoint_secret(request: Request) -> Response:
    """POST /api/monitoring/events/webhook-endpoints/{endpoint_id}/rotate-secret"""
    body, _ = await read_optional_json_body(request, RotateSecretBody)
    endpoint_id = await _own(request)
    shown = await endpoint_secrets.rotate_secret(
        get_api_context(request).db, endpoint_id, timedelta(seconds=body.grace_period_s)
    )
    if shown is None:
        raise _not_found(endpoint_id)
    return json_response({"status": "success", **shown.to_response()}, headers={"Cache-Control": "no-store"})


async def revoke_endpoint_secret(request: Request) -> Response:
    """DELETE /api/monitoring/events/webhook-endpoints/{endpoint_id}/secret"""
    endpoint_id = await _own(request)
    if not await endpoint_secrets.revoke_secrets(get_api_context(request).db, endpoint_id):
        raise _not_found(endpoint_id)
    return json_response({"status": "success"})


async def _own(request: Request) -> str:
    """Return the endpoint_id that the path names, if it is the caller's own or they are an admin.

    Raises:
        ApiError: 401, 404.
    """
    mine, endpoint_id = require_user_id(request), request.path_params["endpoint_id"]
    found = await endpoint_secrets.get_endpoint(get_api_context(request).db, endpoint_id)
    if found is None or not (get_principal(request).is_admin or found["user_id"] == mine):
        raise _not_found(endpoint_id)
    return str(endpoint_id)


def _not_found(endpoint_id: str) -> ApiError:
    return ApiError(404, "endpoint_not_found", f"There is no webhook endpoint {endpoint_id[:100]}.")
