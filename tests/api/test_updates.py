"""Jobs and batches are changed over HTTP; `If-Match` keeps two from undoing each other's changes."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from tests.api.conftest import Api


async def put(api: Api, path: str, content: Any, **headers: str) -> httpx.Response:
    return await api.http.put(f"/api/events/{path}", json=content, headers=headers)


async def test_a_waiting_job_is_changed_and_what_is_not_named_stays(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit({"text": "old"}, priority=3)

    answer = await put(api_without_worker, f"jobs/{job_id}", {"parameters": {"text": "new"}})

    assert answer.status_code == 200, answer.text
    assert (answer.json()["job"]["parameters"], answer.json()["job"]["priority"]) == ({"text": "new"}, 3)
    assert answer.headers["etag"].startswith('"2-')
    seen = (await api_without_worker.get(f"/api/events/jobs/{job_id}", answer.headers["ledger-position"])).json()["job"]
    assert seen == answer.json()["job"]


async def test_access_and_priority_are_changed_together_or_not_at_all(api: Api) -> None:
    job_id = await api.submit()
    ended = await api.wait_until_finished(job_id)
    public = {"visibility": "public"}

    refused = await put(api, f"jobs/{job_id}", {"priority": 9, "access_control": public})
    assert (refused.status_code, refused.json()["code"]) == (409, "invalid_state")
    assert (await api.event_store.read_stream(job_id))[-1].version == ended["version"]

    allowed = await put(api, f"jobs/{job_id}", {"access_control": public})
    assert allowed.json()["job"]["access_control"]["visibility"] == "public"


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
async def test_a_change_that_makes_no_sense_is_refused(
    api_without_worker: Api, content: dict[str, Any], path: str
) -> None:
    job_id = await api_without_worker.submit()

    answer = await put(api_without_worker, f"jobs/{job_id}", content)

    assert answer.status_code == 422
    assert answer.json()["details"]["errors"][0]["path"] == path


async def test_new_parameters_have_to_fit_the_job_type(api_without_worker: Api) -> None:
    session = {"event": "E", "session": "S", "url": "https://example.org", "filename": "f", "track": "T"}
    answer = await api_without_worker.post("/api/events/jobs", {"parameters": session})

    refused = await put(
        api_without_worker, f"jobs/{answer.json()['job_id']}", {"parameters": {**session, "track": " "}}
    )

    assert refused.status_code == 422
    assert refused.json()["details"]["errors"][0]["path"] == "parameters.track"


async def test_a_job_that_is_put_off_waits_until_then(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    tomorrow = (datetime.now(UTC) + timedelta(days=1)).isoformat()

    answer = await put(api_without_worker, f"jobs/{job_id}", {"not_before": tomorrow})

    assert answer.json()["job"]["due_at"][:19] == tomorrow[:19]


async def test_who_looked_at_an_older_version_changes_nothing(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    seen = (await api_without_worker.get(f"/api/events/jobs/{job_id}")).headers["etag"]
    first = await put(api_without_worker, f"jobs/{job_id}", {"priority": 5}, **{"If-Match": seen})

    late = await put(api_without_worker, f"jobs/{job_id}", {"priority": 6}, **{"If-Match": seen})
    cancelled_late = await api_without_worker.post(f"/api/events/jobs/{job_id}/cancel", **{"If-Match": seen})

    assert first.status_code == 200
    for refused in (late, cancelled_late):
        assert (refused.status_code, refused.json()["code"]) == (412, "precondition_failed")
        assert refused.json()["details"] == {"version": 2}
    again = await put(
        api_without_worker, f"jobs/{job_id}", {"priority": 6}, **{"If-Match": f'"7", {first.headers["etag"]}'}
    )
    assert again.json()["job"]["priority"] == 6


async def test_a_running_job_of_another_version_is_neither_cancelled_nor_deleted(api: Api) -> None:
    job_id = await api.submit({"seconds": 3600})
    await api.wait_for_event(job_id, "JobClaimed")

    refused = await api.http.delete(f"/api/events/jobs/{job_id}", headers={"If-Match": '"1"'})
    assert (refused.status_code, refused.json()["code"]) == (412, "precondition_failed")
    assert "JobCancelRequested" not in [event.type for event in await api.event_store.read_stream(job_id)]

    deleted = await api.http.delete(f"/api/events/jobs/{job_id}", headers={"If-Match": "*"})
    assert deleted.status_code == 200, deleted.text


async def test_a_job_that_has_not_changed_is_not_sent_again(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    etag = (await api_without_worker.get(f"/api/events/jobs/{job_id}")).headers["etag"]

    same = await api_without_worker.get(f"/api/events/jobs/{job_id}", **{"If-None-Match": etag})
    other = await api_without_worker.get(f"/api/events/jobs/{job_id}", **{"If-None-Match": '"99"'})

    assert (same.status_code, same.content, other.status_code) == (304, b"", 200)


async def test_who_may_see_a_batch_is_changed_for_its_jobs_too(api_without_worker: Api) -> None:
    batch = await api_without_worker.submit_batch({}, {})

    answer = await put(api_without_worker, f"batches/{batch['batch_id']}", {"access_control": {"read_access": ["bob"]}})

    assert answer.json()["jobs"] == {"total": 2, "changed": 2, "unchanged": 0, "rejected": 0}
    position = answer.headers["ledger-position"]
    for path in (f"batches/{batch['batch_id']}", *(f"jobs/{job_id}" for job_id in batch["job_ids"])):
        content = (await api_without_worker.get(f"/api/events/{path}", position)).json()
        assert (content.get("job") or content["batch"])["access_control"]["read_access"] == ["bob"]
    listed = (await api_without_worker.get("/api/events/batches", position)).json()["batches"][0]
    assert listed["access_control"]["read_access"] == ["bob"]


async def test_a_job_is_shown_as_it_was(api: Api) -> None:
    job_id = await api.submit({"text": "x"})
    ended = await api.wait_until_finished(job_id)
    events = await api.event_store.read_stream(job_id)
    claimed = next(event for event in events if event.type == "JobClaimed")

    async def status(as_of: object) -> str:
        answer = await api.http.get(f"/api/events/jobs/{job_id}", params={"as_of": str(as_of)})
        assert answer.status_code == 200, answer.text
        return str(answer.json()["job"]["status"])

    assert await status(events[0].position) == "pending"
    assert await status(claimed.position) == "processing"
    assert await status(ended["position"]) == "completed"
    assert await status(claimed.time.isoformat()) == "processing"
    assert await status(datetime.now(UTC).isoformat()) == "completed"
    for before in (0, "2001-01-01T00:00:00Z"):
        none = await api.http.get(f"/api/events/jobs/{job_id}", params={"as_of": str(before)})
        assert (none.status_code, none.json()["code"]) == (404, "job_not_found")
    for nonsense in ("yesterday", "-1", "9" * 30):
        refused = await api.http.get(f"/api/events/jobs/{job_id}", params={"as_of": nonsense})
        assert refused.status_code == 422, refused.text


async def test_a_batch_is_shown_as_it_was_with_the_counts_of_then(api: Api) -> None:
    batch = await api.submit_batch({}, {"fail": "permanent"}, {"seconds": 0.2})
    path = f"/api/events/batches/{batch['batch_id']}"
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    position = finished["position"]
    now = (await api.get(path, position)).json()["batch"]
    await api.post(f"{path}/restart", {"only": "all"})

    assert (await api.get(f"{path}?as_of={position}")).json()["batch"] == now
    begun = (await api.get(f"{path}?as_of={batch['batch']['position'] + 3}")).json()["batch"]
    assert (begun["status"], begun["pending_jobs"], begun["total_jobs"]) == ("processing", 3, 3)
    then = (await api.get(f"{path}?as_of={finished['time']}")).json()["batch"]
    assert (then["status"], then["completed_jobs"], then["failed_jobs"]) == ("partial", 2, 1)
    none = await api.get(f"{path}?as_of=2001-01-01T00:00:00Z")
    assert (none.status_code, none.json()["code"]) == (404, "batch_not_found")
