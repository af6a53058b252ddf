"""`jobledger log state`: jobs and batches at an earlier time, computed from the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Annotated, Any, Final

import typer
from rich.text import Text

from jobledger.cli.commands.options import AS_OF_HELP, ConfigOption, JsonOption, parse_as_of
from jobledger.cli.output.formatting import format_count, format_timestamp
from jobledger.cli.output.progress import show_progress_bar
from jobledger.cli.output.terminal_text import SafeConsole, echo, print_json, print_table
from jobledger.cli.runtime import open_configured_connection, run_with_database
from jobledger.ledger.domain.errors import ConfigurationError

_MAX_ROWS: Final = 50
_WAITING_TEXTS: Final[Mapping[str, str]] = {
    "worker": "waiting for a worker",
    "due_time": "waiting for their start time",
    "retry": "waiting for a retry",
    "batch_paused": "in paused batches",
}
State = dict[str, Any]
Changes = dict[str, list[str | None]]
"""Statuses of a job at both points, by job ID. None: the job did not exist."""


def show_state(
    as_of: Annotated[str, typer.Option(help=AS_OF_HELP)],
    until: Annotated[str | None, typer.Option(help="Also show changes between --as-of and this point")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the state of jobs and batches at an earlier time

    Reads the log only; views are not used.

    Examples:
        jobledger log state --as-of 2026-02-01T09:30Z
        jobledger log state --as-of 1 --until 2 --json
    """
    from jobledger.ledger.store.event_store import EventStore
    from jobledger.projections.engine.as_of import load_state_as_of

    first_point = parse_as_of(as_of, "--as-of")
    second_point = None if until is None else parse_as_of(until, "--until")
    if _is_before(second_point, first_point):
        raise ConfigurationError("--until is before --as-of: swap them.")
    with open_configured_connection(config) as (_, connection), show_progress_bar("reading the log") as on_progress:
        first, second, changes = run_with_database(
            connection,
            lambda db: load_state_as_of(EventStore(db), first_point, until=second_point, on_progress=on_progress),
        )
    if as_json:
        print_json({"as_of": first, "until": second, "changes": changes})
        return
    print_state(first)
    if second is not None:
        echo("")
        print_changes(first, second, changes)


def _is_before(point: int | datetime | None, other: int | datetime) -> bool:
    """Return whether two points of the same kind are in this order. A position and a time cannot be compared."""
    if isinstance(point, int) and isinstance(other, int):
        return point < other
    return isinstance(point, datetime) and isinstance(other, datetime) and point < other


def print_state(state: State) -> None:
    """Print a state as tables."""
    if not state["position"]:
        echo("The log was empty.")
        return
    _print_point("Position", state)
    echo(_format_counts(state["jobs"]))
    if waiting := {_WAITING_TEXTS[kind]: count for kind, count in state["waiting_for"].items() if count}:
        echo(f"Pending jobs: {_format_counts(waiting)}")
    if (submitted_at := state["oldest_pending_submitted_at"]) is not None:
        echo(f"Oldest pending job submitted at {format_timestamp(submitted_at)}")
    if state["running"]:
        echo("Running jobs")
        print_table(
            [
                ("WORKER", "JOB", "TYPE", "ATTEMPT", "CLAIMED"),
                *map(_build_running_job_row, state["running"][:_MAX_ROWS]),
            ]
        )
    running = [batch for batch in state["batches"] if batch["status"] == "processing"]
    if running:
        echo("Running batches")
        print_table([("BATCH", "NAME", "JOBS", ""), *map(_build_batch_row, running[:_MAX_ROWS])])
    echo(f"{format_count(len(state['batches']), 'batch', 'batches')}, {len(running)} of them running")


def _print_point(label: str, state: State) -> None:
    line = Text.assemble((f"{label} {state['position']}", "bold"), f", {format_timestamp(state['time'])}")
    SafeConsole().print(line)


def _format_counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {status}" for status, count in counts.items())


def _build_running_job_row(job: State) -> Sequence[str]:
    name = f"{job['job_id']} {job['job_name'] or ''}".rstrip()
    return (job["worker_id"], name, job["job_type"], str(job["attempt"]), format_timestamp(job["claimed_at"]))


def _build_batch_row(batch: State) -> Sequence[str]:
    paused = "paused" if batch["paused"] else ""
    return (batch["batch_id"], batch["batch_name"] or "", _format_counts(batch["jobs"]), paused)


def print_changes(first: State, second: State, changes: Changes) -> None:
    """Print which status counts and jobs changed between two states."""
    _print_point("Until position", second)
    counts = [
        f"{status} {first['jobs'][status]} → {count}"
        for status, count in second["jobs"].items()
        if count != first["jobs"][status]
    ]
    echo(", ".join(counts) or "No counts changed")
    if changes:
        rows = [(job_id, before or "did not exist", after or "deleted") for job_id, (before, after) in changes.items()]
        print_table([("JOB", "BEFORE", "AFTER"), *rows[:_MAX_ROWS]])
    if len(changes) > _MAX_ROWS:
        echo(f"… and {len(changes) - _MAX_ROWS} more (use --json to show all)")
