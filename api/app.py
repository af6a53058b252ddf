"""api: the application and its routes, all in one list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from jobledger.api.auth.permissions import SignedIn
from jobledger.api.auth.signed_links import LinkSignIn
from jobledger.api.context import Services
from jobledger.api.dashboard import pages as dashboard
from jobledger.api.dashboard.login import CookieSignIn, cookie_name
from jobledger.api.http.errors import ApiError, on_api_error, on_fault, on_http_exception, on_ledger_error
from jobledger.api.http.memory_budget import MemoryLimited
from jobledger.api.http.middleware import KnownHosts, Limited, Observed, RefusedSignIns, WithoutPrefix
from jobledger.api.http.routing import DocumentedRoute
from jobledger.api.openapi import document as openapi
from jobledger.api.routes import (
    archives,
    batch_actions,
    batches,
    docs,
    files,
    history,
    jobs,
    live,
    log,
    metrics,
    monitoring,
    webhook_echo,
    webhook_endpoints,
    webhooks,
)
from jobledger.ledger.domain.errors import JobledgerError

ROUTES = [
    DocumentedRoute("/", docs.index),
    DocumentedRoute("/api/openapi.json", docs.document),
    DocumentedRoute("/api/docs", docs.page),
    DocumentedRoute("/api/events/jobs", jobs.submit, methods=["POST"]),
    DocumentedRoute("/api/events/jobs", jobs.listing),
    DocumentedRoute("/api/events/jobs/{job_id}", jobs.single),
    DocumentedRoute("/api/events/jobs/{job_id}", jobs.update, methods=["PUT"]),
    DocumentedRoute("/api/events/jobs/{job_id}", jobs.delete, methods=["DELETE"]),
    DocumentedRoute("/api/events/jobs/{job_id}/history", history.of_job),
    DocumentedRoute("/api/events/jobs/{job_id}/logs", history.log_lines),
    DocumentedRoute("/api/events/jobs/{job_id}/download-archive", archives.of_job),
    DocumentedRoute("/api/events/jobs/{job_id}/cancel", jobs.cancel, methods=["POST"]),
    DocumentedRoute("/api/events/jobs/{job_id}/restart", jobs.restart, methods=["POST"]),
    DocumentedRoute("/api/events/jobs/{job_id}/archive", jobs.archive, methods=["POST"]),
    DocumentedRoute("/api/events/jobs/{job_id}/unarchive", jobs.unarchive, methods=["POST"]),
    DocumentedRoute("/api/events/batches", batches.submit, methods=["POST"]),
    DocumentedRoute("/api/events/batches", batches.listing),
    DocumentedRoute("/api/events/batches/{batch_id}", batches.single),
    DocumentedRoute("/api/events/batches/{batch_id}", batch_actions.update, methods=["PUT"]),
    DocumentedRoute("/api/events/batches/{batch_id}", batch_actions.delete, methods=["DELETE"]),
    DocumentedRoute("/api/events/batches/{batch_id}/jobs", batches.jobs_of),
    DocumentedRoute("/api/events/batches/{batch_id}/history", history.of_batch),
    DocumentedRoute("/api/events/batches/{batch_id}/download-archive", archives.of_batch),
    DocumentedRoute("/api/events/batches/{batch_id}/pause", batch_actions.pause, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/resume", batch_actions.resume, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/cancel", batch_actions.cancel, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/restart", batch_actions.restart, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/archive", batch_actions.archive, methods=["POST"]),
    DocumentedRoute("/api/events/batches/{batch_id}/unarchive", batch_actions.unarchive, methods=["POST"]),
    DocumentedRoute("/api/events/files/{path:path}/link", files.link, methods=["POST"]),
    DocumentedRoute("/api/events/files/{path:path}", files.single),
    DocumentedRoute("/api/ledger/events", log.page),
    DocumentedRoute("/api/ledger/stream", live.stream),
    DocumentedRoute("/api/ledger/head", log.head),
    DocumentedRoute("/api/monitoring/events/stats", monitoring.stats),
    DocumentedRoute("/api/monitoring/events/webhooks", webhooks.listing),
    DocumentedRoute("/api/monitoring/events/redeliver", webhooks.redeliver_many, methods=["POST"]),
    DocumentedRoute("/api/monitoring/events/webhooks/{delivery_id}", webhooks.single),
    DocumentedRoute("/api/monitoring/events/webhooks/{delivery_id}/redeliver", webhooks.redeliver, methods=["POST"]),
    DocumentedRoute("/api/monitoring/events/webhook-endpoints", webhook_endpoints.listing),
    DocumentedRoute(
        "/api/monitoring/events/webhook-endpoints/{receiver}/rotate-secret",
        webhook_endpoints.rotate,
        methods=["POST"],
    ),
    DocumentedRoute(
        "/api/monitoring/events/webhook-endpoints/{receiver}/secret", webhook_endpoints.revoke, methods=["DELETE"]
    ),
    DocumentedRoute("/api/events/test-webhook-callback", webhook_echo.receive, methods=["POST"]),
    DocumentedRoute("/api/events/test-webhook-callback", webhook_echo.listing),
    DocumentedRoute("/metrics", metrics.scrape),
    DocumentedRoute("/healthz", monitoring.alive),
    DocumentedRoute("/readyz", monitoring.ready),
]
"""The interface, as the OpenAPI document has it; the dashboard comes on top."""


_ASKED: Final = (
    "Authorization",
    "Cache-Control",  # polyfills of EventSource send it
    "Idempotency-Key",
    "If-Match",
    "If-Modified-Since",
    "If-None-Match",
    "If-Range",
    "If-Unmodified-Since",
    "Last-Event-ID",
    "Ledger-Position",
    "Pragma",
    "Prefer",
    "Range",
    "traceparent",
    "tracestate",
    "X-Request-ID",
    "X-Requested-With",
)
_TOLD: Final = (
    "Accept-Ranges",
    "Content-Disposition",
    "Content-Range",
    "ETag",
    "Ledger-Position",
    "Location",
    "Preference-Applied",
    "Retry-After",
    "X-Request-ID",
)


def _for_pages_of(origins: Sequence[str]) -> list[Middleware]:
    if not origins:
        return []
    methods = ("GET", "POST", "PUT", "DELETE")
    return [
        Middleware(
            CORSMiddleware, allow_origins=origins, allow_methods=methods, allow_headers=_ASKED, expose_headers=_TOLD
        )
    ]


def create_app(services: Services) -> ASGIApp:
    """Return the application, working with what the composition root hands in."""
    responses: metrics.Responses = Counter()
    app = Starlette(
        routes=[*ROUTES, *dashboard.ROUTES],
        middleware=[
            Middleware(
                KnownHosts,
                names=services.allowed_hosts,
                public_origin=services.public_origin,
                origins=services.edge.cors_origins,
                cookie=cookie_name(https=services.edge.https),
            ),
            *_for_pages_of(services.edge.cors_origins),
            Middleware(RefusedSignIns, edge=services.edge),
            Middleware(
                SignedIn,
                sign_in=LinkSignIn(CookieSignIn(services.sign_in, services.sessions, https=services.edge.https)),
                revocations=services.revocations,
                refused=dashboard.refused,
            ),
            Middleware(Limited, edge=services.edge),
            Middleware(MemoryLimited, budget=services.memory),
        ],
        exception_handlers={
            ApiError: on_api_error,
            JobledgerError: on_ledger_error,
            HTTPException: on_http_exception,
            Exception: on_fault,
        },
    )
    app.state.services = services
    app.state.docs = docs.Docs(lambda: openapi.document(ROUTES, services.job_types, services.links.base))
    app.state.responses = responses
    app.router.redirect_slashes = False  # it would redirect to the address behind the proxy: see on_http_exception
    # Around everything: also what Starlette itself answers to a fault has its headers, and is counted.
    return metrics.CountedResponses(Observed(WithoutPrefix(app, services.links.prefix), services.edge), responses)
