"""Result of one check of `jobledger doctor`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from rich.text import Text

from jobledger.cli.output.documents import Rows


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


def build_result_rows(results: Iterable[CheckResult]) -> Rows:
    """Yield the header and one row for each result."""
    yield ("CHECK", "STATUS", "DETAIL")
    for result in results:
        status = Text("ok", style="green") if result.is_ok else Text("problem", style="red")
        yield (result.name, status, result.detail if result.is_ok else f"{result.detail}. {result.advice}")


def build_results_json(results: Iterable[CheckResult]) -> list[dict[str, Any]]:
    """Return the results for programs."""
    return [{**asdict(result), "advice": result.advice if not result.is_ok else None} for result in results]
