"""Run long blocking work in threads chunk by chunk, so that short work never waits for the end of long work."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
CooperativeWork = Generator[None, None, T]
"""Blocking work that yields after each chunk and returns its result."""


async def run_cooperatively(work: CooperativeWork[T], threads: ThreadPoolExecutor) -> T:
    """Run work chunk by chunk. After each chunk its thread is free for other work.

    If the caller is cancelled, the work stops after the current chunk and is closed. The caller does not wait for that.
    """
    while True:
        chunk = threads.submit(_run_chunk, work)
        try:
            result = await asyncio.wrap_future(chunk)
        except asyncio.CancelledError:
            chunk.add_done_callback(lambda _: _close(work, threads))
            raise
        if result is not None:
            return result[0]


def run_to_completion(work: CooperativeWork[T]) -> T:
    """Run work in this thread without interruption."""
    while (result := _run_chunk(work)) is None:
        pass
    return result[0]


def _run_chunk(work: CooperativeWork[T]) -> tuple[T] | None:
    """Run the next chunk. Return the result in a tuple if it was the last one."""
    try:
        next(work)
    except StopIteration as end:
        return (end.value,)
    return None


def _close(work: CooperativeWork[T], threads: ThreadPoolExecutor) -> None:
    with suppress(RuntimeError):  # the process is ending
        threads.submit(work.close)
