"""`Idempotency-Key`: a repeated request has no second effect and, for most actions, the same response."""

from __future__ import annotations

import asyncio

import pytest

from tests.api.conftest import Api
from tests.support.header_auth import principal_header

JOB = {"job_type": "echo", "parameters": {"text": "once"}}
KEY = {"Idempotency-Key": "6a0c2a5e-once"}


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


@pytest.mark.parametrize("path", ["jobs", "batches"])
async def test_same_key_with_different_body_is_rejected(api_without_worker: Api, path: str) -> None:
    body, other_body = (JOB, {**JOB, "priority": 2}) if path == "jobs" else ({"jobs": [JOB]}, {"jobs": [JOB, JOB]})
    await api_without_worker.post(f"/api/events/{path}", body, **KEY)

    rejected = await api_without_worker.post(f"/api/events/{path}", other_body, **KEY)

    assert (rejected.status_code, rejected.json()["code"]) == (422, "idempotency_key_reused")


async def test_member_order_of_body_does_not_matter(api_without_worker: Api) -> None:
    first = await api_without_worker.post("/api/events/jobs", JOB, **KEY)
    repeated = await api_without_worker.post("/api/events/jobs", dict(reversed(JOB.items())), **KEY)
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


async def test_concurrent_restarts_with_one_key_succeed_and_restart_once(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    await api_without_worker.post(f"/api/events/jobs/{job_id}/cancel")

    responses = await asyncio.gather(
        *(api_without_worker.post(f"/api/events/jobs/{job_id}/restart", **KEY) for _ in range(10))
    )

    assert {response.status_code for response in responses} == {200}
    assert [event.type for event in await api_without_worker.event_store.read_stream(job_id)].count("JobRestarted") == 1


async def test_repeated_batch_restart_restarts_no_job_twice(api_without_worker: Api) -> None:
    batch = await api_without_worker.submit_batch({}, {})
    path = f"/api/events/batches/{batch['batch_id']}"
    await api_without_worker.post(f"{path}/cancel")
    body = {"only": "cancelled"}
    first = await api_without_worker.post(f"{path}/restart", body, **KEY)
    await api_without_worker.post(f"{path}/cancel")

    repeated = await api_without_worker.post(f"{path}/restart", body, **KEY)

    assert first.json()["jobs"]["changed"] == 2
    assert repeated.json()["jobs"] == {"total": 2, "changed": 0, "unchanged": 2, "rejected": 0}


async def test_repeated_pause_after_resume_does_not_pause_again(api_without_worker: Api) -> None:
    path = f"/api/events/batches/{(await api_without_worker.submit_batch({}))['batch_id']}"
    first = await api_without_worker.post(f"{path}/pause", {"reason": "lunch"}, **KEY)
    await api_without_worker.post(f"{path}/resume")

    repeated = await api_without_worker.post(f"{path}/pause", {"reason": "lunch"}, **KEY)
    conflicting = await api_without_worker.post(f"{path}/pause", {"reason": "tea"}, **KEY)

    assert (first.json()["batch"]["paused"], repeated.json()["batch"]["paused"]) == (True, False)
    assert (conflicting.status_code, conflicting.json()["code"]) == (422, "idempotency_key_reused")


async def test_repeated_pause_with_old_etag_is_no_conflict(api_without_worker: Api) -> None:
    path = f"/api/events/batches/{(await api_without_worker.submit_batch({}))['batch_id']}"
    headers = {**KEY, "If-Match": (await api_without_worker.get(path)).headers["etag"]}
    first = await api_without_worker.post(f"{path}/pause", **headers)
    repeated = await api_without_worker.post(f"{path}/pause", **headers)
    other = await api_without_worker.post(f"{path}/resume", **{"If-Match": headers["If-Match"]})

    assert [response.status_code for response in (first, repeated, other)] == [200, 200, 412]


async def test_repeated_batch_cancel_or_archive_changes_no_job_again(api_without_worker: Api) -> None:
    path = f"/api/events/batches/{(await api_without_worker.submit_batch({}, {}))['batch_id']}"
    for action, reverse in (("cancel", "restart"), ("archive", "unarchive")):
        first = await api_without_worker.post(f"{path}/{action}", **KEY)
        await api_without_worker.post(f"{path}/{reverse}", {"only": "cancelled"} if reverse == "restart" else {})
        repeated = await api_without_worker.post(f"{path}/{action}", **KEY)
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
