"""A stream larger than a document, or a chunk larger than a transaction, does not stop the projection."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson
import pytest
from pymongo.errors import OperationFailure

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.commands import ChangeAccess, FailAttempt, UpdateJob
from jobledger.ledger.domain.events import AccessControl, ErrorInfo, ResultFile
from jobledger.ledger.domain.limits import MAX_DOCUMENT_BYTES
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.mongo.transactions import run_transaction
from jobledger.ledger.store import envelope
from jobledger.projections.engine import writer
from jobledger.projections.engine.view_changes import ChunkTooLarge, ViewChanges
from jobledger.projections.views import projection_errors
from tests.projections.expected_views import make_empty_results
from tests.projections.rebuild_runner import rebuild_views
from tests.support.role_runner import RunningRoles, run_roles_in_process
from tests.support.worker_reports import report_progress, report_results, report_step

DOCUMENT_BUDGET_BYTES = MAX_DOCUMENT_BYTES - 1024 * 1024


@pytest.fixture
def without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Append events as older versions or other programs have appended them."""
    monkeypatch.setattr(limits, "check_event", lambda event, text_bytes: None)
    monkeypatch.setattr(limits, "check_steps", lambda count, output_bytes: None)


LONG_NAME = " ".join(f"word{number}" for number in range(40))


async def many_readers_at_submission(roles: RunningRoles) -> str:
    names = [f"reader-{number}" for number in range(8000)]
    return await roles.submit(job_name=LONG_NAME, access_control=AccessControl(read_access=names))


async def many_readers_added_later(roles: RunningRoles) -> str:
    job_id = await roles.submit(job_name=LONG_NAME)
    names = [f"reader-{number}@{'x' * 150}" for number in range(8000)]
    await roles.handle_commands(job_id, ChangeAccess("user:a", AccessControl(read_access=names)))
    return job_id


async def many_teams(roles: RunningRoles) -> str:
    teams = [f"team-{number}" for number in range(8000)]
    return await roles.submit(job_name=LONG_NAME, teams=teams, access_control=AccessControl(visibility="team"))


async def large_parameters_and_results(roles: RunningRoles) -> str:
    job_id = await roles.submit({"text": "x" * 7_500_000})
    await roles.claim(job_id)
    await roles.handle_commands(job_id, report_results("worker-1", 1, make_empty_results(text="x" * 8_000_000)))
    return job_id


async def numbers_that_grow_in_bson(roles: RunningRoles) -> str:
    job_id = await roles.submit({"numbers": [0] * 450_000})
    await roles.handle_commands(
        job_id, UpdateJob("user:a", {"numbers": [0] * 450_000, "speakers": ["a b c"] * 100_000})
    )
    return job_id


async def many_steps(roles: RunningRoles) -> str:
    job_id = await roles.submit()
    await roles.claim(job_id)
    for number in range(40):
        await roles.handle_commands(
            job_id, report_step("worker-1", 1, "s", f"k{number}", None, 0.1, warnings=["w" * 500_000])
        )
    return job_id


async def large_error_and_progress(roles: RunningRoles) -> str:
    job_id = await roles.submit({"text": "x" * 7_000_000})
    await roles.claim(job_id)
    failure = ErrorInfo(code="X" * 500_000, message="m" * 3_000_000, details={"text": "d" * 3_000_000})
    await roles.handle_commands(job_id, report_progress("worker-1", 1, "p" * 3_000_000, 1.0, "m" * 3_000_000))
    await roles.handle_commands(job_id, FailAttempt("worker-1", 1, failure, datetime.now(UTC)))
    return job_id


async def long_track(roles: RunningRoles) -> str:
    return await roles.submit({"track": "t" * 7_000_000, "session": "s " * 100_000, "event": "e" * 500_000})


LARGE_STREAMS = [
    many_readers_at_submission,
    many_readers_added_later,
    many_teams,
    large_parameters_and_results,
    numbers_that_grow_in_bson,
    many_steps,
    large_error_and_progress,
    long_track,
]


