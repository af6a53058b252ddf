"""Webhook deliveries: list and read them with their attempts, and redeliver them.

The owner of a job or batch sees its deliveries, and admins see all. Readers of a job see the deliveries of that job.
"""

from __future__ import annotations

import asyncio
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import (
    can_read,
    get_actor,
    get_principal,
    get_viewer,
    require_access,
    require_user_id,
)
from jobledger.api.auth.redaction import DELIVERY_FIELD_RULES, Viewer, find_hidden_filters, redact_document
from jobledger.api.context import get_api_context, parse_query, wait_for_requested_position
from jobledger.api.http.bodies import read_json_body, read_optional_json_body
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.idempotency import RequestFingerprint, build_metadata
from jobledger.api.http.pagination import list_response
from jobledger.api.openapi.operation import Operation
from jobledger.api.resources import JOB, load_document
from jobledger.api.schemas.request_models import ReasonBody
from jobledger.api.schemas.webhooks import (
    DeliveryFilter,
    DeliveryListQuery,
    DeliveryListResponse,
    DeliveryResponse,
    RedeliverBody,
    RedeliveryResponse,
)
from jobledger.ledger.domain.access import AccessLevel, Principal
from jobledger.ledger.domain.commands import RequeueDelivery
from jobledger.ledger.domain.delivery import Delivery, parse_source
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState, handle_command, is_deleted, load_stream_state
from jobledger.projections.engine.as_of import events_up_to
from jobledger.projections.views import deliveries as view
from jobledger.projections.views import paging

MAX_REDELIVERIES: Final = 10_000
_CONCURRENT_REDELIVERIES: Final = 100
_MAX_REDELIVERY_BYTES: Final = 64 * 1024 * 1024
_UNRESTRICTED: Final = Principal(None, roles=frozenset({"admin"}))


@Operation(
    "GET",
    "/api/monitoring/events/webhooks",
    response=DeliveryListResponse,
    query=DeliveryListQuery,
    reads_views=True,
    error_codes=("job_not_found",),
)
async def list_deliveries(request: Request) -> Response:
    """List webhook deliveries with their attempts."""
    query = parse_query(request, DeliveryListQuery)
    await wait_for_requested_position(request)
    views, db_query = get_api_context(request).views, await _build_query(request, query)
    deliveries, next_page = await view.find_page(views, db_query, query.page_request)
    total = await paging.count(views, view.NAME, db_query)
    rendered = [
        redact_document(delivery, DELIVERY_FIELD_RULES, await _viewer_of_delivery(request, delivery))
        for delivery in deliveries
    ]
    return list_response("deliveries", rendered, next_page, total, max_count=paging.MAX_COUNT)


@Operation("GET", "/api/monitoring/events/webhooks/{delivery_id}", response=DeliveryResponse, reads_views=True)
async def get_delivery(request: Request) -> Response:
    """Read a webhook delivery."""
    await wait_for_requested_position(request)
    delivery_id = request.path_params["delivery_id"]
    delivery = await view.get(get_api_context(request).views, delivery_id)
    viewer = None if delivery is None else await _viewer_of_delivery(request, delivery)
    if delivery is None or viewer is None or viewer.access_level < AccessLevel.READ:
        raise _not_found_error(delivery_id)
    return json_response({"status": "success", "delivery": redact_document(delivery, DELIVERY_FIELD_RULES, viewer)})


