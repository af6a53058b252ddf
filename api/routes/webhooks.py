"""api: webhooks, sent and to be sent: who was told what, by which attempts, and telling them again.

Who owns a job or batch sees its deliveries, admins see all; those of one job are seen by whoever may see the job.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import (
    can_read,
    get_actor,
    get_principal,
    require_right,
    require_user_id,
    viewer_for,
)
from jobledger.api.auth.redaction import DELIVERY_RULES, Viewer, find_hidden_filters, redact_document
from jobledger.api.context import ApiContext, get_api_context, parse_query, wait_for_requested_position
from jobledger.api.http.bodies import read_json_body, read_optional_json_body
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.idempotency import IdempotencyKey, get_request_marker
from jobledger.api.routes.jobs import encode_next_cursor
from jobledger.api.schemas.requests import DeliveryFilter, DeliveryListQuery, ReasonBody, RedeliverBody
from jobledger.ledger.domain.access import AccessLevel, Principal
from jobledger.ledger.domain.commands import RequeueDelivery
from jobledger.ledger.domain.delivery import Delivery, parse_source
from jobledger.ledger.domain.events import EventMetadata
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import StreamState, handle_command, is_deleted, load_stream_state
from jobledger.projections.views import batches, jobs
from jobledger.projections.views import deliveries as view
from jobledger.projections.views.paging import MAX_COUNT

MAX_REDELIVERIES: Final = 10_000
_AT_ONCE: Final = 100
_REDELIVERED_BYTES: Final = 64 * 1024 * 1024
_EVERYTHING: Final = Principal(None, roles=frozenset({"admin"}))


async def list_deliveries(request: Request) -> Response:
    """GET /api/monitoring/events/webhooks"""
    asked = parse_query(request, DeliveryListQuery)
    await wait_for_requested_position(request)
    known, wanted = get_api_context(request), await _wanted(request, asked)
    found, following = await view.find_page(
        known.views, wanted, limit=asked.limit, skip=asked.skip, after=asked.cursor, newest_first=asked.newest_first
    )
    total = await view.count(known.views, wanted)
    seen = [redact_document(it, DELIVERY_RULES, await _viewer(request, it["user_id"], _source(it))) for it in found]
    content: dict[str, Any] = {"status": "success", "total": total, "deliveries": seen}
    if total >= MAX_COUNT:
        content["total_is_lower_bound"] = True
    return json_response(content | encode_next_cursor(following))


async def get_delivery(request: Request) -> Response:
    """GET /api/monitoring/events/webhooks/{delivery_id}"""
    await wait_for_requested_position(request)
    known, delivery_id = get_api_context(request), request.path_params["delivery_id"]
    delivery = await view.get(known.views, delivery_id)
    viewer = None if delivery is None else await _viewer(request, delivery["user_id"], _source(delivery))
    if delivery is None or viewer is None or viewer.right < AccessLevel.READ:
        raise _not_found(delivery_id)
    return json_response({"status": "success", "delivery": redact_document(delivery, DELIVERY_RULES, viewer)})


async def redeliver_webhook(request: Request) -> Response:
    """POST /api/monitoring/events/webhooks/{delivery_id}/redeliver"""
    body, content = await read_optional_json_body(request, ReasonBody)
    command = RequeueDelivery(get_actor(request), body.reason)
    known, delivery_id = get_api_context(request), request.path_params["delivery_id"]
    events = await known.event_store.read_stream(delivery_id) if delivery_id.startswith("delivery-") else []
    found = StreamState().apply(events)
    if not isinstance(found.state, Delivery):
        raise _not_found(delivery_id)
    await _may_redeliver(request, found.state, _not_found(delivery_id))
    if await is_deleted(known.event_store, found.state.spec.source):
        message = f"{found.state.spec.source} was deleted, so its webhook cannot be sent again."
        raise ApiError(410, "source_deleted", message)
    once = IdempotencyKey.from_request(request, content)
    done = once.find_in(events) if once else None
    if done is None:
        meta = EventMetadata(get_actor(request), request_fingerprint=get_request_marker(once))
        [done] = (await handle_command(known.event_store, delivery_id, command, meta=meta, stream_state=found)).events
        events = [*events, done]
    delivery: Document | None = None
    for event in events:
        if event.version <= done.version:
            delivery = view.fold(delivery, event)
    assert delivery is not None  # noqa: S101 - it has at least the event that queued it
    viewer = await _viewer(request, delivery["user_id"], _source(delivery))
    answer = {
        "status": "success",
        "delivery": redact_document(await _numbered(known, delivery), DELIVERY_RULES, viewer),
    }
    return json_response(answer, 202, {"Ledger-Position": str(done.position)})


async def redeliver_webhooks(request: Request) -> Response:
    """POST /api/monitoring/events/redeliver

    Those of the deliveries asked for that who asks may have sent again, the oldest first.
    """
    body, content = await read_json_body(request, RedeliverBody)
    by, known, once = get_actor(request), get_api_context(request), IdempotencyKey.from_request(request, content)
    await wait_for_requested_position(request)
    if body.job_id is not None:
        await _may_redeliver_of(request, body.job_id)
    wanted = await _wanted(request, body)
    found, more = await view.find_page(
        known.views, wanted, limit=MAX_REDELIVERIES, newest_first=False, max_bytes=_REDELIVERED_BYTES
    )
    meta, position, number = EventMetadata(by, request_fingerprint=get_request_marker(once)), 0, 0

    async def again(delivery_id: str) -> int:
        events = await known.event_store.read_stream(delivery_id)
        if once is not None and (before := once.find_in(events)) is not None:
            return before.position
        if await is_deleted(known.event_store, parse_source(delivery_id)):
            return 0
        command, current = RequeueDelivery(by, body.reason), StreamState().apply(events)
        return (
            await handle_command(known.event_store, delivery_id, command, meta=meta, stream_state=current)
        ).stream_state.head.position

    for begin in range(0, len(found), _AT_ONCE):
        part = [it["_id"] for it in found[begin : begin + _AT_ONCE]]
        reached = await asyncio.gather(*(again(delivery_id) for delivery_id in part))
        number += sum(1 for it in reached if it)
        position = max(position, *reached)
    answer = {"status": "success", "redelivered": number, "has_more": more is not None}
    headers = {"Ledger-Position": str(position)} if position else {}
    return json_response(answer, 202, headers)


async def _wanted(request: Request, asked: DeliveryFilter) -> Document:
    """Return the database query for those of the deliveries asked for that who asks may see.

    Raises:
        ApiError: 404, when they may not see the job that is named.
    """
    principal = get_principal(request)
    if asked.job_id is not None:
        if not await _source_is_seen(request, asked.job_id):
            raise ApiError(404, "job_not_found", f"There is no job {asked.job_id}.")
        document = await _document(request, asked.job_id)
        hidden = find_hidden_filters(_given(asked), DELIVERY_RULES)
        if hidden and document is not None and not viewer_for(request, document).has_full_access:
            raise ApiError(403, "forbidden", f"Filtering by `{hidden[0]}` needs the right admin_access to the job.")
        principal = _EVERYTHING
    return view.build_query(
        principal,
        source=asked.job_id,
        batch_id=asked.batch_id,
        endpoint_id=asked.endpoint_id,
        host=asked.host,
        status=asked.status,
        event_type=asked.type,
        after_sequence=asked.after_sequence,
        created_after=asked.created_after,
        created_before=asked.created_before,
    )


def _given(asked: DeliveryFilter) -> set[str]:
    return {name for name in DeliveryFilter.model_fields if getattr(asked, name) is not None}


async def _viewer(request: Request, owner: str, source: str) -> Viewer:
    """Return who asks, with their right to a delivery: its owner's, or the one they have to what it tells of."""
    principal = get_principal(request)
    if principal.is_admin or owner == principal.user_id:
        return Viewer(principal, AccessLevel.ADMIN)
    document = await _document(request, source)
    return Viewer(principal, AccessLevel.NONE) if document is None else viewer_for(request, document)


