"""ledger: the rules of a batch. Its jobs are streams of their own; the projector reports when they ended. Pure."""

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
    """What the rules need to know of a batch."""

    spec: BatchSubmitted
    status: BatchStatus = "processing"
    paused: bool = False
    archived: bool = False
    deleted: bool = False


def decide(command: BatchCommand, batch: Batch | None) -> list[BatchEvent]:
    """Answer a command with the events it causes, or refuse it.

    Raises:
        NotFound, AlreadyExists, WrongState: the rules say no.
    """
    if isinstance(command, SubmitBatch):
        if batch is not None:
            raise AlreadyExists("a batch with this id exists already")
        return [command.batch]
    if batch is None or batch.deleted:
        raise NotFound("there is no such batch")
    match command:
        case PauseBatch():
            return [] if batch.paused else [BatchPaused(by=command.by, reason=command.reason)]
        case ResumeBatch():
            return [BatchResumed(by=command.by, reason=command.reason)] if batch.paused else []
        case FinishBatch():
            return _finish(command, batch)
        case ReopenBatch():
            return [] if batch.status == "processing" else [BatchReopened()]
        case ChangeAccess():
            return [BatchAccessChanged(by=command.by, access_control=command.access_control)]
        case Archive():
            return [] if batch.archived else [BatchArchived(by=command.by, reason=command.reason)]
        case Unarchive():
            return [BatchUnarchived(by=command.by, reason=command.reason)] if batch.archived else []
        case Delete():
            if batch.status == "processing":
                raise InvalidState("the batch is still processing: cancel it first")
            return [BatchDeleted(by=command.by, reason=command.reason)]
        case _:
            assert_never(command)


def _finish(command: FinishBatch, batch: Batch) -> list[BatchEvent]:
    """Whoever notices may say so, any number of them: only the first has an effect."""
    if batch.status != "processing":
        return []
    return [BatchFinished(status=final_status(command.counts), counts=command.counts, summary=command.summary)]


def final_status(counts: BatchCounts) -> Literal["completed", "partial", "failed"]:
    """Name the end of a batch (konzept.md, `update_batch_progress`): partial when some, but not all, were completed."""
    if counts.failed == counts.cancelled == 0:
        return "completed"
    return "partial" if counts.completed else "failed"


def evolve(batch: Batch | None, event: BatchEvent) -> Batch:
    """Return the batch as it is after the event. The log is trusted: nothing is refused here."""
    if isinstance(event, BatchSubmitted):
        return Batch(spec=event)
    if batch is None:
        raise NotFound(f"{type(event).__name__} in a stream that does not begin with BatchSubmitted")
    match event:
        case BatchPaused():
            return replace(batch, paused=True)
        case BatchResumed():
            return replace(batch, paused=False)
        case BatchFinished():
            return replace(batch, status=event.status)
        case BatchReopened():
            return replace(batch, status="processing")
        case BatchAccessChanged():
            return replace(batch, spec=batch.spec.model_copy(update={"access_control": event.access_control}))
        case BatchArchived():
            return replace(batch, archived=True)
        case BatchUnarchived():
            return replace(batch, archived=False)
        case BatchDeleted():
            return replace(batch, deleted=True)
        case _:
            assert_never(event)
