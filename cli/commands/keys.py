"""`jobledger keys …`: create, list and revoke API keys."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from jobledger.cli.command_classes import CommandApp, use_options
from jobledger.cli.commands.options import ConfigOption, JsonOption, parse_duration
from jobledger.cli.output.documents import build_output
from jobledger.cli.output.terminal_text import echo, print_result
from jobledger.cli.runtime import open_configured_connection
from jobledger.ledger.domain.errors import ConfigurationError, NotFound

if TYPE_CHECKING:
    from jobledger.cli.settings import Settings
    from jobledger.ledger.mongo.connection import Connection, Database

app = CommandApp(help="Manage API keys for auth.mode `keys` (needs access to the database)")
_T = TypeVar("_T")


@app.command()
def create(
    user: Annotated[str, typer.Option(help="User of the key")],
    group: Annotated[list[str] | None, typer.Option(help="Group of the user (team-…). Repeatable")] = None,
    role: Annotated[
        list[str] | None, typer.Option(help="admin: full access. monitor: read all statistics. Repeatable")
    ] = None,
    name: Annotated[str | None, typer.Option(help="Description of the key")] = None,
    expires_in: Annotated[str | None, typer.Option(help="Lifetime, e.g. 12h or 90d. Default: never expires")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create an API key and print it once

    Only a digest of the key is stored.

    Examples:
        jobledger keys create --user alice
        jobledger keys create --user prometheus --role monitor --expires-in 90d
    """
    from jobledger.api.auth import api_keys
    from jobledger.cli.administration import api_key_admin

    lifetime = None if expires_in is None else parse_duration(expires_in, "--expires-in")
    key, token = api_key_admin.generate_key(
        user=user, groups=group or (), roles=role or (), name=name, expires_in=lifetime
    )
    settings, _ = _run_with_database(config, lambda db: api_keys.store_key(db, key))
    if settings.auth.mode != "keys":
        echo(f"note: auth.mode is `{settings.auth.mode}`; API keys are only used with `keys`", err=True)
    print_result({**api_key_admin.build_key_json(key), "key": str(token)}, str(token), as_json=as_json)
    echo(f"Store it: it is not shown again. `jobledger keys revoke {key.key_id}` revokes it.", err=True)


@app.command("ls")
@use_options(output=build_output)
def list_keys(output: Any, config: ConfigOption = None) -> None:
    """List API keys with user, expiry and number of browser sessions

    Examples:
        jobledger keys ls
        jobledger keys ls --json key_id,user_id,expires_at
    """
    from jobledger.api.auth import api_keys, browser_sessions
    from jobledger.cli.administration import api_key_admin

    async def load(db: Database) -> tuple[list[api_keys.ApiKey], dict[str, int]]:
        return await api_keys.list_api_keys(db), await browser_sessions.count_sessions(db)

    _, (keys, counts) = _run_with_database(config, load)
    sessions = {key.key_id: counts.get(browser_sessions.build_holder(key_id=key.key_id), 0) for key in keys}
    documents = [{**api_key_admin.build_key_json(key), "sessions": sessions[key.key_id]} for key in keys]
    rows = api_key_admin.build_key_rows(keys, sessions)
    output.print_list(documents, lambda _documents: rows, id_field="key_id", empty_text="No API keys.")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Key ID (see `keys ls`), or the whole key")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke an API key immediately

    Examples:
        jobledger keys revoke 0f6c1a2b3c4d5e6f
    """
    from jobledger.api.auth import api_keys, browser_sessions
    from jobledger.cli.administration.api_key_admin import parse_key_id

    key_id = parse_key_id(key_id)

    async def revoke_key(db: Database) -> bool:
        existed = await api_keys.revoke_key(db, key_id)
        await browser_sessions.end_sessions(db, browser_sessions.build_holder(key_id=key_id))
        return existed

    _, existed = _run_with_database(config, revoke_key)
    if not existed:  # the message does not repeat the argument, which may be most of a key
        raise NotFound("No API key has this ID. See `jobledger keys ls`.")
    print_result({"revoked": key_id}, f"{key_id} is revoked.", as_json=as_json)


@app.command("sign-out")
def sign_out(
    key_id: Annotated[str | None, typer.Argument(metavar="ID", help="Key ID, or the whole key")] = None,
    user: Annotated[str | None, typer.Option(help="User, for auth.mode `jwt`")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the browser sessions of an API key or of a user

    The key itself stays valid. `keys revoke` also revokes the key.

    Examples:
        jobledger keys sign-out --user alice
    """
    from jobledger.api.auth.browser_sessions import build_holder, end_sessions
    from jobledger.cli.administration.api_key_admin import parse_key_id

    if (key_id is None) == (user is None):
        raise ConfigurationError("Specify the ID of a key, or a user with --user.")
    holder = build_holder(key_id=None if key_id is None else parse_key_id(key_id), user_id=user or "")
    _, count = _run_with_database(config, lambda db: end_sessions(db, holder))
    print_result({"ended_sessions": count}, f"Sessions ended: {count}", as_json=as_json)


def _run_with_database(config: Path | None, work: Callable[[Database], Awaitable[_T]]) -> tuple[Settings, _T]:
    """Check the database server and run an asynchronous function with it. Return the settings and its result."""
    from jobledger.cli.hosting.database import open_database

    async def run(connection: Connection) -> _T:
        async with open_database(connection) as db:
            return await work(db)

    with open_configured_connection(config) as (settings, connection):
        return settings, asyncio.run(run(connection))
