"""`make soak` runs all tests that the fault matrix names, in random order and with random delays."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from tests.support import soak

ROOT = Path(__file__).parents[1]


def test_soak_runs_the_files_that_the_fault_matrix_names() -> None:
    matrix = (ROOT / "docs/fault-matrix.md").read_text(encoding="utf-8")
    rows = [line for line in matrix.splitlines() if line.startswith("| ") and "tests/" in line]
    files = set(soak.list_soak_files())
    assert len(rows) > 80
    for row in rows:
        assert any(f"`{path}`" in row for path in files), row
    missing = [path for path in files if not (ROOT / path).is_file()]
    assert not missing
    assert "tests/test_idle.py" in files, "it has a `soak_only` test, and is not in the matrix"
    assert "$$($(BIN)/python -m tests.support.soak)" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_shuffle_tests_with_one_seed_gives_one_order_by_module() -> None:
    items: list[Any] = [SimpleNamespace(nodeid=f"tests/{module}.py::{n}") for module in "abc" for n in range(5)]
    orders = [[item.nodeid for item in soak.shuffle_tests(items, seed)] for seed in ("1", "1", "2")]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == sorted(item.nodeid for item in items)
        modules = [nodeid.partition("::")[0] for nodeid in order]
        assert len(dict.fromkeys(modules)) == 3
        assert modules == [module for module in dict.fromkeys(modules) for _ in range(5)]


async def test_delayed_calls_are_forwarded_with_delays_from_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delays: list[float] = []

    async def return_arguments(*arguments: Any, **options: Any) -> Any:
        return arguments, options

    async def record_delay(seconds: float) -> None:
        delays.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", record_delay)
    runs = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            for name in soak.DELAYED_METHODS:
                patch.setattr(AsyncCollection, name, return_arguments)
            soak.delay_database_calls(patch, "7")
            for name in soak.DELAYED_METHODS * 20:
                assert await getattr(AsyncCollection, name)(1, two=2) == ((1,), {"two": 2})
        runs.append(delays.copy())
        delays.clear()
    assert runs[0] == runs[1] != []
