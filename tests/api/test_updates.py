"""Test updates of jobs and batches over HTTP, preconditions with `If-Match`, and states as of a position or time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.api.conftest import Api


async def update(api: Api, path: str, content: Any, **headers: str) -> httpx.Response:
    return await api.http.put(f"/api/events/{path}", json=content, headers=headers)


async def test_update_of_pending_job_keeps_omitted_fields(shared_api: Api) -> None:
    job_id = await shared_api.submit({"text": "old"}, priority=3)

    response = await update(shared_api, f"jobs/{job_id}", {"parameters": {"text": "new"}})

    assert response.status_code == 200, response.text
    assert (response.json()["job"]["parameters"], response.json()["job"]["priority"]) == ({"text": "new"}, 3)
    assert response.headers["etag"].startswith('"2-')
    loaded = await shared_api.get(f"/api/events/jobs/{job_id}", response.headers["ledger-position"])
    assert loaded.json()["job"] == response.json()["job"]


async def test_update_of_finished_job_is_applied_completely_or_not_at_all(api: Api) -> None:
    job_id = await api.submit()
    finished = await api.wait_until_finished(job_id)
    public = {"visibility": "public"}

    rejected = await update(api, f"jobs/{job_id}", {"priority": 9, "access_control": public})
    assert (rejected.status_code, rejected.json()["code"]) == (409, "invalid_state")
    assert (await api.event_store.read_stream(job_id))[-1].version == finished["version"]

    accepted = await update(api, f"jobs/{job_id}", {"access_control": public})
    assert accepted.json()["job"]["access_control"]["visibility"] == "public"


@pytest.mark.parametrize(
    ("content", "path"),
    [
        ({}, ""),
        ({"priority": "high"}, "priority"),
        ({"priority": 1001}, "priority"),
        ({"colour": "red"}, "colour"),
        ({"access_control": {"visibility": "secret"}}, "access_control.visibility"),
        ({"not_before": "soon"}, "not_before"),
    ],
)
async def test_update_with_invalid_field_is_rejected(shared_api: Api, content: dict[str, Any], path: str) -> None:
    job_id = await shared_api.submit()

    response = await update(shared_api, f"jobs/{job_id}", content)

    assert response.status_code == 422
    assert response.json()["details"]["errors"][0]["path"] == path


async def test_update_with_parameters_invalid_for_job_type_is_rejected(shared_api: Api) -> None:
    session = {"event": "E", "session": "S", "url": "https://example.org", "filename": "f", "track": "T"}
    response = await shared_api.post("/api/events/jobs", {"parameters": session})

    rejected = await update(shared_api, f"jobs/{response.json()['job_id']}", {"parameters": {**session, "track": " "}})

    assert rejected.status_code == 422
    assert rejected.json()["details"]["errors"][0]["path"] == "parameters.track"


async def test_update_of_not_before_sets_due_time(shared_api: Api) -> None:
    job_id = await shared_api.submit()
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()

    response = await update(shared_api, f"jobs/{job_id}", {"not_before": tomorrow})

    assert response.json()["job"]["due_at"][:19] == tomorrow[:19]


async def test_write_with_outdated_if_match_is_rejected(shared_api: Api) -> None:
    job_id = await shared_api.submit()
    etag = (await shared_api.get(f"/api/events/jobs/{job_id}")).headers["etag"]
    first = await update(shared_api, f"jobs/{job_id}", {"priority": 5}, **{"If-Match": etag})

    second = await update(shared_api, f"jobs/{job_id}", {"priority": 6}, **{"If-Match": etag})
    cancel = await shared_api.post(f"/api/events/jobs/{job_id}/cancel", **{"If-Match": etag})

    assert first.status_code == 200
    for rejected in (second, cancel):
        assert (rejected.status_code, rejected.json()["code"]) == (412, "precondition_failed")
        assert rejected.json()["details"] == {"version": 2}
    repeated = await update(
        shared_api, f"jobs/{job_id}", {"priority": 6}, **{"If-Match": f'"7", {first.headers["etag"]}'}
    )
    assert repeated.json()["job"]["priority"] == 6


async def test_delete_of_running_job_with_other_version_is_rejected(api: Api) -> None:
    job_id = await api.submit({"seconds": 3600})
    await api.wait_for_event(job_id, "JobClaimed")

    rejected = await api.http.delete(f"/api/events/jobs/{job_id}", headers={"If-Match": '"1"'})
    assert (rejected.status_code, rejected.json()["code"]) == (412, "precondition_failed")
    assert "JobCancelRequested" not in [event.type for event in await api.event_store.read_stream(job_id)]

    deleted = await api.http.delete(f"/api/events/jobs/{job_id}", headers={"If-Match": "*"})
    assert deleted.status_code == 200, deleted.text


async def test_get_job_with_current_etag_is_not_modified(shared_api: Api) -> None:
    job_id = await shared_api.submit()
    etag = (await shared_api.get(f"/api/events/jobs/{job_id}")).headers["etag"]

    unchanged = await shared_api.get(f"/api/events/jobs/{job_id}", **{"If-None-Match": etag})
    changed = await shared_api.get(f"/api/events/jobs/{job_id}", **{"If-None-Match": '"99"'})

    assert (unchanged.status_code, unchanged.content, changed.status_code) == (304, b"", 200)


async def test_update_of_batch_access_applies_to_its_jobs(shared_api: Api) -> None:
    batch = await shared_api.submit_batch({}, {})

    response = await update(shared_api, f"batches/{batch['batch_id']}", {"access_control": {"read_access": ["bob"]}})

    assert response.json()["jobs"] == {"total": 2, "changed": 2, "unchanged": 0, "rejected": 0}
    position = response.headers["ledger-position"]
    for path in (f"batches/{batch['batch_id']}", *(f"jobs/{job_id}" for job_id in batch["job_ids"])):
        content = (await shared_api.get(f"/api/events/{path}", position)).json()
        assert (content.get("job") or content["batch"])["access_control"]["read_access"] == ["bob"]
    listed = (await shared_api.get("/api/events/batches", position)).json()["batches"][0]
    assert listed["access_control"]["read_access"] == ["bob"]


async def test_job_as_of_position_or_time_has_past_status(api: Api) -> None:
    job_id = await api.submit({"text": "x"})
    finished = await api.wait_until_finished(job_id)
    events = await api.event_store.read_stream(job_id)
    claimed = next(event for event in events if event.type == "JobClaimed")

    async def load_status(as_of: object) -> str:
        response = await api.http.get(f"/api/events/jobs/{job_id}", params={"as_of": str(as_of)})
        assert response.status_code == 200, response.text
        return str(response.json()["job"]["status"])

    assert await load_status(events[0].position) == "pending"
    assert await load_status(claimed.position) == "processing"
    assert await load_status(finished["position"]) == "completed"
    assert await load_status(claimed.time.isoformat()) == "processing"
    assert await load_status(datetime.now(UTC).isoformat()) == "completed"
    for before in (0, "2001-01-01T00:00:00Z"):
        missing = await api.http.get(f"/api/events/jobs/{job_id}", params={"as_of": str(before)})
        assert (missing.status_code, missing.json()["code"]) == (404, "job_not_found")
    for invalid in ("yesterday", "-1", "9" * 30):
        rejected = await api.http.get(f"/api/events/jobs/{job_id}", params={"as_of": invalid})
        assert rejected.status_code == 422, rejected.text


async def test_batch_as_of_position_or_time_has_past_counts(api: Api) -> None:
    batch = await api.submit_batch({}, {"fail": "permanent"}, {"seconds": 0.2})
    path = f"/api/events/batches/{batch['batch_id']}"
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    position = finished["position"]
    before_restart = (await api.get(path, position)).json()["batch"]
    await api.post(f"{path}/restart", {"only": "all"})

    assert (await api.get(f"{path}?as_of={position}")).json()["batch"] == before_restart
    at_start = (await api.get(f"{path}?as_of={batch['batch']['position'] + 3}")).json()["batch"]
    assert (at_start["status"], at_start["pending_jobs"], at_start["total_jobs"]) == ("processing", 3, 3)
    at_end = (await api.get(f"{path}?as_of={finished['time']}")).json()["batch"]
    assert (at_end["status"], at_end["completed_jobs"], at_end["failed_jobs"]) == ("partial", 2, 1)
    missing = await api.get(f"{path}?as_of=2001-01-01T00:00:00Z")
    assert (missing.status_code, missing.json()["code"]) == (404, "batch_not_found")
