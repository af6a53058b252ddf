"""Lists and pages are limited by bytes. Lists omit large fields unless the client includes them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from jobledger.projections.views.job_list import OMITTABLE_FIELDS
from jobledger.projections.views.paging import MAX_PAGE_BYTES
from tests.api.conftest import Api

MAX_RESPONSE_BYTES = 3 * MAX_PAGE_BYTES
"""A page ends before the item that exceeds its limit. A single item may be larger than a page."""


async def load_pages(api: Api, path: str, name: str, **query: Any) -> list[list[dict[str, Any]]]:
    """Return all pages of a list. Check the size of each response."""
    pages: list[list[dict[str, Any]]] = []
    cursor: dict[str, Any] = {}
    while True:
        response = await api.http.get(path, params={**query, **cursor}, headers=api.principal_headers)
        assert response.status_code == 200, response.text[:300]
        assert len(response.content) < MAX_RESPONSE_BYTES
        content = response.json()
        pages.append(content[name])
        if "next_cursor" not in content:
            return pages
        assert content[name], "a page with a next page is not empty"
        cursor = {"cursor": content["next_cursor"]}


async def test_lists_omit_large_fields_unless_included(api_without_worker: Api) -> None:
    ids = [await api_without_worker.submit({"text": "x" * 3_000_000, "track": "Main"}) for _ in range(4)]
    small = await api_without_worker.submit({"track": "Main"})
    head = await api_without_worker.event_store.read_head_position()
    [listed] = await load_pages(api_without_worker, "/api/events/jobs", "jobs", min_position=head)
    assert [job["job_id"] for job in listed] == [small, *reversed(ids)]
    for job in listed[1:]:
        assert (job["parameters"], job["omitted"], job["status"]) == ({}, ["parameters"], "pending")
    single = (await api_without_worker.get(f"/api/events/jobs/{small}")).json()["job"]
    assert listed[0] == single, "a small job is listed in full"
    assert (
        len((await api_without_worker.get(f"/api/events/jobs/{ids[0]}")).json()["job"]["parameters"]["text"])
        == 3_000_000
    )
    included = await load_pages(api_without_worker, "/api/events/jobs", "jobs", include="parameters", track="Main")
    assert [len(page) for page in included] == [2, 1, 1, 1]
    assert [job["job_id"] for page in included for job in page] == [small, *reversed(ids)]
    assert all(len(job["parameters"]["text"]) == 3_000_000 for page in included for job in page if "text" in str(job))


async def test_lists_omit_every_field_that_can_be_large(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    await api_without_worker.get("/api/events/jobs", await api_without_worker.event_store.read_head_position())
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
    [[job]] = await load_pages(api_without_worker, "/api/events/jobs", "jobs")
    assert sorted(job["omitted"]) == sorted(OMITTABLE_FIELDS)
    assert job["results"]["markdown_url"] == "/api/events/files/a.md"
    assert job["results"]["metadata"] == {"processed_at": None, "duration": 1.5, "tokens_used": 3, "warnings": []}
    [[job]] = await load_pages(api_without_worker, "/api/events/jobs", "jobs", include=",".join(OMITTABLE_FIELDS))
    assert "omitted" not in job
    assert {name: job[name] for name in large} == large
    response = await api_without_worker.get("/api/events/jobs?include=everything")
    assert (response.status_code, "parameters, results" in response.text) == (422, True)


async def test_list_pages_of_medium_items_are_limited_by_bytes(api_without_worker: Api) -> None:
    parameters = {"text": "x" * 14_000}
    batch = await api_without_worker.submit_batch(*[parameters] * 400, parameters={"more": "y" * 100})
    large = await api_without_worker.submit_batch({}, {}, parameters={"text": "x" * 2_000_000})
    head = await api_without_worker.event_store.read_head_position()
    job_ids = [job["job_id"] for job in (await api_without_worker.get("/api/events/jobs?limit=1", head)).json()["jobs"]]
    assert job_ids
    path = f"/api/events/batches/{batch['batch_id']}/jobs"
    pages = await load_pages(api_without_worker, path, "jobs", limit=1000)
    assert len(pages) == 2
    assert len({job["job_id"] for page in pages for job in page}) == 400
    [batches] = await load_pages(api_without_worker, "/api/events/batches", "batches")
    by_id = {batch["batch_id"]: batch for batch in batches}
    assert by_id[large["batch_id"]]["omitted"] == ["parameters"]
    assert "omitted" not in by_id[batch["batch_id"]]
    single = (await api_without_worker.get(f"/api/events/batches/{large['batch_id']}")).json()["batch"]
    assert len(single["parameters"]["text"]) == 2_000_000


@pytest.mark.parametrize("path", ["/api/ledger/events", "history"])
async def test_event_pages_are_limited_by_bytes(api_without_worker: Api, path: str) -> None:
    job_id = await api_without_worker.submit()
    for _ in range(5):
        response = await api_without_worker.http.put(
            f"/api/events/jobs/{job_id}", json={"parameters": {"text": "x" * 3_000_000}}
        )
        assert response.status_code == 200
    event_count, after = 0, 0
    while event_count < 6:
        if path == "history":
            response = await api_without_worker.get(f"/api/events/jobs/{job_id}/history?after_version={after}")
            after = response.json().get("next_after_version", after)
        else:
            response = await api_without_worker.get(f"{path}?after={after}")
            after = response.json()["last_position"]
        assert len(response.content) < MAX_RESPONSE_BYTES
        assert response.json()["events"]
        event_count += len(response.json()["events"])
    assert event_count == 6


async def test_dashboard_pages_with_large_jobs_stay_small(api_without_worker: Api) -> None:
    ids = [await api_without_worker.submit({"text": "x" * 3_000_000}, job_name="Large") for _ in range(3)]
    await api_without_worker.get("/api/events/jobs", await api_without_worker.event_store.read_head_position())
    paths = ("/monitoring/events/jobs", "/monitoring/events", f"/monitoring/events/jobs/{ids[0]}")
    for response in await asyncio.gather(*(api_without_worker.get(path) for path in paths)):
        assert response.status_code == 200
        assert "Large" in response.text or "events" in str(response.url)
        assert len(response.content) < MAX_RESPONSE_BYTES
