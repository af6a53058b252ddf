"""Record the start and the end of a worker in its own stream.

A worker that cannot record them works nevertheless: its claims are in the log as well. If the end is missing, a lease
reaper records that the worker is lost.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Collection
from importlib.metadata import version
from typing import Final

import structlog

from jobledger.ledger.domain.canonical_json import compute_canonical_digest
from jobledger.ledger.domain.commands import StartWorker, StopWorker
from jobledger.ledger.domain.errors import CommandRejected, LedgerBusy, LedgerUnavailable, StreamBusy, UnreadableEvent
from jobledger.ledger.domain.events import EventMetadata, WorkerStarted, WorkerStopReason
from jobledger.ledger.domain.worker import build_worker_stream
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.event_store import EventStore
from jobledger.workers.settings import WorkerSettings

_log = structlog.get_logger()
_SECONDS: Final = 2.0
"""Timeout. A worker must not wait long before it claims jobs, or when it stops."""


async def record_start(
    event_store: EventStore, worker_id: str, settings: WorkerSettings, job_types: Collection[str]
) -> None:
    """Record that a worker starts, if the database responds in time."""
    started = WorkerStarted(
        host=socket.gethostname(),
        slots=settings.max_concurrent,
        job_types=sorted(job_types),
        software_version=version("jobledger"),
        settings_digest=compute_canonical_digest(settings.model_dump(mode="json")),
    )
    await _record(event_store, worker_id, StartWorker(started))


async def record_stop(event_store: EventStore, worker_id: str, reason: WorkerStopReason) -> None:
    """Record that a worker stops, if the database responds in time."""
    await _record(event_store, worker_id, StopWorker(reason))


async def _record(event_store: EventStore, worker_id: str, command: StartWorker | StopWorker) -> None:
    meta = EventMetadata(f"worker:{worker_id}")
    try:
        async with asyncio.timeout(_SECONDS):
            await handle_command(event_store, build_worker_stream(worker_id), command, meta=meta)
    except (CommandRejected, LedgerBusy, LedgerUnavailable, StreamBusy, TimeoutError, UnreadableEvent) as error:
        _log.warning("start or end of the worker not recorded", worker_id=worker_id, error=repr(error))
