"""api: routes that refuse query parameters which they do not document."""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jobledger.api.context import parse_query
from jobledger.api.openapi.operations import OPERATIONS


class DocumentedRoute(Route):
    """A route of `DOORS`. Routes without a query model of their own take only what `Door.parameters` has."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        door = OPERATIONS[self.endpoint]
        if door.query is None and scope["query_string"] and scope["method"] in (self.methods or ()):
            parse_query(Request(scope), door.query_model)
        await super().handle(scope, receive, send)
