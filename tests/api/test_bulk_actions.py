"""One action on all jobs that match filters."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest

from jobledger.api import bulk_commands
from jobledger.api.routes import bulk_actions
from jobledger.ledger.domain.commands import ClaimJob, FailAttempt
from jobledger.ledger.domain.events import ErrorInfo, EventMetadata
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.event_store import EventStore
from tests.api.conftest import Api, check_error
from tests.support.header_auth import principal_header

BULK = "/api/events/jobs/bulk"
JOBS = "/api/events/jobs"
WORKER = EventMetadata("worker:w")


async def request_bulk(api: Api, action: str, filters: dict[str, Any], **fields: Any) -> dict[str, Any]:
    """Request an action when the views contain all events so far."""
    position = str(await api.event_store.read_head_position())
    body = {"action": action, "filters": filters, **fields}
    response = await api.post(BULK, body, **{"Ledger-Position": position})
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    if content["jobs"]["changed"] and not content["dry_run"]:
        assert int(response.headers["ledger-position"]) > int(position)
    return content


async def fail(api: Api, job_id: str, code: str = "X") -> None:
    claim, failure = ClaimJob("w", datetime.now(UTC)), ErrorInfo(code=code, message="x")
    [claimed] = await api.handle_commands(job_id, claim, meta=WORKER)
    await api.handle_commands(job_id, FailAttempt("w", claimed.data["attempt"], failure, None), meta=WORKER)


async def read_types(api: Api, job_id: str) -> list[str]:
    return [event.type for event in await api.event_store.read_stream(job_id)]


async def test_bulk_restart_changes_only_matching_jobs(shared_api: Api) -> None:
    batch = await shared_api.submit_batch(*[{"track": "A"}] * 4)
    closed, other_error, pending, closed_too = batch["job_ids"]
    await fail(shared_api, closed, "CLOSED")
    await fail(shared_api, closed_too, "CLOSED")
    await fail(shared_api, other_error, "OTHER")
    filters = {"batch_id": batch["batch_id"], "status": "failed", "error_code": "CLOSED", "track": "A"}

    content = await request_bulk(shared_api, "restart", filters, reason="open again", reuse_steps=False)

    assert content["jobs"] == {"total": 2, "changed": 2, "unchanged": 0, "rejected": 0}
    assert (content["events"], content["job_ids"]) == ({"JobRestarted": 2}, [closed, closed_too])
    assert (content["rejections"], content["next_cursor"], content["dry_run"]) == ([], None, False)
    for job_id in (closed, closed_too):
        event = (await shared_api.event_store.read_stream(job_id))[-1]
        assert event.data == {"by": "user:local", "reason": "open again", "reuse_steps": False}
        assert event.meta.actor == "user:local"
    assert (await read_types(shared_api, other_error))[-1] == "JobFailed"
    assert await read_types(shared_api, pending) == ["JobSubmitted"]


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        ("cancel", {"JobCancelled": 1, "JobCancelRequested": 1}),
        ("restart", {"JobRestarted": 1}),
        ("archive", {"JobArchived": 3}),
        ("unarchive", {}),
        ("delete", {"JobDeleted": 2}),
    ],
)
async def test_bulk_action_applies_to_jobs_whose_state_allows_it(
    shared_api: Api, action: str, expected: dict[str, int]
) -> None:
    batch = await shared_api.submit_batch({}, {}, {})
    _, running, failed = batch["job_ids"]
    await shared_api.handle_commands(running, ClaimJob("w", datetime.now(UTC)), meta=WORKER)
    await fail(shared_api, failed)
    filters = {"batch_id": batch["batch_id"]}
    head = await shared_api.event_store.read_head_position()

    dry_run = await request_bulk(shared_api, action, filters, dry_run=True)

    assert dry_run["events"] == expected
    await shared_api.check_no_request_recorded(after=head)
    content = await request_bulk(shared_api, action, filters)
    assert content["events"] == expected
    assert {**content, "dry_run": True} | {"position": 0} == dry_run | {"position": 0}
    rejected = content["jobs"]["rejected"]
    assert rejected == (1 if action == "delete" else 0)
    assert [entry["job_id"] for entry in content["rejections"]] == [running] * rejected
    assert content["jobs"]["changed"] + content["jobs"]["unchanged"] + rejected == content["jobs"]["total"] == 3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"action": "cancel"}, "no filter"),
        ({"action": "cancel", "filters": {"status": None}}, "no filter"),
        ({"action": "cancel", "filters": {"q": "!!! ..."}}, "no word"),
        ({"action": "cancel", "filters": {"status": "failed"}, "all": True}, "exclude each other"),
        ({"action": "archive", "all": True, "reuse_steps": False}, "for `restart`"),
        ({"action": "cancel", "filters": {"state": "failed"}}, "filters.state"),
        ({"action": "cancel", "filters": {"limit": 1}}, "filters.limit"),
        ({"action": "explode", "all": True}, "action"),
        ({"action": "cancel", "all": True, "max_jobs": 10_001}, "max_jobs"),
        ({"action": "cancel", "all": True, "parameters": {}}, "parameters"),
    ],
)
async def test_bulk_action_with_wrong_body_is_rejected(shared_api: Api, body: Any, message: str) -> None:
    head = await shared_api.event_store.read_head_position()
    response = await shared_api.post(BULK, body)
    check_error(response, 422, "invalid_content")
    assert message in response.text
    await shared_api.check_no_request_recorded(after=head)


async def test_other_method_of_the_bulk_path_is_rejected_with_its_own_methods(shared_api: Api) -> None:
    response = await shared_api.http.patch(BULK)
    check_error(response, 405, "method_not_allowed")
    assert response.headers["allow"] == "POST"
    response = await shared_api.http.patch(f"{JOBS}/job-1")
    assert response.headers["allow"] == "DELETE, GET, HEAD, PUT"


async def test_bulk_action_continues_at_the_cursor(shared_api: Api) -> None:
    batch = await shared_api.submit_batch(*[{}] * 7)
    filters = {"batch_id": batch["batch_id"], "status": "pending"}
    changed: list[str] = []
    fields: dict[str, Any] = {}
    while True:
        content = await request_bulk(shared_api, "cancel", filters, max_jobs=3, **fields)
        changed += content["job_ids"]
        fields = {"cursor": content["next_cursor"], "position": content["position"]}
        if content["next_cursor"] is None:
            break
        assert content["jobs"]["changed"] == 3
    assert changed == batch["job_ids"]


async def test_bulk_action_stops_after_its_time(shared_api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bulk_actions, "_MAX_SECONDS", 0.0)
    monkeypatch.setattr(bulk_actions, "JOBS_PER_CHUNK", 2)
    batch = await shared_api.submit_batch(*[{}] * 5)
    filters = {"batch_id": batch["batch_id"]}
    content = await request_bulk(shared_api, "cancel", filters)
    assert (content["jobs"]["changed"], content["next_cursor"] is not None) == (2, True)
    repeated = await request_bulk(shared_api, "cancel", filters, cursor=content["next_cursor"])
    assert repeated["job_ids"] == batch["job_ids"][2:4]


async def test_jobs_submitted_after_the_position_are_left_out(shared_api: Api) -> None:
    first = await shared_api.submit({"track": "only here"})
    filters = {"track": "only here"}
    dry_run = await request_bulk(shared_api, "cancel", filters, dry_run=True)
    second = await shared_api.submit({"track": "only here"})
    content = await request_bulk(shared_api, "cancel", filters, position=dry_run["position"])
    assert (dry_run["job_ids"], content["job_ids"], content["jobs"]["total"]) == ([first], [first], 1)
    assert await read_types(shared_api, second) == ["JobSubmitted"]


@pytest.mark.parametrize("filters", [{"status": "pending"}, {"waiting_for": "worker"}])
async def test_job_that_lost_the_status_of_the_filter_is_skipped(
    shared_api: Api, monkeypatch: pytest.MonkeyPatch, filters: dict[str, str]
) -> None:
    """The views list it as pending. It is claimed before the action is decided."""
    batch = await shared_api.submit_batch({}, {})
    claimed, pending = batch["job_ids"]

    async def claim_first(event_store: EventStore, *args: Any, **kwargs: Any) -> Any:
        await handle_command(event_store, claimed, ClaimJob("w", datetime.now(UTC)), meta=WORKER)
        return await bulk_commands.apply_to_jobs(event_store, *args, **kwargs)

    monkeypatch.setattr(bulk_actions, "apply_to_jobs", claim_first)
    content = await request_bulk(shared_api, "cancel", {"batch_id": batch["batch_id"], **filters})
    assert (content["jobs"]["total"], content["job_ids"]) == (1, [pending])
    assert await read_types(shared_api, claimed) == ["JobSubmitted", "JobClaimed"]


async def test_bulk_action_accepts_every_filter_of_the_list(shared_api: Api) -> None:
    parameters = {"track": "T", "event": "E", "day": "D", "target_language": "fr", "session": "Needle and thread"}
    matching = await shared_api.submit(parameters)
    await shared_api.submit({**parameters, "session": "Hay"})
    filters: dict[str, Any] = {"track": "T", "event": "E", "day": "D", "language": "fr", "job_type": "echo"}
    filters |= {"user_id": "local", "archived": False, "status": "pending", "q": "needle THREAD"}
    filters |= {"waiting_for": "worker", "id_prefix": matching[:12]}
    filters |= {"created_after": "2020-01-01T00:00:00Z", "created_before": "2099-01-01T00:00:00+01:00"}
    for action in ("archive", "cancel"):
        changed = await request_bulk(shared_api, action, {**filters, "archived": action == "cancel"})
        assert changed["job_ids"] == [matching]


async def test_repeated_bulk_action_changes_no_job_twice(shared_api: Api) -> None:
    job_id = await shared_api.submit({"track": "repeated"})
    await fail(shared_api, job_id)
    key = {"Idempotency-Key": f"key-{job_id}"}
    body = {"action": "restart", "filters": {"track": "repeated"}}
    position = {"Ledger-Position": str(await shared_api.event_store.read_head_position())}
    first = await shared_api.post(BULK, body, **key, **position)
    await fail(shared_api, job_id)
    repeated = await shared_api.post(BULK, body, **key)
    assert (first.json()["jobs"]["changed"], repeated.json()["jobs"]["changed"]) == (1, 0)
    assert (await read_types(shared_api, job_id)).count("JobRestarted") == 1
    other = await shared_api.post(BULK, {**body, "reason": "x"}, **key)
    check_error(other, 422, "idempotency_key_reused")


async def test_bulk_action_needs_access_to_each_job(shared_header_auth_api: Api) -> None:
    api = shared_header_auth_api
    owner, other = api.as_user("owner-of-bulk"), api.as_user("bulk-caller")
    access = {
        "invisible": {},
        "readable": {"read_access": ["bulk-caller"]},
        "writable": {"write_access": ["bulk-caller"]},
        "administered": {"admin_access": ["bulk-caller"]},
    }
    ids = {name: await owner.submit({"track": "access"}, access_control=lists) for name, lists in access.items()}
    content = await request_bulk(other, "cancel", {"track": "access"}, reason="no longer needed")
    assert content["jobs"] == {"total": 3, "changed": 2, "unchanged": 0, "rejected": 1}
    [rejection] = content["rejections"]
    assert (rejection["job_id"], rejection["code"]) == (ids["readable"], "forbidden")
    assert content["job_ids"] == [ids["writable"], ids["administered"]]
    event = (await api.event_store.read_stream(ids["writable"]))[-1]
    assert event.data == {"by": "user:bulk-caller", "reason": "no longer needed"}
    deleted = await request_bulk(other, "delete", {"track": "access"})
    assert deleted["job_ids"] == [ids["administered"]]
    assert ids["invisible"] not in str(deleted)
    anonymous = await api.http.post(BULK, json={"action": "cancel", "all": True}, headers=principal_header(""))
    check_error(anonymous, 401, "authentication_required")


@pytest.mark.timeout(300)
async def test_bulk_actions_on_thousands_of_jobs_that_change_at_the_same_time(api_without_worker: Api) -> None:
    api, count = api_without_worker, 5000
    batch = await api.submit_batch(*[{}] * count)
    job_ids, filters = batch["job_ids"], {"batch_id": batch["batch_id"]}

    async def cancel_some() -> list[httpx.Response]:
        chosen = random.Random(7).sample(job_ids, 100)
        return [await api.post(f"{JOBS}/{job_id}/cancel") for job_id in chosen]

    first, second, responses = await asyncio.gather(
        request_all(api, "cancel", {**filters, "status": "pending"}),
        request_all(api, "cancel", filters),
        cancel_some(),
    )

    single = sum(response.status_code == 200 for response in responses)
    assert {response.status_code for response in responses} <= {200, 409}
    assert first["changed"] + second["changed"] + single == count
    assert second["total"] == count
    counted = await asyncio.gather(*(read_types(api, job_id) for job_id in job_ids[::50]))
    assert Counter(map(tuple, counted)) == {("JobSubmitted", "JobCancelled"): len(job_ids[::50])}
    position = str(await api.event_store.read_head_position())
    listed = (await api.get(f"{JOBS}?batch_id={batch['batch_id']}&status=cancelled&limit=1", position)).json()
    assert listed["total"] == count
    restarted = await request_all(api, "restart", {**filters, "status": "cancelled"})
    assert restarted == {"total": count, "changed": count, "unchanged": 0, "rejected": 0}


async def request_all(api: Api, action: str, filters: dict[str, Any]) -> Counter[str]:
    """Request an action until no job is left. Return the sums of the counts."""
    counts: Counter[str] = Counter()
    fields: dict[str, Any] = {}
    while fields.get("cursor", "first") is not None:
        content = await request_bulk(api, action, filters, **fields)
        counts.update(content["jobs"])
        fields = {"cursor": content["next_cursor"], "position": content["position"]}
    return counts
