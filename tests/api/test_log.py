"""Test pages of the log: order, filters, bounded work for each request, streams, and the head of the log."""

from __future__ import annotations

from typing import Any

import pytest

from jobledger.ledger.domain.commands import CancelJob
from tests.api.conftest import Api

CANCEL = CancelJob("user:local")


async def load_page(api: Api, **query: Any) -> dict[str, Any]:
    response = await api.http.get("/api/ledger/events", params=query, headers=api.principal_headers)
    assert response.status_code == 200, response.text
    content: dict[str, Any] = response.json()
    assert content["status"] == "success"
    return content


def get_positions(content: dict[str, Any]) -> list[int]:
    return [event["position"] for event in content["events"]]


async def test_log_pages_have_no_gaps_or_duplicates(api_without_worker: Api) -> None:
    job_ids = [await api_without_worker.submit({"number": number}) for number in range(7)]
    first = await load_page(api_without_worker, limit=3)
    assert (get_positions(first), first["last_position"], first["head"]) == ([1, 2, 3], 3, 7)
    assert [event["stream"] for event in first["events"]] == job_ids[:3]
    assert first["events"][0]["data"]["parameters"] == {"number": 0}
    second = await load_page(api_without_worker, limit=3, after=first["last_position"])
    assert (get_positions(second), second["last_position"]) == ([4, 5, 6], 6)
    assert get_positions(await load_page(api_without_worker, after=6)) == [7]
    for after in (7, 10_000):
        end = await load_page(api_without_worker, after=after)
        assert (end["events"], end["last_position"], end["head"]) == ([], after, 7)


async def test_log_page_event_equals_live_stream_event(api_without_worker: Api) -> None:
    await api_without_worker.submit({"text": "ä"})
    [live] = await api_without_worker.take_events(1, after=0)
    del live["sse_id"]
    assert (await load_page(api_without_worker))["events"] == [live]


async def test_log_page_filtered_by_type_advances_by_scanned_events(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.routes.log._MAX_EVENTS_SCANNED", 10)
    monkeypatch.setattr("jobledger.api.routes.log._READ_BATCH_EVENTS", 5)
    job_ids = [await api_without_worker.submit() for _ in range(24)]
    await api_without_worker.handle_commands(job_ids[0], CANCEL)
    types = "JobCancelled,JobFailed"
    pages = [await load_page(api_without_worker, types=types)]
    while pages[-1]["last_position"] < pages[-1]["head"]:
        pages.append(await load_page(api_without_worker, types=types, after=pages[-1]["last_position"]))
    assert [content["last_position"] for content in pages] == [10, 20, 25]
    assert [get_positions(content) for content in pages] == [[], [], [25]]


async def test_log_page_of_large_events_ends_early(api_without_worker: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobledger.api.pagination.MAX_PAGE_BYTES", 10_000)
    for _ in range(4):
        await api_without_worker.submit({"text": "x" * 6000})
    content = await load_page(api_without_worker)
    assert (get_positions(content), content["last_position"]) == ([1, 2], 2)


async def test_events_of_one_stream_are_paged(api_without_worker: Api) -> None:
    job_id, second_job_id = await api_without_worker.submit(), await api_without_worker.submit()
    for stream in (second_job_id, job_id):
        await api_without_worker.handle_commands(stream, CANCEL)
    first = await load_page(api_without_worker, stream=job_id, limit=1)
    assert (get_positions(first), first["last_position"], first["head"]) == ([1], 1, 4)
    assert get_positions(await load_page(api_without_worker, stream=job_id, after=1)) == [4]
    assert get_positions(await load_page(api_without_worker, stream=job_id, after=3)) == [4]
    assert get_positions(await load_page(api_without_worker, stream=job_id, types="JobCancelled")) == [4]
    end = await load_page(api_without_worker, stream=job_id, after=4)
    assert (end["events"], end["last_position"]) == ([], 4)
    response = await api_without_worker.get("/api/ledger/events?stream=job-missing")
    assert (response.status_code, response.json()["code"]) == (404, "stream_not_found")


async def test_events_of_one_stream_are_read_by_the_stream_index(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    for _ in range(50):
        await api_without_worker.submit()
    await api_without_worker.handle_commands(job_id, CANCEL)
    await api_without_worker.db.command("profile", 2)
    try:
        content = await load_page(api_without_worker, stream=job_id, after=1)
    finally:
        await api_without_worker.db.command("profile", 0)
    assert get_positions(content) == [52]
    queries = [
        query
        async for query in api_without_worker.db["system.profile"].find({"ns": f"{api_without_worker.db.name}.events"})
        if job_id in str(query["command"].get("filter"))
    ]
    assert queries
    for query in queries:
        assert query["planSummary"] == "IXSCAN { stream: 1, version: 1 }"
        assert query["docsExamined"] <= 2


@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("after=-1", "invalid_content"),
        ("after=x", "invalid_content"),
        ("limit=0", "invalid_content"),
        ("limit=1001", "invalid_content"),
        ("types=JobExploded", "unknown_event_type"),
        ("stream=", "invalid_content"),
        ("before=3", "invalid_content"),
        ("after=99999999999999999999", "invalid_content"),
    ],
)
async def test_log_with_invalid_query_is_rejected(shared_api: Api, query: str, code: str) -> None:
    response = await shared_api.get(f"/api/ledger/events?{query}")
    assert (response.status_code, response.json()["code"]) == (422, code)


async def test_head_returns_positions_of_log_and_views(api_without_worker: Api) -> None:
    empty = (await api_without_worker.get("/api/ledger/head")).json()
    assert (empty["head"], empty["oldest"]) == (0, 0)
    for _ in range(3):
        await api_without_worker.submit()
    await api_without_worker.get("/api/events/jobs", 3)
    assert (await api_without_worker.get("/api/ledger/head")).json() == {
        "status": "success",
        "head": 3,
        "oldest": 1,
        "projector": {"position": 3, "lag": 0},
    }


@pytest.mark.usefixtures("header_auth")
async def test_head_requires_authentication_only(api_without_worker: Api) -> None:
    assert (await api_without_worker.as_user("bob").get("/api/ledger/head")).status_code == 200
    response = await api_without_worker.as_user().get("/api/ledger/head")
    assert (response.status_code, response.json()["code"]) == (401, "authentication_required")
