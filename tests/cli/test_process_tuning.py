"""Test the garbage collection of a process that runs for long."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

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
async def test_unreachable_objects_are_freed_although_few_were_allocated() -> None:
    collecting = asyncio.create_task(collect_garbage_periodically())
    node = weakref.ref(Node())
    assert node() is not None
    await poll_until(lambda: node() is None)
    collecting.cancel()
