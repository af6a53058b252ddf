"""Webhook deliveries with their attempts, and webhook endpoints with their signing secrets.

The owner of a job or batch sees its deliveries, and admins see all. Readers of a job see the deliveries of that job.
A signing secret is shown once: when it is created or rotated.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import (
    can_read,
    check_filters,
    get_actor,
    get_principal,
    get_viewer,
    require_access,
    require_user_id,
)
from jobledger.api.auth.redaction import DELIVERY_FIELD_RULES, Viewer, redact_document
from jobledger.api.context import get_api_context
from jobledger.api.http.bodies import read_json_body, read_optional_json_body
from jobledger.api.http.errors import ApiError, build_json_response
from jobledger.api.http.validation import parse_query
from jobledger.api.idempotency import RequestFingerprint, build_metadata
from jobledger.api.ledger_position import wait_for_requested_position
from jobledger.api.openapi.operation import Operation
from jobledger.api.pagination import build_list_response, count_total
from jobledger.api.resources import JOB, load_document
from jobledger.api.schemas import webhooks as schemas
from jobledger.api.schemas.request_models import ReasonBody
from jobledger.api.schemas.response_models import SuccessResponse
from jobledger.api.stream_commands import LoadedStream, handle_once
from jobledger.ledger.domain.access import AccessLevel, Principal
from jobledger.ledger.domain.commands import RequeueDelivery
from jobledger.ledger.domain.delivery import Delivery, parse_source
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState, is_deleted, load_stream_state
from jobledger.ledger.webhooks import endpoint_secrets
from jobledger.projections.views import deliveries as deliveries_view
from jobledger.projections.views import paging
from jobledger.projections.views.documents import fold_events
from jobledger.projections.views.list_index import ListQuery

MAX_REDELIVERIES: Final = 10_000
_CONCURRENT_REDELIVERIES: Final = 100
_MAX_REDELIVERY_BYTES: Final = 64 * 1024 * 1024
_UNRESTRICTED: Final = Principal(None, roles=frozenset({"admin"}))


@Operation(
    "GET",
    "/api/monitoring/events/webhooks",
    response=schemas.DeliveryListResponse,
    query=schemas.DeliveryListQuery,
    is_from_views=True,
    error_codes=("job_not_found", "forbidden"),
)
async def list_deliveries(request: Request) -> Response:
    """List webhook deliveries with their attempts."""
    query = parse_query(request, schemas.DeliveryListQuery)
    await wait_for_requested_position(request)
    views, db_query = get_api_context(request).views, await _build_query(request, query)
    deliveries, next_page = await deliveries_view.find_page(views, db_query, query.page_request)
    rendered = [
        redact_document(delivery, DELIVERY_FIELD_RULES, await _get_delivery_viewer(request, delivery))
        for delivery in deliveries
    ]
    total = await count_total(views, db_query)
    return build_list_response("deliveries", rendered, next_page, total)


@Operation(
    "GET", "/api/monitoring/events/webhooks/{delivery_id}", response=schemas.DeliveryResponse, is_from_views=True
)
async def get_delivery(request: Request) -> Response:
    """Read a webhook delivery."""
    await wait_for_requested_position(request)
    delivery_id = request.path_params["delivery_id"]
    delivery = await deliveries_view.get(get_api_context(request).views, delivery_id)
    viewer = None if delivery is None else await _get_delivery_viewer(request, delivery)
    if delivery is None or viewer is None or viewer.access_level < AccessLevel.READ:
        raise _build_not_found_error(delivery_id)
    return build_json_response(
        {"status": "success", "delivery": redact_document(delivery, DELIVERY_FIELD_RULES, viewer)}
    )


@Operation(
    "POST",
    "/api/monitoring/events/webhooks/{delivery_id}/redeliver",
    response=schemas.DeliveryResponse,
    status=202,
    body=ReasonBody,
    is_body_optional=True,
    error_codes=("forbidden", "source_deleted"),
)
async def redeliver_webhook(request: Request) -> Response:
    """Redeliver a webhook."""
    body, content = await read_optional_json_body(request, ReasonBody)
    ctx, delivery_id = get_api_context(request), request.path_params["delivery_id"]
    events = await ctx.event_store.read_stream(delivery_id) if delivery_id.startswith("delivery-") else []
    current = StreamState().apply(events)
    if not isinstance(current.aggregate, Delivery):
        raise _build_not_found_error(delivery_id)
    principal, source = get_principal(request), current.aggregate.spec.source
    if not principal.is_admin and principal.user_id != current.aggregate.spec.user_id:
        await _check_may_change(request, source, _build_not_found_error(delivery_id))
    if await is_deleted(ctx.event_store, source):
        raise ApiError(410, "source_deleted", f"{source} was deleted, so its webhook cannot be redelivered.")
    fingerprint = RequestFingerprint.from_request(request, content)
    loaded = LoadedStream(delivery_id, events, current, fingerprint, build_metadata(request, fingerprint))
    events = await handle_once(request, loaded, RequeueDelivery(get_actor(request), body.reason))
    delivery = fold_events(deliveries_view.fold, events)
    assert delivery is not None  # noqa: S101 - narrows the type; the first event creates the document
    projected = await deliveries_view.get(ctx.views, delivery_id)  # only the views have the sequence number
    delivery = {**delivery, "sequence": projected["sequence"] if projected else None}
    viewer = await _get_delivery_viewer(request, delivery)
    rendered = redact_document(delivery, DELIVERY_FIELD_RULES, viewer)
    return build_json_response(
        {"status": "success", "delivery": rendered}, 202, {"Ledger-Position": str(events[-1].position)}
    )


@Operation(
    "POST",
    "/api/monitoring/events/redeliver",
    response=schemas.RedeliveryResponse,
    status=202,
    body=schemas.RedeliverBody,
    is_from_views=True,
    error_codes=("job_not_found", "forbidden"),
)
async def redeliver_webhooks(request: Request) -> Response:
    """Redeliver webhooks: abandoned ones, or those that match the filters.

    The oldest deliveries come first. Those that the caller may not redeliver are left out.
    """
    body, content = await read_json_body(request, schemas.RedeliverBody)
    ctx, command = get_api_context(request), RequeueDelivery(get_actor(request), body.reason)
    fingerprint = RequestFingerprint.from_request(request, content)
    await wait_for_requested_position(request)
    if body.job_id is not None:
        if not JOB.is_id(body.job_id):
            raise JOB.build_not_found_error(body.job_id)
        await _check_may_change(request, body.job_id, JOB.build_not_found_error(body.job_id))
    first = paging.PageRequest(MAX_REDELIVERIES, newest_first=False, max_bytes=_MAX_REDELIVERY_BYTES)
    deliveries, next_page = await deliveries_view.find_page(ctx.views, await _build_query(request, body), first)
    meta = build_metadata(request, fingerprint)

    async def requeue(delivery_id: str) -> int:
        """Queue a delivery again. Return the position of its last event, 0 if its job or batch was deleted."""
        if await is_deleted(ctx.event_store, parse_source(delivery_id)):
            return 0
        events = await ctx.event_store.read_stream(delivery_id)
        loaded = LoadedStream(delivery_id, events, StreamState().apply(events), fingerprint, meta)
        return (await handle_once(request, loaded, command))[-1].position

    position = count = 0
    for start in range(0, len(deliveries), _CONCURRENT_REDELIVERIES):
        chunk = deliveries[start : start + _CONCURRENT_REDELIVERIES]
        positions = await asyncio.gather(*(requeue(delivery["_id"]) for delivery in chunk))
        count += sum(1 for reached in positions if reached)
        position = max(position, *positions)
    response = {"status": "success", "redelivered": count, "has_more": next_page is not None}
    return build_json_response(response, 202, {"Ledger-Position": str(position)} if position else {})


async def _build_query(request: Request, filters: schemas.DeliveryFilter) -> ListQuery:
    """Return the query for the deliveries that match the filters and that the caller may see.

    Raises:
        ApiError: 404, the caller may not read the job of the filter; 403, a filter needs admin access to it.
    """
    principal = get_principal(request)
    if filters.job_id is not None:
        source = await load_document(request, filters.job_id)
        if source is None or not can_read(request, source):
            raise JOB.build_not_found_error(filters.job_id)
        check_filters(
            filters.model_dump(include={*schemas.DeliveryFilter.model_fields}),
            DELIVERY_FIELD_RULES,
            has_full_access=get_viewer(request, source).has_full_access,
            required="admin access to the job",
        )
        principal = _UNRESTRICTED
    return deliveries_view.build_query(
        principal,
        source=filters.job_id,
        event_type=filters.type,
        **filters.model_dump(include=schemas.DeliveryFilter.model_fields.keys() - {"job_id", "type"}),
    )


async def _get_delivery_viewer(request: Request, delivery: Document) -> Viewer:
    """Return the caller's access to a delivery: as its owner, or the access to its job or batch."""
    principal = get_principal(request)
    if principal.is_admin or delivery["user_id"] == principal.user_id:
        return Viewer(principal, AccessLevel.ADMIN)
    source = await load_document(request, str(delivery["job_id"] or delivery["batch_id"]))
    return Viewer(principal, AccessLevel.NONE) if source is None else get_viewer(request, source)


