"""The view `batches`, and what the projector records about batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime
from pathlib import Path

import pytest

from jobledger.ledger.domain.commands import (
    Archive,
    CancelJob,
    CompleteJob,
    Delete,
    FailAttempt,
    PauseBatch,
    ReopenBatch,
    RestartJob,
    ResumeBatch,
)
from jobledger.ledger.domain.events import BatchCounts, BatchFinished, BatchReopened, BatchSummary, RecordedEvent
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.projections.engine import projector
from jobledger.projections.engine.projector import Projector
from jobledger.projections.views import batches
from tests.projections.expected_views import assert_views_match_log, make_failure, make_results
from tests.support.role_runner import RunningRoles, run_roles_in_process

WORKER = "worker-1"
CONCEPT: dict[str, type] = {
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


@pytest.fixture
async def here(connection: Connection, store: Path) -> AsyncIterator[RunningRoles]:
    async with run_roles_in_process(connection, store, projector=True) as running:
        yield running


async def complete(here: RunningRoles, job_id: str, *, tokens: int = 10) -> None:
    attempt = await here.claim(job_id)
    await here.handle_commands(job_id, CompleteJob(WORKER, attempt, make_results(job_id, tokens=tokens)))


async def fail(here: RunningRoles, job_id: str) -> None:
    attempt = await here.claim(job_id)
    await here.handle_commands(job_id, FailAttempt(WORKER, attempt, make_failure(), None))


async def finished(here: RunningRoles, batch_id: str, *, after: int = 0) -> Document:
    """The batch's document when it has been recorded that it has ended."""
    event = await here.wait_for_event(BatchFinished, batch_id, after=after)
    await here.wait_for_views(event.position)
    return await here.load_batch(batch_id)


def counts(batch: Document) -> tuple[int, ...]:
    """How many jobs are: there, waiting, being done, completed, failed, cancelled."""
    names = ("total", "pending", "processing", "completed", "failed", "cancelled")
    return tuple(batch[f"{name}_jobs"] for name in names)


async def test_a_batch_has_every_field_of_the_concept_and_counts_its_jobs(here: RunningRoles) -> None:
    batch_id, job_ids = await here.submit_batch({}, {}, {}, {})
    await here.wait_for_views()
    batch = await here.load_batch(batch_id)
    for name, kind in CONCEPT.items():
        assert batch[name] is None or type(batch[name]) is kind, f"{name} is {batch[name]!r}"
    assert (batch["status"], batch["job_ids"]) == ("processing", job_ids)
    assert counts(batch) == (4, 4, 0, 0, 0, 0)
    assert batch["summary"] == {"duration": 0.0, "tokens_used": 0}

    await complete(here, job_ids[0])
    await fail(here, job_ids[1])
    await here.claim(job_ids[2])
    await here.wait_for_views()
    batch = await here.load_batch(batch_id)
    assert counts(batch) == (4, 1, 1, 1, 1, 0)
    assert (batch["status"], batch["completed_at"], batch["version"]) == ("processing", None, 1)
    assert batch["position"] == await here.event_store.head_position()


async def test_a_batch_whose_jobs_are_all_completed_is_completed(here: RunningRoles) -> None:
    batch_id, job_ids = await here.submit_batch({}, {}, {})
    for job_id in job_ids:
        await complete(here, job_id, tokens=100)
    batch = await finished(here, batch_id)
    assert (batch["status"], counts(batch)) == ("completed", (3, 0, 0, 3, 0, 0))
    assert batch["summary"] == {"duration": 4.5, "tokens_used": 300}
    assert batch["completed_at"] == batch["updated_at"]
    assert (batch["version"], batch["position"]) == (2, await here.event_store.head_position())


async def test_a_batch_with_a_failed_job_is_partial(here: RunningRoles) -> None:
    batch_id, (one, two, three) = await here.submit_batch({}, {}, {})
    await complete(here, one)
    await fail(here, two)
    await here.handle_commands(three, CancelJob("user-1"))
    batch = await finished(here, batch_id)
    assert (batch["status"], counts(batch)) == ("partial", (3, 0, 0, 1, 1, 1))


