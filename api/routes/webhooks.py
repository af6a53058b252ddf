"""api: webhooks, sent and to be sent: who was told what, by which attempts, and telling them again.

Who owns a job or batch sees its deliveries, admins see all; those of one job are seen by whoever may see the job.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.disclosure import DELIVERY, Viewer, hidden_filters, shown
from jobledger.api.auth.permissions import actor, may_see, requires, signed_in, viewer_of, who_asks
from jobledger.api.context import Services, query_of, services, views_reach_wanted_position
from jobledger.api.http.bodies import optional_body, read_body
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.preconditions import Once, noted
from jobledger.api.routes.jobs import going_on
from jobledger.api.schemas.requests import DeliveryFilter, DeliveryList, ReasonBody, RedeliverBody
from jobledger.ledger.domain.access import Principal, Right
from jobledger.ledger.domain.commands import RequeueDelivery
from jobledger.ledger.domain.delivery import Delivery, source_of
from jobledger.ledger.domain.events import Meta
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import Known, handle, is_deleted, load
from jobledger.projections.views import batches, jobs
from jobledger.projections.views import deliveries as view

MOST_REDELIVERED: Final = 10_000
_AT_ONCE: Final = 100
_REDELIVERED_BYTES: Final = 64 * 1024 * 1024
_EVERYTHING: Final = Principal(None, roles=frozenset({"admin"}))


async def listing(request: Request) -> Response:
    """GET /api/monitoring/events/webhooks"""
    asked = query_of(request, DeliveryList)
    await views_reach_wanted_position(request)
    known, wanted = services(request), await _wanted(request, asked)
    found, following = await view.page(
        known.views, wanted, limit=asked.limit, skip=asked.skip, after=asked.cursor, newest_first=asked.newest_first
    )
    total = await view.count(known.views, wanted)
    seen = [shown(it, DELIVERY, await _viewer(request, it["user_id"], _source(it))) for it in found]
    content: dict[str, Any] = {"status": "success", "total": total, "deliveries": seen}
    if total >= view.COUNTED_UP_TO:
        content["total_is_lower_bound"] = True
    return json_response(content | going_on(following))


async def single(request: Request) -> Response:
    """GET /api/monitoring/events/webhooks/{delivery_id}"""
    await views_reach_wanted_position(request)
    known, delivery_id = services(request), request.path_params["delivery_id"]
    delivery = await view.get(known.views, delivery_id)
    viewer = None if delivery is None else await _viewer(request, delivery["user_id"], _source(delivery))
    if delivery is None or viewer is None or viewer.right < Right.READ:
        raise _not_found(delivery_id)
    return json_response({"status": "success", "delivery": shown(delivery, DELIVERY, viewer)})


async def redeliver(request: Request) -> Response:
    """POST /api/monitoring/events/webhooks/{delivery_id}/redeliver"""
    body, content = await optional_body(request, ReasonBody)
    command = RequeueDelivery(actor(request), body.reason)
    known, delivery_id = services(request), request.path_params["delivery_id"]
    events = await known.log.read_stream(delivery_id) if delivery_id.startswith("delivery-") else []
    found = Known().after(events)
    if not isinstance(found.state, Delivery):
        raise _not_found(delivery_id)
    await _may_redeliver(request, found.state, _not_found(delivery_id))
    if await is_deleted(known.log, found.state.asked.source):
        message = f"{found.state.asked.source} was deleted, so its webhook cannot be sent again."
        raise ApiError(410, "deleted", message)
    once = Once.of(request, content)
    done = once.found_in(events) if once else None
    if done is None:
        meta = Meta(actor(request), request=noted(once))
        [done] = (await handle(known.log, delivery_id, command, meta=meta, known=found)).events
        events = [*events, done]
    delivery: Document | None = None
    for event in events:
        if event.version <= done.version:
            delivery = view.fold(delivery, event)
    assert delivery is not None  # noqa: S101 - it has at least the event that queued it
    viewer = await _viewer(request, delivery["user_id"], _source(delivery))
    answer = {"status": "success", "delivery": shown(await _numbered(known, delivery), DELIVERY, viewer)}
    return json_response(answer, 202, {"Ledger-Position": str(done.position)})


async def redeliver_many(request: Request) -> Response:
    """POST /api/monitoring/events/redeliver

    Those of the deliveries asked for that who asks may have sent again, the oldest first.
    """
    body, content = await read_body(request, RedeliverBody)
    by, known, once = actor(request), services(request), Once.of(request, content)
    await views_reach_wanted_position(request)
    if body.job_id is not None:
        await _may_redeliver_of(request, body.job_id)
    wanted = await _wanted(request, body)
    found, more = await view.page(
        known.views, wanted, limit=MOST_REDELIVERED, newest_first=False, page_bytes=_REDELIVERED_BYTES
    )
    meta, position, number = Meta(by, request=noted(once)), 0, 0

    async def again(delivery_id: str) -> int:
        events = await known.log.read_stream(delivery_id)
        if once is not None and (before := once.found_in(events)) is not None:
            return before.position
        if await is_deleted(known.log, source_of(delivery_id)):
            return 0
        command, current = RequeueDelivery(by, body.reason), Known().after(events)
        return (await handle(known.log, delivery_id, command, meta=meta, known=current)).known.head.position

    for begin in range(0, len(found), _AT_ONCE):
        part = [it["_id"] for it in found[begin : begin + _AT_ONCE]]
        reached = await asyncio.gather(*(again(delivery_id) for delivery_id in part))
        number += sum(1 for it in reached if it)
        position = max(position, *reached)
    answer = {"status": "success", "redelivered": number, "more": more is not None}
    headers = {"Ledger-Position": str(position)} if position else {}
    return json_response(answer, 202, headers)


async def _wanted(request: Request, asked: DeliveryFilter) -> Document:
    """Return the database query for those of the deliveries asked for that who asks may see.

    Raises:
        ApiError: 404, when they may not see the job that is named.
    """
    principal = who_asks(request)
    if asked.job_id is not None:
        if not await _source_is_seen(request, asked.job_id):
            raise ApiError(404, "job_not_found", f"There is no job {asked.job_id}.")
        document = await _document(request, asked.job_id)
        hidden = hidden_filters(_given(asked), DELIVERY)
        if hidden and document is not None and not viewer_of(request, document).sees_all:
            raise ApiError(403, "forbidden", f"Filtering by `{hidden[0]}` needs the right admin_access to the job.")
        principal = _EVERYTHING
    return view.query(
        principal,
        source=asked.job_id,
        batch_id=asked.batch_id,
        receiver=asked.receiver,
        host=asked.host,
        status=asked.status,
        tells=asked.type,
        after_sequence=asked.after_sequence,
        created_after=asked.created_after,
        created_before=asked.created_before,
    )


def _given(asked: DeliveryFilter) -> set[str]:
    return {name for name in DeliveryFilter.model_fields if getattr(asked, name) is not None}


async def _viewer(request: Request, owner: str, source: str) -> Viewer:
    """Return who asks, with their right to a delivery: its owner's, or the one they have to what it tells of."""
    principal = who_asks(request)
    if principal.sees_everything or owner == principal.user_id:
        return Viewer(principal, Right.ADMIN)
    document = await _document(request, source)
    return Viewer(principal, Right.NONE) if document is None else viewer_of(request, document)


