"""HTTP server for the metrics of a process without the API."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from jobledger.cli.settings import MetricsSettings
from jobledger.ledger.domain.errors import classify_os_error
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore


@contextmanager
def serve_metrics(settings: MetricsSettings, event_store: EventStore, change_stream: ChangeStream) -> Iterator[int]:
    """Serve the metrics of this process inside the block. Yield the port.

    Raises:
        ResourceUnavailable: The port is in use.
        ConfigurationError: The port cannot be opened.
    """
    from prometheus_client import CollectorRegistry, ProcessCollector, start_http_server

    from jobledger.api.routes.monitoring import CallbackCollector, collect_process_metrics

    registry = CollectorRegistry()
    registry.register(CallbackCollector(lambda: collect_process_metrics(event_store, change_stream)))
    ProcessCollector(registry=registry)
    try:
        server, thread = start_http_server(settings.port or 0, settings.host, registry)
    except OSError as error:
        raise classify_os_error(
            error,
            f"metrics.port: cannot listen on {settings.host}:{settings.port} ({error.strerror}). Use another port, or "
            "null to disable the metrics server.",
        ) from error
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
