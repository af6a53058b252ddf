"""tests: processes that write to one log until they are killed, and keep a list of what was acknowledged."""

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
from jobledger.ledger.domain.errors import VersionConflict
from jobledger.ledger.domain.events import BatchSubmitted, Recorded
from jobledger.ledger.mongo.connection import Connection
from jobledger.ledger.store.command_handler import handle, handle_new, new_batch_id, new_job_id
from jobledger.ledger.store.event_store import EventLog, Limits
from tests.support.examples import ACCESS, a_job
from tests.support.ledgers import META, ledger_on

# Forked from a process that has everything imported, so that a writer writes within milliseconds of its start.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.support.writers"])
SINGLES = 12  # tasks that append one event after the other: what comes together goes together
MOST_JOBS = 20


def start_writer(connection: Connection, shared: Sequence[str], acknowledged: Path) -> BaseProcess:
    """Start a process that appends to streams of its own and to `shared` ones, and notes ids in `acknowledged`."""
    process = _context.Process(target=_main, args=(connection, tuple(shared), acknowledged), daemon=True)
    process.start()
    return process


def _main(connection: Connection, shared: Sequence[str], acknowledged: Path) -> None:
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    with acknowledged.open("ab", buffering=0) as notes:
        asyncio.run(_write(connection, shared, notes.fileno()))


async def _write(connection: Connection, shared: Sequence[str], notes: int) -> None:
    async with ledger_on(connection, Limits(), live=False) as ledger, asyncio.TaskGroup() as writing:
        for _ in range(SINGLES):
            writing.create_task(_singles(ledger.log, notes))
        writing.create_task(_batches(ledger.log, notes))
        for stream in shared:
            writing.create_task(_contended(ledger.log, stream, notes))


def _note(notes: int, events: Sequence[Recorded]) -> None:
    """One write call: it is in the kernel's hands, and complete, whoever is killed next."""
    os.write(notes, "".join(f"{event.event_id} {event.position}\n" for event in events).encode())


async def _singles(log: EventLog, notes: int) -> None:
    while True:
        job_id = new_job_id()
        submitted = await handle(log, job_id, SubmitJob(a_job()), meta=META)
        _note(notes, submitted.events)
        changed = await handle(log, job_id, ChangeAccess("alice", ACCESS), meta=META, known=submitted.known)
        _note(notes, changed.events)


async def _batches(log: EventLog, notes: int) -> None:
    while True:
        batch_id, job_ids = new_batch_id(), [new_job_id() for _ in range(random.randint(1, MOST_JOBS))]
        batch = SubmitBatch(BatchSubmitted(total_jobs=len(job_ids), job_ids=job_ids, user_id="alice"))
        jobs = [(job_id, SubmitJob(a_job(batch_id=batch_id))) for job_id in job_ids]
        _note(notes, await handle_new(log, [(batch_id, batch), *jobs], meta=META))


async def _contended(log: EventLog, stream: str, notes: int) -> None:
    while True:
        with suppress(VersionConflict):  # with so many writers of one stream some lose every race
            handled = await handle(log, stream, ChangeAccess(f"user:{os.getpid()}", ACCESS), meta=META)
            _note(notes, handled.events)
        await asyncio.sleep(random.uniform(0, 0.02))
