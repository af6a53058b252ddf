"""`/metrics`, parsed as Prometheus does, and the metrics that dashboards and alerts use."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from jobledger.ledger.domain.commands import ClaimJob, ExpireLease, FailAttempt
from jobledger.ledger.domain.events import ErrorInfo, EventMetadata
from jobledger.ledger.store.command_handler import handle_command
from tests.api.conftest import Api

DEPLOY = Path(__file__).parents[2] / "deploy"
Samples = dict[tuple[str, str], float]


async def load_samples(api: Api) -> Samples:
    """Return the value of each sample by metric name and label value (empty without a label)."""
    response = await api.get("/metrics")
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/plain; version=")
    samples: Samples = {}
    for family in text_string_to_metric_families(response.text):
        assert family.documentation, family.name
        assert family.type != "unknown", family.name
        for sample in family.samples:
            [label] = sample.labels.values() or [""]
            assert (sample.name, label) not in samples
            samples[sample.name, label] = sample.value
    return samples


async def test_metrics_show_jobs_log_workers_and_http_responses(api: Api) -> None:
    batch = await api.submit_batch({}, {})
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    delayed_id = await api.submit(not_before="2099-01-01T00:00:00Z")
    event = await api.wait_for_event(delayed_id, "JobSubmitted")
    await api.get("/api/events/jobs/job-unknown")
    samples = await load_samples(api)
    assert event["position"] > finished["position"]
    jobs = {status: value for (name, status), value in samples.items() if name == "jobledger_jobs"}
    assert jobs == {"pending": 1, "processing": 0, "completed": 2, "failed": 0, "cancelled": 0}
    assert samples["jobledger_batches", ""] == 1
    assert samples["jobledger_batches_active", ""] == 0
    assert samples["jobledger_queue_jobs", ""] == 0, "no worker could run the delayed job"
    assert samples["jobledger_jobs_waiting", "due_time"] == 1
    assert samples["jobledger_log_head_position", ""] == event["position"]
    assert samples["jobledger_projection_position", ""] == event["position"]
    assert samples["jobledger_projection_lag_events", ""] == 0
    assert samples["jobledger_workers_active", ""] == 1
    assert samples["jobledger_worker_slots", ""] == 5
    assert samples["jobledger_worker_slots_busy", ""] == 0
    assert samples["jobledger_live_streams", ""] == 0
    assert samples["jobledger_events_total", "JobCompleted"] == 2
    assert samples["jobledger_events_total", "BatchFinished"] == 1
    assert samples["jobledger_job_duration_seconds_count", ""] == 2
    assert samples["jobledger_job_duration_seconds_bucket", "+Inf"] == 2
    assert samples["jobledger_http_responses_total", "404"] == 1
    assert samples["jobledger_http_responses_total", "202"] == 2
    assert samples["process_resident_memory_bytes", ""] > 2**20
    assert samples["process_cpu_seconds_total", ""] > 0


async def test_metrics_count_failed_attempts_and_expired_leases(api_without_worker: Api) -> None:
    lease_until = datetime.now(UTC) + timedelta(hours=1)
    job_id = await api_without_worker.submit()
    position = 0
    for command in (
        ClaimJob("worker-1", lease_until),
        FailAttempt("worker-1", 1, ErrorInfo(code="BROKEN", message="it broke"), datetime.now(UTC)),
        ClaimJob("worker-2", lease_until),
        ExpireLease("worker-2", 2),
    ):
        position = (
            (await handle_command(api_without_worker.event_store, job_id, command, meta=EventMetadata("test")))
            .events[-1]
            .position
        )
    await api_without_worker.get("/api/events/jobs", position)
    samples = await load_samples(api_without_worker)
    assert samples["jobledger_events_total", "JobAttemptFailed"] == 1
    assert samples["jobledger_events_total", "JobLeaseExpired"] == 1


async def test_metrics_of_an_empty_log_are_zero(api_without_worker: Api) -> None:
    samples = await load_samples(api_without_worker)
    assert samples["jobledger_jobs", "completed"] == 0
    assert samples["jobledger_job_duration_seconds_count", ""] == 0
    assert samples["jobledger_log_head_position", ""] == 0


async def test_metrics_count_attempts_by_outcome_and_show_queue_age(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    claim = ClaimJob("worker-1", datetime.now(UTC))
    for command in (claim, FailAttempt("worker-1", 1, ErrorInfo(code="BROKEN", message="x"), datetime.now(UTC))):
        await handle_command(api_without_worker.event_store, job_id, command, meta=EventMetadata("test"))
    await api_without_worker.submit()
    event = await api_without_worker.wait_for_event(job_id, "JobAttemptFailed")
    await api_without_worker.get(f"/api/events/jobs/{job_id}", event["position"])
    samples = await load_samples(api_without_worker)
    assert samples["jobledger_job_attempts_total", "retried"] == 1
    assert samples["jobledger_job_attempts_total", "fenced"] == 0
    assert 0 < samples["jobledger_queue_oldest_job_age_seconds", ""] < 30
    assert samples["jobledger_projection_lag_seconds", ""] < 30
    assert samples["jobledger_change_stream_restarts_total", ""] == 0


async def test_metrics_contain_histogram_of_append_duration(api: Api) -> None:
    for _ in range(3):
        await api.submit()
    samples = await load_samples(api)
    assert samples["jobledger_append_duration_seconds_count", ""] >= 3
    assert 0 < samples["jobledger_append_duration_seconds_sum", ""] < 30
    buckets = [value for (name, _), value in samples.items() if name == "jobledger_append_duration_seconds_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == samples["jobledger_append_duration_seconds_count", ""]


async def test_grafana_dashboard_and_alerts_use_existing_metrics(api: Api) -> None:
    batch = await api.submit_batch({})
    await api.wait_for_event(batch["batch_id"], "BatchFinished")
    exposed = {line.split("{")[0].split(" ")[0] for line in (await api.get("/metrics")).text.splitlines()}
    dashboard = json.loads((DEPLOY / "grafana" / "jobledger.json").read_text(encoding="utf-8"))
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    expressions += [rule["expr"] for rule in rules]
    assert len(expressions) > 30
    for expression in expressions:
        for name in re.findall(r"\bjobledger_\w+", expression):
            assert name in exposed, f"{expression} uses {name}, which /metrics does not contain"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(rule["annotations"]["summary"] for rule in rules)
