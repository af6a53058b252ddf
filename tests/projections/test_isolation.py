"""One stream that cannot be projected, or is larger than a document, must not keep the others from being projected."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import bson
import pytest
from bson.datetime_ms import DatetimeMS
from pymongo.errors import DuplicateKeyError, OperationFailure
from structlog.testing import capture_logs

from jobledger.ledger.domain import limits
from jobledger.ledger.domain.access import Principal
from jobledger.ledger.domain.commands import (
    Archive,
    ChangeAccess,
    ClaimJob,
    CompleteJob,
    CompleteStep,
    FailAttempt,
    ReportProgress,
    UpdateJob,
)
from jobledger.ledger.domain.errors import UnreadableEvent
from jobledger.ledger.domain.events import (
    EVENT_TYPES,
    AccessControl,
    EventMetadata,
    Failure,
    JobClaimed,
    JobResults,
    RecordedEvent,
    ResultFile,
    ResultMetadata,
    Webhook,
)
from jobledger.ledger.domain.limits import MAX_DOCUMENT_BYTES
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.mongo.transactions import run_transaction
from jobledger.ledger.store import envelope
from jobledger.ledger.store.command_handler import StreamState, load_stream_states
from jobledger.ledger.store.envelope import StreamAppend, StreamHead
from jobledger.projections.engine import projector, rebuild, writer
from jobledger.projections.engine.chunk import Chunk, ChunkTooLarge
from jobledger.projections.engine.registry import FOLDED_VIEWS
from jobledger.projections.views import job_list, jobs, projection_errors
from tests.projections.expected_views import load_views
from tests.projections.test_rebuild import compared, rebuilding
from tests.support.role_runner import RunningRoles, WorkerOptions, run_roles_in_process
from tests.support.soak_only import IS_SOAK_RUN

MISSING = object()
ADMIN = Principal("admin", roles=frozenset({"admin"}))
Spoil = Callable[[RunningRoles], Awaitable[str]]
"""Makes a stream that is hard to project, and returns its job."""
HARMLESS_BYTES = MAX_DOCUMENT_BYTES - 1024 * 1024


@pytest.fixture
def without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Append what older versions, or other programs, have appended."""
    monkeypatch.setattr(limits, "check_event", lambda event, text_bytes: None)
    monkeypatch.setattr(limits, "check_steps", lambda found: None)


# Streams that are large -----------------------------------------------------------------------------------------------

LONG_NAME = " ".join(f"word{number}" for number in range(40))


async def many_readers(here: RunningRoles) -> str:
    names = [f"reader-{number}" for number in range(8000)]
    return await here.submit(job_name=LONG_NAME, access_control=AccessControl(read_access=names))


async def many_readers_later(here: RunningRoles) -> str:
    job_id = await here.submit(job_name=LONG_NAME)
    names = [f"reader-{number}@{'x' * 150}" for number in range(8000)]
    await here.handle_commands(job_id, ChangeAccess("user:a", AccessControl(read_access=names)))
    return job_id


async def many_teams(here: RunningRoles) -> str:
    teams = [f"team-{number}" for number in range(8000)]
    return await here.submit(job_name=LONG_NAME, teams=teams, access_control=AccessControl(visibility="team"))


async def large_parameters_and_results(here: RunningRoles) -> str:
    job_id = await here.submit({"text": "x" * 7_500_000})
    await here.claim(job_id)
    metadata = ResultMetadata(processed_at=datetime.now(UTC), duration=1.0, text="x" * 8_000_000)
    await here.handle_commands(job_id, CompleteJob("worker-1", 1, JobResults(metadata=metadata)))
    return job_id


async def numbers_that_grow_in_bson(here: RunningRoles) -> str:
    job_id = await here.submit({"numbers": [0] * 450_000})
    await here.handle_commands(job_id, UpdateJob("user:a", {"numbers": [0] * 450_000, "speakers": ["a b c"] * 100_000}))
    return job_id


async def many_steps(here: RunningRoles) -> str:
    job_id = await here.submit()
    await here.claim(job_id)
    for number in range(40):
        await here.handle_commands(
            job_id, CompleteStep("worker-1", 1, "s", f"k{number}", None, 0.1, 0, ("w" * 500_000,))
        )
    return job_id


async def large_error_and_progress(here: RunningRoles) -> str:
    job_id = await here.submit({"text": "x" * 7_000_000})
    await here.claim(job_id)
    huge = Failure(code="X" * 500_000, message="m" * 3_000_000, details={"text": "d" * 3_000_000})
    await here.handle_commands(job_id, ReportProgress("worker-1", 1, "p" * 3_000_000, 1.0, "m" * 3_000_000))
    await here.handle_commands(job_id, FailAttempt("worker-1", 1, huge, datetime.now(UTC)))
    return job_id


