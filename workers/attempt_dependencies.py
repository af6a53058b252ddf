"""What all attempts of a worker share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jobledger.ledger.files.file_store import FileStore
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.child.confinement import ConfinementSettings
from jobledger.workers.machine_health import WorkerHealth
from jobledger.workers.path_reservations import PathReservations
from jobledger.workers.scratch import ScratchDirectory
from jobledger.workers.step_cache import StepCache


@dataclass(frozen=True, slots=True)
class ExecutorSettings:
    """Settings for running jobs.

    Attributes:
        file_store: Where result files go.
        processor_settings: The sections `processors.<job_type>` of config.yaml.
        memory_limit_mb: Address space of a job process in MiB.
        retry_base_seconds: Upper bound of the first retry delay. It doubles with each counted attempt.
        retry_max_seconds: Maximum retry delay.
        confinement: How job processes are confined.
    """

    file_store: FileStore
    processor_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    memory_limit_mb: int = 4096
    retry_base_seconds: float = 5.0
    retry_max_seconds: float = 600.0
    confinement: ConfinementSettings = field(default_factory=ConfinementSettings)


@dataclass(frozen=True, slots=True)
class AttemptDependencies:
    """What a worker hands to each of its attempts."""

    event_store: EventStore
    settings: ExecutorSettings
    step_cache: StepCache
    path_reservations: PathReservations
    scratch: ScratchDirectory
    health: WorkerHealth
