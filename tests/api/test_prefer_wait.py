"""`Prefer: wait`: the response comes when the job or batch has finished, or when the time is over."""

from __future__ import annotations

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import create_model

from jobledger.api.finish_notifier import FinishNotifier
from jobledger.api.http.memory_budget import MemoryBudget
from jobledger.api.schemas.batches import BatchBody
from jobledger.api.schemas.jobs import JobBody
from jobledger.ledger.domain.commands import ClaimJob
from jobledger.ledger.domain.events import BatchSubmitted, Event, EventMetadata, JobSubmitted, RecordedEvent
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from tests.api.conftest import WITHOUT_WORKER, Api, run_api
from tests.support.event_examples import NOON
from tests.support.polling import DEADLINE_SECONDS

LONGEST_WAIT_SECONDS = 50.0
"""A request that takes less has not waited for the maximum of 60 seconds."""


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> asyncio.Queue[str]:
    """IDs of jobs and batches, each added when a request starts to wait for it."""
    queue = asyncio.Queue[str]()
    watch = FinishNotifier.watch

    @asynccontextmanager
    async def record_watch(self: FinishNotifier, stream: str) -> AsyncIterator[asyncio.Event]:
        async with watch(self, stream) as completed:
            queue.put_nowait(stream)
            yield completed

    monkeypatch.setattr(FinishNotifier, "watch", record_watch)
    return queue


async def test_submission_with_wait_returns_finished_job(api: Api) -> None:
    response = await api.post(
        "/api/events/jobs", {"job_type": "echo", "parameters": {"text": "now"}}, Prefer="respond-async, wait=20"
    )
    assert response.status_code == 202
    job = response.json()["job"]
    assert (job["status"], job["progress"]["percent"]) == ("completed", 100)
    read = await api.get(f"/api/events/jobs/{job['job_id']}", response.headers["ledger-position"])
    assert read.json()["job"] == job


async def test_read_with_wait_returns_when_job_finishes(api: Api) -> None:
    job_id = await api.submit({"seconds": 0.5})
    start = time.monotonic()
    response = await api.get(f"/api/events/jobs/{job_id}", Prefer="wait=60")
    assert response.json()["job"]["status"] == "completed"
    assert time.monotonic() - start < LONGEST_WAIT_SECONDS


