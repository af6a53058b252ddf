"""api: the log page by page, for auditors and for whoever keeps a copy, and how far it goes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

import orjson
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import signed_in, who_asks
from jobledger.api.context import Services, query_of, services
from jobledger.api.http.errors import ApiError, json_response
from jobledger.api.http.event_json import event_json
from jobledger.api.routes.live import Wanted, knows_who_may_see, readable, types_of
from jobledger.api.schemas.requests import EventsQuery
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.events import Recorded

_MOST_LOOKED_AT: Final = 10_000
_READ_AT_ONCE: Final = 1000
_LARGEST_ANSWER_BYTES: Final = 4 * 1024 * 1024


async def head(request: Request) -> Response:
    """GET /api/ledger/head"""
    signed_in(request)
    known = services(request)
    newest, views = await known.log.head(), known.checkpoint.position
    return json_response(
        {
            "status": "success",
            "head": newest,
            "oldest": await known.log.oldest(),
            "projector": {"position": views, "lag": max(0, newest - views)},
        }
    )


async def page(request: Request) -> Response:
    """GET /api/ledger/events"""
    known, principal = services(request), who_asks(request)
    asked = query_of(request, EventsQuery)
    wanted = Wanted(types_of(asked.types))
    newest = await known.log.head()
    if not principal.sees_everything or asked.stream is not None:
        await knows_who_may_see(known.visibility, newest)
    found = Page(asked.after, asked.limit)
    if asked.stream is None:
        await _look_through_the_log(known, principal, wanted, found)
    else:
        await _look_through_a_stream(known, principal, wanted, found, asked.stream)
    return json_response(
        {
            "status": "success",
            "events": found.events,
            "last_position": found.last_position,
            "head": max(newest, found.last_position if found.looked_at else 0),
        }
    )


@dataclass(slots=True)
class Page:
    """What is found of a page, and how far was looked. It is full at `limit` events, or with very large ones sooner."""

    last_position: int
    limit: int
    events: list[orjson.Fragment] = field(default_factory=list)
    looked_at: int = 0
    _bytes: int = 0

    @property
    def full(self) -> bool:
        return len(self.events) >= self.limit or self._bytes >= _LARGEST_ANSWER_BYTES

    @property
    def enough(self) -> bool:
        return self.full or self.looked_at >= _MOST_LOOKED_AT

    async def take(self, known: Services, principal: Principal, wanted: Wanted, events: Sequence[Recorded]) -> None:
        """Look at events, in order, until the page is full; keep those that are wanted and may be seen."""
        everything = principal.sees_everything
        if not everything:
            await known.visibility.reached(events[-1].position)
            await known.visibility.learn({event.stream for event in events if wanted(event)})
        for event in events:
            if wanted(event) and (viewer := await known.visibility.viewer(principal, event)) is not None:
                text = event_json(event, viewer)
                self.events.append(orjson.Fragment(text))
                self._bytes += len(text)
            self.looked_at += 1
            self.last_position = event.position
            if self.full:
                break


async def _look_through_the_log(known: Services, principal: Principal, wanted: Wanted, found: Page) -> None:
    while not found.enough:
        events = await known.log.read(after=found.last_position, limit=_READ_AT_ONCE)
        if not events:
            return
        await found.take(known, principal, wanted, events)


async def _look_through_a_stream(
    known: Services, principal: Principal, wanted: Wanted, found: Page, stream: str
) -> None:
    if not principal.sees_everything:
        await readable(known.visibility, principal, stream)
    version = await known.log.version_at(stream, found.last_position)
    if principal.sees_everything and not version and not await known.log.read_stream(stream, limit=1):
        raise ApiError(404, "stream_not_found", f"There is no stream {stream}.")
    while not found.enough:
        events = await known.log.read_stream(stream, after_version=version, limit=_READ_AT_ONCE, one_batch=True)
        if not events:
            return
        await found.take(known, principal, wanted, events)
        version = events[-1].version