async def _check_may_change(request: Request, source: str, not_found_error: ApiError) -> None:
    """Check that the caller may change a job or batch.

    Raises:
        ApiError: `not_found_error`, the caller may not read it; 401, 403.
    """
    check = require_access(request, AccessLevel.WRITE, not_found_error=not_found_error)
    check(await load_stream_state(get_api_context(request).event_store, source))


def _build_not_found_error(delivery_id: str) -> ApiError:
    return ApiError(404, "delivery_not_found", f"Delivery {delivery_id} not found.")


@Operation(
    "GET",
    "/api/monitoring/events/webhook-endpoints",
    response=schemas.EndpointListResponse,
    query=schemas.EndpointListQuery,
)
async def list_webhook_endpoints(request: Request) -> Response:
    """List webhook endpoints."""
    query, caller = parse_query(request, schemas.EndpointListQuery), require_user_id(request)
    user_id = None if get_principal(request).is_admin else caller
    endpoints = await endpoint_secrets.list_endpoints(
        get_api_context(request).db, user_id=user_id, limit=query.limit, after=query.after
    )
    return build_json_response({"status": "success", "endpoints": endpoints})


@Operation(
    "POST",
    "/api/monitoring/events/webhook-endpoints/{endpoint_id}/rotate-secret",
    response=schemas.RotatedSecretResponse,
    body=schemas.RotateSecretBody,
    is_body_optional=True,
    can_append_events=False,
)
async def rotate_endpoint_secret(request: Request) -> Response:
    """Rotate the signing secret of an endpoint. The new secret is shown once."""
    body, _ = await read_optional_json_body(request, schemas.RotateSecretBody)
    endpoint_id = await _require_own_endpoint(request)
    grace = timedelta(seconds=body.grace_period_s)
    new_secret = await endpoint_secrets.rotate_secret(get_api_context(request).db, endpoint_id, grace)
    if new_secret is None:
        raise _build_endpoint_not_found_error(endpoint_id)
    return build_json_response({"status": "success", **new_secret.to_response()}, headers={"Cache-Control": "no-store"})


@Operation(
    "DELETE",
    "/api/monitoring/events/webhook-endpoints/{endpoint_id}/secret",
    response=SuccessResponse,
    can_append_events=False,
)
async def revoke_endpoint_secret(request: Request) -> Response:
    """Revoke the signing secrets of an endpoint."""
    endpoint_id = await _require_own_endpoint(request)
    await endpoint_secrets.revoke_secrets(get_api_context(request).db, endpoint_id)
    return build_json_response({"status": "success"})


async def _require_own_endpoint(request: Request) -> str:
    """Return the endpoint ID in the path, if it is the caller's own or the caller is an admin.

    Raises:
        ApiError: 401, 404.
    """
    caller, endpoint_id = require_user_id(request), str(request.path_params["endpoint_id"])
    endpoint = await endpoint_secrets.get_endpoint(get_api_context(request).db, endpoint_id)
    if endpoint is None or not (get_principal(request).is_admin or endpoint["user_id"] == caller):
        raise _build_endpoint_not_found_error(endpoint_id)
    return endpoint_id


def _build_endpoint_not_found_error(endpoint_id: str) -> ApiError:
    return ApiError(404, "endpoint_not_found", f"Webhook endpoint {endpoint_id[:100]} not found.")
