"""A stream that cannot be projected does not stop the projection of the others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from bson.datetime_ms import DatetimeMS
from pymongo.errors import DuplicateKeyError
from structlog.testing import capture_logs

from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.commands import Archive, ClaimJob, UpdateJob
from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import EVENT_TYPES, EventMetadata, JobClaimed, RecordedEvent, Webhook
from jobledger.ledger.domain.limits import MAX_DOCUMENT_BYTES
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.command_handler import StreamState, load_stream_states
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.projections.engine import projector, rebuild
from jobledger.projections.views import job_list, jobs, projection_errors
from jobledger.projections.views.paging import PageRequest
from tests.projections.expected_views import load_views, make_empty_results
from tests.projections.rebuild_runner import compare_views, rebuild_views
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.support.soak_only import IS_SOAK_RUN
from tests.support.worker_reports import report_progress, report_results

MISSING = object()
ADMIN = Principal("admin", roles=frozenset({"admin"}))
StreamFactory = Callable[[RunningRoles], Awaitable[str]]
"""Writes a stream that is hard to project, and returns its job."""


async def damaged_event(roles: RunningRoles) -> str:
    """Replace the payload of an event, as an import or a disk error may do."""
    job_id = await roles.submit()
    await roles.claim(job_id)
    await roles.handle_commands(job_id, report_progress("worker-1", 1, "step", 1.0, "fine"))
    await roles.db.events.update_one({"stream": job_id, "version": 2}, {"$set": {"data": {"attempt": "x"}}})
    return job_id


async def damaged_submission(roles: RunningRoles) -> str:
    job_id = await roles.submit()
    await roles.db.events.update_one({"stream": job_id, "version": 1}, {"$set": {"data": {"parameters": 5}}})
    return job_id


async def fault_in_the_fold(roles: RunningRoles) -> str:
    return await roles.submit(job_name="FAULT IN THE FOLD")


async def number_without_a_form(roles: RunningRoles) -> str:
    return await roles.submit(job_name="A NUMBER THAT BSON CANNOT HOLD")


async def larger_than_a_document(roles: RunningRoles) -> str:
    return await roles.submit(job_name="LARGER THAN A DOCUMENT")


async def refused_by_the_server(roles: RunningRoles) -> str:
    return await roles.submit(job_name="REFUSED BY THE SERVER")


async def delivery_without_a_port(roles: RunningRoles) -> str:
    job_id = await roles.submit(webhook=Webhook(url="http://example.org:99999/hook"))
    await roles.claim(job_id)
    await roles.handle_commands(job_id, report_results("worker-1", 1, make_empty_results()))
    return job_id


DAMAGED_TIMES = [MISSING, "yesterday", 5, DatetimeMS(2**60), None]
DAMAGE: list[tuple[str, Any]] = [
    *(("time", value) for value in DAMAGED_TIMES),
    *((name, value) for name in ("data", "meta", "prev", "event_id") for value in (MISSING, 5, ["x"])),
    *(("type", value) for value in (MISSING, 5, ["x"], "JobSubmittee")),
    *(("schema", value) for value in (MISSING, "1", 0, 257, 1.5)),
    *(("hash", value) for value in (MISSING, 5, "text", b"short")),
    *(("version", value) for value in (MISSING, "text", 1000)),
    *(("stream", value) for value in (MISSING, 5)),
]
"""A field of the envelope, and its damaged value."""


async def damage_event(roles: RunningRoles, stream: str, version: int, name: str, value: Any) -> None:
    change = {"$unset": {name: ""}} if value is MISSING else {"$set": {name: value}}
    with suppress(DuplicateKeyError):  # two events of the same version lost their stream
        await roles.db.events.update_one({"stream": stream, "version": version}, change)


UNPROJECTABLE_STREAMS = [
    damaged_event,
    damaged_submission,
    fault_in_the_fold,
    number_without_a_form,
    larger_than_a_document,
    refused_by_the_server,
    delivery_without_a_port,
]
original_fold = jobs.fold


def fold_with_faults(job: Document | None, event: RecordedEvent) -> Document | None:
    """Fold an event as a program with faults: the name of the job selects the fault."""
    after = original_fold(job, event)
    match after and after["job_name"]:
        case "FAULT IN THE FOLD":
            raise ZeroDivisionError("a fault")
        case "A NUMBER THAT BSON CANNOT HOLD":
            return {**(after or {}), "priority": 2**70}
        case "LARGER THAN A DOCUMENT":
            return {**(after or {}), "progress": {"message": "x" * MAX_DOCUMENT_BYTES}}
        case "REFUSED BY THE SERVER":
            return {**(after or {}), "created_at": [1]}  # the server rejects a compound index on two arrays
        case _:
            return after


@pytest.fixture
def with_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as faults:
        faults.setattr(jobs, "fold", fold_with_faults)
        yield


@pytest.mark.usefixtures("with_faults")
@pytest.mark.parametrize("write_stream", UNPROJECTABLE_STREAMS)
async def test_unprojectable_stream_is_isolated_and_logged(
    connection: Connection, store: Path, write_stream: StreamFactory
) -> None:
    async with run_roles_in_process(connection, store) as roles:
        batch_id, healthy_jobs = await roles.submit_batch({}, {})
        job_id = await write_stream(roles)
        for healthy in healthy_jobs:
            await roles.claim(healthy)
            await roles.handle_commands(healthy, report_results("worker-1", 1, make_empty_results()))
        head = await roles.event_store.read_head_position()
    with capture_logs() as log_entries:
        async with run_roles_in_process(connection, store, projector=True) as roles:
            await roles.wait_for_event(EVENT_TYPES["BatchFinished"], batch_id)
            await roles.wait_for_views()
            assert (await roles.load_batch(batch_id))["completed_jobs"] == 2
            [failure] = await projection_errors.list_errors(roles.checkpoint.views)
            assert job_id in failure["key"]
            assert failure["position"] <= head
            assert failure["message"]
    isolated = [entry["document"] for entry in log_entries if entry["event"].startswith("stream isolated")]
    assert isolated == [failure["key"]]


@pytest.mark.usefixtures("with_faults")
async def test_isolated_documents_do_not_depend_on_the_chunk_size(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store) as roles:
        job_ids = [await write_stream(roles) for write_stream in UNPROJECTABLE_STREAMS]
        _, jobs_in_batch = await roles.submit_batch({}, {}, job_name="LARGER THAN A DOCUMENT")
        for job_id in [*job_ids, *jobs_in_batch]:
            for number in range(3):
                await append_claim(roles, job_id, attempt=number + 2)
    results = []
    for chunk_events in (1000, 3, 1) if IS_SOAK_RUN else (1000, 3):
        monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
        monkeypatch.setattr(rebuild, "CHUNK_EVENTS", chunk_events)
        async with run_roles_in_process(connection, store, projector=True) as roles:
            await rebuild_views(connection)
            await roles.wait_for_views()
            results.append(await load_views_and_problems(roles))
            assert await compare_views(connection) == []
    assert all(views == results[0] for views in results[1:])


async def append_claim(roles: RunningRoles, job_id: str, *, attempt: int) -> None:
    """Append an event to a stream whose state may be unreadable."""
    last = (await roles.event_store.read_stream(job_id))[-1]
    head = StreamHead(last.version, last.position, last.hash)
    event = JobClaimed(worker_id="worker-2", attempt=attempt)
    await roles.event_store.append(StreamAppend(job_id, head, [event], EventMetadata("test"), datetime.now(UTC)))


async def load_views_and_problems(roles: RunningRoles) -> Any:
    rows = sorted(await projection_errors.list_errors(roles.checkpoint.views), key=lambda row: str(row["_id"]))
    return [*(await load_views(roles.db, zeros=False)).items(), rows]


async def test_rebuild_by_a_fixed_program_repairs_isolated_documents(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        with monkeypatch.context() as faults:
            faults.setattr(jobs, "fold", fold_with_faults)
            faulty = await fault_in_the_fold(roles)
            large = await larger_than_a_document(roles)
            await roles.wait_for_views()
            assert (await roles.load_job(faulty))["status"] == (await roles.load_job(large))["status"] == "pending"
            assert (await roles.load_job(large))["truncated"] == ["progress"]
            await roles.handle_commands(large, ClaimJob("worker-1", datetime.now(UTC)))
            await roles.wait_for_views()
            assert (await roles.load_job(large))["status"] == "processing"
            assert await projection_errors.count(roles.checkpoint.views) == 2
        await rebuild_views(connection)
        await roles.wait_for_views()
        assert await projection_errors.count(roles.checkpoint.views) == 0
        for job_id in (faulty, large):
            assert projection_errors.ERROR_FIELD not in await roles.load_job(job_id)


async def test_isolated_document_that_becomes_valid_is_stored_complete(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as roles:
        with monkeypatch.context() as faults:
            faults.setattr(jobs, "fold", fold_with_faults)
            job_id = await roles.submit({"a": 1}, job_name="A NUMBER THAT BSON CANNOT HOLD")
            await roles.wait_for_views()
            assert (await roles.load_job(job_id))["parameters"] == {}
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.handle_commands(job_id, UpdateJob("user:a", priority=7))
        await roles.wait_for_views()
        job = await roles.load_job(job_id)
        assert (job["priority"], job["parameters"], projection_errors.ERROR_FIELD in job) == (7, {"a": 1}, False)
        assert await projection_errors.count(roles.checkpoint.views) == 0


async def test_rows_inserted_by_another_program_do_not_stop_the_projector(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        job_id = await roles.submit()
        await roles.db.queue.insert_one({"_id": job_id})
        await roles.db.jobs.insert_one({"_id": job_id})
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.wait_for_views()
        assert (await roles.load_job(job_id))["status"] == "pending"
        assert await projection_errors.count(roles.checkpoint.views) == 0


async def test_damaged_envelopes_do_not_stop_projector_and_workers(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage each field of a first and of a later event, of jobs, batches and deliveries."""
    complete = report_results("worker-1", 1, make_empty_results())
    async with run_roles_in_process(connection, store) as roles:
        pending_jobs = []
        for name, value in DAMAGE:
            batch_id, jobs_in_batch = await roles.submit_batch({}, {}, webhook=Webhook(url="http://example.org/hook"))
            for job_id in jobs_in_batch:
                await roles.handle_commands(job_id, ClaimJob("worker-1", datetime.now(UTC)), complete)
            pending = await roles.submit()
            await roles.handle_commands(pending, UpdateJob("user:a", priority=2))
            await damage_event(roles, pending, 2, name, value)
            await damage_event(roles, jobs_in_batch[0], 1, name, value)
            await damage_event(roles, jobs_in_batch[1], 3, name, value)
            await damage_event(roles, f"delivery-{jobs_in_batch[0]}-3", 1, name, value)
            await roles.handle_commands(batch_id, Archive("user:a"))
            await damage_event(roles, batch_id, 2, name, value)
            pending_jobs.append(pending)
        healthy = await roles.submit()
        loaded = await load_stream_states(roles.event_store, [*pending_jobs, healthy])
        assert isinstance(loaded[healthy], StreamState)
        assert all(isinstance(state, StreamState | UnreadableEvent) for state in loaded.values())
    results = []
    for chunk_events in (1000, 7):
        monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
        monkeypatch.setattr(rebuild, "CHUNK_EVENTS", chunk_events)
        async with run_roles_in_process(connection, store, projector=True) as roles:
            await roles.wait_for_views()
            assert (await roles.load_job(healthy))["status"] == "pending"
            await rebuild_views(connection)
            await roles.wait_for_views()
            results.append(await load_views_and_problems(roles))
            assert await compare_views(connection) == []
    assert results[0] == results[1]
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        await roles.wait_until_finished(healthy)
        assert roles.worker_task is not None
        assert not roles.worker_task.done()


