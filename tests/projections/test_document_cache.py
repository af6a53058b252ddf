"""The memory of the projector is bounded by bytes: its cache of documents and its chunks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from jobledger.ledger.domain.commands import UpdateJob
from jobledger.ledger.domain.events import AccessControl
from jobledger.ledger.mongo.connection import Connection, Document
from jobledger.projections.engine import document_cache, document_loader, rebuild, writer
from jobledger.projections.engine.document_cache import MAX_CACHED_BYTES, DocumentCache, estimate_memory
from jobledger.projections.engine.view_changes import ViewChanges
from jobledger.projections.views import jobs, list_index
from tests.projections.rebuild_runner import compare_views
from tests.support.role_runner import run_roles_in_process

NAMES = [f"{number:03}" + "x" * 197 for number in range(200)]
LARGE_FIELDS: Mapping[str, Any] = {
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


def make_document(**fields: Any) -> Document:
    return {
        "parameters": {"track": "Main"},
        "list_keys": ["1*"] * 10,
        "search_keys": ["1*a"] * 10,
        "results": None,
        **fields,
    }


@pytest.mark.parametrize("name", LARGE_FIELDS)
def test_document_cache_with_a_large_field_evicts_by_bytes(name: str) -> None:
    cache = DocumentCache()
    document = make_document(**{name: LARGE_FIELDS[name]})
    assert estimate_memory(document) > 40_000 + estimate_memory(make_document())
    number = 0
    while cache.bytes + estimate_memory(document) <= MAX_CACHED_BYTES:
        cache.put(("jobs", str(number := number + 1)), document)
    cache.put(("jobs", "last"), document)
    cache.evict()
    assert cache.bytes <= MAX_CACHED_BYTES
    assert cache.get(("jobs", "1")) is None
    assert cache.get(("jobs", "last")) is document


def test_document_cache_with_small_documents_evicts_by_number() -> None:
    cache = DocumentCache()
    for number in range(document_cache.MAX_CACHED_DOCUMENTS + 1):
        cache.put(("jobs", str(number)), make_document())
    cache.evict()
    assert cache.get(("jobs", "0")) is None
    assert cache.get(("jobs", "1")) is not None
    cache.put(("jobs", "1"), None)
    assert cache.get(("jobs", "1")) is None
    cache.clear()
    assert cache.bytes == 0


def test_estimate_memory_is_near_the_size_in_memory() -> None:
    lists: list[Any] = [[] for _ in range(20_000)]
    actual = sys.getsizeof(lists) + sum(map(sys.getsizeof, lists))
    assert actual / 2 < estimate_memory(make_document(parameters={"a": lists})) < 2 * actual


async def test_chunk_of_too_many_bytes_is_applied_in_parts(
    connection: Connection, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The parts are bounded by loaded documents and by new list index rows, in the projector and in a rebuild."""
    async with run_roles_in_process(connection, store, projector=True) as roles:
        large_jobs = [await roles.submit({"text": "x" * 70_000}) for _ in range(10)]
        await roles.wait_for_views()
    monkeypatch.setattr(document_loader, "MAX_LOADED_BYTES", 200_000)
    monkeypatch.setattr(writer, "MAX_CHUNK_LIST_INDEX_BYTES", 1_000_000)
    large_jobs_per_part: list[int] = []
    list_index_bytes_per_part: list[int] = []
    write = writer.ProjectionWriter.write

    async def measure_and_write(self: writer.ProjectionWriter, changes: ViewChanges, **options: Any) -> None:
        large_jobs_per_part.append(sum("large_fields" in job for job in changes.loaded[jobs.NAME].values()))
        documents = [*changes.current[jobs.NAME].values(), *changes.list_rows.values()]
        list_index_bytes_per_part.append(sum(list_index.estimate_list_index_memory(it) for it in documents if it))
        await write(self, changes, **options)

    monkeypatch.setattr(writer.ProjectionWriter, "write", measure_and_write)
    async with run_roles_in_process(connection, store) as roles:
        for job_id in large_jobs:
            await roles.handle_commands(job_id, UpdateJob("user:a", priority=2))
        shared_jobs = [await roles.submit(access_control=AccessControl(read_access=NAMES)) for _ in range(10)]
    async with run_roles_in_process(connection, store, projector=True) as roles:
        await roles.wait_for_views()
        assert [(await roles.load_job(job_id))["priority"] for job_id in large_jobs] == [2] * 10
        assert [(await roles.load_job(job_id))["status"] for job_id in shared_jobs] == ["pending"] * 10
        assert 0 < max(large_jobs_per_part) <= 3
        assert 0 < max(list_index_bytes_per_part) < 2_500_000
        monkeypatch.setattr(rebuild, "CHUNK_EVENTS", 10)
        assert await compare_views(connection) == []
