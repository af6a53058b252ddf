"""Metrics for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).

Each request builds them from counters that exist anyway. Only the counts of this process's responses are kept for them.
Metrics of the whole ledger are the same in every process. `process_…`, `jobledger_live_streams` and
`jobledger_http_responses_total` are of this process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobledger.api.auth.permissions import require_monitor_role
from jobledger.api.context import ApiContext, get_api_context
from jobledger.api.openapi.operation import Operation
from jobledger.api.worker_status import list_live_workers
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.views import jobs as view
from jobledger.projections.views import projection_errors, queue, statistics

ResponseCounts = Counter[int]
"""How many responses of this process had which HTTP status."""
_EVENT_OF_OUTCOME: Final = {
    "completed": "JobCompleted",
    "failed": "JobFailed",
    "retried": "JobAttemptFailed",
    "cancelled": "JobCancelled",
    "released": "JobReleased",
    "lease_expired": "JobLeaseExpired",
    "fenced": "WorkerFenced",
}


class ResponseCounterMiddleware:
    """Count responses by status."""

    def __init__(self, app: ASGIApp, counts: ResponseCounts) -> None:
        self._app = app
        self._counts = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def count_and_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counts[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, count_and_send)


@Operation("GET", "/metrics", response="text/plain", error_codes=("forbidden",))
async def get_metrics(request: Request) -> Response:
    """Read metrics for Prometheus."""
    require_monitor_role(request)
    ctx = get_api_context(request)
    registry = CollectorRegistry()
    metrics = [*await _collect_ledger_metrics(ctx), *_collect_api_metrics(ctx, request.app.state.response_counts)]
    registry.register(CallbackCollector(lambda: metrics))
    ProcessCollector(registry=registry)
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class CallbackCollector(Collector):
    """A collector that returns the metrics of a function."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        """Return the current metrics."""
        return self._collect()


async def _collect_ledger_metrics(ctx: ApiContext) -> list[Metric]:
    """Return the metrics of the whole ledger."""
    now = ctx.event_store.clock.estimate()
    stats = await statistics.load_statistics(ctx.views, now)
    events, duration_counts = await statistics.load_event_and_duration_counts(ctx.views)
    workers = await list_live_workers(ctx.db, ctx.views)
    buckets, total_seconds = statistics.duration_histogram(duration_counts)

    durations = HistogramMetricFamily("jobledger_job_duration_seconds", "Time from the first claim to completion.")
    durations.add_metric([], [(_format_bound(bound), count) for bound, count in buckets], total_seconds)
    healthy = GaugeMetricFamily(
        "jobledger_worker_healthy",
        "1 if a live worker claims jobs, 0 if its machine has a problem.",
        labels=["worker_id"],
    )
    for worker in workers:
        healthy.add_metric([worker["worker_id"]], 0 if worker["problem"] else 1)
    attempts = CounterMetricFamily(
        "jobledger_job_attempts", "Attempts that have ended, by outcome.", labels=["outcome"]
    )
    for outcome, event_type in _EVENT_OF_OUTCOME.items():
        attempts.add_metric([outcome], events.get(event_type, 0))
    recorded = CounterMetricFamily("jobledger_events", "Recorded events, by type.", labels=["type"])
    for event_type, count in sorted(events.items()):
        recorded.add_metric([event_type], count)
    return [
        attempts,
        healthy,
        _gauge_by_status("jobledger_jobs", "Jobs in the views, by status.", stats["jobs"]),
        _gauge_by_status("jobledger_webhook_deliveries", "Webhook deliveries, by status.", stats["webhooks"]),
        recorded,
        durations,
        GaugeMetricFamily("jobledger_batches", "Batches in the views.", stats["batches"]["total"]),
        GaugeMetricFamily("jobledger_batches_active", "Batches with unfinished jobs.", stats["batches"]["active"]),
        *await _collect_queue_metrics(ctx, now),
        *await _collect_projection_metrics(ctx, now),
        GaugeMetricFamily("jobledger_workers_alive", "Workers that hold a lease.", len(workers)),
        GaugeMetricFamily(
            "jobledger_worker_slots",
            "Jobs that the live workers can run at a time.",
            sum(worker["slots"] for worker in workers),
        ),
        GaugeMetricFamily(
            "jobledger_worker_slots_busy",
            "Jobs that the live workers run.",
            sum(worker["busy_slots"] for worker in workers),
        ),
    ]


def _gauge_by_status(name: str, documentation: str, counts: Mapping[str, Any]) -> Metric:
    gauge = GaugeMetricFamily(name, documentation, labels=["status"])
    for status, count in counts.items():
        if status != "total":
            gauge.add_metric([status], count)
    return gauge


async def _collect_queue_metrics(ctx: ApiContext, now: datetime) -> list[Metric]:
    oldest = await view.oldest_pending_created_at(ctx.views)
    return [
        GaugeMetricFamily(
            "jobledger_queue_jobs", "Jobs that wait to be claimed, due or not.", await queue.estimate_depth(ctx.views)
        ),
        GaugeMetricFamily(
            "jobledger_queue_oldest_job_age_seconds",
            "Time since the submission of the oldest pending job.",
            max(0.0, (now - oldest).total_seconds()) if oldest else 0.0,
        ),
    ]


async def _collect_projection_metrics(ctx: ApiContext, now: datetime) -> list[Metric]:
    head, position = await ctx.event_store.head_position(), ctx.checkpoint.position
    unprojected = await ctx.event_store.read(after=position, limit=1) if position < head else []
    return [
        GaugeMetricFamily("jobledger_log_head_position", "The newest position of the log.", head),
        GaugeMetricFamily("jobledger_projection_position", "The position of the views.", position),
        GaugeMetricFamily(
            "jobledger_projection_lag_events", "Positions of the log after that of the views.", max(0, head - position)
        ),
        GaugeMetricFamily(
            "jobledger_projection_lag_seconds",
            "Age of the oldest event that the views do not contain.",
            max(0.0, (now - unprojected[0].time).total_seconds()) if unprojected else 0.0,
        ),
        GaugeMetricFamily(
            "jobledger_projection_errors",
            "Documents of the views that differ from the log.",
            await projection_errors.count(ctx.views),
        ),
    ]


def _format_bound(seconds: float) -> str:
    return "+Inf" if seconds == float("inf") else str(seconds)


def _collect_api_metrics(ctx: ApiContext, responses: ResponseCounts) -> list[Metric]:
    """Return the metrics of this process as an API server."""
    by_status = CounterMetricFamily("jobledger_http_responses", "Responses of this process.", labels=["status"])
    for status, count in sorted(responses.items()):
        by_status.add_metric([str(status)], count)
    damaged = CounterMetricFamily(
        "jobledger_damaged_result_files", "Result files that this process opened and found changed in the store."
    )
    damaged.add_metric([], ctx.file_store.integrity.damaged_count)
    return [
        by_status,
        GaugeMetricFamily("jobledger_live_streams", "Open live streams of this process.", len(ctx.live_streams)),
        *collect_process_metrics(ctx.event_store, ctx.change_stream),
        damaged,
    ]


def collect_process_metrics(event_store: EventStore, change_stream: ChangeStream) -> list[Metric]:
    """Return the metrics that every process has, whatever its roles are."""
    appends = HistogramMetricFamily("jobledger_append_duration_seconds", "Duration of this process's appends.")
    appends.add_metric(
        [],
        [(_format_bound(bound), count) for bound, count in event_store.append_durations.cumulative_counts()],
        event_store.append_durations.total_seconds,
    )
    restarts = CounterMetricFamily(
        "jobledger_change_stream_restarts", "How often this process had to reopen its change stream."
    )
    restarts.add_metric([], change_stream.restart_count)
    return [appends, restarts]
