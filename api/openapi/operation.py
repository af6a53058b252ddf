"""Describe what a route accepts and returns, next to its handler.

`@Operation("GET", "/path", …)` registers the description of a handler. `DocumentedRoute` is the route of a handler, and
api/openapi/document.py builds the OpenAPI document from the routes. It adds what follows from the route itself: path
parameters and their 404 codes, `Idempotency-Key` for POST, and the errors of authentication, of bodies and of changes.
Describe only the rest.
"""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from dataclasses import KW_ONLY, dataclass
from typing import Final, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from jobledger.api.http.sse import EventStreamResponse
from jobledger.api.http.validation import validate_content
from jobledger.api.schemas.request_models import MinPositionQuery, NoQuery

RouteHandler = Callable[[Request], Awaitable[Response | EventStreamResponse]]
Handler = TypeVar("Handler", bound=RouteHandler)


@dataclass(frozen=True, slots=True)
class Operation:
    """The OpenAPI operation of a route.

    Attributes:
        method: The HTTP method.
        path: The path with its parameters, in the syntax of Starlette.
        response: The model of the response body, or its media type if it is not JSON.
        status: The status code of success.
        query: The model that the handler validates the query parameters with.
        body: The model of the request body.
        is_body_optional: An empty body means `{}`.
        is_conditional: The response has an ETag, and the handler evaluates `If-Match` and `If-None-Match`.
        is_from_views: The response comes from the views, so the caller can wait for a `Ledger-Position`.
        can_append_events: A method other than GET appends events and returns their `Ledger-Position`.
        error_codes: Error codes of this operation, of `ERROR_CODES`.
        request_headers: Request headers, of api/openapi/document.yaml.
        response_headers: Response headers, of api/openapi/document.yaml.
    """

    method: str
    path: str
    _: KW_ONLY
    response: type[BaseModel] | str
    status: int = 200
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    is_body_optional: bool = False
    is_conditional: bool = False
    is_from_views: bool = False
    can_append_events: bool = True
    error_codes: tuple[str, ...] = ()
    request_headers: tuple[str, ...] = ()
    response_headers: tuple[str, ...] = ()

    @property
    def query_model(self) -> type[BaseModel]:
        """The model of the query parameters, also for handlers that do not read them."""
        return self.query or (MinPositionQuery if self.is_from_views else NoQuery)

    def __call__(self, handler: Handler) -> Handler:
        """Register this as the operation of a handler: `@Operation(…)`."""
        OPERATIONS[handler] = self
        return handler


OPERATIONS: Final[dict[RouteHandler, Operation]] = {}
"""The operation of each handler. `@Operation(…)` fills it."""


class DocumentedRoute(Route):
    """The route of a handler with an `Operation`. It validates query parameters that the handler does not read."""

    def __init__(self, handler: RouteHandler) -> None:
        self.operation = OPERATIONS[handler]
        super().__init__(self.operation.path, handler, methods=[self.operation.method])

    @property
    def summary(self) -> str:
        """The first line of the handler's docstring, without its full stop."""
        return (inspect.getdoc(self.endpoint) or "").partition("\n")[0].removesuffix(".")

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        if self.operation.query is None and scope["query_string"] and scope["method"] in (self.methods or ()):
            validate_content(self.operation.query_model, dict(Request(scope).query_params))
        await super().handle(scope, receive, send)
