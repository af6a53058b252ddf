"""What happened to one job or batch, and what its attempts had to say: all of it, page by page."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from jobledger.ledger.domain.commands import (
    AddLogEntries,
    ClaimJob,
    ExpireLease,
    FailAttempt,
    ReleaseJob,
    ReportProgress,
)
from jobledger.ledger.domain.events import EventMetadata, Failure, LogEntry
from jobledger.ledger.store.command_handler import Command, handle_command
from tests.api.conftest import Api

NOON = datetime(2026, 1, 5, 12, tzinfo=UTC)


async def do(api: Api, stream: str, *commands: Command) -> int:
    position = 0
    for command in commands:
        position = (
            (await handle_command(api.event_store, stream, command, meta=EventMetadata("test"))).events[-1].position
        )
    return position


def said(*messages: str, attempt: int = 1) -> AddLogEntries:
    lines = tuple(LogEntry(timestamp=NOON, level="info", message=message) for message in messages)
    return AddLogEntries("worker-1", attempt, lines)


async def pages(api: Api, path: str, name: str, limit: int) -> list[list[dict[str, Any]]]:
    """Return what is on each page, following `next_after_version`."""
    found: list[list[dict[str, Any]]] = []
    query: dict[str, int] | None = {"limit": limit}
    while query is not None:
        response = await api.http.get(path, params=query, headers=api.principal_headers)
        assert response.status_code == 200, response.text
        content = response.json()
        found.append(content[name])
        query = (
            {"limit": limit, "after_version": content["next_after_version"]}
            if "next_after_version" in content
            else None
        )
    return found


async def test_job_history_is_paged(api_without_worker: Api) -> None:
    job_id = await api_without_worker.submit()
    reports = (ReportProgress("worker-1", 1, "page", percent, "on it") for percent in range(7))
    await do(api_without_worker, job_id, ClaimJob("worker-1", NOON), *reports)
    path = f"/api/events/jobs/{job_id}/history"

    found = await pages(api_without_worker, path, "events", 4)
    assert [[event["version"] for event in page] for page in found] == [[1, 2, 3, 4], [5, 6, 7, 8], [9]]
    whole = (await api_without_worker.get(path)).json()
    assert "next_after_version" not in whole
    assert whole["events"] == [event for page in found for event in page]
    assert [len(page) for page in await pages(api_without_worker, path, "events", 3)] == [3, 3, 3]


async def test_history_page_of_large_events_ends_early(
    api_without_worker: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobledger.api.http.pagination.MAX_PAGE_BYTES", 3000)
    job_id = await api_without_worker.submit()
    await do(api_without_worker, job_id, ClaimJob("worker-1", NOON), *(said("x" * 2000) for _ in range(4)))
    found = await pages(api_without_worker, f"/api/events/jobs/{job_id}/history", "events", 100)
    assert [[event["version"] for event in page] for page in found] == [[1, 2, 3], [4, 5], [6]]


async def test_batch_history_contains_only_its_own_stream(api: Api) -> None:
    batch = await api.submit_batch({}, {})
    await api.wait_for_event(batch["batch_id"], "BatchFinished")
    path = f"/api/events/batches/{batch['batch_id']}/history"
    found = await pages(api, path, "events", 1)
    assert [[event["type"] for event in page] for page in found] == [["BatchSubmitted"], ["BatchFinished"]]


async def test_logs_contain_more_lines_than_the_job_document(
    api_without_worker: Api,
) -> None:
    job_id = await api_without_worker.submit()
    commands = [said(*(f"line {number}" for number in range(begin, begin + 7))) for begin in range(0, 210, 7)]
    position = await do(api_without_worker, job_id, ClaimJob("worker-1", NOON), *commands)
    job = (await api_without_worker.get(f"/api/events/jobs/{job_id}", position)).json()["job"]
    assert len(job["logs"]) == 100

    found = await pages(api_without_worker, f"/api/events/jobs/{job_id}/logs", "logs", 50)
    assert [len(page) for page in found] == [56, 56, 56, 42], "what was said in one event stays together"
    lines = [line for page in found for line in page]
    assert [line["message"] for line in lines] == [f"line {number}" for number in range(210)]
    assert lines[0] == {
        "timestamp": "2026-01-05T12:00:00Z",
        "level": "info",
        "message": "line 0",
        "attempt": 1,
        "version": 3,
    }


async def test_logs_contain_attempt_outcomes_like_the_job_document(
    api_without_worker: Api,
) -> None:
    job_id = await api_without_worker.submit(max_attempts=9)
    claim = ClaimJob("worker-1", NOON + timedelta(days=9999))
    broken = Failure(code="BROKEN", message="it broke")
    commands: list[Command] = [
        claim,
        said("a line that is too long for the job's document: " + "x" * 20_000),
        FailAttempt("worker-1", 1, broken, NOON),
        claim,
        ReleaseJob("worker-1", 2, "shutdown"),
        claim,
        ExpireLease("worker-1", 3),
        claim,
        FailAttempt("worker-1", 4, broken, None),
    ]
    position = await do(api_without_worker, job_id, *commands)
    job = (await api_without_worker.get(f"/api/events/jobs/{job_id}", position)).json()["job"]
    lines = (await api_without_worker.get(f"/api/events/jobs/{job_id}/logs")).json()["logs"]

    assert len(lines) == 5
    assert lines[0]["message"].startswith(job["logs"][0]["message"].removesuffix(" …"))
    assert len(lines[0]["message"]) > 20_000
    told = [{name: line[name] for name in ("timestamp", "level", "message")} for line in lines]
    assert told[1:] == job["logs"][1:]


@pytest.mark.parametrize("path", ["jobs/{}/history", "jobs/{}/logs", "batches/{}/history"])
@pytest.mark.usefixtures("header_auth")
async def test_history_and_logs_require_read_access(api_without_worker: Api, path: str) -> None:
    alice, bob = api_without_worker.as_user("alice"), api_without_worker.as_user("bob")
    batch = await alice.submit_batch({})
    there = batch["batch_id"] if path.startswith("batches") else batch["job_ids"][0]
    missing = there[:-4] + "0000"
    assert (await alice.get(f"/api/events/{path.format(there)}")).status_code == 200
    responses = [await bob.get(f"/api/events/{path.format(stream)}") for stream in (there, missing)]
    assert [response.status_code for response in responses] == [404, 404]
    assert responses[0].text.replace(there, "") == responses[1].text.replace(missing, "")


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "after_version=-1", "after_version=x", "skip=1"])
async def test_logs_with_invalid_query_are_rejected(api_without_worker: Api, query: str) -> None:
    response = await api_without_worker.get(f"/api/events/jobs/{await api_without_worker.submit()}/logs?{query}")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_content")
