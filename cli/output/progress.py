"""Progress of long commands on standard error."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from jobledger.cli.output.terminal_text import SafeConsole, echo

ProgressCallback = Callable[[int, int], None]
"""Called with the number of finished units and the total."""
_LINE_INTERVAL_SECONDS: Final = 5.0


@contextmanager
def show_progress_bar(title: str) -> Iterator[ProgressCallback]:
    """Show a progress bar on a terminal, or a line every few seconds elsewhere. Yield the function that updates it."""
    console = SafeConsole(stderr=True)
    if not console.has_terminal:
        last = time.monotonic()

        def print_progress(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _LINE_INTERVAL_SECONDS:
                last = time.monotonic()
                echo(f"{title}: {done} of {total}", err=True)

        yield print_progress
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
