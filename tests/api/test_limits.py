"""What a request may hold is limited, on every way; the response names the field, the limit and what was found."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.commands import SubmitJob
from jobledger.ledger.domain.events import EventMetadata
from jobledger.ledger.store.command_handler import handle_command, new_job_id
from jobledger.projections.engine import health
from jobledger.projections.views import jobs
from tests.api.conftest import Api, run_api
from tests.api.test_invalid_requests import refused
from tests.support.role_runner import make_echo_job

NAMES = [f"reader-{number}" for number in range(8000)]
HEADERS = {f"X-Header-{number}": "x" * 7000 for number in range(20)}
WEBHOOK = {"url": "http://example.org/", "headers": HEADERS}
LARGE = {"text": "x" * (limits.MAX_PARAMETERS_BYTES + 1)}
TOO_LARGE: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "one list of names": ({"access_control": {"read_access": NAMES}}, ("read_access", "200", "8000")),
    "three lists together": (
        {"access_control": {"read_access": NAMES[:150], "admin_access": NAMES[:150]}},
        ("access_control", "200", "300"),
    ),
    "one name": ({"access_control": {"write_access": ["x" * 201]}}, ("write_access", "200")),
    "headers": ({"webhook": WEBHOOK}, ("webhook.headers", str(limits.MAX_WEBHOOK_HEADER_BYTES), "140")),
    "parameters": ({"parameters": LARGE}, ("parameters", str(limits.MAX_PARAMETERS_BYTES))),
    "numbers": ({"parameters": {"a": [0] * 900_000}}, ("parameters", str(limits.MAX_PARAMETERS_BYTES))),
    "name": ({"job_name": "x" * 501}, ("job_name", "500")),
    "owner": ({"user_id": "x" * 201}, ("user_id", "200")),
}
JOB: dict[str, Any] = {"job_type": "echo", "parameters": {}}


@pytest.mark.parametrize("name", TOO_LARGE)
async def test_job_over_a_limit_is_rejected_alone_and_in_a_batch(api_without_worker: Api, name: str) -> None:
    content, said = TOO_LARGE[name]
    for path, body in (
        ("/api/events/jobs", JOB | content),
        ("/api/events/batches", {"jobs": [JOB, JOB | content]}),
    ):
        response = await api_without_worker.post(path, body)
        assert response.status_code == 422, response.text[:500]
        for word in said:
            assert word in response.json()["message"], response.json()["message"]
    assert await api_without_worker.event_store.head_position() == 0


async def test_updates_have_the_limits_of_submissions(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    batch = await api_without_worker.submit_batch({}, {})
    access = {"access_control": {"read_access": NAMES}}
    for path, content in (
        (f"/api/events/jobs/{job_id}", access),
        (f"/api/events/jobs/{job_id}", {"parameters": LARGE}),
        (f"/api/events/batches/{batch['batch_id']}", access),
    ):
        head = await api_without_worker.event_store.head_position()
        response = await api_without_worker.http.put(path, json=content)
        refused(response, 422, "invalid_content")
        assert "at most" in response.text
        assert await api_without_worker.event_store.head_position() == head
    jobs_of = {"jobs": [JOB] * 2}
    for content in ({"access_control": access["access_control"]}, {"parameters": LARGE}):
        refused(await api_without_worker.post("/api/events/batches", jobs_of | content), 422, "invalid_content")


async def test_groups_of_the_principal_are_limited(header_auth_api: Api) -> None:
    many = header_auth_api.as_user("anna", [f"team-{number}" for number in range(300)])
    response = await many.post("/api/events/jobs", JOB)
    refused(response, 422, "invalid_content")
    assert "teams: 300 groups" in response.json()["message"]
    some = header_auth_api.as_user("anna", [f"team-{number}" for number in range(100)])
    assert (await some.post("/api/events/jobs", JOB)).status_code == 202


@pytest.fixture
async def without_projector(mongodb_uri: str, db_name: str, tmp_path: Path) -> AsyncIterator[Api]:
    async for running in run_api(mongodb_uri, db_name, tmp_path, frozenset({"api"})):
        yield running


async def test_readyz_with_stalled_views_gives_the_reason(
    without_projector: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = without_projector
    monkeypatch.setattr(health.StallDetector.is_stalled, "__defaults__", (0.3,))
    assert (await api.get("/readyz")).status_code == 200
    await asyncio.sleep(0.5)
    assert (await api.get("/readyz")).status_code == 200, "nothing is behind"
    await api.submit()
    await asyncio.sleep(0.5)
    response = await api.get("/readyz")
    refused(response, 503, "projection_stalled")
    assert response.json()["details"] == {"projection_position": 0, "head": 1}
    assert "No projector is running" in response.json()["message"]
    await health.record_stall(api.db, "At position 1 of the log is a JobRepainted: upgrade.")
    assert "upgrade" in (await api.get("/readyz")).json()["message"]


async def test_readyz_with_views_ahead_of_log_gives_503(
    without_projector: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = without_projector
    monkeypatch.setattr(health.StallDetector.is_stalled, "__defaults__", (0.3,))
    await api.submit()
    await api.db.checkpoints.update_one({"_id": "views"}, {"$set": {"position": 9}})
    await asyncio.sleep(0.6)
    response = await api.get("/readyz")
    refused(response, 503, "projection_stalled")
    assert response.json()["details"] == {"projection_position": 9, "head": 1}
    assert "were removed" in response.json()["message"]
    await api.db.checkpoints.update_one({"_id": "views"}, {"$set": {"position": 1}})
    await asyncio.sleep(0.6)
    assert (await api.get("/readyz")).status_code == 200


async def test_readyz_after_removal_of_log_end_gives_503_until_rebuild(
    without_projector: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    api = without_projector
    monkeypatch.setattr(health.StallDetector.is_stalled, "__defaults__", (0.3,))
    for _ in range(3):
        await api.submit()
    await api.db.checkpoints.update_one({"_id": "views"}, {"$set": {"position": 3}})
    await asyncio.sleep(0.5)
    assert (await api.get("/readyz")).status_code == 200
    await api.db.events.delete_many({"_id": {"$gte": 2}})
    async with asyncio.timeout(5):
        while (response := await api.get("/readyz")).status_code == 200:
            pass
    refused(response, 503, "projection_stalled")
    assert response.json()["details"] == {"projection_position": 3, "head": 1}
    assert "were removed" in response.json()["message"]
    await api.db.checkpoints.update_one({"_id": "views"}, {"$set": {"position": 1}})  # as a rebuild does
    await asyncio.sleep(0.5)
    assert (await api.get("/readyz")).status_code == 200


async def test_readyz_stays_ready_while_views_make_progress(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(health.StallDetector.is_stalled, "__defaults__", (1.0,))
    for _ in range(15):
        await asyncio.gather(*(api_without_worker.submit() for _ in range(5)))
        await asyncio.sleep(0.1)
        assert (await api_without_worker.get("/readyz")).status_code == 200


async def test_job_with_projection_error_is_shown_with_the_reason(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    fold = jobs.fold

    def faulty(job: Any, event: Any) -> Any:
        if event.data.get("job_name") == "BROKEN":
            raise ZeroDivisionError("a fault")
        return fold(job, event)

    with monkeypatch.context() as faults:
        faults.setattr(jobs, "fold", faulty)
        job_id = new_job_id()
        await handle_command(
            api_without_worker.event_store,
            job_id,
            SubmitJob(make_echo_job(job_name="BROKEN")),
            meta=EventMetadata("test"),
        )
        position = await api_without_worker.event_store.head_position()
        shown = (await api_without_worker.get(f"/api/events/jobs/{job_id}", position)).json()["job"]
    assert shown["projection_error"]["position"] == position
    assert "a fault" in shown["projection_error"]["message"]
    page = await api_without_worker.get(f"/monitoring/events/jobs/{job_id}")
    assert page.status_code == 200
    assert "a fault" in page.text
    metrics = (await api_without_worker.get("/metrics")).text
    assert "jobledger_projection_errors 1.0" in metrics
    listed = (await api_without_worker.get("/api/events/jobs")).json()["jobs"]
    assert listed[0]["projection_error"]["type"] == "JobSubmitted"
