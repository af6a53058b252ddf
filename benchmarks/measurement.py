"""Compare measurements in alternating order within one run, and print the results.

The speed of the machine varies, so only ratios are meaningful. Baseline and Jobledger alternate, each round yields one
ratio, and the result is the median of all rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Literal

from pymongo.asynchronous.collection import AsyncCollection
from rich.console import Console
from rich.table import Table

from jobledger.ledger.mongo.connection import Connection, Database, Document
from jobledger.ledger.store.event_store import EventStore

RateFunction = Callable[[], Awaitable[float]]
"""Runs one measurement and returns operations per second."""


@dataclass(frozen=True, slots=True)
class Result:
    """Result of one benchmark.

    Attributes:
        name: What is measured.
        baseline: Value of the plain driver.
        jobledger: Value of Jobledger.
        target: The condition, such as "≥ 0.7".
        is_met: Whether the condition is met.
        ratio: Jobledger divided by baseline, or None without a baseline.
        spread: Lowest and highest ratio of the rounds. For latencies: the ratios of the medians and 99th percentiles.
        notes: Remarks to print below the table.
    """

    name: str
    baseline: str
    jobledger: str
    target: str
    is_met: bool
    ratio: float | None = None
    spread: tuple[float, float] | None = None
    notes: Sequence[str] = ()


async def compare_rates(
    name: str,
    baseline: RateFunction,
    jobledger: RateFunction,
    *,
    rounds: int,
    min_ratio: float,
) -> Result:
    """Compare two rates (per second), higher is better. A warm-up round is not counted."""
    pairs = await _alternate(baseline, jobledger, rounds)
    ratios = sorted(jobledger_rate / baseline_rate for baseline_rate, jobledger_rate in pairs)
    ratio = statistics.median(ratios)
    return Result(
        name,
        f"{statistics.median(baseline_rate for baseline_rate, _ in pairs):,.0f}/s",
        f"{statistics.median(jobledger_rate for _, jobledger_rate in pairs):,.0f}/s",
        f"≥ {min_ratio}",
        ratio >= min_ratio,
        ratio,
        (ratios[0], ratios[-1]),
    )


def compare_latencies(
    name: str, baseline: Sequence[float], jobledger: Sequence[float], *, max_ratio: float, percent: Literal[50, 99] = 50
) -> Result:
    """Compare the medians or the 99th percentiles of two sets of latencies in seconds, lower is better."""
    median = statistics.median(jobledger) / statistics.median(baseline)
    tail = compute_percentile(jobledger, 99) / compute_percentile(baseline, 99)
    ratio = median if percent == 50 else tail
    return Result(
        name,
        format_latencies(baseline),
        format_latencies(jobledger),
        f"≤ {max_ratio}",
        ratio <= max_ratio,
        ratio,
        (median, tail),
        (f"the second number of the spread is the ratio of the 99th percentiles ({len(jobledger)} samples each)",),
    )


async def _alternate(baseline: RateFunction, jobledger: RateFunction, rounds: int) -> list[tuple[float, float]]:
    """Return the two rates of each round. The order changes with each round."""
    await baseline()
    await jobledger()
    pairs = []
    for number in range(rounds):
        if number % 2:
            jobledger_rate = await jobledger()
            pairs.append((await baseline(), jobledger_rate))
        else:
            pairs.append((await baseline(), await jobledger()))
    return pairs


def compute_percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def format_latencies(seconds: Sequence[float]) -> str:
    """Return the median and the 99th percentile as text."""
    return f"p50 {compute_percentile(seconds, 50) * 1000:.2f} ms, p99 {compute_percentile(seconds, 99) * 1000:.2f} ms"


@asynccontextmanager
async def open_empty_database(connection: Connection) -> AsyncIterator[tuple[Database, EventStore]]:
    """Yield the empty database of the benchmarks and its event store."""
    async with connection.create_client() as client:
        await client.drop_database(connection.db_name)
        db = client[connection.db_name]
        event_store = EventStore(db)
        await event_store.prepare()
        yield db, event_store
        await event_store.aclose()


async def measure_rate(count: int, work: Awaitable[object]) -> float:
    """Await work that consists of `count` operations. Return the rate per second."""
    begin = time.perf_counter()
    await work
    return count / (time.perf_counter() - begin)


async def read_in_order(collection: AsyncCollection[Document]) -> None:
    """Read events or their copies with a plain sorted cursor."""
    async for _ in collection.find({"_id": {"$gt": 0}}, sort=[("_id", 1)]):
        pass


def print_results(results: Sequence[Result]) -> None:
    """Print the results as a table, then their notes."""
    table = Table("benchmark", "plain driver", "Jobledger", "ratio", "spread", "target", "")
    for result in results:
        ratio = "" if result.ratio is None else f"{result.ratio:.2f}"
        spread = "" if result.spread is None else f"{result.spread[0]:.2f} – {result.spread[1]:.2f}"
        verdict = "met" if result.is_met else "[bold]missed[/bold]"
        table.add_row(result.name, result.baseline, result.jobledger, ratio, spread, result.target, verdict)
    console = Console(width=160)
    console.print(table)
    for result in results:
        for note in result.notes:
            console.print(f"{result.name}: {note}")
