"""`Idempotency-Key`: who does not know whether a request arrived sends it again, and nothing happens twice."""

from __future__ import annotations

import asyncio

import pytest

from tests.api.conftest import Api
from tests.support.header_auth import principal_header

JOB = {"job_type": "echo", "parameters": {"text": "once"}}
KEY = {"Idempotency-Key": "6a0c2a5e-once"}


async def test_the_same_submission_makes_one_job_and_is_answered_alike(api_without_worker: Api) -> None:
    first, again = [await api_without_worker.post("/api/events/jobs", JOB, **KEY) for _ in range(2)]

    assert (first.status_code, again.status_code) == (202, 202)
    assert again.json() == first.json()
    assert again.headers["ledger-position"] == first.headers["ledger-position"]
    assert await api_without_worker.event_store.head_position() == 1


async def test_twenty_at_the_same_time_make_one_job(api_without_worker: Api) -> None:
    answers = await asyncio.gather(*(api_without_worker.post("/api/events/jobs", JOB, **KEY) for _ in range(20)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["job_id"] for answer in answers}) == 1
    assert [event.type for event in await api_without_worker.event_store.read()].count("JobSubmitted") == 1


async def test_twenty_batches_at_the_same_time_are_one_batch(api_without_worker: Api) -> None:
    body = {"jobs": [JOB, JOB, JOB], "batch_name": "once"}
    answers = await asyncio.gather(*(api_without_worker.post("/api/events/batches", body, **KEY) for _ in range(20)))

    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.text for answer in answers}) == 1
    first = answers[0].json()
    assert first["job_ids"] == first["batch"]["job_ids"]
    position = answers[0].headers["ledger-position"]
    jobs = (await api_without_worker.get(f"/api/events/batches/{first['batch_id']}/jobs", position)).json()
    assert (jobs["total"], {job["job_id"] for job in jobs["jobs"]}) == (3, set(first["job_ids"]))
    assert [event.type for event in await api_without_worker.event_store.read()].count("JobSubmitted") == 3


@pytest.mark.parametrize("path", ["jobs", "batches"])
async def test_the_same_key_with_another_body_is_refused(api_without_worker: Api, path: str) -> None:
    body, other = (JOB, {**JOB, "priority": 2}) if path == "jobs" else ({"jobs": [JOB]}, {"jobs": [JOB, JOB]})
    await api_without_worker.post(f"/api/events/{path}", body, **KEY)

    refused = await api_without_worker.post(f"/api/events/{path}", other, **KEY)

    assert (refused.status_code, refused.json()["code"]) == (422, "idempotency_key_reused")


async def test_the_order_of_names_in_the_body_makes_no_other_request(api_without_worker: Api) -> None:
    first = await api_without_worker.post("/api/events/jobs", JOB, **KEY)
    again = await api_without_worker.post("/api/events/jobs", dict(reversed(JOB.items())), **KEY)
    assert again.json() == first.json()


async def test_a_restart_that_is_repeated_restarts_once(api: Api) -> None:
    job_id = await api.submit()
    await api.wait_until_finished(job_id)

    first = await api.post(f"/api/events/jobs/{job_id}/restart", {"reason": "again"}, **KEY)
    await api.wait_for_event(job_id, "JobRestarted")
    await api.wait_until_finished(job_id)
    again = await api.post(f"/api/events/jobs/{job_id}/restart", {"reason": "again"}, **KEY)

    assert first.status_code == again.status_code == 200
    assert again.json() == first.json()
    assert again.json()["job"]["status"] == "pending", "the answer is the first one, whatever has happened since"
    restarts = [event for event in await api.event_store.read_stream(job_id) if event.type == "JobRestarted"]
    assert len(restarts) == 1
    other = await api.post(f"/api/events/jobs/{job_id}/restart", {"reason": "other"}, **KEY)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


