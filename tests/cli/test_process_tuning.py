"""Test the garbage collection of a process that runs for long."""

from __future__ import annotations

import asyncio
import errno
import gc
import mmap
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

from jobledger.cli.hosting import process_tuning
from jobledger.cli.hosting.process_tuning import collect_garbage_periodically
from tests.support.polling import poll_until


class Node:
    """An object that refers to itself, so that only the garbage collector frees it."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def without_automatic_collection() -> Iterator[None]:
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("without_automatic_collection")
@pytest.mark.parametrize("cause", ["time", "memory"])
async def test_unreachable_objects_are_freed_although_few_were_allocated(
    monkeypatch: pytest.MonkeyPatch, cause: str
) -> None:
    monkeypatch.setattr(process_tuning, "_CHECK_SECONDS", 0.01)
    monkeypatch.setattr(process_tuning, "_COLLECT_SECONDS", 0.2 if cause == "time" else 3600.0)
    collecting = asyncio.create_task(collect_garbage_periodically())
    node = weakref.ref(Node())
    await asyncio.sleep(0.05)
    assert node() is not None
    with mmap.mmap(-1, 64 * 1024 * 1024) as ballast:  # memory of the heap may be in use already, and free
        if cause == "memory":
            ballast.write(b"x" * len(ballast))
        await poll_until(lambda: node() is None)
    collecting.cancel()


async def test_collection_goes_on_without_a_free_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_path: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_text", fail)
    monkeypatch.setattr(process_tuning, "_CHECK_SECONDS", 0.01)
    monkeypatch.setattr(process_tuning, "_COLLECT_SECONDS", 0.05)
    collecting = asyncio.create_task(collect_garbage_periodically())
    node = weakref.ref(Node())
    await poll_until(lambda: node() is None)
    assert not collecting.done()
    collecting.cancel()
