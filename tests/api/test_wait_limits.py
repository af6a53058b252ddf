"""Requests that wait, for the views or for an end, are limited as live streams are."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from tests.api.conftest import Api, run_api
from tests.support.header_auth import principal_header

JOBS = "/api/events/jobs"
LIMITS = {"max_streams_per_user": 2, "max_streams": 3}


@pytest.fixture
async def stalled(header_auth: None, mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """Without a projector: the views reach nothing, and no job ends."""
    async for running in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"}), api=LIMITS):
        yield running


@pytest.fixture
async def idle(header_auth: None, mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    """Without a worker: no job ends unless it is cancelled."""
    roles = frozenset({"api", "projector"})
    async for running in run_api(mongodb_uri, db_name, tmp_path, roles, api=LIMITS):  # type: ignore[arg-type]  # as above
        yield running


async def answered(tasks: list[asyncio.Task[httpx.Response]], number: int) -> list[httpx.Response]:
    """Wait for the end of so many tasks; return the responses of all that have ended."""
    async with asyncio.timeout(30):
        while sum(task.done() for task in tasks) < number:
            await asyncio.wait([task for task in tasks if not task.done()], return_when=asyncio.FIRST_COMPLETED)
    return [task.result() for task in tasks if task.done()]


async def test_position_not_reached_by_views_gets_503_after_timeout(
    stalled: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.context._VIEW_WAIT_SECONDS", 0.2)
    monkeypatch.setattr("jobledger.api.context._SHORT_WAIT_SECONDS", 0.2)
    await stalled.submit()
    response = await stalled.get(JOBS, 1)
    assert (response.status_code, response.json()["code"]) == (503, "projection_lagging")
    assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize("path", [JOBS, f"{JOBS}/job-1", "/api/events/batches", "/monitoring/events/jobs"])
async def test_requests_waiting_for_views_are_limited(stalled: Api, monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    monkeypatch.setattr("jobledger.api.context._VIEW_WAIT_SECONDS", 60)
    monkeypatch.setattr("jobledger.api.context._SHORT_WAIT_SECONDS", 0.01)
    await stalled.submit()
    alices = [asyncio.create_task(stalled.get(path, 1, **principal_header("alice"))) for _ in range(6)]
    assert [response.status_code for response in await answered(alices, 4)] == [503] * 4
    bobs = [asyncio.create_task(stalled.get(path, 1, **principal_header("bob"))) for _ in range(2)]
    assert [response.status_code for response in await answered(bobs, 1)] == [503]
    assert (await stalled.get(JOBS, 1, **principal_header())).status_code == 503
    waiting = [task for task in (*alices, *bobs) if not task.done()]
    assert len(waiting) == 3
    for task in waiting:
        task.cancel()
    await asyncio.wait(waiting)


async def test_prefer_wait_is_not_applied_above_the_limit(idle: Api) -> None:
    owner = idle.as_user("alice")
    batch = await owner.submit_batch({})
    [job_id] = batch["job_ids"]
    paths = (f"{JOBS}/{job_id}", f"/api/events/batches/{batch['batch_id']}")
    tasks = [asyncio.create_task(owner.get(path, Prefer="wait=50")) for path in paths * 3]
    at_once = await answered(tasks, 4)
    assert [(response.status_code, "preference-applied" in response.headers) for response in at_once] == [
        (200, False)
    ] * 4
    submitted = await owner.post(JOBS, {"job_type": "echo", "parameters": {}}, Prefer="wait=50")
    assert (submitted.status_code, "preference-applied" in submitted.headers) == (202, False)
    assert (await owner.post(f"{paths[0]}/cancel")).status_code == 200
    waited = [response for response in await answered(tasks, 6) if response not in at_once]
    assert [(response.status_code, response.headers["preference-applied"]) for response in waited] == [
        (200, "wait=50")
    ] * 2