async def _source_is_seen(request: Request, source: str) -> bool:
    document = await _document(request, source)
    return document is not None and may_see(request, document)


async def _document(request: Request, source: str) -> Document | None:
    known = services(request)
    if source.startswith("job-"):
        return await jobs.get(known.views, known.log, source)
    if source.startswith("batch-"):
        return await batches.get(known.views, known.log, source)
    return None


async def _may_redeliver(request: Request, delivery: Delivery, missing: ApiError) -> None:
    """Make sure that who asks may: the owner, admins, and who may change what it tells of.

    Raises:
        ApiError: `missing`, when they may not even see it; 401, 403.
    """
    principal = who_asks(request)
    if principal.sees_everything or delivery.asked.user_id == principal.user_id:
        return
    requires(request, Right.WRITE, missing=missing)(await load(services(request).log, delivery.asked.source))


async def _may_redeliver_of(request: Request, job_id: str) -> None:
    missing = ApiError(404, "job_not_found", f"There is no job {job_id}.")
    if not job_id.startswith("job-"):
        raise missing
    signed_in(request)
    requires(request, Right.WRITE, missing=missing)(await load(services(request).log, job_id))


def _source(delivery: Document) -> str:
    return str(delivery["job_id"] or delivery["batch_id"])


async def _numbered(known: Services, delivery: Document) -> Document:
    """Return a delivery that was folded from the log, with the number that only the views know."""
    seen = await view.get(known.views, delivery["_id"])
    return {**delivery, "sequence": seen["sequence"] if seen else None}


def _not_found(delivery_id: str) -> ApiError:
    return ApiError(404, "delivery_not_found", f"There is no delivery {delivery_id}.")
