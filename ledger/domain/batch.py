"""The decider of a batch. Its jobs have their own streams. The projector reports when all jobs are finished. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, assert_never

from jobledger.ledger.domain import commands, events
from jobledger.ledger.domain.errors import AlreadyExists, InvalidState, NotFound
from jobledger.ledger.domain.statuses import BatchStatus


@dataclass(frozen=True, slots=True)
class Batch:
    """The state of a batch that decisions need."""

    spec: events.BatchSubmitted
    status: BatchStatus = "processing"
    is_paused: bool = False
    is_archived: bool = False
    is_deleted: bool = False


def decide(command: commands.BatchCommand, batch: Batch | None) -> list[events.BatchEvent]:
    """Return the events that a command causes.

    Raises:
        NotFound: The batch does not exist, or was deleted.
        AlreadyExists: A batch with this ID exists.
        InvalidState: The batch's state does not allow the command.
    """
    if isinstance(command, commands.SubmitBatch):
        if batch is not None:
            raise AlreadyExists("a batch with this ID already exists")
        return [command.batch]
    if batch is None or batch.is_deleted:
        raise NotFound("the batch does not exist")
    match command:
        case commands.PauseBatch():
            return [] if batch.is_paused else [events.BatchPaused(by=command.by, reason=command.reason)]
        case commands.ResumeBatch():
            return [events.BatchResumed(by=command.by, reason=command.reason)] if batch.is_paused else []
        case commands.FinishBatch():
            if batch.status != "processing":  # several processes may report it; only the first report has an effect
                return []
            status = compute_terminal_status(command.counts)
            return [events.BatchFinished(status=status, counts=command.counts, summary=command.summary)]
        case commands.ReopenBatch():
            return [] if batch.status == "processing" else [events.BatchReopened()]
        case commands.ChangeAccess():
            return [events.BatchAccessChanged(by=command.by, access_control=command.access_control)]
        case commands.Archive():
            return [] if batch.is_archived else [events.BatchArchived(by=command.by, reason=command.reason)]
        case commands.Unarchive():
            return [events.BatchUnarchived(by=command.by, reason=command.reason)] if batch.is_archived else []
        case commands.Delete():
            if batch.status == "processing":
                raise InvalidState("the batch is still processing: cancel it before you delete it")
            return [events.BatchDeleted(by=command.by, reason=command.reason)]
        case _:
            assert_never(command)


def compute_terminal_status(counts: events.BatchJobCounts) -> Literal["completed", "partial", "failed"]:
    """Return the status of a batch whose jobs are finished (konzept.md, `update_batch_progress`).

    It is `partial` if only some jobs completed.
    """
    if counts.failed == counts.cancelled == 0:
        return "completed"
    return "partial" if counts.completed else "failed"


def evolve(batch: Batch | None, event: events.BatchEvent) -> Batch:
    """Return the batch after an event. Events of the log are trusted, so nothing is rejected here."""
    if isinstance(event, events.BatchSubmitted):
        return Batch(spec=event)
    if batch is None:
        raise NotFound(f"{type(event).__name__} in a stream that does not begin with BatchSubmitted")
    match event:
        case events.BatchPaused():
            return replace(batch, is_paused=True)
        case events.BatchResumed():
            return replace(batch, is_paused=False)
        case events.BatchFinished():
            return replace(batch, status=event.status)
        case events.BatchReopened():
            return replace(batch, status="processing")
        case events.BatchAccessChanged():
            return replace(batch, spec=batch.spec.model_copy(update={"access_control": event.access_control}))
        case events.BatchArchived():
            return replace(batch, is_archived=True)
        case events.BatchUnarchived():
            return replace(batch, is_archived=False)
        case events.BatchDeleted():
            return replace(batch, is_deleted=True)
        case _:
            assert_never(event)
