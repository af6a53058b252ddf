"""cli: what several commands do: read the settings, find the database, run roles.

What takes long to load is loaded where it is needed, here and in the modules of commands: those that only speak HTTP,
or tell what can be said, should not take a second to begin.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cli.settings import Settings
    from cli.wiring import Role
    from ledger.embedded import EmbeddedServer

ConfigOption = Annotated[
    Path | None, typer.Option("--config", envvar="JOBLEDGER_CONFIG", help="The settings. Without it: ./config.yaml.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result for programs.")]


def any_server(settings: Settings) -> AbstractContextManager[str]:
    """The database of these settings; an embedded one that does not run is started meanwhile."""
    from ledger.embedded import attach_or_start

    mongodb = settings.mongodb
    if not mongodb.embedded:
        return nullcontext(mongodb.uri.get_secret_value())
    return attach_or_start(mongodb.data_dir, port=mongodb.embedded_port, oplog_mb=mongodb.embedded_oplog_mb)


def settings_of(config: Path | None) -> Settings:
    """Return the settings, with logging set up by them; notices go to standard error.

    Raises:
        ConfigurationError: as `read_settings`.
    """
    from cli.settings import read_settings
    from cli.wiring import set_up_logging

    settings, notices = read_settings(config)
    set_up_logging(settings.logging)
    for notice in notices:
        typer.echo(f"note: {notice}", err=True)
    return settings


def run_roles(config: Path | None, wanted: frozenset[Role] | None = None) -> None:
    """Run roles until somebody stops the process; without `wanted`, all of them, and the database."""
    from cli.wiring import ALL_ROLES, database_server

    settings = settings_of(config)
    with database_server(settings, start=wanted is None) as (uri, server):
        asyncio.run(_serve(settings, uri, server, wanted or ALL_ROLES))


async def _serve(settings: Settings, uri: str, server: EmbeddedServer | None, wanted: frozenset[Role]) -> None:
    from cli.wiring import Stop, keep_running, roles

    stop = Stop()
    stop.listen()
    async with roles(settings, settings.mongodb.connection(uri), wanted, failed=stop.fail) as running:
        if running.url is not None:
            typer.echo(f"Jobledger answers at {running.url}  (Ctrl-C stops it)")
            typer.echo(f"Dashboard: {running.url}/monitoring/events")
        else:
            typer.echo(f"{' and '.join(sorted(wanted))} at work  (Ctrl-C stops it)")
        await keep_running(server, stop)
        typer.echo("Stopping: running jobs may end, the rest is given back …", err=True)
    if stop.error is not None:
        raise typer.Exit(1)
