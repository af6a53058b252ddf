"""Tests of built-in inline processors: they must not block the worker's event loop, for any parameters."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from jobledger.api.http.bodies import MAX_CONTAINERS, MAX_VALUES
from jobledger.ledger.domain.limits import MAX_PARAMETERS_BYTES
from jobledger.workers.child.attempt import Assignment, run_attempt
from jobledger.workers.child.messages import Message
from jobledger.workers.registry import get_processor, load_processors

INLINE = [
    name
    for name, processor in load_processors().items()
    if processor.isolation == "inline" and processor.__module__.startswith("jobledger.workers.")
]
VALUES, CONTAINERS = MAX_VALUES - 10, MAX_CONTAINERS - 10


def nest(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


LARGEST: dict[str, Callable[[], Any]] = {
    "integers": lambda: [1] * VALUES,
    "floats": lambda: [3600.5] * VALUES,
    "nulls": lambda: [None] * VALUES,
    "texts": lambda: ["x"] * VALUES,
    "lists": lambda: [[]] * CONTAINERS,
    "objects": lambda: [{"b": 1}] * CONTAINERS,
    "names": lambda: {f"n{index}": 1 for index in range(VALUES // 2)},
    "deep": lambda: [nest(90)] * (CONTAINERS // 91),
    "one text": lambda: "<" * (MAX_PARAMETERS_BYTES - 1000),
    "one text of line breaks": lambda: "\n" * (MAX_PARAMETERS_BYTES // 2 - 1000),
    "one text beyond 16 bits": lambda: "\U0001f986" * (MAX_PARAMETERS_BYTES // 4 - 1000),
}


@pytest.mark.parametrize("value", LARGEST)
@pytest.mark.parametrize("job_type", INLINE)
async def test_inline_processor_with_largest_parameters_leaves_event_loop_free(
    job_type: str, value: str, tmp_path: Path
) -> None:
    parameters = {"value": LARGEST[value]()}
    assignment = Assignment(
        job_id="job-0",
        attempt=1,
        job_type=job_type,
        parameters=parameters,
        settings={},
        completed_steps={},
        attempt_dir=tmp_path / "attempt",
    )

    # CPU time of the thread of the event loop. Other load on the machine does not count.
    started_at = time.thread_time()
    json.loads(json.dumps(parameters))
    max_seconds = 0.2 + 3 * (time.thread_time() - started_at)
    started_at = time.thread_time()
    result = await run_attempt(assignment, get_processor(job_type), accept_message, lambda: False, post=lambda _: None)
    seconds = time.thread_time() - started_at

    assert result.kind == "completed", result
    assert seconds < max_seconds


async def accept_message(message: Message) -> Any:
    """Accept a message as a worker does."""
    return getattr(message, "path", None)
