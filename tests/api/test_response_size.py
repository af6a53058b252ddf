"""Lists and pages end by bytes, whatever they hold; large fields are left out of lists unless they are asked for."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobledger.projections.views.job_list import OMITTABLE_FIELDS
from jobledger.projections.views.paging import MAX_PAGE_BYTES
from tests.api.conftest import Api

LARGEST_ANSWER = 3 * MAX_PAGE_BYTES
"""One item more than fits is not sent; one that is larger than a page alone is."""


async def pages(api: Api, path: str, name: str, **query: Any) -> list[list[dict[str, Any]]]:
    """Follow a list to its end; each answer is small enough."""
    found: list[list[dict[str, Any]]] = []
    cursor: dict[str, Any] = {}
    while True:
        answer = await api.http.get(path, params={**query, **cursor}, headers=api.principal_headers)
        assert answer.status_code == 200, answer.text[:300]
        assert len(answer.content) < LARGEST_ANSWER
        content = answer.json()
        found.append(content[name])
        if "next_cursor" not in content:
            return found
        assert content[name], "a page with a next one is not empty"
        cursor = {"cursor": content["next_cursor"]}


async def test_large_fields_are_left_out_of_lists_and_there_in_the_job(api_without_worker: Api) -> None:
    ids = [await api_without_worker.submit({"text": "x" * 3_000_000, "track": "Main"}) for _ in range(4)]
    small = await api_without_worker.submit({"track": "Main"})
    head = await api_without_worker.event_store.head_position()
    [listed] = await pages(api_without_worker, "/api/events/jobs", "jobs", min_position=head)
    assert [job["job_id"] for job in listed] == [small, *reversed(ids)]
    for job in listed[1:]:
        assert (job["parameters"], job["omitted"], job["status"]) == ({}, ["parameters"], "pending")
    single = (await api_without_worker.get(f"/api/events/jobs/{small}")).json()["job"]
    assert listed[0] == single, "a small job is listed as it is"
    assert (
        len((await api_without_worker.get(f"/api/events/jobs/{ids[0]}")).json()["job"]["parameters"]["text"])
        == 3_000_000
    )
    asked_for = await pages(api_without_worker, "/api/events/jobs", "jobs", include="parameters", track="Main")
    assert [len(page) for page in asked_for] == [2, 1, 1, 1]
    assert [job["job_id"] for page in asked_for for job in page] == [small, *reversed(ids)]
    assert all(len(job["parameters"]["text"]) == 3_000_000 for page in asked_for for job in page if "text" in str(job))


async def test_every_field_that_can_be_large_is_left_out(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    await api_without_worker.get("/api/events/jobs", await api_without_worker.event_store.head_position())
    large = {
        "parameters": {"text": "x" * 20_000},
        "error": {"code": "X", "message": "m" * 20_000, "details": {}},
        "logs": [{"timestamp": "2026-01-01T00:00:00Z", "level": "info", "message": "m" * 20_000}],
        "steps": [{"step": "s" * 20_000}],
        "results": {
            "markdown_file": "/events/a.md",
            "markdown_url": "/api/events/files/a.md",
            "assets": [],
            "files": [],
            "metadata": {"processed_at": None, "duration": 1.5, "tokens_used": 3, "warnings": [], "text": "x" * 20_000},
        },
    }
    await api_without_worker.db.jobs.update_one({"_id": job_id}, {"$set": large})
    [[job]] = await pages(api_without_worker, "/api/events/jobs", "jobs")
    assert sorted(job["omitted"]) == sorted(OMITTABLE_FIELDS)
    assert job["results"]["markdown_url"] == "/api/events/files/a.md"
    assert job["results"]["metadata"] == {"processed_at": None, "duration": 1.5, "tokens_used": 3, "warnings": []}
    [[job]] = await pages(api_without_worker, "/api/events/jobs", "jobs", include=",".join(OMITTABLE_FIELDS))
    assert "omitted" not in job
    assert {name: job[name] for name in large} == large
    answer = await api_without_worker.get("/api/events/jobs?include=everything")
    assert (answer.status_code, "parameters, results" in answer.text) == (422, True)


async def test_lists_of_many_medium_items_end_by_bytes(api_without_worker: Api) -> None:
    given = {"text": "x" * 14_000}
    batch = await api_without_worker.submit_batch(*[given] * 400, parameters={"more": "y" * 100})
    large = await api_without_worker.submit_batch({}, {}, parameters={"text": "x" * 2_000_000})
    head = await api_without_worker.event_store.head_position()
    every = [job["job_id"] for job in (await api_without_worker.get("/api/events/jobs?limit=1", head)).json()["jobs"]]
    assert every
    path = f"/api/events/batches/{batch['batch_id']}/jobs"
    found = await pages(api_without_worker, path, "jobs", limit=1000)
    assert len(found) == 2
    assert len({job["job_id"] for page in found for job in page}) == 400
    [batches] = await pages(api_without_worker, "/api/events/batches", "batches")
    by_id = {it["batch_id"]: it for it in batches}
    assert by_id[large["batch_id"]]["omitted"] == ["parameters"]
    assert "omitted" not in by_id[batch["batch_id"]]
    single = (await api_without_worker.get(f"/api/events/batches/{large['batch_id']}")).json()["batch"]
    assert len(single["parameters"]["text"]) == 2_000_000


@pytest.mark.parametrize("path", ["/api/ledger/events", "history"])
async def test_pages_of_events_end_by_bytes(api_without_worker: Api, path: str) -> None:
    job_id = await api_without_worker.submit()
    for _ in range(5):
        answer = await api_without_worker.http.put(
            f"/api/events/jobs/{job_id}", json={"parameters": {"text": "x" * 3_000_000}}
        )
        assert answer.status_code == 200
    seen, after = 0, 0
    while seen < 6:
        if path == "history":
            answer = await api_without_worker.get(f"/api/events/jobs/{job_id}/history?after_version={after}")
            after = answer.json().get("next_after_version", after)
        else:
            answer = await api_without_worker.get(f"{path}?after={after}")
            after = answer.json()["last_position"]
        assert len(answer.content) < LARGEST_ANSWER
        assert answer.json()["events"]
        seen += len(answer.json()["events"])
    assert seen == 6


async def test_pages_of_the_dashboard_show_large_jobs(api_without_worker: Api) -> None:
    ids = [await api_without_worker.submit({"text": "x" * 3_000_000}, job_name="Large") for _ in range(3)]
    await api_without_worker.get("/api/events/jobs", await api_without_worker.event_store.head_position())
    pages_of = ("/monitoring/events/jobs", "/monitoring/events", f"/monitoring/events/jobs/{ids[0]}")
    for answer in await asyncio.gather(*(api_without_worker.get(path) for path in pages_of)):
        assert answer.status_code == 200
        assert "Large" in answer.text or "events" in str(answer.url)
        assert len(answer.content) < LARGEST_ANSWER
