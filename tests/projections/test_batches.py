"""The view `batches`, and the events that the projector appends to batches."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    ChangeAccess,
    Delete,
    FailAttempt,
    PauseBatch,
    ReopenBatch,
    RestartJob,
    ResumeBatch,
)
from jobledger.ledger.domain.errors import StreamBusy
from jobledger.ledger.domain.events import BatchFinished, BatchJobCounts, BatchReopened, BatchSummary, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.command_handler import handle_command
from jobledger.projections.engine import projector
from jobledger.projections.engine.checkpoint import load_checkpoint
from jobledger.projections.engine.projector import Projector
from jobledger.projections.views import batches
from tests.projections.expected_views import assert_views_match_log, make_failure, make_results
from tests.support.event_examples import ACCESS
from tests.support.polling import DEADLINE_SECONDS
from tests.support.role_runner import RunningRoles, run_roles_in_process
from tests.support.worker_reports import report_results

WORKER = "worker-1"
# konzept.md, "Batch Collection": each field and its type when it has a value.
DOCUMENT_FIELDS: dict[str, type] = {
    "batch_id": str,
    "status": str,
    "created_at": datetime,
    "updated_at": datetime,
    "job_ids": list,
    "total_jobs": int,
    "completed_jobs": int,
    "failed_jobs": int,
    "webhook": dict,
    "parameters": dict,
    "summary": dict,
}


async def complete_job(roles: RunningRoles, job_id: str, *, tokens: int = 10) -> None:
    attempt = await roles.claim(job_id)
    await roles.handle_commands(job_id, report_results(WORKER, attempt, make_results(job_id, tokens=tokens)))


async def fail_job(roles: RunningRoles, job_id: str) -> None:
    attempt = await roles.claim(job_id)
    await roles.handle_commands(job_id, FailAttempt(WORKER, attempt, make_failure(), None))


async def wait_until_batch_finished(roles: RunningRoles, batch_id: str, *, after: int = 0) -> Document:
    """Wait for BatchFinished and return the document of the batch."""
    event = await roles.wait_for_event(BatchFinished, batch_id, after=after)
    await roles.wait_for_views(event.position)
    return await roles.load_batch(batch_id)


def job_counts(batch: Document) -> tuple[int, ...]:
    """Return the numbers of jobs: total, pending, processing, completed, failed, cancelled."""
    names = ("total", "pending", "processing", "completed", "failed", "cancelled")
    return tuple(batch[f"{name}_jobs"] for name in names)


async def test_batch_document_has_all_fields_and_counts_jobs(roles: RunningRoles) -> None:
    batch_id, job_ids = await roles.submit_batch({}, {}, {}, {})
    await roles.wait_for_views()
    batch = await roles.load_batch(batch_id)
    for name, type_ in DOCUMENT_FIELDS.items():
        assert batch[name] is None or type(batch[name]) is type_, f"{name} is {batch[name]!r}"
    assert (batch["status"], batch["job_ids"]) == ("processing", job_ids)
    assert job_counts(batch) == (4, 4, 0, 0, 0, 0)
    assert batch["summary"] == {"duration": 0.0, "tokens_used": 0}

    await complete_job(roles, job_ids[0])
    await fail_job(roles, job_ids[1])
    await roles.claim(job_ids[2])
    await roles.wait_for_views()
    batch = await roles.load_batch(batch_id)
    assert job_counts(batch) == (4, 1, 1, 1, 1, 0)
    assert (batch["status"], batch["completed_at"], batch["version"]) == ("processing", None, 1)
    assert batch["position"] == await roles.event_store.read_head_position()


async def test_batch_with_only_completed_jobs_is_completed(roles: RunningRoles) -> None:
    batch_id, job_ids = await roles.submit_batch({}, {}, {})
    for job_id in job_ids:
        await complete_job(roles, job_id, tokens=100)
    batch = await wait_until_batch_finished(roles, batch_id)
    assert (batch["status"], job_counts(batch)) == ("completed", (3, 0, 0, 3, 0, 0))
    assert batch["summary"] == {"duration": 4.5, "tokens_used": 300}
    assert batch["completed_at"] == batch["updated_at"]
    assert (batch["version"], batch["position"]) == (2, await roles.event_store.read_head_position())


async def test_batch_with_completed_and_failed_jobs_is_partial(roles: RunningRoles) -> None:
    batch_id, (first, second, third) = await roles.submit_batch({}, {}, {})
    await complete_job(roles, first)
    await fail_job(roles, second)
    await roles.handle_commands(third, CancelJob("user-1"))
    batch = await wait_until_batch_finished(roles, batch_id)
    assert (batch["status"], job_counts(batch)) == ("partial", (3, 0, 0, 1, 1, 1))


async def test_batch_without_completed_jobs_is_failed(roles: RunningRoles) -> None:
    batch_id, (first, second) = await roles.submit_batch({}, {})
    await fail_job(roles, first)
    await roles.handle_commands(second, CancelJob("user-1"))
    batch = await wait_until_batch_finished(roles, batch_id)
    assert (batch["status"], job_counts(batch)) == ("failed", (2, 0, 0, 0, 1, 1))
    assert batch["summary"] == {"duration": 0.0, "tokens_used": 0}


async def test_restarted_job_reopens_its_batch_which_finishes_again(roles: RunningRoles) -> None:
    batch_id, (first, second) = await roles.submit_batch({}, {})
    await complete_job(roles, first)
    await fail_job(roles, second)
    assert (await wait_until_batch_finished(roles, batch_id))["status"] == "partial"

    await roles.handle_commands(second, RestartJob("user-1"))
    reopened = await roles.wait_for_event(BatchReopened, batch_id)
    await roles.wait_for_views(reopened.position)
    batch = await roles.load_batch(batch_id)
    assert (batch["status"], batch["completed_at"], job_counts(batch)) == ("processing", None, (2, 1, 0, 1, 0, 0))

    await complete_job(roles, second)
    batch = await wait_until_batch_finished(roles, batch_id, after=reopened.position)
    assert (batch["status"], job_counts(batch)) == ("completed", (2, 0, 0, 2, 0, 0))
    assert await roles.read_event_types(batch_id) == [
        "BatchSubmitted",
        "BatchFinished",
        "BatchReopened",
        "BatchFinished",
    ]


async def test_deleted_job_is_not_counted_and_the_others_finish_the_batch(roles: RunningRoles) -> None:
    batch_id, (first, second) = await roles.submit_batch({}, {})
    await complete_job(roles, first)
    await roles.handle_commands(second, Delete("user-1"))
    batch = await wait_until_batch_finished(roles, batch_id)
    assert (batch["status"], batch["job_ids"], job_counts(batch)) == ("completed", [first], (1, 0, 0, 1, 0, 0))


async def test_batch_is_paused_archived_and_deleted_without_its_jobs(roles: RunningRoles) -> None:
    batch_id, (job_id,) = await roles.submit_batch({})
    await roles.handle_commands(batch_id, PauseBatch("user-1"), Archive("user-1"))
    await roles.wait_for_views()
    batch = await roles.load_batch(batch_id)
    assert (batch["paused"], batch["archived"], batch["version"]) == (True, True, 3)
    await roles.handle_commands(batch_id, ResumeBatch("user-1"))
    await complete_job(roles, job_id)
    assert (await wait_until_batch_finished(roles, batch_id))["paused"] is False
    await roles.handle_commands(batch_id, Delete("user-1"))
    await roles.handle_commands(job_id, RestartJob("user-1"))
    await roles.wait_for_views()
    assert await roles.db.batches.count_documents({}) == 0
    assert (await roles.load_job(job_id))["batch_id"] == batch_id
    await assert_views_match_log(roles)


async def test_batch_missing_in_the_views_is_folded_from_the_log(connection: Connection, store: Path) -> None:
    async with run_roles_in_process(connection, store) as roles:
        batch_id, _ = await roles.submit_batch({}, {})
        assert job_counts(await roles.load_batch(batch_id)) == (2, 2, 0, 0, 0, 0)


# A leader that exits after its transaction and before its follow-up event -----------------------------------------


class HangingProjector(Projector):
    """Waits forever before it appends the follow-up event of a batch with the status `hang_status`."""

    hang_status = "processing"
    reached: asyncio.Event

    async def _append_follow_ups(self, changed_batches: Iterable[Document]) -> None:
        checked = list(changed_batches)
        if any(batch["status"] == self.hang_status and batches.find_follow_up_command(batch) for batch in checked):
            self.reached.set()
            await asyncio.Event().wait()
        await super()._append_follow_ups(checked)


@pytest.fixture
async def hang_reached(monkeypatch: pytest.MonkeyPatch) -> asyncio.Event:
    """Set when a HangingProjector was about to append the event."""
    reached = asyncio.Event()
    monkeypatch.setattr(HangingProjector, "reached", reached, raising=False)
    return reached


async def complete_jobs(roles: RunningRoles, *job_ids: str) -> RecordedEvent:
    """Complete jobs and return the last event."""
    for job_id in job_ids[:-1]:
        await complete_job(roles, job_id)
    attempt = await roles.claim(job_ids[-1])
    return (await roles.handle_commands(job_ids[-1], report_results(WORKER, attempt, make_results(job_ids[-1]))))[0]


async def test_batch_is_finished_once_if_the_leader_exits_before_the_event(
    connection: Connection, store: Path, hang_reached: asyncio.Event
) -> None:
    async with run_roles_in_process(connection, store) as roles:
        batch_id, job_ids = await roles.submit_batch({}, {})
        event = await complete_jobs(roles, *job_ids)
        async with run_roles_in_process(connection, store, projector=True, projector_class=HangingProjector):
            await roles.wait_for_views(event.position)
            await asyncio.wait_for(hang_reached.wait(), DEADLINE_SECONDS)
        assert (await roles.load_batch(batch_id))["completed_jobs"] == 2
        assert await roles.read_event_types(batch_id) == ["BatchSubmitted"]
        for _ in range(2):
            async with run_roles_in_process(connection, store, projector=True):
                assert (await wait_until_batch_finished(roles, batch_id))["status"] == "completed"
        assert await roles.read_event_types(batch_id) == ["BatchSubmitted", "BatchFinished"]


async def test_batch_is_reopened_if_the_leader_exits_before_the_event(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch, hang_reached: asyncio.Event
) -> None:
    async with run_roles_in_process(connection, store) as roles:
        batch_id, job_ids = await roles.submit_batch({}, {})
        await complete_jobs(roles, *job_ids)
        async with run_roles_in_process(connection, store, projector=True):
            await wait_until_batch_finished(roles, batch_id)
        monkeypatch.setattr(HangingProjector, "hang_status", "completed")
        async with run_roles_in_process(connection, store, projector=True, projector_class=HangingProjector):
            restarted = await roles.handle_commands(job_ids[0], RestartJob("user-1"))
            await roles.wait_for_views(restarted[0].position)
            await asyncio.wait_for(hang_reached.wait(), DEADLINE_SECONDS)
        assert await roles.read_event_types(batch_id) == ["BatchSubmitted", "BatchFinished"]
        async with run_roles_in_process(connection, store, projector=True):
            await roles.wait_for_event(BatchReopened, batch_id)


async def test_busy_batch_is_finished_after_its_next_event(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is busy because others append to it. The projector must not stop for it."""
    tried = asyncio.Event()

    async def handle_unless_first(*arguments: Any, **options: Any) -> Any:
        if not tried.is_set():
            tried.set()
            raise StreamBusy("others append to it")
        return await handle_command(*arguments, **options)

    monkeypatch.setattr(projector, "handle_command", handle_unless_first)
    async with run_roles_in_process(connection, store, projector=True) as roles:
        batch_id, job_ids = await roles.submit_batch({}, {})
        await complete_jobs(roles, *job_ids)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await tried.wait()
        leader = await load_checkpoint(roles.db)
        await roles.handle_commands(batch_id, ChangeAccess("user:1", ACCESS))
        await wait_until_batch_finished(roles, batch_id)
        assert (await load_checkpoint(roles.db))["fencing_token"] == leader["fencing_token"]


