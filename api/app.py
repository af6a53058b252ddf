"""The application: route table, middleware and error handlers."""

from __future__ import annotations

from collections import Counter

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
from jobledger.api.http.errors import ApiError, on_api_error, on_http_exception, on_ledger_error, on_unexpected_error
from jobledger.api.http.limits import AuthFailureLimitMiddleware, RateLimitMiddleware
from jobledger.api.http.memory_budget import MemoryLimitMiddleware
from jobledger.api.http.origins import HostOriginMiddleware, build_cors_middleware
from jobledger.api.http.request_context import PathPrefixMiddleware, RequestContextMiddleware
from jobledger.api.http.routing import DocumentedRoute
from jobledger.api.openapi import document as openapi
from jobledger.api.routes import (
    archives,
    batch_actions,
    batches,
    docs,
    files,
    history,
    job_actions,
    jobs,
    log,
    log_stream,
    metrics,
    monitoring,
    webhook_echo,
    webhook_endpoints,
    webhooks,
)
from jobledger.ledger.domain.errors import JobledgerError

ROUTES = [
    DocumentedRoute("/", docs.get_index),
    DocumentedRoute("/api/openapi.json", docs.get_openapi_document),
    DocumentedRoute("/api/docs", docs.get_docs_page),
    DocumentedRoute("/api/events/jobs", jobs.submit_job, methods=["POST"]),
    DocumentedRoute("/api/events/jobs", jobs.list_jobs),
    DocumentedRoute("/api/events/jobs/{job_id}", jobs.get_job),
    DocumentedRoute("/api/events/jobs/{job_id}", job_actions.update_job, methods=["PUT"]),
    DocumentedRoute("/api/events/jobs/{job_id}", job_actions.delete_job, methods=["DELETE"]),
    DocumentedRoute("/api/events/jobs/{job_id}/history", history.get_job_history),
    DocumentedRoute("/api/events/jobs/{job_id}/logs", history.get_job_logs),
    DocumentedRoute("/api/events/jobs/{job_id}/download-archive", archives.download_job_archive),
    DocumentedRoute("/api/events/jobs/{job_id}/cancel", job_actions.cancel_job, methods=["POST"]),
    DocumentedRoute("/api/events/jobs/{job_id}/restart", job_actions.restart_job, methods=["POST"]),
    DocumentedRoute("/api/events/jobs/{job_id}/archive", job_actions.archive_job, methods=["POST"]),
    DocumentedRoute("/api/events/jobs/{job_id}/unarchive", job_actions.unarchive_job, methods=["POST"]),
    DocumentedRoute("/api/events/batches", batches.submit_batch, methods=["POST"]),
    DocumentedRoute("/api/events/batches", batches.list_batches),
    DocumentedRoute("/api/events/batches/{batch_id}", batches.get_batch),
    DocumentedRoute("/api/events/batches/{batch_id}", batch_actions.update_batch, methods=["PUT"]),
    DocumentedRoute("/api/events/batches/{batch_id}", batch_actions.delete_batch, methods=["DELETE"]),
    DocumentedRoute("/api/events/batches/{batch_id}/jobs", batches.list_batch_jobs),
    DocumentedRoute("/api/events/batches/{batch_id}/history", history.get_batch_history),
    DocumentedRoute("/api/events/batches/{batch_id}/download-archive", archives.download_batch_archive),
    DocumentedRoute("/api/events/batches/{batch_id}/pause", batch_actions.pause_batch, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/resume", batch_actions.resume_batch, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/cancel", batch_actions.cancel_batch, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/restart", batch_actions.restart_batch, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/archive", batch_actions.archive_batch, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/unarchive", batch_actions.unarchive_batch, methods=["POST"]),
    DocumentedRoute("/api/events/files/{path:path}/link", files.create_signed_link, methods=["POST"]),
    DocumentedRoute("/api/events/files/{path:path}", files.get_file),
    DocumentedRoute("/api/ledger/events", log.list_events),
    DocumentedRoute("/api/ledger/stream", log_stream.stream_events),
    DocumentedRoute("/api/ledger/head", log.get_log_head),
    DocumentedRoute("/api/monitoring/events/stats", monitoring.get_statistics),
    DocumentedRoute("/api/monitoring/events/webhooks", webhooks.list_deliveries),
    DocumentedRoute("/api/monitoring/events/redeliver", webhooks.redeliver_webhooks, methods=["POST"]),
    DocumentedRoute("/api/monitoring/events/webhooks/{delivery_id}", webhooks.get_delivery),
    DocumentedRoute(
        "/api/monitoring/events/webhooks/{delivery_id}/redeliver", webhooks.redeliver_webhook, methods=["POST"]
    ),
    DocumentedRoute("/api/monitoring/events/webhook-endpoints", webhook_endpoints.list_webhook_endpoints),
    DocumentedRoute(
        "/api/monitoring/events/webhook-endpoints/{endpoint_id}/rotate-secret",
        webhook_endpoints.rotate_endpoint_secret,
        methods=["POST"],
    ),
    DocumentedRoute(
        "/api/monitoring/events/webhook-endpoints/{endpoint_id}/secret",
        webhook_endpoints.revoke_endpoint_secret,
        methods=["DELETE"],
    ),
    DocumentedRoute("/api/events/test-webhook-callback", webhook_echo.receive_webhook_echo, methods=["POST"]),
    DocumentedRoute("/api/events/test-webhook-callback", webhook_echo.list_webhook_echoes),
    DocumentedRoute("/metrics", metrics.get_metrics),
    DocumentedRoute("/healthz", monitoring.check_liveness),
    DocumentedRoute("/readyz", monitoring.check_readiness),
]
"""The routes of the API, in the order of the OpenAPI document. The dashboard has its own."""


def create_app(ctx: ApiContext) -> ASGIApp:
    """Return the ASGI application.

    Middleware, from the outside in: ResponseCounterMiddleware, RequestContextMiddleware, PathPrefixMiddleware, then
    the list below.
    """
    response_counts: metrics.ResponseCounts = Counter()
    options = ctx.http_options
    app = Starlette(
        routes=[*ROUTES, *dashboard.ROUTES],
        middleware=[
            Middleware(
                HostOriginMiddleware,
                allowed_hosts=ctx.allowed_hosts,
                public_origin=ctx.public_origin,
                cors_origins=options.cors_origins,
                session_cookie_name=options.session_cookie_name,
            ),
            *build_cors_middleware(options.cors_origins),
            Middleware(AuthFailureLimitMiddleware, options=options),
            Middleware(
                AuthenticationMiddleware,
                auth_backend=SignedLinkBackend(
                    SessionCookieBackend(ctx.auth_backend, ctx.browser_sessions, options.session_cookie_name)
                ),
                revocation_notifier=ctx.revocation_notifier,
                on_error=build_auth_error_response,
            ),
            Middleware(RateLimitMiddleware, options=options),
            Middleware(MemoryLimitMiddleware, budget=ctx.memory_budget),
        ],
        exception_handlers={
            ApiError: on_api_error,
            JobledgerError: on_ledger_error,
            HTTPException: on_http_exception,
            Exception: on_unexpected_error,
        },
    )
    app.state.context = ctx
    app.state.docs = docs.Docs(lambda: openapi.build_document(ROUTES, ctx.job_types, ctx.signed_links.base_url))
    app.state.response_counts = response_counts
    app.router.redirect_slashes = False  # on_http_exception redirects, also behind a proxy
    # These wrap Starlette itself, so that its own error responses have the common headers and are counted.
    return metrics.ResponseCounterMiddleware(
        RequestContextMiddleware(PathPrefixMiddleware(app, ctx.signed_links.path_prefix), options),
        response_counts,
    )