async def test_restarts_at_the_same_time_with_one_key_all_succeed(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    await api_without_worker.post(f"/api/events/jobs/{job_id}/cancel")

    answers = await asyncio.gather(
        *(api_without_worker.post(f"/api/events/jobs/{job_id}/restart", **KEY) for _ in range(10))
    )

    assert {answer.status_code for answer in answers} == {200}
    assert [event.type for event in await api_without_worker.event_store.read_stream(job_id)].count("JobRestarted") == 1


async def test_a_batch_restart_that_is_repeated_restarts_no_job_twice(api_without_worker: Api) -> None:
    batch = await api_without_worker.submit_batch({}, {})
    path = f"/api/events/batches/{batch['batch_id']}"
    await api_without_worker.post(f"{path}/cancel")
    body = {"only": "cancelled"}
    first = await api_without_worker.post(f"{path}/restart", body, **KEY)
    await api_without_worker.post(f"{path}/cancel")

    again = await api_without_worker.post(f"{path}/restart", body, **KEY)

    assert first.json()["jobs"]["changed"] == 2
    assert again.json()["jobs"] == {"total": 2, "changed": 0, "unchanged": 2, "rejected": 0}


async def test_a_pause_that_is_repeated_after_a_resume_pauses_nothing(api_without_worker: Api) -> None:
    path = f"/api/events/batches/{(await api_without_worker.submit_batch({}))['batch_id']}"
    first = await api_without_worker.post(f"{path}/pause", {"reason": "lunch"}, **KEY)
    await api_without_worker.post(f"{path}/resume")

    again = await api_without_worker.post(f"{path}/pause", {"reason": "lunch"}, **KEY)
    other = await api_without_worker.post(f"{path}/pause", {"reason": "tea"}, **KEY)

    assert (first.json()["batch"]["paused"], again.json()["batch"]["paused"]) == (True, False)
    assert (other.status_code, other.json()["code"]) == (422, "idempotency_key_reused")


async def test_a_batch_cancel_or_archive_that_is_repeated_touches_no_job_again(api_without_worker: Api) -> None:
    path = f"/api/events/batches/{(await api_without_worker.submit_batch({}, {}))['batch_id']}"
    for action, back in (("cancel", "restart"), ("archive", "unarchive")):
        first = await api_without_worker.post(f"{path}/{action}", **KEY)
        await api_without_worker.post(f"{path}/{back}", {"only": "cancelled"} if back == "restart" else {})
        again = await api_without_worker.post(f"{path}/{action}", **KEY)
        assert (first.json()["jobs"]["changed"], again.json()["jobs"]["changed"]) == (2, 0)


async def test_another_user_with_the_same_key_is_another_request(header_auth_api: Api) -> None:
    mine = await header_auth_api.post("/api/events/jobs", JOB, **KEY, **principal_header("alice"))
    theirs = await header_auth_api.post("/api/events/jobs", JOB, **KEY, **principal_header("bob"))
    assert mine.json()["job_id"] != theirs.json()["job_id"]
    assert theirs.json()["job"]["user_id"] == "bob"


@pytest.mark.parametrize("key", ["", "a b", "x" * 201, "\u00e4"])
async def test_what_is_no_key_is_refused(api_without_worker: Api, key: str) -> None:
    answer = await api_without_worker.http.post(
        "/api/events/jobs", json=JOB, headers=[(b"Idempotency-Key", key.encode("latin-1"))]
    )
    assert (answer.status_code, answer.json()["code"]) == (400, "malformed_idempotency_key")


async def test_a_key_with_a_body_that_cannot_be_stored_is_a_refusal_and_no_fault(api_without_worker: Api) -> None:
    for path, body in (
        ("/api/events/jobs", {"job_type": "echo", "parameters": {"a": 2**70}}),
        ("/api/events/batches", {"jobs": [{"job_type": "echo", "parameters": {"a": 2**70}}]}),
    ):
        answer = await api_without_worker.post(path, body, **{"Idempotency-Key": "large"})
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_content")
