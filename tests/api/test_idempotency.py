"""`Idempotency-Key`: a repeated request has no second effect and, for most actions, the same response."""

from __future__ import annotations

import asyncio
from uuid import uuid4

import pytest

from tests.api.conftest import Api
from tests.support.header_auth import principal_header

JOB = {"job_type": "echo", "parameters": {"text": "once"}}
KEY = {"Idempotency-Key": "6a0c2a5e-once"}


@pytest.fixture
def key() -> dict[str, str]:
    """The header with a key that no other test sends to the shared API."""
    return {"Idempotency-Key": str(uuid4())}


async def test_repeated_submission_creates_one_job_and_returns_same_response(api_without_worker: Api) -> None:
    first, repeated = [await api_without_worker.post("/api/events/jobs", JOB, **KEY) for _ in range(2)]

    assert (first.status_code, repeated.status_code) == (202, 202)
    assert repeated.json() == first.json()
    assert repeated.headers["ledger-position"] == first.headers["ledger-position"]
    assert await api_without_worker.event_store.read_head_position() == 1


async def test_concurrent_submissions_with_one_key_create_one_job(api_without_worker: Api) -> None:
    responses = await asyncio.gather(*(api_without_worker.post("/api/events/jobs", JOB, **KEY) for _ in range(20)))

    assert {response.status_code for response in responses} == {202}
    assert len({response.json()["job_id"] for response in responses}) == 1
    assert [event.type for event in await api_without_worker.event_store.read()].count("JobSubmitted") == 1


async def test_concurrent_batches_with_one_key_create_one_batch(api_without_worker: Api) -> None:
    body = {"jobs": [JOB, JOB, JOB], "batch_name": "once"}
    responses = await asyncio.gather(*(api_without_worker.post("/api/events/batches", body, **KEY) for _ in range(20)))

    assert {response.status_code for response in responses} == {202}
    assert len({response.text for response in responses}) == 1
    first = responses[0].json()
    assert first["job_ids"] == first["batch"]["job_ids"]
    position = responses[0].headers["ledger-position"]
    jobs = (await api_without_worker.get(f"/api/events/batches/{first['batch_id']}/jobs", position)).json()
    assert (jobs["total"], {job["job_id"] for job in jobs["jobs"]}) == (3, set(first["job_ids"]))
    assert [event.type for event in await api_without_worker.event_store.read()].count("JobSubmitted") == 3


async def test_jobs_of_batch_with_key_are_listed_in_submitted_order(shared_api: Api, key: dict[str, str]) -> None:
    body = {"jobs": [{**JOB, "job_name": f"Talk {number}"} for number in range(20)]}
    response = await shared_api.post("/api/events/batches", body, **key)
    path = f"/api/events/batches/{response.json()['batch_id']}/jobs?sort=created_at"
    jobs = (await shared_api.get(path, response.headers["ledger-position"])).json()["jobs"]
    assert [job["job_name"] for job in jobs] == [job["job_name"] for job in body["jobs"]]


@pytest.mark.parametrize("path", ["jobs", "batches"])
async def test_same_key_with_different_body_is_rejected(shared_api: Api, key: dict[str, str], path: str) -> None:
    body, other_body = (JOB, {**JOB, "priority": 2}) if path == "jobs" else ({"jobs": [JOB]}, {"jobs": [JOB, JOB]})
    await shared_api.post(f"/api/events/{path}", body, **key)

    rejected = await shared_api.post(f"/api/events/{path}", other_body, **key)

    assert (rejected.status_code, rejected.json()["code"]) == (422, "idempotency_key_reused")


async def test_member_order_of_body_does_not_matter(shared_api: Api, key: dict[str, str]) -> None:
    first = await shared_api.post("/api/events/jobs", JOB, **key)
    repeated = await shared_api.post("/api/events/jobs", dict(reversed(JOB.items())), **key)
    assert repeated.json() == first.json()


async def test_repeated_restart_restarts_job_once(api: Api) -> None:
    job_id = await api.submit()
    await api.wait_until_finished(job_id)

    first = await api.post(f"/api/events/jobs/{job_id}/restart", {"reason": "again"}, **KEY)
    await api.wait_for_event(job_id, "JobRestarted")
    await api.wait_until_finished(job_id)
    repeated = await api.post(f"/api/events/jobs/{job_id}/restart", {"reason": "again"}, **KEY)

    assert first.status_code == repeated.status_code == 200
    assert repeated.json() == first.json()
    assert repeated.json()["job"]["status"] == "pending", "the first response is returned, whatever happened since"
    restarts = [event for event in await api.event_store.read_stream(job_id) if event.type == "JobRestarted"]
    assert len(restarts) == 1
    conflicting = await api.post(f"/api/events/jobs/{job_id}/restart", {"reason": "other"}, **KEY)
    assert (conflicting.status_code, conflicting.json()["code"]) == (422, "idempotency_key_reused")


