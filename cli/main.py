"""Entry point of the command `jobledger`: the command tree, and errors translated to exit codes."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Final, Literal, cast

import typer

from jobledger.cli.command_classes import CommandApp, HelpGroup
from jobledger.cli.commands import (
    batches,
    completion,
    doctor,
    jobs,
    keys,
    log,
    overview,
    roles,
    submit,
    views,
    webhooks,
)
from jobledger.cli.commands.completion import COMPLETION_VARIABLE, complete
from jobledger.cli.exit_codes import (
    EXIT_CLOSED_PIPE,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    EXIT_UNAVAILABLE,
    EXIT_UNREACHABLE,
    EXIT_USAGE,
)
from jobledger.cli.output.errors import print_error, print_usage_error
from jobledger.cli.output.terminal_text import SafeConsole, configure_output_encoding, echo, echo_page
from jobledger.ledger.domain.errors import (
    ConfigurationError,
    JobledgerError,
    LedgerUnavailable,
    ResourceUnavailable,
)

app = CommandApp(name="jobledger")
_OUTPUT_FUNCTIONS: Final = ("_flush_output", "echo", "_write_buffer", "_save")
"""The functions that write to the output: of this module, Typer, Rich and `jobs export --to -`."""
_HELP: Final = """Run and inspect an event-sourced job queue on MongoDB

\b
Environment:
  JOBLEDGER_URL     URL of the API. Default: http://127.0.0.1:5001
  JOBLEDGER_KEY     API key, if the API requires authentication
  JOBLEDGER_CONFIG  Settings file. Default: ./config.yaml
  NO_COLOR          If set, output has no colors

\b
Exit codes:
  0  success
  1  the operation or a job failed, or a check found a problem
  2  wrong arguments or settings
  3  a service, such as the API or the database, does not respond
  4  a time limit has passed, or a port, disk or lock is unavailable now
  130  interrupted by Ctrl-C (roles: only at the second Ctrl-C or SIGTERM)
  141  the reader of the output has closed it

Examples:
    jobledger submit --type echo --param text=hello --wait
    jobledger jobs ls --status failed
    jobledger jobs retry --error FETCH_FAILED --dry-run
    jobledger doctor
