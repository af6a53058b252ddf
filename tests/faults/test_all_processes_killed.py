"""kill -9 on everything at once, in the middle of the work: every job is still there and is done, each of them once."""

from __future__ import annotations

import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobledger.ledger.mongo.embedded_lock import wait_until
from tests.support.installation import Installation, RunningCommand, has_exited, http_client, list_descendants
from tests.support.mongodb_provider import needs_local_mongod

pytestmark = [needs_local_mongod, pytest.mark.timeout(180)]

JOBS = 60


def completed(client: httpx.Client) -> int:
    number: int = client.get("/api/monitoring/events/stats").json()["stats"]["jobs"]["completed"]
    return number


def kill_in_the_middle(installation: Installation, up: RunningCommand, least: int) -> None:
    """Kill everything as soon as at least so many jobs are done."""
    processes = list_descendants(up.process.pid) | {up.process.pid}
    with http_client(up) as client:
        assert wait_until(lambda: completed(client) >= least, 60)
        assert completed(client) < JOBS, "too late: nothing is left to be interrupted"
    installation.kill_all_processes()
    assert wait_until(lambda: all(has_exited(pid) for pid in processes), 10), "a process has survived its owner"


def test_killed_twice_in_the_middle_every_job_is_still_there_and_done_once(tmp_path: Path) -> None:
    settings = {"max_concurrent": 5, "lease_seconds": 3, "retry_base_seconds": 0.5}
    with Installation(tmp_path, event_worker=settings) as installation:
        up = installation.start_up_command()
        jobs = [{"job_type": "echo", "parameters": {"seconds": 0.5, "number": number}} for number in range(JOBS)]
        with http_client(up) as client:
            batch = client.post(
                "/api/events/batches", content=json.dumps({"jobs": jobs}), headers={"Content-Type": "application/json"}
            ).json()

        kill_in_the_middle(installation, up, 8)
        up = installation.start_up_command()
        kill_in_the_middle(installation, up, 25)
        up = installation.start_up_command()

        with http_client(up) as client:
            finished = wait_for_the_batch(client, batch["batch_id"])
            histories = {job_id: history(client, job_id) for job_id in batch["job_ids"]}
            listed = client.get("/api/events/jobs?limit=1000", headers={"Ledger-Position": str(finished)}).json()
            stats = client.get("/api/monitoring/events/stats").json()["stats"]
        said = installation.commands[-1].stderr

    assert [job["job_id"] for job in listed["jobs"]] == sorted(batch["job_ids"], reverse=True)
    assert {job["status"] for job in listed["jobs"]} == {"completed"}
    assert {job["parameters"]["number"] for job in listed["jobs"]} == set(range(JOBS))
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
    assert 2 <= expired <= 10, "each time, the jobs that were running lost their worker, and only those"
    assert "Traceback" not in said, said


def wait_for_the_batch(client: httpx.Client, batch_id: str) -> int:
    """Follow the batch by the live stream until it has ended; return the position of that."""
    deadline = time.monotonic() + 90
    query = {"after": "0", "batch_id": batch_id, "types": "BatchFinished"}
    with client.stream("GET", "/api/ledger/stream", params=query) as answer:
        for line in answer.iter_lines():
            if line.startswith("data:"):
                event: dict[str, Any] = json.loads(line.removeprefix("data:"))
                assert event["data"]["status"] == "completed", event
                return int(event["position"])
            assert time.monotonic() < deadline, "the batch does not end"
    raise AssertionError("the stream has ended")


def history(client: httpx.Client, job_id: str) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = client.get(f"/api/events/jobs/{job_id}/history").json()["events"]
    return events
