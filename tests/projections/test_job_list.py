"""Test the rows of the job list: how they follow their jobs, and jobs that change while a page is read."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from pymongo import DeleteOne

from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.commands import Archive, CancelJob, ChangeAccess, UpdateJob
from jobledger.ledger.domain.events import AccessControl, LogEntry, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.command_handler import Command
from jobledger.projections.engine.view_changes import ViewChanges
from jobledger.projections.views import job_list, jobs, list_index, paging
from jobledger.projections.views.job_list import JobFilter
from jobledger.projections.views.paging import PageRequest
from tests.projections.expected_views import make_results
from tests.projections.rebuild_runner import compare_views
from tests.support.role_runner import RunningRoles, make_echo_job
from tests.support.worker_reports import report_log, report_progress, report_results, report_step

ADMIN = Principal(None, roles=frozenset({"admin"}))
ALICE = Principal("alice")


async def list_job_ids(roles: RunningRoles, principal: Principal = ADMIN, **filters: Any) -> list[str]:
    query = JobFilter(**filters).build_query(principal)
    page, _ = await job_list.find_page(roles.checkpoint.views, query, PageRequest(limit=10))
    return [job["job_id"] for job in page]


async def load_row(roles: RunningRoles, job_id: str) -> Document:
    await roles.wait_for_views()
    row = await roles.checkpoint.views[job_list.NAME].find_one({"_id": job_id})
    assert row is not None
    return row


@pytest.mark.parametrize("readers", [0, 3, 100], ids=["owner", "few-readers", "many-readers"])
async def test_row_follows_each_change_of_its_job(roles: RunningRoles, connection: Connection, readers: int) -> None:
    access = AccessControl(read_access=[f"user-{number}" for number in range(readers)])
    job_id = await roles.submit({"track": "A"}, access_control=access)
    await roles.wait_for_views()
    changes: list[tuple[Command, dict[str, Any]]] = [
        (UpdateJob("user:a", {"track": "B"}), {"track": "B", "status": "pending"}),
        (ChangeAccess("user:a", AccessControl(read_access=["alice"])), {"status": "pending"}),
        (Archive("user:a"), {"archived": True}),
        (CancelJob("user:a"), {"status": "cancelled", "track": "B", "archived": True}),
    ]
    for command, filters in changes:
        await roles.handle_commands(job_id, command)
        row = await load_row(roles, job_id)
        assert row == job_list.build_row(await roles.load_job(job_id))
        assert await list_job_ids(roles, **filters) == [job_id], command
    assert await list_job_ids(roles, ALICE, status="cancelled") == [job_id]
    assert await list_job_ids(roles, track="A") == await list_job_ids(roles, status="pending") == []
    assert await compare_views(connection) == []


def test_status_is_not_charged_to_the_budget_of_list_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise, a scope could lose its keys by a change of the status, although the job is not flagged."""
    monkeypatch.setattr(list_index, "MAX_LIST_INDEX_BYTES", 10_000)
    scopes = [f"=user-{number}" for number in range(1000)]
    counts = {
        len(list_index.build_list_keys(scopes, [("status", status), list_index.NO_FACET]))
        for status in ("pending", "processing", "completed", "failed", "cancelled")
    }
    assert len(counts) == 1
    assert 0 < counts.pop() < 2000


# Jobs that change while a page is read ------------------------------------------------------------------------------


def handle_after_rows_are_read(
    monkeypatch: pytest.MonkeyPatch, roles: RunningRoles, commands: dict[str, Command]
) -> None:
    """Change jobs, once, after the rows of the next page were read and before their documents are."""
    find_page: Callable[..., Awaitable[Any]] = paging.find_page

    async def find_rows_and_change(*args: Any, **options: Any) -> Any:
        page = await find_page(*args, **options)
        while commands:
            await roles.handle_commands(*commands.popitem())
        await roles.wait_for_views()
        return page

    monkeypatch.setattr(paging, "find_page", find_rows_and_change)


