"""`jobledger views …`: rebuild the views from the log, or compare them with it."""

from __future__ import annotations

import asyncio
from typing import Annotated

import typer

from jobledger.cli.command_classes import CommandApp
from jobledger.cli.commands.options import ConfigOption, JsonOption
from jobledger.cli.exit_codes import EXIT_FAILED
from jobledger.cli.output.progress import show_progress_bar
from jobledger.cli.output.terminal_text import print_result
from jobledger.cli.runtime import open_configured_connection

app = CommandApp(help="Rebuild and check views (needs access to the database)")
ViewOption = Annotated[
    list[str] | None, typer.Option("--view", help="Only this view, e.g. jobs or statistics. Repeatable")
]


@app.command()
def rebuild(config: ConfigOption = None, view: ViewOption = None, as_json: JsonOption = False) -> None:
    """Rebuild all views from the log, then switch over atomically

    Jobs and readers continue meanwhile. Run an interrupted rebuild again to continue it.

    Examples:
        jobledger views rebuild
        jobledger views rebuild --view statistics
    """
    from jobledger.cli.administration import view_maintenance

    with open_configured_connection(config) as (_, connection), show_progress_bar("rebuilding views") as on_progress:
        position = asyncio.run(view_maintenance.rebuild_views(connection, view, on_progress=on_progress))
    text = f"Rebuilt {', '.join(view) if view else 'all views'} up to position {position}."
    print_result({"position": position, "views": view}, text, as_json=as_json)


@app.command()
def check(config: ConfigOption = None, view: ViewOption = None, as_json: JsonOption = False) -> None:
    """Compare views with the log

    Exits with 1 if any document differs. Changes nothing that readers see.

    Examples:
        jobledger views check
        jobledger views check --view jobs --json
    """
    from jobledger.cli.administration import view_maintenance

    with open_configured_connection(config) as (_, connection), show_progress_bar("comparing views") as on_progress:
        comparison = asyncio.run(view_maintenance.compare_views(connection, view, on_progress=on_progress))
    lines = view_maintenance.format_comparison(comparison)
    print_result(view_maintenance.build_comparison_json(comparison), *lines, as_json=as_json)
    raise typer.Exit(EXIT_FAILED if comparison.difference_count else 0)