async def test_a_batch_without_any_completed_job_is_failed(here: RunningRoles) -> None:
    batch_id, (one, two) = await here.submit_batch({}, {})
    await fail(here, one)
    await here.handle_commands(two, CancelJob("user-1"))
    batch = await finished(here, batch_id)
    assert (batch["status"], counts(batch)) == ("failed", (2, 0, 0, 0, 1, 1))
    assert batch["summary"] == {"duration": 0.0, "tokens_used": 0}


async def test_a_restarted_job_reopens_its_batch_which_then_finishes_once_more(here: RunningRoles) -> None:
    batch_id, (one, two) = await here.submit_batch({}, {})
    await complete(here, one)
    await fail(here, two)
    assert (await finished(here, batch_id))["status"] == "partial"

    await here.handle_commands(two, RestartJob("user-1"))
    reopened = await here.wait_for_event(BatchReopened, batch_id)
    await here.wait_for_views(reopened.position)
    batch = await here.load_batch(batch_id)
    assert (batch["status"], batch["completed_at"], counts(batch)) == ("processing", None, (2, 1, 0, 1, 0, 0))

    await complete(here, two)
    batch = await finished(here, batch_id, after=reopened.position)
    assert (batch["status"], counts(batch)) == ("completed", (2, 0, 0, 2, 0, 0))
    assert await here.read_event_types(batch_id) == [
        "BatchSubmitted",
        "BatchFinished",
        "BatchReopened",
        "BatchFinished",
    ]


async def test_a_deleted_job_no_longer_counts_and_the_rest_may_finish_the_batch(here: RunningRoles) -> None:
    batch_id, (one, two) = await here.submit_batch({}, {})
    await complete(here, one)
    await here.handle_commands(two, Delete("user-1"))
    batch = await finished(here, batch_id)
    assert (batch["status"], batch["job_ids"], counts(batch)) == ("completed", [one], (1, 0, 0, 1, 0, 0))


async def test_a_batch_is_paused_archived_and_deleted_and_its_jobs_live_on(here: RunningRoles) -> None:
    batch_id, (one,) = await here.submit_batch({})
    await here.handle_commands(batch_id, PauseBatch("user-1"), Archive("user-1"))
    await here.wait_for_views()
    batch = await here.load_batch(batch_id)
    assert (batch["paused"], batch["archived"], batch["version"]) == (True, True, 3)
    await here.handle_commands(batch_id, ResumeBatch("user-1"))
    await complete(here, one)
    assert (await finished(here, batch_id))["paused"] is False
    await here.handle_commands(batch_id, Delete("user-1"))
    await here.handle_commands(one, RestartJob("user-1"))
    await here.wait_for_views()
    assert await here.db.batches.count_documents({}) == 0
    assert (await here.load_job(one))["batch_id"] == batch_id
    await assert_views_match_log(here)


