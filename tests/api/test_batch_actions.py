"""Test actions on whole batches over HTTP: pause, resume, cancel, restart, archive, unarchive and delete."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.commands import CancelJob, ClaimJob, FailAttempt, RestartJob
from jobledger.ledger.domain.events import ErrorInfo, EventMetadata
from tests.api.conftest import Api
from tests.support.event_examples import make_results
from tests.support.soak_only import soak_only
from tests.support.worker_reports import report_results

ACTIONS = ("pause", "resume", "cancel", "restart", "archive", "unarchive")
BATCHES = "/api/events/batches"
WORKER = EventMetadata("worker:w")


def build_job_counts(total: int, *, changed: int = 0, rejected: int = 0) -> dict[str, int]:
    return {"total": total, "changed": changed, "unchanged": total - changed - rejected, "rejected": rejected}


async def request_action(api: Api, batch_id: str, action: str, body: Any = None) -> tuple[dict[str, Any], int]:
    """Request an action on a batch. Return the response and the position at which the views contain its result."""
    response = await api.post(f"{BATCHES}/{batch_id}/{action}", body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    assert (content["status"], content["batch_id"]) == ("success", batch_id)
    return content, int(response.headers["ledger-position"])


async def create_batch_with_all_statuses(api: Api) -> tuple[str, list[str]]:
    """Create a batch with a pending, a processing, a completed, a failed and a cancelled job, in this order."""
    batch = await api.submit_batch(*[{}] * 5)
    batch_id, job_ids = batch["batch_id"], batch["job_ids"]
    claim = ClaimJob("w", datetime.now(UTC))
    _, running, completed, failed, cancelled = job_ids
    failure = ErrorInfo(code="X", message="x")
    await api.handle_commands(running, claim, meta=WORKER)
    await api.handle_commands(completed, claim, report_results("w", 1, make_results()), meta=WORKER)
    await api.handle_commands(failed, claim, FailAttempt("w", 1, failure, None), meta=WORKER)
    await api.handle_commands(cancelled, CancelJob("user:ada"), meta=WORKER)
    return batch_id, job_ids


async def load_batch_and_jobs(api: Api, batch_id: str, position: int) -> dict[str, dict[str, Any]]:
    """Return a batch and its jobs by ID, from the views at a position."""
    listed = (await api.get(f"/api/events/jobs?batch_id={batch_id}", position)).json()["jobs"]
    batch = (await api.get(f"{BATCHES}/{batch_id}")).json()["batch"]
    return {job["job_id"]: job for job in listed} | {batch_id: batch}


async def load_statuses(api: Api, batch_id: str, job_ids: list[str], position: int) -> list[str]:
    jobs = await load_batch_and_jobs(api, batch_id, position)
    return [jobs[job_id]["status"] for job_id in job_ids]


# Pause and resume ---------------------------------------------------------------------------------------------------


async def test_pause_marks_batch_and_pending_jobs_until_resumed(api_without_worker: Api) -> None:
    single_job = await api_without_worker.submit()
    batch_id, job_ids = await create_batch_with_all_statuses(api_without_worker)
    pending = job_ids[0]

    content, position = await request_action(api_without_worker, batch_id, "pause", {"reason": "the site is down"})
    jobs = await load_batch_and_jobs(api_without_worker, batch_id, position)
    assert (content["batch"]["paused"], content["batch"]["position"]) == (True, position)
    assert "jobs" not in content
    assert jobs[batch_id]["paused"] is True
    assert [job_id for job_id in job_ids if jobs[job_id]["paused"]] == [pending], "only pending jobs are paused"
    assert (await api_without_worker.get(f"/api/events/jobs/{pending}")).json()["job"]["paused"] is True
    assert (await api_without_worker.get(f"/api/events/jobs/{single_job}")).json()["job"]["paused"] is False
    assert [row["_id"] async for row in api_without_worker.db.queue.find()] == [single_job]

    content, position = await request_action(api_without_worker, batch_id, "resume")
    jobs = await load_batch_and_jobs(api_without_worker, batch_id, position)
    assert content["batch"]["paused"] is jobs[batch_id]["paused"] is jobs[pending]["paused"] is False
    assert await api_without_worker.db.queue.count_documents({}) == 2
    paused, resumed = (await api_without_worker.event_store.read_stream(batch_id))[-2:]
    assert (paused.type, paused.data) == ("BatchPaused", {"by": "user:local", "reason": "the site is down"})
    assert (resumed.type, resumed.data) == ("BatchResumed", {"by": "user:local"})
    assert paused.meta == resumed.meta == EventMetadata("user:local", batch_id)


async def test_repeated_pause_and_needless_resume_append_no_event(api_without_worker: Api) -> None:
    batch_id = (await api_without_worker.submit_batch({}))["batch_id"]
    actions = ("resume", "pause", "pause")
    positions = [(await request_action(api_without_worker, batch_id, action))[1] for action in actions]
    assert positions == [1, 3, 3]
    assert await api_without_worker.event_store.read_head_position() == 3


async def test_pause_directly_after_submission_succeeds(shared_api: Api) -> None:
    for _ in range(10):  # the views may or may not contain the batch yet
        batch = await shared_api.submit_batch({})
        _, position = await request_action(shared_api, batch["batch_id"], "pause")
        assert (await load_batch_and_jobs(shared_api, batch["batch_id"], position))[batch["job_ids"][0]][
            "paused"
        ] is True


async def test_restart_of_job_in_paused_batch_responds_with_paused(shared_api: Api) -> None:
    batch_id, (*_, cancelled) = await create_batch_with_all_statuses(shared_api)
    _, position = await request_action(shared_api, batch_id, "pause")
    await shared_api.get("/api/events/jobs", position)
    response = await shared_api.post(f"/api/events/jobs/{cancelled}/restart")
    assert (response.json()["job"]["status"], response.json()["job"]["paused"]) == ("pending", True)


# Cancel -------------------------------------------------------------------------------------------------------------


async def test_cancel_batch_cancels_unfinished_jobs_only(shared_api: Api) -> None:
    batch_id, job_ids = await create_batch_with_all_statuses(shared_api)
    content, position = await request_action(shared_api, batch_id, "cancel", {"reason": "wrong conference"})

    assert content["jobs"] == build_job_counts(5, changed=2)
    assert content["events"] == {"JobCancelled": 1, "JobCancelRequested": 1}
    assert content["rejections"] == []
    expected = ["cancelled", "processing", "completed", "failed", "cancelled"]
    assert await load_statuses(shared_api, batch_id, job_ids, position) == expected
    assert (await load_batch_and_jobs(shared_api, batch_id, position))[job_ids[1]]["cancel_requested"] is True
    for job_id in job_ids[:2]:
        event = (await shared_api.event_store.read_stream(job_id))[-1]
        assert event.data == {"by": "user:local", "reason": "wrong conference"}
        assert event.meta == EventMetadata("user:local", batch_id)

    repeated, repeated_position = await request_action(shared_api, batch_id, "cancel")
    assert repeated["jobs"] == build_job_counts(5)
    assert (repeated["events"], repeated_position) == ({}, position)


async def test_cancel_batch_stops_running_jobs_and_finishes_batch(api: Api) -> None:
    batch = await api.submit_batch(*[{"seconds": 3600}] * 12)
    await api.wait_for_event(batch["job_ids"][0], "JobClaimed")
    content, _ = await request_action(api, batch["batch_id"], "cancel")
    assert content["jobs"] == build_job_counts(12, changed=12)
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    assert finished["data"]["counts"] == {"completed": 0, "failed": 0, "cancelled": 12}


# Restart ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "restarted_indexes"),
    [
        (None, [3]),
        ({"only": "failed"}, [3]),
        ({"only": "cancelled"}, [4]),
        ({"only": "completed"}, [2]),
        ({"only": "all"}, [2, 3, 4]),
    ],
    ids=str,
)
async def test_restart_batch_restarts_jobs_with_the_selected_status(
    shared_api: Api, body: Any, restarted_indexes: list[int]
) -> None:
    batch_id, job_ids = await create_batch_with_all_statuses(shared_api)
    content, position = await request_action(shared_api, batch_id, "restart", body)

    assert content["jobs"] == build_job_counts(5, changed=len(restarted_indexes))
    assert content["events"] == {"JobRestarted": len(restarted_indexes)}
    before = ["pending", "processing", "completed", "failed", "cancelled"]
    expected = ["pending" if index in restarted_indexes else status for index, status in enumerate(before)]
    assert await load_statuses(shared_api, batch_id, job_ids, position) == expected


async def test_restart_batch_records_reason_and_reuse_of_steps(shared_api: Api) -> None:
    batch_id, job_ids = await create_batch_with_all_statuses(shared_api)
    await request_action(shared_api, batch_id, "restart", {"reuse_steps": False, "reason": "new template"})
    await request_action(shared_api, batch_id, "restart", {"only": "all"})

    for job_id, data in [(job_ids[3], {"reason": "new template", "reuse_steps": False}), (job_ids[2], {})]:
        event = (await shared_api.event_store.read_stream(job_id))[-1]
        assert (event.type, event.meta) == ("JobRestarted", EventMetadata("user:local", batch_id))
        assert event.data == {"by": "user:local", "reuse_steps": True, **data}


async def test_restart_of_failed_jobs_reopens_and_finishes_batch(api: Api) -> None:
    batch = await api.submit_batch({}, {"fail": "on purpose"}, {"fail": "on purpose"})
    first = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    content, _ = await request_action(api, batch["batch_id"], "restart")
    assert content["jobs"] == build_job_counts(3, changed=2)
    await api.wait_for_event(batch["batch_id"], "BatchReopened")
    types = [event["type"] async for event in _read_batch_stream(api, batch["batch_id"], after=first["position"])]
    assert types.count("JobRestarted") == types.count("JobClaimed") == types.count("JobFailed") == 2


async def _read_batch_stream(api: Api, batch_id: str, *, after: int) -> Any:
    """Yield the events of a batch and its jobs until the batch has finished."""
    async for event in api.stream_events(after=after, batch_id=batch_id):
        yield event
        if event["type"] == "BatchFinished":
            return


# Archive and delete -------------------------------------------------------------------------------------------------


async def test_archive_and_unarchive_batch_include_all_jobs(shared_api: Api) -> None:
    batch_id, job_ids = await create_batch_with_all_statuses(shared_api)
    for action, archived, event in (("archive", True, "JobArchived"), ("unarchive", False, "JobUnarchived")):
        content, position = await request_action(shared_api, batch_id, action, {"reason": "old"})
        assert content["batch"]["archived"] is archived
        assert content["jobs"] == build_job_counts(5, changed=5)
        assert content["events"] == {event: 5}
        resources = await load_batch_and_jobs(shared_api, batch_id, position)
        assert [resources[name]["archived"] for name in (batch_id, *job_ids)] == [archived] * 6
        assert (await shared_api.event_store.read_stream(batch_id))[-1].data == {
            "by": "user:local",
            "reason": "old",
        }

        repeated, repeated_position = await request_action(shared_api, batch_id, action)
        assert (repeated["jobs"], repeated["events"], repeated_position) == (build_job_counts(5), {}, position)


async def test_archive_of_archived_batch_archives_remaining_jobs(shared_api: Api) -> None:
    """An interrupted request can be repeated."""
    batch_id, job_ids = await create_batch_with_all_statuses(shared_api)
    await request_action(shared_api, batch_id, "archive")
    await shared_api.post(f"/api/events/jobs/{job_ids[2]}/unarchive")
    content, _ = await request_action(shared_api, batch_id, "archive")
    assert content["jobs"] == build_job_counts(5, changed=1)


async def test_delete_batch_removes_jobs_and_files(api: Api) -> None:
    batch = await api.submit_batch({"text": "a"}, {"text": "b"})
    path, job_id = f"{BATCHES}/{batch['batch_id']}", batch["job_ids"][0]
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    job = (await api.get(f"/api/events/jobs/{job_id}", finished["position"])).json()["job"]
    assert (await api.get(job["results"]["markdown_url"])).status_code == 200

    response = await api.http.delete(path)
    assert response.status_code == 200, response.text
    assert (response.json()["batch"], response.json()["jobs"]) == (None, build_job_counts(2, changed=2))
    position = response.headers["ledger-position"]
    for deleted_path in (path, f"/api/events/jobs/{job_id}", job["results"]["markdown_url"]):
        assert (await api.get(deleted_path, position)).status_code == 404
    assert (await api.get("/api/events/jobs")).json()["total"] == (await api.get(BATCHES)).json()["total"] == 0
    assert (await api.http.delete(path)).status_code == 404
    assert (await api.post(f"{path}/restart")).json()["code"] == "batch_not_found"


async def test_delete_of_unfinished_batch_is_rejected_without_event(shared_api: Api) -> None:
    batch_id, _ = await create_batch_with_all_statuses(shared_api)
    head = await shared_api.event_store.read_head_position()
    response = await shared_api.http.delete(f"{BATCHES}/{batch_id}")
    assert (response.status_code, response.json()["code"]) == (409, "invalid_state")
    assert "cancel it before you delete it" in response.json()["message"]
    await shared_api.check_no_request_recorded(after=head)


async def test_delete_batch_with_job_restarted_meanwhile_is_rejected(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await api_without_worker.submit_batch({}, {})
    path, (deleted_job, restarted_job) = f"{BATCHES}/{batch['batch_id']}", batch["job_ids"]
    await request_action(api_without_worker, batch["batch_id"], "cancel")
    await api_without_worker.wait_for_event(batch["batch_id"], "BatchFinished")
    iterate_stream_batches = api_without_worker.event_store.iterate_stream_batches
    commands = (RestartJob("user:bob"), ClaimJob("w", datetime.now(UTC)))

    async def iterate_with_restart(streams: Any) -> Any:
        async for chunk in iterate_stream_batches(streams):
            await api_without_worker.handle_commands(restarted_job, *commands, meta=WORKER)
            yield chunk

    monkeypatch.setattr(api_without_worker.event_store, "iterate_stream_batches", iterate_with_restart)
    response = await api_without_worker.http.delete(path)
    assert (response.status_code, response.json()["code"]) == (409, "invalid_state")
    details = response.json()["details"]
    assert details["jobs"] == build_job_counts(2, changed=1, rejected=1)
    rejections = [(rejection["job_id"], rejection["code"]) for rejection in details["rejections"]]
    assert rejections == [(restarted_job, "invalid_state")]
    head = await api_without_worker.event_store.read_head_position()
    assert (await api_without_worker.get(path, head)).json()["batch"]["job_ids"] == [restarted_job]
    assert (await api_without_worker.get(f"/api/events/jobs/{deleted_job}")).status_code == 404


# Large batches and invalid requests ---------------------------------------------------------------------------------


@soak_only
async def test_actions_on_ten_thousand_jobs_take_seconds(api_without_worker: Api) -> None:
    response = await api_without_worker.post(BATCHES, {"jobs": [{"job_type": "echo", "parameters": {}}] * 10_000})
    batch_id = response.json()["batch_id"]
    for action, event in (("cancel", "JobCancelled"), ("restart", "JobRestarted"), ("archive", "JobArchived")):
        start = time.monotonic()
        content, _ = await request_action(
            api_without_worker, batch_id, action, {"only": "cancelled"} if action == "restart" else None
        )
        assert time.monotonic() - start < 20  # takes 3 s on an idle machine
        assert content["jobs"] == build_job_counts(10_000, changed=10_000)
        assert content["events"] == {event: 10_000}
        assert len(str(content)) < 1000


@pytest.mark.parametrize("batch_id", ["batch-000000000000000000000000", "job-000000000000000000000000", "nonsense"])
async def test_action_on_missing_batch_is_not_found(shared_api: Api, batch_id: str) -> None:
    head = await shared_api.event_store.read_head_position()
    responses = [await shared_api.post(f"{BATCHES}/{batch_id}/{action}") for action in ACTIONS]
    responses.append(await shared_api.http.delete(f"{BATCHES}/{batch_id}"))
    assert {(response.status_code, response.json()["code"]) for response in responses} == {(404, "batch_not_found")}
    await shared_api.check_no_request_recorded(after=head)


@pytest.mark.parametrize("action", ACTIONS)
async def test_action_with_invalid_body_is_rejected_without_event(shared_api: Api, action: str) -> None:
    batch_id, _ = await create_batch_with_all_statuses(shared_api)
    head, path = await shared_api.event_store.read_head_position(), f"{BATCHES}/{batch_id}/{action}"
    invalid_bodies: list[tuple[Any, str]] = [
        ({"resaon": "x"}, "resaon"),
        ({"reason": 3}, "reason"),
        ({"reason": "x" * 3000}, "reason"),
        ([], ""),
        ({"only": "some"} if action == "restart" else {"only": "failed"}, "only"),
    ]
    for body, field in invalid_bodies:
        response = await shared_api.post(path, body)
        assert response.status_code == 422, f"{body}: {response.text}"
        assert response.json()["details"]["errors"][0]["path"] == field
    assert (await shared_api.http.post(path, content=b"x=1", headers={"Content-Type": "text/plain"})).status_code == 415
    malformed = await shared_api.http.post(path, content=b"{", headers={"Content-Type": "application/json"})
    assert (malformed.status_code, malformed.json()["code"]) == (400, "malformed_json")
    assert (await shared_api.http.get(path)).status_code == 405
    await shared_api.check_no_request_recorded(after=head)


async def test_access_lists_over_list_index_limit_are_rejected(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each job of a batch repeats the names in its list index; the body and the events are far below their limits."""
    monkeypatch.setattr(limits, "MAX_BATCH_LIST_INDEX_BYTES", 5_000_000)
    access = {"read_access": [f"{index:03}" + "x" * 197 for index in range(200)]}
    job = {"job_type": "echo", "parameters": {}}
    access_of_batch = {"jobs": [job] * 10, "access_control": access}
    access_of_jobs = {"jobs": [{**job, "access_control": access}] * 10}
    for body in (access_of_batch, access_of_jobs):
        response = await api.http.post(BATCHES, json=body)
        assert (response.status_code, response.json()["code"]) == (413, "content_too_large"), response.text[:300]
        assert "access_control" in response.json()["message"]
    assert (await api.http.post(BATCHES, json={"jobs": [job] * 3, "access_control": access})).status_code == 202
    batch = await api.submit_batch(*[{}] * 10)
    response = await api.http.put(f"{BATCHES}/{batch['batch_id']}", json={"access_control": access})
    assert (response.status_code, response.json()["code"]) == (413, "content_too_large"), response.text[:300]


async def test_update_over_list_index_limit_appends_no_event(api: Api) -> None:
    batch = await api.submit_batch(*[{}] * 900)
    names = [f"{index:03}" + "x" * 197 for index in range(200)]
    response = await api.http.put(f"{BATCHES}/{batch['batch_id']}", json={"access_control": {"read_access": names}})
    assert (response.status_code, response.json()["code"]) == (413, "content_too_large"), response.text[:300]
    assert "access_control" in response.json()["message"]
    events = await api.event_store.read_stream(batch["batch_id"])
    assert "BatchAccessChanged" not in [event.type for event in events]