async def test_concurrent_restarts_with_one_key_succeed_and_restart_once(shared_api: Api, key: dict[str, str]) -> None:
    job_id = await shared_api.submit()
    await shared_api.post(f"/api/events/jobs/{job_id}/cancel")

    responses = await asyncio.gather(*(shared_api.post(f"/api/events/jobs/{job_id}/restart", **key) for _ in range(10)))

    assert {response.status_code for response in responses} == {200}
    assert [event.type for event in await shared_api.event_store.read_stream(job_id)].count("JobRestarted") == 1


async def test_repeated_batch_restart_restarts_no_job_twice(shared_api: Api, key: dict[str, str]) -> None:
    batch = await shared_api.submit_batch({}, {})
    path = f"/api/events/batches/{batch['batch_id']}"
    await shared_api.post(f"{path}/cancel")
    body = {"only": "cancelled"}
    first = await shared_api.post(f"{path}/restart", body, **key)
    await shared_api.post(f"{path}/cancel")

    repeated = await shared_api.post(f"{path}/restart", body, **key)

    assert first.json()["jobs"]["changed"] == 2
    assert repeated.json()["jobs"] == {"total": 2, "changed": 0, "unchanged": 2, "rejected": 0}


async def test_repeated_pause_after_resume_does_not_pause_again(shared_api: Api, key: dict[str, str]) -> None:
    path = f"/api/events/batches/{(await shared_api.submit_batch({}))['batch_id']}"
    first = await shared_api.post(f"{path}/pause", {"reason": "lunch"}, **key)
    await shared_api.post(f"{path}/resume")

    repeated = await shared_api.post(f"{path}/pause", {"reason": "lunch"}, **key)
    conflicting = await shared_api.post(f"{path}/pause", {"reason": "tea"}, **key)

    assert (first.json()["batch"]["paused"], repeated.json()["batch"]["paused"]) == (True, False)
    assert (conflicting.status_code, conflicting.json()["code"]) == (422, "idempotency_key_reused")


async def test_repeated_pause_with_old_etag_is_no_conflict(shared_api: Api, key: dict[str, str]) -> None:
    path = f"/api/events/batches/{(await shared_api.submit_batch({}))['batch_id']}"
    headers = {**key, "If-Match": (await shared_api.get(path)).headers["etag"]}
    first = await shared_api.post(f"{path}/pause", **headers)
    repeated = await shared_api.post(f"{path}/pause", **headers)
    other = await shared_api.post(f"{path}/resume", **{"If-Match": headers["If-Match"]})

    assert [response.status_code for response in (first, repeated, other)] == [200, 200, 412]


async def test_repeated_batch_cancel_or_archive_changes_no_job_again(shared_api: Api, key: dict[str, str]) -> None:
    path = f"/api/events/batches/{(await shared_api.submit_batch({}, {}))['batch_id']}"
    for action, reverse in (("cancel", "restart"), ("archive", "unarchive")):
        first = await shared_api.post(f"{path}/{action}", **key)
        await shared_api.post(f"{path}/{reverse}", {"only": "cancelled"} if reverse == "restart" else {})
        repeated = await shared_api.post(f"{path}/{action}", **key)
        assert (first.json()["jobs"]["changed"], repeated.json()["jobs"]["changed"]) == (2, 0)


async def test_same_key_of_another_user_is_a_separate_request(header_auth_api: Api) -> None:
    job_of_alice = await header_auth_api.post("/api/events/jobs", JOB, **KEY, **principal_header("alice"))
    job_of_bob = await header_auth_api.post("/api/events/jobs", JOB, **KEY, **principal_header("bob"))
    assert job_of_alice.json()["job_id"] != job_of_bob.json()["job_id"]
    assert job_of_bob.json()["job"]["user_id"] == "bob"


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "\u00e4"])
async def test_malformed_key_is_rejected(shared_api: Api, key: str) -> None:
    response = await shared_api.http.post(
        "/api/events/jobs", json=JOB, headers=[(b"Idempotency-Key", key.encode("latin-1"))]
    )
    assert (response.status_code, response.json()["code"]) == (400, "malformed_idempotency_key")


async def test_key_with_body_that_cannot_be_stored_returns_422(shared_api: Api) -> None:
    for path, body in (
        ("/api/events/jobs", {"job_type": "echo", "parameters": {"a": 2**70}}),
        ("/api/events/batches", {"jobs": [{"job_type": "echo", "parameters": {"a": 2**70}}]}),
    ):
        response = await shared_api.post(path, body, **{"Idempotency-Key": "large"})
        assert (response.status_code, response.json()["code"]) == (422, "invalid_content")
