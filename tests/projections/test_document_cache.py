"""What the projector has in memory is bounded by bytes, however many documents it is."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import UpdateJob
from jobledger.ledger.domain.events import AccessControl
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.projections.engine import chunk_loader, document_cache, rebuild, writer
from jobledger.projections.engine.chunk import Chunk
from jobledger.projections.engine.document_cache import MAX_CACHED_BYTES, DocumentCache, estimate_memory
from jobledger.projections.views import jobs, list_index
from tests.projections.test_rebuild import compared
from tests.support.role_runner import run_roles_in_process

NAMES = [f"{number:03}" + "x" * 197 for number in range(200)]
GROWING: Mapping[str, Any] = {
    "list_keys": NAMES * 7,
    "search_keys": NAMES * 7,
    "parameters": {"text": "x" * 60_000},
    "results": {"metadata": {"values": [[]] * 20_000}},
    "logs": [{"message": "x" * 10_000}] * 100,
    "steps": [{"step": "x" * 500, "warnings": ["x" * 500]}] * 1000,
    "step_files": ["x" * 64] * 10_000,
    "job_ids": ["job-" + "x" * 24] * 10_000,
    "attempts": [{"response": "x" * 4096}] * 50,
    "error": {"message": "x" * 60_000},
}


def small(**fields: Any) -> Document:
    return {
        "parameters": {"track": "Main"},
        "list_keys": ["1*"] * 10,
        "search_keys": ["1*a"] * 10,
        "results": None,
        **fields,
    }


@pytest.mark.parametrize("name", GROWING)
def test_whatever_makes_a_document_large_is_counted(name: str) -> None:
    cache = DocumentCache()
    document = small(**{name: GROWING[name]})
    assert estimate_memory(document) > 40_000 + estimate_memory(small())
    number = 0
    while cache.bytes + estimate_memory(document) <= MAX_CACHED_BYTES:
        cache.put(("jobs", str(number := number + 1)), document)
    cache.put(("jobs", "last"), document)
    cache.evict()
    assert cache.bytes <= MAX_CACHED_BYTES
    assert cache.get(("jobs", "1")) is None
    assert cache.get(("jobs", "last")) is document


def test_usual_documents_are_bounded_by_their_number() -> None:
    cache = DocumentCache()
    for number in range(document_cache.MAX_CACHED_DOCUMENTS + 1):
        cache.put(("jobs", str(number)), small())
    cache.evict()
    assert cache.get(("jobs", "0")) is None
    assert cache.get(("jobs", "1")) is not None
    cache.put(("jobs", "1"), None)
    assert cache.get(("jobs", "1")) is None
    cache.clear()
    assert cache.bytes == 0


def test_the_count_is_near_what_values_take_in_memory() -> None:
    lists: list[Any] = [[] for _ in range(20_000)]
    real = sys.getsizeof(lists) + sum(map(sys.getsizeof, lists))
    assert real / 2 < estimate_memory(small(parameters={"a": lists})) < 2 * real


async def test_chunks_that_concern_too_many_bytes_are_folded_in_parts(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loaded documents and new list index, live and in a rebuild."""
    async with run_roles_in_process(connection, store, projector=True) as here:
        large = [await here.submit({"text": "x" * 70_000}) for _ in range(10)]
        await here.wait_for_views()
    monkeypatch.setattr(chunk_loader, "MAX_LOADED_BYTES", 200_000)
    monkeypatch.setattr(writer, "MAX_LIST_INDEX_BYTES", 1_000_000)
    loaded: list[int] = []
    listed: list[int] = []
    write = writer.ProjectionWriter.write

    async def noted(self: writer.ProjectionWriter, chunk: Chunk, **given: Any) -> None:
        loaded.append(sum("large_fields" in job for job in chunk.loaded[jobs.NAME].values()))
        listed.append(
            sum(list_index.estimate_list_index_memory(job) for job in chunk.current[jobs.NAME].values() if job)
        )
        await write(self, chunk, **given)

    monkeypatch.setattr(writer.ProjectionWriter, "write", noted)
    async with run_roles_in_process(connection, store) as here:
        for job_id in large:
            await here.handle_commands(job_id, UpdateJob("user:a", priority=2))
        many = [await here.submit(access_control=AccessControl(read_access=NAMES)) for _ in range(10)]
    async with run_roles_in_process(connection, store, projector=True) as here:
        await here.wait_for_views()
        assert [(await here.load_job(job_id))["priority"] for job_id in large] == [2] * 10
        assert [(await here.load_job(job_id))["status"] for job_id in many] == ["pending"] * 10
        assert 0 < max(loaded) <= 3
        assert 0 < max(listed) < 2_500_000
        monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 10)
        assert await compared(connection) == []