async def _source_is_seen(request: Request, source: str) -> bool:
    document = await _document(request, source)
    return document is not None and can_read(request, document)


async def _document(request: Request, source: str) -> Document | None:
    known = get_api_context(request)
    if source.startswith("job-"):
        return await jobs.get(known.views, known.event_store, source)
    if source.startswith("batch-"):
        return await batches.get(known.views, known.event_store, source)
    return None


async def _may_redeliver(request: Request, delivery: Delivery, missing: ApiError) -> None:
    """Make sure that who asks may: the owner, admins, and who may change what it tells of.

    Raises:
        ApiError: `missing`, when they may not even see it; 401, 403.
    """
    principal = get_principal(request)
    if principal.is_admin or delivery.spec.user_id == principal.user_id:
        return
    require_right(request, AccessLevel.WRITE, not_found_error=missing)(
        await load_stream_state(get_api_context(request).event_store, delivery.spec.source)
    )


async def _may_redeliver_of(request: Request, job_id: str) -> None:
    missing = ApiError(404, "job_not_found", f"There is no job {job_id}.")
    if not job_id.startswith("job-"):
        raise missing
    require_user_id(request)
    require_right(request, AccessLevel.WRITE, not_found_error=missing)(
        await load_stream_state(get_api_context(request).event_store, job_id)
    )


def _source(delivery: Document) -> str:
    return str(delivery["job_id"] or delivery["batch_id"])


async def _numbered(known: ApiContext, delivery: Document) -> Document:
    """Return a delivery that was folded from the log, with the number that only the views know."""
    seen = await view.get(known.views, delivery["_id"])
    return {**delivery, "sequence": seen["sequence"] if seen else None}


def _not_found(delivery_id: str) -> ApiError:
    return ApiError(404, "delivery_not_found", f"There is no delivery {delivery_id}.")
