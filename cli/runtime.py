"""Load the settings, find the database server, and run roles.

Heavy modules are imported inside functions, here and in `cli.commands`. Commands that only use HTTP, and `--help`,
must not take a second to start.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final, TypeVar

import typer

from jobledger.cli.exit_codes import EXIT_FAILED
from jobledger.cli.hosting.process_tuning import tune_garbage_collector
from jobledger.cli.output.terminal_text import echo, echo_text
from jobledger.ledger.domain.errors import ResourceUnavailable

if TYPE_CHECKING:
    from jobledger.cli.composition import Role, RunningProcess
    from jobledger.cli.hosting.shutdown import Shutdown
    from jobledger.cli.settings import Settings
    from jobledger.ledger.mongo.connection import Connection, Database
    from jobledger.ledger.mongo.embedded import EmbeddedServer

_T = TypeVar("_T")
_START_RETRY_DELAYS: Final = (0.25, 0.5, 1.0, 2.0, None)
"""Seconds between attempts to start while a port or lock is in use: the process that holds it may be exiting."""


def load_settings(config: Path | None) -> Settings:
    """Read the settings, configure logging, and print notices about ignored keys to standard error.

    Raises:
        ConfigurationError: See `read_settings`.
    """
    from jobledger.cli.hosting.logging_setup import configure_logging
    from jobledger.cli.settings_file import read_settings

    settings, notices = read_settings(config)
    configure_logging(settings.logging)
    for notice in notices:
        echo(f"note: {notice}", err=True)
    return settings


@contextmanager
def open_configured_connection(config: Path | None) -> Iterator[tuple[Settings, Connection]]:
    """Yield the settings and the connection to the database that they name.

    Raises:
        ConfigurationError: See `read_settings`.
        DatabaseUnsuitable: The embedded server cannot run.
    """
    settings = load_settings(config)
    with open_connection(settings) as connection:
        yield settings, connection


@contextmanager
def open_connection(settings: Settings) -> Iterator[Connection]:
    """Yield the connection to the database. Start an embedded server for the block if none is running.

    Raises:
        DatabaseUnsuitable: The embedded server cannot run.
    """
    from jobledger.ledger.mongo.embedded import attach_or_start

    mongodb = settings.mongodb
    if not mongodb.is_embedded:
        yield mongodb.make_connection(mongodb.uri.get_secret_value())
        return
    with attach_or_start(mongodb.data_dir, oplog_mb=mongodb.embedded_oplog_mb) as uri:
        yield mongodb.make_connection(uri)


def run_with_database(connection: Connection, work: Callable[[Database], Awaitable[_T]]) -> _T:
    """Run an asynchronous function with the database, and return its result."""

    async def run() -> _T:
        async with connection.create_client() as client:
            return await work(client[connection.db_name])

    tune_garbage_collector()
    return asyncio.run(run())


def run_roles(config: Path | None, selected: frozenset[Role] | None = None) -> None:
    """Run roles until the process is stopped.

    Args:
        config: The settings file.
        selected: Roles to run. None: all roles, and the embedded server.

    Raises:
        ResourceUnavailable, LedgerUnavailable: A resource could not be used, after several attempts.
    """
    from jobledger.cli.composition import ALL_ROLES
    from jobledger.cli.hosting.database import open_database_server
    from jobledger.workers.child.containment import new_event_loop

    settings = load_settings(config)
    with ExitStack() as stack:
        uri, server = _enter_with_retries(stack, lambda: open_database_server(settings, start=selected is None))
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(_run(settings, uri, server, selected or ALL_ROLES))


def _enter_with_retries(stack: ExitStack, make: Callable[[], AbstractContextManager[_T]]) -> _T:
    delays = iter(_START_RETRY_DELAYS)
    while True:
        try:
            return stack.enter_context(make())
        except ResourceUnavailable as error:
            time.sleep(_get_delay_or_raise(next(delays), error))


def _get_delay_or_raise(delay: float | None, error: ResourceUnavailable) -> float:
    if delay is None:
        raise error
    if delay == _START_RETRY_DELAYS[0]:
        echo_text(f"not started yet, retrying: {error}", err=True)
    return delay


async def _run(settings: Settings, uri: str, server: EmbeddedServer | None, selected: frozenset[Role]) -> None:
    from jobledger.cli.hosting.shutdown import Shutdown, compute_shutdown_timeout

    shutdown = Shutdown(compute_shutdown_timeout(settings, selected))
    shutdown.install_signal_handlers()
    try:
        async with AsyncExitStack() as stack:
            try:
                await _run_until_shutdown(stack, settings, uri, server, selected, shutdown)
            except BaseException as error:
                shutdown.request(error)  # starts the time limit for stopping the roles
                raise
    finally:
        if server is not None:
            shutdown.cancel_timeout()  # only the database server is left, and its shutdown has its own time limit
    if shutdown.error is not None:
        raise typer.Exit(EXIT_FAILED)


async def _run_until_shutdown(
    stack: AsyncExitStack,
    settings: Settings,
    uri: str,
    server: EmbeddedServer | None,
    selected: frozenset[Role],
    shutdown: Shutdown,
) -> None:
    from jobledger.cli.hosting.embedded_restarts import restart_until_shutdown

    process = await _start_with_retries(stack, settings, uri, selected, shutdown)
    if process is None:
        return
    if process.url is not None:
        echo(f"Jobledger listens on {process.url}  (Ctrl-C stops it)")
        echo(f"Dashboard: {process.url}/monitoring/events")
    else:
        echo(f"Running: {', '.join(sorted(selected))}  (Ctrl-C stops it)")
    await restart_until_shutdown(server, shutdown)
    echo("Stopping: waiting for running jobs, then releasing the rest …", err=True)


async def _start_with_retries(
    stack: AsyncExitStack, settings: Settings, uri: str, selected: frozenset[Role], shutdown: Shutdown
) -> RunningProcess | None:
    """Start roles in `stack`, with retries while a resource is in use. Return None if a shutdown was requested."""
    from jobledger.cli.composition import start_roles

    connection = settings.mongodb.make_connection(uri)
    stopped = asyncio.create_task(shutdown.wait())
    delays = iter(_START_RETRY_DELAYS)
    while not stopped.done():
        roles = start_roles(settings, connection, selected, on_failure=shutdown.request_after_failure)
        starting = asyncio.create_task(stack.enter_async_context(roles))
        await asyncio.wait({starting, stopped}, return_when=asyncio.FIRST_COMPLETED)
        try:
            if starting.done():
                process = starting.result()
                stopped.cancel()
                return process
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
        except ResourceUnavailable as error:
            await asyncio.wait({stopped}, timeout=_get_delay_or_raise(next(delays), error))
    return None
