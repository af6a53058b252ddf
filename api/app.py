"""api: the application and its routes, all in one list."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from api import archives, batches, files, history, jobs, ledger, live, metrics, monitoring
from api.access import SignedIn
from api.errors import (
    ApiError,
    error_response,
    json_response,
    on_api_error,
    on_fault,
    on_http_exception,
    on_ledger_error,
)
from api.links import LinkSignIn
from api.services import Services
from ledger.errors import JobledgerError


async def index(_request: Request) -> Response:
    """GET /"""
    return json_response(
        {
            "status": "success",
            "service": "jobledger",
            "jobs": "/api/events/jobs",
            "batches": "/api/events/batches",
            "statistics": "/api/monitoring/events/stats",
            "log": "/api/ledger/events",
            "live": "/api/ledger/stream",
        }
    )


ROUTES = [
    Route("/", index),
    Route("/api/events/jobs", jobs.submit, methods=["POST"]),
    Route("/api/events/jobs", jobs.listing),
    Route("/api/events/jobs/{job_id}", jobs.single),
    Route("/api/events/jobs/{job_id}", jobs.update, methods=["PUT"]),
    Route("/api/events/jobs/{job_id}", jobs.delete, methods=["DELETE"]),
    Route("/api/events/jobs/{job_id}/history", history.of_job),
    Route("/api/events/jobs/{job_id}/logs", history.log_lines),
    Route("/api/events/jobs/{job_id}/download-archive", archives.of_job),
    Route("/api/events/jobs/{job_id}/cancel", jobs.cancel, methods=["POST"]),
    Route("/api/events/jobs/{job_id}/restart", jobs.restart, methods=["POST"]),
    Route("/api/events/jobs/{job_id}/archive", jobs.archive, methods=["POST"]),
    Route("/api/events/jobs/{job_id}/unarchive", jobs.unarchive, methods=["POST"]),
    Route("/api/events/batches", batches.submit, methods=["POST"]),
    Route("/api/events/batches", batches.listing),
    Route("/api/events/batches/{batch_id}", batches.single),
    Route("/api/events/batches/{batch_id}", batches.update, methods=["PUT"]),
    Route("/api/events/batches/{batch_id}", batches.delete, methods=["DELETE"]),
    Route("/api/events/batches/{batch_id}/jobs", batches.jobs_of),
    Route("/api/events/batches/{batch_id}/history", history.of_batch),
    Route("/api/events/batches/{batch_id}/download-archive", archives.of_batch),
    Route("/api/events/batches/{batch_id}/pause", batches.pause, methods=["POST"]),
    Route("/api/events/batches/{batch_id}/resume", batches.resume, methods=["POST"]),
    Route("/api/events/batches/{batch_id}/cancel", batches.cancel, methods=["POST"]),
    Route("/api/events/batches/{batch_id}/restart", batches.restart, methods=["POST"]),
    Route("/api/events/batches/{batch_id}/archive", batches.archive, methods=["POST"]),
    Route("/api/events/batches/{batch_id}/unarchive", batches.unarchive, methods=["POST"]),
    Route("/api/events/files/{path:path}/link", files.link, methods=["POST"]),
    Route("/api/events/files/{path:path}", files.single),
    Route("/api/ledger/events", ledger.page),
    Route("/api/ledger/stream", live.stream),
    Route("/api/ledger/head", ledger.head),
    Route("/api/monitoring/events/stats", monitoring.stats),
    Route("/metrics", metrics.scrape),
    Route("/healthz", monitoring.alive),
    Route("/readyz", monitoring.ready),
]


class KnownHosts:
    """Against other sites' pages: they must not reach us under their name (DNS rebinding), nor change anything here.

    Starlette's own TrustedHostMiddleware does not answer in our envelope.
    """

    def __init__(self, app: ASGIApp, names: Collection[str]) -> None:
        self._app = app
        self._names = frozenset(name.strip("[]").lower() for name in names)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if _host_name(host) not in self._names:
            message = (
                f"Nothing here is called {host[:100]!r}; the name that others know us by is set by api.public_url."
            )
            await error_response(ApiError(400, "unknown_host", message))(scope, receive, send)
        elif origin is not None and scope["method"] not in ("GET", "HEAD") and not self._is_ours(origin):
            message = f"A page of {origin[:100]!r} may not change anything here."
            await error_response(ApiError(403, "foreign_origin", message))(scope, receive, send)
        else:
            await self._app(scope, receive, send)

    def _is_ours(self, origin: str) -> bool:
        return _host_name(origin.partition("://")[2]) in self._names


def _host_name(host: str) -> str | None:
    try:
        return urlsplit(f"//{host}").hostname
    except ValueError:
        return None


def create_app(services: Services) -> Starlette:
    """Return the application, working with what the composition root hands in."""
    responses: metrics.Responses = Counter()
    app = Starlette(
        routes=ROUTES,
        middleware=[
            Middleware(metrics.CountedResponses, counted=responses),
            Middleware(KnownHosts, names=services.allowed_hosts),
            Middleware(SignedIn, sign_in=LinkSignIn(services.sign_in)),
        ],
        exception_handlers={
            ApiError: on_api_error,
            JobledgerError: on_ledger_error,
            HTTPException: on_http_exception,
            Exception: on_fault,
        },
    )
    app.state.services = services
    app.state.responses = responses
    return app
