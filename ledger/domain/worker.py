"""The rules of a worker's stream: it starts, and then stops or is lost. Pure.

A worker has a new ID, and so a new stream, for each lease. The stream says when how many jobs of which types could run.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal, assert_never

from jobledger.ledger.domain import commands, events
from jobledger.ledger.domain.errors import AlreadyExists, NotFound

_PREFIX: Final = "worker-"


@dataclass(frozen=True, slots=True)
class Worker:
    """The state of a worker."""

    started: events.WorkerStarted
    status: Literal["running", "stopped", "lost"] = "running"


def build_worker_stream(worker_id: str) -> str:
    """Return the name of a worker's stream."""
    return f"{_PREFIX}{worker_id}"


def decide(command: commands.WorkerStreamCommand, worker: Worker | None) -> list[events.WorkerStreamEvent]:
    """Return the events that a command causes.

    Raises:
        AlreadyExists: A worker with this ID has started.
    """
    if isinstance(command, commands.StartWorker):
        if worker is not None:
            raise AlreadyExists("a worker with this ID has already started")
        return [command.worker]
    if worker is None or worker.status != "running":
        return []
    match command:
        case commands.StopWorker():
            return [events.WorkerStopped(reason=command.reason)]
        case commands.ReportLostWorker():
            return [events.WorkerLost(declared_by=command.declared_by)]
        case _:
            assert_never(command)


def evolve(worker: Worker | None, event: events.WorkerStreamEvent) -> Worker:
    """Return the worker after an event. Events of the log are trusted, so nothing is rejected here."""
    if isinstance(event, events.WorkerStarted):
        return Worker(event)
    if worker is None:
        raise NotFound(f"{type(event).__name__} in a stream that does not begin with WorkerStarted")
    match event:
        case events.WorkerStopped():
            return replace(worker, status="stopped")
        case events.WorkerLost():
            return replace(worker, status="lost")
        case _:
            assert_never(event)
