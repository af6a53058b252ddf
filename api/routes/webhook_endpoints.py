"""Webhook endpoints and their signing secrets. A secret is shown once: when it is created or rotated."""

from __future__ import annotations

from datetime import timedelta

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import get_principal, require_user_id
from jobledger.api.context import get_api_context, parse_query
from jobledger.api.http.bodies import read_optional_json_body
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.openapi.operation import Operation
from jobledger.api.schemas.response_models import SuccessResponse
from jobledger.api.schemas.webhooks import (
    EndpointListQuery,
    EndpointListResponse,
    RotatedSecretResponse,
    RotateSecretBody,
)
from jobledger.ledger.store import endpoint_secrets


@Operation("GET", "/api/monitoring/events/webhook-endpoints", response=EndpointListResponse, query=EndpointListQuery)
async def list_webhook_endpoints(request: Request) -> Response:
    """List webhook endpoints."""
    query, caller = parse_query(request, EndpointListQuery), require_user_id(request)
    user_id = None if get_principal(request).is_admin else caller
    endpoints = await endpoint_secrets.list_endpoints(
        get_api_context(request).db, user_id=user_id, limit=query.limit, after=query.after
    )
    return json_response({"status": "success", "endpoints": endpoints})


@Operation(
    "POST",
    "/api/monitoring/events/webhook-endpoints/{endpoint_id}/rotate-secret",
    response=RotatedSecretResponse,
    body=RotateSecretBody,
    is_body_optional=True,
    appends_events=False,
)
async def rotate_endpoint_secret(request: Request) -> Response:
    """Rotate the signing secret of an endpoint. The new secret is shown once."""
    body, _ = await read_optional_json_body(request, RotateSecretBody)
    endpoint_id = await _require_own_endpoint(request)
    grace = timedelta(seconds=body.grace_period_s)
    new_secret = await endpoint_secrets.rotate_secret(get_api_context(request).db, endpoint_id, grace)
    if new_secret is None:
        raise _not_found_error(endpoint_id)
    return json_response({"status": "success", **new_secret.to_response()}, headers={"Cache-Control": "no-store"})


@Operation(
    "DELETE",
    "/api/monitoring/events/webhook-endpoints/{endpoint_id}/secret",
    response=SuccessResponse,
    appends_events=False,
)
async def revoke_endpoint_secret(request: Request) -> Response:
    """Revoke the signing secrets of an endpoint."""
    endpoint_id = await _require_own_endpoint(request)
    if not await endpoint_secrets.revoke_secrets(get_api_context(request).db, endpoint_id):
        raise _not_found_error(endpoint_id)
    return json_response({"status": "success"})


async def _require_own_endpoint(request: Request) -> str:
    """Return the endpoint ID in the path, if it is the caller's own or the caller is an admin.

    Raises:
        ApiError: 401, 404.
    """
    caller, endpoint_id = require_user_id(request), str(request.path_params["endpoint_id"])
    endpoint = await endpoint_secrets.get_endpoint(get_api_context(request).db, endpoint_id)
    if endpoint is None or not (get_principal(request).is_admin or endpoint["user_id"] == caller):
        raise _not_found_error(endpoint_id)
    return endpoint_id


def _not_found_error(endpoint_id: str) -> ApiError:
    return ApiError(404, "endpoint_not_found", f"Webhook endpoint {endpoint_id[:100]} not found.")
