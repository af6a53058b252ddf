"""`make soak` runs every test that the fault matrix names, each time in another order and with other delays."""

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
    found = set(soak.list_soak_files())
    assert len(rows) > 80
    for row in rows:
        assert any(f"`{path}`" in row for path in found), row
    missing = [path for path in found if not (ROOT / path).is_file()]
    assert not missing
    assert "tests/test_idle.py" in found, "marked `rarely`, and not in the matrix"
    assert "$$($(BIN)/python -m tests.support.soak)" in (ROOT / "Makefile").read_text(encoding="utf-8")


def test_shuffled_order_depends_on_the_seed_alone_and_keeps_modules_together() -> None:
    items: list[Any] = [SimpleNamespace(nodeid=f"tests/{module}.py::{n}") for module in "abc" for n in range(5)]
    orders = [[it.nodeid for it in soak.shuffle_tests(items, seed)] for seed in ("1", "1", "2")]
    assert orders[0] == orders[1] != orders[2]
    for order in orders:
        assert sorted(order) == sorted(it.nodeid for it in items)
        modules = [nodeid.partition("::")[0] for nodeid in order]
        assert len(dict.fromkeys(modules)) == 3
        assert modules == [module for module in dict.fromkeys(modules) for _ in range(5)]


async def test_delayed_calls_are_passed_on_and_their_delays_depend_on_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    delays: list[float] = []

    async def called(*given: Any, **options: Any) -> Any:
        return given, options

    async def slept(seconds: float) -> None:
        delays.append(seconds)

    monkeypatch.setattr(asyncio, "sleep", slept)
    found = []
    for _ in range(2):
        with monkeypatch.context() as patch:
            for name in soak.DELAYED_METHODS:
                patch.setattr(AsyncCollection, name, called)
            soak.delay_database_calls(patch, "7")
            for name in soak.DELAYED_METHODS * 20:
                assert await getattr(AsyncCollection, name)(1, two=2) == ((1,), {"two": 2})
        found.append(delays.copy())
        delays.clear()
    assert found[0] == found[1] != []
