"""api: the numbers for Prometheus (https://prometheus.io/docs/instrumenting/exposition_formats/).

They are put together for each request, from counters that are there anyway: nothing is kept for them but how often this
process has answered how. What is true of the whole ledger is the same from every process; `process_…`,
`jobledger_live_streams` and `jobledger_http_responses_total` are this process's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Metric, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jobledger.api.context import ApiContext, get_api_context
from jobledger.api.routes.monitoring import list_live_workers, require_monitor_role
from jobledger.ledger.store.change_stream import ChangeStream
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.views import jobs as view
from jobledger.projections.views import projection_errors, queue, statistics

ResponseCounts = Counter[int]
"""How many answers of this process had which HTTP status."""


_OUTCOMES: Final = {
    "completed": "JobCompleted",
    "failed": "JobFailed",
    "retried": "JobAttemptFailed",
    "cancelled": "JobCancelled",
    "released": "JobReleased",
    "lease_expired": "JobLeaseExpired",
    "fenced": "WorkerFenced",
}


class ResponseCounterMiddleware:
    """Middleware: counts the answers."""

    def __init__(self, app: ASGIApp, counts: ResponseCounts) -> None:
        self._app = app
        self._counted = counts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._counted[message["status"]] += 1
            await send(message)

        await self._app(scope, receive, counting)


async def get_metrics(request: Request) -> Response:
    """GET /metrics"""
    require_monitor_role(request)
    known = get_api_context(request)
    registry = CollectorRegistry()
    found = [*await _of_the_ledger(known), *_of_this_process(known, request.app.state.response_counts)]
    registry.register(CallbackCollector(lambda: found))
    ProcessCollector(registry=registry)
    return Response(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class CallbackCollector(Collector):
    """What was put together, or is when it is asked for."""

    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self._collect = collect

    def collect(self) -> Iterable[Metric]:
        """Return the numbers as they are now."""
        return self._collect()


async def _of_the_ledger(known: ApiContext) -> list[Metric]:
    now = known.event_store.clock.estimate()
    counted = await statistics.load_statistics(known.views, now)
    events, took = await statistics.load_event_and_duration_counts(known.views)
    workers = await list_live_workers(known.db, known.views)
    head, views = await known.event_store.head_position(), known.checkpoint.position
    classes, seconds = statistics.duration_histogram(took)
    oldest = await view.oldest_pending_created_at(known.views)
    unfolded = await known.event_store.read(after=views, limit=1) if views < head else []

    jobs = GaugeMetricFamily("jobledger_jobs", "Jobs in the views, by status.", labels=["status"])
    for status, number in counted["jobs"].items():
        if status != "total":
            jobs.add_metric([status], number)
    happened = CounterMetricFamily("jobledger_events", "Events that have happened, by type.", labels=["type"])
    for name, number in sorted(events.items()):
        happened.add_metric([name], number)
    webhooks = GaugeMetricFamily("jobledger_webhook_deliveries", "Webhooks, by status.", labels=["status"])
    for status, number in counted["webhooks"].items():
        if status != "total":
            webhooks.add_metric([status], number)
    durations = HistogramMetricFamily("jobledger_job_duration_seconds", "From the first claim to completion.")
    durations.add_metric([], [(_bound(bound), number) for bound, number in classes], seconds)
    attempts = CounterMetricFamily("jobledger_job_attempts", "Attempts that have ended, by how.", labels=["outcome"])
    for outcome, name in _OUTCOMES.items():
        attempts.add_metric([outcome], events.get(name, 0))
    healthy = GaugeMetricFamily(
        "jobledger_worker_healthy",
        "1 if a living worker claims jobs, 0 if its machine has trouble.",
        labels=["worker_id"],
    )
    for worker in workers:
        healthy.add_metric([worker["worker_id"]], 0 if worker["problem"] else 1)
    return [
        attempts,
        healthy,
        jobs,
        webhooks,
        happened,
        durations,
        *(
            GaugeMetricFamily(f"jobledger_{name}", about, number)
            for name, about, number in (
                ("batches", "Batches in the views.", counted["batches"]["total"]),
                ("batches_active", "Batches that have not ended.", counted["batches"]["active"]),
                (
                    "queue_jobs",
                    "Jobs that wait to be claimed, due or not.",
                    await queue.estimate_depth(known.views),
                ),
                ("log_head_position", "The newest position in the log.", head),
                ("projection_position", "The position that the views have reached.", views),
                ("projection_lag_events", "How many positions the views are behind.", max(0, head - views)),
                (
                    "projection_lag_seconds",
                    "How old the oldest event is that the views do not contain yet.",
                    max(0.0, (now - unfolded[0].time).total_seconds()) if unfolded else 0.0,
                ),
                (
                    "projection_errors",
                    "Documents of the views that do not show what the log says.",
                    await projection_errors.count(known.views),
                ),
                (
                    "queue_oldest_job_age_seconds",
                    "How long ago the oldest of the waiting jobs was submitted.",
                    max(0.0, (now - oldest).total_seconds()) if oldest else 0.0,
                ),
                ("workers_alive", "Workers that hold a lease.", len(workers)),
                ("worker_slots", "Jobs that they may run at a time.", sum(it["slots"] for it in workers)),
                ("worker_slots_busy", "Jobs that they do run.", sum(it["busy_slots"] for it in workers)),
            )
        ),
    ]


def _bound(seconds: float) -> str:
    return "+Inf" if seconds == float("inf") else str(seconds)


def _of_this_process(known: ApiContext, responses: ResponseCounts) -> list[Metric]:
    answered = CounterMetricFamily("jobledger_http_responses", "Answers of this process.", labels=["status"])
    for status, number in sorted(responses.items()):
        answered.add_metric([str(status)], number)
    return [
        answered,
        GaugeMetricFamily("jobledger_live_streams", "Live streams that are open here.", len(known.live_streams)),
        *collect_process_metrics(known.event_store, known.change_stream),
        _damaged_files(known),
    ]


def _damaged_files(known: ApiContext) -> Metric:
    damaged = CounterMetricFamily(
        "jobledger_damaged_result_files", "Result files this process opened and found to be changed in the store."
    )
    damaged.add_metric([], known.file_store.integrity.damaged_count)
    return damaged


def collect_process_metrics(log: EventStore, changes: ChangeStream) -> list[Metric]:
    """Return what every process knows of itself, whatever its roles are."""
    appends = HistogramMetricFamily("jobledger_append_duration_seconds", "How long appends of this process took.")
    appends.add_metric(
        [],
        [(_bound(bound), number) for bound, number in log.append_durations.cumulative_counts()],
        log.append_durations.total_seconds,
    )
    restarts = CounterMetricFamily(
        "jobledger_change_stream_restarts", "How often this process had to open its change stream again."
    )
    restarts.add_metric([], changes.restart_count)
    return [appends, restarts]