@Operation(
    "POST",
    "/api/monitoring/events/webhooks/{delivery_id}/redeliver",
    response=DeliveryResponse,
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
        raise _not_found_error(delivery_id)
    await _check_may_redeliver(request, current.aggregate, _not_found_error(delivery_id))
    if await is_deleted(ctx.event_store, current.aggregate.spec.source):
        message = f"{current.aggregate.spec.source} was deleted, so its webhook cannot be redelivered."
        raise ApiError(410, "source_deleted", message)
    fingerprint = RequestFingerprint.from_request(request, content)
    requeued = fingerprint.find_in(events) if fingerprint else None
    if requeued is None:
        command = RequeueDelivery(get_actor(request), body.reason)
        meta = build_metadata(request, fingerprint)
        result = await handle_command(ctx.event_store, delivery_id, command, meta=meta, stream_state=current)
        [requeued] = result.events
        events = [*events, requeued]
    delivery: Document | None = None
    for event in events_up_to(events, requeued):
        delivery = view.fold(delivery, event)
    assert delivery is not None  # noqa: S101 - narrows the type; the first event creates the document
    projected = await view.get(ctx.views, delivery_id)  # only the views have the sequence number
    delivery = {**delivery, "sequence": projected["sequence"] if projected else None}
    viewer = await _viewer_of_delivery(request, delivery)
    rendered = redact_document(delivery, DELIVERY_FIELD_RULES, viewer)
    return json_response({"status": "success", "delivery": rendered}, 202, {"Ledger-Position": str(requeued.position)})


@Operation(
    "POST",
    "/api/monitoring/events/redeliver",
    response=RedeliveryResponse,
    status=202,
    body=RedeliverBody,
    reads_views=True,
    error_codes=("job_not_found", "forbidden"),
)
async def redeliver_webhooks(request: Request) -> Response:
    """Redeliver webhooks: abandoned ones, or those that match the filters.

    The oldest deliveries come first. Those that the caller may not redeliver are left out.
    """
    body, content = await read_json_body(request, RedeliverBody)
    ctx, actor = get_api_context(request), get_actor(request)
    fingerprint = RequestFingerprint.from_request(request, content)
    await wait_for_requested_position(request)
    if body.job_id is not None:
        await _check_may_redeliver_of_job(request, body.job_id)
    first = paging.PageRequest(MAX_REDELIVERIES, newest_first=False, max_bytes=_MAX_REDELIVERY_BYTES)
    deliveries, next_page = await view.find_page(ctx.views, await _build_query(request, body), first)
    meta = build_metadata(request, fingerprint)

    async def requeue(delivery_id: str) -> int:
        """Queue a delivery again. Return the position of its last event, 0 if its job or batch was deleted."""
        events = await ctx.event_store.read_stream(delivery_id)
        if fingerprint is not None and (earlier := fingerprint.find_in(events)) is not None:
            return earlier.position
        if await is_deleted(ctx.event_store, parse_source(delivery_id)):
            return 0
        command, current = RequeueDelivery(actor, body.reason), StreamState().apply(events)
        result = await handle_command(ctx.event_store, delivery_id, command, meta=meta, stream_state=current)
        return result.stream_state.head.position

    position = count = 0
    for start in range(0, len(deliveries), _CONCURRENT_REDELIVERIES):
        chunk = deliveries[start : start + _CONCURRENT_REDELIVERIES]
        positions = await asyncio.gather(*(requeue(delivery["_id"]) for delivery in chunk))
        count += sum(1 for reached in positions if reached)
        position = max(position, *positions)
    response = {"status": "success", "redelivered": count, "has_more": next_page is not None}
    return json_response(response, 202, {"Ledger-Position": str(position)} if position else {})


async def _build_query(request: Request, filters: DeliveryFilter) -> Document:
    """Return the database query for the deliveries that match the filters and that the caller may see.

    Raises:
        ApiError: 404, the caller may not read the job of the filter; 403, a filter needs admin access to it.
    """
    principal = get_principal(request)
    if filters.job_id is not None:
        source = await load_document(request, filters.job_id)
        if source is None or not can_read(request, source):
            raise JOB.not_found_error(filters.job_id)
        used = {name for name in DeliveryFilter.model_fields if getattr(filters, name) is not None}
        hidden = find_hidden_filters(used, DELIVERY_FIELD_RULES)
        if hidden and not get_viewer(request, source).has_full_access:
            message = f"Forbidden: the filter `{hidden[0]}` requires admin access to the job."
            raise ApiError(403, "forbidden", message)
        principal = _UNRESTRICTED
    return view.build_query(
        principal,
        source=filters.job_id,
        batch_id=filters.batch_id,
        endpoint_id=filters.endpoint_id,
        host=filters.host,
        status=filters.status,
        event_type=filters.type,
        after_sequence=filters.after_sequence,
        created_after=filters.created_after,
        created_before=filters.created_before,
    )


async def _viewer_of_delivery(request: Request, delivery: Document) -> Viewer:
    """Return the caller's access to a delivery: as its owner, or the access to its job or batch."""
    principal = get_principal(request)
    if principal.is_admin or delivery["user_id"] == principal.user_id:
        return Viewer(principal, AccessLevel.ADMIN)
    source = await load_document(request, str(delivery["job_id"] or delivery["batch_id"]))
    return Viewer(principal, AccessLevel.NONE) if source is None else get_viewer(request, source)


async def _check_may_redeliver(request: Request, delivery: Delivery, not_found_error: ApiError) -> None:
    """Check that the caller is the owner, an admin, or may change the job or batch of the delivery.

    Raises:
        ApiError: `not_found_error`, the caller may not see it; 401, 403.
    """
    principal = get_principal(request)
    if principal.is_admin or delivery.spec.user_id == principal.user_id:
        return
    check = require_access(request, AccessLevel.WRITE, not_found_error=not_found_error)
    check(await load_stream_state(get_api_context(request).event_store, delivery.spec.source))


async def _check_may_redeliver_of_job(request: Request, job_id: str) -> None:
    not_found_error = JOB.not_found_error(job_id)
    if not JOB.is_id(job_id):
        raise not_found_error
    require_user_id(request)
    check = require_access(request, AccessLevel.WRITE, not_found_error=not_found_error)
    check(await load_stream_state(get_api_context(request).event_store, job_id))


def _not_found_error(delivery_id: str) -> ApiError:
    return ApiError(404, "delivery_not_found", f"Delivery {delivery_id} not found.")
