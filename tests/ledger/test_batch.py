"""The batch decider: each command in each state that matters."""

from __future__ import annotations

import pytest
from hypothesis import given as for_all
from hypothesis import strategies as st

from jobledger.ledger.domain import batch
from jobledger.ledger.domain.batch import compute_terminal_status
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
    BatchDeleted,
    BatchEvent,
    BatchFinished,
    BatchJobCounts,
    BatchPaused,
    BatchReopened,
    BatchResumed,
    BatchSubmitted,
    BatchSummary,
    BatchUnarchived,
    Event,
)
from tests.support.decider_spec import given_for, parametrize_histories, type_name

given = given_for(batch)
COUNTS = BatchJobCounts(completed=2)
SUMMARY = BatchSummary(duration=3.5, tokens_used=7)

submitted = BatchSubmitted(total_jobs=2, job_ids=["job-1", "job-2"], user_id="alice")
paused = BatchPaused(by="user:bob", reason="too early")
resumed = BatchResumed(by="user:bob", reason="now")
finished = BatchFinished(status="completed", counts=COUNTS, summary=SUMMARY)
reopened = BatchReopened()
archived = BatchArchived(by="user:bob", reason="old")
deleted = BatchDeleted(by="user:bob", reason="old")
ALL_COMMANDS: list[BatchCommand] = [
    PauseBatch("user:bob"),
    ResumeBatch("user:bob"),
    FinishBatch(COUNTS, SUMMARY),
    ReopenBatch(),
    ChangeAccess("user:bob", AccessControl(visibility="public")),
    Archive("user:bob"),
    Unarchive("user:bob"),
    Delete("user:bob"),
]
EXISTING: dict[str, list[Event]] = {
    "processing": [submitted],
    "finished": [submitted, finished],
    "reopened": [submitted, finished, reopened],
}


def test_submit_new_batch_records_submission() -> None:
    given().when(SubmitBatch(submitted)).then(submitted)


def test_submit_existing_or_deleted_batch_is_rejected() -> None:
    given(submitted).when(SubmitBatch(submitted)).then_rejected(AlreadyExists)
    given(submitted, finished, deleted).when(SubmitBatch(submitted)).then_rejected(AlreadyExists)


@pytest.mark.parametrize("command", ALL_COMMANDS, ids=type_name)
def test_command_on_missing_or_deleted_batch_is_rejected(command: BatchCommand) -> None:
    given().when(command).then_rejected(NotFound)
    given(submitted, finished, deleted).when(command).then_rejected(NotFound)


def test_evolve_without_submission_raises_not_found() -> None:
    with pytest.raises(NotFound, match="BatchPaused"):
        batch.evolve(None, paused)


@parametrize_histories(EXISTING)
def test_change_access_in_any_state_succeeds(history: list[Event]) -> None:
    public = AccessControl(visibility="public")
    given(*history).when(ChangeAccess("user:bob", public)).then(
        BatchAccessChanged(by="user:bob", access_control=public)
    )
    assert given(*history, BatchAccessChanged(by="user:bob", access_control=public)).state.spec.access_control == public


@parametrize_histories(EXISTING)
def test_repeated_pause_and_resume_record_nothing(history: list[Event]) -> None:
    given(*history).when(PauseBatch("user:bob", "too early")).then(paused)
    given(*history, paused).when(PauseBatch("user:bob")).then_no_events()
    given(*history, paused).when(ResumeBatch("user:bob", "now")).then(resumed)
    given(*history).when(ResumeBatch("user:bob")).then_no_events()
    given(*history, paused, resumed).when(ResumeBatch("user:bob")).then_no_events()


def test_finish_and_reopen_keep_batch_paused() -> None:
    """A batch can be paused after its end. Restarted jobs then wait."""
    for history in (
        [submitted, paused, finished],
        [submitted, finished, paused],
        [submitted, paused, finished, reopened],
    ):
        assert given(*history).state.is_paused
        given(*history).when(ResumeBatch("user:bob", "now")).then(resumed)


@pytest.mark.parametrize("history", [[submitted], [submitted, paused], [submitted, finished, reopened]])
def test_second_finish_records_nothing(history: list[Event]) -> None:
    given(*history).when(FinishBatch(COUNTS, SUMMARY)).then(finished)
    given(*history, finished).when(FinishBatch(COUNTS, SUMMARY)).then_no_events()
    given(*history, finished).when(FinishBatch(BatchJobCounts(failed=2), SUMMARY)).then_no_events()


def test_reopen_unfinished_batch_records_nothing() -> None:
    given(submitted).when(ReopenBatch()).then_no_events()
    given(submitted, finished).when(ReopenBatch()).then(reopened)
    given(submitted, finished, reopened).when(ReopenBatch()).then_no_events()


@pytest.mark.parametrize(
    ("counts", "status"),
    [
        (BatchJobCounts(completed=2), "completed"),
        (BatchJobCounts(), "completed"),
        (BatchJobCounts(completed=1, failed=1), "partial"),
        (BatchJobCounts(completed=1, cancelled=1), "partial"),
        (BatchJobCounts(failed=2), "failed"),
        (BatchJobCounts(cancelled=2), "failed"),
        (BatchJobCounts(failed=1, cancelled=1), "failed"),
    ],
)
def test_final_status_follows_job_counts(counts: BatchJobCounts, status: str) -> None:
    assert compute_terminal_status(counts) == status
    end = BatchFinished(status=compute_terminal_status(counts), counts=counts, summary=SUMMARY)
    given(submitted).when(FinishBatch(counts, SUMMARY)).then(end)
    assert given(submitted, end).state.status == status


@parametrize_histories(EXISTING)
def test_repeated_archive_and_unarchive_record_nothing(history: list[Event]) -> None:
    given(*history).when(Archive("user:bob", "old")).then(archived)
    given(*history, archived).when(Archive("user:bob")).then_no_events()
    given(*history, archived).when(Unarchive("user:bob")).then(BatchUnarchived(by="user:bob"))
    given(*history).when(Unarchive("user:bob")).then_no_events()
    given(*history, archived, BatchUnarchived(by="user:bob")).when(Unarchive("user:bob")).then_no_events()


@pytest.mark.parametrize("history", [[submitted], [submitted, paused], [submitted, finished, reopened]])
def test_delete_unfinished_batch_is_rejected(history: list[Event]) -> None:
    given(*history).when(Delete("user:bob")).then_rejected(InvalidState, "cancel it before you delete it")


def test_delete_finished_batch_succeeds() -> None:
    given(submitted, finished).when(Delete("user:bob", "old")).then(deleted)


@for_all(st.lists(st.sampled_from(ALL_COMMANDS), max_size=30))
def test_any_commands_finish_batch_once_before_reopening(commands: list[BatchCommand]) -> None:
    state = batch.evolve(None, submitted)
    history: list[BatchEvent] = []
    for command in commands:
        try:
            decided = batch.decide(command, state)
        except CommandRejected:
            continue
        assert not any(isinstance(event, BatchDeleted) for event in history), (
            "an event was recorded for a deleted batch"
        )
        for event in decided:
            state = batch.evolve(state, event)
        history += decided
    ends = [event for event in history if isinstance(event, BatchFinished | BatchReopened)]
    assert [type(event) for event in ends] == [(BatchFinished, BatchReopened)[turn % 2] for turn in range(len(ends))]
    pauses = [event for event in history if isinstance(event, BatchPaused | BatchResumed)]
    assert [type(event) for event in pauses] == [(BatchPaused, BatchResumed)[turn % 2] for turn in range(len(pauses))]
