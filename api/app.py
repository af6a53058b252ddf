"""The application: routes, middleware and error handlers."""

from __future__ import annotations

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.types import ASGIApp

from jobledger.api.auth.browser_sessions import SessionCookieBackend
from jobledger.api.auth.permissions import AuthenticationMiddleware
from jobledger.api.auth.signed_links import SignedLinkBackend
from jobledger.api.context import ApiContext
from jobledger.api.dashboard import pages as dashboard
from jobledger.api.dashboard.errors import build_auth_error_response
from jobledger.api.http.errors import ApiError, on_http_exception, on_known_error, on_unexpected_error
from jobledger.api.http.limits import AuthFailureLimitMiddleware, RateLimitMiddleware
from jobledger.api.http.memory_budget import MemoryLimitMiddleware
from jobledger.api.http.origins import HostOriginMiddleware, build_cors_middleware
from jobledger.api.http.request_context import PathPrefixMiddleware, RequestContextMiddleware
from jobledger.api.openapi import document as openapi
from jobledger.api.openapi.operation import OPERATIONS, DocumentedRoute
from jobledger.api.routes import (
    actions,
    batches,
    bulk_actions,
    docs,
    files,
    history,
    jobs,
    log,
    monitoring,
    webhook_echo,
    webhooks,
    zip_archives,
)
from jobledger.ledger.domain.errors import JobledgerError

_ROUTE_MODULES = (
    docs,
    jobs,
    bulk_actions,
    actions,
    batches,
    history,
    zip_archives,
    files,
    log,
    monitoring,
    webhooks,
    webhook_echo,
)
ROUTES = [
    DocumentedRoute(handler)
    for module in _ROUTE_MODULES
    for handler in OPERATIONS
    if handler.__module__ == module.__name__
]
"""The routes of the API: the handlers of each module, in the order of their definitions. The dashboard has its own."""


def create_app(ctx: ApiContext) -> ASGIApp:
    """Return the ASGI application.

    Middleware, from the outside in: RequestContextMiddleware, PathPrefixMiddleware, then the list below.
    """
    settings = ctx.settings
    app = Starlette(
        routes=[*ROUTES, *dashboard.ROUTES],
        middleware=[
            Middleware(
                HostOriginMiddleware,
                allowed_hosts=ctx.allowed_hosts,
                public_origin=settings.public_url,
                cors_origins=settings.cors_origins,
                session_cookie_name=settings.session_cookie_name,
            ),
            *build_cors_middleware(settings.cors_origins),
            Middleware(AuthFailureLimitMiddleware, settings, ctx.trusted_proxies),
            Middleware(
                AuthenticationMiddleware,
                auth_backend=SignedLinkBackend(
                    SessionCookieBackend(ctx.auth_backend, ctx.browser_sessions, settings.session_cookie_name)
                ),
                revocation_notifier=ctx.revocation_notifier,
                on_error=build_auth_error_response,
            ),
            Middleware(RateLimitMiddleware, settings, ctx.trusted_proxies),
            Middleware(MemoryLimitMiddleware, budget=ctx.memory_budget),
        ],
        exception_handlers={
            ApiError: on_known_error,
            JobledgerError: on_known_error,
            HTTPException: on_http_exception,
            Exception: on_unexpected_error,
        },
    )
    app.state.context = ctx
    app.state.max_body_bytes = ctx.settings.max_body_bytes
    app.state.docs = docs.Docs(lambda: openapi.build_document(ROUTES, ctx.job_types, settings.base_url or "/"))
    app.router.redirect_slashes = False  # on_http_exception redirects, also behind a proxy
    # These wrap Starlette itself, so that its own error responses have the common headers and are counted.
    wrapped_app = RequestContextMiddleware(
        PathPrefixMiddleware(app, ctx.signed_links.path_prefix),
        is_https=settings.is_https,
        has_access_log=ctx.has_access_log,
    )
    app.state.response_counts = wrapped_app.response_counts
    return wrapped_app
