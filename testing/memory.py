"""The parts of a worker that use the database, in memory. The rest of an attempt is the code of the worker."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast

from jobledger.ledger.domain import job
from jobledger.ledger.domain.commands import JobCommand
from jobledger.ledger.domain.errors import InvalidEvent
from jobledger.ledger.domain.events import Event, EventMetadata
from jobledger.ledger.domain.job import Job
from jobledger.ledger.files.directory import DirectoryStore
from jobledger.ledger.store.command_handler import StreamState
from jobledger.ledger.store.envelope import StreamAppend, StreamHead, build_documents
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.attempts.attempt_writer import AttemptWriter, EventNotStorable
from jobledger.workers.attempts.dependencies import AttemptDependencies
from jobledger.workers.attempts.secret_filter import SecretFilter
from jobledger.workers.machine.health import WorkerHealth
from jobledger.workers.results.paths import normalize_path
from jobledger.workers.settings import WorkerSettings


class MemoryWriter(AttemptWriter):
    """Decides on commands as the event store does, and keeps the events.

    Args:
        claimed: The job after the claim.
        job_id: The ID of the job.
        on_fenced: As in `AttemptWriter`.
    """

    def __init__(self, claimed: Job, job_id: str, on_fenced: Callable[[], None]) -> None:
        no_secrets = SecretFilter({}, {}, {})
        super().__init__(cast("EventStore", None), no_secrets, StreamState(claimed), job_id, on_fenced)
        self.events: list[Event] = []

    @property
    def current_job(self) -> Job:
        """The job after the last event."""
        return cast("Job", self.stream_state.aggregate)

    async def append(self, command: JobCommand, previous_error: Exception | None = None) -> None:
        """Decide on a command and keep its events.

        Raises:
            EventNotStorable: An event cannot be stored.
        """
        async with self._write_lock:
            try:
                events = decide(self.current_job, command)
                append = StreamAppend(self.job_id, StreamHead(), events, EventMetadata(), datetime.now(UTC))
                build_documents(append, [])
            except InvalidEvent as error:
                raise EventNotStorable(str(error)) from error
            self.events += events
            self.stream_state = StreamState(evolve(self.current_job, events))


def decide(current: Job | None, command: JobCommand) -> list[Event]:
    """Return the events that a command causes."""
    return [*job.decide(command, current)]


def evolve(current: Job | None, events: list[Event]) -> Job:
    """Return the job after these events."""
    for event in events:
        current = job.evolve(current, cast("Any", event))
    assert current is not None  # noqa: S101 - the first event creates it
    return current


class _Clock:
    async def read_server_time(self) -> datetime:
        return datetime.now(UTC)


class _PathReservations:
    """Reserves any valid path: no other job exists."""

    async def reserve(self, path: str, job_id: str) -> str:
        return normalize_path(path)


class _SharedSteps:
    """Finds nothing: no other job exists."""

    async def find_shared_step(self, key: str, job_id: str, spec: object, *, max_age: timedelta) -> None:
        return None


def create_dependencies(directory: Path) -> AttemptDependencies:
    """Return the components of a worker that has no database. Result files are in `directory`."""
    store = DirectoryStore(directory, is_durable=False)
    store.root.mkdir()
    parts: Any = {
        "event_store": _Clock(),
        "file_store": store,
        "shared_step_finder": _SharedSteps(),
        "path_reservations": _PathReservations(),
        "scratch": None,  # a worker's directories; an attempt in a test has a temporary one
    }
    return AttemptDependencies(
        **parts,
        settings=WorkerSettings.model_construct(retry_base_seconds=5.0, retry_max_seconds=600.0),
        processor_settings={},
        secret_filter=SecretFilter({}, {}, {}),
        health=WorkerHealth(),
    )
