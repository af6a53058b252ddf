"""Test history and logs of a job or batch: paging, completeness and access."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobledger.ledger.domain.commands import ClaimJob, ExpireLease, FailAttempt, ReleaseJob, ReportEvent
from jobledger.ledger.domain.events import ErrorInfo, LogEntry
from jobledger.ledger.store.command_handler import Command
from tests.api.conftest import Api
from tests.support.worker_reports import report_log, report_progress

NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)


def make_log_entries(*messages: str) -> ReportEvent:
    entries = tuple(LogEntry(timestamp=NOON, level="info", message=message) for message in messages)
    return report_log("worker-1", 1, entries)


async def load_pages(api: Api, path: str, name: str, limit: int) -> list[list[dict[str, Any]]]:
    """Return the items of each page, following `next_after_version`. `name` is the field with the items."""
    pages: list[list[dict[str, Any]]] = []
    query: dict[str, int] | None = {"limit": limit}
    while query is not None:
        response = await api.http.get(path, params=query, headers=api.principal_headers)
        assert response.status_code == 200, response.text
        content = response.json()
        pages.append(content[name])
        query = (
            {"limit": limit, "after_version": content["next_after_version"]}
            if "next_after_version" in content
            else None
        )
    return pages


async def test_job_history_is_paged(shared_api: Api) -> None:
    job_id = await shared_api.submit()
    reports = (report_progress("worker-1", 1, "page", percent, "working") for percent in range(7))
    await shared_api.handle_commands(job_id, ClaimJob("worker-1", NOON), *reports)
    path = f"/api/events/jobs/{job_id}/history"

    pages = await load_pages(shared_api, path, "events", 4)
    assert [[event["version"] for event in page] for page in pages] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    single_page = (await shared_api.get(path)).json()
    assert "next_after_version" not in single_page
    assert single_page["events"] == [event for page in pages for event in page]
    assert [len(page) for page in await load_pages(shared_api, path, "events", 3)] == [3, 3, 3]


async def test_history_page_of_large_events_ends_early(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.pagination.MAX_PAGE_BYTES", 3000)
    job_id = await api_without_worker.submit()
    commands = [make_log_entries("x" * 2000) for _ in range(4)]
    await api_without_worker.handle_commands(job_id, ClaimJob("worker-1", NOON), *commands)
    pages = await load_pages(api_without_worker, f"/api/events/jobs/{job_id}/history", "events", 100)
    assert [[event["version"] for event in page] for page in pages] == [[1, 2, 3], [4, 5], [6]]


async def test_batch_history_contains_only_its_own_stream(api: Api) -> None:
    batch = await api.submit_batch({}, {})
    await api.wait_for_event(batch["batch_id"], "BatchFinished")
    path = f"/api/events/batches/{batch['batch_id']}/history"
    pages = await load_pages(api, path, "events", 1)
    assert [[event["type"] for event in page] for page in pages] == [["BatchSubmitted"], ["BatchFinished"]]


async def test_logs_contain_more_lines_than_the_job_document(
    shared_api: Api,
) -> None:
    job_id = await shared_api.submit()
    commands = [
        make_log_entries(*(f"line {number}" for number in range(begin, begin + 7))) for begin in range(0, 210, 7)
    ]
    events = await shared_api.handle_commands(job_id, ClaimJob("worker-1", NOON), *commands)
    job = (await shared_api.get(f"/api/events/jobs/{job_id}", events[-1].position)).json()["job"]
    assert len(job["logs"]) == 100

    pages = await load_pages(shared_api, f"/api/events/jobs/{job_id}/logs", "logs", 50)
    assert [len(page) for page in pages] == [56, 56, 56, 42], "the lines of one event are on one page"
    lines = [line for page in pages for line in page]
    assert [line["message"] for line in lines] == [f"line {number}" for number in range(210)]
    assert lines[0] == {
        "timestamp": "2026-01-05T12:00:00Z",
        "level": "info",
        "message": "line 0",
        "attempt": 1,
        "version": 3,
    }


async def test_logs_contain_attempt_outcomes_like_the_job_document(
    shared_api: Api,
) -> None:
    job_id = await shared_api.submit(max_attempts=9)
    claim = ClaimJob("worker-1", NOON + timedelta(days=9999))
    failure = ErrorInfo(code="BROKEN", message="it broke")
    commands: list[Command] = [
        claim,
        make_log_entries("a line that is too long for the job's document: " + "x" * 20_000),
        FailAttempt("worker-1", 1, failure, NOON),
        claim,
        ReleaseJob("worker-1", 2, "shutdown"),
        claim,
        ExpireLease("worker-1", 3),
        claim,
        FailAttempt("worker-1", 4, failure, None),
    ]
    events = await shared_api.handle_commands(job_id, *commands)
    job = (await shared_api.get(f"/api/events/jobs/{job_id}", events[-1].position)).json()["job"]
    lines = (await shared_api.get(f"/api/events/jobs/{job_id}/logs")).json()["logs"]

    assert len(lines) == 5
    assert lines[0]["message"].startswith(job["logs"][0]["message"].removesuffix(" …"))
    assert len(lines[0]["message"]) > 20_000
    job_lines = [{name: line[name] for name in ("timestamp", "level", "message")} for line in lines]
    assert job_lines[1:] == job["logs"][1:]


@pytest.mark.parametrize("path", ["jobs/{}/history", "jobs/{}/logs", "batches/{}/history"])
@pytest.mark.usefixtures("header_auth")
async def test_history_and_logs_require_read_access(api_without_worker: Api, path: str) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    batch = await alice.submit_batch({})
    existing = batch["batch_id"] if path.startswith("batches") else batch["job_ids"][0]
    missing = existing[:-4] + "0000"
    assert (await alice.get(f"/api/events/{path.format(existing)}")).status_code == 200
    responses = [await bob.get(f"/api/events/{path.format(stream)}") for stream in (existing, missing)]
    assert [response.status_code for response in responses] == [404, 404]
    assert responses[0].text.replace(existing, "") == responses[1].text.replace(missing, "")


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "after_version=-1", "after_version=x", "skip=1"])
async def test_logs_with_invalid_query_are_rejected(shared_api: Api, query: str) -> None:
    response = await shared_api.get(f"/api/events/jobs/{await shared_api.submit()}/logs?{query}")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_content")
