"""cli: `jobledger replay`: the views made anew from the log, or how everything stood at an earlier time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any, Final

import orjson
import typer
from rich.text import Text

from jobledger.cli.commands.log import AS_OF_HELP, parse_as_of, progress_bar
from jobledger.cli.formatting import format_timestamp
from jobledger.cli.runtime import ConfigOption, JsonOption, load_settings, open_any_database_server
from jobledger.cli.terminal_text import SafeConsole, SafeTable, echo, echo_json
from jobledger.ledger.domain.errors import ConfigurationError

if TYPE_CHECKING:
    from jobledger.ledger.mongo.connection import Connection

_SHOWN: Final = 50


def rebuild(
    config: ConfigOption = None,
    view: Annotated[
        list[str] | None, typer.Option("--view", help="Only this view, such as jobs or statistics. Repeatable.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Replace nothing: only tell what differs, and exit with 1 if anything does.")
    ] = False,
    as_of: Annotated[str | None, typer.Option("--as-of", help=f"Tell how everything stood then. {AS_OF_HELP}")] = None,
    until: Annotated[
        str | None, typer.Option("--until", help="With --as-of: and what had changed by then. As --as-of.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Make the views anew from the log, beside those that are read, and replace these at once.

    Work goes on meanwhile. What was interrupted is continued by the same command. With --as-of, nothing is made: the
    log tells what waited then, who worked on what, and how the batches stood.
    """
    from jobledger.cli import view_maintenance

    if until is not None and as_of is None:
        raise ConfigurationError("--until says by when, and --as-of since when: both are needed")
    if as_of is not None and (check or view):
        raise ConfigurationError("--as-of looks back and makes no views: it goes with neither --check nor --view")
    settings = load_settings(config)
    with open_any_database_server(settings) as uri:
        connection = settings.mongodb.make_connection(uri)
        if as_of is not None:
            _print_state(connection, as_of, until, as_json=as_json)
        elif check:
            with progress_bar("folding") as told:
                found = asyncio.run(view_maintenance.compare_views(connection, view, on_progress=told))
            if as_json:
                echo_json(orjson.dumps(view_maintenance.comparison_to_json(found)))
            else:
                echo(*view_maintenance.format_comparison(found))
            raise typer.Exit(1 if found.difference_count else 0)
        else:
            with progress_bar("folding") as told:
                position = asyncio.run(view_maintenance.rebuild_views(connection, view, on_progress=told))
            names = ", ".join(view) if view else "all views"
            if as_json:
                echo_json(orjson.dumps({"position": position, "views": view}))
            else:
                echo(f"Made anew, and in their place: {names}, up to position {position}.")


def _print_state(connection: Connection, as_of: str, until: str | None, *, as_json: bool) -> None:
    then = parse_as_of(as_of, "--as-of")
    later = None if until is None else parse_as_of(until, "--until")
    if isinstance(then, int) == isinstance(later, int) and later is not None and later < then:  # type: ignore[operator]  # alike
        raise ConfigurationError("--until is before --as-of: exchange them")
    with progress_bar("reading") as told:
        first, second, changed = asyncio.run(_read(connection, then, later, told))
    if as_json:
        echo_json(orjson.dumps({"then": first, "until": second, "changed": changed}, option=orjson.OPT_UTC_Z))
        return
    console = SafeConsole()
    _show(console, first)
    if second is not None:
        console.print()
        _show_changes(console, first, second, changed)


async def _read(
    connection: Connection, then: int | datetime, later: int | datetime | None, told: Callable[[int, int], None]
) -> tuple[dict[str, Any], dict[str, Any] | None, dict[str, list[str | None]]]:
    from jobledger.ledger.store.event_store import EventStore
    from jobledger.projections.engine.as_of import load_state_as_of

    async with connection.client() as client:
        return await load_state_as_of(EventStore(client[connection.db_name]), then, until=later, on_progress=told)


def _show(console: SafeConsole, stood: dict[str, Any]) -> None:
    if not stood["position"]:
        console.print("Nothing had happened yet.")
        return
    console.print(Text.assemble((f"Position {stood['position']}", "bold"), f", {format_timestamp(stood['time'])}"))
    console.print(", ".join(f"{number} {status}" for status, number in stood["jobs"].items()), highlight=False)
    if stood["oldest_pending_submitted_at"] is not None:
        console.print(
            f"The oldest that waited was submitted at {format_timestamp(stood['oldest_pending_submitted_at'])}.",
            highlight=False,
        )
    running = SafeTable("worker", "job", "type", "attempt", "since", title="At work", title_justify="left")
    for it in stood["running"][:_SHOWN]:
        name = it["job_id"] if not it["job_name"] else f"{it['job_id']} {it['job_name']}"
        running.add_row(it["worker_id"], name, it["job_type"], str(it["attempt"]), format_timestamp(it["claimed_at"]))
    if stood["running"]:
        console.print(running, highlight=False)
    active = [it for it in stood["batches"] if it["status"] == "processing"]
    batches = SafeTable("batch", "name", "jobs", "", title="Batches", title_justify="left")
    for it in active[:_SHOWN]:
        counts = ", ".join(f"{number} {status}" for status, number in it["jobs"].items())
        batches.add_row(it["batch_id"], it["batch_name"] or "", counts, "paused" if it["paused"] else "")
    if active:
        console.print(batches, highlight=False)
    console.print(f"{len(stood['batches'])} batches, {len(active)} of them not ended.", highlight=False)


def _show_changes(
    console: SafeConsole, first: dict[str, Any], second: dict[str, Any], changed: dict[str, list[str | None]]
) -> None:
    console.print(
        Text.assemble((f"Until position {second['position']}", "bold"), f", {format_timestamp(second['time'])}")
    )
    told = [
        f"{status} {first['jobs'][status]} → {number}"
        for status, number in second["jobs"].items()
        if number != first["jobs"][status]
    ]
    console.print(", ".join(told) or "The numbers are the same.", highlight=False)
    table = SafeTable("job", "was", "became")
    for job_id, (was, became) in list(changed.items())[:_SHOWN]:
        table.add_row(job_id, was or "not there", became or "deleted")
    if changed:
        console.print(table, highlight=False)
    if len(changed) > _SHOWN:
        console.print(f"… and {len(changed) - _SHOWN} more (--json shows all)", highlight=False)
