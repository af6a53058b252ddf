"""Bar charts of values over time. Pure; the style sheet sets the colors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CHART_HEIGHT: Final = 100
BAR_SPACING: Final = 10
"""Distance from one bar to the next, in SVG user units."""


@dataclass(frozen=True, slots=True)
class Bar:
    """A bar, or one part of a stacked bar, in SVG user units."""

    x: float
    y: float
    height: float
    css_class: str


def stack_bars(values: Sequence[Sequence[tuple[str, float]]]) -> tuple[list[Bar], float]:
    """Return stacked bars and the sum of the highest bar, which has the height of the chart.

    Args:
        values: For each bar its parts, from bottom to top: CSS class and amount.
    """
    max_value = max((sum(amount for _, amount in parts) for parts in values), default=0)
    bars: list[Bar] = []
    for index, parts in enumerate(values):
        base = 0.0
        for css_class, amount in parts:
            if amount <= 0:
                continue
            height = amount / max_value * CHART_HEIGHT
            bars.append(Bar(index * BAR_SPACING, round(CHART_HEIGHT - base - height, 2), round(height, 2), css_class))
            base += height
    return bars, max_value
