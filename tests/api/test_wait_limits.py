"""Test that requests that wait for the views or for the end of a job are limited like live streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import Api, RunApi, run_api
from tests.support.header_auth import principal_header
from tests.support.polling import DEADLINE_SECONDS

JOBS = "/api/events/jobs"
LIMITS = {"max_streams_per_user": 2, "max_streams": 3}


@pytest.fixture
async def api_without_projector(
    header_auth: None, mongodb_uri: str, db_name: str, tmp_path: Path
) -> AsyncIterator[Api]:
    """An API without a projector. The views reach no position, and no job finishes."""
    async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"}), api=LIMITS):
        yield api


@pytest.fixture
async def limited_api(header_auth: None, run_without_worker: RunApi) -> AsyncIterator[Api]:
    """An API without a worker. A job finishes only if it is cancelled."""
    async with run_without_worker(api=LIMITS) as api:
        yield api


async def wait_for_responses(tasks: list[asyncio.Task[httpx.Response]], number: int) -> list[httpx.Response]:
    """Wait until `number` tasks are done. Return the responses of all tasks that are done."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while sum(task.done() for task in tasks) < number:
            await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    return [task.result() for task in tasks if task.done()]


async def test_position_not_reached_by_views_gets_503_after_timeout(
    api_without_projector: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.ledger_position._VIEW_WAIT_SECONDS", 0.2)
    monkeypatch.setattr("jobledger.api.ledger_position._SHORT_WAIT_SECONDS", 0.2)
    await api_without_projector.submit()
    response = await api_without_projector.get(JOBS, 1)
    assert (response.status_code, response.json()["code"]) == (503, "projection_lagging")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("path", [JOBS, f"{JOBS}/job-1", "/api/events/batches", "/monitoring/events/jobs"])
async def test_requests_waiting_for_views_are_limited(
    api_without_projector: Api, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr("jobledger.api.ledger_position._VIEW_WAIT_SECONDS", 60)
    monkeypatch.setattr("jobledger.api.ledger_position._SHORT_WAIT_SECONDS", 0.01)
    await api_without_projector.submit()
    requests_of_alice = [
        asyncio.create_task(api_without_projector.get(path, 1, **principal_header("alice"))) for _ in range(6)
    ]
    assert [response.status_code for response in await wait_for_responses(requests_of_alice, 4)] == [503] * 4
    requests_of_bob = [
        asyncio.create_task(api_without_projector.get(path, 1, **principal_header("bob"))) for _ in range(2)
    ]
    assert [response.status_code for response in await wait_for_responses(requests_of_bob, 1)] == [503]
    assert (await api_without_projector.get(JOBS, 1, **principal_header())).status_code == 503
    waiting = [task for task in (*requests_of_alice, *requests_of_bob) if not task.done()]
    assert len(waiting) == 3
    await api_without_projector.db.checkpoints.update_one({"_id": "views"}, {"$set": {"position": 1}})
    assert 503 not in [response.status_code for response in await wait_for_responses(waiting, 3)]


async def test_prefer_wait_is_not_applied_above_the_limit(limited_api: Api) -> None:
    owner = limited_api.as_user("alice")
    batch = await owner.submit_batch({})
    [job_id] = batch["job_ids"]
    paths = (f"{JOBS}/{job_id}", f"/api/events/batches/{batch['batch_id']}")
    tasks = [asyncio.create_task(owner.get(path, Prefer="wait=50")) for path in paths * 3]
    immediate = await wait_for_responses(tasks, 4)
    assert [(response.status_code, "preference-applied" in response.headers) for response in immediate] == [
        (200, False)
    ] * 4
    submitted = await owner.post(JOBS, {"job_type": "echo", "parameters": {}}, Prefer="wait=50")
    assert (submitted.status_code, "preference-applied" in submitted.headers) == (202, False)
    assert (await owner.post(f"{paths[0]}/cancel")).status_code == 200
    delayed = [response for response in await wait_for_responses(tasks, 6) if response not in immediate]
    results = [(response.status_code, response.headers["preference-applied"]) for response in delayed]
    assert results == [(200, "wait=50")] * 2
