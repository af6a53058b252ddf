"""Result of one check of `jobledger doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from rich.text import Text

from jobledger.cli.output.terminal_text import SafeTable


@dataclass(frozen=True, slots=True)
class CheckResult:
    """Result of one check.

    Attributes:
        name: What was checked.
        is_ok: Whether it can stay as it is.
        detail: What the check found.
        advice: How to fix it, if it is not ok.
    """

    name: str
    is_ok: bool
    detail: str
    advice: str = ""


def build_results_table(results: Iterable[CheckResult]) -> SafeTable:
    """Return the table of results."""
    table = SafeTable("", "", "", show_header=False)
    for result in results:
        status = Text("ok", style="green") if result.is_ok else Text("problem", style="red")
        table.add_row(status, result.name, result.detail if result.is_ok else f"{result.detail}. {result.advice}")
    return table
