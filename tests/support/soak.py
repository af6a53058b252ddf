"""Files, order and delays of `make soak`. `JOBLEDGER_SEED` repeats a run.

python -m tests.support.soak    # print the files: those in docs/fault-matrix.md and those marked `soak_only`
"""

from __future__ import annotations

import asyncio
import functools
import os
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import pytest
from pymongo.asynchronous.collection import AsyncCollection

from tests.support.soak_only import IS_SOAK_RUN

ROOT: Final = Path(__file__).parents[2]
SEED: Final = os.environ.setdefault("JOBLEDGER_SEED", str(random.randrange(10**9))) if IS_SOAK_RUN else ""
"""From the environment, so that all processes of a run use the same seed."""
DELAYED_METHODS: Final = ("bulk_write", "delete_many", "find_one", "find_one_and_update", "insert_many", "update_one")
_LONGEST_DELAY_SECONDS: Final = 0.01
_DELAYED_SHARE: Final = 0.1
_FILE_NAME: Final = re.compile(r"`(tests/[\w/]+\.py)`")
_SOAK_MARK: Final = re.compile(r"^@soak_only|marks=soak_only", re.MULTILINE)


def list_soak_files() -> list[str]:
    """Return the test files that `make soak` runs."""
    named = _FILE_NAME.findall((ROOT / "docs/fault-matrix.md").read_text(encoding="utf-8"))
    files = (ROOT / "tests").rglob("test_*.py")
    marked = [str(file.relative_to(ROOT)) for file in files if _SOAK_MARK.search(file.read_text(encoding="utf-8"))]
    return sorted({*named, *marked})


def shuffle_tests(items: Sequence[pytest.Item], seed: str) -> list[pytest.Item]:
    """Return tests in random order. Those of one module stay together, because they share fixtures."""
    generator = random.Random(seed)
    modules: dict[str, list[pytest.Item]] = {}
    for item in items:
        modules.setdefault(item.nodeid.partition("::")[0], []).append(item)
    order = list(modules.values())
    generator.shuffle(order)
    for module_items in order:
        generator.shuffle(module_items)
    return [item for module_items in order for item in module_items]


def delay_database_calls(patch: pytest.MonkeyPatch, seed: str) -> None:
    """Delay a tenth of this process's database calls by some milliseconds, so that tasks interleave differently."""
    generator = random.Random(seed)

    def delay(method: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(method)
        async def call(*args: Any, **options: Any) -> Any:
            if generator.random() < _DELAYED_SHARE:
                await asyncio.sleep(generator.uniform(0, _LONGEST_DELAY_SECONDS))
            return await method(*args, **options)

        return call

    for name in DELAYED_METHODS:
        patch.setattr(AsyncCollection, name, delay(getattr(AsyncCollection, name)))


if __name__ == "__main__":
    print(*list_soak_files())
