"""Statistics, metrics for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/) and health checks.

Each request builds the metrics from counters that exist anyway. Only the counts of this process's responses are kept
for them. Metrics of the whole ledger are the same in every process. `process_…`, `jobledger_live_streams` and
`jobledger_http_responses_total` are of this process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from datetime import datetime
from typing import Any, Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from pymongo import timeout
from starlette.requests import Request
from starlette.responses import Response

from jobledger.api.auth.permissions import require_monitor_role
from jobledger.api.context import ApiContext, get_api_context
from jobledger.api.http.errors import ApiError, build_json_response
from jobledger.api.ledger_position import wait_for_requested_position
from jobledger.api.openapi.operation import Operation
from jobledger.api.schemas.monitoring import ReadinessResponse, StatisticsResponse
from jobledger.api.schemas.response_models import SuccessResponse
from jobledger.ledger.domain.errors import LedgerUnavailable
from jobledger.ledger.mongo.connection import Document, translate_errors
from jobledger.ledger.mongo.lease import OVERDUE_LEASE_FILTER
from jobledger.ledger.outbox import submission as outbox
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.stalls import find_stall_reason
from jobledger.projections.views import job_list, projection_errors, queue, statistics, waiting

_EVENT_OF_OUTCOME: Final = {
    "completed": "JobCompleted",
    "failed": "JobFailed",
    "retried": "JobAttemptFailed",
    "cancelled": "JobCancelled",
    "released": "JobReleased",
    "lease_expired": "JobLeaseExpired",
    "fenced": "WorkerFenced",
}
_PING_TIMEOUT_SECONDS: Final = 3.0


@Operation(
    "GET", "/api/monitoring/events/stats", response=StatisticsResponse, is_from_views=True, error_codes=("forbidden",)
)
async def get_statistics(request: Request) -> Response:
    """Read statistics of jobs, batches and tracks, the active workers, and the projection lag."""
    require_monitor_role(request)
    await wait_for_requested_position(request)
    ctx = get_api_context(request)
    now = ctx.event_store.clock.estimate()
    stats = await statistics.load_statistics(ctx.views, now)
    stats["waiting_for"] = await waiting.count_all_jobs(ctx.views, now)
    head, position = await ctx.event_store.read_head_position(), ctx.checkpoint.position
    stats["workers"] = await _list_active_workers(ctx)
    stats["log"] = {"head": head, "projection_position": position, "lag": max(0, head - position)}
    return build_json_response({"status": "success", "stats": stats})


async def _list_active_workers(ctx: ApiContext) -> list[Document]:
    """Return the workers that hold a lease, with their slots and how many of them are busy."""
    fields = ("host", "slots", "lease_until", "problem", "unhealthy_since")
    with translate_errors("reading the workers"):
        active = {"released": False, "$nor": [OVERDUE_LEASE_FILTER]}
        workers = await ctx.db.workers.find(active, fields, sort=[("_id", 1)]).to_list()
    busy = await job_list.count_running_by_worker(ctx.views) if workers else {}
    return [
        {
            "worker_id": worker["_id"],
            "busy_slots": busy.get(worker["_id"], 0),
            **{name: worker.get(name) for name in fields},
        }
        for worker in workers
    ]


@Operation("GET", "/healthz", response=SuccessResponse)
async def check_liveness(_request: Request) -> Response:
    """Check that the server is running."""
    return build_json_response({"status": "success"})


@Operation("GET", "/readyz", response=ReadinessResponse, error_codes=("database_unavailable", "projection_stalled"))
async def check_readiness(request: Request) -> Response:
    """Check that the server can serve requests.

    A server whose projection has stalled is not ready, because its responses are out of date.
    """
    ctx = get_api_context(request)
    try:
        with translate_errors("responding to a ping"), timeout(_PING_TIMEOUT_SECONDS):
            await ctx.db.command("ping")
    except LedgerUnavailable as error:
        if ctx.disk_monitor.problem is None:
            raise
        message = f"{error} {ctx.disk_monitor.problem}"
        raise ApiError(503, "database_unavailable", message, retry_after_seconds=10) from error
    if ctx.stall_detector.is_stalled():
        position, head = ctx.checkpoint.position, ctx.stall_detector.head
        reason = await find_stall_reason(ctx.db, position, head)
        message = f"The views have stopped at position {position} of {head}. {reason}"
        details = {"projection_position": position, "head": head}
        raise ApiError(503, "projection_stalled", message, details=details)
    content = {"status": "success", "projection_position": ctx.checkpoint.position}
    return build_json_response(content | ({"warning": ctx.disk_monitor.problem} if ctx.disk_monitor.problem else {}))


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
    workers = await _list_active_workers(ctx)
    buckets, total_seconds = statistics.build_duration_histogram(duration_counts)

    durations = HistogramMetricFamily("jobledger_job_duration_seconds", "Time from the first claim to completion.")
    durations.add_metric([], [(_format_bound(bound), count) for bound, count in buckets], total_seconds)
    healthy = GaugeMetricFamily(
        "jobledger_worker_healthy",
        "1 if an active worker claims jobs, 0 if its machine has a problem.",
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
        _build_gauge_by_status("jobledger_jobs", "Jobs in the views, by status.", stats["jobs"]),
        _build_gauge_by_status("jobledger_webhook_deliveries", "Webhook deliveries, by status.", stats["webhooks"]),
        recorded,
        durations,
        GaugeMetricFamily("jobledger_batches", "Batches in the views.", stats["batches"]["total"]),
        GaugeMetricFamily("jobledger_batches_active", "Batches with unfinished jobs.", stats["batches"]["active"]),
        *await _collect_queue_metrics(ctx, now),
        *await _collect_projection_metrics(ctx, now),
        *await _collect_outbox_metrics(ctx),
        GaugeMetricFamily("jobledger_workers_active", "Workers that hold a lease.", len(workers)),
        GaugeMetricFamily(
            "jobledger_worker_slots",
            "Jobs that the active workers can run at a time.",
            sum(worker["slots"] for worker in workers),
        ),
        GaugeMetricFamily(
            "jobledger_worker_slots_busy",
            "Jobs that the active workers run.",
            sum(worker["busy_slots"] for worker in workers),
        ),
    ]


def _build_gauge_by_status(name: str, documentation: str, counts: Mapping[str, Any]) -> Metric:
    gauge = GaugeMetricFamily(name, documentation, labels=["status"])
    for status, count in counts.items():
        if status != "total":
            gauge.add_metric([status], count)
    return gauge


async def _collect_queue_metrics(ctx: ApiContext, now: datetime) -> list[Metric]:
    oldest = await queue.find_oldest_claimable_at(ctx.views, now=now)
    counts = await waiting.count_all_jobs(ctx.views, now)
    by_reason = GaugeMetricFamily(
        "jobledger_jobs_waiting", "Pending jobs, by what they wait for.", labels=["waiting_for"]
    )
    for waiting_for, count in counts.items():
        by_reason.add_metric([waiting_for], count)
    return [
        by_reason,
        GaugeMetricFamily("jobledger_queue_jobs", "Jobs that a worker could run now.", counts["worker"]),
        GaugeMetricFamily(
            "jobledger_queue_oldest_job_age_seconds",
            "How long the longest-waiting job that a worker could run now has waited for one.",
            max(0.0, (now - oldest).total_seconds()) if oldest else 0.0,
        ),
    ]


async def _collect_projection_metrics(ctx: ApiContext, now: datetime) -> list[Metric]:
    head, position = await ctx.event_store.read_head_position(), ctx.checkpoint.position
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


async def _collect_outbox_metrics(ctx: ApiContext) -> list[Metric]:
    with translate_errors("counting the documents of the outbox"):
        waiting = await ctx.db[outbox.COLLECTION].estimated_document_count()
        rejected = await ctx.db[outbox.REJECTED_COLLECTION].estimated_document_count()
    return [
        GaugeMetricFamily("jobledger_outbox_jobs", "Jobs of committed transactions that are not in the log.", waiting),
        GaugeMetricFamily("jobledger_outbox_rejected", "Documents of the outbox that cannot become jobs.", rejected),
    ]


def _format_bound(seconds: float) -> str:
    return "+Inf" if seconds == float("inf") else str(seconds)


def _collect_api_metrics(ctx: ApiContext, response_counts: Mapping[int, int]) -> list[Metric]:
    """Return the metrics of this process as an API server."""
    by_status = CounterMetricFamily("jobledger_http_responses", "Responses of this process.", labels=["status"])
    for status, count in sorted(response_counts.items()):
        by_status.add_metric([str(status)], count)
    return [
        by_status,
        GaugeMetricFamily("jobledger_live_streams", "Open live streams of this process.", len(ctx.live_streams)),
        *collect_process_metrics(ctx.event_store, ctx.change_stream),
        CounterMetricFamily(
            "jobledger_damaged_result_files",
            "Result files that this process opened and found changed in the store.",
            ctx.file_store.integrity.damaged_count,
        ),
    ]


def collect_process_metrics(event_store: EventStore, change_stream: ChangeStream) -> list[Metric]:
    """Return the metrics that every process has, whatever its roles are."""
    appends = HistogramMetricFamily("jobledger_append_duration_seconds", "Duration of this process's appends.")
    appends.add_metric(
        [],
        [(_format_bound(bound), count) for bound, count in event_store.append_durations.get_cumulative_counts()],
        event_store.append_durations.total_seconds,
    )
    restarts = CounterMetricFamily(
        "jobledger_change_stream_restarts", "How often this process had to reopen its change stream."
    )
    restarts.add_metric([], change_stream.restart_count)
    return [appends, restarts]
