"""The numbers for Prometheus, read as Prometheus reads them."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import yaml
from prometheus_client.parser import text_string_to_metric_families

from jobledger.ledger.domain.commands import ClaimJob, ExpireLease, FailAttempt
from jobledger.ledger.domain.events import EventMetadata, Failure
from jobledger.ledger.store.command_handler import handle_command
from tests.api.conftest import Api

DEPLOY = Path(__file__).parents[2] / "deploy"
Numbers = dict[tuple[str, str], float]


async def numbers(api: Api) -> Numbers:
    """Return each number by the name of its metric and the value of its label, if it has one."""
    answer = await api.get("/metrics")
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found: Numbers = {}
    for family in text_string_to_metric_families(answer.text):
        assert family.documentation, family.name
        assert family.type != "unknown", family.name
        for sample in family.samples:
            [label] = sample.labels.values() or [""]
            assert (sample.name, label) not in found
            found[sample.name, label] = sample.value
    return found


async def test_prometheus_can_read_what_has_happened(api: Api) -> None:
    batch = await api.submit_batch({}, {})
    ended = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    waiting = await api.submit(not_before="2099-01-01T00:00:00Z")
    event = await api.wait_for_event(waiting, "JobSubmitted")
    await api.get("/api/events/jobs/job-unknown")
    found = await numbers(api)
    assert event["position"] > ended["position"]
    jobs = {status: value for (name, status), value in found.items() if name == "jobledger_jobs"}
    assert jobs == {"pending": 1, "processing": 0, "completed": 2, "failed": 0, "cancelled": 0}
    assert found["jobledger_batches", ""] == 1
    assert found["jobledger_batches_active", ""] == 0
    assert found["jobledger_queue_jobs", ""] == 1
    assert found["jobledger_log_head_position", ""] == event["position"]
    assert found["jobledger_projection_position", ""] == event["position"]
    assert found["jobledger_projection_lag_events", ""] == 0
    assert found["jobledger_workers_alive", ""] == 1
    assert found["jobledger_worker_slots", ""] == 5
    assert found["jobledger_worker_slots_busy", ""] == 0
    assert found["jobledger_live_streams", ""] == 0
    assert found["jobledger_events_total", "JobCompleted"] == 2
    assert found["jobledger_events_total", "BatchFinished"] == 1
    assert found["jobledger_job_duration_seconds_count", ""] == 2
    assert found["jobledger_job_duration_seconds_bucket", "+Inf"] == 2
    assert found["jobledger_http_responses_total", "404"] == 1
    assert found["jobledger_http_responses_total", "202"] == 2
    assert found["process_resident_memory_bytes", ""] > 2**20
    assert found["process_cpu_seconds_total", ""] > 0


async def test_failed_attempts_and_leases_that_ran_out_are_counted(api_without_worker: Api) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    job_id = await api_without_worker.submit()
    position = 0
    for command in (
        ClaimJob("worker-1", later),
        FailAttempt("worker-1", 1, Failure(code="BROKEN", message="it broke"), datetime.now(UTC)),
        ClaimJob("worker-2", later),
        ExpireLease("worker-2", 2),
    ):
        position = (
            (await handle_command(api_without_worker.event_store, job_id, command, meta=EventMetadata("test")))
            .events[-1]
            .position
        )
    await api_without_worker.get("/api/events/jobs", position)
    found = await numbers(api_without_worker)
    assert found["jobledger_events_total", "JobAttemptFailed"] == 1
    assert found["jobledger_events_total", "JobLeaseExpired"] == 1


async def test_numbers_are_there_before_anything_has_happened(api_without_worker: Api) -> None:
    found = await numbers(api_without_worker)
    assert found["jobledger_jobs", "completed"] == 0
    assert found["jobledger_job_duration_seconds_count", ""] == 0
    assert found["jobledger_log_head_position", ""] == 0


async def test_attempts_are_told_by_how_they_ended_and_what_waits_by_its_age(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    claim = ClaimJob("worker-1", datetime.now(UTC))
    for command in (claim, FailAttempt("worker-1", 1, Failure(code="BROKEN", message="x"), datetime.now(UTC))):
        await handle_command(api_without_worker.event_store, job_id, command, meta=EventMetadata("test"))
    await api_without_worker.submit()
    event = await api_without_worker.wait_for_event(job_id, "JobAttemptFailed")
    await api_without_worker.get(f"/api/events/jobs/{job_id}", event["position"])
    found = await numbers(api_without_worker)
    assert found["jobledger_job_attempts_total", "retried"] == 1
    assert found["jobledger_job_attempts_total", "fenced"] == 0
    assert 0 < found["jobledger_queue_oldest_job_age_seconds", ""] < 30
    assert found["jobledger_projection_lag_seconds", ""] < 30
    assert found["jobledger_change_stream_restarts_total", ""] == 0


async def test_appends_are_told_by_how_long_they_took(api: Api) -> None:
    for _ in range(3):
        await api.submit()
    found = await numbers(api)
    assert found["jobledger_append_duration_seconds_count", ""] >= 3
    assert 0 < found["jobledger_append_duration_seconds_sum", ""] < 30
    buckets = [value for (name, _), value in found.items() if name == "jobledger_append_duration_seconds_bucket"]
    assert buckets == sorted(buckets)
    assert buckets[-1] == found["jobledger_append_duration_seconds_count", ""]


async def test_dashboard_and_alerts_ask_for_numbers_that_there_are(api: Api) -> None:
    batch = await api.submit_batch({})
    await api.wait_for_event(batch["batch_id"], "BatchFinished")
    shown = {line.split("{")[0].split(" ")[0] for line in (await api.get("/metrics")).text.splitlines()}
    dashboard = json.loads((DEPLOY / "grafana" / "jobledger.json").read_text(encoding="utf-8"))
    alerts = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    rules = [rule for group in alerts["groups"] for rule in group["rules"]]
    asked += [rule["expr"] for rule in rules]
    assert len(asked) > 30
    for expression in asked:
        for name in re.findall(r"\bjobledger_\w+", expression):
            assert name in shown, f"{expression} asks for {name}, which nobody shows"
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    assert all(rule["annotations"]["summary"] for rule in rules)
