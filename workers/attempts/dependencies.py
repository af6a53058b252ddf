"""What all attempts of a worker share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.attempts.shared_step_finder import SharedStepFinder
from jobledger.workers.machine.health import WorkerHealth
from jobledger.workers.machine.scratch import ScratchDirectory
from jobledger.workers.results.path_reservations import PathReservations
from jobledger.workers.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class AttemptDependencies:
    """What a worker hands to each of its attempts. `processor_settings` are the sections `processors.<job_type>`."""

    event_store: EventStore
    file_store: FileStore
    settings: WorkerSettings
    processor_settings: Mapping[str, Mapping[str, Any]]
    shared_step_finder: SharedStepFinder
    path_reservations: PathReservations
    scratch: ScratchDirectory
    health: WorkerHealth