async def test_read_with_expired_wait_returns_current_state(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    start = time.monotonic()
    response = await api_without_worker.get(f"/api/events/jobs/{job_id}", Prefer="wait=1")
    assert response.json()["job"]["status"] == "pending"
    assert 1 <= time.monotonic() - start < LONGEST_WAIT_SECONDS


async def test_concurrent_waits_return_when_their_own_job_finishes(api: Api) -> None:
    jobs = [await api.submit({"seconds": 0.2 * (number % 3)}) for number in range(15)]
    responses = await asyncio.gather(
        *(api.get(f"/api/events/jobs/{job_id}", Prefer="wait=60") for job_id in jobs for _ in range(3))
    )
    assert {response.json()["job"]["status"] for response in responses} == {"completed"}


async def test_deletion_of_job_ends_wait(api_without_worker: Api, waits: asyncio.Queue[str]) -> None:
    job_id = await api_without_worker.submit()
    waiting = asyncio.create_task(api_without_worker.get(f"/api/events/jobs/{job_id}", Prefer="wait=60"))
    assert await asyncio.wait_for(waits.get(), DEADLINE_SECONDS) == job_id
    await api_without_worker.http.delete(f"/api/events/jobs/{job_id}")
    response = await asyncio.wait_for(waiting, DEADLINE_SECONDS)
    assert response.status_code in (200, 404)


async def test_read_of_batch_with_wait_returns_completed_batch(api: Api) -> None:
    batch = await api.submit_batch({"seconds": 0.3}, {})
    response = await api.get(f"/api/events/batches/{batch['batch_id']}", Prefer="wait=20")
    assert response.json()["batch"]["status"] == "completed"


async def test_invalid_preference_is_ignored(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    start = time.monotonic()
    for preference in ("wait", "wait=", "wait=soon", "wait=-1", "return=minimal", "wait=99999999999"):
        assert (await api_without_worker.get(f"/api/events/jobs/{job_id}", Prefer=preference)).status_code == 200
    assert time.monotonic() - start < LONGEST_WAIT_SECONDS, "a preference was applied"


async def test_reads_after_wait_show_the_finished_job(api: Api) -> None:
    """Job, file, list, batch and its jobs agree with the response, although the client sends no position."""
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
        response = await api.post("/api/events/batches", jobs, Prefer="wait=20")
        batch = response.json()["batch"]
        assert (response.status_code, batch["status"], batch["completed_jobs"]) == (202, "completed", 2)
        assert response.headers["preference-applied"] == "wait=20"
        assert (await api.get(f"/api/events/batches/{batch['batch_id']}")).json()["batch"] == batch
        batch_jobs = (await api.get(f"/api/events/batches/{batch['batch_id']}/jobs")).json()["jobs"]
        assert {job["status"] for job in batch_jobs} == {"completed"}


async def test_expired_wait_returns_state_at_end_of_wait(api_without_worker: Api, waits: asyncio.Queue[str]) -> None:
    job_id = await api_without_worker.submit()
    read = asyncio.create_task(api_without_worker.get(f"/api/events/jobs/{job_id}", Prefer="wait=3"))
    body = {"job_type": "echo", "parameters": {}}
    submission = asyncio.create_task(api_without_worker.post("/api/events/jobs", body, Prefer="wait=3"))
    for _ in range(2):
        claim = ClaimJob("worker-1", datetime.now(UTC) + timedelta(hours=1))
        await handle_command(api_without_worker.event_store, await waits.get(), claim, meta=EventMetadata("test"))
    for response in (await read, await submission):
        assert response.json()["job"]["status"] == "processing"  # it was pending when the wait started
        assert response.headers["preference-applied"] == "wait=3"


async def test_every_view_read_returns_ledger_position(api: Api) -> None:
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
        response = await api.get(path)
        assert int(response.headers["ledger-position"]) >= job["position"], path
        assert "preference-applied" not in response.headers


@pytest.mark.parametrize("path", ["/api/events/jobs", "/api/events/batches"])
async def test_wait_keeps_no_body_in_memory_or_budget(
    mongodb_uri: str,
    db_name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    waits: asyncio.Queue[str],
    path: str,
) -> None:
    budgets: list[MemoryBudget] = []

    def record_budget(size: int) -> MemoryBudget:
        budgets.append(MemoryBudget(size))
        return budgets[-1]

    def count_bodies() -> int:
        bodies = (JobBody, BatchBody, JobSubmitted, BatchSubmitted)
        return sum(isinstance(item, bodies) and "marked" in item.parameters for item in gc.get_objects())

    monkeypatch.setattr("jobledger.cli.hosting.server.MemoryBudget", record_budget)
    parameters = {"marked": ["x" * 20] * 20_000}
    job = {"job_type": "echo", "parameters": parameters}
    body = json.dumps({"jobs": [{**job, "parameters": {}}], "parameters": parameters} if "batch" in path else job)
    headers = {"Prefer": "wait=60", "Content-Type": "application/json"}
    async for api in run_api(mongodb_uri, db_name, tmp_path, WITHOUT_WORKER):
        waiting = asyncio.create_task(api.http.post(path, content=body, headers=headers))
        async with asyncio.timeout(DEADLINE_SECONDS):
            await waits.get()
            # The event store keeps its newest events in memory, up to a limit.
            while budgets[0].reserved or count_bodies() > await api.event_store.read_head_position():  # noqa: ASYNC110 - no event signals it
                await asyncio.sleep(0.05)
        assert not waiting.done()
        [event] = await api.event_store.read(limit=1)
        await api.post(f"{path}/{event.stream}/cancel", {})
        assert (await waiting).status_code == 202


async def append_damaged_event(api: Api, stream: str, event_type: str) -> RecordedEvent:
    """Append an event of this type that lacks all fields of the type."""
    last = (await api.event_store.read_stream(stream))[-1]
    head = StreamHead(last.version, last.position, last.hash)
    damaged = create_model(event_type, __base__=Event)()
    [event] = await api.event_store.append(StreamAppend(stream, head, [damaged], EventMetadata("test"), NOON))
    return event


@pytest.mark.parametrize(
    ("kind", "damaged_type", "finishing_type", "status"),
    [
        ("job", "JobAccessChanged", "JobCompleted", "completed"),
        ("batch", "BatchAccessChanged", "BatchFinished", "partial"),
    ],
)
async def test_wait_continues_after_damaged_event_until_damaged_end(
    api_without_worker: Api, waits: asyncio.Queue[str], kind: str, damaged_type: str, finishing_type: str, status: str
) -> None:
    batch = await api_without_worker.submit_batch({})
    stream = batch["batch_id"] if kind == "batch" else batch["job_ids"][0]
    damaged = await append_damaged_event(api_without_worker, stream, damaged_type)
    path = f"/api/events/{'jobs' if kind == 'job' else 'batches'}/{stream}"
    start = time.monotonic()
    first = await api_without_worker.get(path, damaged.position, Prefer="wait=1")
    assert first.json()[kind]["status"] in ("pending", "processing")
    assert time.monotonic() - start >= 1
    assert await waits.get() == stream
    waiting = asyncio.create_task(api_without_worker.get(path, Prefer="wait=60"))
    assert await waits.get() == stream
    await append_damaged_event(api_without_worker, stream, finishing_type)
    finished = (await waiting).json()[kind]
    assert finished["status"] == status
    assert finished["projection_error"]
    assert time.monotonic() - start < LONGEST_WAIT_SECONDS


async def test_wait_for_job_with_damaged_first_event_returns_placeholder(api_without_worker: Api) -> None:
    [event] = await api_without_worker.event_store.append(
        StreamAppend(
            "job-damaged", StreamHead(), [create_model("JobSubmitted", __base__=Event)()], EventMetadata("test"), NOON
        )
    )
    path = f"/api/events/jobs/{event.stream}"
    response = await api_without_worker.get(path, event.position, Prefer="wait=1")
    assert (response.status_code, response.json()) == (200, (await api_without_worker.get(path)).json())
