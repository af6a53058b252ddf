"""benchmarks: how things are measured: side by side, in turns, in one run; and the table that comes out.

The machine may be busy with other things, and gets faster or slower: only ratios are worth something. So what is
compared takes turns, each round gives one ratio, and the median of the rounds is quoted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

RateFunction = Callable[[], Awaitable[float]]


@dataclass(frozen=True, slots=True)
class Result:
    """One claim and what came out. `aim` says on which side of which number.

    `ratio` is ours to the plain driver's, None where the plain driver has nothing of the kind.
    """

    name: str
    baseline: str
    jobledger: str
    ratio: float | None
    spread: tuple[float, float] | None
    target: str
    is_met: bool
    notes: Sequence[str] = field(default=())


async def compare_rates(
    name: str,
    baseline: RateFunction,
    jobledger: RateFunction,
    *,
    rounds: int,
    min_ratio: float,
    notes: Sequence[str] = (),
) -> Result:
    """Compare two rates (a second), where more is better. One round more is run first, and forgotten."""
    pairs = await _in_turns(baseline, jobledger, rounds)
    ratios = sorted(mine / theirs for theirs, mine in pairs)
    ratio = statistics.median(ratios)
    return Result(
        name,
        f"{statistics.median(theirs for theirs, _ in pairs):,.0f}/s",
        f"{statistics.median(mine for _, mine in pairs):,.0f}/s",
        ratio,
        (ratios[0], ratios[-1]),
        f"≥ {min_ratio}",
        ratio >= min_ratio,
        notes,
    )


def compare_latencies(name: str, baseline: Sequence[float], jobledger: Sequence[float], *, max_ratio: float) -> Result:
    """Compare two sets of delays in seconds, taken in turns, where less is better, by their medians."""
    ratio = statistics.median(jobledger) / statistics.median(baseline)
    tail = percentile(jobledger, 99) / percentile(baseline, 99)
    return Result(
        name,
        _milliseconds(baseline),
        _milliseconds(jobledger),
        ratio,
        (ratio, tail),
        f"≤ {max_ratio}",
        ratio <= max_ratio,
        (f"the second number of the spread is the ratio of the 99th percentiles ({len(jobledger)} each)",),
    )


async def _in_turns(plain: RateFunction, ours: RateFunction, rounds: int) -> list[tuple[float, float]]:
    await plain()
    await ours()
    pairs = []
    for number in range(rounds):
        if number % 2:
            mine = await ours()
            pairs.append((await plain(), mine))
        else:
            pairs.append((await plain(), await ours()))
    return pairs


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the value below which `percent` of the values lie."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * percent / 100))]


def _milliseconds(seconds: Sequence[float]) -> str:
    return f"p50 {percentile(seconds, 50) * 1000:.2f} ms, p99 {percentile(seconds, 99) * 1000:.2f} ms"


class Stopwatch:
    """`with Stopwatch() as watch: …` then `watch.rate(count)` per second."""

    def __enter__(self) -> Stopwatch:
        self._begin = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin

    def rate(self, count: int) -> float:
        return count / self.seconds


def print_results(results: Sequence[Result]) -> None:
    """Print the table."""
    table = Table("claim", "plain driver", "Jobledger", "ratio", "spread", "aim", "")
    for it in results:
        ratio = "" if it.ratio is None else f"{it.ratio:.2f}"
        spread = "" if it.spread is None else f"{it.spread[0]:.2f} – {it.spread[1]:.2f}"
        verdict = "reached" if it.is_met else "[bold]missed[/bold]"
        table.add_row(it.name, it.baseline, it.jobledger, ratio, spread, it.target, verdict)
    console = Console(width=160)
    console.print(table)
    for it in results:
        for note in it.notes:
            console.print(f"{it.name}: {note}")
