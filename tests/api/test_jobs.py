"""Test jobs over HTTP: submission, reads, lists, actions, webhook headers and statistics."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from tests.api.conftest import Api

SESSION = {
    "event": "FOSDEM 2025",
    "session": "A talk",
    "url": "https://example.org/talk",
    "filename": "A-talk.md",
    "track": "Databases",
}
SECRET = "Bearer s3cr3t-value"


async def test_submit_job_returns_location_and_position(api_without_worker: Api) -> None:
    response = await api_without_worker.post(
        "/api/events/jobs", {"job_type": "echo", "parameters": {"text": "hello"}, "job_name": "First", "priority": 7}
    )

    content = response.json()
    assert response.status_code == 202
    assert content["status"] == "success"
    assert response.headers["location"] == f"/api/events/jobs/{content['job_id']}"
    assert int(response.headers["ledger-position"]) == content["job"]["position"] == 1
    assert (
        content["job"] | {"status": "pending", "priority": 7, "job_name": "First", "user_id": "local"} == content["job"]
    )
    assert content["job"]["parameters"] == {"text": "hello"}
    assert content["job"]["created_at"].endswith("Z")


async def test_submitted_job_is_readable_at_once(shared_api: Api) -> None:
    for number in range(20):
        response = await shared_api.post("/api/events/jobs", {"job_type": "echo", "parameters": {"number": number}})
        loaded = await shared_api.get(response.headers["location"])
        assert loaded.status_code == 200
        assert loaded.json()["job"]["parameters"] == {"number": number}
        assert loaded.headers["etag"].startswith('"1-')


async def test_job_list_at_position_of_write_contains_it(api_without_worker: Api) -> None:
    for number in range(10):
        response = await api_without_worker.post("/api/events/jobs", {"job_type": "echo", "parameters": {}})
        position = response.headers["ledger-position"]
        by_header = await api_without_worker.get("/api/events/jobs", position)
        by_query = await api_without_worker.get(f"/api/events/jobs?min_position={position}")
        for listed in (by_header, by_query):
            assert listed.json()["jobs"][0]["job_id"] == response.json()["job_id"]
            assert listed.json()["total"] == number + 1


async def test_submit_bare_session_creates_job_of_type_session(shared_api: Api) -> None:
    response = await shared_api.post("/api/events/jobs", SESSION)

    assert response.status_code == 202
    assert response.json()["job"]["job_type"] == "session"
    assert response.json()["job"]["parameters"] == SESSION


async def test_completed_echo_job_links_to_its_file(api: Api) -> None:
    job = await api.wait_until_finished(await api.submit({"text": "héllo"}))

    assert job["status"] == "completed"
    assert job["progress"]["percent"] == 100
    assert job["attempt"] == 1
    assert job["results"]["markdown_url"].startswith("/api/events/files/echo/")
    assert "héllo" in (await api.get(job["results"]["markdown_url"])).text


async def test_failed_job_has_error_code_and_message(api: Api) -> None:
    job = await api.wait_until_finished(await api.submit({"fail": "error in <b>markup</b>"}))

    assert job["status"] == "failed"
    assert job["error"]["code"] == "ECHO_FAILED"
    assert job["error"]["message"] == "error in <b>markup</b>"
    assert job["results"] is None


async def test_job_list_supports_every_filter(api_without_worker: Api) -> None:
    start = datetime.now(UTC) - timedelta(minutes=1)  # events have the server's time, which may differ
    first = await api_without_worker.submit({"track": "A"}, user_id="ada")
    batch = await api_without_worker.submit_batch({"track": "A"}, {"track": "B"})
    second, third = batch["job_ids"]
    archived = await api_without_worker.post(f"/api/events/jobs/{first}/archive")
    position = archived.headers["ledger-position"]
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()

    async def list_ids(**query: Any) -> set[str]:
        response = await api_without_worker.http.get("/api/events/jobs", params={**query, "min_position": position})
        assert response.status_code == 200, response.text
        content = response.json()
        assert content["total"] == len(content["jobs"])
        assert "_id" not in (content["jobs"] or [{}])[0]
        return {job["job_id"] for job in content["jobs"]}

    assert await list_ids() == {first, second, third}
    assert await list_ids(status="pending") == {first, second, third}
    assert await list_ids(status="completed") == set()
    assert await list_ids(batch_id=batch["batch_id"]) == {second, third}
    assert await list_ids(track="A") == {first, second}
    assert await list_ids(track="A", batch_id=batch["batch_id"]) == {second}
    assert await list_ids(user_id="ada") == {first}
    assert await list_ids(job_type="session") == set()
    assert await list_ids(archived="true") == {first}
    assert await list_ids(archived="false") == {second, third}
    assert await list_ids(created_after=start.isoformat()) == {first, second, third}
    assert await list_ids(created_after=later) == set()
    assert await list_ids(created_before=later) == {first, second, third}


async def test_job_list_pages_are_disjoint_and_complete(api_without_worker: Api) -> None:
    batch = await api_without_worker.submit_batch(*({"number": number} for number in range(25)))
    position = int(batch["batch"]["position"]) + 25
    job_ids: list[str] = []
    for skip in range(0, 30, 10):
        page = (await api_without_worker.get(f"/api/events/jobs?limit=10&skip={skip}", position)).json()
        assert page["total"] == 25
        job_ids += [job["job_id"] for job in page["jobs"]]

    assert len(job_ids) == 25
    assert job_ids == sorted(batch["job_ids"], reverse=True)


async def test_job_history_has_every_event_in_order(api: Api) -> None:
    job_id = await api.submit({"seconds": 0.01})
    await api.wait_until_finished(job_id)
    history = (await api.get(f"/api/events/jobs/{job_id}/history")).json()["events"]

    assert [event["version"] for event in history] == list(range(1, len(history) + 1))
    types = [event["type"] for event in history]
    assert types[:2] == ["JobSubmitted", "JobClaimed"]
    assert types[-1] == "JobCompleted"
    assert history[0]["meta"]["actor"] == "user:local"
    assert all(len(bytes.fromhex(event["hash"])) == 32 for event in history)
    positions = [event["position"] for event in history]
    assert positions == sorted(set(positions))


async def test_pending_job_accepts_every_action(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    path = f"/api/events/jobs/{job_id}"

    cancelled = await api_without_worker.post(f"{path}/cancel", {"reason": "no longer needed"})
    assert cancelled.json()["job"]["status"] == "cancelled"
    restarted = await api_without_worker.post(f"{path}/restart", {"reuse_steps": False})
    assert restarted.json()["job"]["status"] == "pending"
    archived = await api_without_worker.post(f"{path}/archive")
    assert archived.json()["job"]["archived"] is True
    unarchived = await api_without_worker.post(f"{path}/unarchive")
    assert unarchived.json()["job"]["archived"] is False
    deleted = await api_without_worker.http.delete(path)
    assert deleted.status_code == 200
    assert deleted.json()["job"] is None
    assert (await api_without_worker.get(path, deleted.headers["ledger-position"])).status_code == 404
    assert (await api_without_worker.get("/api/events/jobs")).json()["total"] == 0


async def test_repeated_archive_appends_no_event(shared_api: Api) -> None:
    job_id = await shared_api.submit()
    first = await shared_api.post(f"/api/events/jobs/{job_id}/archive")
    second = await shared_api.post(f"/api/events/jobs/{job_id}/archive")

    assert second.status_code == 200
    assert second.headers["ledger-position"] == first.headers["ledger-position"]
    assert second.json()["job"]["version"] == 2


async def test_cancel_stops_running_job(api: Api) -> None:
    job_id = await api.submit({"seconds": 3600})
    await api.wait_for_event(job_id, "JobClaimed")
    response = await api.post(f"/api/events/jobs/{job_id}/cancel", {"reason": "too slow"})
    job = await api.wait_until_finished(job_id)

    assert response.status_code == 200
    assert job["status"] == "cancelled"


async def test_action_in_wrong_state_is_rejected_without_event(api: Api) -> None:
    finished = await api.submit()
    await api.wait_until_finished(finished)
    running = await api.submit({"seconds": 3600})
    await api.wait_for_event(running, "JobClaimed")
    head = await api.event_store.read_head_position()

    for path in (f"{finished}/cancel", f"{running}/restart"):
        response = await api.post(f"/api/events/jobs/{path}")
        assert response.status_code == 409, f"{path}: {response.text}"
        assert response.json()["code"] == "invalid_state"
        assert response.json()["message"].startswith("the job is ")
    assert [event.type for event in await api.event_store.read(after=head) if event.type != "JobProgressed"] == []


async def test_delete_cancels_running_job_first(api: Api) -> None:
    running = await api.submit({"seconds": 3600})
    await api.wait_for_event(running, "JobClaimed")

    deleted = await api.http.delete(f"/api/events/jobs/{running}")

    response = await api.get(f"/api/events/jobs/{running}", deleted.headers["ledger-position"])
    assert (deleted.status_code, response.status_code) == (200, 404)
    events = [event.type for event in await api.event_store.read_stream(running) if event.type != "JobProgressed"]
    assert events == ["JobSubmitted", "JobClaimed", "JobCancelRequested", "JobCancelled", "JobDeleted"]


@pytest.mark.parametrize("action", ["cancel", "restart", "archive", "unarchive"])
async def test_action_on_missing_job_is_not_found(shared_api: Api, action: str) -> None:
    response = await shared_api.post(f"/api/events/jobs/job-000000000000000000000000/{action}")

    assert response.status_code == 404
    assert response.json()["code"] == "job_not_found"


async def test_action_on_deleted_job_is_not_found(shared_api: Api) -> None:
    job_id = await shared_api.submit()
    deleted = await shared_api.http.delete(f"/api/events/jobs/{job_id}")
    response = await shared_api.get(f"/api/events/jobs/{job_id}", deleted.headers["ledger-position"])

    assert response.status_code == 404
    assert (await shared_api.post(f"/api/events/jobs/{job_id}/restart")).status_code == 404
    assert (await shared_api.http.delete(f"/api/events/jobs/{job_id}")).status_code == 404


async def test_webhook_header_values_are_never_returned_or_logged(api_without_worker: Api) -> None:
    webhook = {"url": "https://example.org/hook", "headers": {"Authorization": SECRET, "X.Odd$Name": SECRET}}
    response = await api_without_worker.post(
        "/api/events/jobs", {"job_type": "echo", "parameters": {}, "webhook": webhook}
    )
    batch = await api_without_worker.post(
        "/api/events/batches",
        {"jobs": [{"job_type": "echo", "parameters": {}, "webhook": webhook}], "webhook": webhook},
    )
    position = int(batch.headers["ledger-position"])
    job_id, batch_id = response.json()["job_id"], batch.json()["batch_id"]
    texts = [
        response.text,
        batch.text,
        (await api_without_worker.get("/api/events/jobs", position)).text,
        (await api_without_worker.get(f"/api/events/jobs/{job_id}")).text,
        (await api_without_worker.get(f"/api/events/jobs/{job_id}/history")).text,
        (await api_without_worker.get("/api/events/batches")).text,
        (await api_without_worker.get(f"/api/events/batches/{batch_id}")).text,
        str(await api_without_worker.take_events(3, after=0)),
        str([document async for document in api_without_worker.db.events.find()]),
        str([document async for document in api_without_worker.db.jobs.find()]),
        str([document async for document in api_without_worker.db.batches.find()]),
    ]

    assert all("Authorization" in text for text in texts)
    assert not [text for text in texts if "s3cr3t" in text]
    assert response.json()["job"]["webhook"]["headers"] == {"Authorization": "***", "X.Odd$Name": "***"}
    secrets = [document async for document in api_without_worker.db.webhook_secrets.find()]
    assert [document["headers"]["Authorization"] for document in secrets] == [SECRET] * 3


@pytest.mark.parametrize(
    "headers",
    [
        {"$ref": "x", "$id": "y"},
        {"$id": "x"},
        {"Good": "a\r\nInjected: yes"},
        {"Good": "nul \x00"},
        {"Good": "x" * 10_000},
        {"two words": "x"},
        {"": "x"},
    ],
    ids=["database reference", "database ID", "line break", "NUL", "too long", "space in name", "no name"],
)
async def test_invalid_webhook_headers_are_rejected(shared_api: Api, headers: dict[str, str]) -> None:
    webhook = {"url": "https://example.org/hook", "headers": headers}
    head = await shared_api.event_store.read_head_position()
    response = await shared_api.post("/api/events/jobs", {"job_type": "echo", "parameters": {}, "webhook": webhook})

    assert response.status_code == 422, response.text
    assert response.json()["message"].startswith("webhook.headers.")
    assert "Injected" not in response.text
    await shared_api.check_no_request_recorded(after=head)


async def test_statistics_equal_counts_of_the_views(api: Api) -> None:
    job_ids = [await api.submit({"track": track}) for track in ("A", "A", "B")]
    job_ids += [await api.submit({"track": "A", "fail": "on purpose"})]
    batch = await api.submit_batch({"track": "B"}, {})
    for job_id in job_ids:
        await api.wait_until_finished(job_id)
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    stats = (await api.get("/api/monitoring/events/stats", finished["position"])).json()["stats"]

    assert stats["jobs"] == {
        **{"total": 6, "pending": 0, "processing": 0, "completed": 5, "failed": 1, "cancelled": 0},
    }
    assert stats["batches"] == {"total": 1, "active": 0}
    assert stats["tracks"] == [
        {"_id": "A", "count": 3, "completed": 2, "failed": 1},
        {"_id": "B", "count": 2, "completed": 2, "failed": 0},
    ]
    for status, number in stats["jobs"].items():
        query = {} if status == "total" else {"status": status}
        assert await api.db.jobs.count_documents(query) == number
        response = await api.http.get("/api/events/jobs", params=query)
        assert response.json()["total"] == number
    assert len(stats["workers"]) == 1
    assert stats["log"]["head"] >= finished["position"]


async def test_health_and_root_paths_respond_with_success(api_without_worker: Api) -> None:
    for path in ("/healthz", "/readyz", "/"):
        response = await api_without_worker.get(path)
        assert response.status_code == 200
        assert response.json()["status"] == "success"