async def an_endless_track(here: RunningRoles) -> str:
    return await here.submit({"track": "t" * 7_000_000, "session": "s " * 100_000, "event": "e" * 500_000})


LARGE = [
    many_readers,
    many_readers_later,
    many_teams,
    large_parameters_and_results,
    numbers_that_grow_in_bson,
    many_steps,
    large_error_and_progress,
    an_endless_track,
]


@pytest.mark.usefixtures("without_limits")
async def test_every_document_fits_whatever_the_log_holds(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        spoiled = {spoil.__name__: await spoil(here) for spoil in LARGE}
        healthy = await here.submit({"track": "Main"})
        await here.wait_for_views(seconds=60)
        assert (await here.load_job(healthy))["status"] == "pending"
        for name, job_id in spoiled.items():
            job = await here.load_job(job_id)
            assert len(bson.encode(job)) < HARMLESS_BYTES, name
            assert projection_errors.ERROR_FIELD not in job, name
        readers = await here.load_job(spoiled["many_readers"])
        assert readers["truncated"] == ["list_keys"]
        assert len(readers["list_keys"]) + len(readers["search_keys"]) <= 2 * limits.MAX_LIST_INDEX_ROWS
        full = await here.load_job(spoiled["large_parameters_and_results"])
        assert (full["status"], full["truncated"]) == ("completed", ["results"])
        assert full["results"]["metadata"]["duration"] == 1.0
        assert (await here.load_job(spoiled["many_steps"]))["truncated"] == ["steps"]
        assert await projection_errors.count(here.checkpoint.views) == 0


# Streams that cannot be projected -------------------------------------------------------------------------------------


async def damaged_event(here: RunningRoles) -> str:
    """A known event with another payload, as an import or a disk may make it."""
    job_id = await here.submit()
    await here.claim(job_id)
    await here.handle_commands(job_id, ReportProgress("worker-1", 1, "step", 1.0, "fine"))
    await here.db.events.update_one({"stream": job_id, "version": 2}, {"$set": {"data": {"attempt": "x"}}})
    return job_id


async def damaged_submission(here: RunningRoles) -> str:
    job_id = await here.submit()
    await here.db.events.update_one({"stream": job_id, "version": 1}, {"$set": {"data": {"parameters": 5}}})
    return job_id


async def fault_in_the_fold(here: RunningRoles) -> str:
    return await here.submit(job_name="FAULT IN THE FOLD")


async def number_without_a_form(here: RunningRoles) -> str:
    return await here.submit(job_name="A NUMBER THAT BSON CANNOT HOLD")


async def larger_than_a_document(here: RunningRoles) -> str:
    return await here.submit(job_name="LARGER THAN A DOCUMENT")


async def refused_by_the_server(here: RunningRoles) -> str:
    return await here.submit(job_name="REFUSED BY THE SERVER")


async def delivery_without_a_port(here: RunningRoles) -> str:
    job_id = await here.submit(webhook=Webhook(url="http://example.org:99999/hook"))
    await here.claim(job_id)
    done = JobResults(metadata=ResultMetadata(processed_at=datetime.now(UTC), duration=1.0))
    await here.handle_commands(job_id, CompleteJob("worker-1", 1, done))
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
"""A field of the envelope, and what stands there instead."""


async def damage(here: RunningRoles, stream: str, version: int, name: str, value: Any) -> None:
    change = {"$unset": {name: ""}} if value is MISSING else {"$set": {name: value}}
    with suppress(DuplicateKeyError):  # two events of the same version have lost their streams
        await here.db.events.update_one({"stream": stream, "version": version}, change)


UNPROJECTABLE = [
    damaged_event,
    damaged_submission,
    fault_in_the_fold,
    number_without_a_form,
    larger_than_a_document,
    refused_by_the_server,
    delivery_without_a_port,
]
_fold = jobs.fold


def faulty(job: Document | None, event: RecordedEvent) -> Document | None:
    """The fold of a program with faults, one for each of some jobs."""
    after = _fold(job, event)
    match after and after["job_name"]:
        case "FAULT IN THE FOLD":
            raise ZeroDivisionError("a fault")
        case "A NUMBER THAT BSON CANNOT HOLD":
            return {**(after or {}), "priority": 2**70}
        case "LARGER THAN A DOCUMENT":
            return {**(after or {}), "progress": {"message": "x" * MAX_DOCUMENT_BYTES}}
        case "REFUSED BY THE SERVER":
            return {**(after or {}), "created_at": [1]}  # the server indexes no two lists together
        case _:
            return after


@pytest.fixture
def with_faults(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as faults:
        faults.setattr(jobs, "fold", faulty)
        yield


@pytest.mark.usefixtures("with_faults")
@pytest.mark.parametrize("spoil", UNPROJECTABLE)
async def test_a_stream_that_cannot_be_projected_is_isolated_and_said(
    connection: Connection, store: Path, spoil: Spoil
) -> None:
    async with run_roles_in_process(connection, store) as here:
        batch_id, [one, other] = await here.submit_batch({}, {})
        job_id = await spoil(here)
        for healthy in (one, other):
            await here.claim(healthy)
            done = JobResults(metadata=ResultMetadata(processed_at=datetime.now(UTC), duration=1.0))
            await here.handle_commands(healthy, CompleteJob("worker-1", 1, done))
        head = await here.event_store.head_position()
    with capture_logs() as said:
        async with run_roles_in_process(connection, store, projector=True) as here:
            await here.wait_for_event(EVENT_TYPES["BatchFinished"], batch_id)
            await here.wait_for_views()
            assert (await here.load_batch(batch_id))["completed_jobs"] == 2
            [failure] = await projection_errors.list_problems(here.checkpoint.views)
            assert job_id in failure["key"]
            assert failure["position"] <= head
            assert failure["message"]
    assert [it["document"] for it in said if it["event"].startswith("document isolated")] == [failure["key"]]


@pytest.mark.usefixtures("with_faults")
async def test_stubs_are_the_same_wherever_chunks_end_and_rebuild_agrees(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store) as here:
        ids = [await spoil(here) for spoil in UNPROJECTABLE]
        _, in_batch = await here.submit_batch({}, {}, job_name="LARGER THAN A DOCUMENT")
        for job_id in [*ids, *in_batch]:
            for version in range(3):
                await _append_raw(here, job_id, version)
    found = []
    for chunk_events in (1000, 3, 1) if IS_SOAK_RUN else (1000, 3):
        monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
        monkeypatch.setattr(rebuild, "CHUNK_EVENTS", chunk_events)
        async with run_roles_in_process(connection, store, projector=True) as here:
            async with rebuilding(connection) as auditor:
                await auditor.run()
            await here.wait_for_views()
            found.append(await _views(here))
            assert await compared(connection) == []
    assert all(it == found[0] for it in found[1:])


async def _append_raw(here: RunningRoles, job_id: str, number: int) -> None:
    """Append an event to a stream whose state need not be readable."""
    last = (await here.event_store.read_stream(job_id))[-1]
    head = StreamHead(last.version, last.position, last.hash)
    event = JobClaimed(worker_id="worker-2", attempt=number + 2)
    await here.event_store.append(StreamAppend(job_id, head, [event], EventMetadata("test"), datetime.now(UTC)))


async def _views(here: RunningRoles) -> Any:
    rows = sorted(await projection_errors.list_problems(here.checkpoint.views), key=lambda row: str(row["_id"]))
    return [*(await load_views(here.db, zeros=False)).items(), rows]


async def test_a_rebuild_by_the_mended_program_heals(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        with monkeypatch.context() as faults:
            faults.setattr(jobs, "fold", faulty)
            broken = await fault_in_the_fold(here)
            large = await larger_than_a_document(here)
            await here.wait_for_views()
            assert (await here.load_job(broken))["status"] == (await here.load_job(large))["status"] == "pending"
            assert (await here.load_job(large))["truncated"] == ["progress"]
            await here.handle_commands(large, ClaimJob("worker-1", datetime.now(UTC)))
            await here.wait_for_views()
            assert (await here.load_job(large))["status"] == "processing"
            assert await projection_errors.count(here.checkpoint.views) == 2
        async with rebuilding(connection) as auditor:
            await auditor.run()
        await here.wait_for_views()
        assert await projection_errors.count(here.checkpoint.views) == 0
        for job_id in (broken, large):
            assert projection_errors.ERROR_FIELD not in await here.load_job(job_id)


async def test_a_document_that_can_be_stored_again_is_stored_whole(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store, projector=True) as here:
        with monkeypatch.context() as faults:
            faults.setattr(jobs, "fold", faulty)
            job_id = await here.submit({"a": 1}, job_name="A NUMBER THAT BSON CANNOT HOLD")
            await here.wait_for_views()
            assert (await here.load_job(job_id))["parameters"] == {}
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.handle_commands(job_id, UpdateJob("user:a", priority=7))
        await here.wait_for_views()
        job = await here.load_job(job_id)
        assert (job["priority"], job["parameters"], projection_errors.ERROR_FIELD in job) == (7, {"a": 1}, False)
        assert await projection_errors.count(here.checkpoint.views) == 0


async def test_rows_that_somebody_else_has_inserted_do_not_stop_the_projector(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as here:
        job_id = await here.submit()
        await here.db.queue.insert_one({"_id": job_id})
        await here.db.jobs.insert_one({"_id": job_id})
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.wait_for_views()
        assert (await here.load_job(job_id))["status"] == "pending"
        assert await projection_errors.count(here.checkpoint.views) == 0


async def test_a_chunk_that_takes_too_long_is_written_in_parts(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server ends a transaction after a while: a chunk must not be tried for ever as it is."""
    written: list[int] = []
    write = writer.ProjectionWriter._write

    async def limited(self: writer.ProjectionWriter, chunk: Chunk, first: Any, writes: Any) -> None:
        if len(chunk.current["jobs"]) > 3:
            raise ChunkTooLarge("as if")
        written.append(len(chunk.current["jobs"]))
        await write(self, chunk, first, writes)

    monkeypatch.setattr(writer.ProjectionWriter, "_write", limited)
    async with run_roles_in_process(connection, store) as here:
        job_ids = [await here.submit() for _ in range(20)]
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.wait_for_views()
        assert [(await here.load_job(job_id))["status"] for job_id in job_ids] == ["pending"] * 20
        assert sum(written) == 20
        async with rebuilding(connection) as auditor:
            await auditor.run()


def test_the_budget_of_a_document_is_what_its_parts_may_take() -> None:
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
    assert sum(parts) < HARMLESS_BYTES
    assert envelope.MAX_EVENT_BYTES > limits.MAX_PARAMETERS_BYTES


async def test_damaged_envelopes_stop_neither_the_views_nor_workers(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each field, of a first and of a later event, of jobs, batches and deliveries."""
    done = JobResults(metadata=ResultMetadata(processed_at=datetime.now(UTC), duration=1.0))
    async with run_roles_in_process(connection, store) as here:
        waiting = []
        for name, value in DAMAGE:
            batch_id, in_batch = await here.submit_batch({}, {}, webhook=Webhook(url="http://example.org/hook"))
            for job_id in in_batch:
                await here.handle_commands(
                    job_id, ClaimJob("worker-1", datetime.now(UTC)), CompleteJob("worker-1", 1, done)
                )
            pending = await here.submit()
            await here.handle_commands(pending, UpdateJob("user:a", priority=2))
            await damage(here, pending, 2, name, value)
            await damage(here, in_batch[0], 1, name, value)
            await damage(here, in_batch[1], 3, name, value)
            await damage(here, f"delivery-{in_batch[0]}-3", 1, name, value)
            await here.handle_commands(batch_id, Archive("user:a"))
            await damage(here, batch_id, 2, name, value)
            waiting.append(pending)
        healthy = await here.submit()
        loaded = await load_stream_states(here.event_store, [*waiting, healthy])
        assert isinstance(loaded[healthy], StreamState)
        assert all(isinstance(it, StreamState | UnreadableEvent) for it in loaded.values())
    found = []
    for chunk_events in (1000, 7):
        monkeypatch.setattr(projector, "CHUNK_EVENTS", chunk_events)
        monkeypatch.setattr(rebuild, "CHUNK_EVENTS", chunk_events)
        async with run_roles_in_process(connection, store, projector=True) as here:
            await here.wait_for_views()
            assert (await here.load_job(healthy))["status"] == "pending"
            async with rebuilding(connection) as auditor:
                await auditor.run()
            await here.wait_for_views()
            found.append(await _views(here))
            assert await compared(connection) == []
    assert found[0] == found[1]
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        await here.wait_until_finished(healthy)
        assert here.worker_task is not None
        assert not here.worker_task.done()


async def test_damaged_progress_has_the_same_effect_wherever_chunks_end(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Progress that more progress follows is passed over unread."""
    async with run_roles_in_process(connection, store) as here:
        for damaged in ([3], [4], [5], [3, 5], [4, 5], [3, 4, 5]):
            for name, value in (("data", {"attempt": "x"}), ("time", "now"), ("schema", 257), ("version", 1000)):
                job_id = await here.submit()
                await here.claim(job_id)
                for number in range(3):
                    await here.handle_commands(job_id, ReportProgress("worker-1", 1, f"step {number}", 1.0, "fine"))
                for version in damaged:
                    await damage(here, job_id, version, name, value)
    found = []
    for chunk_events in (1000, 4, 1):
        monkeypatch.setattr(rebuild, "CHUNK_EVENTS", chunk_events)
        async with run_roles_in_process(connection, store, projector=True) as here:
            async with rebuilding(connection) as auditor:
                await auditor.run()
            await here.wait_for_views()
            found.append(await _views(here))
            assert await projection_errors.count(here.checkpoint.views) == 0
    assert found[0] == found[1] == found[2]


async def test_a_document_that_cannot_be_isolated_is_left_as_it_was(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(jobs, "isolate", broken)
    async with run_roles_in_process(connection, store) as here:
        job_id = await here.submit({"a": 1})
        await here.claim(job_id)
        await damage(here, job_id, 2, "data", 5)
        healthy = await here.submit()
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.wait_for_views()
        assert (await here.load_job(healthy))["status"] == "pending"
        assert (await here.load_job(job_id))["parameters"] == {"a": 1}
        assert [row["key"] for row in await projection_errors.list_problems(here.checkpoint.views)] == [job_id]


async def test_writes_of_one_event_are_bounded_by_the_document(connection: Connection, store: Path) -> None:
    """No access list is copied into the rows of the files."""
    files = [
        ResultFile(path=f"{number:0190}.md", sha256="0" * 64, size=1, media_type="text/markdown")
        for number in range(limits.MAX_RESULT_FILES)
    ]
    names = [f"{number:03}" + "\U0001f600" * 197 for number in range(limits.MAX_ACCESS_NAMES)]
    async with run_roles_in_process(connection, store) as here:
        job_id = await here.submit(access_control=AccessControl(read_access=names))
        await here.claim(job_id)
        done = JobResults(files=files, metadata=ResultMetadata(processed_at=datetime.now(UTC), duration=1.0))
        await here.handle_commands(job_id, CompleteJob("worker-1", 1, done))
        events = await here.event_store.read_stream(job_id)
    chunk = Chunk({view: {} for view in FOLDED_VIEWS})
    for event in events:
        chunk.apply(event)
    rows = chunk.changed_rows()["files"].values()
    assert len(rows) == limits.MAX_RESULT_FILES
    assert sum(len(bson.encode(row)) for row in rows if row) < 2 * limits.MAX_RESULTS_BYTES


async def test_a_date_beyond_the_calendar_in_a_payload_stops_nothing(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as here:
        job_id, healthy = await here.submit({"at": 1}), await here.submit()
        await damage(here, job_id, 1, "data.parameters.at", DatetimeMS(2**60))
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.wait_for_views()
    async with run_roles_in_process(connection, store) as here:
        await here.handle_commands(healthy, ClaimJob("worker-1", datetime.now(UTC)))
        await here.handle_commands(job_id, ClaimJob("worker-1", datetime.now(UTC)))
    async with run_roles_in_process(connection, store, projector=True) as here:  # has to load both
        await here.wait_for_views()
        found, _ = await job_list.find_page(here.checkpoint.views, job_list.JobFilter().build_query(ADMIN), limit=10)
        assert [job["status"] for job in found] == ["processing", "processing"]
        assert await compared(connection) == []


async def test_a_transaction_that_is_too_large_for_the_server_is_written_in_parts(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    refused: list[Any] = []

    async def limited(db: Any, write: Any) -> Any:
        if not refused:
            refused.append(write)
            raise OperationFailure("TransactionTooLargeForCache", 388)
        return await run_transaction(db, write)

    monkeypatch.setattr(writer, "run_transaction", limited)
    async with run_roles_in_process(connection, store) as here:
        job_ids = [await here.submit() for _ in range(4)]
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.wait_for_views()
        assert [(await here.load_job(job_id))["status"] for job_id in job_ids] == ["pending"] * 4
    assert refused


async def test_damaged_events_that_arrive_through_the_change_stream_stop_no_process(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store, projector=True, worker=WorkerOptions()) as here:
        for position, kind in enumerate(
            [None, 5, "JobClaimed", "JobSubmitted", "JobCancelRequested", "BatchPaused"], 1
        ):
            await here.db.events.insert_one({"_id": position, "version": position, "type": kind, "data": {}})
        await here.db.counters.update_one({"_id": "events"}, {"$set": {"next": 6}}, upsert=True)
        await here.wait_until_finished(await here.submit())
        assert here.worker_task is not None
        assert not here.worker_task.done()