@pytest.mark.usefixtures("without_limits")
async def test_documents_of_large_streams_fit_into_their_budget(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        large_jobs = {write_stream.__name__: await write_stream(roles) for write_stream in LARGE_STREAMS}
        healthy = await roles.submit({"track": "Main"})
        await roles.wait_for_views()
        assert (await roles.load_job(healthy))["status"] == "pending"
        for name, job_id in large_jobs.items():
            job = await roles.load_job(job_id)
            assert len(bson.encode(job)) < DOCUMENT_BUDGET_BYTES, name
            assert projection_errors.ERROR_FIELD not in job, name
        job_with_readers = await roles.load_job(large_jobs["many_readers_at_submission"])
        assert job_with_readers["truncated"] == ["list_keys"]
        row = await roles.db.job_list.find_one({"_id": job_with_readers["job_id"]})
        assert row is not None
        assert len(row["list_keys"]) <= limits.MAX_LIST_INDEX_ROWS
        assert len(job_with_readers["search_keys"]) <= limits.MAX_LIST_INDEX_ROWS
        completed_job = await roles.load_job(large_jobs["large_parameters_and_results"])
        assert (completed_job["status"], completed_job["truncated"]) == ("completed", ["results"])
        assert completed_job["results"]["metadata"]["duration"] == 1.0
        assert (await roles.load_job(large_jobs["many_steps"]))["truncated"] == ["steps"]
        assert await projection_errors.count(roles.checkpoint.views) == 0


async def test_chunk_of_a_long_transaction_is_written_in_parts(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends long transactions, so the writer must not retry the same chunk forever."""
    written: list[int] = []
    write = writer.ProjectionWriter._write

    async def write_small_chunk(self: writer.ProjectionWriter, changes: ViewChanges, first: Any, writes: Any) -> None:
        if len(changes.current["jobs"]) > 3:
            raise ChunkTooLarge("simulated")
        written.append(len(changes.current["jobs"]))
        await write(self, changes, first, writes)

    monkeypatch.setattr(writer.ProjectionWriter, "_write", write_small_chunk)
    async with run_roles_in_process(connection, store) as roles:
        job_ids = [await roles.submit() for _ in range(20)]
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.wait_for_views()
        assert [(await roles.load_job(job_id))["status"] for job_id in job_ids] == ["pending"] * 20
        assert sum(written) == 20
        await rebuild_views(connection)


def test_limits_of_all_fields_together_fit_into_a_document() -> None:
    parts = [
        limits.MAX_PARAMETERS_BYTES,
        limits.MAX_RESULTS_BYTES,
        limits.MAX_VIEW_STEPS_BYTES,
        limits.MAX_VIEW_LOGS_BYTES,
        2 * limits.MAX_LIST_INDEX_BYTES,
        limits.MAX_ERROR_DETAILS_BYTES,
        4 * limits.MAX_ERROR_MESSAGE_CHARACTERS,
        4 * (limits.MAX_PROGRESS_STEP_CHARACTERS + limits.MAX_PROGRESS_MESSAGE_CHARACTERS),
        4 * limits.MAX_NAME_CHARACTERS * (limits.MAX_ACCESS_NAMES + limits.MAX_TEAMS + 3),
        4 * (limits.MAX_URL_CHARACTERS + limits.MAX_TITLE_CHARACTERS) + 100 * limits.MAX_WEBHOOK_HEADERS,
    ]
    assert sum(parts) < DOCUMENT_BUDGET_BYTES
    assert envelope.MAX_EVENT_BYTES > limits.MAX_PARAMETERS_BYTES


async def test_file_rows_of_one_event_are_bounded_in_bytes(connection: Connection, store: Path) -> None:
    """The rows of the files do not contain copies of the access list."""
    files = [
        ResultFile(path=f"{number:0190}.md", sha256="0" * 64, size=1, media_type="text/markdown")
        for number in range(limits.MAX_RESULT_FILES)
    ]
    names = [f"{number:03}" + "\U0001f600" * 197 for number in range(limits.MAX_ACCESS_NAMES)]
    async with run_roles_in_process(connection, store) as roles:
        job_id = await roles.submit(access_control=AccessControl(read_access=names))
        await roles.claim(job_id)
        results = make_empty_results().model_copy(update={"files": files})
        await roles.handle_commands(job_id, report_results("worker-1", 1, results))
        events = await roles.event_store.read_stream(job_id)
    changes = ViewChanges()
    for event in events:
        changes.apply(event)
    rows = changes.build_changed_rows()["files"].values()
    assert len(rows) == limits.MAX_RESULT_FILES
    assert sum(len(bson.encode(row)) for row in rows if row) < 2 * limits.MAX_RESULTS_BYTES


async def test_transaction_too_large_for_the_server_is_written_in_parts(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejected: list[Any] = []

    async def reject_first_transaction(db: Any, write: Any) -> Any:
        if not rejected:
            rejected.append(write)
            raise OperationFailure("TransactionTooLargeForCache", 388)
        return await run_transaction(db, write)

    monkeypatch.setattr(writer, "run_transaction", reject_first_transaction)
    async with run_roles_in_process(connection, store) as roles:
        job_ids = [await roles.submit() for _ in range(4)]
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.wait_for_views()
        assert [(await roles.load_job(job_id))["status"] for job_id in job_ids] == ["pending"] * 4
    assert rejected
