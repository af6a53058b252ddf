"""Reads of many streams together load only the fields that the response needs."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Collection
from datetime import UTC, datetime
from typing import Any

import bson
import pytest

from jobledger.api.auth.stream_access import StreamAccessCache
from jobledger.ledger.domain.commands import CancelJob, ClaimJob, FailAttempt
from jobledger.ledger.domain.events import ErrorInfo, EventMetadata, JobResults, LogEntry, ResultFile, ResultMetadata
from jobledger.ledger.mongo.connection import Document
from jobledger.ledger.store.command_handler import handle_command
from jobledger.ledger.store.event_store import EventStore
from jobledger.projections.engine.checkpoint import CheckpointFollower
from tests.api.conftest import Api
from tests.support.worker_reports import report_log, report_results, report_step

LARGE = "x" * 200_000
FILES = [ResultFile(path=f"{n}", sha256="a" * 64, size=1, media_type="a/b") for n in range(1000)]
NOON = datetime(2026, 2, 1, 12, tzinfo=UTC)


async def submit_large_batch(api: Api) -> tuple[str, list[str]]:
    """Submit a batch of large jobs: one completed, one failed, one cancelled, one pending."""
    batch = await api.submit_batch(*({"text": LARGE} for _ in range(4)))
    completed, failed, cancelled, _ = batch["job_ids"]

    async def handle_commands(job_id: str, *commands: Any) -> None:
        for command in commands:
            await handle_command(api.event_store, job_id, command, meta=EventMetadata("worker:w"))

    metadata = ResultMetadata(processed_at=NOON, duration=2.5, tokens_used=7, text=LARGE)
    lines = tuple(LogEntry(timestamp=NOON, level="info", message=LARGE) for _ in range(3))
    for job_id in (completed, failed):
        step = report_step("w", 1, "s", "k", {"text": LARGE}, 0.1)
        await handle_commands(job_id, ClaimJob("w", datetime.now(UTC)), report_log("w", 1, lines), step)
    await handle_commands(completed, report_results("w", 1, JobResults(files=FILES, metadata=metadata)))
    error = ErrorInfo(code="X", message=LARGE[:1000], details={"text": LARGE[:10_000]})
    await handle_commands(failed, FailAttempt("w", 1, error, None))
    await handle_commands(cancelled, CancelJob("user:a"))
    return batch["batch_id"], batch["job_ids"]


@pytest.fixture
def read_bytes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes in bytes of the batches of events that are read from several streams together."""
    sizes: list[int] = []
    iterate_stream_batches = EventStore.iterate_stream_batches

    async def record_sizes(
        self: EventStore,
        streams: Collection[str],
        *,
        exclude_types: Collection[str] = (),
        data_expression: Document | None = None,
    ) -> AsyncGenerator[Any, None]:
        async for batch in iterate_stream_batches(
            self, streams, exclude_types=exclude_types, data_expression=data_expression
        ):
            sizes.append(sum(len(bson.encode(event.document)) for event in batch))
            yield batch

    monkeypatch.setattr(EventStore, "iterate_stream_batches", record_sizes)
    return sizes


async def test_batch_as_of_equals_view_and_reads_few_bytes_of_large_jobs(
    api_without_worker: Api, read_bytes: list[int]
) -> None:
    batch_id, _ = await submit_large_batch(api_without_worker)
    head = await api_without_worker.event_store.read_head_position()
    now = (await api_without_worker.get(f"/api/events/batches/{batch_id}", head)).json()["batch"]
    assert read_bytes == []
    as_of = (await api_without_worker.get(f"/api/events/batches/{batch_id}?as_of={head}")).json()["batch"]
    assert as_of == now
    assert as_of["summary"] == {"duration": 2.5, "tokens_used": 7}
    assert 0 < sum(read_bytes) < 10_000


async def test_visibility_loads_access_with_few_bytes_of_large_jobs(
    api_without_worker: Api, read_bytes: list[int]
) -> None:
    batch_id, job_ids = await submit_large_batch(api_without_worker)
    stream_access = StreamAccessCache(api_without_worker.event_store, CheckpointFollower(api_without_worker.db))
    await stream_access.load_access([batch_id, *job_ids])
    assert 0 < sum(read_bytes) < 10_000
    accesses = [stream_access._access[stream] for stream in (batch_id, *job_ids)]
    for access in accesses:
        assert access is not None
        assert not access.is_unreadable
        assert (access.owner, access.version) == ("local", 1)