async def test_projector_that_catches_up_appends_no_event_for_an_outdated_batch_state(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it catches up, the views contain a batch whose jobs have all finished. One of them was restarted since."""
    monkeypatch.setattr(projector, "CHUNK_EVENTS", 1)
    async with run_roles_in_process(connection, store) as roles:
        batch_id, job_ids = await roles.submit_batch({}, {})
        await complete_jobs(roles, *job_ids)
        await roles.handle_commands(job_ids[0], RestartJob("user-1"))
        async with run_roles_in_process(connection, store, projector=True):
            await roles.wait_for_views()
            await roles.handle_commands(job_ids[0], CancelJob("user-1"))
            last = await wait_until_batch_finished(roles, batch_id)
        assert last["cancelled_jobs"] == 1
        assert await roles.read_event_types(batch_id) == ["BatchSubmitted", "BatchFinished"]


async def test_batch_of_a_job_restarted_without_projector_is_finished_twice(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as roles:
        batch_id, job_ids = await roles.submit_batch({}, {}, max_attempts=1)
        attempt = await roles.claim(job_ids[0])
        await roles.handle_commands(job_ids[0], FailAttempt(WORKER, attempt, make_failure(), None))
        await complete_jobs(roles, job_ids[1])
        async with run_roles_in_process(connection, store, projector=True):
            assert (await wait_until_batch_finished(roles, batch_id))["status"] == "partial"
        await roles.handle_commands(job_ids[0], RestartJob("user-1"))
        completed_again = await complete_jobs(roles, job_ids[0])
        async with run_roles_in_process(connection, store, projector=True):
            await roles.wait_for_event(BatchFinished, batch_id, after=completed_again.position)
            await roles.wait_for_views()
            assert (await roles.load_batch(batch_id))["status"] == "completed"
            await assert_views_match_log(roles)
        assert await roles.read_event_types(batch_id) == [
            "BatchSubmitted",
            "BatchFinished",
            "BatchReopened",
            "BatchFinished",
        ]


async def test_batch_finished_with_outdated_counts_is_reopened(roles: RunningRoles) -> None:
    """Between the decision and the append, a job was restarted and finished with another status."""
    batch_id, _ = await roles.submit_batch({}, {})
    await roles.wait_for_views()
    before = await roles.load_batch(batch_id)
    all_completed = {**before, "pending_jobs": 0, "completed_jobs": 2}
    for counts, command in (
        (BatchJobCounts(completed=2), None),
        (BatchJobCounts(completed=1, failed=1), ReopenBatch()),
    ):
        finished = BatchFinished(status="completed", counts=counts, summary=BatchSummary())
        [event] = await roles.event_store.read_stream(batch_id)
        after = batches.fold(all_completed, RecordedEvent(event.document, finished))
        assert after is not None
        assert batches.find_follow_up_command(after) == command