async def test_a_batch_that_the_views_have_not_reached_is_folded_from_the_log(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as here:
        batch_id, _ = await here.submit_batch({}, {})
        assert counts(await here.load_batch(batch_id)) == (2, 2, 0, 0, 0, 0)


# A leader that dies between its transaction and its reaction -------------------------------------------------------


class Reticent(Projector):
    """Never gets as far as to say what it has seen."""

    async def _react(self, changed: object) -> None:
        if [batch for batch in changed if batch["status"] == SAYS_NOTHING_ABOUT]:  # type: ignore[attr-defined]
            await asyncio.Event().wait()
        await super()._append_follow_ups(changed)  # type: ignore[arg-type]


SAYS_NOTHING_ABOUT = "processing"


async def last_end(here: RunningRoles, *job_ids: str) -> RecordedEvent:
    for job_id in job_ids[:-1]:
        await complete(here, job_id)
    attempt = await here.claim(job_ids[-1])
    return (await here.handle_commands(job_ids[-1], CompleteJob(WORKER, attempt, make_results(job_ids[-1]))))[0]


async def test_a_batch_is_finished_exactly_once_though_the_leader_died_before_saying_so(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as here:
        batch_id, job_ids = await here.submit_batch({}, {})
        event = await last_end(here, *job_ids)
        async with run_roles_in_process(connection, store, projector=True, projector_class=Reticent):
            await here.wait_for_views(event.position)
        assert (await here.load_batch(batch_id))["completed_jobs"] == 2
        assert await here.read_event_types(batch_id) == ["BatchSubmitted"]
        for _ in range(2):
            async with run_roles_in_process(connection, store, projector=True):
                assert (await finished(here, batch_id))["status"] == "completed"
        assert await here.read_event_types(batch_id) == ["BatchSubmitted", "BatchFinished"]


async def test_a_batch_is_reopened_though_the_leader_died_before_saying_so(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with run_roles_in_process(connection, store) as here:
        batch_id, job_ids = await here.submit_batch({}, {})
        await last_end(here, *job_ids)
        async with run_roles_in_process(connection, store, projector=True):
            await finished(here, batch_id)
        monkeypatch.setattr("tests.projections.test_batches.SAYS_NOTHING_ABOUT", "completed")
        async with run_roles_in_process(connection, store, projector=True, projector_class=Reticent):
            restarted = await here.handle_commands(job_ids[0], RestartJob("user-1"))
            await here.wait_for_views(restarted[0].position)
        assert await here.read_event_types(batch_id) == ["BatchSubmitted", "BatchFinished"]
        async with run_roles_in_process(connection, store, projector=True):
            await here.wait_for_event(BatchReopened, batch_id, seconds=5)


async def test_who_has_much_to_catch_up_with_says_nothing_of_a_batch_that_has_gone_on_meanwhile(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the way there the views hold a batch whose jobs have all ended. One of them waits again since."""
    monkeypatch.setattr(projector, "CHUNK_EVENTS", 1)
    async with run_roles_in_process(connection, store) as here:
        batch_id, job_ids = await here.submit_batch({}, {})
        await last_end(here, *job_ids)
        await here.handle_commands(job_ids[0], RestartJob("user-1"))
        async with run_roles_in_process(connection, store, projector=True):
            await here.wait_for_views()
            await here.handle_commands(job_ids[0], CancelJob("user-1"))
            last = await finished(here, batch_id)
        assert last["cancelled_jobs"] == 1
        assert await here.read_event_types(batch_id) == ["BatchSubmitted", "BatchFinished"]


async def test_a_batch_whose_job_was_restarted_and_ended_again_while_nobody_looked_has_ended_twice(
    connection: Connection, store: Path
) -> None:
    async with run_roles_in_process(connection, store) as here:
        batch_id, job_ids = await here.submit_batch({}, {}, max_attempts=1)
        attempt = await here.claim(job_ids[0])
        await here.handle_commands(job_ids[0], FailAttempt(WORKER, attempt, make_failure(), None))
        await last_end(here, job_ids[1])
        async with run_roles_in_process(connection, store, projector=True):
            assert (await finished(here, batch_id))["status"] == "partial"
        await here.handle_commands(job_ids[0], RestartJob("user-1"))
        again = await last_end(here, job_ids[0])
        async with run_roles_in_process(connection, store, projector=True):
            await here.wait_for_event(BatchFinished, batch_id, after=again.position)
            await here.wait_for_views()
            assert (await here.load_batch(batch_id))["status"] == "completed"
            await assert_views_match_log(here)
        assert await here.read_event_types(batch_id) == [
            "BatchSubmitted",
            "BatchFinished",
            "BatchReopened",
            "BatchFinished",
        ]


async def test_an_end_that_was_told_with_counts_that_were_over_is_told_anew(here: RunningRoles) -> None:
    """Between the decision that it has ended and its record, a job was restarted and has ended otherwise."""
    batch_id, _ = await here.submit_batch({}, {})
    await here.wait_for_views()
    before = await here.load_batch(batch_id)
    all_completed = {**before, "pending_jobs": 0, "completed_jobs": 2}
    for told, command in ((BatchCounts(completed=2), None), (BatchCounts(completed=1, failed=1), ReopenBatch())):
        ended = BatchFinished(status="completed", counts=told, summary=BatchSummary())
        [event] = await here.event_store.read_stream(batch_id)
        after = batches.fold(all_completed, RecordedEvent(event.document, ended))
        assert after is not None
        assert batches.follow_up_command(after) == command
