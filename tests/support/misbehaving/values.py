"""Actions that return valid and invalid values, and use texts, log lines, warnings and steps to excess."""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import sys
import uuid
from collections.abc import Callable, Coroutine
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from jobledger.workers.processor import JobContext, ProcessorError, Results
from tests.support.misbehaving.endings import UnprintableError
from tests.support.misbehaving.processor import ACTIONS, action


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: float
    y: Any


class Node(BaseModel):
    name: str = "node"
    inner: list[Node] = []


def circular_list() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


def nested_list(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels - 1):
        value = [value]
    return value


def circular_model() -> Node:
    node = Node()
    node.inner.append(node)
    return node


def exponential_list() -> list[Any]:
    value: list[Any] = []
    for _ in range(60):
        value = [value, value]
    return value


REJECTED_VALUES: dict[str, tuple[Callable[[], Any], str | None]] = {
    "nan": (lambda: {"y": [0, float("nan")]}, ".y[1]"),
    "infinity": (lambda: float("-inf"), ""),
    "surrogate": (lambda: {"text": "half \ud800"}, ".text"),
    "surrogate key": (lambda: {"half \ud800": 1}, ""),
    "integer": (lambda: [2**53], "[0]"),
    "negative integer": (lambda: -(2**70), ""),
    "set": (lambda: {"when": {1, 2}}, ".when"),
    "bytes": (lambda: {"a": {"b": b"bytes"}}, ".a.b"),
    "integer key": (lambda: {"a": {1: 2}}, ".a"),
    "dollar key": (lambda: {"$a": 1}, ""),
    "NUL key": (lambda: {"a\0": 1}, ""),
    "circular list": (circular_list, "[0]"),
    "circular model": (circular_model, None),
    "depth": (lambda: nested_list(150), "[0]"),
    "exponential list": (exponential_list, None),
    "large": (lambda: "x" * 9_000_000, None),
    "control characters": (lambda: "\x01" * 2_000_000, None),
    "quotes": (lambda: '"' * 4_000_000, None),
    "decimal": (lambda: Decimal("1.5"), ""),
    "timedelta": (lambda: timedelta(1), ""),
    "complex": (lambda: 1j, ""),
    "object": (object, ""),
    "class": (lambda: Node, ""),
    "generator": (lambda: (i for i in range(3)), ""),
    "function": (lambda: len, ""),
    "exception": (lambda: UnprintableError(), ""),
}

ACCEPTED_VALUES: dict[str, tuple[Any, Any]] = {
    "tuple": ((1, (2, "x")), [1, [2, "x"]]),
    "datetime": (datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "2026-01-02T03:04:05+00:00"),
    "date": (date(2026, 1, 2), "2026-01-02"),
    "uuid": (uuid.UUID(int=7), "00000000-0000-0000-0000-000000000007"),
    "enum": ({"colour": Colour.RED}, {"colour": "red"}),
    "path": (Path("/tmp/x"), "/tmp/x"),
    "dataclass": (Point(1.5, [Point(2.0, None)]), {"x": 1.5, "y": [{"x": 2.0, "y": None}]}),
    "model": (Node(inner=[Node(name="leaf")]), {"name": "node", "inner": [{"name": "leaf", "inner": []}]}),
    "depth": (nested_list(90), nested_list(90)),
    "integers": ([2**53 - 1, -(2**53) + 1, True], [2**53 - 1, -(2**53) + 1, True]),
    "text": ("Grüße \U0001f600 \x00\x1b[31m", "Grüße \U0001f600 \x00\x1b[31m"),
}


@action
async def return_value(job: JobContext) -> Results:
    results = Results()
    results.metadata["value"] = REJECTED_VALUES[job.parameters.value][0]()
    return results


@action
async def step_output(job: JobContext) -> Results:
    async def step() -> Any:
        return REJECTED_VALUES[job.parameters.value][0]()

    await job.step("page", step)
    return Results()


@action
async def step_input(job: JobContext) -> Results:
    async def step(value: Any) -> Any:
        return None

    await job.step("page", step, REJECTED_VALUES[job.parameters.value][0]())
    return Results()


@action
async def return_accepted_values(job: JobContext) -> Results:
    outputs = {}
    for name, (value, _) in ACCEPTED_VALUES.items():

        async def step(value: Any) -> Any:
            return value

        outputs[name] = await job.step(name, step, value)
    return Results(metadata={"steps": outputs, "values": {name: value for name, (value, _) in ACCEPTED_VALUES.items()}})


def add_returning_action(name: str, value: Callable[[], Any]) -> None:
    async def run(job: JobContext) -> Any:
        return value()

    ACTIONS[name] = run


add_returning_action("return None", lambda: None)

add_returning_action("return dict", lambda: {"markdown": "x"})

