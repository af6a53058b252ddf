"""`waiting_for` of jobs: in a job, in lists, in counts of batches, in statistics and in metrics."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from jobledger.cli.checks.database import check_database
from jobledger.ledger.domain.commands import ClaimJob, FailAttempt, JobCommand, ReleaseJob
from jobledger.ledger.domain.events import ErrorInfo, EventMetadata
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import handle_command
from tests.api.conftest import Api, make_settings
from tests.api.test_metrics import load_samples

LATER = "2099-01-01T00:00:00Z"
ERROR = ErrorInfo(code="BROKEN", message="it broke")
EMPTY: dict[str, list[str]] = {"worker": [], "due_time": [], "retry": [], "batch_paused": []}
WORKER = "worker-1"


async def apply(api: Api, job_id: str, *commands: JobCommand) -> int:
    position = 0
    for command in commands:
        result = await handle_command(api.event_store, job_id, command, meta=EventMetadata("test"))
        position = result.events[-1].position
    await api.get("/api/events/jobs", position)
    return position


def claim() -> ClaimJob:
    return ClaimJob(WORKER, datetime.now(UTC) + timedelta(hours=1))


async def fail_until(api: Api, job_id: str, retry_at: datetime) -> int:
    return await apply(api, job_id, claim(), FailAttempt(WORKER, 1, ERROR, retry_at))


async def list_by_kind(api: Api, **filters: str) -> dict[str, list[str]]:
    """Return the IDs of the jobs of each kind according to the filter, and check that the jobs agree with it."""
    found = {}
    for kind in ("worker", "due_time", "retry", "batch_paused"):
        query = "&".join(f"{name}={value}" for name, value in {"waiting_for": kind, **filters}.items())
        page = (await api.get(f"/api/events/jobs?{query}")).json()
        assert page["total"] == len(page["jobs"])
        assert all(job["waiting_for"] == kind for job in page["jobs"])
        found[kind] = sorted(job["job_id"] for job in page["jobs"])
    return found


async def load_job(api: Api, job_id: str, query: str = "") -> Any:
    return (await api.get(f"/api/events/jobs/{job_id}{query}")).json()["job"]


async def test_each_kind_of_waiting_is_in_job_filter_statistics_and_metrics(api_without_worker: Api) -> None:
    api = api_without_worker
    ready, delayed = await api.submit(), await api.submit(not_before=LATER)
    retried, released, processing = await api.submit(), await api.submit(), await api.submit()
    await fail_until(api, retried, datetime.now(UTC) + timedelta(hours=1))
    await apply(api, released, claim(), ReleaseJob(WORKER, 1, "shutdown"))
    await apply(api, processing, claim())
    jobs = [{"job_type": "echo", "parameters": {}}, {"job_type": "echo", "parameters": {}, "not_before": LATER}]
    batch = (await api.post("/api/events/batches", {"jobs": jobs})).json()
    paused = await api.post(f"/api/events/batches/{batch['batch_id']}/pause", {})
    await api.get("/api/events/jobs", int(paused.headers["ledger-position"]))

    expected = {
        "worker": sorted([ready, released]),
        "due_time": [delayed],
        "retry": [retried],
        "batch_paused": sorted(batch["job_ids"]),
    }
    counts = {kind: len(job_ids) for kind, job_ids in expected.items()}
    assert await list_by_kind(api) == expected
    assert await list_by_kind(api, status="pending") == expected
    assert await list_by_kind(api, status="processing") == EMPTY
    assert await list_by_kind(api, q=delayed) == {**EMPTY, "due_time": [delayed]}
    pending = (await api.get("/api/events/jobs?status=pending&job_type=echo")).json()
    assert pending["total"] == len(pending["jobs"]) == 6
    assert (await load_job(api, processing))["waiting_for"] is None
    statistics = (await api.get("/api/monitoring/events/stats")).json()["stats"]
    assert statistics["waiting_for"] == counts
    samples = await load_samples(api)
    assert {kind: samples["jobledger_jobs_waiting", kind] for kind in expected} == counts
    assert samples["jobledger_queue_jobs", ""] == 2
    shown = (await api.get(f"/api/events/batches/{batch['batch_id']}")).json()["batch"]
    assert shown["waiting_for"] == {"worker": 0, "due_time": 0, "retry": 0, "batch_paused": 2}

    resumed = await api.post(f"/api/events/batches/{batch['batch_id']}/resume", {})
    await api.get("/api/events/jobs", int(resumed.headers["ledger-position"]))
    first, second = batch["job_ids"]
    assert await list_by_kind(api, batch_id=batch["batch_id"]) == {
        "worker": [first],
        "due_time": [second],
        "retry": [],
        "batch_paused": [],
    }
    [listed] = (await api.get("/api/events/batches")).json()["batches"]
    assert listed["waiting_for"] == {"worker": 1, "due_time": 1, "retry": 0, "batch_paused": 0}
    before = (
        await api.get(f"/api/events/batches/{batch['batch_id']}?as_of={paused.headers['ledger-position']}")
    ).json()
    assert before["batch"]["waiting_for"]["batch_paused"] == 2


async def test_job_waits_for_worker_once_it_is_due_without_a_write(api_without_worker: Api) -> None:
    api = api_without_worker
    due_at = datetime.now(UTC) + timedelta(seconds=6)
    delayed, retried = await api.submit(not_before=due_at.isoformat()), await api.submit()
    position = await fail_until(api, retried, due_at)
    assert await list_by_kind(api) == {"worker": [], "due_time": [delayed], "retry": [retried], "batch_paused": []}
    samples = await load_samples(api)
    assert samples["jobledger_queue_oldest_job_age_seconds", ""] == 0
    assert samples["jobledger_queue_jobs", ""] == 0

    await asyncio.sleep((due_at - datetime.now(UTC)).total_seconds() + 0.5)
    assert (await list_by_kind(api))["worker"] == sorted([delayed, retried])
    assert 0 < (await load_samples(api))["jobledger_queue_oldest_job_age_seconds", ""] < 60
    assert await api.event_store.read_head_position() == position
    assert (await load_job(api, retried, f"?as_of={position}"))["waiting_for"] == "retry", "as it was then"


async def test_changed_start_time_of_retried_job_is_its_due_time(api_without_worker: Api) -> None:
    api = api_without_worker
    job_id = await api.submit()
    await fail_until(api, job_id, datetime.now(UTC) + timedelta(hours=1))
    changed = await api.http.put(f"/api/events/jobs/{job_id}", json={"not_before": LATER})
    assert changed.json()["job"]["waiting_for"] == "due_time"
    await api.get("/api/events/jobs", int(changed.headers["ledger-position"]))
    assert (await list_by_kind(api))["due_time"] == [job_id]


async def check_jobs(api: Api, mongodb_uri: str, directory: Path) -> tuple[bool, str]:
    """Return what `jobledger doctor` says about the jobs."""
    settings = make_settings(mongodb_uri, api.db.name, directory)
    checks = check_database(settings, Connection(mongodb_uri, api.db.name))
    [result] = [result async for result in checks if result.name == "Jobs"]
    return result.is_ok, result.detail


async def test_doctor_reports_only_jobs_that_could_run_now(
    api_without_worker: Api, mongodb_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = api_without_worker
    await api.submit(not_before=LATER)
    await fail_until(api, await api.submit(), datetime.now(UTC) + timedelta(hours=1))
    batch = (await api.post("/api/events/batches", {"jobs": [{"job_type": "echo", "parameters": {}}]})).json()
    paused = await api.post(f"/api/events/batches/{batch['batch_id']}/pause", {})
    await api.get("/api/events/jobs", int(paused.headers["ledger-position"]))
    waiting = "1 for their start time, 1 for a retry, 1 in paused batches"
    assert await check_jobs(api, mongodb_uri, tmp_path) == (True, f"0 running; waiting: {waiting}")

    submitted = await api.post("/api/events/jobs", {"job_type": "echo", "parameters": {}})
    await api.get("/api/events/jobs", int(submitted.headers["ledger-position"]))
    text = f"0 running; waiting: 1 for a worker, {waiting}"
    assert await check_jobs(api, mongodb_uri, tmp_path) == (False, text)
    await api.db.workers.insert_one(
        {"_id": WORKER, "lease_until": datetime.now(UTC) + timedelta(hours=1), "slots": 2, "accepted_job_types": []}
    )
    assert await check_jobs(api, mongodb_uri, tmp_path) == (True, text), "a worker that just started may take it"
    monkeypatch.setattr("jobledger.cli.checks.database._MAX_WAIT", timedelta(0))
    is_ok, detail = await check_jobs(api, mongodb_uri, tmp_path)
    assert (is_ok, detail.removeprefix(text)) == (
        False,
        "; no worker takes those of type echo, although slots are free",
    )
