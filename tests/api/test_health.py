"""Test `/readyz` while the views are stalled or ahead of the log, and projection errors of single jobs."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.store.command_handler import create_job_id
from jobledger.projections.engine import stalls
from jobledger.projections.views import jobs
from tests.api.conftest import Api, check_error, run_api
from tests.support.polling import poll_until
from tests.support.role_runner import make_echo_job


class FakeClock:
    """The clock of the stall detector. It stands still between calls of `advance`."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeClock:
    clock = FakeClock()
    monkeypatch.setattr(stalls, "time", clock)
    return clock


@pytest.fixture
async def api_without_projector(clock: FakeClock, mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    async for api in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"})):
        yield api


async def advance_until_status(api: Api, clock: FakeClock, status: int) -> httpx.Response:
    """Advance the clock until `/readyz` responds with this status, and return the response.

    The stall detector receives changes of the log and of the checkpoint a moment after they are written.
    """
    response: httpx.Response | None = None

    async def has_status() -> bool:
        nonlocal response
        clock.advance(stalls.STALL_SECONDS)
        response = await api.get("/readyz")
        return response.status_code == status

    await poll_until(has_status, f"/readyz responds with {status}")
    assert response is not None
    return response


async def set_checkpoint(api: Api, position: int) -> None:
    await api.db.checkpoints.update_one({"_id": "views"}, {"$set": {"position": position}})


async def wait_until_reached(api: Api, position: int) -> None:
    """Wait until the process has received this position of the views."""
    response = await api.get("/api/events/jobs", position)
    assert response.status_code == 200, response.text


async def test_readyz_with_stalled_views_gives_the_reason(api_without_projector: Api, clock: FakeClock) -> None:
    api = api_without_projector
    assert (await api.get("/readyz")).status_code == 200
    clock.advance(2 * stalls.STALL_SECONDS)
    assert (await api.get("/readyz")).status_code == 200, "the views are not behind"
    await api.submit()
    response = await advance_until_status(api, clock, 503)
    check_error(response, 503, "projection_stalled")
    assert response.json()["details"] == {"projection_position": 0, "head": 1}
    assert "No projector is running" in response.json()["message"]
    await stalls.record_stall(api.db, "At position 1 of the log is a JobRepainted: upgrade.")
    assert "upgrade" in (await api.get("/readyz")).json()["message"]


async def test_readyz_with_views_ahead_of_log_gives_503(api_without_projector: Api, clock: FakeClock) -> None:
    api = api_without_projector
    await api.submit()
    await set_checkpoint(api, 9)
    await wait_until_reached(api, 1)
    response = await advance_until_status(api, clock, 503)
    check_error(response, 503, "projection_stalled")
    assert response.json()["details"] == {"projection_position": 9, "head": 1}
    assert "were removed" in response.json()["message"]
    await set_checkpoint(api, 1)
    await advance_until_status(api, clock, 200)
    clock.advance(2 * stalls.STALL_SECONDS)
    assert (await api.get("/readyz")).status_code == 200


async def test_readyz_after_removal_of_log_end_gives_503_until_rebuild(
    api_without_projector: Api, clock: FakeClock
) -> None:
    api = api_without_projector
    for _ in range(3):
        await api.submit()
    await set_checkpoint(api, 3)
    await wait_until_reached(api, 3)
    clock.advance(2 * stalls.STALL_SECONDS)
    assert (await api.get("/readyz")).status_code == 200
    await api.db.events.delete_many({"_id": {"$gte": 2}})
    response = await advance_until_status(api, clock, 503)
    check_error(response, 503, "projection_stalled")
    assert response.json()["details"] == {"projection_position": 3, "head": 1}
    assert "were removed" in response.json()["message"]
    await set_checkpoint(api, 1)  # as a rebuild does
    await advance_until_status(api, clock, 200)
    clock.advance(2 * stalls.STALL_SECONDS)
    assert (await api.get("/readyz")).status_code == 200


async def test_readyz_stays_ready_while_views_make_progress(clock: FakeClock, api_without_worker: Api) -> None:
    for _ in range(15):
        response = await api_without_worker.post("/api/events/jobs", {"job_type": "echo", "parameters": {}})
        await asyncio.gather(*(api_without_worker.submit() for _ in range(4)))
        await wait_until_reached(api_without_worker, int(response.headers["ledger-position"]))
        clock.advance(0.9 * stalls.STALL_SECONDS)
        assert (await api_without_worker.get("/readyz")).status_code == 200


async def test_job_with_projection_error_is_shown_with_the_reason(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = jobs.fold

    def fold_with_error(job: Any, event: Any) -> Any:
        if event.data.get("job_name") == "BROKEN":
            raise ZeroDivisionError("an error of fold")
        return fold(job, event)

    with monkeypatch.context() as patch:
        patch.setattr(jobs, "fold", fold_with_error)
        job_id = create_job_id()
        await api_without_worker.handle_commands(job_id, SubmitJob(make_echo_job(job_name="BROKEN")))
        position = await api_without_worker.event_store.read_head_position()
        job = (await api_without_worker.get(f"/api/events/jobs/{job_id}", position)).json()["job"]
    assert job["projection_error"]["position"] == position
    assert "an error of fold" in job["projection_error"]["message"]
    page = await api_without_worker.get(f"/monitoring/events/jobs/{job_id}")
    assert page.status_code == 200
    assert "an error of fold" in page.text
    metrics = (await api_without_worker.get("/metrics")).text
    assert "jobledger_projection_errors 1.0" in metrics
    listed = (await api_without_worker.get("/api/events/jobs")).json()["jobs"]
    assert listed[0]["projection_error"]["type"] == "JobSubmitted"
