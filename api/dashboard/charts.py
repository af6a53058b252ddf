"""api: bars for numbers over time. Pure; colours are the style sheet's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

CHART_HEIGHT: Final = 100
BAR_SPACING: Final = 10
"""From one bar to the next, in the drawing's own units."""


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar, or a part of one, in units of the drawing; `kind` is its class."""

    x: float
    y: float
    height: float
    css_class: str


def stack_bars(values: Sequence[Sequence[tuple[str, float]]]) -> tuple[list[Bar], float]:
    """Return bars, each of parts that stand on each other, as high as the highest allows, and how much that is."""
    most = max((sum(amount for _, amount in parts) for parts in values), default=0)
    bars: list[Bar] = []
    for place, parts in enumerate(values):
        below = 0.0
        for kind, amount in parts:
            if amount <= 0:
                continue
            height = amount / most * CHART_HEIGHT
            bars.append(Bar(place * BAR_SPACING, round(CHART_HEIGHT - below - height, 2), round(height, 2), kind))
            below += height
    return bars, most
