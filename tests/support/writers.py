"""Processes that append to one log until they are killed and record the acknowledged events."""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import random
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path

import structlog

from jobledger.ledger.domain.commands import ChangeAccess, SubmitBatch, SubmitJob
from jobledger.ledger.domain.errors import StreamBusy
from jobledger.ledger.domain.events import BatchSubmitted, RecordedEvent
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import create_batch_id, create_job_id, create_streams, handle_command
from jobledger.ledger.store.event_store import EventStore
from tests.support.event_examples import ACCESS, make_job_submitted
from tests.support.ledger_setup import EVENT_METADATA, open_ledger

# Forked from a process with loaded modules, so that a writer starts within milliseconds.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.writers"])
SINGLE_APPEND_TASKS = 12  # tasks that append single events, which the appender combines
MAX_BATCH_JOBS = 20


def start_writer(connection: Connection, shared: Sequence[str], acknowledged: Path) -> BaseProcess:
    """Start a process that appends to its own and to `shared` streams and writes event IDs to `acknowledged`."""
    process = _context.Process(target=_main, args=(connection, tuple(shared), acknowledged), daemon=True)
    process.start()
    return process


def _main(connection: Connection, shared: Sequence[str], acknowledged: Path) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with acknowledged.open("ab", buffering=0) as acknowledgements:
        asyncio.run(_write(connection, shared, acknowledgements.fileno()))


async def _write(connection: Connection, shared: Sequence[str], descriptor: int) -> None:
    async with (
        open_ledger(connection, EventStoreLimits(), with_change_stream=False) as ledger,
        asyncio.TaskGroup() as writing,
    ):
        for _ in range(SINGLE_APPEND_TASKS):
            writing.create_task(_append_single_events(ledger.event_store, descriptor))
        writing.create_task(_submit_batches(ledger.event_store, descriptor))
        for stream in shared:
            writing.create_task(_append_to_shared_stream(ledger.event_store, stream, descriptor))


def _record(descriptor: int, events: Sequence[RecordedEvent]) -> None:
    """Write with one system call, so that the line is complete even if the process is killed next."""
    os.write(descriptor, "".join(f"{event.event_id} {event.position}\n" for event in events).encode())


async def _append_single_events(event_store: EventStore, descriptor: int) -> None:
    while True:
        job_id = create_job_id()
        submitted = await handle_command(event_store, job_id, SubmitJob(make_job_submitted()), meta=EVENT_METADATA)
        _record(descriptor, submitted.events)
        changed = await handle_command(
            event_store,
            job_id,
            ChangeAccess("user:alice", ACCESS),
            meta=EVENT_METADATA,
            stream_state=submitted.stream_state,
        )
        _record(descriptor, changed.events)


async def _submit_batches(event_store: EventStore, descriptor: int) -> None:
    while True:
        batch_id, job_ids = create_batch_id(), [create_job_id() for _ in range(random.randint(1, MAX_BATCH_JOBS))]
        batch = SubmitBatch(BatchSubmitted(total_jobs=len(job_ids), job_ids=job_ids, user_id="alice"))
        jobs = [(job_id, SubmitJob(make_job_submitted(batch_id=batch_id))) for job_id in job_ids]
        _record(descriptor, await create_streams(event_store, [(batch_id, batch), *jobs], meta=EVENT_METADATA))


async def _append_to_shared_stream(event_store: EventStore, stream: str, descriptor: int) -> None:
    while True:
        with suppress(StreamBusy):  # expected with many writers of one stream
            handled = await handle_command(
                event_store, stream, ChangeAccess(f"user:{os.getpid()}", ACCESS), meta=EVENT_METADATA
            )
            _record(descriptor, handled.events)
        await asyncio.sleep(random.uniform(0, 0.02))