async def test_damaged_progress_has_the_same_result_for_each_chunk_size(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Superseded progress is skipped and not decoded."""
    async with run_roles_in_process(connection, store) as roles:
        for damaged_versions in ([3], [4], [5], [3, 5], [4, 5], [3, 4, 5]):
            for name, value in (("data", {"attempt": "x"}), ("time", "now"), ("schema", 257), ("version", 1000)):
                job_id = await roles.submit()
                await roles.claim(job_id)
                for number in range(3):
                    await roles.handle_commands(job_id, report_progress("worker-1", 1, f"step {number}", 1.0, "fine"))
                for version in damaged_versions:
                    await damage_event(roles, job_id, version, name, value)
    results = []
    for chunk_events in (1000, 4, 1):
        monkeypatch.setattr(rebuild, "CHUNK_EVENTS", chunk_events)
        async with run_roles_in_process(connection, store, projector=True) as roles:
            await rebuild_views(connection)
            await roles.wait_for_views()
            results.append(await load_views_and_problems(roles))
            assert await projection_errors.count(roles.checkpoint.views) == 0
    assert results[0] == results[1] == results[2]


async def test_document_that_cannot_be_isolated_keeps_its_state(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(jobs, "apply_to_isolated", fail)
    async with run_roles_in_process(connection, store) as roles:
        job_id = await roles.submit({"a": 1})
        await roles.claim(job_id)
        await damage_event(roles, job_id, 2, "data", 5)
        healthy = await roles.submit()
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.wait_for_views()
        assert (await roles.load_job(healthy))["status"] == "pending"
        assert (await roles.load_job(job_id))["parameters"] == {"a": 1}
        assert [row["key"] for row in await projection_errors.list_errors(roles.checkpoint.views)] == [job_id]


async def test_date_out_of_range_in_a_payload_does_not_stop_the_projector(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        job_id, healthy = await roles.submit({"at": 1}), await roles.submit()
        await damage_event(roles, job_id, 1, "data.parameters.at", DatetimeMS(2**60))
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.wait_for_views()
    async with run_roles_in_process(connection, store) as roles:
        await roles.handle_commands(healthy, ClaimJob("worker-1", datetime.now(UTC)))
        await roles.handle_commands(job_id, ClaimJob("worker-1", datetime.now(UTC)))
    async with run_roles_in_process(connection, store, projector=True) as roles:  # loads both jobs from the view
        await roles.wait_for_views()
        query = job_list.JobFilter().build_query(ADMIN)
        page, _ = await job_list.find_page(roles.checkpoint.views, query, PageRequest(limit=10))
        assert [job["status"] for job in page] == ["processing", "processing"]
        assert await compare_views(connection) == []


async def test_damaged_events_in_the_change_stream_do_not_stop_processes(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as roles:
        for position, event_type in enumerate(
            [None, 5, "JobClaimed", "JobSubmitted", "JobCancelRequested", "BatchPaused"], 1
        ):
            await roles.db.events.insert_one({"_id": position, "version": position, "type": event_type, "data": {}})
        await roles.db.counters.update_one({"_id": "events"}, {"$set": {"next": 6}}, upsert=True)
        await roles.wait_until_finished(await roles.submit())
        assert roles.worker_task is not None
        assert not roles.worker_task.done()