async def test_job_whose_status_changes_meanwhile_is_left_out(
    roles: RunningRoles, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_ids = [await roles.submit() for _ in range(3)]
    await roles.wait_for_views()
    handle_after_rows_are_read(monkeypatch, roles, {job_ids[1]: CancelJob("user:a")})
    assert await list_job_ids(roles, status="pending") == [job_ids[2], job_ids[0]]


async def test_page_whose_jobs_all_change_meanwhile_is_followed_by_the_next(
    roles: RunningRoles, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_ids = [await roles.submit() for _ in range(5)]
    await roles.wait_for_views()
    handle_after_rows_are_read(monkeypatch, roles, {job_id: CancelJob("user:a") for job_id in job_ids[3:]})
    query = JobFilter(status="pending").build_query(ADMIN)
    page, cursor = await job_list.find_page(roles.checkpoint.views, query, PageRequest(limit=2))
    assert [job["job_id"] for job in page] == [job_ids[2], job_ids[1]]
    assert cursor is not None
    page, cursor = await job_list.find_page(roles.checkpoint.views, query, PageRequest(limit=2, after=cursor))
    assert ([job["job_id"] for job in page], cursor) == ([job_ids[0]], None)


async def test_job_that_becomes_private_meanwhile_is_left_out(
    roles: RunningRoles, monkeypatch: pytest.MonkeyPatch
) -> None:
    job_id = await roles.submit(access_control=AccessControl(read_access=["alice"]))
    await roles.wait_for_views()
    assert await list_job_ids(roles, ALICE) == [job_id]
    handle_after_rows_are_read(monkeypatch, roles, {job_id: ChangeAccess("user:a", AccessControl())})
    assert await list_job_ids(roles, ALICE) == []


async def test_many_large_jobs_are_read_a_few_at_a_time(roles: RunningRoles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job_list, "_JOBS_PER_QUERY", 7)
    monkeypatch.setattr(job_list, "_LARGE_JOBS_PER_QUERY", 2)
    job_ids = [await roles.submit({"text": "x"}) for _ in range(15)]
    await roles.wait_for_views()
    query, request = JobFilter().build_query(ADMIN), PageRequest(limit=20)
    for include in ([], ["parameters"]):
        page, cursor = await job_list.find_page(roles.checkpoint.views, query, request, include=include)
        assert ([job["job_id"] for job in page], cursor) == (job_ids[::-1], None)


async def test_page_ends_before_the_job_that_exceeds_its_bytes(roles: RunningRoles) -> None:
    job_ids = [await roles.submit({"text": "x" * 10_000}) for _ in range(3)]
    await roles.wait_for_views()
    query, cursor = JobFilter().build_query(ADMIN), None
    for number in range(3):
        request = PageRequest(limit=10, max_bytes=15_000, after=cursor)
        page, cursor = await job_list.find_page(roles.checkpoint.views, query, request, include=["parameters"])
        assert [job["job_id"] for job in page] == [job_ids[2 - number]]
    assert cursor is None


async def test_jobs_have_no_index_of_a_field_that_changes_while_they_run(roles: RunningRoles) -> None:
    job_id = await roles.submit()
    await roles.wait_for_views()
    before = await roles.load_job(job_id)
    await roles.claim(job_id)
    await roles.handle_commands(
        job_id,
        report_progress("worker-1", 1, "download", 50.0, "half"),
        report_log("worker-1", 1, [LogEntry(timestamp=datetime.now(UTC), level="info", message="started")]),
        report_step("worker-1", 1, "download", "key", None, 1.0),
        report_results("worker-1", 1, make_results(job_id)),
    )
    await roles.wait_for_views()
    after = await roles.load_job(job_id)
    changed = {name for name in after if after[name] != before.get(name)}
    assert {"status", "progress", "logs", "steps", "results", "worker_id"} <= changed
    indexes = await roles.checkpoint.views[jobs.NAME].index_information()
    assert not changed & {field.partition(".")[0] for index in indexes.values() for field, _ in index["key"]}


# Unstorable jobs ----------------------------------------------------------------------------------------------------


def test_job_that_is_not_stored_at_all_has_no_row() -> None:
    """The server may reject a job's document and then its reduced form, too."""
    changes = ViewChanges()
    document = {"_id": 1, "stream": "job-1", "version": 1, "type": "JobSubmitted", "time": datetime.now(UTC)}
    changes.apply(RecordedEvent(document, make_echo_job()))
    for _ in range(2):
        changes.mark_unstorable(jobs.NAME, "job-1", "rejected")
    writes = changes.build_writes(upserts=True)
    assert [type(write) for view in (jobs.NAME, job_list.NAME) for _, write in writes[view]] == [DeleteOne, DeleteOne]
