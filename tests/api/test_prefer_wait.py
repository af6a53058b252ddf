"""`Prefer: wait`: the answer comes when the job has ended, or after the time that one was ready to wait."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from pathlib import Path

import pytest

from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.api.schemas.batches import BatchBody
from jobledger.api.schemas.jobs import JobBody
from jobledger.ledger.domain.events import BatchSubmitted, JobSubmitted
from tests.api.conftest import Api, run_api


async def test_a_submission_that_waits_is_answered_with_the_finished_job(api: Api) -> None:
    answer = await api.post(
        "/api/events/jobs", {"job_type": "echo", "parameters": {"text": "now"}}, Prefer="respond-async, wait=20"
    )
    assert answer.status_code == 202
    job = answer.json()["job"]
    assert (job["status"], job["progress"]["percent"]) == ("completed", 100)
    seen = await api.get(f"/api/events/jobs/{job['job_id']}", answer.headers["ledger-position"])
    assert seen.json()["job"] == job


async def test_a_read_that_waits_is_answered_as_soon_as_the_job_has_ended(api: Api) -> None:
    job_id = await api.submit({"seconds": 0.5})
    begun = time.monotonic()
    answer = await api.get(f"/api/events/jobs/{job_id}", Prefer="wait=20")
    assert answer.json()["job"]["status"] == "completed"
    assert time.monotonic() - begun < 10


async def test_who_waits_in_vain_is_told_how_it_is_now(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    begun = time.monotonic()
    answer = await api_without_worker.get(f"/api/events/jobs/{job_id}", Prefer="wait=1")
    assert answer.json()["job"]["status"] == "pending"
    assert 1 <= time.monotonic() - begun < 5


async def test_many_wait_for_many_jobs_and_each_hears_of_its_own(api: Api) -> None:
    jobs = [await api.submit({"seconds": 0.2 * (number % 3)}) for number in range(15)]
    answers = await asyncio.gather(
        *(api.get(f"/api/events/jobs/{job_id}", Prefer="wait=30") for job_id in jobs for _ in range(3))
    )
    assert {answer.json()["job"]["status"] for answer in answers} == {"completed"}


async def test_a_job_that_is_deleted_ends_the_waiting(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    waiting = asyncio.create_task(api_without_worker.get(f"/api/events/jobs/{job_id}", Prefer="wait=20"))
    await asyncio.sleep(0.3)
    await api_without_worker.http.delete(f"/api/events/jobs/{job_id}")
    answer = await asyncio.wait_for(waiting, 5)
    assert answer.status_code in (200, 404)


async def test_a_batch_is_waited_for_too(api: Api) -> None:
    batch = await api.submit_batch({"seconds": 0.3}, {})
    answer = await api.get(f"/api/events/batches/{batch['batch_id']}", Prefer="wait=20")
    assert answer.json()["batch"]["status"] == "completed"


async def test_a_preference_that_cannot_be_understood_is_passed_over(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    begun = time.monotonic()
    for preference in ("wait", "wait=", "wait=soon", "wait=-1", "return=minimal", "wait=99999999999"):
        assert (await api_without_worker.get(f"/api/events/jobs/{job_id}", Prefer=preference)).status_code == 200
    assert time.monotonic() - begun < 2


async def test_after_waiting_every_read_shows_the_end(api: Api) -> None:
    """Job, file, list, batch and its jobs agree with the answer, without the caller sending a position."""
    for _ in range(5):
        body = {"job_type": "echo", "parameters": {"text": "now"}}
        submitted = await api.post("/api/events/jobs", body, Prefer="wait=20")
        job = submitted.json()["job"]
        assert submitted.headers["preference-applied"] == "wait=20"
        assert job["status"] == "completed"
        assert int(submitted.headers["ledger-position"]) >= job["position"]
        assert (await api.get(f"/api/events/jobs/{job['job_id']}")).json()["job"] == job
        assert (await api.get(job["results"]["markdown_url"])).status_code == 200
        assert (await api.get("/api/events/jobs?limit=1")).json()["jobs"][0]["status"] == "completed"

        jobs = {"jobs": [body, body]}
        answer = await api.post("/api/events/batches", jobs, Prefer="wait=20")
        batch = answer.json()["batch"]
        assert (answer.status_code, batch["status"], batch["completed_jobs"]) == (202, "completed", 2)
        assert answer.headers["preference-applied"] == "wait=20"
        assert (await api.get(f"/api/events/batches/{batch['batch_id']}")).json()["batch"] == batch
        of_batch = (await api.get(f"/api/events/batches/{batch['batch_id']}/jobs")).json()["jobs"]
        assert {it["status"] for it in of_batch} == {"completed"}


async def test_waiting_in_vain_shows_the_state_at_the_end_of_the_wait(api: Api) -> None:
    job_id = await api.submit({"seconds": 30})
    answer = await api.get(f"/api/events/jobs/{job_id}", Prefer="wait=2")
    assert answer.json()["job"]["status"] == "processing"  # it was pending when the wait began
    assert answer.headers["preference-applied"] == "wait=2"
    again = await api.post("/api/events/jobs", {"job_type": "echo", "parameters": {"seconds": 30}}, Prefer="wait=2")
    assert again.json()["job"]["status"] == "processing"


async def test_every_read_of_the_views_says_their_position(api: Api) -> None:
    batch = await api.submit_batch({})
    job_id = batch["job_ids"][0]
    job = await api.wait_until_finished(job_id)
    for path in (
        "/api/events/jobs",
        f"/api/events/jobs/{job_id}",
        f"/api/events/jobs/{job_id}/download-archive",
        "/api/events/batches",
        f"/api/events/batches/{batch['batch_id']}",
        f"/api/events/batches/{batch['batch_id']}/jobs",
        job["results"]["markdown_url"],
        "/api/monitoring/events/stats",
        "/api/monitoring/events/webhooks",
    ):
        answer = await api.get(path)
        assert int(answer.headers["ledger-position"]) >= job["position"], path
        assert "preference-applied" not in answer.headers


@pytest.mark.parametrize("path", ["/api/events/jobs", "/api/events/batches"])
async def test_nothing_of_a_body_is_kept_or_reserved_during_the_wait(
    mongodb_uri: str, db_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    budgets: list[MemoryBudget] = []

    def budget(size: int) -> MemoryBudget:
        budgets.append(MemoryBudget(size))
        return budgets[-1]

    def kept() -> int:
        bodies = (JobBody, BatchBody, JobSubmitted, BatchSubmitted)
        return sum(isinstance(it, bodies) and "marked" in it.parameters for it in gc.get_objects())

    monkeypatch.setattr("jobledger.cli.server.MemoryBudget", budget)
    parameters = {"marked": ["x" * 20] * 20_000}
    job = {"job_type": "echo", "parameters": parameters}
    body = json.dumps({"jobs": [{**job, "parameters": {}}], "parameters": parameters} if "batch" in path else job)
    headers = {"Prefer": "wait=30", "Content-Type": "application/json"}
    async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api", "projector"})):
        waiting = asyncio.create_task(api.http.post(path, content=body, headers=headers))
        async with asyncio.timeout(10):
            while await api.event_store.head_position() == 0:  # noqa: ASYNC110 - it is not told
                await asyncio.sleep(0.02)
            # The log itself keeps its newest events in memory, up to a limit.
            while budgets[0].reserved or kept() > await api.event_store.head_position():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert not waiting.done()
        [event] = await api.event_store.read(limit=1)
        await api.post(f"{path}/{event.stream}/cancel", {})
        assert (await waiting).status_code == 202
