"""The components and settings that all attempts of a worker share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.attempts.secret_filter import SecretFilter
from jobledger.workers.attempts.shared_step_finder import SharedStepFinder
from jobledger.workers.machine.health import WorkerHealth
from jobledger.workers.machine.scratch import ScratchDirectory
from jobledger.workers.results.path_reservations import PathReservations
from jobledger.workers.settings import WorkerSettings


@dataclass(frozen=True, slots=True)
class AttemptDependencies:
    """Passed to each attempt.

    Attributes:
        processor_settings: The sections `processors.<job_type>` of config.yaml, by job type.
    """

    event_store: EventStore
    file_store: FileStore
    settings: WorkerSettings
    processor_settings: Mapping[str, Mapping[str, Any]]
    secret_filter: SecretFilter
    shared_step_finder: SharedStepFinder
    path_reservations: PathReservations
    scratch: ScratchDirectory
    health: WorkerHealth