"""
_USE, _OPERATE, _RUN, _AUDIT, _OTHER = "Use", "Operate", "Run", "Audit", "Other"
app.command("submit", rich_help_panel=_USE)(submit.submit)
app.add_typer(jobs.app, name="jobs", rich_help_panel=_USE)
app.add_typer(batches.app, name="batches", rich_help_panel=_USE)
app.add_typer(overview.types_app, name="types", rich_help_panel=_USE)
app.add_typer(overview.errors_app, name="errors", rich_help_panel=_OPERATE)
app.add_typer(overview.workers_app, name="workers", rich_help_panel=_OPERATE)
app.add_typer(webhooks.app, name="webhooks", rich_help_panel=_OPERATE)
app.add_typer(keys.app, name="keys", rich_help_panel=_OPERATE)
app.command("doctor", rich_help_panel=_OPERATE)(doctor.check_installation)
app.command("up", rich_help_panel=_RUN)(roles.run_all)
app.command("api", rich_help_panel=_RUN)(roles.run_api)
app.command("projector", rich_help_panel=_RUN)(roles.run_projector)
app.command("worker", rich_help_panel=_RUN)(roles.run_worker)
app.command("webhook-sender", rich_help_panel=_RUN)(roles.run_webhook_sender)
app.command("mongo-roles", rich_help_panel=_RUN)(doctor.print_mongo_roles)
app.add_typer(log.app, name="log", rich_help_panel=_AUDIT)
app.add_typer(views.app, name="views", rich_help_panel=_AUDIT)


def _print_version(requested: bool) -> None:
    if requested:
        from importlib.metadata import version

        echo(version("jobledger"))
        raise typer.Exit


VersionOption = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit")
]


ColorOption = Annotated[
    Literal["auto", "always", "never"], typer.Option("--color", help="Color the output. auto: if it is a terminal")
]


@app.callback(help=_HELP)
def handle_global_options(color: ColorOption = "auto", _version: VersionOption = False) -> None:
    """Run the command that the arguments name."""
    if color != "auto":  # Rich reads these variables
        chosen, other = ("FORCE_COLOR", "NO_COLOR") if color == "always" else ("NO_COLOR", "FORCE_COLOR")
        os.environ.pop(other, None)
        os.environ[chosen] = "1"


@app.command("demo", rich_help_panel=_RUN)
def show_demo(
    keep_running: Annotated[bool, typer.Option("--keep-running", help="Keep all roles running until Ctrl-C")] = False,
) -> None:
    """Process a small generated conference from submission to Markdown

    Examples:
        jobledger demo
    """
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


app.command("completion", rich_help_panel=_OTHER)(completion.print_completion_script)


@app.command("help", rich_help_panel=_OTHER)
def print_help(
    ctx: typer.Context, command: Annotated[list[str] | None, typer.Argument(help="Command, e.g. jobs ls")] = None
) -> None:
    """Show the help page of a command

    Examples:
        jobledger help jobs ls
    """
    page: Any = ctx.find_root()
    for name in command or ():
        if not isinstance(page.command, HelpGroup):
            break
        _, found, _ = page.command.resolve_command(page, [name])
        page = typer.Context(cast(Any, found), info_name=name, parent=page)
    echo_page(page.get_help())


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
    """Run a command and end the process. An error is printed and becomes an exit code, never a traceback."""
    configure_output_encoding()
    os.umask(0o077)  # files that a command or its children create are for this user only
    try:
        code = _run_command(sys.argv[1:])
        _flush_output()
    except typer.TyperException as error:
        print_usage_error(error)
        code = error.exit_code
    except ResourceUnavailable as error:
        code = _print_error(error, EXIT_UNAVAILABLE)
    except ConfigurationError as error:
        code = _print_error(error, EXIT_USAGE)
    except LedgerUnavailable as error:
        code = _print_error(error, EXIT_UNREACHABLE)
    except JobledgerError as error:
        code = _print_error(error, EXIT_FAILED)
    except (KeyboardInterrupt, typer.Abort):
        code = EXIT_INTERRUPTED
    except BrokenPipeError:  # the reader of the output, such as `head`, has all it wants
        _discard_output()
        code = EXIT_CLOSED_PIPE
    except (OSError, RuntimeError, MemoryError) as error:
        code = _print_error(_find_resource_failure(error), EXIT_UNAVAILABLE)
    sys.exit(code)


def _find_resource_failure(error: Exception) -> Exception:
    """Return the error to print for an exception that comes from the machine, or raise the exception."""
    from jobledger.workers.machine.health import find_machine_failure

    if isinstance(error, OSError) and traceback.extract_tb(error.__traceback__)[-1].name in _OUTPUT_FUNCTIONS:
        _discard_output()
        return ResourceUnavailable(f"Cannot write the output: {error.strerror}.")
    if (failure := find_machine_failure(error)) is None:
        raise error
    return failure


def _run_command(arguments: Sequence[str]) -> int:
    """Run the command that the arguments name, and return its exit code."""
    command: Any = typer.main.get_command(app)
    if COMPLETION_VARIABLE in os.environ:
        complete(command)
    try:
        with command.make_context("jobledger", list(arguments)) as ctx:
            command.invoke(ctx)
    except typer.Exit as ended:
        return ended.exit_code
    return 0


def _print_error(error: Exception, code: int) -> int:
    print_error(error)
    return code


def _flush_output() -> None:
    if sys.stdout is not None:  # it is None if the shell has closed it: `>&-`
        sys.stdout.flush()


def _discard_output() -> None:
    """Discard what is not written yet. Otherwise, Python would try to write it at exit, and print a traceback."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    main()
