"""cli: what several commands do: read the settings, find the database, run roles.

What takes long to load is loaded where it is needed, here and in the modules of commands: those that only speak HTTP,
or tell what can be said, should not take a second to begin.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final, TypeVar

import typer

from jobledger.cli.terminal_text import echo, echo_text
from jobledger.ledger.domain.errors import ResourceUnavailable

if TYPE_CHECKING:
    from jobledger.cli.composition import Role, RunningProcess, Shutdown
    from jobledger.cli.settings import Settings
    from jobledger.ledger.mongo.embedded import EmbeddedServer

_T = TypeVar("_T")
_START_PAUSES: Final = (0.25, 0.5, 1.0, 2.0, None)
"""Seconds between the attempts to start while a port or lock is taken: the process that has it may be ending."""
ConfigOption = Annotated[
    Path | None, typer.Option("--config", envvar="JOBLEDGER_CONFIG", help="The settings. Without it: ./config.yaml.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result for programs.")]


def open_any_database_server(settings: Settings) -> AbstractContextManager[str]:
    """The database of these settings; an embedded one that does not run is started meanwhile."""
    from jobledger.ledger.mongo.embedded import attach_or_start

    mongodb = settings.mongodb
    if not mongodb.is_embedded:
        return nullcontext(mongodb.uri.get_secret_value())
    return attach_or_start(mongodb.data_dir, oplog_mb=mongodb.embedded_oplog_mb)


def load_settings(config: Path | None) -> Settings:
    """Return the settings, with logging set up by them; notices go to standard error.

    Raises:
        ConfigurationError: as `read_settings`.
    """
    from jobledger.cli.composition import configure_logging
    from jobledger.cli.settings import read_settings

    settings, notices = read_settings(config)
    configure_logging(settings.logging)
    for notice in notices:
        echo(f"note: {notice}", err=True)
    return settings


def run_roles(config: Path | None, selected: frozenset[Role] | None = None) -> None:
    """Run roles until somebody stops the process; without `wanted`, all of them, and the database.

    Raises:
        ResourceUnavailable, LedgerUnavailable: something is not usable now, though it was tried for a few seconds.
    """
    from jobledger.cli.composition import ALL_ROLES, open_database_server
    from jobledger.workers.child.containment import new_event_loop

    settings = load_settings(config)
    with ExitStack() as stack:
        uri, server = _entered(stack, lambda: open_database_server(settings, start=selected is None))
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_serve(settings, uri, server, selected or ALL_ROLES))


def _entered(stack: ExitStack, make: Callable[[], AbstractContextManager[_T]]) -> _T:
    """Enter a context, with a few attempts while a resource is not available."""
    pauses = iter(_START_PAUSES)
    while True:
        try:
            return stack.enter_context(make())
        except ResourceUnavailable as error:
            time.sleep(_pause_or_raise(next(pauses), error))


def _pause_or_raise(pause: float | None, error: ResourceUnavailable) -> float:
    if pause is None:
        raise error
    if pause == _START_PAUSES[0]:
        echo_text(f"not started yet, trying again: {error}", err=True)
    return pause


async def _serve(settings: Settings, uri: str, server: EmbeddedServer | None, wanted: frozenset[Role]) -> None:
    from jobledger.cli.composition import Shutdown, shutdown_timeout

    stop = Shutdown(shutdown_timeout(settings, wanted))
    stop.install_signal_handlers()
    try:
        async with AsyncExitStack() as stack:
            try:
                await _run_until_stopped(stack, settings, uri, server, wanted, stop)
            except BaseException as error:
                stop.request(error)  # the roles end within the limit, whatever made them end
                raise
    finally:
        if server is not None:
            stop.cancel_timeout()  # what remains is to stop the database server, which has a time limit of its own
    if stop.error is not None:
        raise typer.Exit(1)


async def _run_until_stopped(
    stack: AsyncExitStack,
    settings: Settings,
    uri: str,
    server: EmbeddedServer | None,
    wanted: frozenset[Role],
    stop: Shutdown,
) -> None:
    from jobledger.cli.embedded_supervisor import supervise_until_shutdown

    running = await _started(stack, settings, uri, wanted, stop)
    if running is None:
        return
    if running.url is not None:
        echo(f"Jobledger answers at {running.url}  (Ctrl-C stops it)")
        echo(f"Dashboard: {running.url}/monitoring/events")
    else:
        echo(f"{' and '.join(sorted(wanted))} at work  (Ctrl-C stops it)")
    await supervise_until_shutdown(server, stop)
    echo("Stopping: running jobs may end, the rest is given back …", err=True)


async def _started(
    stack: AsyncExitStack, settings: Settings, uri: str, wanted: frozenset[Role], stop: Shutdown
) -> RunningProcess | None:
    """Start roles in `stack`, with a few attempts while a resource is not available; None if stopped meanwhile."""
    from jobledger.cli.composition import start_roles

    connection = settings.mongodb.make_connection(uri)
    stopped = asyncio.create_task(stop.wait())
    pauses = iter(_START_PAUSES)
    while not stopped.done():
        starting = asyncio.create_task(
            stack.enter_async_context(start_roles(settings, connection, wanted, on_failure=stop.request_after_failure))
        )
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        try:
            if starting.done():
                running = starting.result()
                stopped.cancel()
                return running
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        except ResourceUnavailable as error:
            await asyncio.wait({stopped}, timeout=_pause_or_raise(next(pauses), error))
    return None
