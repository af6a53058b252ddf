"""Test commands for many jobs: changes between reading and appending, rejections, and errors of the event store."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Collection
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pytest
from pydantic import create_model

from jobledger.api import bulk_commands as bulk
from jobledger.ledger.domain.commands import CancelJob, ClaimJob, Delete, SubmitJob
from jobledger.ledger.domain.errors import InvalidEvent, LedgerBusy, VersionConflict
from jobledger.ledger.domain.events import Event, EventMetadata, RecordedEvent
from jobledger.ledger.domain.statuses import JobStatus
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.ledger.store.appender import EventStoreLimits
from jobledger.ledger.store.command_handler import (
    Command,
    StreamState,
    create_job_id,
    handle_command,
    load_stream_state,
)
from jobledger.ledger.store.envelope import StreamAppend
from jobledger.ledger.store.event_store import EventStore
from tests.support.event_examples import make_job_submitted
from tests.support.ledger_setup import EVENT_METADATA, Ledger, open_ledger

BATCH_METADATA = EventMetadata("user:ada", "batch-1")
UNFINISHED: Collection[JobStatus] = ("pending", "processing")
cancel_jobs = partial(bulk.apply_to_jobs, command=CancelJob("user:ada"), meta=BATCH_METADATA, statuses=UNFINISHED)


class ConcurrentCommandStore(EventStore):
    """Handles another command after the first chunk of streams was read."""

    concurrent_command: tuple[str, Command] | None = None

    async def iterate_stream_batches(
        self, streams: Collection[str], *, exclude_types: Collection[str] = (), data_expression: Document | None = None
    ) -> AsyncGenerator[list[RecordedEvent], None]:
        async for chunk in super().iterate_stream_batches(
            streams, exclude_types=exclude_types, data_expression=data_expression
        ):
            if (concurrent_command := self.concurrent_command) is not None:
                self.concurrent_command = None
                await handle_command(self, *concurrent_command, meta=EVENT_METADATA)
            yield chunk


@pytest.fixture
async def ledger(mongodb_uri: str, db_name: str) -> AsyncIterator[Ledger]:
    async with open_ledger(
        Connection(mongodb_uri, db_name), with_change_stream=False, store_class=ConcurrentCommandStore
    ) as ledger:
        yield ledger


def handle_after_read(ledger: Ledger, job_id: str, command: Command) -> None:
    """Let the event store handle a command after the next read."""
    assert isinstance(ledger.event_store, ConcurrentCommandStore)
    ledger.event_store.concurrent_command = (job_id, command)


async def submit_jobs(event_store: EventStore, count: int) -> list[str]:
    job_ids = [create_job_id() for _ in range(count)]
    for job_id in job_ids:
        await handle_command(
            event_store,
            job_id,
            SubmitJob(make_job_submitted(batch_id="batch-1")),
            meta=EVENT_METADATA,
            stream_state=StreamState(),
        )
    return job_ids


async def test_bulk_cancel_reports_job_that_finished_meanwhile(ledger: Ledger) -> None:
    job_ids = await submit_jobs(ledger.event_store, 4)
    handle_after_read(ledger, job_ids[1], CancelJob("user:bob"))
    outcome = await cancel_jobs(ledger.event_store, job_ids)
    response = outcome.to_response()
    assert response["jobs"] == {"total": 4, "changed": 3, "unchanged": 0, "rejected": 1}
    [rejection] = response["rejections"]
    assert (rejection["job_id"], rejection["code"]) == (job_ids[1], "invalid_state")
    assert "finished jobs cannot be cancelled" in rejection["message"]
    assert outcome.position == await ledger.event_store.read_head_position()


async def test_bulk_cancel_decides_again_for_job_claimed_meanwhile(ledger: Ledger) -> None:
    job_ids = await submit_jobs(ledger.event_store, 2)
    handle_after_read(ledger, job_ids[0], ClaimJob("w", datetime.now(UTC)))
    outcome = await cancel_jobs(ledger.event_store, job_ids)
    assert outcome.event_counts == {"JobCancelRequested": 1, "JobCancelled": 1}
    assert outcome.rejections == []


async def test_bulk_cancel_skips_deleted_jobs(ledger: Ledger) -> None:
    job_ids = await submit_jobs(ledger.event_store, 3)
    await handle_command(ledger.event_store, job_ids[0], Delete("user:bob"), meta=EVENT_METADATA)
    handle_after_read(ledger, job_ids[1], Delete("user:bob"))
    outcome = await cancel_jobs(ledger.event_store, job_ids)
    assert (outcome.total, outcome.changed, outcome.rejections) == (1, 1, [])


async def test_bulk_delete_lists_first_rejections_and_counts_all(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "MAX_REJECTIONS_LISTED", 2)
    monkeypatch.setattr(bulk, "JOBS_PER_CHUNK", 2)
    job_ids = await submit_jobs(ledger.event_store, 5)
    for job_id in job_ids:
        await handle_command(ledger.event_store, job_id, ClaimJob("w", datetime.now(UTC)), meta=EVENT_METADATA)
    delete = Delete("user:ada")
    outcome = await bulk.apply_to_jobs(ledger.event_store, job_ids, delete, meta=BATCH_METADATA, statuses=UNFINISHED)
    response = outcome.to_response()
    assert response["jobs"] == {"total": 5, "changed": 0, "unchanged": 0, "rejected": 5}
    assert [rejection["job_id"] for rejection in response["rejections"]] == job_ids[:2]


async def test_bulk_cancel_rejects_busy_job_only(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    job_ids = await submit_jobs(ledger.event_store, 3)
    append = ledger.event_store.append

    async def append_unless_busy(*appends: StreamAppend) -> list[RecordedEvent]:
        if appends[0].stream == job_ids[1]:
            raise VersionConflict(job_ids[1], 1, 2)
        return await append(*appends)

    monkeypatch.setattr(ledger.event_store, "append", append_unless_busy)
    outcome = await cancel_jobs(ledger.event_store, job_ids)
    assert (outcome.total, outcome.changed) == (3, 2)
    rejections = [(rejection["job_id"], rejection["code"]) for rejection in outcome.rejections]
    assert rejections == [(job_ids[1], "write_contention")]


async def test_bulk_cancel_rejects_job_with_unknown_event_type(ledger: Ledger) -> None:
    job_ids = await submit_jobs(ledger.event_store, 2)
    unknown_event: type[Event] = create_model("JobRepainted", __base__=Event)
    head = (await load_stream_state(ledger.event_store, job_ids[0])).head
    await ledger.event_store.append(
        StreamAppend(job_ids[0], head, [unknown_event()], EVENT_METADATA, datetime.now(UTC))
    )
    outcome = await cancel_jobs(ledger.event_store, job_ids)
    assert (outcome.total, outcome.changed) == (2, 1)
    rejections = [(rejection["job_id"], rejection["code"]) for rejection in outcome.rejections]
    assert rejections == [(job_ids[0], "unreadable_event")]


async def test_bulk_cancel_with_invalid_event_raises_and_appends_nothing(ledger: Ledger) -> None:
    job_ids = await submit_jobs(ledger.event_store, 3)
    head = await ledger.event_store.read_head_position()
    with pytest.raises(InvalidEvent):
        await bulk.apply_to_jobs(
            ledger.event_store, job_ids, CancelJob("user:ada", "\ud800"), meta=BATCH_METADATA, statuses=UNFINISHED
        )
    assert await ledger.event_store.read_head_position() == head


async def test_bulk_cancel_on_busy_ledger_raises_and_can_be_repeated(mongodb_uri: str, db_name: str) -> None:
    limits = EventStoreLimits(max_pending_events=10)
    async with open_ledger(Connection(mongodb_uri, db_name), limits, with_change_stream=False) as ledger:
        job_ids = await submit_jobs(ledger.event_store, 100)
        with pytest.raises(LedgerBusy):
            await cancel_jobs(ledger.event_store, job_ids)
        head = await ledger.event_store.read_head_position()
        assert 100 < head < 200
    async with open_ledger(Connection(mongodb_uri, db_name), with_change_stream=False) as ledger:
        outcome = await cancel_jobs(ledger.event_store, job_ids)
        assert outcome.changed == 200 - head
        assert outcome.position == await ledger.event_store.read_head_position() == 200


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 1000])
async def test_bulk_cancel_handles_each_job_once_for_any_chunk_size(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch, chunk_size: int
) -> None:
    """A chunk may end inside a stream or between two streams."""
    job_ids = await submit_jobs(ledger.event_store, 4)
    for job_id in job_ids[:2]:
        await handle_command(ledger.event_store, job_id, ClaimJob("w", datetime.now(UTC)), meta=EVENT_METADATA)
    monkeypatch.setattr("jobledger.ledger.store.event_store._EVENTS_PER_READ", chunk_size)
    heads: list[int] = []
    iterate_stream_batches = EventStore.iterate_stream_batches

    async def iterate_and_record_heads(*arguments: Any, **options: Any) -> AsyncGenerator[list[RecordedEvent], None]:
        async for chunk in iterate_stream_batches(*arguments, **options):
            heads.append(await ledger.event_store.read_head_position())
            yield chunk

    monkeypatch.setattr(EventStore, "iterate_stream_batches", iterate_and_record_heads)
    outcome = await cancel_jobs(ledger.event_store, job_ids)
    assert (outcome.total, outcome.changed, outcome.rejections) == (4, 4, [])
    assert outcome.event_counts == {"JobCancelRequested": 2, "JobCancelled": 2}
    if chunk_size < 4:
        assert heads[-1] > heads[0], "the first jobs are changed before the last jobs are read"
