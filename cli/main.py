"""Entry point of the command `jobledger`: the command tree, and errors translated to exit codes."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from jobledger.cli.commands import batches, doctor, jobs, keys, log, roles, submit, views, webhooks
from jobledger.cli.exit_codes import EXIT_FAILED, EXIT_UNAVAILABLE, EXIT_UNREACHABLE, EXIT_USAGE
from jobledger.cli.output.terminal_text import SafeConsole, configure_output_encoding, echo, echo_text
from jobledger.ledger.domain.errors import (
    ConfigurationError,
    JobledgerError,
    LedgerUnavailable,
    ResourceUnavailable,
)

app = typer.Typer(
    name="jobledger",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.command("up")(roles.run_all)
app.command("api")(roles.run_api)
app.command("projector")(roles.run_projector)
app.command("worker")(roles.run_worker)
app.command("webhook-sender")(roles.run_webhook_sender)
app.command()(submit.submit)
app.add_typer(jobs.app, name="jobs")
app.add_typer(batches.app, name="batches")
app.add_typer(webhooks.app, name="webhooks")
app.add_typer(log.app, name="log")
app.add_typer(views.app, name="views")
app.add_typer(keys.app, name="keys")
app.command("doctor")(doctor.check_installation)
app.command("mongo-roles")(doctor.print_mongo_roles)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        echo(version("jobledger"))
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
]


@app.callback()
def handle_global_options(_version: VersionOption = False) -> None:
    """Run and inspect an event-sourced job queue on MongoDB"""


@app.command("demo")
def show_demo(
    keep_running: Annotated[bool, typer.Option("--keep-running", help="Keep all roles running until Ctrl-C")] = False,
) -> None:
    """Process a small generated conference from submission to Markdown"""
    from jobledger.cli.commands import demo as demo_command
    from jobledger.cli.hosting.database import open_database_server
    from jobledger.cli.hosting.logging_setup import configure_logging

    console = SafeConsole()
    with tempfile.TemporaryDirectory(prefix="jobledger-demo-", ignore_cleanup_errors=True) as directory:
        settings = demo_command.make_demo_settings(Path(directory))
        configure_logging(settings.logging)
        with open_database_server(settings, start=True) as (uri, _):
            succeeded = asyncio.run(
                demo_command.run_demo(
                    settings,
                    settings.mongodb.make_connection(uri),
                    Path(directory),
                    console,
                    keep_running=keep_running,
                )
            )
    raise typer.Exit(0 if succeeded else EXIT_FAILED)


def main() -> None:
    """Run the command that the arguments name, and end the process."""
    try:
        run()
    except SystemExit as exited:
        _exit_without_threads(exited.code)
        raise


def _exit_without_threads(code: object) -> None:
    """End the process immediately if threads are left. Python would wait for them, and a job may block one forever."""
    if any(not thread.daemon and thread is not threading.main_thread() for thread in threading.enumerate()):
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


def run() -> None:
    """Run a command. A `JobledgerError` is printed as one line and becomes an exit code, never a traceback."""
    configure_output_encoding()
    os.umask(0o077)  # files that a command or its children create are for this user only
    try:
        app()
    except ResourceUnavailable as error:
        _exit_with_error(error, EXIT_UNAVAILABLE)
    except ConfigurationError as error:
        _exit_with_error(error, EXIT_USAGE)
    except LedgerUnavailable as error:
        _exit_with_error(error, EXIT_UNREACHABLE)
    except JobledgerError as error:
        _exit_with_error(error, EXIT_FAILED)
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, RuntimeError, MemoryError) as error:
        from jobledger.workers.machine.health import find_machine_failure

        if (failure := find_machine_failure(error)) is None:
            raise
        _exit_with_error(failure, EXIT_UNAVAILABLE)


def _exit_with_error(error: Exception, code: int) -> None:
    echo_text(f"jobledger: {error}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
