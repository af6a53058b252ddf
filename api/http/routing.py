"""Routes that reject query parameters that their operation does not document."""

from __future__ import annotations

from starlette.requests import Request
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jobledger.api.context import parse_query
from jobledger.api.openapi.operation import OPERATIONS


class DocumentedRoute(Route):
    """A route with an `Operation`. If its handler has no query model, the route validates the query parameters."""

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = OPERATIONS[self.endpoint]
        if operation.query is None and scope["query_string"] and scope["method"] in (self.methods or ()):
            parse_query(Request(scope), operation.query_model)
        await super().handle(scope, receive, send)
