"""`jobledger doctor` and `jobledger mongo-roles`."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Annotated

import typer

from jobledger.cli.commands.options import DEFAULT_URL, ConfigOption, JsonOption, UrlOption
from jobledger.cli.exit_codes import EXIT_FAILED
from jobledger.cli.output.terminal_text import echo, print_json, print_table
from jobledger.cli.runtime import load_settings, open_connection
from jobledger.ledger.domain.errors import JobledgerError

if TYPE_CHECKING:
    from jobledger.cli.checks.result import CheckResult
    from jobledger.cli.settings import Settings
    from jobledger.ledger.mongo.connection import Connection


def check_installation(
    config: ConfigOption = None,
    accept_result_store: Annotated[
        bool,
        typer.Option(
            "--accept-result-store",
            help="Accept the directory in results.store in its current state, after files were lost or moved",
        ),
    ] = False,
    url: UrlOption = DEFAULT_URL,
    as_json: JsonOption = False,
) -> None:
    """Check this machine, the database, the API, workers and jobs, and explain how to fix problems

    Prints one line for each check. Exits with 1 if a check fails.

    Examples:
        jobledger doctor
        jobledger doctor --json
    """
    from jobledger.cli.checks.machine import check_machine
    from jobledger.cli.checks.result import CheckResult, build_result_rows, build_results_json
    from jobledger.cli.commands.api_check import check_api
    from jobledger.cli.hosting import database

    settings = load_settings(config)
    if accept_result_store:
        with open_connection(settings) as connection:
            echo(asyncio.run(database.accept_result_store(settings, connection)))
        return
    results = list(check_machine(settings))
    try:
        with open_connection(settings) as connection:
            results += asyncio.run(_check_database(settings, connection))
    except JobledgerError as error:
        results.append(CheckResult("MongoDB", is_ok=False, detail="not usable", advice=str(error)))
    is_default = url == DEFAULT_URL
    local_url = f"http://127.0.0.1:{settings.api.port}" if settings.api.port else DEFAULT_URL
    results.append(check_api(local_url if is_default else url, is_required=not is_default))
    if as_json:
        print_json(build_results_json(results))
    else:
        print_table(build_result_rows(results), fits_terminal=False)
    raise typer.Exit(0 if all(result.is_ok for result in results) else EXIT_FAILED)


async def _check_database(settings: Settings, connection: Connection) -> list[CheckResult]:
    from jobledger.cli.checks.database import check_database

    return [result async for result in check_database(settings, connection)]


def print_mongo_roles(config: ConfigOption = None) -> None:
    """Print a mongosh script that creates MongoDB roles with the rights Jobledger needs

    Examples:
        jobledger mongo-roles > roles.js
    """
    from jobledger.cli.administration.mongo_roles import build_mongosh_script

    echo(*build_mongosh_script(load_settings(config).mongodb.db_name).splitlines())
