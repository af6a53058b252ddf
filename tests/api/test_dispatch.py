"""A job that is submitted over HTTP is claimed for a free worker by the same command."""

from __future__ import annotations

from tests.api.conftest import Api
from tests.support.polling import poll_until


async def test_single_job_is_claimed_with_its_submission(api: Api) -> None:
    async def accepts_jobs() -> bool:
        return await api.db.workers.find_one({"accepted_job_types": "echo"}) is not None

    await poll_until(accepts_jobs, "a worker accepts jobs")

    async def is_dispatched() -> bool:
        job_id = await api.submit({"text": "hello"})
        job = await api.wait_until_finished(job_id)
        assert job["status"] == "completed"
        events = await api.event_store.read_stream(job_id)
        assert [event.type for event in events[:2]] == ["JobSubmitted", "JobClaimed"]
        return events[1].meta.actor == "system" and events[1].position == events[0].position + 1

    await poll_until(is_dispatched, "a job is dispatched")


async def test_repeated_submission_with_the_same_key_has_one_claim(api: Api) -> None:
    body, key = {"job_type": "echo", "parameters": {}}, {"Idempotency-Key": "key-1"}
    responses = [await api.post("/api/events/jobs", body, **key) for _ in range(3)]
    [job_id] = {response.json()["job_id"] for response in responses}
    await api.wait_until_finished(job_id)
    events = await api.event_store.read_stream(job_id)
    assert [event.type for event in events].count("JobClaimed") == 1
