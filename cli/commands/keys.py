"""`jobledger keys …`: create, list and revoke API keys."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

import orjson
import typer

from jobledger.cli.options import ConfigOption, JsonOption
from jobledger.cli.runtime import load_settings, open_any_database_server
from jobledger.cli.terminal_text import SafeConsole, echo, echo_json
from jobledger.ledger.domain.errors import ConfigurationError, NotFound

app = typer.Typer(
    help="Manage API keys for auth.mode `keys`, directly on the database",
    no_args_is_help=True,
)


@app.command()
def create(
    user: Annotated[str, typer.Option("--user", help="User of the key")],
    group: Annotated[list[str] | None, typer.Option("--group", help="Group of the user (team-…). Repeatable")] = None,
    role: Annotated[
        list[str] | None,
        typer.Option("--role", help="admin: full access. monitor: read all statistics. Repeatable"),
    ] = None,
    name: Annotated[str | None, typer.Option(help="Description of the key")] = None,
    expires_in: Annotated[str | None, typer.Option(help="Lifetime, e.g. 12h or 90d. Default: never expires")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Create an API key and print it once

    Only a digest of the key is stored.
    """
    from jobledger.cli import api_key_admin

    settings = load_settings(config)
    key, token = api_key_admin.new_key(
        user=user, groups=group or (), roles=role or (), name=name, expires_in=expires_in
    )
    with open_any_database_server(settings) as uri:
        asyncio.run(api_key_admin.store_key(settings.mongodb.make_connection(uri), key))
    if settings.auth.mode != "keys":
        echo(f"note: auth.mode is `{settings.auth.mode}`; API keys are only used with `keys`", err=True)
    if as_json:
        _print_json({**api_key_admin.key_to_json(key), "key": str(token)})
    else:
        echo(str(token))
    echo(f"Store it: it is not shown again. `jobledger keys revoke {key.key_id}` revokes it.", err=True)


@app.command("list")
def list_api_keys(config: ConfigOption = None, as_json: JsonOption = False) -> None:
    """List API keys with user, expiry and number of dashboard sessions"""
    from jobledger.cli import api_key_admin

    settings = load_settings(config)
    with open_any_database_server(settings) as uri:
        keys, sessions = asyncio.run(api_key_admin.list_api_keys(settings.mongodb.make_connection(uri)))
    if as_json:
        _print_json([{**api_key_admin.key_to_json(key), "sessions": sessions[key.key_id]} for key in keys])
    else:
        SafeConsole().print(api_key_admin.keys_table(keys, sessions) if keys else "There are no API keys.")


@app.command()
def revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="Key ID (see `keys list`), or the whole key")],
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke an API key immediately"""
    from jobledger.cli import api_key_admin

    settings, key_id = load_settings(config), api_key_admin.parse_key_id(key_id)
    with open_any_database_server(settings) as uri:
        existed = asyncio.run(api_key_admin.revoke_key(settings.mongodb.make_connection(uri), key_id))
    if not existed:  # the message does not repeat the argument, which may be most of a key
        raise NotFound("There is no API key with this ID: see `jobledger keys list`.")
    if as_json:
        _print_json({"revoked": key_id})
    else:
        echo(f"{key_id} is revoked.")


@app.command("sign-out")
def sign_out(
    key_id: Annotated[str | None, typer.Argument(metavar="[ID]", help="Key ID, or the whole key")] = None,
    user: Annotated[str | None, typer.Option("--user", help="User, for auth.mode `jwt`")] = None,
    config: ConfigOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the dashboard sessions of an API key or of a user

    The key itself stays valid; `keys revoke` ends both.
    """
    from jobledger.api.auth.browser_sessions import get_session_owner
    from jobledger.cli import api_key_admin

    if (key_id is None) == (user is None):
        raise ConfigurationError("Specify the ID of a key, or a user with --user.")
    owner = (
        get_session_owner(key_id=api_key_admin.parse_key_id(key_id))
        if key_id is not None
        else get_session_owner(user_id=user or "")
    )
    settings = load_settings(config)
    with open_any_database_server(settings) as uri:
        count = asyncio.run(api_key_admin.end_sessions(settings.mongodb.make_connection(uri), owner))
    if as_json:
        _print_json({"ended_sessions": count})
    else:
        echo(f"Sessions ended: {count}")


def _print_json(content: Any) -> None:
    echo_json(orjson.dumps(content, option=orjson.OPT_UTC_Z))
