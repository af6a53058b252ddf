"""SIGKILL for all processes at once while jobs run: no job is lost, and each is completed once."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobledger.ledger.mongo.embedded_files import wait_until
from tests.support.installation import Installation, RunningCommand, has_exited, http_client, list_descendants
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = [needs_local_mongod, pytest.mark.timeout(180)]

JOBS = 60


def count_completed_jobs(client: httpx.Client) -> int:
    count: int = client.get("/api/monitoring/events/stats").json()["stats"]["jobs"]["completed"]
    return count


def kill_when_jobs_completed(installation: Installation, up: RunningCommand, min_completed: int) -> None:
    """Kill all processes as soon as `min_completed` jobs are completed."""
    processes = list_descendants(up.process.pid) | {up.process.pid}
    with http_client(up) as client:
        assert wait_until(lambda: count_completed_jobs(client) >= min_completed, 60)
        assert count_completed_jobs(client) < JOBS, "too late: no job is left to interrupt"
    installation.kill_all_processes()
    assert wait_until(lambda: all(has_exited(pid) for pid in processes), 60), "a process outlived its owner"


def test_all_processes_killed_twice_complete_each_job_once(tmp_path: Path) -> None:
    settings = {"max_concurrent": 5, "lease_seconds": 3, "retry_base_seconds": 0.5}
    with Installation(tmp_path, event_worker=settings) as installation:
        up = installation.start_up_command()
        jobs = [{"job_type": "echo", "parameters": {"seconds": 0.5, "number": number}} for number in range(JOBS)]
        with http_client(up) as client:
            batch = client.post(
                "/api/events/batches", content=json.dumps({"jobs": jobs}), headers={"Content-Type": "application/json"}
            ).json()

        kill_when_jobs_completed(installation, up, 8)
        up = installation.start_up_command()
        kill_when_jobs_completed(installation, up, 25)
        up = installation.start_up_command()

        with http_client(up) as client:
            position = wait_for_batch_finished(client, batch["batch_id"])
            histories = {job_id: get_history(client, job_id) for job_id in batch["job_ids"]}
            page = client.get("/api/events/jobs?limit=1000", headers={"Ledger-Position": str(position)}).json()
            stats = client.get("/api/monitoring/events/stats").json()["stats"]
        stderr = installation.commands[-1].stderr

    assert [job["job_id"] for job in page["jobs"]] == sorted(batch["job_ids"], reverse=True)
    assert {job["status"] for job in page["jobs"]} == {"completed"}
    assert {job["parameters"]["number"] for job in page["jobs"]} == set(range(JOBS))
    assert stats["jobs"] == {
        **dict.fromkeys(("pending", "processing", "failed", "cancelled"), 0),
        "total": JOBS,
        "completed": JOBS,
    }
    assert stats["batches"] == {"total": 1, "active": 0}
    expired = 0
    for job_id, events in histories.items():
        types = Counter(event["type"] for event in events)
        assert types["JobSubmitted"] == types["JobCompleted"] == 1, (job_id, types)
        assert types["JobClaimed"] == types["JobLeaseExpired"] + 1, (job_id, types)
        assert [event["version"] for event in events] == list(range(1, len(events) + 1))
        assert events[-1]["type"] == "JobCompleted"
        expired += types["JobLeaseExpired"]
    assert 2 <= expired <= 10, "each kill expires the leases of the running jobs only"
    assert "Traceback" not in stderr, stderr


def wait_for_batch_finished(client: httpx.Client, batch_id: str) -> int:
    """Follow the live stream until the batch is finished. Return the position of that event."""
    deadline = time.monotonic() + 90
    query = {"after": "0", "batch_id": batch_id, "types": "BatchFinished"}
    with client.stream("GET", "/api/ledger/stream", params=query) as response:
        for line in response.iter_lines():
            if line.startswith("data:"):
                event: dict[str, Any] = json.loads(line.removeprefix("data:"))
                assert event["data"]["status"] == "completed", event
                return int(event["position"])
            assert time.monotonic() < deadline, "the batch was not finished in time"
    raise AssertionError("the stream ended")


def get_history(client: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = client.get(f"/api/events/jobs/{job_id}/history").json()["events"]
    return events
