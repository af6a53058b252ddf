"""The rules of a batch: every command in every state where it matters."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from jobledger.ledger.domain import batch
from jobledger.ledger.domain.batch import final_status
from jobledger.ledger.domain.commands import (
    Archive,
    BatchCommand,
    ChangeAccess,
    Delete,
    FinishBatch,
    PauseBatch,
    ReopenBatch,
    ResumeBatch,
    SubmitBatch,
    Unarchive,
)
from jobledger.ledger.domain.errors import AlreadyExists, CommandRejected, InvalidState, NotFound
from jobledger.ledger.domain.events import (
    AccessControl,
    BatchAccessChanged,
    BatchArchived,
    BatchCounts,
    BatchDeleted,
    BatchEvent,
    BatchFinished,
    BatchPaused,
    BatchReopened,
    BatchResumed,
    BatchSubmitted,
    BatchSummary,
    BatchUnarchived,
    Event,
)
from tests.support.decider_spec import given_for

given = given_for(batch)
COUNTS = BatchCounts(completed=2)
SUMMARY = BatchSummary(duration=3.5, tokens_used=7)

asked = BatchSubmitted(total_jobs=2, job_ids=["job-1", "job-2"], user_id="alice")
paused = BatchPaused(by="bob", reason="too early")
resumed = BatchResumed(by="bob", reason="now")
finished = BatchFinished(status="completed", counts=COUNTS, summary=SUMMARY)
reopened = BatchReopened()
archived = BatchArchived(by="bob", reason="old")
deleted = BatchDeleted(by="bob", reason="old")
EVERY_COMMAND: list[BatchCommand] = [
    PauseBatch("bob"),
    ResumeBatch("bob"),
    FinishBatch(COUNTS, SUMMARY),
    ReopenBatch(),
    ChangeAccess("bob", AccessControl(visibility="public")),
    Archive("bob"),
    Unarchive("bob"),
    Delete("bob"),
]
ALIVE: dict[str, list[Event]] = {
    "processing": [asked],
    "finished": [asked, finished],
    "reopened": [asked, finished, reopened],
}


def in_each(histories: dict[str, list[Event]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("history", histories.values(), ids=histories.keys())


def by_name(command: Any) -> str:
    return type(command).__name__


def test_what_is_asked_for_is_submitted() -> None:
    given().when(SubmitBatch(asked)).then(asked)


def test_an_id_is_taken_only_once_even_after_the_batch_was_deleted() -> None:
    given(asked).when(SubmitBatch(asked)).then_rejected(AlreadyExists)
    given(asked, finished, deleted).when(SubmitBatch(asked)).then_rejected(AlreadyExists)


@pytest.mark.parametrize("command", EVERY_COMMAND, ids=by_name)
def test_nothing_can_be_done_with_a_batch_that_does_not_exist_or_is_deleted(command: BatchCommand) -> None:
    given().when(command).then_rejected(NotFound)
    given(asked, finished, deleted).when(command).then_rejected(NotFound)


def test_a_stream_that_does_not_begin_with_a_submission_cannot_be_folded() -> None:
    with pytest.raises(NotFound, match="BatchPaused"):
        batch.evolve(None, paused)


@in_each(ALIVE)
def test_who_may_see_a_batch_can_be_changed_at_any_time(history: list[Event]) -> None:
    public = AccessControl(visibility="public")
    given(*history).when(ChangeAccess("bob", public)).then(BatchAccessChanged(by="bob", access_control=public))
    assert given(*history, BatchAccessChanged(by="bob", access_control=public)).state.spec.access_control == public


@in_each(ALIVE)
def test_a_batch_is_paused_once_and_resumed_once(history: list[Event]) -> None:
    given(*history).when(PauseBatch("bob", "too early")).then(paused)
    given(*history, paused).when(PauseBatch("bob")).then_no_events()
    given(*history, paused).when(ResumeBatch("bob", "now")).then(resumed)
    given(*history).when(ResumeBatch("bob")).then_no_events()
    given(*history, paused, resumed).when(ResumeBatch("bob")).then_no_events()


def test_a_batch_that_ends_or_goes_on_is_as_paused_as_before() -> None:
    """So it can be paused after its end, and what is restarted then waits."""
    for history in ([asked, paused, finished], [asked, finished, paused], [asked, paused, finished, reopened]):
        assert given(*history).state.paused
        given(*history).when(ResumeBatch("bob", "now")).then(resumed)


@pytest.mark.parametrize("history", [[asked], [asked, paused], [asked, finished, reopened]])
def test_a_batch_is_finished_by_whoever_says_so_first(history: list[Event]) -> None:
    given(*history).when(FinishBatch(COUNTS, SUMMARY)).then(finished)
    given(*history, finished).when(FinishBatch(COUNTS, SUMMARY)).then_no_events()
    given(*history, finished).when(FinishBatch(BatchCounts(failed=2), SUMMARY)).then_no_events()


def test_only_a_finished_batch_is_reopened_and_once() -> None:
    given(asked).when(ReopenBatch()).then_no_events()
    given(asked, finished).when(ReopenBatch()).then(reopened)
    given(asked, finished, reopened).when(ReopenBatch()).then_no_events()


@pytest.mark.parametrize(
    ("counts", "status"),
    [
        (BatchCounts(completed=2), "completed"),
        (BatchCounts(), "completed"),
        (BatchCounts(completed=1, failed=1), "partial"),
        (BatchCounts(completed=1, cancelled=1), "partial"),
        (BatchCounts(failed=2), "failed"),
        (BatchCounts(cancelled=2), "failed"),
        (BatchCounts(failed=1, cancelled=1), "failed"),
    ],
)
def test_the_end_of_a_batch_is_named_by_how_its_jobs_ended(counts: BatchCounts, status: str) -> None:
    assert final_status(counts) == status
    end = BatchFinished(status=final_status(counts), counts=counts, summary=SUMMARY)
    given(asked).when(FinishBatch(counts, SUMMARY)).then(end)
    assert given(asked, end).state.status == status


@in_each(ALIVE)
def test_archiving_is_done_once_and_undone_once(history: list[Event]) -> None:
    given(*history).when(Archive("bob", "old")).then(archived)
    given(*history, archived).when(Archive("bob")).then_no_events()
    given(*history, archived).when(Unarchive("bob")).then(BatchUnarchived(by="bob"))
    given(*history).when(Unarchive("bob")).then_no_events()
    given(*history, archived, BatchUnarchived(by="bob")).when(Unarchive("bob")).then_no_events()


@pytest.mark.parametrize("history", [[asked], [asked, paused], [asked, finished, reopened]])
def test_a_batch_at_work_cannot_be_deleted(history: list[Event]) -> None:
    given(*history).when(Delete("bob")).then_rejected(InvalidState, "cancel it first")


def test_a_finished_batch_can_be_deleted() -> None:
    given(asked, finished).when(Delete("bob", "old")).then(deleted)


@for_all(st.lists(st.sampled_from(EVERY_COMMAND), max_size=30))
def test_whatever_is_asked_of_it_a_batch_ends_once_before_it_goes_on(commands: list[BatchCommand]) -> None:
    state = batch.evolve(None, asked)
    history: list[BatchEvent] = []
    for command in commands:
        try:
            decided = batch.decide(command, state)
        except CommandRejected:
            continue
        assert not any(isinstance(event, BatchDeleted) for event in history), "something happened to a deleted batch"
        for event in decided:
            state = batch.evolve(state, event)
        history += decided
    ends = [event for event in history if isinstance(event, BatchFinished | BatchReopened)]
    assert [type(event) for event in ends] == [(BatchFinished, BatchReopened)[turn % 2] for turn in range(len(ends))]
    pauses = [event for event in history if isinstance(event, BatchPaused | BatchResumed)]
    assert [type(event) for event in pauses] == [(BatchPaused, BatchResumed)[turn % 2] for turn in range(len(pauses))]
