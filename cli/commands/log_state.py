"""`jobledger log state`: jobs, workers and batches at an earlier time, computed from the log."""

from __future__ import annotations

import asyncio
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer
from rich.text import Text

from jobledger.cli.formatting import format_timestamp
from jobledger.cli.options import AS_OF_HELP, ConfigOption, JsonOption, parse_as_of
from jobledger.cli.progress import ProgressCallback, progress_bar
from jobledger.cli.runtime import load_settings, open_any_database_server
from jobledger.cli.terminal_text import SafeConsole, SafeTable, echo_json
from jobledger.ledger.domain.errors import ConfigurationError

if TYPE_CHECKING:
    from jobledger.ledger.mongo.connection import Connection

_MAX_ROWS: Final = 50
State = dict[str, Any]
Changes = dict[str, list[str | None]]
"""Statuses of a job at both points, by job ID. None: the job did not exist."""


def state(
    as_of: Annotated[str, typer.Option("--as-of", help=AS_OF_HELP)],
    until: Annotated[
        str | None, typer.Option("--until", help="Also show changes between --as-of and this point")
    ] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the state of jobs, workers and batches at an earlier time

    Reads the log only; views are not used.
    """
    first_point = parse_as_of(as_of, "--as-of")
    second_point = None if until is None else parse_as_of(until, "--until")
    if _is_before(second_point, first_point):
        raise ConfigurationError("--until is before --as-of: swap them.")
    settings = load_settings(config)
    with open_any_database_server(settings) as uri, progress_bar("reading the log") as on_progress:
        connection = settings.mongodb.make_connection(uri)
        first, second, changes = asyncio.run(_load(connection, first_point, second_point, on_progress))
    if as_json:
        content = {"as_of": first, "until": second, "changes": changes}
        echo_json(orjson.dumps(content, option=orjson.OPT_UTC_Z))
        return
    console = SafeConsole()
    print_state(console, first)
    if second is not None:
        console.print()
        print_changes(console, first, second, changes)


def _is_before(point: int | datetime | None, other: int | datetime) -> bool:
    """Return whether two points of the same kind are in this order. A position and a time cannot be compared."""
    if isinstance(point, int) and isinstance(other, int):
        return point < other
    return isinstance(point, datetime) and isinstance(other, datetime) and point < other


async def _load(
    connection: Connection, as_of: int | datetime, until: int | datetime | None, on_progress: ProgressCallback
) -> tuple[State, State | None, Changes]:
    from jobledger.ledger.store.event_store import EventStore
    from jobledger.projections.engine.as_of import load_state_as_of

    async with connection.client() as client:
        event_store = EventStore(client[connection.db_name])
        return await load_state_as_of(event_store, as_of, until=until, on_progress=on_progress)


def print_state(console: SafeConsole, state: State) -> None:
    """Print a state as tables."""
    if not state["position"]:
        console.print("The log was empty.")
        return
    console.print(Text.assemble((f"Position {state['position']}", "bold"), f", {format_timestamp(state['time'])}"))
    console.print(", ".join(f"{count} {status}" for status, count in state["jobs"].items()), highlight=False)
    if (submitted_at := state["oldest_pending_submitted_at"]) is not None:
        console.print(f"Oldest pending job submitted at {format_timestamp(submitted_at)}", highlight=False)
    running = SafeTable("WORKER", "JOB", "TYPE", "ATTEMPT", "CLAIMED", title="Running jobs", title_justify="left")
    for job in state["running"][:_MAX_ROWS]:
        name = job["job_id"] if not job["job_name"] else f"{job['job_id']} {job['job_name']}"
        claimed_at = format_timestamp(job["claimed_at"])
        running.add_row(job["worker_id"], name, job["job_type"], str(job["attempt"]), claimed_at)
    if state["running"]:
        console.print(running, highlight=False)
    unfinished = [batch for batch in state["batches"] if batch["status"] == "processing"]
    batches = SafeTable("BATCH", "NAME", "JOBS", "", title="Running batches", title_justify="left")
    for batch in unfinished[:_MAX_ROWS]:
        counts = ", ".join(f"{count} {status}" for status, count in batch["jobs"].items())
        batches.add_row(batch["batch_id"], batch["batch_name"] or "", counts, "paused" if batch["paused"] else "")
    if unfinished:
        console.print(batches, highlight=False)
    console.print(f"{len(state['batches'])} batches, {len(unfinished)} of them running", highlight=False)


def print_changes(console: SafeConsole, first: State, second: State, changes: Changes) -> None:
    """Print which status counts and jobs changed between two states."""
    console.print(
        Text.assemble((f"Until position {second['position']}", "bold"), f", {format_timestamp(second['time'])}")
    )
    counts = [
        f"{status} {first['jobs'][status]} → {count}"
        for status, count in second["jobs"].items()
        if count != first["jobs"][status]
    ]
    console.print(", ".join(counts) or "No counts changed", highlight=False)
    table = SafeTable("JOB", "BEFORE", "AFTER")
    for job_id, (before, after) in list(changes.items())[:_MAX_ROWS]:
        table.add_row(job_id, before or "did not exist", after or "deleted")
    if changes:
        console.print(table, highlight=False)
    if len(changes) > _MAX_ROWS:
        console.print(f"… and {len(changes) - _MAX_ROWS} more (use --json to show all)", highlight=False)