add_returning_action("return class", lambda: Results)

add_returning_action("return wrong fields", lambda: Results().model_copy(update={"markdown": 7, "assets": [{}]}))

add_returning_action("return invalid", lambda: Results(**{"metadata": {1: 2}}))

add_returning_action("return many tokens", lambda: Results(tokens_used=2**60))

add_returning_action("nothing", Results)


@action
async def odd_texts(job: JobContext) -> Results:
    for text in ("half \ud800", "x" * 9_000_000, 7, None, UnprintableError(), b"bytes"):
        await job.log("info", text)  # type: ignore[arg-type]
        await job.report_progress(float("nan"), text)  # type: ignore[arg-type]
        await job.report_progress("much", text)  # type: ignore[arg-type]
        await job.warn(text)  # type: ignore[arg-type]
    await job.log("loud", "an unknown level")  # type: ignore[arg-type]
    return Results()


def run_in_new_loop(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(coroutine)


@action
async def everything_at_once(job: JobContext) -> Results:
    """Call every method hundreds of times concurrently, from tasks and from threads with their own event loops."""
    mismatches: list[str] = []

    async def use_every_method(number: int) -> None:
        async def output(number: int) -> dict[str, Any]:
            await asyncio.sleep(number % 7 / 1000)
            await job.warn(f"warning {number}") if number % 10 == 0 else None
            job.add_tokens(1)
            saved = await job.save(f"files/{job.job_id}/{number}", f"file {number}".encode(), "text/plain")
            return {"number": number, "file": saved.model_dump(), "filler": "x" * (number * 37 % 5000)}

        await job.log("info", f"line {number} " + "y" * (number % 300))
        await job.report_progress(number % 100, f"progress {number}")
        step = await job.step(f"step {number}", output, number, share=timedelta(days=1))
        if step["number"] != number or step["file"]["path"] != f"files/{job.job_id}/{number}":
            mismatches.append(f"{number} got {step}")

    tasks = [asyncio.create_task(use_every_method(number)) for number in range(150)]
    threads = [asyncio.to_thread(run_in_new_loop, use_every_method(number)) for number in range(150, 180)]
    await asyncio.gather(*tasks, *threads)
    return Results(metadata={"mismatches": mismatches})


@action
async def log_long_line(job: JobContext) -> Results:
    await job.log("info", "x" * 9_000_000)
    await job.log("info", "after")
    return Results()


@action
async def log_many_lines(job: JobContext) -> Results:
    for number in range(job.parameters.lines):
        await job.log("info", f"{number} " + "x" * job.parameters.width)
    return Results(metadata={"peak": peak_megabytes()})


def peak_megabytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("VmHWM"))


@action
async def print_many_lines(job: JobContext) -> Results:
    print("the first line")
    line = "x" * 99
    for _ in range(job.parameters.lines):
        print(line)
    print("to standard error", file=sys.stderr)
    return Results()


@action
async def print_endless_line(job: JobContext) -> Results:
    """Print megabytes without a line break, as a progress bar does."""
    for _ in range(job.parameters.lines):
        sys.stdout.write("x" * 99)
    return Results()


@action
async def one_step(job: JobContext) -> Results:
    async def output() -> int:
        return 1

    await job.step("page", output)
    return Results()


@action
async def finish_large_steps(job: JobContext) -> Results:
    async def output(size: int) -> str:
        return "x" * size

    sizes = [1_000_000] * 6 + [6_000_000] + [1] * 120
    await asyncio.gather(*(job.step(f"{n}", partial(output, size)) for n, size in enumerate(sizes)))
    return Results()


@action
async def log_and_finish_step(job: JobContext) -> Results:
    for number in range(150):
        await job.log("info", f"{number} ".ljust(9_000, "x"))
    await one_step(job)
    return Results()


WARNINGS = {"text": "w" * 5000, "control characters": "\x01" * 5000, "emoji": "\U0001f600" * 5000, "short": "w"}


@action
async def warn_many_times(job: JobContext) -> Results:
    text = WARNINGS[job.parameters.value]

    async def inner() -> None:
        for _ in range(job.parameters.lines):
            await job.warn(text)

    async def outer() -> None:
        await job.warn(text)
        await job.step("inner", inner)

    await job.step("outer", outer)
    await job.warn(text)
    return Results()


STEP_NAMES = ("s" * 300 + "a", "s" * 300 + "b", "\ud800", "?", "\ud801")


@action
async def use_similar_step_names(job: JobContext) -> Results:
    async def step(name: str) -> str:
        return ascii(name)

    outputs = [await job.step(name, partial(step, name)) for name in STEP_NAMES]
    if job.attempt == 1:
        raise ProcessorError("AGAIN", "again", transient=True)
    return Results(metadata={"outputs": outputs})
