"""Test submission, status and list of batches over HTTP."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.api.conftest import Api

VALID_JOB: dict[str, Any] = {"job_type": "echo", "parameters": {}}


async def test_submit_batch_creates_all_jobs_with_merged_parameters(shared_api: Api) -> None:
    response = await shared_api.post(
        "/api/events/batches",
        {
            "batch_name": "Saturday",
            "parameters": {"track": "A", "colour": "blue"},
            "user_id": "ada",
            "jobs": [VALID_JOB, {"job_type": "echo", "parameters": {"colour": "red"}, "user_id": "bob"}],
        },
    )
    content, position = response.json(), response.headers["ledger-position"]
    jobs = [
        (await shared_api.get(f"/api/events/jobs/{job_id}", position)).json()["job"] for job_id in content["job_ids"]
    ]

    assert response.status_code == 202
    assert response.headers["location"] == f"/api/events/batches/{content['batch_id']}"
    assert content["batch"]["total_jobs"] == content["batch"]["pending_jobs"] == 2
    assert [job["parameters"] for job in jobs] == [{"track": "A", "colour": "blue"}, {"track": "A", "colour": "red"}]
    assert [job["user_id"] for job in jobs] == ["ada", "bob"]
    assert {job["batch_id"] for job in jobs} == {content["batch_id"]}


async def test_submitted_batch_is_readable_at_once(shared_api: Api) -> None:
    for _ in range(10):
        batch = await shared_api.submit_batch({}, {}, {})
        loaded = (await shared_api.get(f"/api/events/batches/{batch['batch_id']}")).json()["batch"]
        assert loaded["total_jobs"] == 3
        assert loaded["job_ids"] == batch["job_ids"]


async def test_finished_batch_has_job_counts_by_status(api: Api) -> None:
    batch = await api.submit_batch({}, {"fail": "on purpose"}, {})
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    loaded = (await api.get(f"/api/events/batches/{batch['batch_id']}", finished["position"])).json()["batch"]

    assert loaded["status"] == "partial"
    assert (loaded["completed_jobs"], loaded["failed_jobs"], loaded["cancelled_jobs"]) == (2, 1, 0)
    assert (loaded["pending_jobs"], loaded["processing_jobs"]) == (0, 0)
    assert loaded["completed_at"] is not None


async def test_batch_list_filters_by_status_and_owner_newest_first(api: Api) -> None:
    finished = await api.submit_batch({})
    finished_event = await api.wait_for_event(finished["batch_id"], "BatchFinished")
    running = await api.submit_batch({"seconds": 3600}, user_id="ada")
    position = max(finished_event["position"], running["batch"]["position"])

    async def list_ids(query: str) -> list[str]:
        content = (await api.get(f"/api/events/batches{query}", position)).json()
        assert content["total"] >= len(content["batches"])
        return [batch["batch_id"] for batch in content["batches"]]

    assert await list_ids("") == [running["batch_id"], finished["batch_id"]]
    assert await list_ids("?status=completed") == [finished["batch_id"]]
    assert await list_ids("?status=processing") == [running["batch_id"]]
    assert await list_ids("?user_id=ada") == [running["batch_id"]]
    assert await list_ids("?limit=1&skip=1") == [finished["batch_id"]]
    assert await list_ids(f"?id_prefix={running['batch_id']}") == [running["batch_id"]]
    assert await list_ids("?id_prefix=batch-00000000") == []
    assert await list_ids("?archived=true") == []


@pytest.mark.parametrize(
    ("invalid", "path"),
    [
        ({"job_type": "echo", "parameters": {"seconds": "soon"}}, "jobs[2].parameters.seconds"),
        ({"job_type": "nonsense", "parameters": {}}, "jobs[2].job_type"),
        ({"job_type": "echo"}, "jobs[2].parameters"),
        ({"job_type": "echo", "parameters": {}, "prioritty": 3}, "jobs[2].prioritty"),
        ({"job_type": "echo", "parameters": {"number": 2**60}}, "jobs[2].parameters"),
        ({"job_type": "echo", "parameters": {"$where": 1}}, "jobs[2].parameters"),
        ({"job_type": "echo", "parameters": {}, "webhook": {"url": "ftp://x"}}, "jobs[2].webhook.url"),
        ({"job_type": "session", "parameters": {"event": "x"}}, "jobs[2].parameters.session"),
        ("a talk", "jobs[2]"),
        (None, "jobs[2]"),
    ],
    ids=str,
)
async def test_submit_batch_with_invalid_job_is_rejected_with_its_index(
    shared_api: Api, invalid: Any, path: str
) -> None:
    webhook = {"url": "https://example.org/", "headers": {"A": "b"}}
    head = await shared_api.event_store.read_head_position()
    response = await shared_api.post(
        "/api/events/batches", {"jobs": [VALID_JOB, VALID_JOB, invalid, VALID_JOB], "webhook": webhook}
    )

    content = response.json()
    assert response.status_code == 422
    assert path in [error["path"] for error in content["details"]["errors"]], content
    assert content["message"].startswith("jobs[2]")
    await shared_api.check_no_request_recorded(after=head)


@pytest.mark.parametrize("jobs", [[], {}, "x", None, 3], ids=str)
async def test_submit_batch_without_jobs_is_rejected(shared_api: Api, jobs: Any) -> None:
    response = await shared_api.post("/api/events/batches", {"jobs": jobs})

    assert response.status_code == 422
    assert response.json()["details"]["errors"][0]["path"] == "jobs"


async def test_submit_batch_accepts_ten_thousand_jobs_but_not_one_more(api_without_worker: Api) -> None:
    rejected = await api_without_worker.post("/api/events/batches", {"jobs": [VALID_JOB] * 10_001})
    assert rejected.status_code == 422
    assert "10000" in rejected.json()["message"]
    assert await api_without_worker.event_store.read_head_position() == 0

    start = time.monotonic()
    response = await api_without_worker.post("/api/events/batches", {"jobs": [VALID_JOB] * 10_000})
    assert response.status_code == 202, response.text[:500]
    assert time.monotonic() - start < 30
    assert len(set(response.json()["job_ids"])) == 10_000
    position = response.headers["ledger-position"]
    assert position == "10001"
    stats = await _load_statistics_at(api_without_worker, position)
    assert stats["jobs"]["pending"] == 10_000
    assert await api_without_worker.db.jobs.count_documents({}) == 10_000
    assert await api_without_worker.db.queue.count_documents({}) == 10_000


async def _load_statistics_at(api: Api, position: str) -> dict[str, Any]:
    """Request the statistics again while the API responds with 503 and Retry-After, as a client should."""
    deadline = time.monotonic() + 60
    while True:
        response = await api.get("/api/monitoring/events/stats", position)
        if response.status_code == 200:
            stats: dict[str, Any] = response.json()["stats"]
            return stats
        assert response.status_code == 503
        assert response.json()["code"] == "projection_lagging"
        assert "retry-after" in response.headers
        assert time.monotonic() < deadline, "the views do not reach the position"
