"""Describe what a route accepts and returns, next to its handler.

`@Operation(…)` registers the description of a handler. The OpenAPI document is built from the route table in api/app.py
and these descriptions. api/openapi/document.py adds what follows from the route itself: path parameters and their 404
codes, `Idempotency-Key` for POST, and the errors of authentication, of bodies and of changes. Describe only the rest.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeVar

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.http.sse import EventStreamResponse
from jobledger.api.schemas.request_models import MinPositionQuery, NoQuery

RouteHandler = Callable[[Request], Awaitable[Response | EventStreamResponse]]
Handler = TypeVar("Handler", bound=RouteHandler)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """The OpenAPI operation of a route.

    Attributes:
        summary: The first line of the description.
        response: The model of the response body, or its media type if it is not JSON.
        status: The status code of success.
        query: The model that the handler validates the query parameters with.
        body: The model of the request body.
        is_body_optional: An empty body means `{}`.
        reads_views: The response comes from the views, so the caller can wait for a `Ledger-Position`.
        appends_events: A method other than GET appends events and returns their `Ledger-Position`.
        extra_statuses: Further success codes, such as 304.
        error_codes: Error codes of this operation, of `ERROR_CODES`.
        request_headers: Request headers, of api/openapi/document.py.
        response_headers: Response headers, of api/openapi/document.py.
    """

    summary: str
    response: type[BaseModel] | str
    status: int = 200
    query: type[BaseModel] | None = None
    body: type[BaseModel] | None = None
    is_body_optional: bool = False
    reads_views: bool = False
    appends_events: bool = True
    extra_statuses: tuple[int, ...] = ()
    error_codes: tuple[str, ...] = ()
    request_headers: tuple[str, ...] = ()
    response_headers: tuple[str, ...] = ()

    @property
    def query_model(self) -> type[BaseModel]:
        """The model of the query parameters, also for handlers that do not read them."""
        return self.query or (MinPositionQuery if self.reads_views else NoQuery)

    def __call__(self, handler: Handler) -> Handler:
        """Register this as the operation of a handler: `@Operation(…)`."""
        OPERATIONS[handler] = self
        return handler


OPERATIONS: Final[dict[RouteHandler, Operation]] = {}
"""The operation of each handler. `@Operation(…)` fills it."""
