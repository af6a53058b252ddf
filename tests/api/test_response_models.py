"""Test that responses match the models of api/schemas, and so the OpenAPI document, without additional fields."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from pydantic import BaseModel

from jobledger.api.app import ROUTES
from jobledger.api.openapi.operation import OPERATIONS
from jobledger.api.schemas.log import EventResource
from jobledger.api.schemas.response_models import ErrorResponse, FieldError
from tests.api.conftest import Api

JOBS, BATCHES = "/api/events/jobs", "/api/events/batches"
WEBHOOK = {"url": "https://example.org/hook", "headers": {"X-Key": "hidden"}}


def check_response(response: httpx.Response) -> Any:
    """Check a response against the operation of its route, without unknown fields, and return its content."""
    method, path = response.request.method, response.request.url.path
    operation = next(
        OPERATIONS[route.endpoint]
        for route in ROUTES
        if method in (route.methods or ()) and route.path_regex.match(path) is not None
    )
    assert response.status_code == operation.status, response.text
    assert isinstance(operation.response, type)
    assert issubclass(operation.response, BaseModel)
    operation.response.model_validate_json(response.content, extra="forbid", strict=True)
    for header in operation.response_headers:
        assert header in response.headers
    return response.json()


async def test_job_responses_match_their_models(api: Api) -> None:
    submitted = check_response(
        await api.post(JOBS, {"job_type": "echo", "parameters": {"track": "A"}, "webhook": WEBHOOK})
    )
    job_id = submitted["job_id"]
    await api.wait_until_finished(job_id)
    assert check_response(await api.get(f"{JOBS}/{job_id}"))["job"]["status"] == "completed"
    failed = await api.submit({"fail": "on purpose"}, max_attempts=1)
    await api.wait_until_finished(failed)
    assert check_response(await api.get(f"{JOBS}/{failed}"))["job"]["error"]["code"] == "ECHO_FAILED"
    assert check_response(await api.get(f"{JOBS}?limit=1"))["next_cursor"]
    for path in (f"{JOBS}/{job_id}/history", f"{JOBS}/{job_id}/history?limit=1", f"{JOBS}/{failed}/logs"):
        assert check_response(await api.get(path))
    for action in ("archive", "unarchive", "restart", "cancel"):
        assert check_response(await api.post(f"{JOBS}/{failed}/{action}"))["job"]
    await api.wait_for_event(failed, "JobCancelled", "JobFailed")
    check_response(await api.http.put(f"{JOBS}/{failed}", json={"access_control": {"visibility": "public"}}))
    assert check_response(await api.http.delete(f"{JOBS}/{failed}"))["job"] is None


async def test_batch_responses_match_their_models(api: Api) -> None:
    jobs = [{"job_type": "echo", "parameters": parameters} for parameters in ({}, {"fail": "on purpose"})]
    submitted = check_response(await api.post(BATCHES, {"jobs": jobs, "batch_name": "two", "webhook": WEBHOOK}))
    batch_id = submitted["batch_id"]
    finished = await api.wait_for_event(batch_id, "BatchFinished")
    assert check_response(await api.get(f"{BATCHES}/{batch_id}", finished["position"]))["batch"]["status"] == "partial"
    for path in (BATCHES, f"{BATCHES}/{batch_id}/jobs", f"{BATCHES}/{batch_id}/history"):
        assert check_response(await api.get(path, finished["position"]))
    for action in ("pause", "resume", "archive", "unarchive", "restart"):
        assert check_response(await api.post(f"{BATCHES}/{batch_id}/{action}"))["batch"]
    check_response(await api.http.put(f"{BATCHES}/{batch_id}", json={"access_control": {"visibility": "team"}}))
    check_response(await api.post(f"{BATCHES}/{batch_id}/cancel"))
    await api.wait_for_event(batch_id, "BatchFinished")


async def test_batch_deletion_response_matches_its_model(shared_api: Api) -> None:
    batch_id = (await shared_api.submit_batch({}))["batch_id"]
    check_response(await shared_api.post(f"{BATCHES}/{batch_id}/cancel"))
    await shared_api.wait_for_event(batch_id, "BatchFinished")
    assert check_response(await shared_api.http.delete(f"{BATCHES}/{batch_id}"))["batch"] is None


async def test_file_log_and_monitoring_responses_match_their_models(api: Api) -> None:
    job = await api.wait_until_finished(await api.submit({"track": "A"}))
    check_response(await api.post(f"/api/events/files/{job['results']['files'][0]['path']}/link"))
    for path in (
        "/api/ledger/events?limit=3",
        "/api/ledger/head",
        "/api/monitoring/events/stats",
        "/",
        "/healthz",
        "/readyz",
    ):
        check_response(await api.get(path))


async def test_live_stream_event_matches_its_model(api_without_worker: Api) -> None:
    await api_without_worker.submit()
    [event] = await api_without_worker.take_events(1, after=0)
    event.pop("sse_id")
    EventResource.model_validate(event, extra="forbid")


@pytest.mark.parametrize("path", [f"{JOBS}/job-none", f"{JOBS}?limit=x", "/nowhere", f"{JOBS}/job-none/cancel"])
async def test_error_response_matches_its_model(shared_api: Api, path: str) -> None:
    response = await shared_api.get(path)
    error = ErrorResponse.model_validate_json(response.content, extra="forbid", strict=True)
    for field_error in error.details.get("errors", ()):
        FieldError.model_validate(field_error, extra="forbid")
    assert re.fullmatch(r"[a-z_]+", error.code)
