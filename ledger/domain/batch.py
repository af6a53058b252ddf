"""The decider of a batch. Its jobs have their own streams; the projector reports when they have ended. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, assert_never

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
from jobledger.ledger.domain.errors import AlreadyExists, InvalidState, NotFound
from jobledger.ledger.domain.events import (
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
    BatchUnarchived,
)
from jobledger.ledger.domain.statuses import BatchStatus


@dataclass(frozen=True, slots=True)
class Batch:
    """The state of a batch that decisions need."""

    spec: BatchSubmitted
    status: BatchStatus = "processing"
    is_paused: bool = False
    is_archived: bool = False
    is_deleted: bool = False


def decide(command: BatchCommand, batch: Batch | None) -> list[BatchEvent]:
    """Return the events that a command causes.

    Raises:
        NotFound: There is no such batch, or it was deleted.
        AlreadyExists: A batch with this ID exists.
        InvalidState: The batch's state does not allow the command.
    """
    if isinstance(command, SubmitBatch):
        if batch is not None:
            raise AlreadyExists("a batch with this ID already exists")
        return [command.batch]
    if batch is None or batch.is_deleted:
        raise NotFound("there is no such batch")
    match command:
        case PauseBatch():
            return [] if batch.is_paused else [BatchPaused(by=command.by, reason=command.reason)]
        case ResumeBatch():
            return [BatchResumed(by=command.by, reason=command.reason)] if batch.is_paused else []
        case FinishBatch():
            return _finish(command, batch)
        case ReopenBatch():
            return [] if batch.status == "processing" else [BatchReopened()]
        case ChangeAccess():
            return [BatchAccessChanged(by=command.by, access_control=command.access_control)]
        case Archive():
            return [] if batch.is_archived else [BatchArchived(by=command.by, reason=command.reason)]
        case Unarchive():
            return [BatchUnarchived(by=command.by, reason=command.reason)] if batch.is_archived else []
        case Delete():
            if batch.status == "processing":
                raise InvalidState("the batch is still processing: cancel it first")
            return [BatchDeleted(by=command.by, reason=command.reason)]
        case _:
            assert_never(command)


def _finish(command: FinishBatch, batch: Batch) -> list[BatchEvent]:
    """Finish the batch once. Any number of processes may report the end; only the first report has an effect."""
    if batch.status != "processing":
        return []
    return [BatchFinished(status=final_status(command.counts), counts=command.counts, summary=command.summary)]


def final_status(counts: BatchCounts) -> Literal["completed", "partial", "failed"]:
    """Return the final status of a batch (konzept.md, `update_batch_progress`): `partial` if only some jobs
    completed.
    """
    if counts.failed == counts.cancelled == 0:
        return "completed"
    return "partial" if counts.completed else "failed"


def evolve(batch: Batch | None, event: BatchEvent) -> Batch:
    """Return the batch after an event. Events of the log are trusted, so nothing is rejected here."""
    if isinstance(event, BatchSubmitted):
        return Batch(spec=event)
    if batch is None:
        raise NotFound(f"{type(event).__name__} in a stream that does not begin with BatchSubmitted")
    match event:
        case BatchPaused():
            return replace(batch, is_paused=True)
        case BatchResumed():
            return replace(batch, is_paused=False)
        case BatchFinished():
            return replace(batch, status=event.status)
        case BatchReopened():
            return replace(batch, status="processing")
        case BatchAccessChanged():
            return replace(batch, spec=batch.spec.model_copy(update={"access_control": event.access_control}))
        case BatchArchived():
            return replace(batch, is_archived=True)
        case BatchUnarchived():
            return replace(batch, is_archived=False)
        case BatchDeleted():
            return replace(batch, is_deleted=True)
        case _:
            assert_never(event)
