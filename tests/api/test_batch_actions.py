"""Batches over HTTP, acted on as a whole: paused, resumed, cancelled, restarted, archived, deleted."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.commands import CancelJob, ClaimJob, CompleteJob, FailAttempt, RestartJob
from jobledger.ledger.domain.events import EventMetadata, Failure
from jobledger.ledger.store.command_handler import handle_command
from tests.api.conftest import Api
from tests.support.event_examples import make_results
from tests.support.soak_only import soak_only

ACTIONS = ("pause", "resume", "cancel", "restart", "archive", "unarchive")
BATCHES = "/api/events/batches"


def counted(total: int, *, changed: int = 0, refused: int = 0) -> dict[str, int]:
    return {"total": total, "changed": changed, "unchanged": total - changed - refused, "rejected": refused}


async def act(api: Api, batch_id: str, action: str, body: Any = None) -> tuple[dict[str, Any], int]:
    """Act on a batch; return the response and the position at which the views show all of it."""
    response = await api.post(f"{BATCHES}/{batch_id}/{action}", body)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    assert (content["status"], content["batch_id"]) == ("success", batch_id)
    return content, int(response.headers["ledger-position"])


async def do(api: Api, job_id: str, *commands: Any) -> None:
    for command in commands:
        await handle_command(api.event_store, job_id, command, meta=EventMetadata("worker:w"))


async def in_every_state(api: Api) -> tuple[str, list[str]]:
    """A batch with jobs that are waiting, running, completed, failed and cancelled, in this order."""
    batch = await api.submit_batch(*[{}] * 5)
    batch_id, job_ids = batch["batch_id"], batch["job_ids"]
    claim = ClaimJob("w", datetime.now(UTC))
    _, running, completed, failed, cancelled = job_ids
    await do(api, running, claim)
    await do(api, completed, claim, CompleteJob("w", 1, make_results()))
    await do(api, failed, claim, FailAttempt("w", 1, Failure(code="X", message="x"), None))
    await do(api, cancelled, CancelJob("user:ada"))
    return batch_id, job_ids


async def seen(api: Api, batch_id: str, position: int) -> dict[str, dict[str, Any]]:
    """The jobs of a batch as the list shows them, and the batch itself, once the views have got there."""
    listed = (await api.get(f"/api/events/jobs?batch_id={batch_id}", position)).json()["jobs"]
    batch = (await api.get(f"{BATCHES}/{batch_id}")).json()["batch"]
    return {job["job_id"]: job for job in listed} | {batch_id: batch}


async def statuses(api: Api, batch_id: str, job_ids: list[str], position: int) -> list[str]:
    jobs = await seen(api, batch_id, position)
    return [jobs[job_id]["status"] for job_id in job_ids]


# Pausing --------------------------------------------------------------------------------------------------------------


async def test_pause_marks_batch_and_pending_jobs_until_resumed(api_without_worker: Api) -> None:
    alone = await api_without_worker.submit()
    batch_id, job_ids = await in_every_state(api_without_worker)
    waiting = job_ids[0]

    content, position = await act(api_without_worker, batch_id, "pause", {"reason": "the site is down"})
    jobs = await seen(api_without_worker, batch_id, position)
    assert (content["batch"]["paused"], content["batch"]["position"]) == (True, position)
    assert "jobs" not in content
    assert jobs[batch_id]["paused"] is True
    assert [job_id for job_id in job_ids if jobs[job_id]["paused"]] == [waiting], "what runs or has ended is not paused"
    assert (await api_without_worker.get(f"/api/events/jobs/{waiting}")).json()["job"]["paused"] is True
    assert (await api_without_worker.get(f"/api/events/jobs/{alone}")).json()["job"]["paused"] is False
    assert [row["_id"] async for row in api_without_worker.db.queue.find()] == [alone]

    content, position = await act(api_without_worker, batch_id, "resume")
    jobs = await seen(api_without_worker, batch_id, position)
    assert content["batch"]["paused"] is jobs[batch_id]["paused"] is jobs[waiting]["paused"] is False
    assert await api_without_worker.db.queue.count_documents({}) == 2
    paused, resumed = (await api_without_worker.event_store.read_stream(batch_id))[-2:]
    assert (paused.type, paused.data) == ("BatchPaused", {"by": "user:local", "reason": "the site is down"})
    assert (resumed.type, resumed.data) == ("BatchResumed", {"by": "user:local"})
    assert paused.meta == resumed.meta == EventMetadata("user:local", batch_id)


async def test_repeated_pause_and_needless_resume_append_no_event(api_without_worker: Api) -> None:
    batch_id = (await api_without_worker.submit_batch({}))["batch_id"]
    _, nothing = await act(api_without_worker, batch_id, "resume")
    _, once = await act(api_without_worker, batch_id, "pause")
    _, twice = await act(api_without_worker, batch_id, "pause")
    assert (nothing, once, twice) == (1, 3, 3)
    assert await api_without_worker.event_store.head_position() == 3


async def test_pause_directly_after_submission_succeeds(api_without_worker: Api) -> None:
    for _ in range(10):
        batch = await api_without_worker.submit_batch({})
        _, position = await act(api_without_worker, batch["batch_id"], "pause")
        assert (await seen(api_without_worker, batch["batch_id"], position))[batch["job_ids"][0]]["paused"] is True


async def test_restart_of_job_in_paused_batch_responds_with_paused(api_without_worker: Api) -> None:
    batch_id, (*_, cancelled) = await in_every_state(api_without_worker)
    _, position = await act(api_without_worker, batch_id, "pause")
    await api_without_worker.get("/api/events/jobs", position)
    response = await api_without_worker.post(f"/api/events/jobs/{cancelled}/restart")
    assert (response.json()["job"]["status"], response.json()["job"]["paused"]) == ("pending", True)


# Cancelling -----------------------------------------------------------------------------------------------------------


async def test_cancel_batch_cancels_unfinished_jobs_only(api_without_worker: Api) -> None:
    batch_id, job_ids = await in_every_state(api_without_worker)
    content, position = await act(api_without_worker, batch_id, "cancel", {"reason": "wrong conference"})

    assert content["jobs"] == counted(5, changed=2)
    assert content["events"] == {"JobCancelled": 1, "JobCancelRequested": 1}
    assert content["rejections"] == []
    expected = ["cancelled", "processing", "completed", "failed", "cancelled"]
    assert await statuses(api_without_worker, batch_id, job_ids, position) == expected
    assert (await seen(api_without_worker, batch_id, position))[job_ids[1]]["cancel_requested"] is True
    for job_id in job_ids[:2]:
        event = (await api_without_worker.event_store.read_stream(job_id))[-1]
        assert event.data == {"by": "user:local", "reason": "wrong conference"}
        assert event.meta == EventMetadata("user:local", batch_id)

    again, same = await act(api_without_worker, batch_id, "cancel")
    assert again["jobs"] == counted(5)
    assert (again["events"], same) == ({}, position)


async def test_cancel_batch_stops_running_jobs_and_finishes_batch(api: Api) -> None:
    batch = await api.submit_batch(*[{"seconds": 3600}] * 12)
    await api.wait_for_event(batch["job_ids"][0], "JobClaimed")
    content, _ = await act(api, batch["batch_id"], "cancel")
    assert content["jobs"] == counted(12, changed=12)
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    assert finished["data"]["counts"] == {"completed": 0, "failed": 0, "cancelled": 12}


# Restarting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "restarted"),
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
    api_without_worker: Api, body: Any, restarted: list[int]
) -> None:
    batch_id, job_ids = await in_every_state(api_without_worker)
    content, position = await act(api_without_worker, batch_id, "restart", body)

    assert content["jobs"] == counted(5, changed=len(restarted))
    assert content["events"] == {"JobRestarted": len(restarted)}
    before = ["pending", "processing", "completed", "failed", "cancelled"]
    expected = ["pending" if index in restarted else status for index, status in enumerate(before)]
    assert await statuses(api_without_worker, batch_id, job_ids, position) == expected


async def test_restart_batch_records_reason_and_reuse_of_steps(api_without_worker: Api) -> None:
    batch_id, job_ids = await in_every_state(api_without_worker)
    await act(api_without_worker, batch_id, "restart", {"reuse_steps": False, "reason": "new template"})
    await act(api_without_worker, batch_id, "restart", {"only": "all"})

    for job_id, data in [(job_ids[3], {"reason": "new template", "reuse_steps": False}), (job_ids[2], {})]:
        event = (await api_without_worker.event_store.read_stream(job_id))[-1]
        assert (event.type, event.meta) == ("JobRestarted", EventMetadata("user:local", batch_id))
        assert event.data == {"by": "user:local", "reuse_steps": True, **data}


async def test_restart_of_failed_jobs_reopens_and_finishes_batch(api: Api) -> None:
    batch = await api.submit_batch({}, {"fail": "no luck"}, {"fail": "no luck either"})
    first = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    content, _ = await act(api, batch["batch_id"], "restart")
    assert content["jobs"] == counted(3, changed=2)
    await api.wait_for_event(batch["batch_id"], "BatchReopened")
    types = [event["type"] async for event in _of_batch(api, batch["batch_id"], after=first["position"])]
    assert types.count("JobRestarted") == types.count("JobClaimed") == types.count("JobFailed") == 2


async def _of_batch(api: Api, batch_id: str, *, after: int) -> Any:
    """The story of a batch by its own stream, up to its end."""
    async for event in api.stream_events(after=after, batch_id=batch_id):
        yield event
        if event["type"] == "BatchFinished":
            return


# Archiving and deleting -----------------------------------------------------------------------------------------------


async def test_archive_and_unarchive_batch_include_all_jobs(api_without_worker: Api) -> None:
    batch_id, job_ids = await in_every_state(api_without_worker)
    for action, archived, event in (("archive", True, "JobArchived"), ("unarchive", False, "JobUnarchived")):
        content, position = await act(api_without_worker, batch_id, action, {"reason": "tidying up"})
        assert content["batch"]["archived"] is archived
        assert content["jobs"] == counted(5, changed=5)
        assert content["events"] == {event: 5}
        shown = await seen(api_without_worker, batch_id, position)
        assert [shown[name]["archived"] for name in (batch_id, *job_ids)] == [archived] * 6
        assert (await api_without_worker.event_store.read_stream(batch_id))[-1].data == {
            "by": "user:local",
            "reason": "tidying up",
        }

        again, same = await act(api_without_worker, batch_id, action)
        assert (again["jobs"], again["events"], same) == (counted(5), {}, position)


async def test_archive_of_archived_batch_archives_remaining_jobs(api_without_worker: Api) -> None:
    """So whoever was interrupted does it once more."""
    batch_id, job_ids = await in_every_state(api_without_worker)
    await act(api_without_worker, batch_id, "archive")
    await api_without_worker.post(f"/api/events/jobs/{job_ids[2]}/unarchive")
    content, _ = await act(api_without_worker, batch_id, "archive")
    assert content["jobs"] == counted(5, changed=1)


async def test_delete_batch_removes_jobs_and_files(api: Api) -> None:
    batch = await api.submit_batch({"text": "a"}, {"text": "b"})
    path, job_id = f"{BATCHES}/{batch['batch_id']}", batch["job_ids"][0]
    finished = await api.wait_for_event(batch["batch_id"], "BatchFinished")
    job = (await api.get(f"/api/events/jobs/{job_id}", finished["position"])).json()["job"]
    assert (await api.get(job["results"]["markdown_url"])).status_code == 200

    response = await api.http.delete(path)
    assert response.status_code == 200, response.text
    assert (response.json()["batch"], response.json()["jobs"]) == (None, counted(2, changed=2))
    position = response.headers["ledger-position"]
    for gone in (path, f"/api/events/jobs/{job_id}", job["results"]["markdown_url"]):
        assert (await api.get(gone, position)).status_code == 404
    assert (await api.get("/api/events/jobs")).json()["total"] == (await api.get(BATCHES)).json()["total"] == 0
    assert (await api.http.delete(path)).status_code == 404
    assert (await api.post(f"{path}/restart")).json()["code"] == "batch_not_found"


async def test_delete_of_unfinished_batch_is_rejected_without_event(api_without_worker: Api) -> None:
    batch_id, _ = await in_every_state(api_without_worker)
    head = await api_without_worker.event_store.head_position()
    response = await api_without_worker.http.delete(f"{BATCHES}/{batch_id}")
    assert (response.status_code, response.json()["code"]) == (409, "invalid_state")
    assert "cancel it first" in response.json()["message"]
    assert await api_without_worker.event_store.head_position() == head


async def test_delete_batch_with_job_restarted_meanwhile_is_rejected(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = await api_without_worker.submit_batch({}, {})
    path, (one, two) = f"{BATCHES}/{batch['batch_id']}", batch["job_ids"]
    await act(api_without_worker, batch["batch_id"], "cancel")
    await api_without_worker.wait_for_event(batch["batch_id"], "BatchFinished")
    read_in_parts = api_without_worker.event_store.iterate_stream_batches

    async def overtaken(streams: Any) -> Any:
        async for part in read_in_parts(streams):
            await do(api_without_worker, two, RestartJob("user:bob"), ClaimJob("w", datetime.now(UTC)))
            yield part

    monkeypatch.setattr(api_without_worker.event_store, "iterate_stream_batches", overtaken)
    response = await api_without_worker.http.delete(path)
    assert (response.status_code, response.json()["code"]) == (409, "invalid_state")
    details = response.json()["details"]
    assert details["jobs"] == counted(2, changed=1, refused=1)
    assert [(it["job_id"], it["code"]) for it in details["rejections"]] == [(two, "invalid_state")]
    head = await api_without_worker.event_store.head_position()
    assert (await api_without_worker.get(path, head)).json()["batch"]["job_ids"] == [two]
    assert (await api_without_worker.get(f"/api/events/jobs/{one}")).status_code == 404


# Many, and wrong ------------------------------------------------------------------------------------------------------


@soak_only
async def test_actions_on_ten_thousand_jobs_take_seconds(api_without_worker: Api) -> None:
    response = await api_without_worker.post(BATCHES, {"jobs": [{"job_type": "echo", "parameters": {}}] * 10_000})
    batch_id = response.json()["batch_id"]
    for action, event in (("cancel", "JobCancelled"), ("restart", "JobRestarted"), ("archive", "JobArchived")):
        began = time.monotonic()
        content, _ = await act(
            api_without_worker, batch_id, action, {"only": "cancelled"} if action == "restart" else None
        )
        assert time.monotonic() - began < 20  # three on a quiet machine
        assert content["jobs"] == counted(10_000, changed=10_000)
        assert content["events"] == {event: 10_000}
        assert len(str(content)) < 1000


@pytest.mark.parametrize("batch_id", ["batch-000000000000000000000000", "job-000000000000000000000000", "nonsense"])
async def test_action_on_missing_batch_is_not_found(api_without_worker: Api, batch_id: str) -> None:
    responses = [await api_without_worker.post(f"{BATCHES}/{batch_id}/{action}") for action in ACTIONS]
    responses.append(await api_without_worker.http.delete(f"{BATCHES}/{batch_id}"))
    assert {(response.status_code, response.json()["code"]) for response in responses} == {(404, "batch_not_found")}
    assert await api_without_worker.event_store.head_position() == 0


@pytest.mark.parametrize("action", ACTIONS)
async def test_action_with_invalid_body_is_rejected_without_event(api_without_worker: Api, action: str) -> None:
    batch_id, _ = await in_every_state(api_without_worker)
    head, path = await api_without_worker.event_store.head_position(), f"{BATCHES}/{batch_id}/{action}"
    wrong: list[tuple[Any, str]] = [
        ({"resaon": "x"}, "resaon"),
        ({"reason": 3}, "reason"),
        ({"reason": "x" * 3000}, "reason"),
        ([], ""),
        ({"only": "some"} if action == "restart" else {"only": "failed"}, "only"),
    ]
    for body, where in wrong:
        response = await api_without_worker.post(path, body)
        assert response.status_code == 422, f"{body}: {response.text}"
        assert response.json()["details"]["errors"][0]["path"] == where
    assert (
        await api_without_worker.http.post(path, content=b"x=1", headers={"Content-Type": "text/plain"})
    ).status_code == 415
    broken = await api_without_worker.http.post(path, content=b"{", headers={"Content-Type": "application/json"})
    assert (broken.status_code, broken.json()["code"]) == (400, "malformed_json")
    assert (await api_without_worker.http.get(path)).status_code == 405
    assert await api_without_worker.event_store.head_position() == head


async def test_access_lists_over_list_index_limit_are_rejected(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    """The body is far below its limit, and so are the events."""
    monkeypatch.setattr(limits, "MAX_BATCH_LIST_INDEX_BYTES", 5_000_000)
    access = {"read_access": [f"{index:03}" + "x" * 197 for index in range(200)]}
    few, many = [{"job_type": "echo", "parameters": {}}] * 3, [{"job_type": "echo", "parameters": {}}] * 10
    inherited = {"jobs": many, "access_control": access}
    own = {"jobs": [{**job, "access_control": access} for job in many]}
    for body in (inherited, own):
        response = await api.http.post(BATCHES, json=body)
        assert (response.status_code, response.json()["code"]) == (413, "content_too_large"), response.text[:300]
        assert "access_control" in response.json()["message"]
    assert (await api.http.post(BATCHES, json={"jobs": few, "access_control": access})).status_code == 202
    batch = await api.submit_batch(*[{}] * 10)
    response = await api.http.put(f"{BATCHES}/{batch['batch_id']}", json={"access_control": access})
    assert (response.status_code, response.json()["code"]) == (413, "content_too_large"), response.text[:300]


async def test_update_over_list_index_limit_appends_no_event(api: Api) -> None:
    batch = await api.submit_batch(*[{}] * 900)
    names = [f"{index:03}" + "x" * 197 for index in range(200)]
    response = await api.http.put(f"{BATCHES}/{batch['batch_id']}", json={"access_control": {"read_access": names}})
    assert (response.status_code, response.json()["code"]) == (413, "content_too_large"), response.text[:300]
    assert "access_control" in response.json()["message"]
    assert not [it for it in await api.event_store.read_stream(batch["batch_id"]) if it.type == "BatchAccessChanged"]
