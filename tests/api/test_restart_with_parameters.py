"""Restart a finished job with corrected parameters."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from jobledger.workers.processor import JobContext, ProcessorError, Results
from jobledger.workers.processors.echo import EchoProcessor
from tests.api.conftest import Api, check_error, run_api
from tests.support.polling import poll_until

JOBS = "/api/events/jobs"


async def cancel_new_job(api: Api, parameters: dict[str, Any]) -> str:
    job_id = await api.submit(parameters)
    assert (await api.post(f"{JOBS}/{job_id}/cancel")).status_code == 200
    return job_id


async def has_status(api: Api, batch_id: str, status: str) -> bool:
    return bool((await api.get(f"/api/events/batches/{batch_id}")).json()["batch"]["status"] == status)


async def test_corrected_job_completes_and_batch_becomes_completed(api: Api) -> None:
    batch = await api.submit_batch({"n": 1}, {"n": 2, "fail": "a typo"})
    batch_id, (_, wrong) = batch["batch_id"], batch["job_ids"]
    first = await api.wait_for_event(batch_id, "BatchFinished")
    assert first["data"]["status"] == "partial"

    response = await api.post(f"{JOBS}/{wrong}/restart", {"parameters": {"n": 2}, "reason": "typo"})

    assert response.status_code == 200, response.text
    assert (response.json()["job"]["status"], response.json()["job"]["parameters"]) == ("pending", {"n": 2})
    await poll_until(partial(has_status, api, batch_id, "completed"))
    events = [event async for event in api.event_store.iterate_stream(wrong)]
    [restarted, updated] = [event for event in events if event.type in ("JobRestarted", "JobUpdated")]
    assert (restarted.type, updated.version, updated.position) == (
        "JobRestarted",
        restarted.version + 1,
        restarted.position + 1,
    )
    history = (await api.get(f"{JOBS}/{wrong}/history")).json()["events"]
    [shown] = [event["data"] for event in history if event["type"] == "JobUpdated"]
    change = {"name": "fail", "kind": "removed", "before": "a typo", "after": None}
    assert shown == {"by": "user:local", "parameters": {"n": 2}, "difference": [change]}
    for position, parameters in ((restarted.position - 1, {"n": 2, "fail": "a typo"}), (updated.position, {"n": 2})):
        past = (await api.get(f"{JOBS}/{wrong}?as_of={position}")).json()["job"]
        assert past["parameters"] == parameters


async def test_restart_with_parameters_repeats_only_steps_whose_inputs_changed(
    mongodb_uri: str, db_name: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[str] = []

    async def work(_: EchoProcessor, job: JobContext) -> Results:
        parameters = job.parameters.model_dump()

        async def run(name: str, value: str) -> str:
            runs.append(name)
            return value

        for name in ("url", "language"):
            await job.step(name, run, name, parameters[name])
        if parameters["language"] == "xx":
            raise ProcessorError("UNKNOWN_LANGUAGE", "xx is no language")
        return Results()

    monkeypatch.setattr(EchoProcessor, "run", work)
    async for api in run_api(mongodb_uri, db_name, tmp_path):
        job_id = await api.submit({"url": "u", "language": "xx"})
        assert (await api.wait_until_finished(job_id))["status"] == "failed"
        response = await api.post(f"{JOBS}/{job_id}/restart", {"parameters": {"url": "u", "language": "de"}})
        position = response.headers["ledger-position"]
        await api.wait_for_event(job_id, "JobCompleted")
        job = (await api.get(f"{JOBS}/{job_id}", position)).json()["job"]
        assert (job["status"], job["parameters"]["language"]) == ("completed", "de")
    assert runs == ["url", "language", "language"]


async def test_restart_with_invalid_parameters_changes_nothing(shared_api: Api) -> None:
    job_id = await cancel_new_job(shared_api, {"text": "a"})
    head = await shared_api.event_store.read_head_position()
    for parameters in ({"seconds": "soon"}, {"url": "https://u:hunter2@example.org/"}, {"n": 1, "fail": 5}):
        error = check_error(
            await shared_api.post(f"{JOBS}/{job_id}/restart", {"parameters": parameters}), 422, "invalid_content"
        )
        assert all(entry["path"].startswith("parameters.") for entry in error["details"]["errors"])
        assert "hunter2" not in str(error)
    await shared_api.check_no_request_recorded(after=head)


async def test_restart_with_parameters_checks_if_match(shared_api: Api) -> None:
    job_id = await cancel_new_job(shared_api, {"text": "a"})
    path, body = f"{JOBS}/{job_id}/restart", {"parameters": {"text": "b"}}
    etag = (await shared_api.get(f"{JOBS}/{job_id}")).headers["etag"]
    archived = await shared_api.post(f"{JOBS}/{job_id}/archive")
    check_error(await shared_api.post(path, body, **{"If-Match": etag}), 412, "precondition_failed")
    etag = archived.headers["etag"]
    response = await shared_api.post(path, body, **{"If-Match": etag})
    assert (response.status_code, response.json()["job"]["parameters"]) == (200, {"text": "b"})


async def test_restart_of_unfinished_job_with_parameters_is_rejected(shared_api: Api) -> None:
    job_id = await shared_api.submit({"text": "a"})
    response = await shared_api.post(f"{JOBS}/{job_id}/restart", {"parameters": {"text": "b"}})
    assert "finished" in check_error(response, 409, "invalid_state")["message"]


async def test_repeated_restart_with_parameters_has_one_effect(shared_api: Api) -> None:
    job_id = await cancel_new_job(shared_api, {"text": "a"})
    headers, body = {"Idempotency-Key": f"key-{job_id}"}, {"parameters": {"text": "b"}}
    first = await shared_api.post(f"{JOBS}/{job_id}/restart", body, **headers)
    await shared_api.post(f"{JOBS}/{job_id}/cancel")
    repeated = await shared_api.post(f"{JOBS}/{job_id}/restart", body, **headers)
    assert repeated.json() == first.json()
    assert first.json()["job"]["parameters"] == {"text": "b"}
    other = await shared_api.post(f"{JOBS}/{job_id}/restart", {"parameters": {"text": "c"}}, **headers)
    check_error(other, 422, "idempotency_key_reused")


async def test_batch_restart_with_parameters_explains_what_to_do(shared_api: Api) -> None:
    batch = await shared_api.submit_batch({}, {})
    response = await shared_api.post(f"/api/events/batches/{batch['batch_id']}/restart", {"parameters": {"a": 1}})
    assert "with the restart of that job" in check_error(response, 422, "invalid_content")["message"]


async def test_dashboard_names_changed_parameters(shared_api: Api) -> None:
    job_id = await cancel_new_job(shared_api, {"text": "a", "n": 1})
    await shared_api.post(f"{JOBS}/{job_id}/restart", {"parameters": {"text": "b"}})
    position = await shared_api.event_store.read_head_position()
    for language, expected in (("en", "Changed: n, text"), ("de", "Geändert: n, text")):
        page = await shared_api.get(f"/monitoring/events/jobs/{job_id}", position, **{"Accept-Language": language})
        assert expected in page.text
